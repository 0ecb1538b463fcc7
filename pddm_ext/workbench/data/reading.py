"""One picture, from a file or from memory, to what is stored of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .augment import Drawings, Photographs, View
from .splits import fit

#: What Pillow may take a file for. Left to itself it starts other programs at some kinds of file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def read(path: str | os.PathLike[str], view: View) -> Tensor:
    """What is stored of a picture in a file: (channels, stored, stored) uint8.

    Raises:
        ValueError: not a readable picture; the message names the file and the reason.
        OSError: there is no such file, or it may not be read.
    """
    with open(path, "rb") as file:
        try:
            with Image.open(file, formats=FORMATS) as picture:
                return prepared(picture, view)
        except Exception as error:  # Pillow raises almost anything at a damaged file
            raise ValueError(f"{Path(path)}: not a readable picture ({error})") from error


def prepared(picture: Image.Image, view: View) -> Tensor:
    """What is stored of a picture: (channels, stored, stored) uint8; of a photograph the middle square, red, green and
    blue; of a drawing, dark on light, its ink.

    Raises:
        ValueError: pixels that are not of 8 bits a channel, or a drawing without ink.
    """
    if picture.mode[0] in "IF":
        # Pillow would clip them all to white.
        raise ValueError(f"its pixels are of Pillow's mode {picture.mode}, not of 8 bits a channel")
    if isinstance(view, Drawings):
        return fit(ImageOps.invert(picture.convert("L")))
    upright = ImageOps.exif_transpose(picture).convert("RGB")
    method = _RESAMPLING[view.interpolation if isinstance(view, Photographs) else "bicubic"]
    square = ImageOps.fit(upright, (view.stored, view.stored), method)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def pictured(source: Any, view: View) -> Tensor:
    """:func:`read` of a path, or :func:`prepared` of a Pillow picture or of a uint8 tensor (c, height, width).

    Raises:
        TypeError: none of these.
        ValueError: a shape that is no picture's, or what :func:`read` refuses.
        OSError: as :func:`read`.
    """
    if isinstance(source, Image.Image):
        return prepared(source, view)
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.dim() != 3 or source.shape[0] not in (1, 3, 4) or 0 in source.shape:
            raise ValueError(
                f"a picture is a tensor of shape {tuple(source.shape)} and {source.dtype}; uint8 of "
                f"(1, 3 or 4, height, width) is accepted"
            )
        pixels = source.detach().cpu().permute(1, 2, 0).contiguous().numpy()
        return prepared(Image.fromarray(pixels[:, :, 0] if source.shape[0] == 1 else pixels), view)
    if isinstance(source, (str, os.PathLike)):
        return read(source, view)
    raise TypeError(f"a picture is {type(source).__name__}; a path, a Pillow picture or a uint8 tensor is accepted")
