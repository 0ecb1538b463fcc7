"""Rows whose class is not known (``ignore_label``): in no quadruplet, neither as a positive nor as a negative."""

from __future__ import annotations

import torch
from torch import Tensor

from ._numbers import integer


def check(ignore_label: int | None) -> None:
    if ignore_label is not None:
        integer("ignore_label", ignore_label)


def unlabelled(labels: Tensor, ignore_label: int | None) -> Tensor | None:
    """Which of the labels (n,) are ``ignore_label``: (n,) bool; None where none can be.

    Raises:
        TypeError: ignore_label is neither an int nor None.
    """
    check(ignore_label)
    if ignore_label is None:
        return None
    ignore_label = int(ignore_label)  # numpy's would be out of range below
    least, most = torch.iinfo(labels.dtype).min, torch.iinfo(labels.dtype).max
    # uint64, which few operators know, wraps, and so does what it is compared with: int64 may have been it.
    most = 2**64 - 1 if labels.dtype == torch.int64 else most
    if not least <= ignore_label <= most:
        return None
    return labels.long() == (ignore_label if ignore_label < 2**63 else ignore_label - 2**64)


def set_aside(feats: Tensor, labels: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, d) and labels (n,) with which the kernels leave rows out, in shapes that do not depend on the data.

    Such a row becomes a class of its own, so no pair of it is positive, and its features NaN, whose scores never win.
    """
    rows = torch.arange(labels.shape[0], device=labels.device)
    # Ranks stand for the classes, so that there are numbers which no class has.
    rank = torch.searchsorted(labels.long().sort().values, labels.long())
    return torch.where(left_out[:, None], torch.nan, feats), torch.where(left_out, rows + labels.shape[0], rank)
