"""The quadruplet loss: its formula, its reductions, its regularizer, and what it refuses."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist

import pddm_ext
from helpers import (
    DEVICE,
    MODES,
    assert_same_bits,
    host_only,
    make_features,
    make_labels,
    make_unit,
    threads,
)
from pddm_ext import reference


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


def leaves(feats, quads):
    """Copies that ask for gradients of their own."""
    scores = {name: getattr(quads, name).detach().clone().requires_grad_() for name in ("s_ij", "s_ik", "s_jl")}
    return feats.detach().clone().requires_grad_(), quads._replace(**scores)


def derived(loss, feats, quads, dtype):
    """The loss, and three times its gradients, in a dtype: of features, s_ij, s_ik and s_jl."""
    feats, quads = leaves(feats.to(dtype), quads)
    if dtype == torch.float64:
        quads = quads._replace(**{name: getattr(quads, name).double() for name in ("s_ij", "s_ik", "s_jl")})
    value = loss(feats, quads)
    return value, *torch.autograd.grad(3 * value, [feats, quads.s_ij, quads.s_ik, quads.s_jl])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(12, 1), (30, 6), (200, 67)])
def test_the_value_and_the_gradients_are_those_of_the_plain_loss_in_double(n, d, dtype, mode):
    feats, labels = make_features(n, d, dtype=dtype), make_labels(n, per_class=3)
    feats[4] = torch.nan
    quads = make_unit(d).mine(feats, labels, mode=mode)
    quads = pddm_ext.Quadruplets(*(field.detach() for field in quads))
    # What cancels is of the order of 1 over a row's norm.
    least = feats.double().norm(dim=1).nan_to_num(1).amin().item()
    rtol, eps = {torch.float64: (1e-12, 2e-15), torch.float32: (1e-4, 1e-6), torch.bfloat16: (1e-2, 1e-4)}[dtype]
    for arguments in ({}, {"alpha": 0.0, "beta": 0.01, "weight": 2.0}, {"alpha": 3, "weight": 0}):
        found = derived(pddm_ext.QuadrupletLoss(**arguments), feats, quads, dtype)
        wanted = derived(reference.QuadrupletLoss(**arguments), feats, quads, torch.float64)
        for a, b in zip(found, wanted, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a.double(), b, rtol=rtol, atol=eps * max(1, 1 / least))


@pytest.mark.parametrize("count", [1, 2])
def test_the_bits_do_not_depend_on_the_number_of_threads(count):
    feats, labels = make_features(300, 90), make_labels(300, per_class=6)
    quads = pddm_ext.Quadruplets(*(field.detach() for field in make_unit(90).mine(feats, labels, mode="pair")))
    with threads(1):
        alone = derived(pddm_ext.QuadrupletLoss(), feats, quads, torch.float32)
    with threads(count):
        assert_same_bits(derived(pddm_ext.QuadrupletLoss(), feats, quads, torch.float32), alone)


def test_where_a_score_or_a_row_is_not_a_number_neither_is_the_loss():
    feats, labels = make_features(12, 6), make_labels(12)
    quads = make_unit(6).mine(feats, labels, mode="anchor")
    for loss in (pddm_ext.QuadrupletLoss(), reference.QuadrupletLoss()):
        assert loss(feats, quads._replace(s_ik=quads.s_ik * torch.nan)).isnan()
        assert loss(feats * torch.nan, quads).isnan()


@pytest.mark.parametrize("upstream", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("rows", [[[1, math.nan], [1, 0], [-1, 0], [1, 0.1]], [[1, 0], [1, 0], [-1, 0], [1, 0.1]]])
def test_what_is_no_number_spreads_as_in_the_plain_loss(rows, upstream):
    """To named rows alone, and not through hinges that are shut: of the second rows only l's is open."""
    one = partial(torch.tensor, device=DEVICE)
    quads = pddm_ext.Quadruplets(
        *(one([at, -1]) for at in range(4)), *(one([s, 0.0]) for s in (0.1, 0.2, 0.3)), valid=one([True, False])
    )
    feats = torch.cat([one(rows), one([[3.0, 4.0]])])  # the last one is nobody's
    found, wanted = [], []
    for loss, gradients in ((pddm_ext.QuadrupletLoss(), found), (reference.QuadrupletLoss(), wanted)):
        x, q = leaves(feats, quads)
        gradients += torch.autograd.grad(loss(x, q), [x, q.s_ij, q.s_ik, q.s_jl], one(upstream))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert found[0][4].tolist() == [0, 0]


def test_at_zero_a_row_has_the_gradient_that_normalising_has():
    feats, quads = make_features(6, 3, dtype=torch.float64), make_unit(3).double()
    feats[0] = 0
    feats[1] *= 1e-13  # below the least norm
    quads = quads.mine(feats, torch.tensor([0, 0, 1, 1, 2, 2], device=DEVICE), mode="anchor")
    found, wanted = (
        derived(loss(alpha=9, beta=9), feats, quads, torch.float64)
        for loss in (pddm_ext.QuadrupletLoss, reference.QuadrupletLoss)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_the_same_where_it_is_to_be_differentiated_in_turn(mode):
    """Also through scores that were mined from the same features."""
    x, labels = make_features(12, 5, dtype=torch.float64).requires_grad_(), make_labels(12)
    unit = reference.PDDM(5).double().to(DEVICE)
    gradients = [
        torch.autograd.grad(loss(x, unit.mine(x, labels, mode=mode)), [x, *unit.parameters()], create_graph=graph)
        for loss in (pddm_ext.QuadrupletLoss(), reference.QuadrupletLoss())
        for graph in (False, True)
    ]
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0])


def test_other_fields_than_mining_makes_are_computed_plainly():
    feats, labels = make_features(12, 6), make_labels(12)
    quads = make_unit(6).mine(feats, labels, mode="anchor")
    for changed in (
        {"s_ik": quads.s_ik.double()},
        {name: getattr(quads, name).int() for name in "ijkl"},
        {"s_ij": quads.s_ij[:1]},
    ):
        given = quads._replace(**changed)
        found, wanted = pddm_ext.QuadrupletLoss()(feats, given), reference.QuadrupletLoss()(feats, given)
        assert_same_bits(found, wanted)
    with pytest.raises((RuntimeError, NotImplementedError)):
        pddm_ext.QuadrupletLoss()(feats, quads._replace(valid=quads.valid.to("meta")))


def test_a_margin_that_learns_has_its_gradient():
    feats, labels = make_features(12, 6), make_labels(12)
    quads = make_unit(6).mine(feats, labels, mode="anchor")
    loss = pddm_ext.QuadrupletLoss()
    loss.alpha = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    loss(feats, quads).backward()
    assert loss.alpha.grad > 0


@host_only("the tracer runs what it has traced once more")
def test_a_step_can_be_traced():
    feats, labels = make_features(12, 6), make_labels(12)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = make_unit(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return pddm_ext.QuadrupletLoss()(x, self.unit.mine(x, labels, mode="anchor"))

    step = Step()
    traced = torch.jit.trace(step, (feats,))
    torch.testing.assert_close(traced(2 * feats + 1), step(2 * feats + 1))


@pytest.mark.parametrize("referred", [False, True])
def test_second_derivatives_are_those_of_the_plain_loss(referred):
    feats, labels = make_features(12, 4, dtype=torch.float64), make_labels(12)
    among = {"ref_feats": make_features(9, 4, seed=1, dtype=torch.float64)} if referred else {}
    ref_labels = {"ref_labels": make_labels(9)} if referred else {}
    quads = make_unit(4).double().mine(feats, labels, mode="anchor", **among, **ref_labels)
    seconds = []
    for loss in (pddm_ext.QuadrupletLoss(), reference.QuadrupletLoss()):
        x, q = leaves(feats, quads)
        (first,) = torch.autograd.grad(loss(x, q, **among), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
        assert seconds[-1].abs().max() > 0
    torch.testing.assert_close(*seconds)


@host_only("a group of the host's tensors")
def test_a_groups_share_has_the_scores_dtype_whatever_the_default():
    """float16, which has not so many quadruplets."""
    feats, many = make_features(12, 4), torch.arange(70_000)
    i, j, k, l = (many % 12, (many + 1) % 12, (many + 2) % 12, (many + 3) % 12)  # noqa: E741
    scores = make_features(3, len(many)).unbind()
    quads = pddm_ext.Quadruplets(i, j, k, l, *scores, torch.ones_like(many, dtype=torch.bool))
    expected = pddm_ext.QuadrupletLoss()(feats, quads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.set_default_dtype(torch.float16)
        together = pddm_ext.QuadrupletLoss(group=dist.group.WORLD)(feats, quads)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # which joins no shards of another half precision
            half = pddm_ext.QuadrupletLoss(group=dist.group.WORLD)(feats.half(), quads)
    finally:
        torch.set_default_dtype(torch.float32)
        dist.destroy_process_group()
    assert_same_bits(together, expected)
    torch.testing.assert_close(half, expected, rtol=1e-2, atol=1e-2)


@host_only("others are checked by the kernels")
def test_the_operator_checks_what_would_be_read_out_of_bounds():
    feats, labels = make_features(12, 6), make_labels(12)
    i, j, k, l, *scores, valid = make_unit(6).mine(feats, labels, mode="anchor")  # noqa: E741
    call = torch.ops.pddm.quadruplet_loss
    for wrong in (12, -1):
        with pytest.raises(RuntimeError, match=f"quadruplet 3 has row {wrong}, out of range for 12 rows"):
            call(feats, *scores, i, j, k.clone().index_fill_(0, torch.tensor(3), wrong), l, valid, 0.5, 1.0, 0.5)
    with pytest.raises(RuntimeError, match="must be of one length"):
        call(feats, *scores, i[:5], j, k, l, valid, 0.5, 1.0, 0.5)
    # What is not valid is not looked at, whatever its hinges.
    nowhere, no_slot, every = torch.full_like(i, 10**8), torch.zeros_like(valid), torch.full((12,), 15).byte()
    gradients = torch.ops.pddm.quadruplet_loss_backward(
        torch.ones(()), every, feats, *scores, *[nowhere] * 4, no_slot, 0.5
    )
    assert not any(gradient.any() for gradient in gradients)


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
