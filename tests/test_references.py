"""References: what is mined among them, what it costs and keeps, gradients on both sides, and the loss that follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pddm_ext
from helpers import (
    ANY_CALL,
    DEVICE,
    FLOATS,
    MODES,
    ON_CUDA,
    ON_GPU_KERNELS,
    PACKAGES,
    Batch,
    Largest,
    assert_same_bits,
    batches,
    counters,
    cpu_only,
    host_only,
    instruction_set,
    make_features,
    make_labels,
    make_unit,
    reset_counters,
)
from pddm_ext import reference, references

N, M, DIM = 20, 50, 7


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    pddm_ext.set_health_checks("warn")
    yield
    pddm_ext.set_health_checks("warn")


def batch_and_references(n: int = N, m: int = M, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict]:
    """A batch, and references of which the last are the batch's own rows, by their numbers."""
    feats, labels = make_features(n + m, DIM, dtype=dtype), make_labels(n + m, per_class=6)
    here = slice(m, m + n)
    ids = torch.arange(n + m, device=DEVICE) * 3 - 40
    every = {"ref_feats": feats, "ref_labels": labels, "ref_ids": ids.int(), "ids": ids[here]}
    return feats[here].clone(), labels[here], every


def pairs_scored(call) -> int:
    reset_counters()
    call()
    return counters()["pairs_scored"]


def plain_of(unit: pddm_ext.PDDM) -> reference.PDDM:
    plain = reference.PDDM(unit.dim, unit.hidden, unit.combined, normalize_input=unit.normalize_input).to(DEVICE)
    plain = plain.to(unit.u.weight.dtype)
    plain.load_state_dict(unit.state_dict())
    return plain


@cpu_only(ANY_CALL)
@given(
    batches(dtypes=(torch.float32, torch.float64, torch.bfloat16), most=40),
    st.integers(0, 40),
    st.sampled_from([None, 1, 3, 50]),
    st.sampled_from([None, 0, -1, -5]),
)
def test_what_is_mined_is_the_best_by_the_units_score(batch: Batch, cut: int, numbers: int | None, ignored: int | None):
    feats, labels, unit = batch.feats, batch.labels, batch.unit
    rows, others = slice(0, cut), slice(cut // 2, None)  # they share some
    ids = None if numbers is None else torch.arange(len(feats)) % numbers
    given_ids = {} if ids is None else {"ids": ids[rows], "ref_ids": ids[others]}
    with instruction_set(batch.capability), torch.no_grad():
        scores = pddm_ext.score_matrix(feats[rows], unit, feats[others])
        between = pddm_ext.score_matrix(feats[others], unit)
        sides = labels[rows], labels[others]
        pairs = reference._pairs_between(*sides, given_ids.get("ids"), given_ids.get("ref_ids"), ignored)
        apart = reference._pairs_between(sides[1], sides[1], *(given_ids.get("ref_ids"),) * 2, ignored)[1]
        for mode in MODES:
            given_refs = {"ref_feats": feats[others], "ref_labels": labels[others], **given_ids}
            got = unit.mine(feats[rows], labels[rows], mode=mode, ignore_label=ignored, **given_refs)
            assert_same_bits(got, reference._select_among(scores, between, *pairs, apart, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS if ON_GPU_KERNELS else FLOATS[:3])
def test_it_is_what_the_reference_mines(dtype, mode):
    feats, labels, among = batch_and_references(dtype=dtype)
    unit = make_unit(DIM, 13, 9)
    got = unit.mine(feats, labels, mode=mode, **among)
    expected = plain_of(unit).mine(feats, labels, mode=mode, **among)
    assert got.valid.shape == expected.valid.shape
    assert bool(got.valid.any())
    if dtype in (torch.float32, torch.float64):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    else:  # where rounding may decide who is best
        for name in ("s_ij", "s_ik", "s_jl"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("package"), PACKAGES)
def test_a_batch_that_is_its_own_references_is_mined_as_ever(package):
    feats, labels = make_features(40, DIM), make_labels(40)
    unit, ids = package.PDDM(DIM).to(DEVICE), torch.arange(40, device=DEVICE)
    itself = {"ref_feats": feats, "ref_labels": labels, "ids": ids, "ref_ids": ids}
    for mode in ("batch", "anchor"):
        got, expected = unit.mine(feats, labels, mode=mode, **itself), unit.mine(feats, labels, mode=mode)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    both = unit.mine(feats, labels, mode="pair", **itself)
    once = unit.mine(feats, labels, mode="pair")
    assert len(both.i) == 2 * len(once.i)
    for name in once._fields:
        torch.testing.assert_close(getattr(both, name)[both.i < both.j], getattr(once, name))


@pytest.mark.parametrize("package", PACKAGES)
def test_without_numbers_nothing_is_left_out_and_with_them_no_sample_meets_itself(package):
    feats, labels = torch.eye(6, device=DEVICE), torch.tensor([0, 0, 0, 1, 1, 1], device=DEVICE)
    unit, ids = package.PDDM(6).to(DEVICE), torch.arange(6, device=DEVICE).to(torch.uint8)
    free = unit.mine(feats, labels, mode="pair", ref_feats=feats, ref_labels=labels)
    assert int((free.i == free.j).sum()) == 6
    assert len(free.i) == 18
    numbered = unit.mine(feats, labels, mode="pair", ref_feats=feats, ref_labels=labels, ids=ids, ref_ids=ids)
    assert int((numbered.i == numbered.j).sum()) == 0
    # An old copy of a row stands elsewhere, and is the same sample.
    old = unit.mine(
        feats, labels, mode="pair", ref_feats=feats.flip(0), ref_labels=labels.flip(0), ids=ids, ref_ids=ids.flip(0)
    )
    assert int((old.i == 5 - old.j).sum()) == 0
    assert len(old.i) == 12
    # Samples of several classes, by mistake of theirs, are nobody's negatives either.
    mixed = unit.mine(feats, labels, mode="anchor", ref_feats=feats, ref_labels=labels, ids=ids % 3, ref_ids=ids % 3)
    assert not bool((mixed.i % 3 == mixed.k % 3).any())
    assert not bool((mixed.j % 3 == mixed.l % 3).any())


@pytest.mark.parametrize("mode", MODES)
def test_of_equal_scores_the_lowest_rows_are_taken(mode):
    feats, labels = torch.ones(4, 3, device=DEVICE), torch.tensor([1, 0, 1, 2], device=DEVICE)
    among = torch.ones(5, 3, device=DEVICE), torch.tensor([2, 1, 0, 1, 0], device=DEVICE)
    for scorer in (make_unit(3), plain_of(make_unit(3))):
        quads = scorer.mine(feats, labels, mode=mode, ref_feats=among[0], ref_labels=among[1])
        expected = {
            "batch": [[0], [1], [0], [0]],
            "anchor": [[0, 1, 2, 3], [1, 2, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]],
            "pair": [[0, 0, 1, 1, 2, 2, 3], [1, 3, 2, 4, 1, 3, 0], [0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1]],
        }[mode]
        assert [field.tolist() for field in quads[:4]] == expected


def expected_cost(quads: pddm_ext.Quadruplets, mode: str, positives: int) -> int:
    if mode == "batch":
        return positives + 2 * (N + M)
    return N * (N + M) + len(torch.unique(quads.j[quads.valid])) * (N + M)


@pytest.mark.parametrize("mode", MODES)
def test_it_scores_what_the_mode_asks_for(mode):
    feats, labels, among = batch_and_references()
    unit = make_unit(DIM)
    positives = int(
        reference._pairs_between(labels, among["ref_labels"], among["ids"], among["ref_ids"], None)[0].sum()
    )
    quads = unit.mine(feats, labels, mode=mode, **among)
    scored = pairs_scored(lambda: unit.mine(feats, labels, mode=mode, **among))
    assert scored == expected_cost(quads, mode, positives)


@pytest.mark.parametrize("mode", MODES)
def test_tiles_change_nothing_and_nothing_of_the_size_of_the_matrix_is_kept(mode, monkeypatch):
    feats, labels, among = batch_and_references(30, 100)
    unit = make_unit(DIM)
    whole = unit.mine(feats, labels, mode=mode, **among)
    scored = pairs_scored(lambda: unit.mine(feats, labels, mode=mode, **among))
    monkeypatch.setattr(references, "_SIDE", 16)
    monkeypatch.setattr(references, "_AT_ONCE", 20)
    with Largest() as largest:
        parts = unit.mine(feats, labels, mode=mode, **among)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
    assert scored == pairs_scored(lambda: unit.mine(feats, labels, mode=mode, **among))
    assert largest.elements <= 1000  # rows of a list of pairs; a tile has 256 scores, the matrix 3,900


@cpu_only("scratch of the GPU's kernels is another")
def test_scratch_does_not_grow_with_the_references():
    unit, peaks = make_unit(DIM), []
    for m in (5000, 9000):
        feats, labels, among = batch_and_references(30, m)
        reset_counters()
        unit.mine(feats, labels, mode="anchor", **among)
        peaks.append(counters()["bytes_peak"])
    assert peaks[0] == peaks[1] > 0


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_both_sides_and_the_unit(mode):
    feats, labels, among = batch_and_references(dtype=torch.float64)
    unit = make_unit(DIM, 13, 9).double()
    among["ref_feats"] = among["ref_feats"].clone().requires_grad_()
    feats.requires_grad_()
    gradients = []
    for scorer, loss_fn in ((unit, pddm_ext.QuadrupletLoss()), (plain_of(unit), reference.QuadrupletLoss())):
        quads = scorer.mine(feats, labels, mode=mode, **among)
        loss = loss_fn(feats, quads, ref_feats=among["ref_feats"]) + (quads.s_ij * 2 - quads.s_ik).sum() / 7
        gradients.append((loss.detach(), *torch.autograd.grad(loss, [feats, among["ref_feats"], *scorer.parameters()])))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert float(gradients[0][2].abs().sum()) > 0


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    feats, labels, among = batch_and_references(4, 5, dtype=torch.float64)
    unit = make_unit(DIM, 3, 2).double()
    others = among.pop("ref_feats").clone()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        quads = unit.mine(x, labels, mode=mode, ref_feats=y, **among)
        return pddm_ext.QuadrupletLoss()(x, quads, ref_feats=y) + quads.s_jl.sum()

    assert torch.autograd.gradcheck(loss, (feats.requires_grad_(), others.requires_grad_()), fast_mode=True)


def test_references_that_ask_for_no_gradient_cost_none():
    feats, labels, among = batch_and_references()
    unit = make_unit(DIM)
    feats.requires_grad_()
    quads = unit.mine(feats, labels, mode="anchor", **among)
    with Largest() as largest:
        quads.s_ij.sum().backward()
    assert largest.elements <= 4 * (N + 3 * N) * max(DIM, 32)
    assert among["ref_feats"].grad is None
    assert bool(feats.grad.any())


def test_under_the_transforms_of_torch_func():
    feats, labels, among = batch_and_references()
    unit = make_unit(DIM)

    def loss(x: Tensor) -> Tensor:
        return unit.mine(x, labels, mode="anchor", **among).s_ij.sum()

    x = feats.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(feats), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("mode", MODES)
def test_references_of_any_dtype_are_mined_among(mode):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        feats, labels, among = batch_and_references(dtype=dtype)
        unit = make_unit(DIM)
        for other in FLOATS[:3]:
            given = {**among, "ref_feats": among["ref_feats"].to(other)}
            quads = unit.mine(feats.requires_grad_(), labels, mode=mode, **given)
            assert quads.s_jl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            pddm_ext.QuadrupletLoss()(feats, quads, ref_feats=given["ref_feats"]).backward()


def test_references_are_rounded_to_the_batchs_dtype():
    feats, labels, among = batch_and_references()
    unit = make_unit(DIM)
    halved = {**among, "ref_feats": among["ref_feats"].half()}
    widened = {**among, "ref_feats": among["ref_feats"].half().float()}
    for a, b in zip(unit.mine(feats, labels, **halved), unit.mine(feats, labels, **widened), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = unit.mine(feats, labels, mode="anchor", **among)
    low = {**among, "ref_feats": among["ref_feats"].bfloat16()}
    for a, b in zip(got, unit.mine(feats.bfloat16(), labels, mode="anchor", **low), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["batch", "anchor"])
def test_it_compiles_into_one_graph_for_any_number_of_rows(mode):
    feats, labels, among = batch_and_references()
    unit, loss_fn = make_unit(DIM), pddm_ext.QuadrupletLoss()
    torch._dynamo.reset()

    def step(x: Tensor, y: Tensor, among: dict[str, Tensor]) -> Tensor:
        return loss_fn(x, unit.mine(x, y, mode=mode, **among), ref_feats=among["ref_feats"])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (N, 9, 14):
        some = {**among, "ids": among["ids"][:n]}
        x = feats[:n].clone().requires_grad_()
        torch.testing.assert_close(compiled(x, labels[:n], some), step(x, labels[:n], some))
        compiled(x, labels[:n], some).backward()
        expected = torch.autograd.grad(step(x, labels[:n], some), x)[0]
        torch.testing.assert_close(x.grad, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("package", PACKAGES)
def test_rows_of_no_class_are_in_no_pair_on_either_side(package):
    feats, labels, among = batch_and_references()
    unit = package.PDDM(DIM).to(DEVICE)
    known, ref_known = (torch.arange(count, device=DEVICE) % 5 != 0 for count in (N, N + M))
    marked = {**among, "ref_labels": torch.where(ref_known, among["ref_labels"], -1)}
    for mode in MODES:
        got = unit.mine(feats, torch.where(known, labels, -1), mode=mode, ignore_label=-1, **marked)
        kept = {name: x[ref_known] if name.startswith("ref_") else x[known] for name, x in among.items()}
        alone = unit.mine(feats[known], labels[known], mode=mode, **kept)
        if mode == "anchor":
            assert not got.valid[~known].any()
            got = package.Quadruplets(*(field[known] for field in got))
        rows, others = known.nonzero().flatten(), ref_known.nonzero().flatten()
        expected = [
            torch.where(alone.valid, of[x], -1) for of, x in zip((rows, *(others,) * 3), alone[:4], strict=True)
        ]
        for a, b in zip(got, (*expected, *alone[4:]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("mode", MODES)
def test_without_rows_or_references_nothing_is_valid_and_the_loss_is_zero(package, mode):
    feats, labels, among = batch_and_references()
    unit, loss_fn = package.PDDM(DIM).to(DEVICE), package.QuadrupletLoss()
    none = {name: x[:0] for name, x in among.items()}
    pddm_ext.set_health_checks("ignore")
    for x, y, some in (
        (feats, labels, {**none, "ids": among["ids"]}),
        (feats[:0], labels[:0], {**among, "ids": among["ids"][:0]}),
        (feats, labels - 1000, among),
    ):
        x = x.clone().requires_grad_()
        quads = unit.mine(x, y, mode=mode, **some)
        assert not quads.valid.any()
        loss = loss_fn(x, quads, ref_feats=some["ref_feats"])
        loss.backward()
        assert float(loss.detach()) == 0
        assert not x.grad.any()
        if package is pddm_ext:  # as of any batch from which nothing is learned
            assert all(p.grad is not None and not p.grad.any() for p in unit.parameters())


@host_only("a GPU's batches are looked at later: see test_health")
def test_a_batch_that_finds_none_is_told_of_its_references():
    feats, labels, among = batch_and_references()
    pddm_ext.set_health_checks("raise")
    with pytest.raises(pddm_ext.HealthError, match="no quadruplet of 20 rows and 70 references"):
        make_unit(DIM).mine(feats, labels - 1000, **among)
    among["ref_feats"][3] = torch.nan
    with pytest.raises(pddm_ext.HealthError, match="1 of 70 rows of ref_feats are not finite, the first is row 3"):
        make_unit(DIM).mine(feats, labels - 1000, **among)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ref_labels": None}, ValueError, "ref_labels is missing; ref_feats has 70 rows"),
    ({"ref_feats": None}, ValueError, "ref_labels is given and ref_feats is not"),
    ({"ref_feats": None, "ref_labels": None}, ValueError, "ids is given and ref_feats is not"),
    ({"ref_feats": None, "ref_labels": None, "ids": None}, ValueError, "ref_ids is given and ref_feats is not"),
    ({"ids": None}, ValueError, "ids is missing beside ref_ids"),
    ({"ref_ids": None}, ValueError, "ref_ids is missing beside ids"),
    ({"ref_feats": torch.ones(70, 6)}, ValueError, r"ref_feats has shape \(70, 6\); feats has dimension 7"),
    ({"ref_feats": torch.ones(70)}, ValueError, r"ref_feats has shape \(70,\)"),
    ({"ref_feats": torch.ones(70, 7).int()}, TypeError, "ref_feats has dtype torch.int32"),
    ({"ref_feats": [1.0]}, TypeError, "ref_feats is a list"),
    ({"ref_labels": torch.ones(69).int()}, ValueError, "ref_labels has length 69; ref_feats has 70"),
    ({"ref_labels": torch.ones(70)}, TypeError, "ref_labels has dtype torch.float32"),
    ({"ids": torch.arange(19)}, ValueError, "ids has length 19; feats has 20"),
    ({"ref_ids": torch.arange(71)}, ValueError, "ref_ids has length 71; ref_feats has 70"),
    ({"ids": torch.ones(20)}, TypeError, "ids has dtype torch.float32"),
    ({"candidates": 3}, ValueError, "candidates is 3, for pairs of the batch; beside ref_feats None is accepted"),
]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("changed", "error", "message"), WRONG)
def test_what_are_no_references_is_refused(package, changed, error, message):
    feats, labels, among = batch_and_references()
    unit = package.PDDM(DIM).to(DEVICE)
    changed = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in changed.items()}
    for call in (
        lambda: package.mine_and_score(feats, labels, unit, **{**among, **changed}),
        lambda: package.mine_and_score(feats, labels, **{**among, **changed}),
        lambda: unit.mine(feats, labels, **{**among, **changed}),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_loss_of_other_references_is_refused(package):
    feats, labels, among = batch_and_references()
    unit, loss_fn = package.PDDM(DIM).to(DEVICE), package.QuadrupletLoss()
    mined, alone = unit.mine(feats, labels, mode="anchor", **among), unit.mine(feats, labels, mode="anchor")
    others = among["ref_feats"]
    for call in (loss_fn, loss_fn.embedding):
        with pytest.raises(ValueError, match="ref_feats is missing; quads were mined among 70 references"):
            call(feats, mined)
        with pytest.raises(ValueError, match="ref_feats has 69 rows; quads were mined among 70 references"):
            call(feats, mined, ref_feats=others[:69])
        with pytest.raises(ValueError, match="ref_feats has 70 rows; quads were mined among no references"):
            call(feats, alone, ref_feats=others)
        with pytest.raises(ValueError, match=r"ref_feats has shape \(70, 3\); feats has dimension 7"):
            call(feats, mined, ref_feats=others[:, :3])
        copied = package.Quadruplets(*(field.clone() for field in mined))  # whose numbers are not known
        torch.testing.assert_close(call(feats, copied, ref_feats=others), call(feats, mined, ref_feats=others))
        if not ON_CUDA:  # where nothing waits to find out
            with pytest.raises(ValueError, match="ref_feats has 1 rows; quads were mined from"):
                call(feats, copied, ref_feats=others[:1])


def test_the_shapes_of_a_meta_device_are_those_of_others():
    unit = pddm_ext.PDDM(5).to("meta")
    feats = torch.empty(12, 5, device="meta", requires_grad=True)
    labels = torch.empty(12, dtype=torch.int64, device="meta")
    for mode in ("batch", "anchor"):
        quads = unit.mine(feats, labels, mode=mode, ref_feats=feats[:7], ref_labels=labels[:7])
        assert quads.s_ij.shape == ((12,) if mode == "anchor" else (1,))
        assert quads.s_ij.requires_grad


def test_a_regularizer_sees_the_batch_alone():
    feats, labels, among = batch_and_references()
    seen = []
    loss_fn = pddm_ext.QuadrupletLoss(regularizer=lambda x, y: seen.append((x, y)) or x.sum() * 0)
    quads = make_unit(DIM).mine(feats, labels, **among)
    loss_fn(feats, quads, labels, ref_feats=among["ref_feats"])
    assert seen[0][0] is feats
    assert seen[0][1] is labels
