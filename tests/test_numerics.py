"""Scores are those of `reference` in float64, within a bound that is derived, not chosen (helpers.rounding_bound)."""

from functools import cache

import pytest
import torch
from hypothesis import given

import pddm_ext
from helpers import (
    ANY_CALL,
    DEVICE,
    EMULATED,
    FLOATS,
    MODES,
    ON_GPU_KERNELS,
    SIZES,
    Batch,
    all_pairs,
    assert_same_bits,
    batches,
    cpu_only,
    gpu_only,
    instruction_set,
    kill_relus,
    make_features,
    make_labels,
    make_unit,
    matmul_precision,
)
from pddm_ext import reference
from truth import assert_mined, assert_ranked, assert_within, bound_of, operand_rounding, rounding_bound, truth


@cache
def case(size, dtype, normalize_input, operand):
    """Inputs, and score and bound of x with x and of x with y; the same for every instruction set."""
    n, d, h, m = size
    unit = make_unit(d, h, m, normalize_input=normalize_input)
    x, y = make_features(n, d, dtype=dtype), make_features(n + 3, d, seed=1, dtype=dtype)
    within = truth(x, unit), rounding_bound(x, unit, operand=operand)
    across = truth(x, unit, y), rounding_bound(x, unit, y, operand=operand)
    return unit, x, y, within, across


@pytest.mark.parametrize("normalize_input", [False, True])
# float16 is float32 on the CPU from here on, to the bit: see below.
@pytest.mark.parametrize("dtype", FLOATS if ON_GPU_KERNELS else FLOATS[:3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_entry_scores_as_the_reference(capability, size, dtype, normalize_input):
    unit, x, y, within, across = case(size, dtype, normalize_input, operand_rounding(dtype))
    n, d = x.shape
    assert_within(pddm_ext.score_matrix(x, unit), *within)
    assert_within(pddm_ext.score_matrix(x, unit, y), *across)
    i, j = all_pairs(n, n)
    assert_within(pddm_ext.score_pairs(x, i, j, unit).reshape(n, n), *within)
    assert_within(unit(x[i].reshape(n, n, d), x[j].reshape(n, n, d)), *within)
    scores, columns = pddm_ext.topk(x, y, n + 3, unit)
    assert_within(scores, *(t.gather(1, columns.cpu()) for t in across))


# (n, d, h, m) about the GPU's tiles: 16 × 16 blocks of pairs, tiles of 32, 64 and 128 pairs, of 64, 128 and 256
# outputs, and of 8, 16 or 32 inputs.
TILE_SIZES = [
    (16, 16, 16, 16),
    (17, 15, 33, 31),
    (34, 64, 128, 256),
    (33, 65, 129, 257),
    (20, 300, 520, 40),
    (130, 31, 24, 18),
]


@gpu_only("the CPU's tiles are smaller")
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [*TILE_SIZES, pytest.param((130, 65, 129, 257), id="large")], ids=str)
def test_sizes_about_the_tiles_score_and_mine_as_the_reference(request, size, dtype, precision):
    if precision == "high" and dtype != torch.float32:
        pytest.skip("the precision of float32 products only")
    if EMULATED and request.node.callspec.id.startswith("large") and (dtype, precision) != (torch.bfloat16, "highest"):
        pytest.skip("too slow under the emulation in every dtype")
    with matmul_precision(precision):
        unit, x, y, within, across = case(size, dtype, False, operand_rounding(dtype))
        assert_within(pddm_ext.score_matrix(x, unit), *within)
        if size[0] < 100:
            assert_within(pddm_ext.score_matrix(x, unit, y), *across)
            labels = make_labels(len(x))
            for mode in MODES:
                assert_mined(unit.mine(x, labels, mode=mode), x, labels, unit, mode)


@gpu_only("the CPU's float32 is IEEE's in every setting")
@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("size", SIZES[2:], ids=str)
def test_high_matmul_precision_rounds_float32_operands_to_tf32_and_no_further(size, normalize_input):
    exact = pddm_ext.score_matrix(*reversed(case(size, torch.float32, normalize_input, 0.0)[:2]))
    with matmul_precision("high"):
        unit, x, y, within, across = case(size, torch.float32, normalize_input, operand_rounding(torch.float32))
        i, j = all_pairs(len(x), len(x))
        got = pddm_ext.score_matrix(x, unit)
        assert_within(got, *within)
        assert_within(pddm_ext.score_matrix(x, unit, y), *across)
        assert_within(pddm_ext.score_pairs(x, i, j, unit).reshape_as(got), *within)
        double = pddm_ext.score_matrix(x.double(), unit)
    assert (got != exact).any()  # it did round
    assert_same_bits(double, pddm_ext.score_matrix(x.double(), unit))  # float64 is left alone


def test_the_bound_is_tight_enough_to_catch_a_wrong_term():
    # A bound that swallowed a forgotten bias or a swapped half would test nothing.
    unit = make_unit(64, 48, 24)
    x = make_features(40, 64)
    bound, expected = rounding_bound(x, unit), truth(x, unit)
    assert bound.max() < 1e-2 * expected.std()


@given(batches(dtypes=(torch.float32, torch.float64)))
def test_any_batch_scores_as_the_reference(batch: Batch):
    with instruction_set(batch.capability):
        got = pddm_ext.score_matrix(batch.feats, batch.unit)
    assert got.dtype == batch.feats.dtype
    assert_within(got, truth(batch.feats, batch.unit), rounding_bound(batch.feats, batch.unit))


@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_are_float32_or_float64_for_float64(dtype):
    unit, x = make_unit(5), make_features(6, 5, dtype=dtype)
    i = torch.arange(6, device=DEVICE)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert pddm_ext.score_matrix(x, unit).dtype == expected
    assert pddm_ext.score_pairs(x, i, i, unit).dtype == expected
    assert pddm_ext.topk(x, x, 2, unit)[0].dtype == expected
    assert unit(x, x).dtype == expected
    for mode in ("batch", "anchor", "pair"):
        assert unit.mine(x, make_labels(6), mode=mode).s_ij.dtype == expected


@cpu_only("the GPU multiplies both as they are")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_scored_in_float32(capability, dtype):
    if operand_rounding(dtype):
        pytest.skip("bfloat16 products are compared with their bound elsewhere")
    unit, x = make_unit(19, 9, 14), make_features(40, 19, dtype=dtype)
    assert_same_bits(pddm_ext.score_matrix(x, unit), pddm_ext.score_matrix(x.float(), unit))


@pytest.mark.parametrize("parameters", FLOATS)
@pytest.mark.parametrize("features", [torch.float32, torch.float64])
def test_parameters_of_any_dtype_are_taken_in_the_features_precision(parameters, features):
    unit = make_unit(9, 6, 5).to(parameters)
    x = make_features(12, 9, dtype=features)
    assert_within(pddm_ext.score_matrix(x, unit), truth(x, unit), rounding_bound(x, unit))


@cpu_only(ANY_CALL)
@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_pair_scores_the_same_bits_wherever_it_stands(capability, dtype, normalize_input):
    """Ties between duplicates are exact only because of this."""
    n, d = 75, 21
    unit = make_unit(d, 13, 18, normalize_input=normalize_input)
    x = make_features(n, d, dtype=dtype)
    matrix = pddm_ext.score_matrix(x, unit)
    i, j = all_pairs(n, n)
    assert_same_bits(matrix, matrix.T)
    assert_same_bits(pddm_ext.score_pairs(x, i, j, unit).reshape(n, n), matrix)
    assert_same_bits(pddm_ext.score_pairs(x, j, i, unit).reshape(n, n), matrix)
    assert_same_bits(pddm_ext.score_matrix(x, unit, x), matrix)
    assert_same_bits(pddm_ext.score_matrix(x[50:], unit, x[:50]), matrix[50:, :50])
    assert_same_bits(unit(x[i], x[j]), matrix.flatten())

    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    assert_same_bits(pddm_ext.score_matrix(x[order], unit), matrix[order][:, order])
    few = order[:5]
    assert_same_bits(pddm_ext.score_matrix(x[few], unit), matrix[few][:, few])

    scores, columns = pddm_ext.topk(x, x, n, unit)
    assert_same_bits(scores, matrix.gather(1, columns))
    for mode in ("batch", "anchor", "pair"):
        q = unit.mine(x, make_labels(n), mode=mode)
        assert q.valid.all()
        for score, a, b in ((q.s_ij, q.i, q.j), (q.s_ik, q.i, q.k), (q.s_jl, q.j, q.l)):
            assert_same_bits(score, matrix[a, b])


@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_pair_scores_the_same_bits_wherever_it_stands_in_a_call(capability, dtype, normalize_input):
    n, d = 75, 21
    unit = make_unit(d, 13, 18, normalize_input=normalize_input)
    x = make_features(n, d, dtype=dtype)
    x[[17, 40, 41, 74]] = x[3].clone()
    matrix = pddm_ext.score_matrix(x, unit)
    assert_same_bits(matrix, matrix.T)
    for copy in (17, 40, 41, 74):
        assert_same_bits(matrix[copy], matrix[3])
    across = pddm_ext.score_matrix(x[:20], unit, x)
    assert_same_bits(across[17], across[3])
    assert_same_bits(across[:, 74], across[:, 3])
    i, j = all_pairs(5, n)
    pairs = pddm_ext.score_pairs(x, torch.cat([i, j]), torch.cat([j, i]), unit).reshape(2, 5, n)
    assert_same_bits(pairs[0], pairs[1])
    assert_same_bits(pairs[0, :, 40], pairs[0, :, 3])


@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("dead", ["", "u", "v", "c", "uv", "uvc"])
def test_vanishing_norms_score_as_the_reference(capability, dead, normalize_input):
    """u = 0, v = 0, a row of zeros, and relus that are all dead: each is a norm of 0."""
    unit = make_unit(10, 7, 6, normalize_input=normalize_input)
    kill_relus(unit, dead)
    x = make_features(40, 10)
    x[1], x[2], x[3] = x[0], -x[0], 0
    x[35:] = x[0]
    got = pddm_ext.score_matrix(x, unit)
    assert_within(got, truth(x, unit), rounding_bound(x, unit))
    if "c" in dead:  # nothing is left but b_s
        assert_same_bits(got, unit.s.bias.detach().expand(40, 40))


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e-12, 3e-12, 1e-6, 1e6, 1e15])
def test_norms_are_clamped_as_by_normalize(capability, scale):
    # F.normalize divides by max(‖x‖, 1e-12); the truth takes the scaled float32 rows. Rows below 1e-22 have squares
    # that float32 rounds to nothing, and a norm at the clamp either way.
    unit, x = make_unit(8), make_features(33, 8) * scale
    assert_within(pddm_ext.score_matrix(x, unit), truth(x, unit), rounding_bound(x, unit))


def test_length_of_a_row_does_not_matter(capability):
    unit, x = make_unit(16), make_features(20, 16)
    scale = 2.0 ** torch.arange(-10, 10, device=DEVICE)[:, None]  # powers of two, which round nothing
    assert_same_bits(pddm_ext.score_matrix(x * scale, unit), pddm_ext.score_matrix(x, unit))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_of_nan_or_infinity_reaches_its_own_pairs_and_no_other(capability, bad, dtype):
    n = 70
    unit, x = make_unit(11, 9, 13), make_features(n, 11, dtype=dtype)
    clean = pddm_ext.score_matrix(x, unit)
    x[40, 3] = bad
    got = pddm_ext.score_matrix(x, unit)
    assert got[40].isnan().all()
    assert got[:, 40].isnan().all()
    others = torch.arange(n, device=DEVICE) != 40
    assert_same_bits(got[others][:, others], clean[others][:, others])
    i = torch.tensor([40, 3, 40, 5], device=DEVICE)
    j = torch.tensor([3, 40, 40, 6], device=DEVICE)
    assert pddm_ext.score_pairs(x, i, j, unit).isnan().tolist() == [True, True, True, False]
    assert unit(x[i], x[j]).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "name", ["u.weight", "u.bias", "v.weight", "v.bias", "c.weight", "c.bias", "s.weight", "s.bias"]
)
def test_a_nan_in_any_parameter_reaches_the_scores(capability, name):
    unit, x = make_unit(6, 5, 4), make_features(20, 6)
    with torch.no_grad():
        unit.get_parameter(name).view(-1)[0] = float("nan")
    got = pddm_ext.score_matrix(x, unit)
    assert got.isnan().all().item() == truth(x, unit).isnan().all().item()
    assert got.isnan().any()


def test_any_strides_give_the_same_bits():
    unit, x = make_unit(12, 7, 9), make_features(40, 12)
    i, j = all_pairs(40, 40)
    expected, listed = pddm_ext.score_matrix(x, unit), pddm_ext.score_pairs(x, i, j, unit)
    across = pddm_ext.score_matrix(x, unit, x)
    wide = torch.zeros(80, 36, device=DEVICE)
    wide[::2, 5:29:2] = x
    unaligned = torch.zeros(481, device=DEVICE)[1:].view(40, 12)
    unaligned.copy_(x)
    views = [x.T.contiguous().T, wide[::2, 5:29:2], x.flip(0).flip(0), unaligned, torch._neg_view(-x)]
    for view in views:
        assert_same_bits(pddm_ext.score_matrix(view, unit), expected)
        assert_same_bits(pddm_ext.score_pairs(view, i.flip(0).flip(0), j, unit), listed)
        assert_same_bits(pddm_ext.score_matrix(x, unit, view), across)
        assert_same_bits(pddm_ext.topk(view, x, 3, unit), pddm_ext.topk(x, view, 3, unit))
        assert_same_bits(unit.mine(view, make_labels(40)), unit.mine(x, make_labels(40)))
    one = x[:1].expand(40, 12)
    assert_same_bits(pddm_ext.score_matrix(one, unit), expected[:1, :1].expand(40, 40))
    strided = torch.stack([i, j], 1)
    assert_same_bits(pddm_ext.score_pairs(x, strided[:, 0], strided[:, 1], unit), listed)


def test_parameters_of_any_strides_give_the_same_bits():
    unit, x = make_unit(12, 7, 9), make_features(20, 12)
    expected = pddm_ext.score_matrix(x, unit)
    for layer in (unit.u, unit.v, unit.c, unit.s):
        layer.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert_same_bits(pddm_ext.score_matrix(x, unit), expected)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32]
)
def test_row_numbers_of_any_integer_dtype(dtype):
    unit, x = make_unit(4), make_features(9, 4)
    i, j = torch.tensor([0, 8, 3], device=DEVICE), torch.tensor([1, 2, 3], device=DEVICE)
    assert_same_bits(pddm_ext.score_pairs(x, i.to(dtype), j.to(dtype), unit), pddm_ext.score_pairs(x, i, j, unit))


def test_empty_and_single_row_inputs_have_empty_and_single_results():
    unit = make_unit(4)
    none, one = make_features(0, 4), make_features(1, 4)
    index = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert pddm_ext.score_matrix(none, unit).shape == (0, 0)
    assert pddm_ext.score_matrix(none, unit, one).shape == (0, 1)
    assert pddm_ext.score_matrix(one, unit, none).shape == (1, 0)
    assert pddm_ext.score_pairs(none, index, index, unit).shape == (0,)
    assert pddm_ext.score_pairs(one, index, index, unit).shape == (0,)
    assert [t.shape for t in pddm_ext.topk(none, one, 1, unit)] == [(0, 1)] * 2
    assert unit(none, none).shape == (0,)
    assert unit(none.reshape(3, 0, 4), none.reshape(3, 0, 4)).shape == (3, 0)
    assert unit(one[0], one[0]).shape == ()
    assert_within(pddm_ext.score_matrix(one, unit), truth(one, unit), rounding_bound(one, unit))


@cpu_only(ANY_CALL)
@given(batches(dtypes=(torch.float32, torch.float64)))
def test_topk_is_the_stable_sort_of_the_matrix(batch: Batch):
    n = len(batch.feats)
    queries = batch.feats[: n // 3]
    with instruction_set(batch.capability):
        matrix = pddm_ext.score_matrix(queries, batch.unit, batch.feats).detach()
        expected = matrix.sort(dim=-1, descending=True, stable=True)
        for k in {1, (n + 1) // 2, n} if n else ():
            scores, columns = pddm_ext.topk(queries, batch.feats, k, batch.unit)
            assert_same_bits(scores, expected.values[:, :k])
            assert torch.equal(columns, expected.indices[:, :k])


@given(batches(dtypes=(torch.float32, torch.float64)))
def test_topk_ranks_any_batch_as_the_reference(batch: Batch):
    n = len(batch.feats)
    queries = batch.feats[: n // 3]
    expected, bound = (f(queries, batch.unit, batch.feats) for f in (truth, bound_of))
    with instruction_set(batch.capability):
        for k in {1, (n + 1) // 2, n} if n else ():
            assert_ranked(*pddm_ext.topk(queries, batch.feats, k, batch.unit), expected, bound)


def test_topk_streams_a_long_gallery_in_order(capability):
    # Longer than the pieces it passes by in (2,048 rows on the CPU, 40 of this unit's on the GPU), with ties across
    # them, and a NaN in each.
    g = 500 if EMULATED else 4500
    unit = make_unit(6, 5, 4)
    gallery, queries = make_features(g, 6), make_features(5, 6, seed=1)
    best = pddm_ext.topk(queries, gallery, 1, unit)[1][0, 0].item()
    copies = [11, g // 2 - 203, g // 2 - 202, g - 1]
    gallery[copies] = gallery[best].clone()
    gallery[[0, g // 2 - 151, g - 2]] = float("nan")
    scores, columns = pddm_ext.topk(queries, gallery, 40, unit)
    expected = truth(queries, unit, gallery)
    assert_ranked(scores, columns, expected.nan_to_num(nan=-torch.inf), bound_of(queries, unit, gallery).nan_to_num())
    assert columns[0, :5].tolist() == sorted([*copies, best])
    if not ON_GPU_KERNELS:  # where a pair has the same bits in both calls
        matrix = pddm_ext.score_matrix(queries, unit, gallery).detach().nan_to_num(nan=-torch.inf)
        stable = matrix.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(columns, stable.indices[:, :40])
        assert_same_bits(scores, stable.values[:, :40])


def test_topk_puts_nan_last_and_agrees_with_the_reference(capability):
    unit, queries = make_unit(6), make_features(4, 6, seed=1)
    gallery = make_features(30, 6)
    gallery[[0, 7]] = float("nan")
    queries[3] = float("nan")
    scores, columns = pddm_ext.topk(queries, gallery, 30, unit)
    assert columns[:3, -2:].tolist() == [[0, 7]] * 3
    assert scores[:3, -2:].isnan().all()
    assert columns[3].tolist() == list(range(30))
    expected = reference.topk(queries.double(), gallery.double(), 30, unit)[1]
    assert torch.equal(columns, expected)


def test_nothing_is_written_into_the_inputs(capability):
    unit, x, labels = make_unit(9, 5, 7), make_features(40, 9).requires_grad_(), make_labels(40)
    i, j = all_pairs(40, 40)
    given_to = [x, labels, i, j, *unit.parameters()]
    before = [t.detach().clone() for t in given_to]
    outputs = [pddm_ext.score_pairs(x, i, j, unit), pddm_ext.score_matrix(x, unit), pddm_ext.topk(x, x, 3, unit)[0]]
    outputs += [unit.mine(x, labels, mode=mode).s_ij for mode in ("batch", "anchor", "pair")]
    sum(t.sum() for t in outputs if t.requires_grad).backward()
    assert_same_bits(given_to, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_scores_features_in_its_dtype(dtype):
    unit, x, labels = make_unit(17, 8, 9), make_features(40, 17), make_labels(40)
    i, j = all_pairs(40, 40)
    cast = x.to(dtype)
    with torch.autocast(DEVICE.type, dtype=dtype):
        got = [pddm_ext.score_pairs(x, i, j, unit), pddm_ext.score_matrix(x, unit), unit(x[i], x[j])]
        got += [*pddm_ext.topk(x, x, 4, unit), *pddm_ext.mine_and_score(x, labels, unit, mode="anchor")]
        double = pddm_ext.score_matrix(x.double(), unit)
    expected = [pddm_ext.score_pairs(cast, i, j, unit), pddm_ext.score_matrix(cast, unit), unit(cast[i], cast[j])]
    expected += [*pddm_ext.topk(cast, cast, 4, unit), *pddm_ext.mine_and_score(cast, labels, unit, mode="anchor")]
    assert_same_bits(got, expected)
    assert got[0].dtype == torch.float32
    assert (got[1] != pddm_ext.score_matrix(x, unit)).any()  # it did round
    assert_same_bits(double, pddm_ext.score_matrix(x.double(), unit))  # float64 is left alone


def test_highest_matmul_precision_is_ieee_float32():
    # The setting may only ever lower the precision; at its default nothing is rounded below float32.
    assert torch.get_float32_matmul_precision() == "highest"
    unit, x = make_unit(64), make_features(33, 64)
    assert_within(pddm_ext.score_matrix(x, unit), truth(x, unit), rounding_bound(x, unit))
