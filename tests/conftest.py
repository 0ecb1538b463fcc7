from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from helpers import CAPABILITIES, instruction_set, threads

# Every run draws the same examples. Their time is nobody's promise.
settings.register_profile(
    "pddm", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pddm")


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
