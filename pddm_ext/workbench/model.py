"""The embedding: a backbone that makes features of pictures, and a linear layer to their final length."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pddm_ext import StructureHead

from .backbones import named, said
from .settings import Settings

#: Pixels of a channel that a CPU takes at once, two or three photographs. What a layer makes of more is so large that
#: its memory comes from the system and goes back to it, page by page, at every layer: 32 at once take thrice the time.
_PIXELS = 2**17


class Embedder(nn.Module):
    """A backbone (pictures to (n, f) features) and a linear layer: (n, dim) embeddings, not normalised.

    Args:
        backbone: any module that makes such features.
        dim: length of an embedding.
        picture: (channels, height, width) of what the backbone sees.
        structured: whether a second head gives each picture's structure, too.
        name: what messages call the backbone.
        frozen: whether the backbone stays as it is: its parameters, and in evaluation mode the statistics of its
            batch normalisation, too.

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
        frozen: bool = False,
    ) -> None:
        super().__init__()
        was_training = backbone.training
        try:
            with torch.no_grad():
                features = backbone.eval()(torch.zeros(1, *picture))
        except Exception as error:  # of code that is not ours
            raise ValueError(
                f"{name}: {said(error)}; it does not take pictures of shape {picture}. convnet takes drawings, "
                f"(1, 32, 32); for photographs choose efficientnet-lite0, timm/NAME or torchvision/NAME"
            ) from error
        backbone.train(was_training)
        if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            kind = f" {features.dtype}" if isinstance(features, Tensor) else ""
            raise ValueError(f"{name} gives {shape}{kind} for one picture; floating features (1, f) are accepted")
        self.backbone, self.head = backbone, nn.Linear(features.shape[1], dim)
        self.structure = StructureHead(features.shape[1], dim) if structured else None
        self.frozen = frozen
        if frozen:
            backbone.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Embedder:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, pictures: Tensor) -> Tensor:
        return self.both(pictures)[0]

    def both(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings and, with a structure head, structures of the same shape."""
        return self.project(self.backbone(pictures))

    def project(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`both` of pictures whose backbone features (n, f) are known."""
        return self.head(features), None if self.structure is None else self.structure(features)


def pieces(pictures: Tensor) -> tuple[Tensor, ...]:
    """Pictures (n, channels, height, width), or features (n, f), in parts that their device is quickest with."""
    if pictures.device.type != "cpu":
        return (pictures,)
    at_once = max(1, _PIXELS // math.prod(pictures.shape[2:]))
    return pictures.tensor_split(max(1, -(-len(pictures) // at_once)))


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
        made = named(settings.backbone, settings.pretrained, picture[1]) if backbone is None else backbone
        return Embedder(
            made, settings.dim, picture, structured=settings.structure > 0, name=name, frozen=settings.freeze
        )
