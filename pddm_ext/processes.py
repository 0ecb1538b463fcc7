"""What the processes of a group hand each other: numbers of rows, shards in the order of ranks, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks
from .parameters import Parameters
from .precision import no_autocast
from .quadruplets import MODES, Mode
from .unlabelled import unlabelled


def check(group: Any) -> None:
    """Refuses what is no group of this process.

    Raises:
        ValueError: it is none, or one that this process is not in.
    """
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup) and dist.get_rank(group) >= 0):
        raise ValueError(f"group is {group!r}; a process group that this process is in, or None, is accepted")


def lengths(
    group: dist.ProcessGroup,
    device: torch.device,
    checked: Callable[[], int],
    alike: Mapping[str, int] = MappingProxyType({}),
) -> list[int]:
    """Rows of every process. What one process refuses fails in all of them, rather than leave the others waiting.

    Args:
        group: whose processes all call this.
        device: where its backend wants tensors.
        checked: the number of this process's rows, or its error.
        alike: numbers that every process must have the same of, such as a dimension, by their names.

    Raises:
        RuntimeError: another process has refused its input, or they are not alike.
    """
    refused: Exception | None = None
    rows = -1
    try:
        rows = checked()
    except Exception as error:  # whatever it is, the others must not wait
        refused = error
    own = torch.tensor([rows, *alike.values()], device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    if refused is not None:
        raise refused
    told = [numbers.tolist() for numbers in every]
    found = [numbers[0] for numbers in told]
    if min(found) < 0:
        raise RuntimeError(f"process {found.index(-1)} of the group has refused what it was given; see its error")
    for process, numbers in enumerate(told):
        for name, number, first in zip(alike, numbers[1:], told[0][1:], strict=True):
            if number != first:
                raise RuntimeError(
                    f"process {process} of the group has {name} {number} where process 0 has {first}; all must be alike"
                )
    return found


def of_miners(
    feats: Tensor,
    labels: Tensor,
    unit: Parameters | None,
    mode: Mode,
    ignore_label: int | None,
    candidates: int | None,
    references: _checks.References,
    group: dist.ProcessGroup,
    default: Callable[[int, torch.device], Parameters],
) -> list[int]:
    """Rows of every process that mines one batch together with this one; see :func:`lengths` for what they refuse."""
    check(group)

    def checked() -> int:
        _checks.mining(feats, labels, unit, mode, default, candidates, references)
        if candidates is not None:
            raise ValueError(f"candidates is {candidates} beside group; with it None is accepted")
        unlabelled(labels, ignore_label)
        return feats.shape[0]

    alike = {
        **_checks.numbers_of(feats),
        "mode number": MODES.index(mode) if mode in MODES else -1,
        "references": _checks.rows_of(references.feats),
        "ids (0 without)": int(references.ids is not None),
    }
    return lengths(group, where(feats), checked, alike)


def where(feats: Any) -> torch.device:
    """Where the group's backend may want its tensors; of input that is refused this is not known."""
    there = isinstance(feats, Tensor) and not feats.is_meta
    return feats.device if there else torch.device("cpu")


def shards(x: Tensor, of: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all, (sum of lengths, …), from each process's own (length, …)."""
    # Filled up to one length, which is what every backend can gather.
    filled = x.new_zeros(max(of), *x.shape[1:])
    filled[: len(x)] = x
    parts = [torch.empty_like(filled) for _ in of]
    dist.all_gather(parts, filled, group=group)
    with no_autocast(x):  # which joins no other half precision than its own
        return torch.cat([part[:length] for part, length in zip(parts, of, strict=True)])


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, of: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.of, ctx.group = of, group
        return shards(x, of, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        total = upstream.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        first = sum(ctx.of[:rank])
        return total[first : first + ctx.of[rank]], None, None


def gathered(x: Tensor, of: list[int], group: dist.ProcessGroup) -> Tensor:
    """:func:`shards`, whose gradient is the sum of what all processes ask of this one's rows.

    All take part in the backward pass, those too whose own rows ask for no gradient, such as an empty shard.
    """
    if torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()
    every: Tensor = _Gathered.apply(x, of, group)  # type: ignore[no-untyped-call]
    return every


# Of modules with a ``group``: copies share it, and what is pickled is without.


def shallow_copy_with_group(module: Any) -> Any:
    made: Any = object.__new__(module.__class__)
    made.__dict__.update(module.__dict__)
    return made


def copy_with_group(module: Any, memo: dict[int, Any]) -> Any:
    made: Any = object.__new__(module.__class__)
    memo[id(module)] = made
    memo[id(module.group)] = module.group
    made.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return made


def state_without_group(module: Any) -> dict[str, Any]:
    return {**module.__dict__, "group": None}
