from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from helpers import CAPABILITIES, instruction_set, threads

if TYPE_CHECKING:
    from pddm_ext.workbench.data.splits import Dataset

# Every run draws the same examples. Their time is nobody's promise.
settings.register_profile(
    "pddm", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pddm")

# A shell starts what it runs in the background deaf to Ctrl-C, and its children with it; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, and the best again afterwards."""
    with instruction_set(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed_and_threads() -> Iterator[None]:
    """One seed, and threads to share the work among, however few cores there are."""
    torch.manual_seed(0)
    with threads(2):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Nets this small, among other test processes, are slower on more."""
    with threads(1):
        yield


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Eight training classes and five test classes, which the command line finds in the glyphs' place."""
    # Here, for a suite on a GPU may lack what the workbench needs.
    from pddm_ext.workbench.data import glyphs
    from runs import make_tiny

    dataset = make_tiny()
    monkeypatch.setattr(glyphs, "load", lambda: dataset)
    return dataset


@pytest.fixture
def here(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cells of a comparison run in this process, on the tiny data set."""
    from pddm_ext.workbench import compare

    monkeypatch.setattr(compare, "_each", lambda cells, *_: (compare.run_cell(cell, 1) or cell for cell in cells))
    compare._loaded.cache_clear()
    yield
    compare._loaded.cache_clear()
