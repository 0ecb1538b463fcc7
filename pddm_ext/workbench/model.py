"""The embedding: a backbone that makes features of pictures, and a linear layer to their final length."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from pddm_ext import StructureHead

from .settings import Settings


class ConvNet(nn.Sequential):
    """Three strided convolutions: (n, 1, 32, 32) pictures to (n, 1024) features."""

    def __init__(self) -> None:
        super().__init__(*_block(1, 32, 5), *_block(32, 64, 3), *_block(64, 64, 3), nn.Flatten())


def _block(channels: int, out: int, kernel: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU()


class Embedder(nn.Module):
    """A backbone (pictures to (n, f) features) and a linear layer: (n, dim) embeddings, not normalised.

    Args:
        backbone: any module that makes such features.
        dim: length of an embedding.
        picture: (channels, height, width) of what the backbone sees.
        structured: whether a second head gives each picture's structure, too.
        name: what messages call the backbone.

    Raises:
        ValueError: the backbone does not take such pictures, or gives no (n, f) features.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dim: int,
        picture: tuple[int, int, int],
        structured: bool = False,
        name: str = "the backbone",
    ) -> None:
        super().__init__()
        was_training = backbone.training
        try:
            with torch.no_grad():
                features = backbone.eval()(torch.zeros(1, *picture))
        except Exception as error:  # of code that is not ours
            raise ValueError(
                f"{name}: {_said(error)}; it does not take pictures of shape {picture}. convnet takes drawings, "
                f"(1, 32, 32); for photographs choose --backbone timm/NAME or torchvision/NAME"
            ) from error
        backbone.train(was_training)
        if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            kind = f" {features.dtype}" if isinstance(features, Tensor) else ""
            raise ValueError(f"{name} gives {shape}{kind} for one picture; floating features (1, f) are accepted")
        self.backbone, self.head = backbone, nn.Linear(features.shape[1], dim)
        self.structure = StructureHead(features.shape[1], dim) if structured else None

    def forward(self, pictures: Tensor) -> Tensor:
        return self.both(pictures)[0]

    def both(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings and, with a structure head, structures of the same shape."""
        features = self.backbone(pictures)
        return self.head(features), None if self.structure is None else self.structure(features)


def embedder(settings: Settings, picture: tuple[int, int, int], backbone: nn.Module | None = None) -> Embedder:
    """The net of a run; the same seed gives the same initial weights, and torch's global generator is left as it was.

    Args:
        settings: names the backbone and the length of an embedding.
        picture: (channels, height, width) of what the net sees.
        backbone: any module that makes (n, f) features, in place of the named one.

    Raises:
        ValueError: there is no such backbone, or it does not fit; the message names it.
        ModuleNotFoundError: its package is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        name = "the backbone" if backbone is not None else f"--backbone {settings.backbone}"
        made = _backbone(settings.backbone, settings.pretrained) if backbone is None else backbone
        return Embedder(made, settings.dim, picture, structured=settings.structure > 0, name=name)


def _backbone(name: str, pretrained: bool) -> nn.Module:
    library, _, model = name.partition("/")
    if name == "convnet":
        return ConvNet()
    try:
        if library == "timm" and model:
            timm: nn.Module = importlib.import_module("timm").create_model(model, pretrained=pretrained, num_classes=0)
            return timm
        if library == "torchvision" and model:
            models = importlib.import_module("torchvision.models")
            return _headless(models.get_model(model, weights="DEFAULT" if pretrained else None))
        module, _, attribute = name.partition(":")
        if attribute:
            sys.path.insert(0, os.getcwd())  # as python -m would
            return _called(getattr(importlib.import_module(module), attribute))
    except ModuleNotFoundError:
        raise  # a package to install, which the message names
    except (Exception, SystemExit) as error:  # of code that is not ours; a script may exit when it is imported
        raise ValueError(f"--backbone {name}: {_said(error)}") from error
    raise ValueError(f"--backbone is {name!r}; convnet, timm/NAME, torchvision/NAME and MODULE:CALLABLE are accepted")


def _said(error: BaseException) -> str:
    """An exception in one line. Its kind belongs to it: of a KeyError the message is nothing but the key."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _called(make: Any) -> nn.Module:
    made = make()
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
