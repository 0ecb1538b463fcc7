"""Bad input raises before any work, naming the argument, what it was and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .parameters import Parameters
from .quadruplets import MODES

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)

U = TypeVar("U", bound=Parameters)


Kind = Literal["a finite number", "a finite number from 0", "a positive finite number"]


def number(name: str, value: Any, kind: Kind) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a {type(value).__name__}; {kind} is accepted")
    from_zero, positive = kind.endswith("from 0"), "positive" in kind
    if not math.isfinite(value) or (from_zero and value < 0) or (positive and value <= 0):
        raise ValueError(f"{name} is {value}; {kind} is accepted")


def size(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; an int is accepted")
    if value < least:
        raise ValueError(f"{name} is {value}; at least {least} is accepted")


def readable(x: Tensor) -> bool:
    """Whether values may decide an error: not in a compiled graph, and not where reading them waits for a device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...], accepted: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; a tensor of {accepted} is accepted")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}; {accepted} is accepted")


def _features(name: str, x: Any) -> None:
    _tensor(name, x, FLOATS, "float32, float64, bfloat16 or float16")


def _matrix(name: str, x: Any) -> None:
    _features(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; (rows, dim) is accepted")


def _vector(name: str, x: Any, length: int | None, of: str) -> None:
    _tensor(name, x, INTEGERS, "an integer dtype")
    if x.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; one dimension is accepted")
    if length is not None and len(x) != length:
        raise ValueError(f"{name} has length {len(x)}; {of} has {length}")


def _unit(unit: Any, dim: int) -> None:
    if not isinstance(unit, Parameters):
        raise TypeError(f"unit is a {type(unit).__name__}; a PDDM is accepted")
    if unit.dim != dim:
        raise ValueError(f"unit scores features of dimension {unit.dim}; these have {dim}")
    hidden, combined = unit.hidden, unit.combined
    layers = {"u": (hidden, dim), "v": (hidden, dim), "c": (combined, 2 * hidden), "s": (1, combined)}
    for name, shape in layers.items():
        layer = getattr(unit, name)
        for kind, p, wanted in (("weight", layer.weight, shape), ("bias", layer.bias, shape[:1])):
            if not isinstance(p, Tensor) or tuple(p.shape) != wanted:
                found = f"has shape {tuple(p.shape)}" if isinstance(p, Tensor) else "is missing"
                raise ValueError(f"unit's {name}.{kind} {found}; {wanted} is accepted")
            if p.dtype not in FLOATS:
                raise TypeError(
                    f"unit's {name}.{kind} has dtype {p.dtype}; float32, float64, bfloat16 or float16 is accepted"
                )


def _devices(*tensors: Tensor) -> None:
    first = tensors[0].device
    for t in tensors[1:]:
        if t.device != first:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{first} and {t.device}!"
            )


def _unit_device(x: Tensor, unit: Parameters) -> None:
    _devices(x, unit.u.weight)


def mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; {', '.join(map(repr, MODES))} are accepted")


def mining(
    feats: Tensor, labels: Tensor, unit: U | None, mode_name: str, default: Callable[[int, torch.device], U]
) -> U:
    mode(mode_name)
    _matrix("feats", feats)
    _vector("labels", labels, len(feats), "feats")
    _devices(feats, labels)
    if feats.shape[1] == 0:
        raise ValueError("feats has shape (n, 0); a dimension of at least 1 is accepted")
    if unit is None:
        unit = default(feats.shape[1], feats.device)
    _unit(unit, feats.shape[1])
    _unit_device(feats, unit)
    return unit


def pairs(feats: Tensor, i: Tensor, j: Tensor, unit: Parameters) -> None:
    _matrix("feats", feats)
    _vector("i", i, None, "")
    _vector("j", j, len(i), "i")
    _unit(unit, feats.shape[1])
    _devices(feats, i, j)
    _unit_device(feats, unit)
    if readable(feats):  # the kernels repeat it
        for name, index in (("i", i), ("j", j)):
            bad = (index.long() < 0) | (index.long() >= len(feats))
            if bad.any():
                at = int(bad.nonzero()[0])
                raise IndexError(f"{name}[{at}] is {int(index[at])}; feats has {len(feats)} rows")


def matched_rows(x: Tensor, y: Tensor, unit: Parameters) -> None:
    _features("x", x)
    _features("y", y)
    if x.shape != y.shape or x.dim() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; (…, dim) twice is accepted")
    _same_dtype("x", x, "y", y)
    _unit(unit, x.shape[-1])
    _devices(x, y)
    _unit_device(x, unit)


def _same_dtype(a: str, x: Tensor, b: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{a} has dtype {x.dtype} and {b} {y.dtype}; one dtype is accepted")


def _both(a: str, x: Tensor, b: str, y: Tensor) -> None:
    _matrix(b, y)
    _same_dtype(a, x, b, y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{b} has shape {tuple(y.shape)}; {a} has dimension {x.shape[1]}")
    _devices(x, y)


def matrix(x: Tensor, unit: Parameters, y: Tensor | None) -> None:
    _matrix("x", x)
    if y is not None:
        _both("x", x, "y", y)
    _unit(unit, x.shape[1])
    _unit_device(x, unit)


def ranking(queries: Tensor, gallery: Tensor, k: int, unit: Parameters) -> None:
    _matrix("queries", queries)
    _both("queries", queries, "gallery", gallery)
    _unit(unit, queries.shape[1])
    _unit_device(queries, unit)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is a {type(k).__name__}; an int is accepted")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k is {k}; 1 to {len(gallery)}, the rows of gallery, is accepted")
