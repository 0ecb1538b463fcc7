"""Where the suite's tensors are and whose kernels answer, the inputs it makes, and what it counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pddm_ext
from pddm_ext import _C, reference

P = ParamSpec("P")
R = TypeVar("R")

# Where the suite's tensors are, and whose kernels answer. Three ways to run it: the CPU's kernels; with
# PDDM_TEST_DEVICE=cuda those of a GPU; and a build in which the CUDA kernels, emulated, answer for CPU tensors.
DEVICE = torch.device(os.environ.get("PDDM_TEST_DEVICE", "cpu"))
ON_CUDA = DEVICE.type == "cuda"
EMULATED = not ON_CUDA and _C.build_info()["cuda"] == "emulated"
ON_GPU_KERNELS = ON_CUDA or EMULATED

MODES = ("batch", "anchor", "pair")
CAPABILITIES = [name for name, supported in _C.cpu_capabilities().items() if supported]
if ON_GPU_KERNELS:
    CAPABILITIES = ["emulated" if EMULATED else "cuda"]
PARAMETERS = [f"{layer}.{kind}" for layer in "uvcs" for kind in ("weight", "bias")]

PACKAGES = [pytest.param(pddm_ext, id="fused"), pytest.param(reference, id="reference")]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# (n, d, h, m). A tile is 32, 16 or 8 lanes of 12 or 6 outputs: one of everything, ragged ends, and whole tiles.
SIZES = [(1, 1, 1, 1), (2, 3, 1, 2), (9, 7, 5, 11), (33, 17, 13, 25), (70, 33, 29, 7), (96, 32, 24, 48)]


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """A promise of the CPU's kernels that the GPU's do not make, or do not make like this."""
    return pytest.mark.skipif(ON_GPU_KERNELS, reason=f"the CPU's kernels only: {reason}")


def gpu_only(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not ON_GPU_KERNELS, reason=f"the GPU's kernels only: {reason}")


def host_only(reason: str) -> pytest.MarkDecorator:
    """Of tensors in the host's memory, whoever computes."""
    return pytest.mark.skipif(ON_CUDA, reason=f"tensors in the host's memory only: {reason}")


ANY_CALL = "a pair has the same bits in every call; on the GPU it has them in the same call"


def counters() -> dict[str, int]:
    return _C.counters(DEVICE.type)


def reset_counters() -> None:
    _C.reset_counters(DEVICE.type)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    if ON_GPU_KERNELS:
        yield
        return
    _C.set_cpu_capability(name)
    try:
        yield
    finally:
        _C.set_cpu_capability("")


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """Many small tensor operations, whose threads would only get in the way of the other test processes."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with threads(1):
            return function(*args, **kwargs)

    return wrapped


# What is made here is made on the CPU, the same numbers everywhere, and then moved.


def make_unit(
    dim: int,
    hidden: int | None = None,
    combined: int | None = None,
    *,
    normalize_input: bool = False,
    seed: int = 0,
    device: torch.device | str = DEVICE,
) -> pddm_ext.PDDM:
    """A unit whose layers all matter: what enters W_u, W_v and W_c has unit norm, so their outputs are of order 1."""
    unit = pddm_ext.PDDM(dim, hidden, combined, normalize_input=normalize_input)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (unit.u, unit.v, unit.c, unit.s):
            layer.weight.normal_(generator=generator)
            layer.bias.normal_(generator=generator).mul_(0.3)
        unit.s.weight.mul_(unit.combined**-0.5)
    return unit.to(device)


def make_features(
    n: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = DEVICE
) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).to(device)


def make_labels(n: int, *, per_class: int = 4, seed: int = 0, device: torch.device | str = DEVICE) -> Tensor:
    """About `per_class` rows of each class, in no order, with ids that are no row numbers."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 2000))
    return (7 * (order // per_class) - 3).to(device)


def random_rows(n: int, *shape: int, seed: int = 0) -> Tensor:
    """Row numbers below n."""
    return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def all_pairs(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n, device=DEVICE).repeat_interleave(m), torch.arange(m, device=DEVICE).repeat(n)


def bits(t: Tensor) -> Tensor:
    """The bit patterns, so that equality tells NaN and the sign of zero."""
    t = t.detach().cpu().contiguous()
    return t.view({4: torch.int32, 8: torch.int64, 2: torch.int16, 1: torch.int8}[t.element_size()])


def assert_same_bits(got, expected) -> None:
    if isinstance(got, Tensor):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert torch.equal(bits(got), bits(expected))
        return
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


def kill_relus(unit: pddm_ext.PDDM, layers: str) -> None:
    with torch.no_grad():
        for name in layers:
            getattr(unit, name).bias.fill_(-100.0)


@dataclass
class Batch:
    feats: Tensor
    labels: Tensor
    unit: pddm_ext.PDDM
    capability: str


_sizes = st.sampled_from([1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 16, 17, 24, 31, 32, 33, 40])


@st.composite
def batches(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32,), most: int = 100) -> Batch:
    """Any batch the design names: sizes that divide no tile, labels of every kind, degenerate rows and units."""
    n = draw(st.one_of(st.integers(0, 9), st.integers(0, most)))
    seed = draw(st.integers(0, 2**20))
    unit = make_unit(
        draw(_sizes), draw(_sizes), draw(_sizes), normalize_input=draw(st.booleans()), seed=draw(st.integers(0, 50))
    )
    kill_relus(unit, draw(st.sampled_from(["", "", "", "", "u", "v", "c", "uv", "uvc"])))
    feats = make_features(n, unit.dim, seed=seed, dtype=draw(st.sampled_from(dtypes)), device="cpu")
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if n > 1 and draw(st.booleans()):
        feats[rows[: n // 4]] = feats[rows[-(n // 4) :]] if n >= 4 else feats[rows[:1]]  # duplicates: u = 0
        feats[rows[0]] = feats[rows[1]]
    if n > 3 and draw(st.booleans()):
        feats[rows[2]] = -feats[rows[3]]  # opposites: v = 0
    if n > 4 and draw(st.booleans()):
        feats[rows[4]] = 0
    kind = draw(st.sampled_from(["few", "few", "fours", "one", "singletons", "huge"]))
    labels = {
        "few": lambda: torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed)),
        "fours": lambda: make_labels(n, seed=seed, device="cpu"),
        "one": lambda: torch.full((n,), -5),
        "singletons": lambda: rows - n // 2,
        "huge": lambda: torch.tensor([-(2**63), 2**63 - 1, 2**32, 0, -1])[rows % 5],
    }[kind]()
    return Batch(feats.to(DEVICE), labels.to(DEVICE), unit, draw(st.sampled_from(CAPABILITIES)))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out
