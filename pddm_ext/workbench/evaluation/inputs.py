"""What evaluation takes, checked and brought into one form before any work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pddm_ext import _checks, _numbers

#: How far the norm of a unit row may be from 1: rounded to bfloat16 it is off by at most 2^-8.
_ROUNDED = 0.01


def features(x: Any, name: str = "features", *, unit: bool = False, scored: bool = False) -> Tensor:
    """Features (n, d) of any floating dtype and on any device, as a plain tensor on the CPU, without a gradient.

    Args:
        x: the features.
        name: what messages call them.
        unit: whether rows have to be of unit norm, or zero.
        scored: whether a PDDM unit alone takes them, which does so in their own dtype and puts NaN last; else they are
            brought to float32 and have to be finite.

    Raises:
        TypeError: no tensor, or a dtype or layout that is not accepted.
        ValueError: a shape that is not accepted, or rows that are not of unit norm.
        FloatingPointError: a feature is not finite.
    """
    _checks._matrix(name, x)
    _values(name, x)
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; at least one row and one dimension are accepted")
    plain: Tensor = x.detach().to("cpu", None if scored else torch.float32).contiguous()
    if not scored and not plain.isfinite().all():
        called = "the embedding" if name == "features" else name
        raise FloatingPointError(f"{called} is not finite; lower --lr")
    if unit and len(plain):
        norms = torch.linalg.vector_norm(plain.double(), dim=1)
        off = ((norms - 1).abs() > _ROUNDED) & (norms > 0)
        if off.any():
            at = int(off.nonzero()[0])
            raise ValueError(
                f"{name} has rows that are not of unit norm: row {at} has norm {norms[at]:.4g}; "
                f"torch.nn.functional.normalize({name}, dim=1) is accepted"
            )
    return plain


def classes(labels: Any, length: int | None) -> Tensor:
    """Labels (n,) of any integer dtype as numbers from 0 in the order in which the classes appear, int64 on the CPU.

    So nothing depends on what the classes' numbers were: not on their order, and not on a library that takes them for
    float32, in which those from 2^24 on run together.

    Raises:
        TypeError: no tensor of an integer dtype.
        ValueError: no (n,), or not one label for each of ``length`` rows, where they are given.
    """
    _checks._vector("labels", labels, length, "features")
    _values("labels", labels)
    # Of uint64, too: what is 2^63 and more becomes negative, and stays distinct.
    _, member = torch.unique(labels.detach().cpu().long(), return_inverse=True)
    first = torch.full((int(member.max()) + 1 if len(member) else 0,), len(member))
    first.scatter_reduce_(0, member, torch.arange(len(member)), "amin")
    order = torch.empty_like(first)
    order[first.argsort()] = torch.arange(len(first))
    return order[member]


def queries(x: Any, length: int) -> Tensor:
    """Row numbers (q,) of ``length`` rows, of any integer dtype, int64 on the CPU.

    Raises:
        TypeError: no tensor of an integer dtype.
        ValueError: no (q,).
        IndexError: a row that is not there.
    """
    _checks._vector("queries", x, None, "")
    return _rows("queries", x, length)


def sides(queries: Any, gallery: Any, length: int) -> tuple[Tensor, Tensor]:
    """Who is searched for, (q,), and among whom, (g,), of ``length`` rows, int64 on the CPU; None is all of them.

    Raises:
        TypeError: no tensor of an integer dtype.
        ValueError: no vector, an empty one, or a row twice.
        IndexError: a row that is not there.
    """
    both = []
    for name, x in (("queries", queries), ("gallery", gallery)):
        both.append(torch.arange(length) if x is None else _distinct(name, x, length))
    return both[0], both[1]


def gallery(x: Any, length: int) -> Tensor | None:
    """The gallery as in :func:`sides`; None stays None."""
    return None if x is None else _distinct("gallery", x, length)


def _distinct(name: str, x: Any, length: int) -> Tensor:
    _checks._vector(name, x, None, "")
    rows = _rows(name, x, length)
    if len(rows) == 0:
        raise ValueError(f"{name} is empty; at least one row is accepted")
    ordered = rows.sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(f"{name} has row {int(twice[0])} twice; distinct rows are accepted")
    return rows


def ranked(x: Any, queries: Tensor, length: int) -> Tensor:
    """:func:`queries` for a ranking (q, k), a row for each query (q,)."""
    _checks._tensor("ranked", x, _checks.INTEGERS, "an integer dtype")
    if x.dim() != 2 or len(x) != len(queries):
        raise ValueError(
            f"ranked has shape {tuple(x.shape)}; ({len(queries)}, k), a row for each of queries, is accepted"
        )
    return _rows("ranked", x, length)


def _rows(name: str, x: Tensor, length: int) -> Tensor:
    _values(name, x)
    plain: Tensor = x.detach().cpu().long()
    if plain.numel() and not 0 <= int(plain.min()) <= int(plain.max()) < length:
        verb = "is" if name == "gallery" else "are"
        raise IndexError(f"{name} {verb} {int(plain.min())} to {int(plain.max())}; 0 to {length - 1} is accepted")
    return plain


def seed(value: Any) -> None:
    """Refuse what is no seed of every library in use.

    Raises:
        TypeError: no int.
        ValueError: out of range.
    """
    _numbers.size("seed", value, 0)
    if value >= 2**32:
        raise ValueError(f"seed is {value}; less than 2**32 is accepted")


def neighbours(k: Any, others: int, gallery: bool = False) -> None:
    """Refuse a number k of other rows, or of other rows of a gallery, where there are only ``others``.

    Raises:
        TypeError: no int.
        ValueError: out of range.
    """
    _numbers.size("k", k)
    if others == 0:
        raise ValueError(f"k is {k}; there is no other row {'in the gallery' if gallery else 'than the one'}")
    if k > others:
        rows = "the other rows of the gallery" if gallery else "the other rows"
        raise ValueError(f"k is {k}; 1 to {others}, {rows}, is accepted")


def _values(name: str, x: Tensor) -> None:
    if x.is_meta:
        raise TypeError(f"{name} is on the meta device; a tensor that has values is accepted")
