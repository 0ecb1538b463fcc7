"""Bad input raises before any work, naming the argument, what it was and what is accepted."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ._numbers import integer, size
from .parameters import Parameters
from .precision import autocast
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


def readable(x: Tensor) -> bool:
    """Whether values may decide an error: not where there are none yet (a compiled graph, a fake tensor, a transform of
    ``torch.func``), and not where reading them waits for a device."""
    return x.device.type == "cpu" and concrete(x)


def concrete(x: Tensor) -> bool:
    """Whether a tensor has values that can be read."""
    compiled = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not (compiled or x.is_meta or hasattr(x, "fake_mode"))


def _tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...], accepted: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; a tensor of {accepted} is accepted")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}; {accepted} is accepted")
    if x.is_nested or x.layout != torch.strided:
        layout = "is nested" if x.is_nested else f"has layout {x.layout}"
        raise TypeError(f"{name} {layout}; a dense tensor (torch.strided) is accepted")


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
    if length is not None and x.shape[0] != length:  # not len(), which would fix the length in an exported graph
        raise ValueError(f"{name} has length {x.shape[0]}; {of} has {length}")


def _formula(unit: Parameters) -> None:
    """Refuses a subclass, or a unit, with a formula of its own where that formula would not be asked."""
    if "forward" in unit.__dict__:  # a wrapper, such as autocast's, has the formula of what it wraps
        home = getattr(inspect.unwrap(unit.forward), "__module__", None) or ""
    else:
        home = next(kind.__module__ for kind in type(unit).__mro__ if "forward" in kind.__dict__)
    if not home.startswith("pddm_ext."):
        raise TypeError(
            f"unit is a {type(unit).__name__}, whose forward is its own; mining, matrices, listed pairs and "
            f"rankings compute PDDM's score from the eight parameters and would not call it. A unit without a "
            f"forward of its own is accepted; for another score see the documentation, 'A score of your own'"
        )


def _unit(unit: Any, dim: int) -> list[Tensor]:
    """Its parameters, of one device, which a parametrization makes anew each time that they are asked for."""
    if not isinstance(unit, Parameters):
        raise TypeError(f"unit is a {type(unit).__name__}; a PDDM is accepted")
    if unit.dim != dim:
        raise ValueError(f"unit scores features of dimension {unit.dim}; these have {dim}")
    hidden, combined = unit.hidden, unit.combined
    for name in "uvcs":
        _plain(name, unit._modules[name])
    tensors = unit.tensors()
    layer = (hidden, dim), (hidden,)
    shapes = (*layer, *layer, (combined, 2 * hidden), (combined,), (1, combined), (1,))
    device, plain = getattr(tensors[0], "device", None), True
    for place, (p, wanted) in enumerate(zip(tensors, shapes, strict=True)):
        # In one look, since every small batch waits for it.
        if not (
            type(p) is nn.Parameter
            and p.shape == wanted
            and p.dtype in FLOATS
            and p.layout is torch.strided
            and p.device == device
        ):
            plain = False
            _parameter(f"unit's {'uvcs'[place // 2]}.{('weight', 'bias')[place % 2]}", p, wanted)
    if not plain:
        _devices(*tensors)
    return tensors


def _parameter(name: str, p: Any, wanted: tuple[int, ...]) -> None:
    if not isinstance(p, Tensor) or tuple(p.shape) != wanted:
        found = f"has shape {tuple(p.shape)}" if isinstance(p, Tensor) else "is missing"
        raise ValueError(f"{name} {found}; {wanted} is accepted")
    _features(name, p)
    if type(p) is not nn.Parameter and hasattr(p, "device_mesh"):
        raise TypeError(f"{name} is a DTensor, a part of a sharded parameter; {_SHARDED}")


_SHARDED = (
    "after fully_shard(unit) call torch.distributed.fsdp.register_fsdp_forward_method(unit, 'mine'), and mine by "
    "unit.mine(…), which then gathers the parameters as unit(…) does"
)
_PARAMETRIZE = (
    "the kernels read the tensors and call no layer: constrain, adapt or prune it by torch.nn.utils.parametrize (such "
    "as torch.nn.utils.parametrizations.weight_norm), or merge the change into the weight"
)


def _plain(name: str, layer: Any) -> None:
    """Refuses a layer that would compute something else than its weight and bias say when they are read."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__:
        raise TypeError(
            f"unit's {name} is a {type(layer).__module__}.{type(layer).__qualname__} with a forward of its own; a "
            f"torch.nn.Linear is accepted, since {_PARAMETRIZE}"
        )
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
        raise TypeError(f"unit's {name} has hooks, which would never run; {_PARAMETRIZE}")


def _devices(*tensors: Tensor) -> None:
    first = tensors[0].device
    for t in tensors[1:]:
        if t.device != first:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{first} and {t.device}!"
            )


def mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; {', '.join(map(repr, MODES))} are accepted")


def number_of_candidates(count: int | None) -> None:
    if count is not None:
        size("candidates", count)


class References(NamedTuple):
    """What else than the batch a miner may pair: features and labels of m rows, and samples' numbers on both sides."""

    feats: Tensor | None = None
    labels: Tensor | None = None
    ids: Tensor | None = None
    ref_ids: Tensor | None = None

    def number(self) -> int | None:
        """How many there are, if any are given."""
        return None if self.feats is None else self.feats.shape[0]


NO_REFERENCES = References()


def _references(feats: Tensor, given: References, candidates: int | None) -> None:
    if given.feats is None:
        for name, x in (("ref_labels", given.labels), ("ids", given.ids), ("ref_ids", given.ref_ids)):
            if x is not None:
                raise ValueError(
                    f"{name} is given and ref_feats is not; they belong to references, so both are accepted"
                )
        return
    _matrix("ref_feats", given.feats)
    if given.feats.shape[1] != feats.shape[1]:
        raise ValueError(f"ref_feats has shape {tuple(given.feats.shape)}; feats has dimension {feats.shape[1]}")
    if given.labels is None:
        raise ValueError(
            f"ref_labels is missing; ref_feats has {given.feats.shape[0]} rows, and one label each is accepted"
        )
    _vector("ref_labels", given.labels, given.feats.shape[0], "ref_feats")
    if (given.ids is None) != (given.ref_ids is None):
        missing, there = ("ids", "ref_ids") if given.ids is None else ("ref_ids", "ids")
        raise ValueError(f"{missing} is missing beside {there}; samples are told apart on both sides or on none")
    _devices(feats, given.feats, given.labels)
    if given.ids is not None and given.ref_ids is not None:
        _vector("ids", given.ids, feats.shape[0], "feats")
        _vector("ref_ids", given.ref_ids, given.feats.shape[0], "ref_feats")
        _devices(feats, given.ids, given.ref_ids)
    if candidates is not None:
        raise ValueError(f"candidates is {candidates}, for pairs of the batch; beside ref_feats None is accepted")


def mining(
    feats: Tensor,
    labels: Tensor,
    unit: U | None,
    mode_name: str,
    default: Callable[[int, torch.device], U],
    candidates: int | None = None,
    references: References = NO_REFERENCES,
) -> tuple[U, list[Tensor]]:
    """The unit, and its parameters."""
    mode(mode_name)
    number_of_candidates(candidates)
    _matrix("feats", feats)
    _vector("labels", labels, feats.shape[0], "feats")
    _devices(feats, labels)
    _references(feats, references, candidates)
    if feats.shape[1] == 0:
        raise ValueError("feats has shape (n, 0); a dimension of at least 1 is accepted")
    if unit is None:
        unit = default(feats.shape[1], feats.device)
    tensors = _unit(unit, feats.shape[1])
    _formula(unit)
    _devices(feats, tensors[0])
    return unit, tensors


def numbers_of(feats: Any) -> dict[str, int]:
    """What the processes of a group must have alike of their features, as numbers; −1 for what is none."""
    there = isinstance(feats, Tensor) and not feats.is_nested
    dtype = autocast(feats).dtype if there and feats.is_floating_point() else None
    return {
        "dimension": feats.shape[1] if there and feats.dim() == 2 else -1,
        "dtype number": FLOATS.index(dtype) if dtype in FLOATS else -1,
        "gradients (0 without)": int(torch.is_grad_enabled()),
    }


def rows_of(x: Any) -> int:
    """How many a tensor has, as far as there is one; −1 otherwise."""
    return x.shape[0] if isinstance(x, Tensor) and not x.is_nested and x.dim() > 0 else -1


# Of what follows each returns the unit's parameters.


def pairs(feats: Tensor, i: Tensor, j: Tensor, unit: Parameters) -> list[Tensor]:
    _matrix("feats", feats)
    _vector("i", i, None, "")
    _vector("j", j, i.shape[0], "i")
    tensors = _unit(unit, feats.shape[1])
    _formula(unit)
    _devices(feats, i, j, tensors[0])
    if readable(feats):  # the kernels repeat it
        for name, index in (("i", i), ("j", j)):
            low, high = index.long().aminmax() if len(index) else (0, -1)
            if low < 0 or high >= feats.shape[0]:
                at = int(((index.long() < 0) | (index.long() >= feats.shape[0])).nonzero()[0])
                raise IndexError(f"{name}[{at}] is {index.tolist()[at]}; feats has {feats.shape[0]} rows")
    return tensors


def matched_rows(x: Tensor, y: Tensor, unit: Parameters) -> list[Tensor]:
    _features("x", x)
    _features("y", y)
    if x.shape != y.shape or x.dim() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; (…, dim) twice is accepted")
    _same_dtype("x", x, "y", y)
    tensors = _unit(unit, x.shape[-1])
    _devices(x, y, tensors[0])
    return tensors


def _same_dtype(a: str, x: Tensor, b: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{a} has dtype {x.dtype} and {b} {y.dtype}; one dtype is accepted")


def _both(a: str, x: Tensor, b: str, y: Tensor) -> None:
    _matrix(b, y)
    _same_dtype(a, x, b, y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{b} has shape {tuple(y.shape)}; {a} has dimension {x.shape[1]}")
    _devices(x, y)


def matrix(x: Tensor, unit: Parameters, y: Tensor | None) -> list[Tensor]:
    _matrix("x", x)
    if y is not None:
        _both("x", x, "y", y)
    tensors = _unit(unit, x.shape[1])
    _formula(unit)
    _devices(x, tensors[0])
    return tensors


def ranking(queries: Tensor, gallery: Tensor, k: int, unit: Parameters) -> list[Tensor]:
    _matrix("queries", queries)
    _both("queries", queries, "gallery", gallery)
    tensors = _unit(unit, queries.shape[1])
    _formula(unit)
    _devices(queries, tensors[0])
    integer("k", k)
    if not 1 <= k <= gallery.shape[0]:
        raise ValueError(f"k is {k}; 1 to {gallery.shape[0]}, the rows of gallery, is accepted")
    return tensors
