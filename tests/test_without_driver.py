"""A build with CUDA kernels where there is no driver: it loads, serves the CPU, and says what is missing."""

from __future__ import annotations

import pytest
import torch

import pddm_ext
from helpers import make_features, make_labels, make_unit
from pddm_ext import _C, reference

pytestmark = [
    pytest.mark.skipif(_C.build_info()["cuda"] in (None, "emulated"), reason="built without CUDA kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver"),
]


def test_tensors_of_the_cpu_are_served() -> None:
    unit, feats, labels = make_unit(12), make_features(40, 12).requires_grad_(), make_labels(40)
    plain = reference.PDDM(12)
    plain.load_state_dict(unit.state_dict())
    for mode in ("batch", "anchor", "pair"):
        got = unit.mine(feats, labels, mode=mode)
        expected = plain.mine(feats, labels, mode=mode)
        assert torch.equal(got.j, expected.j)
        torch.testing.assert_close(got.s_ik, expected.s_ik, atol=1e-5, rtol=1e-5)
    pddm_ext.QuadrupletLoss()(feats, got).backward()
    assert feats.grad is not None


def test_what_was_built_is_told() -> None:
    assert int(_C.build_info()["cuda"].partition(".")[0]) >= 12


def test_the_operators_of_a_gpu_are_there_and_say_what_they_lack() -> None:
    kernel = torch._C._dispatch_dump("pddm::mine")
    assert "CUDA" in kernel
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda|driver|nvidia"):
        torch.ops.pddm.mine(
            make_features(8, 12).cuda(), make_labels(8).cuda(), *pddm_ext.ops.unit_arguments(make_unit(12)), 0
        )
