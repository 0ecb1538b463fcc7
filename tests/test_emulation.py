"""What the emulation of a GPU can show and a GPU cannot: other devices, and threads that run in other orders."""

import pytest
import torch

import pddm_ext
from helpers import EMULATED, FLOATS, MODES, counters, make_features, make_labels, make_unit, reset_counters
from pddm_ext import _C
from processes import in_a_new_process
from truth import assert_lowest, assert_mined, assert_within, bound_of, truth

pytestmark = pytest.mark.skipif(not EMULATED, reason="this build does not emulate a GPU")


def scratch(call) -> int:
    reset_counters()
    call()
    return counters()["bytes_peak"]


def assert_all_of_it(x: torch.Tensor, unit: pddm_ext.PDDM) -> None:
    expected, bound = truth(x, unit), bound_of(x, unit)
    assert_within(pddm_ext.score_matrix(x, unit), expected, bound)
    i, j = torch.triu_indices(len(x), len(x))
    assert_within(pddm_ext.score_pairs(x, i, j, unit), expected[i, j], bound[i, j])
    labels = make_labels(len(x))
    for mode in MODES:
        quads = unit.mine(x, labels, mode=mode)
        assert_mined(quads, x, labels, unit, mode)
        assert_lowest(quads, x, labels, mode)


def test_a_device_that_is_too_old_is_refused_in_words(monkeypatch):
    monkeypatch.setenv("PDDM_EMULATION_DEVICE", "sm_75")
    unit, x = make_unit(4), make_features(6, 4)
    for call in (
        lambda: unit.mine(x, make_labels(6)),
        lambda: pddm_ext.score_matrix(x, unit),
        lambda: pddm_ext.topk(x, x, 2, unit),
    ):
        reset_counters()
        with pytest.raises(RuntimeError, match=r"CUDA device 0 is of compute capability 7\.5; the kernels need 8\.0"):
            call()
        assert counters()["launches"] == 0


# Of 300 pairs there are 3 tiles of 128 and 5 of 64; of (hidden, combined) the half precisions take, by prepared.cuh,
SHAPES = [
    ("sm_90", 1, "off", (70, 132)),  # 128 × 256, in the fewest waves
    ("sm_90", 5, "off", (70, 132)),  # 64 × 256, which leaves no multiprocessor idle
    ("sm_80", 1, "on", (120, 120)),  # 64 × 128
    ("sm_80", 2, "on", (60, 60)),  # 32 × 64
    ("sm_80", 1, "on", (500, 250)),  # 128 × 256 with u' in global memory
    ("sm_86", 5, "on", (900, 9)),  # 64 × 256 with u' in global memory
    # and on Hopper, where the input is not normalised, warpgroups of
    ("sm_90", 2, "on", (250, 250)),  # 256 outputs
    ("sm_90", 4, "on", (190, 380)),  # 192
    ("sm_90", 2, "on", (120, 120)),  # 128
    ("sm_90", 3, "on", (60, 60)),  # 64
    ("sm_90", 1, "on", (60, 60)),  # a cluster has no room, and the portable kernel goes on
]


@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_shape_of_the_tiles_scores_as_the_reference(monkeypatch, dtype, normalize_input):
    for device, multiprocessors, warpgroups, (hidden, combined) in SHAPES:
        monkeypatch.setenv("PDDM_WARPGROUPS", warpgroups)
        unit = make_unit(33, hidden, combined, normalize_input=normalize_input)
        x = make_features(24, 33, dtype=dtype)
        x[20] = x[5].clone()
        monkeypatch.setenv("PDDM_EMULATION_DEVICE", device)
        monkeypatch.setenv("PDDM_EMULATION_MULTIPROCESSORS", str(multiprocessors))
        assert_all_of_it(x, unit)


@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize(
    ("dtype", "hidden"),
    [(torch.float32, 712), (torch.float64, 360), (torch.bfloat16, 1416), (torch.float16, 1416)],
    ids=str,
)
def test_u_that_does_not_fit_in_shared_memory_is_kept_outside(monkeypatch, dtype, hidden, normalize_input):
    unit = make_unit(8, hidden, 10, normalize_input=normalize_input)
    x = make_features(12, 8, dtype=dtype)
    used = {}
    for device, multiprocessors in (("sm_90", 1), ("sm_86", 1), ("sm_86", 4)):
        monkeypatch.setenv("PDDM_EMULATION_DEVICE", device)
        monkeypatch.setenv("PDDM_EMULATION_MULTIPROCESSORS", str(multiprocessors))
        used[device, multiprocessors] = scratch(lambda: pddm_ext.score_matrix(x, unit))
        assert_all_of_it(x, unit)
    # On one multiprocessor one block comes back to the same memory; on four each has its own, for the pairs of a tile.
    assert used["sm_90", 1] != used["sm_86", 1] < used["sm_86", 4]
    size = 2 if dtype in (torch.bfloat16, torch.float16) else dtype.itemsize
    each = -(-hidden * size // 64) * 64
    more = used["sm_86", 4] - used["sm_86", 1]
    assert more % (32 * each) == 0
    assert more <= 3 * 128 * each


def test_the_switch_of_the_kernel_takes_two_words(monkeypatch):
    monkeypatch.setenv("PDDM_EMULATION_DEVICE", "sm_90")
    unit, x = make_unit(40, 90, 40), make_features(24, 40, dtype=torch.bfloat16)
    scores, used = {}, {}
    for word in ("on", "off"):
        monkeypatch.setenv("PDDM_WARPGROUPS", word)
        assert _C.warpgroups(0) == (word == "on")
        used[word] = scratch(lambda word=word: scores.update({word: pddm_ext.score_matrix(x, unit)}))
    assert used["on"] > used["off"]  # rows of W_v f are padded to 128 instead of 96
    torch.testing.assert_close(scores["on"], scores["off"], atol=2e-3, rtol=2e-3)
    monkeypatch.setenv("PDDM_WARPGROUPS", "fast")
    with pytest.raises(RuntimeError, match="PDDM_WARPGROUPS is 'fast'; on and off are accepted"):
        pddm_ext.score_matrix(x, unit)
    monkeypatch.setenv("PDDM_WARPGROUPS", "on")
    for older in ("sm_86", "sm_75"):
        monkeypatch.setenv("PDDM_EMULATION_DEVICE", older)
        assert not _C.warpgroups(0)


def test_no_order_of_the_threads_changes_a_bit():
    """What depends on it lacks a barrier, or takes the first to arrive."""
    code = """
import hashlib, torch
from helpers import bits, make_features, make_labels, make_unit, matmul_precision
from test_laws import everything
digest = hashlib.sha256()
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
for dtype, normalize_input in (f32, False), (f32, True), (f64, True), (bf16, False), (f16, True):
    unit, x = make_unit(17, 21, 30, normalize_input=normalize_input), make_features(34, 17, dtype=dtype)
    x[30:34] = x[3].clone()
    with matmul_precision("high" if normalize_input else "highest"):
        for t in everything(x, make_labels(34), unit):
            digest.update(bits(t).numpy().tobytes())
print(digest.hexdigest())
"""
    seen = set()
    for order in ("ascending", "descending", "shuffled", "shuffled:2"):
        done = in_a_new_process(code, PDDM_EMULATION_ORDER=order)
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1
