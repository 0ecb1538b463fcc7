"""From stored pictures to what a net sees, a batch at a time on the batch's device, plain or randomly distorted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class View(Protocol):
    """How pictures are shown to a net.

    A loader's worker processes, and those of a comparison, get a view pickled.

    Attributes:
        channels: of what a net sees.
        size: its height and width.
        stored: side of a stored picture.
    """

    @property
    def channels(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def stored(self) -> int: ...

    def plain(self, pictures: Tensor, /) -> Tensor:
        """Stored (n, c, stored, stored) uint8 to (n, channels, size, size) float32, the same each time."""
        ...

    def augment(self, pictures: Tensor, generator: torch.Generator, /) -> Tensor:
        """The same under random distortions drawn from a generator on the batch's device."""
        ...

    def show(self, seen: Tensor, /) -> Tensor:
        """What a net sees to (n, channels, size, size) float32 in [0, 1], for people."""
        ...


def _half(pictures: Tensor) -> Tensor:
    return F.avg_pool2d(pictures, 2)


@dataclass(frozen=True)
class Drawings:
    """Drawings of 64 pixels, ink bright, seen at half that size."""

    channels: ClassVar[int] = 1
    size: ClassVar[int] = 32
    stored: ClassVar[int] = 64

    def plain(self, drawings: Tensor) -> Tensor:
        """(n, 1, 64, 64) uint8 to (n, 1, 32, 32) float32 in [0, 1]."""
        return _half(drawings.float() / 255)

    def augment(self, drawings: Tensor, generator: torch.Generator) -> Tensor:
        """:meth:`plain` under rotation (±12°), scale (0.85 to 1.15), shift (±2 of 32 pixels) and noise (σ 0.1)."""
        n, device = len(drawings), drawings.device
        angle, zoom, right, down = torch.rand(4, n, generator=generator, device=device) * 2 - 1
        angle = angle * math.radians(12)
        zoom = 1 / (1 + 0.15 * zoom)
        shift = torch.stack([right, down], -1) * (2 * 2 / 32)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(n, 2, 2)
        affine = torch.cat([zoom[:, None, None] * turn, shift[:, :, None]], -1)
        grid = F.affine_grid(affine, list(drawings.shape), align_corners=False)
        pictures = _half(F.grid_sample(drawings.float() / 255, grid, align_corners=False))
        return (pictures + 0.1 * torch.randn(pictures.shape, generator=generator, device=device)).clamp(0, 1)

    def show(self, seen: Tensor) -> Tensor:
        """(n, 1, 32, 32) float32 in [0, 1], as they are."""
        return seen


#: The one view of drawings.
DRAWINGS = Drawings()

#: By which a photograph may be scaled.
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Photographs:
    """Photographs as a backbone was trained to see them; the defaults are those of most published ones.

    Attributes:
        size: side of what a net sees.
        stored: side of a stored photograph, of which :meth:`plain` takes the middle.
        mean: of red, green and blue in [0, 1], which standardising takes off.
        std: that it divides by.
        interpolation: by which a photograph is brought to ``stored`` (``INTERPOLATIONS``).

    Raises:
        ValueError: sizes, statistics or an interpolation that cannot be.
    """

    size: int = 224
    stored: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    channels: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.stored:
            raise ValueError(f"size is {self.size} and stored {self.stored}; 1 to stored is accepted")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} is {values}; three finite numbers are accepted")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; positive numbers are accepted")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}; {', '.join(INTERPOLATIONS)} are accepted")

    def plain(self, photos: Tensor) -> Tensor:
        """The middle of (n, 3, stored, stored) uint8, standardised: (n, 3, size, size) float32."""
        edge = (self.stored - self.size) // 2
        middle = photos[:, :, edge : edge + self.size, edge : edge + self.size]
        return self._standard(middle.float() / 255, +1)

    def augment(self, photos: Tensor, generator: torch.Generator) -> Tensor:
        """Random crops (0.16 to 1 of the area, aspect 3:4 to 4:3), half of them mirrored: (n, 3, size, size)."""
        n, device = len(photos), photos.device
        area, aspect, right, down, mirror = torch.rand(5, n, generator=generator, device=device)
        aspect = ((aspect * 2 - 1) * math.log(4 / 3) / 2).exp()
        side = (0.16 + 0.84 * area).sqrt()
        width, height = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
        flip = torch.where(mirror < 0.5, -1.0, 1.0)
        zero = torch.zeros_like(width)
        affine = torch.stack(
            [width * flip, zero, (right * 2 - 1) * (1 - width), zero, height, (down * 2 - 1) * (1 - height)], -1
        ).reshape(n, 2, 3)
        grid = F.affine_grid(affine, [n, 3, self.size, self.size], align_corners=False)
        cropped = F.grid_sample(photos.float() / 255, grid, padding_mode="border", align_corners=False)
        return self._standard(cropped, +1)

    def show(self, seen: Tensor) -> Tensor:
        """Standardised (n, 3, size, size) back to [0, 1]."""
        return self._standard(seen, -1)

    def _standard(self, pictures: Tensor, sign: int) -> Tensor:
        mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (self.mean, self.std))
        return (pictures - mean) / std if sign > 0 else (pictures * std + mean).clamp(0, 1)


#: How most published backbones see photographs.
PHOTOS = Photographs()


def described(view: View) -> dict[str, Any] | None:
    """A view in plain values, for a file; None for one of the user's own."""
    if isinstance(view, Drawings):
        return {"kind": "drawings"}
    return {"kind": "photographs", **asdict(view)} if isinstance(view, Photographs) else None


def from_description(values: Mapping[str, Any]) -> Drawings | Photographs:
    """The view that :func:`described` has described.

    Raises:
        ValueError: no description.
    """
    kind, rest = values.get("kind"), {name: value for name, value in values.items() if name != "kind"}
    try:
        if kind == "drawings":
            return Drawings(**rest)
        if kind == "photographs":
            return Photographs(**{**rest, "mean": tuple(rest["mean"]), "std": tuple(rest["std"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"no description of a view: {error}") from error
    raise ValueError(f"no description of a view: its kind is {kind!r}")
