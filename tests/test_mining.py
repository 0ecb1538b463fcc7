"""The quadruplets are those of `reference`: by index where rounding leaves no doubt, by score otherwise, and exactly so
on the kernels' own scores."""

import pytest
import torch
from hypothesis import given, settings

import pddm_ext
from helpers import (
    ANY_CALL,
    CAPABILITIES,
    DEVICE,
    FLOATS,
    MODES,
    ON_GPU_KERNELS,
    Batch,
    assert_same_bits,
    batches,
    cpu_only,
    instruction_set,
    make_features,
    make_labels,
    make_unit,
)
from pddm_ext import reference
from pddm_ext.reference import select_quadruplets
from truth import assert_lowest, assert_mined, assert_selected, operand_rounding

LABEL_DTYPES = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def slots(labels: torch.Tensor, mode: str) -> int:
    counts = labels.unique(return_counts=True)[1]
    return {"batch": 1, "anchor": len(labels), "pair": int((counts * (counts - 1) // 2).sum())}[mode]


def assert_nothing(quads: pddm_ext.Quadruplets, count: int) -> None:
    for field in quads:
        assert field.shape == (count,)
    assert all((index == -1).all() for index in quads[:4])
    assert all((score == 0).all() for score in quads[4:7])
    assert not quads.valid.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("dtype", FLOATS if ON_GPU_KERNELS else FLOATS[:3])
@pytest.mark.parametrize("size", [(12, 1, 1, 1), (33, 17, 13, 25), (100, 20, 24, 7)], ids=str)
def test_mining_finds_the_reference_quadruplets(capability, size, dtype, normalize_input, mode):
    n, d, h, m = size
    unit = make_unit(d, h, m, normalize_input=normalize_input)
    x, labels = make_features(n, d, dtype=dtype), make_labels(n)
    sure = assert_mined(unit.mine(x, labels, mode=mode), x, labels, unit, mode)
    # Features of one number have two unit values only, so that nearly everything ties. Otherwise few margins are so
    # small that this would compare nothing.
    assert sure > 0.8 or d == 1 or operand_rounding(dtype) > 0


@given(batches(dtypes=(torch.float32, torch.float64)))
def test_any_batch_is_mined_as_by_the_reference(batch: Batch):
    for mode in MODES:
        with instruction_set(batch.capability):
            quads = batch.unit.mine(batch.feats, batch.labels, mode=mode)
        assert len(quads.valid) == slots(batch.labels, mode)
        assert_mined(quads, batch.feats, batch.labels, batch.unit, mode)


@given(batches(dtypes=(torch.float32, torch.float64, torch.bfloat16)))
def test_of_equal_rows_the_first_is_chosen(batch: Batch):
    """Within one call equal rows have equal scores, to the bit, on every kernel."""
    for mode in MODES:
        with instruction_set(batch.capability):
            quads = batch.unit.mine(batch.feats, batch.labels, mode=mode)
        assert_lowest(quads, batch.feats, batch.labels, mode)


@cpu_only(ANY_CALL)
@settings(max_examples=100)
@given(batches(dtypes=(torch.float32, torch.float64, torch.bfloat16)))
def test_mining_equals_selection_from_the_score_matrix_to_the_bit(batch: Batch):
    """With duplicates this is the law of ties: to the lowest index, lexicographic for pairs."""
    with instruction_set(batch.capability):
        matrix = pddm_ext.score_matrix(batch.feats, batch.unit).detach()
        for mode in MODES:
            got = pddm_ext.mine_and_score(batch.feats, batch.labels, batch.unit, mode=mode)
            assert_same_bits(got, select_quadruplets(matrix, batch.labels, mode))


@pytest.mark.parametrize("mode", MODES)
def test_ties_go_to_the_lowest_index(capability, mode):
    # Every row equals every other: each score is one number.
    labels = make_labels(90, per_class=5)
    x = make_features(1, 8).expand(90, 8)
    quads = make_unit(8).mine(x, labels, mode=mode)
    assert quads.valid.all()
    labels, rows = labels.cpu(), torch.arange(90)

    def first_other(i: int) -> int:
        return int(rows[labels != labels[i]][0])

    def first_same(i: int) -> int:
        return int(rows[(labels == labels[i]) & (rows != i)][0])

    positives = [(i, j) for i in range(90) for j in range(i + 1, 90) if labels[i] == labels[j]]
    expected = {"batch": positives[:1], "anchor": [(i, first_same(i)) for i in range(90)], "pair": positives}[mode]
    assert list(zip(quads.i.tolist(), quads.j.tolist(), strict=True)) == expected
    assert quads.k.tolist() == [first_other(i) for i, _ in expected]
    assert quads.l.tolist() == [first_other(j) for _, j in expected]
    assert quads.s_ij.unique().numel() == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single_row_batches_have_nothing_to_mine(capability, n, mode):
    labels = torch.arange(n, device=DEVICE)
    assert_nothing(make_unit(3).mine(make_features(n, 3), labels, mode=mode), slots(labels, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [2, 7, 40])
def test_one_class_has_no_negatives(capability, n, mode):
    labels = torch.full((n,), 5, device=DEVICE)
    assert_nothing(make_unit(3).mine(make_features(n, 3), labels, mode=mode), slots(labels, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [2, 7, 40])
def test_singletons_have_no_positives(capability, n, mode):
    labels = torch.arange(n, device=DEVICE) * 10**15 - 10**16
    assert_nothing(make_unit(3).mine(make_features(n, 3), labels, mode=mode), slots(labels, mode))


def test_a_row_without_a_positive_gives_a_slot_that_is_not_valid(capability):
    labels = torch.tensor([4, 9, 4, 4, 7, 9], device=DEVICE)
    quads = make_unit(5).mine(make_features(6, 5), labels, mode="anchor")
    assert quads.valid.tolist() == [True, True, True, True, False, True]
    assert_nothing(pddm_ext.Quadruplets(*(f[4:5] for f in quads)), 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_labels_of_any_integer_dtype(dtype, mode):
    unit, x = make_unit(6), make_features(30, 6)
    labels = torch.arange(30, device=DEVICE) % 7
    assert_same_bits(unit.mine(x, labels.to(dtype), mode=mode), unit.mine(x, labels, mode=mode))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64, torch.int32, torch.uint32, torch.int8])
def test_extreme_labels_stay_distinct(dtype):
    unit, x = make_unit(6), make_features(30, 6)
    info = torch.iinfo(dtype)
    ids = torch.tensor([info.min, info.max, info.max - 1], dtype=dtype)
    plain = torch.arange(30) % 3
    for mode in MODES:
        assert_same_bits(unit.mine(x, ids[plain].to(DEVICE), mode=mode), unit.mine(x, plain.to(DEVICE), mode=mode))


def test_strided_labels():
    unit, x = make_unit(6), make_features(30, 6)
    labels = make_labels(30)
    wide = torch.stack([labels, torch.zeros_like(labels)], 1)
    assert_same_bits(unit.mine(x, wide[:, 0]), unit.mine(x, labels))
    assert_same_bits(unit.mine(x, labels.flip(0).flip(0), mode="pair"), unit.mine(x, labels, mode="pair"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_score_never_wins(capability, bad, mode):
    n = 70
    unit, labels = make_unit(9, 5, 6), make_labels(n)
    x = make_features(n, 9)
    # The rows that a careless comparison would pick: the hardest pair, and the first row.
    hardest = unit.mine(x, labels)
    x[hardest.i] = bad
    x[0, 4] = bad
    got = unit.mine(x, labels, mode=mode)
    assert_selected(got, x, labels, unit, mode)
    broken = torch.tensor([0, hardest.i.item()], device=DEVICE)
    if mode == "pair":  # its pairs are asked for by name, but no negative can be found for them
        touched = torch.isin(got.i, broken) | torch.isin(got.j, broken)
        assert not touched.any()
        assert not got.s_ij.isnan().any()
    assert not torch.isin(torch.stack(got[:4]), broken).any()
    assert got.valid.any()


@pytest.mark.parametrize("mode", MODES)
def test_all_nan_is_nothing_to_mine(capability, mode):
    labels = make_labels(20)
    assert_nothing(make_unit(3).mine(make_features(20, 3) * torch.nan, labels, mode=mode), slots(labels, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_scores_compare_as_numbers(capability, mode, sign):
    # An infinite b_s makes every score the same infinity: all tie, none is missing.
    unit, x, labels = make_unit(5), make_features(40, 5), make_labels(40)
    with torch.no_grad():
        unit.s.bias.fill_(sign * torch.inf)
    got = unit.mine(x, labels, mode=mode)
    assert got.valid.all()
    assert_same_bits(got, select_quadruplets(pddm_ext.score_matrix(x, unit).detach(), labels, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("package", [pddm_ext, reference])
def test_a_row_that_is_not_finite_spoils_no_gradient(package, bad, mode):
    """Of one class, too, where nothing is valid."""
    unit = package.PDDM(5).to(DEVICE)
    for labels in (make_labels(12), torch.zeros(12, dtype=torch.int64, device=DEVICE)):
        feats = make_features(12, 5)
        feats[3, 2] = bad
        feats.requires_grad_()
        quads = unit.mine(feats, labels, mode=mode)
        loss = package.QuadrupletLoss()(feats, quads)
        given = [feats, *unit.parameters()]
        gradients = torch.autograd.grad(loss, given)
        assert all(gradient.isfinite().all() for gradient in (loss, *gradients))
        assert (gradients[0].abs().sum() > 0) == bool(quads.valid.any())


def test_score_pairs_gives_back_a_nan_that_is_asked_for():
    unit, x = make_unit(5), make_features(6, 5)
    x[2] = torch.nan
    i, j = torch.tensor([0, 2, 1], device=DEVICE), torch.tensor([1, 3, 2], device=DEVICE)
    assert pddm_ext.score_pairs(x, i, j, unit).isnan().tolist() == [False, True, True]


@cpu_only(f"{ANY_CALL}; tests/test_cuda.py compares as many rows with the CPU")
@pytest.mark.parametrize("capability_name", [CAPABILITIES[0], CAPABILITIES[-1]])
def test_batch_mode_reaches_twenty_thousand_rows(capability_name):
    n = 20_000
    unit, x, labels = make_unit(6, 5, 4), make_features(n, 6), make_labels(n)
    with instruction_set(capability_name):
        got = pddm_ext.mine_and_score(x, labels, unit)
        # The definition, from the same bits: all positive pairs, then two whole rows.
        order = labels.argsort(stable=True)
        i, j = torch.combinations(torch.arange(4)).T
        members = order.reshape(-1, 4)
        i, j = members[:, i].flatten(), members[:, j].flatten()
        i, j = torch.minimum(i, j), torch.maximum(i, j)
        positives = pddm_ext.score_pairs(x, i, j, unit).detach()
        assert got.s_ij.item() == positives.min().item()
        at = (positives == positives.min()).nonzero()[:, 0]
        assert (got.i.item(), got.j.item()) == min((i[t].item(), j[t].item()) for t in at)
        for row, column, score in ((got.i, got.k, got.s_ik), (got.j, got.l, got.s_jl)):
            scores = pddm_ext.score_matrix(x[row], unit, x).detach()[0]
            scores = scores.masked_fill(labels == labels[row], -torch.inf)
            assert column.item() == scores.argmax().item()
            assert_same_bits(score, scores.max().reshape(1))


def test_one_huge_class_among_singletons():
    # P is a rectangle of the batch here, not n times a small number.
    n = 300
    unit, x = make_unit(6, 5, 4), make_features(n, 6)
    rows = torch.arange(n, device=DEVICE)
    labels = torch.where(rows < 150, 0, rows)
    for mode in MODES:
        assert_selected(unit.mine(x, labels, mode=mode), x, labels, unit, mode)


@pytest.mark.parametrize("mode", MODES)
def test_module_function_and_method_are_one(mode):
    unit, x, labels = make_unit(7), make_features(20, 7), make_labels(20)
    assert_same_bits(unit.mine(x, labels, mode=mode), pddm_ext.mine_and_score(x, labels, unit, mode=mode))
    plain = reference.PDDM(7).to(DEVICE)
    plain.load_state_dict(unit.state_dict())
    # A plain unit is mined in plain PyTorch, through the same door.
    assert_mined(pddm_ext.mine_and_score(x, labels, plain, mode=mode), x, labels, unit, mode)


def test_batch_is_the_default_mode():
    unit, x, labels = make_unit(7), make_features(20, 7), make_labels(20)
    assert_same_bits(unit.mine(x, labels), unit.mine(x, labels, mode="batch"))
    assert_same_bits(pddm_ext.mine_and_score(x, labels, unit), unit.mine(x, labels, mode="batch"))
