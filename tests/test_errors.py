"""Errors name the argument, what it was and what is accepted, before any work."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import pddm_ext
from helpers import (
    DEVICE,
    ON_CUDA,
    PACKAGES,
    counters,
    host_only,
    make_features,
    make_labels,
    make_unit,
    reset_counters,
)
from pddm_ext import _C, ops, reference

X, LABELS, I = make_features(8, 4), make_labels(8), torch.arange(8, device=DEVICE)  # noqa: E741
DEVICES = r"Expected all tensors to be on the same device, .* (cpu|cuda:\d+) and meta"
# A row number out of range is an error of the device there, as in torch's own indexing: tests/test_cuda.py.
ROWS_ARE_CHECKED = host_only("others are checked by the kernels")


def complaint(error: type[Exception], message: str):
    return pytest.raises(error, match=message)


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
        (X, torch.full((8,), 2**64 - 1, dtype=torch.uint64), I, r"i\[0\] is 18446744073709551615; feats has 8 rows"),
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


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("layer", ["u", "v", "c", "s"])
def test_a_unit_of_which_a_part_is_elsewhere_is_refused(package, layer):
    unit = package.PDDM(4).to(DEVICE)
    getattr(unit, layer).to("meta")
    for call in (
        lambda: unit(X, X),
        lambda: package.mine_and_score(X, LABELS, unit),
        lambda: package.score_pairs(X, I, I, unit),
        lambda: package.score_matrix(X, unit),
        lambda: package.topk(X, X, 2, unit),
    ):
        with complaint(RuntimeError, "Expected all tensors to be on the same device, .* meta"):
            call()


def test_a_unit_whose_parameters_are_not_dense_is_refused():
    unit = make_unit(4)
    unit.c.weight = torch.nn.Parameter(unit.c.weight.detach().to_sparse())
    with complaint(TypeError, r"unit's c.weight has layout torch.sparse_coo; a dense tensor"):
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


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", ["dim", "hidden", "combined"])
@pytest.mark.parametrize("value", [64.0, "64", True, [64], torch.tensor(64)], ids=repr)
def test_a_unit_has_sizes_that_are_ints(package, name, value):
    with complaint(TypeError, f"{name} is a {type(value).__name__}; an int is accepted"):
        package.PDDM(**{"dim": 3, name: value})


@pytest.mark.parametrize("package", PACKAGES)
def test_a_unit_takes_whatever_counts_as_an_int_and_a_bool(package):
    assert package.PDDM(np.int64(3), np.int32(2)).extra_repr() == package.PDDM(3, 2).extra_repr()
    with complaint(TypeError, "normalize_input is a str; a bool is accepted"):
        package.PDDM(3, normalize_input="no")
    with complaint(TypeError, "dim is a str; an int is accepted"):
        package.default_unit("3")


LAYOUTS = {
    "has layout torch.sparse_coo": lambda x: x.to_sparse(),
    "has layout torch.sparse_csr": lambda x: x.to_sparse_csr(),
    "is nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
}
if not ON_CUDA:
    LAYOUTS["has layout torch._mkldnn"] = lambda x: x.to_mkldnn()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_every_entry_refuses_features_that_are_not_dense(layout):
    x, unit = LAYOUTS[layout](X), make_unit(4)
    refused = rf"{layout}; a dense tensor \(torch.strided\) is accepted"
    for package in (pddm_ext, reference):
        for call, name in (
            (lambda: package.mine_and_score(x, LABELS, unit), "feats"),  # noqa: B023
            (lambda: package.score_pairs(x, I, I, unit), "feats"),  # noqa: B023
            (lambda: package.score_matrix(x, unit), "x"),  # noqa: B023
            (lambda: package.score_matrix(X, unit, x), "y"),  # noqa: B023
            (lambda: package.topk(x, X, 2, unit), "queries"),  # noqa: B023
            (lambda: package.topk(X, x, 2, unit), "gallery"),  # noqa: B023
        ):
            with complaint(TypeError, f"{name} {refused}"):
                call()
    quads = unit.mine(X, LABELS)
    for call, name in (
        (lambda: unit(x, X), "x"),
        (lambda: pddm_ext.QuadrupletLoss()(x, quads), "feats"),
        (lambda: pddm_ext.DensityRegularizer()(x, LABELS), "feats"),
        (lambda: pddm_ext.StructureHead(4).to(DEVICE)(x), "x"),
        (lambda: pddm_ext.MultiClusterRankingLoss()(x, X.abs()), "embeddings"),
        (lambda: pddm_ext.concatenated_gallery(x), "gallery"),
    ):
        with complaint(TypeError, f"{name} {refused}"):
            call()


def test_labels_that_are_not_dense_are_refused():
    with complaint(TypeError, r"labels has layout torch.sparse_coo; a dense tensor \(torch.strided\) is accepted"):
        make_unit(4).mine(X, LABELS.to_sparse())


class Cosine(pddm_ext.PDDM):
    def forward(self, x, y):
        return torch.cosine_similarity(x, y, dim=-1)


class PlainCosine(reference.PDDM):
    forward = Cosine.forward


class Named(pddm_ext.PDDM):
    """Without a formula of its own."""


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("kind", [Cosine, PlainCosine, type("Further", (Cosine,), {})])
def test_a_formula_of_a_subclass_is_refused_where_it_would_not_be_asked(package, kind):
    unit = kind(4).to(DEVICE)
    for call in (
        lambda: package.mine_and_score(X, LABELS, unit),
        lambda: unit.mine(X, LABELS),
        lambda: package.score_pairs(X, I, I, unit),
        lambda: package.score_matrix(X, unit),
        lambda: package.topk(X, X, 2, unit),
    ):
        with complaint(TypeError, f"unit is a {kind.__name__}, whose forward is its own; mining, matrices"):
            call()
    assert unit(X, X).shape == (8,)
    assert Named(4).to(DEVICE).mine(X, LABELS).valid.all()


def test_a_formula_given_to_one_unit_is_refused_and_a_wrapper_of_its_own_is_not():
    unit = make_unit(4)
    unit.forward = lambda x, y: torch.cosine_similarity(x, y, dim=-1)
    for call in (lambda: unit.mine(X, LABELS), lambda: pddm_ext.score_matrix(X, unit)):
        with complaint(TypeError, "unit is a PDDM, whose forward is its own; mining, matrices"):
            call()
    unit.forward = torch.autocast(DEVICE.type, enabled=False)(pddm_ext.PDDM.forward.__get__(unit))
    assert unit.mine(X, LABELS).valid.all()


@pytest.mark.parametrize("mode", ["batch", "anchor", "pair"])
@pytest.mark.parametrize("package", PACKAGES)
def test_the_loss_refuses_features_that_its_quadruplets_were_not_mined_from(package, mode):
    quads, loss = package.mine_and_score(X, LABELS, make_unit(4), mode=mode), pddm_ext.QuadrupletLoss()
    for other in (X[:4], X[:7], make_features(20, 4), X[:0]):
        for call in (loss, loss.embedding):
            with complaint(ValueError, f"feats has {len(other)} rows; quads were mined from 8"):
                call(other, quads)
    copied = quads._replace(i=quads.i.clone())  # of which only the row numbers tell
    if not ON_CUDA:
        most = int(max(rows.max() for rows in quads[:4])) + 1
        with complaint(ValueError, f"feats has 1 rows; quads were mined from {most} or more"):
            loss(X[:1], copied)
    torch.testing.assert_close(loss(X, copied), loss(X, quads))


@pytest.mark.parametrize("mode", ["batch", "anchor", "pair"])
def test_the_loss_takes_row_numbers_of_a_larger_batch(mode):
    quads, loss = make_unit(4).mine(X[2:], LABELS[2:], mode=mode), pddm_ext.QuadrupletLoss()
    shifted = quads._replace(**{name: getattr(quads, name) + 2 * quads.valid for name in "ijkl"})
    torch.testing.assert_close(loss(X, shifted), loss(X[2:], quads))


def test_the_loss_refuses_quadruplets_that_are_elsewhere():
    quads = pddm_ext.Quadruplets(*(field.to("meta") for field in make_unit(4).mine(X, LABELS)))
    with complaint(RuntimeError, DEVICES):
        pddm_ext.QuadrupletLoss()(X, quads)


def test_the_loss_refuses_features_that_are_no_matrix():
    quads = make_unit(4).mine(X, LABELS)
    with complaint(ValueError, r"feats has shape \(4,\); \(rows, dim\) is accepted"):
        pddm_ext.QuadrupletLoss()(X[0], quads)


@ROWS_ARE_CHECKED
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_refuses_quadruplets_of_negative_rows_and_of_several_lengths(package, reduction):
    mined = make_unit(4).mine(X, LABELS, mode="anchor")
    assert mined.valid.all()
    loss_fn = package.QuadrupletLoss(reduction=reduction)
    made = mined._replace(i=mined.i.clone())  # by hand: of nobody knows how many rows
    with complaint(ValueError, r"quads has row -5 of feats in a valid slot; from 0 is accepted"):
        loss_fn(X, made._replace(k=torch.where(mined.i == 3, -5, mined.k)))
    with complaint(ValueError, r"quads.l has shape \(7,\) and quads.valid \(8,\); \(Q,\) of all is accepted"):
        loss_fn(X, made._replace(l=mined.l[1:]))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_loss_takes_numbers_that_tensors_can_be_multiplied_with(package):
    for value, error, words in (
        (Fraction(1, 2), TypeError, "alpha is a Fraction; a finite number from 0 is accepted"),
        (10**400, ValueError, "alpha is an int of 1329 bits; a finite number from 0 is accepted"),
    ):
        with pytest.raises(error, match=words):
            package.QuadrupletLoss(alpha=value)


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


OPERATORS = [
    *("mine", "score_pairs", "score_matrix", "topk", "quadruplet_loss"),
    *("mine_backward", "score_pairs_backward", "score_matrix_backward", "quadruplet_loss_backward"),
    "mine_listed",
]


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
        ("mine_backward", (X[0, :3], None, None, X, I, I, I, I), ()),
        ("mine_backward", (None, X[:, 0], None, X, I, I, I[:3], I), ()),
        pytest.param("mine_backward", (None, None, X[:, 0], X, I, I, I, I + 1), (), marks=ROWS_ARE_CHECKED),
        ("score_matrix_backward", (X[0, :3], X, -1), ()),
        ("score_matrix_backward", (X[:4].reshape(16), X, 9), ()),
    ],
)
def test_a_direct_call_of_an_operator_cannot_reach_foreign_memory(operator, arguments, tail):
    # What Python's checks would have caught; the operators are public too.
    with torch.no_grad(), pytest.raises(RuntimeError, match="pddm: "):
        getattr(torch.ops.pddm, operator)(*arguments, *ops.unit_arguments(make_unit(4)), *tail)


@pytest.mark.skipif(_C.build_info()["cuda"] not in (None, "emulated"), reason="this build has CUDA")
@pytest.mark.parametrize("operator", OPERATORS)
def test_cuda_tensors_are_told_that_this_build_has_no_cuda(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pddm::{operator}", "CUDA")
    with complaint(RuntimeError, r"built without CUDA.*PDDM_CUDA=on pip install"):
        ops._refuse_cuda()
