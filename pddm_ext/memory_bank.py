"""Rows of earlier batches, as references to mine among."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _checks, _numbers, processes


class MemoryBank(nn.Module):
    """The newest rows of the batches so far: a ring of features, labels and sample numbers.

    Three lines in a loop::

        bank.add(feats, labels, ids)
        quads = unit.mine(feats, labels, mode="anchor", ids=ids, **bank.references())
        loss = loss_fn(feats, quads, ref_feats=bank.feats)

    As the batch is in the bank by then, mining sees it and what went before; by their numbers no sample is its own
    positive, a copy of it from an earlier step neither. What the bank holds has no gradient.

    Everything is in the ``state_dict`` and moves with the module. In several processes, give them ``group``: each then
    adds the shards of all, in the order of ranks, so that the rows stand in one order everywhere. Without one it can be
    part of what DistributedDataParallel wraps only with ``broadcast_buffers=False``: every forward pass would put rank
    0's rows in all of them.

    Source: Wang, Zhang, Huang, Scott, *Cross-Batch Memory for Embedding Learning*, CVPR 2020.

    Args:
        size: rows that it has room for; then the oldest go.
        dim: d, the length of a feature.
        dtype: that features are kept in, one of float32, float64, bfloat16 and float16.
        device: where it is.
        warm_up: additions at first of which only the newest is kept, while features still move fast.
        group: the processes whose shards are added together, all of which then call :meth:`add` at once; None is this
            process alone, ``torch.distributed.group.WORLD`` all of them.

    Raises:
        ValueError: a size, dim or warm_up out of range, or a group that this process is not in.
        TypeError: an argument of another type, or a dtype that is not accepted.
    """

    __copy__, __deepcopy__ = processes.shallow_copy_with_group, processes.copy_with_group
    __getstate__ = processes.state_without_group

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        warm_up: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _numbers.size("size", size)
        _numbers.size("dim", dim)
        _numbers.size("warm_up", warm_up, 0)
        if dtype not in _checks.FLOATS:
            raise TypeError(f"dtype is {dtype}; float32, float64, bfloat16 or float16 is accepted")
        if group is not None:
            processes.check(group)
        self.size, self.dim, self.warm_up, self.group = int(size), int(dim), int(warm_up), group
        with torch.inference_mode(False):  # or it could never be added to outside
            self.register_buffer("ring_feats", torch.zeros(size, dim, dtype=dtype, device=device))
            self.register_buffer("ring_labels", torch.zeros(size, dtype=torch.int64, device=device))
            self.register_buffer("ring_ids", torch.zeros(size, dtype=torch.int64, device=device))
        self.ring_feats: Tensor
        self.ring_labels: Tensor
        self.ring_ids: Tensor
        self._next, self._held, self._additions = 0, 0, 0

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}, dtype={self.ring_feats.dtype}, held={self._held}"

    def __len__(self) -> int:
        """How many rows it holds."""
        return self._held

    @property
    def feats(self) -> Tensor:
        """Features (m, d) of what it holds. A view, which the next addition may change."""
        return self.ring_feats[: self._held]

    @property
    def labels(self) -> Tensor:
        """Class ids (m,) int64 of what it holds."""
        return self.ring_labels[: self._held]

    @property
    def ids(self) -> Tensor:
        """Samples' numbers (m,) int64 of what it holds."""
        return self.ring_ids[: self._held]

    def references(self) -> dict[str, Tensor]:
        """What it holds, as the arguments of :func:`pddm_ext.mine_and_score`; those want the batch's ``ids``, too."""
        return {"ref_feats": self.feats, "ref_labels": self.labels, "ref_ids": self.ids}

    @torch.no_grad()
    def add(self, feats: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Take in a batch, in place of the oldest rows where there is no room; of a larger one its last rows.

        Args:
            feats: (n, d), of any floating dtype; rounded to the bank's own.
            labels: (n,) class ids of any integer dtype.
            ids: (n,) the samples' numbers of any integer dtype, such as their places in the dataset.

        Raises:
            ValueError: a shape or length that does not fit.
            TypeError: a dtype that is not accepted.
            RuntimeError: tensors on another device than the bank, or another process of the group was given what it
                does not accept.
        """
        lengths = self._lengths(feats, labels, ids)
        rows = [feats.detach().to(self.ring_feats.dtype), labels.long(), ids.long()]
        rings = (self.ring_feats, self.ring_labels, self.ring_ids)
        if any(_one_memory(x, ring) for x, ring in zip(rows, rings, strict=True)):  # its own rows, once more
            rows = [x.clone() for x in rows]
        if self.group is not None:
            rows = [processes.shards(x, lengths, self.group) for x in rows]
        count = min(sum(lengths), self.size)
        feats, labels, ids = (x[len(x) - count :] for x in rows)
        self._additions += 1
        if self._additions <= self.warm_up:
            self._next = self._held = 0
        if self.ring_feats.is_inference() and not torch.is_inference_mode_enabled():  # moved to a device within it
            self.ring_feats, self.ring_labels, self.ring_ids = (x.clone() for x in self.buffers())
        # To the end of the ring, and what is left from its beginning.
        first = min(count, self.size - self._next)
        for ring, new in ((self.ring_feats, feats), (self.ring_labels, labels), (self.ring_ids, ids)):
            ring[self._next : self._next + first] = new[:first]
            ring[: count - first] = new[first:]
        self._next = (self._next + count) % self.size
        self._held = min(self._held + count, self.size)

    def clear(self) -> None:
        """Forget all rows, and begin the warm-up anew."""
        self._next = self._held = self._additions = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self._next, self._held, self._additions], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self._next, self._held, self._additions = state.tolist()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name, ring in self.named_buffers(recurse=False):
            there = state_dict.get(prefix + name)
            if there is not None and there.shape != ring.shape:
                # Before anything is taken over: rows of one bank with the places of another would be nobody's.
                errors = others[-1]
                errors.append(f"{prefix}{name} has shape {tuple(there.shape)}; {tuple(ring.shape)} is accepted")
                return
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _lengths(self, feats: Tensor, labels: Tensor, ids: Tensor) -> list[int]:
        def checked() -> int:
            self._check(feats, labels, ids)
            return feats.shape[0]

        if self.group is None:
            return [checked()]
        dtype = _checks.FLOATS.index(self.ring_feats.dtype)
        alike = {"size": self.size, "dim": self.dim, "dtype number": dtype, "additions": self._additions}
        return processes.lengths(self.group, self.ring_feats.device, checked, alike)

    def _check(self, feats: Tensor, labels: Tensor, ids: Tensor) -> None:
        _checks._matrix("feats", feats)
        if feats.shape[1] != self.dim:
            raise ValueError(f"feats has shape {tuple(feats.shape)}; the bank holds features of dimension {self.dim}")
        _checks._vector("labels", labels, feats.shape[0], "feats")
        _checks._vector("ids", ids, feats.shape[0], "feats")
        _checks._devices(self.ring_feats, feats, labels, ids)


def _one_memory(x: Tensor, ring: Tensor) -> bool:
    if torch.compiler.is_compiling() or hasattr(x, "fake_mode"):
        return False
    return x.untyped_storage().data_ptr() == ring.untyped_storage().data_ptr()
