"""One picture, from a file or from memory, to what is stored of it."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from .augment import Drawings, Photographs, View
from .splits import fit

#: What Pillow may take a file for. Left to itself it starts other programs at some kinds of file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

#: File names of pictures in FORMATS.
EXTENSIONS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

#: Formats that only some installations read: by file name, and what reads them.
OPTIONAL = {".avif": ("AVIF", "a Pillow that reads AVIF"), **dict.fromkeys((".heic", ".heif"), ("HEIF", "pillow-heif"))}

#: A JPEG is decoded at an eighth, a quarter or half of its size where that leaves this many times the size needed: the
#: rest of the way is resampled, so that little is lost to a full decoding.
_DRAFT = 2

#: The number of TIFF's tag.
_BITS_PER_SAMPLE = 258

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@functools.cache
def formats() -> tuple[str, ...]:
    """What Pillow may take a file for here, by its names: BMP, GIF, JPEG, PNG, PPM, TIFF and WebP; AVIF and HEIF where
    Pillow or ``pillow-heif`` read them."""
    found = list(FORMATS)
    if "avif" in features.get_supported_modules():
        found.append("AVIF")
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
        found.append("HEIF")
    return tuple(found)


@functools.cache
def extensions() -> tuple[str, ...]:
    """The ends of file names, in small letters, that are taken for pictures here."""
    return tuple(sorted((*EXTENSIONS, *(name for name, (kind, _) in OPTIONAL.items() if kind in formats()))))


def read(path: str | os.PathLike[str], view: View) -> Tensor:
    """What is stored of a picture in a file: (channels, stored, stored) uint8.

    A large JPEG is decoded at a fraction of its size, which changes a value by little.

    Raises:
        ValueError: not a readable picture; the message names the file and the reason.
        OSError: there is no such file, or it may not be read.
    """
    with open(path, "rb") as file:
        return decoded(file, str(Path(path)), view)


def decoded(file: IO[bytes], where: str, view: View) -> Tensor:
    """:func:`read` of an open file, which messages call ``where``.

    Raises:
        ValueError: not a readable picture.
    """
    try:
        with Image.open(file, formats=formats()) as picture:
            picture.draft(None, (_DRAFT * view.stored, _DRAFT * view.stored))
            return prepared(picture, view)
    except Exception as error:  # Pillow raises almost anything at a damaged file
        raise ValueError(f"{where}: not a readable picture ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # whose message shows the open file
        return f"cannot identify image file; {', '.join(formats())} are read"
    return " ".join(str(error).split()) or type(error).__name__


def prepared(picture: Image.Image, view: View) -> Tensor:
    """What is stored of a picture: (channels, stored, stored) uint8; of a photograph the middle square, red, green and
    blue; of a drawing, dark on light, its ink. What is transparent is white; 16 bits a channel become 8.

    Raises:
        ValueError: pixels without a known range, as of 32 bits, or a drawing without ink.
    """
    opaque = _opaque(_of_8_bits(picture))
    if isinstance(view, Drawings):
        return fit(ImageOps.invert(opaque.convert("L")))
    upright = ImageOps.exif_transpose(opaque).convert("RGB")
    method = _RESAMPLING[view.interpolation if isinstance(view, Photographs) else "bicubic"]
    square = ImageOps.fit(upright, (view.stored, view.stored), method)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _of_8_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 bits a channel (Pillow's modes I;16 and I) scaled to 8; any other one as it is."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture)
    known = picture.mode != "F" and _is_of_16_bits(picture)
    if not known or (values.size and not 0 <= values.min() <= values.max() <= 0xFFFF):
        # Of what range they are, nothing says.
        raise ValueError(f"its pixels are of Pillow's mode {picture.mode}, not of 8 or 16 bits a channel")
    scaled = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    clear = picture.info.get("transparency")
    if clear is not None:  # the colour, of 16 bits, too
        scaled = Image.merge("LA", (scaled, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))
    scaled.info["exif"] = picture.getexif().tobytes()
    return scaled


def _is_of_16_bits(picture: Image.Image) -> bool:
    """Whether pixels of the modes I;16 and I are; what else has the mode I is of 32."""
    bits = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    if bits is not None:
        return set(bits) == {16}
    # A PNG's are, or a PPM's made so, whatever mode this Pillow has for them.
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))


def _opaque(picture: Image.Image) -> Image.Image:
    """What a viewer shows of a picture on white paper."""
    if not picture.has_transparency_data:
        return picture
    if picture.mode == "La":  # which Pillow would take for opaque
        picture = picture.convert("LA")
    exif = picture.getexif()
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
    on_white.info["exif"] = exif.tobytes()
    return on_white


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
