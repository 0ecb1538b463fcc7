"""The contract of section 2: names, shapes, errors by their message, and what happens around a call."""

import copy
import inspect
import io
import math
import pickle
import sys
import threading
import time
from functools import partial

import pytest
import torch

import pddm_ext
from helpers import (
    CAPABILITIES,
    DEVICE,
    EMULATED,
    MODES,
    ON_CUDA,
    PARAMETERS,
    assert_same_bits,
    counters,
    cpu_only,
    host_only,
    instruction_set,
    make_features,
    make_labels,
    make_unit,
    reset_counters,
    threads,
)
from pddm_ext import _C, ops, reference
from processes import in_a_new_process
from truth import assert_within, bound_of, truth

PACKAGES = [pytest.param(pddm_ext, id="fused"), pytest.param(reference, id="reference")]
X, LABELS, I = make_features(8, 4), make_labels(8), torch.arange(8, device=DEVICE)  # noqa: E741
DEVICES = r"Expected all tensors to be on the same device, .* (cpu|cuda:\d+) and meta"
# A row number out of range is an error of the device there, as in torch's own indexing: tests/test_cuda.py.
ROWS_ARE_CHECKED = host_only("others are checked by the kernels")


def complaint(error: type[Exception], message: str):
    return pytest.raises(error, match=message)


# --- Errors: each names the argument, what it was, and what is accepted. ----------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("feats", "labels", "kwargs", "error", "message"),
    [
        (X[0], LABELS, {}, ValueError, r"feats has shape \(4,\); \(rows, dim\) is accepted"),
        (X[None], LABELS, {}, ValueError, r"feats has shape \(1, 8, 4\); \(rows, dim\) is accepted"),
        (torch.tensor(1.0), LABELS, {}, ValueError, r"feats has shape \(\); \(rows, dim\) is accepted"),
        (X[:, :0], LABELS, {}, ValueError, r"feats has shape \(n, 0\); a dimension of at least 1 is accepted"),
        (X.int(), LABELS, {}, TypeError, r"feats has dtype torch.int32; float32, float64, bfloat16 or float16 is acc"),
        (X.to(torch.complex64), LABELS, {}, TypeError, r"feats has dtype torch.complex64"),
        (X.tolist(), LABELS, {}, TypeError, r"feats is a list; a tensor of float32, float64, bfloat16 or float16"),
        (X.cpu().numpy(), LABELS, {}, TypeError, r"feats is a ndarray; a tensor of"),
        (X, LABELS[:7], {}, ValueError, r"labels has length 7; feats has 8"),
        (X, LABELS[:, None], {}, ValueError, r"labels has shape \(8, 1\); one dimension is accepted"),
        (X, LABELS.float(), {}, TypeError, r"labels has dtype torch.float32; an integer dtype is accepted"),
        (X, LABELS > 0, {}, TypeError, r"labels has dtype torch.bool; an integer dtype is accepted"),
        (X, LABELS.tolist(), {}, TypeError, r"labels is a list; a tensor of an integer dtype is accepted"),
        (X, LABELS, {"mode": "row"}, ValueError, r"mode is 'row'; 'batch', 'anchor', 'pair' are accepted"),
        (X, LABELS, {"mode": None}, ValueError, r"mode is None; 'batch', 'anchor', 'pair' are accepted"),
        (X, LABELS.to("meta"), {}, RuntimeError, DEVICES),
    ],
)
def test_mining_refuses_bad_input(package, feats, labels, kwargs, error, message):
    with complaint(error, message):
        package.mine_and_score(feats, labels, package.PDDM(4).to(DEVICE), **kwargs)
    with complaint(error, message):
        package.mine_and_score(feats, labels, **kwargs)
    with complaint(error, message):
        package.PDDM(4).to(DEVICE).mine(feats, labels, **kwargs)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("feats", "i", "j", "error", "message"),
    [
        (X[0], I, I, ValueError, r"feats has shape \(4,\); \(rows, dim\) is accepted"),
        (X.long(), I, I, TypeError, r"feats has dtype torch.int64; float32"),
        (X, I[None], I, ValueError, r"i has shape \(1, 8\); one dimension is accepted"),
        (X, I, I[None], ValueError, r"j has shape \(1, 8\); one dimension is accepted"),
        (X, I, I[:3], ValueError, r"j has length 3; i has 8"),
        (X, I.float(), I, TypeError, r"i has dtype torch.float32; an integer dtype is accepted"),
        (X, I, [0], TypeError, r"j is a list; a tensor of an integer dtype is accepted"),
        (X, I.to("meta"), I, RuntimeError, DEVICES),
    ],
)
def test_score_pairs_refuses_bad_input(package, feats, i, j, error, message):
    with complaint(error, message):
        package.score_pairs(feats, i, j, package.PDDM(4).to(DEVICE))


@ROWS_ARE_CHECKED
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("feats", "i", "j", "message"),
    [
        (X, I + 1, I, r"i\[7\] is 8; feats has 8 rows"),
        (X, I, I - 1, r"j\[0\] is -1; feats has 8 rows"),
        (X, I, I.clone().fill_(2**62), r"j\[0\] is 4611686018427387904; feats has 8 rows"),
        (X[:0], I[:1], I[:1], r"i\[0\] is 0; feats has 0 rows"),
    ],
)
def test_score_pairs_refuses_row_numbers_out_of_range(package, feats, i, j, message):
    with complaint(IndexError, message):
        package.score_pairs(feats, i, j, package.PDDM(4))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X[0], None, ValueError, r"x has shape \(4,\); \(rows, dim\) is accepted"),
        (X, X[0], ValueError, r"y has shape \(4,\); \(rows, dim\) is accepted"),
        (X, X[:, :3], ValueError, r"y has shape \(8, 3\); x has dimension 4"),
        (X, X.double(), TypeError, r"x has dtype torch.float32 and y torch.float64; one dtype is accepted"),
        (X.long(), None, TypeError, r"x has dtype torch.int64; float32"),
        (X, "rows", TypeError, r"y is a str; a tensor of float32"),
        (X, X.to("meta"), RuntimeError, DEVICES),
    ],
)
def test_score_matrix_refuses_bad_input(package, x, y, error, message):
    with complaint(error, message):
        package.score_matrix(x, package.PDDM(4).to(DEVICE), y)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("queries", "gallery", "k", "error", "message"),
    [
        (X[0], X, 1, ValueError, r"queries has shape \(4,\); \(rows, dim\) is accepted"),
        (X, X[0], 1, ValueError, r"gallery has shape \(4,\); \(rows, dim\) is accepted"),
        (X, X[:, :3], 1, ValueError, r"gallery has shape \(8, 3\); queries has dimension 4"),
        (X, X.half(), 1, TypeError, r"queries has dtype torch.float32 and gallery torch.float16; one dtype is accept"),
        (X, X, 0, ValueError, r"k is 0; 1 to 8, the rows of gallery, is accepted"),
        (X, X, -1, ValueError, r"k is -1; 1 to 8"),
        (X, X, 9, ValueError, r"k is 9; 1 to 8, the rows of gallery, is accepted"),
        (X, X[:0], 1, ValueError, r"k is 1; 1 to 0"),
        (X, X, 2.0, TypeError, r"k is a float; an int is accepted"),
        (X, X, True, TypeError, r"k is a bool; an int is accepted"),
    ],
)
def test_topk_refuses_bad_input(package, queries, gallery, k, error, message):
    with complaint(error, message):
        package.topk(queries, gallery, k, package.PDDM(4).to(DEVICE))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, X[:3], ValueError, r"x has shape \(8, 4\) and y \(3, 4\); \(…, dim\) twice is accepted"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, r"x has shape \(\) and y \(\)"),
        (X, X.double(), TypeError, r"x has dtype torch.float32 and y torch.float64; one dtype is accepted"),
        (X, X.long(), TypeError, r"y has dtype torch.int64; float32"),
        (X[:, :3], X[:, :3], ValueError, r"unit scores features of dimension 4; these have 3"),
    ],
)
def test_a_unit_refuses_bad_rows(package, x, y, error, message):
    with complaint(error, message):
        package.PDDM(4).to(DEVICE)(x, y)


@pytest.mark.parametrize(
    ("unit", "error", "message"),
    [
        (torch.nn.Linear(4, 4), TypeError, r"unit is a Linear; a PDDM is accepted"),
        (make_unit(5), ValueError, r"unit scores features of dimension 5; these have 4"),
        (make_unit(4).to("meta"), RuntimeError, DEVICES),
    ],
)
def test_every_entry_refuses_a_unit_that_does_not_fit(unit, error, message):
    calls = [
        lambda: pddm_ext.mine_and_score(X, LABELS, unit),
        lambda: pddm_ext.score_pairs(X, I, I, unit),
        lambda: pddm_ext.score_matrix(X, unit),
        lambda: pddm_ext.topk(X, X, 1, unit),
    ]
    for call in calls:
        with complaint(error, message):
            call()


@pytest.mark.parametrize("call", ["score_pairs", "score_matrix", "topk"])
def test_only_mining_has_a_default_unit(call):
    arguments = {"score_pairs": (X, I, I, None), "score_matrix": (X, None), "topk": (X, X, 1, None)}[call]
    with complaint(TypeError, r"unit is a NoneType; a PDDM is accepted"):
        getattr(pddm_ext, call)(*arguments)


def test_a_unit_of_integers_is_refused():
    unit = make_unit(4)
    unit.c.weight = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.int32, device=DEVICE), requires_grad=False)
    with complaint(TypeError, r"unit's c.weight has dtype torch.int32; float32"):
        pddm_ext.score_matrix(X, unit)


@pytest.mark.parametrize(
    ("layer", "broken"), [("c", torch.nn.Linear(9, 4)), ("u", torch.nn.Linear(4, 3)), ("s", torch.nn.Linear(4, 2))]
)
def test_a_unit_whose_layers_do_not_fit_together_is_refused_before_memory_is_read(layer, broken):
    unit = make_unit(4)
    setattr(unit, layer, broken.to(DEVICE))
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
        pddm_ext.score_matrix(X, unit)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("sizes", [{"dim": 0}, {"dim": 3, "hidden": 0}, {"dim": 3, "combined": -1}])
def test_a_unit_has_positive_sizes(package, sizes):
    name, value = list(sizes.items())[-1]
    with complaint(ValueError, f"{name} is {value}; at least 1 is accepted"):
        package.PDDM(**sizes)


def test_the_loss_refuses_features_that_are_no_matrix():
    quads = make_unit(4).mine(X, LABELS)
    with complaint(ValueError, r"feats has shape \(4,\); \(rows, dim\) is accepted"):
        pddm_ext.QuadrupletLoss()(X[0], quads)


def test_bad_input_raises_before_any_work():
    unit = make_unit(4)
    reset_counters()
    for call in (
        lambda: unit.mine(X, LABELS[:3]),
        lambda: pddm_ext.score_pairs(X, I, I[:3] if ON_CUDA else I + 1, unit),
        lambda: pddm_ext.topk(X, X, 9, unit),
    ):
        with pytest.raises((ValueError, IndexError)):
            call()
    assert set(counters().values()) == {0}


OPERATORS = ["mine", "score_pairs", "score_matrix", "topk", "score_pairs_backward", "score_matrix_backward"]


@pytest.mark.parametrize(
    ("operator", "arguments", "tail"),
    [
        ("mine", (X, LABELS[:3]), (0,)),
        ("mine", (X, LABELS), (3,)),
        ("mine", (X[0], LABELS[:4]), (0,)),
        ("mine", (X.long(), LABELS), (0,)),
        ("score_pairs", (X, I, I[:3]), ()),
        pytest.param("score_pairs", (X, I + 1, I), (), marks=ROWS_ARE_CHECKED),
        pytest.param("score_pairs", (X, I, I - 1), (), marks=ROWS_ARE_CHECKED),
        ("score_matrix", (X, 9), ()),
        ("topk", (X, X, 9), ()),
        ("topk", (X, X, -1), ()),
        ("topk", (X, X[:, :3], 1), ()),
        ("score_pairs_backward", (X[0, :3], X, I, I), ()),
        pytest.param("score_pairs_backward", (X[:, 0], X, I + 1, I), (), marks=ROWS_ARE_CHECKED),
        pytest.param("score_pairs_backward", (X[:, 0], X, I - 2, I), (), marks=ROWS_ARE_CHECKED),
        ("score_matrix_backward", (X[0, :3], X, -1), ()),
        ("score_matrix_backward", (X[:4].reshape(16), X, 9), ()),
    ],
)
def test_a_direct_call_of_an_operator_cannot_reach_foreign_memory(operator, arguments, tail):
    # What Python's checks would have caught; the operators are public too.
    with torch.no_grad(), pytest.raises(RuntimeError, match="pddm: "):
        getattr(torch.ops.pddm, operator)(*arguments, *ops.unit_arguments(make_unit(4)), *tail)


# --- Devices ----------------------------------------------------------------------------------------------------------


def test_results_are_on_the_features_device():
    unit, x = make_unit(4), X.clone().requires_grad_()
    results = [pddm_ext.score_pairs(x, I, I, unit), pddm_ext.score_matrix(x, unit), unit(x, x)]
    results += [*pddm_ext.topk(x, x, 2, unit), *(field for mode in MODES for field in unit.mine(x, LABELS, mode=mode))]
    sum(t.sum() for t in results if t.requires_grad).backward()
    assert {t.device for t in (*results, x.grad, unit.c.weight.grad)} == {X.device}


@pytest.mark.skipif(_C.build_info()["cuda"] not in (None, "emulated"), reason="this build has CUDA")
@pytest.mark.parametrize("operator", OPERATORS)
def test_cuda_tensors_are_told_that_this_build_has_no_cuda(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pddm::{operator}", "CUDA")
    with complaint(RuntimeError, r"built without CUDA.*PDDM_CUDA=on pip install"):
        ops._refuse_cuda()


def on_meta() -> tuple[torch.Tensor, torch.Tensor, pddm_ext.PDDM]:
    return X.to("meta"), LABELS.to("meta"), make_unit(4).to("meta")


@pytest.mark.parametrize("mode", ["batch", "anchor"])
def test_mining_on_meta_has_shapes_and_dtypes(mode):
    feats, labels, unit = on_meta()
    got, real = unit.mine(feats, labels, mode=mode), make_unit(4).mine(X, LABELS, mode=mode)
    for a, b in zip(got, real, strict=True):
        assert a.device.type == "meta"
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_scores_on_meta_have_shapes_and_dtypes():
    feats, labels, unit = on_meta()
    assert pddm_ext.score_pairs(feats, labels, labels, unit).shape == (8,)
    assert pddm_ext.score_matrix(feats, unit).shape == (8, 8)
    assert pddm_ext.score_matrix(feats, unit, feats[:3]).shape == (8, 3)
    assert [t.shape for t in pddm_ext.topk(feats[:2], feats, 3, unit)] == [(2, 3)] * 2
    assert unit(feats, feats).shape == (8,)
    assert pddm_ext.score_matrix(feats.double(), unit).dtype == torch.float64


# --- Units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_a_unit_is_four_linear_layers_under_the_documented_keys(package):
    unit = package.PDDM(6, 5, 4)
    shapes = {name: tuple(value.shape) for name, value in unit.state_dict().items()}
    expected = [(5, 6), (5,), (5, 6), (5,), (4, 10), (4,), (1, 4), (1,)]
    assert shapes == dict(zip(PARAMETERS, expected, strict=True))
    assert all(isinstance(layer, torch.nn.Linear) for layer in (unit.u, unit.v, unit.c, unit.s))


def test_sizes_default_to_the_dimension_and_the_switch_to_off():
    unit = pddm_ext.PDDM(7)
    assert (unit.dim, unit.hidden, unit.combined, unit.normalize_input) == (7, 7, 7, False)
    with pytest.raises(TypeError):
        pddm_ext.PDDM(7, 7, 7, True)  # the switch has a name
    assert "normalize_input=True" in repr(pddm_ext.PDDM(7, normalize_input=True))


def test_the_switch_changes_the_scores():
    plain, normalised = make_unit(4), make_unit(4, normalize_input=True)
    assert (pddm_ext.score_matrix(X, plain) != pddm_ext.score_matrix(X, normalised)).any()


def test_units_travel():
    unit = make_unit(4, 3, 5, normalize_input=True)
    buffer = io.BytesIO()
    torch.save(unit.state_dict(), buffer)
    buffer.seek(0)
    loaded = pddm_ext.PDDM(4, 3, 5, normalize_input=True).to(DEVICE)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    plain = reference.PDDM(4, 3, 5, normalize_input=True)
    plain.load_state_dict(unit.state_dict())  # and between the package and its reference
    back = pddm_ext.PDDM(4, 3, 5, normalize_input=True).to(DEVICE)
    back.load_state_dict(plain.state_dict())
    for other in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit)), loaded, back):
        assert_same_bits(other.mine(X, LABELS, mode="anchor"), unit.mine(X, LABELS, mode="anchor"))


def test_a_copy_shares_no_parameter():
    unit = make_unit(4)
    other = copy.deepcopy(unit)
    with torch.no_grad():
        other.s.bias += 1
    assert_same_bits(pddm_ext.score_matrix(X, unit), pddm_ext.score_matrix(X, make_unit(4)))


def test_calling_a_unit_scores_matched_rows():
    unit = make_unit(4)
    x, y = make_features(24, 4).reshape(2, 3, 4, 4), make_features(24, 4, seed=1).reshape(2, 3, 4, 4)
    got = unit(x, y)
    assert got.shape == (2, 3, 4)
    rows = x.reshape(24, 4), unit, y.reshape(24, 4)
    assert_within(got, *(f(*rows).diagonal().reshape(2, 3, 4) for f in (truth, bound_of)))
    assert_same_bits(unit(x.transpose(0, 2), y.transpose(0, 2)), got.transpose(0, 2))
    assert_same_bits(unit(x[0, 0, 0], y[0, 0, 0]), got[0, 0, 0])


# --- The default unit -------------------------------------------------------------------------------------------------


def test_mining_without_a_unit_uses_the_default_one():
    x, labels = make_features(12, 23), make_labels(12)
    unit = pddm_ext.default_unit(23, DEVICE)
    assert_same_bits(pddm_ext.mine_and_score(x, labels), unit.mine(x, labels))
    assert pddm_ext.default_unit(23, x.device) is unit
    assert pddm_ext.default_unit(23, str(DEVICE)) is unit
    assert (pddm_ext.default_unit(23) is unit) == (DEVICE.type == "cpu")  # the default's default
    assert pddm_ext.default_unit(23, "cpu") is pddm_ext.default_unit(23)
    assert pddm_ext.default_unit(24, DEVICE) is not unit
    assert isinstance(unit, pddm_ext.PDDM)
    assert (unit.dim, unit.hidden, unit.combined, unit.normalize_input) == (23, 23, 23, False)


def test_the_default_unit_trains():
    x, labels = make_features(12, 25), make_labels(12)
    optimizer = torch.optim.SGD(pddm_ext.default_unit(25, DEVICE).parameters(), lr=0.1)
    before = pddm_ext.mine_and_score(x, labels).s_ij
    before.sum().backward()
    optimizer.step()
    assert pddm_ext.mine_and_score(x, labels).s_ij.item() != before.item()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_default_unit_that_evaluation_made_can_still_be_trained(context):
    dim = {torch.no_grad: 26, torch.inference_mode: 27}[context]
    x, labels = make_features(12, dim), make_labels(12)
    with context():
        pddm_ext.mine_and_score(x, labels)  # the first use
    pddm_ext.mine_and_score(x, labels).s_ij.sum().backward()
    assert pddm_ext.default_unit(dim, DEVICE).s.weight.grad is not None


def test_threads_that_meet_at_a_new_default_unit_share_one():
    made, barrier = [], threading.Barrier(8)

    def first_use():
        barrier.wait()
        made.append(pddm_ext.default_unit(601))  # large enough that making one takes a while

    workers = [threading.Thread(target=first_use) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({id(unit) for unit in made}) == 1


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_of_an_example_worked_by_hand():
    # Rows at 0°, 90° and 180°: D is 2 between neighbours, 4 between opposites.
    one = partial(torch.tensor, device=DEVICE)
    feats = one([[3.0, 0.0], [0.0, 0.5], [-2.0, 0.0]])
    quads = pddm_ext.Quadruplets(
        i=one([0, -1]), j=one([1, -1]), k=one([2, -1]), l=one([2, -1]),
        s_ij=one([0.25, 0.0]), s_ik=one([0.5, 0.0]), s_jl=one([-0.5, 0.0]), valid=one([True, False]),
    )  # fmt: skip
    # E_m = max(0, .5 + .5 − .25) + max(0, .5 − .5 − .25) = .75    E_e = max(0, 1 + 2 − 4) + max(0, 1 + 2 − 2) = 1
    assert pddm_ext.QuadrupletLoss()(feats, quads).item() == pytest.approx(0.75 + 0.5 * 1.0, abs=1e-6)
    assert pddm_ext.QuadrupletLoss(weight=2.0)(feats, quads).item() == pytest.approx(0.75 + 2.0, abs=1e-6)
    assert pddm_ext.QuadrupletLoss(alpha=1.0)(feats, quads).item() == pytest.approx(1.5 + 0.5, abs=1e-6)
    assert pddm_ext.QuadrupletLoss(beta=3.0)(feats, quads).item() == pytest.approx(0.75 + 0.5 * 4.0, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_the_formula_over_valid_quadruplets(dtype, mode):
    feats, labels = make_features(30, 6, dtype=dtype), make_labels(30, per_class=3)
    labels[3] = 500
    quads = make_unit(6).mine(feats, labels, mode=mode)
    unit_rows = (feats.double() / feats.double().norm(dim=1, keepdim=True)).tolist()

    def distance(a: int, b: int) -> float:
        return sum((p - q) ** 2 for p, q in zip(unit_rows[a], unit_rows[b], strict=True))

    total, count = 0.0, 0
    for i, j, k, l, s_ij, s_ik, s_jl, valid in zip(*(f.tolist() for f in quads), strict=True):  # noqa: E741
        if valid:
            e_m = max(0, 0.5 + s_ik - s_ij) + max(0, 0.5 + s_jl - s_ij)
            e_e = max(0, 1 + distance(i, j) - distance(i, k)) + max(0, 1 + distance(i, j) - distance(j, l))
            total, count = total + e_m + 0.5 * e_e, count + 1
    loss = pddm_ext.QuadrupletLoss()(feats, quads)
    assert loss.shape == ()
    assert loss.dtype == dtype
    # Sums of at most 30 terms of order 1, each of a handful of roundings.
    assert loss.item() == pytest.approx(total / count, rel=1e-5 if dtype == torch.float32 else 1e-13)


def test_the_loss_takes_half_precision_features():
    feats = make_features(12, 6, dtype=torch.bfloat16).requires_grad_()
    loss = pddm_ext.QuadrupletLoss()(feats, make_unit(6).mine(feats, make_labels(12), mode="anchor"))
    assert loss.dtype == torch.float32
    loss.backward()
    assert feats.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["forward", "similarity", "embedding"])
def test_the_loss_reduces_as_asked(part):
    feats, labels = make_features(30, 6), make_labels(30, per_class=3)
    labels[3] = 500
    quads = make_unit(6).mine(feats, labels, mode="anchor")
    arguments = (quads,) if part == "similarity" else (feats, quads)
    each, total, mean = (
        getattr(pddm_ext.QuadrupletLoss(reduction=reduction), part)(*arguments) for reduction in ("none", "sum", "mean")
    )
    assert each.shape == (30,)
    assert (each == 0).sum() < 30
    assert each[~quads.valid].tolist() == [0] * 1
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(mean, each.sum() / 29)
    assert torch.equal(getattr(pddm_ext.QuadrupletLoss(), part)(*arguments), mean)


def test_the_loss_adds_its_regularizer():
    feats, labels = make_features(12, 6).requires_grad_(), make_labels(12)
    quads = make_unit(6).mine(feats, labels, mode="anchor")
    density = pddm_ext.DensityRegularizer()
    loss = pddm_ext.QuadrupletLoss(regularizer=density, regularizer_weight=0.3)(feats, quads, labels)
    apart = pddm_ext.QuadrupletLoss()(feats, quads) + 0.3 * density(feats, labels)
    torch.testing.assert_close(loss, apart)
    gradients = [torch.autograd.grad(value, feats, retain_graph=True)[0] for value in (loss, apart)]
    torch.testing.assert_close(*gradients)
    pddm_ext.QuadrupletLoss()(feats, quads, labels)  # which it may be given without use for them


def test_the_loss_refuses_what_it_cannot_do():
    feats, labels = make_features(12, 6), make_labels(12)
    quads = make_unit(6).mine(feats, labels)
    density = pddm_ext.DensityRegularizer()
    with pytest.raises(ValueError, match="reduction is 'max'; 'mean', 'sum', 'none' are accepted"):
        pddm_ext.QuadrupletLoss(reduction="max")
    with pytest.raises(ValueError, match="reduction is 'none' beside a regularizer"):
        pddm_ext.QuadrupletLoss(regularizer=density, reduction="none")
    with pytest.raises(ValueError, match="labels are missing"):
        pddm_ext.QuadrupletLoss(regularizer=density)(feats, quads)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": math.nan}, ValueError, "alpha is nan; a finite number from 0 is accepted"),
        ({"beta": None}, TypeError, "beta is a NoneType; a finite number from 0 is accepted"),
        ({"weight": -2}, ValueError, "weight is -2; a finite number from 0 is accepted"),
        ({"regularizer_weight": "1"}, TypeError, "regularizer_weight is a str; a finite number from 0 is accepted"),
        ({"regularizer": 3}, TypeError, "regularizer is a int; a function or None is accepted"),
    ],
)
def test_the_loss_refuses_arguments_when_it_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        pddm_ext.QuadrupletLoss(**arguments)


def test_the_loss_names_what_it_was_called_with():
    feats = make_features(12, 6)
    quads = make_unit(6).mine(feats, make_labels(12))
    loss = pddm_ext.QuadrupletLoss()
    with pytest.raises(TypeError, match="quads is a Tensor; Quadruplets are accepted"):
        loss(quads, feats)
    with pytest.raises(TypeError, match=r"feats has dtype torch.int64; float32, .* is accepted"):
        loss(feats.long(), quads)
    with pytest.raises(TypeError, match="feats is a list"):
        loss(feats.tolist(), quads)


def test_the_loss_describes_itself():
    assert repr(pddm_ext.QuadrupletLoss()) == "QuadrupletLoss(alpha=0.5, beta=1.0, weight=0.5)"
    regularized = repr(pddm_ext.QuadrupletLoss(regularizer=pddm_ext.DensityRegularizer(), regularizer_weight=0.3))
    assert "regularizer_weight=0.3" in regularized
    assert "(regularizer): DensityRegularizer(ratio=0.5, temperature=0.05, eps=0.0001)" in regularized


# --- The package ------------------------------------------------------------------------------------------------------


def test_the_reference_has_the_same_names_and_parameters():
    for name in ("mine_and_score", "score_pairs", "score_matrix", "topk", "PDDM", "QuadrupletLoss", "default_unit"):
        assert name in pddm_ext.__all__
        ours, plain = (inspect.signature(getattr(package, name)).parameters for package in (pddm_ext, reference))
        assert list(ours) == list(plain)
        assert [p.default for p in ours.values()] == [p.default for p in plain.values()]
        assert getattr(pddm_ext, name).__doc__


def test_quadruplets_are_a_named_tuple_in_the_documented_order():
    quads = make_unit(4).mine(X, LABELS)
    assert quads._fields == ("i", "j", "k", "l", "s_ij", "s_ik", "s_jl", "valid")
    i64, f32 = torch.int64, torch.float32
    assert [f.dtype for f in quads] == [i64, i64, i64, i64, f32, f32, f32, torch.bool]


def test_mode_is_passed_by_name_only():
    with pytest.raises(TypeError):
        pddm_ext.mine_and_score(X, LABELS, make_unit(4), "anchor")
    with pytest.raises(TypeError):
        make_unit(4).mine(X, LABELS, "anchor")


INSTRUCTION_SETS = cpu_only("they have instruction sets")


@INSTRUCTION_SETS
def test_the_environment_forces_an_instruction_set():
    code = "import pddm_ext; from pddm_ext import _C; print(_C.cpu_capability())"
    assert in_a_new_process(code, PDDM_CPU_CAPABILITY="portable").stdout.strip() == "portable"
    assert in_a_new_process(code, PDDM_CPU_CAPABILITY="").stdout.strip() == CAPABILITIES[-1]


@INSTRUCTION_SETS
def test_an_unknown_instruction_set_is_an_error_on_first_use():
    code = """
import torch, pddm_ext
unit = pddm_ext.PDDM(4)
for _ in range(2):
    try:
        pddm_ext.score_matrix(torch.randn(3, 4), unit)
    except (RuntimeError, ValueError) as error:
        print(error)
"""
    done = in_a_new_process(code, PDDM_CPU_CAPABILITY="mmx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PDDM_CPU_CAPABILITY is 'mmx'; this build on this machine has portable") == 2


@INSTRUCTION_SETS
def test_a_refused_instruction_set_leaves_the_old_one():
    with instruction_set("portable"):
        with complaint(ValueError, r"PDDM_CPU_CAPABILITY is 'neon'; this build on this machine has portable"):
            _C.set_cpu_capability("neon")
        assert _C.cpu_capability() == "portable"


@INSTRUCTION_SETS
def test_the_best_instruction_set_is_the_default():
    assert next(iter(_C.cpu_capabilities())) == "portable"
    assert _C.cpu_capability() == CAPABILITIES[-1]


# --- Threads ----------------------------------------------------------------------------------------------------------


@cpu_only("on the GPU a call returns before its work is done")
@pytest.mark.parametrize("call", ["mine", "backward"])
def test_other_python_threads_run_during_a_call(call):
    """Nobody is asked for the GIL before a thousand seconds are over, so the other thread counts only where a call
    gives it away. The small operations around a kernel do that too, once each: hence more than a few."""
    unit, labels = make_unit(64), make_labels(600)
    x = make_features(600, 64).requires_grad_()
    calling, stop = threading.Event(), threading.Event()
    counted = 0

    def count():
        nonlocal counted
        calling.wait()
        while not stop.is_set():
            counted += 1
            time.sleep(0)  # gives the GIL back to a call that has returned

    interval = sys.getswitchinterval()
    other = threading.Thread(target=count, daemon=True)
    other.start()
    try:
        with threads(1):
            scores = unit.mine(x, labels, mode="pair").s_ik if call == "mine" else pddm_ext.score_matrix(x, unit)
            sys.setswitchinterval(1000)
            calling.set()
            before = counted
            if call == "mine":
                unit.mine(x, labels, mode="anchor")
            else:
                scores.sum().backward()
            progress = counted - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        other.join()
    assert progress > 50


def test_several_threads_at_once_get_the_same_bits():
    n, workers, times = (40, 3, 1) if EMULATED else (150, 6, 3)
    unit, x, labels = make_unit(24, 17, 9), make_features(n, 24), make_labels(n)

    def everything():
        mine = x.clone().requires_grad_()
        q = unit.mine(mine, labels, mode="anchor")
        grads = torch.autograd.grad(pddm_ext.QuadrupletLoss().similarity(q), [mine, *unit.parameters()])
        ranked = pddm_ext.topk(x[:20], x, 5, unit)
        return [*q, *grads, *ranked, pddm_ext.score_matrix(x, unit)]

    expected = everything()
    results, errors = [], []

    def work():
        try:
            for _ in range(times):
                results.append(everything())
        except Exception as error:  # pragma: no cover - the failure itself
            errors.append(error)

    started = [threading.Thread(target=work) for _ in range(workers)]
    for worker in started:
        worker.start()
    for worker in started:
        worker.join()
    assert not errors
    assert len(results) == workers * times
    for result in results:
        assert_same_bits(result, expected)
