"""The embedding that both miners train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .data import PICTURE


class ConvNet(nn.Module):
    """Three strided convolutions and a linear layer: (n, 1, 32, 32) pictures to (n, dim) features, not normalised.

    The same seed gives the same initial weights; torch's global generator is left as it was.
    """

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                *_block(1, 32, 5),
                *_block(32, 64, 3),
                *_block(64, 64, 3),
                nn.Flatten(),
                nn.Linear(64 * (PICTURE // 8) ** 2, dim),
            )

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.layers(pictures)
        return features


def _block(channels: int, out: int, kernel: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU()
