"""Candidates: who they are, what is mined among them, what it costs, and that enough of them leave nothing out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pddm_ext
from helpers import (
    ANY_CALL,
    CAPABILITIES,
    DEVICE,
    FLOATS,
    MODES,
    ON_CUDA,
    ON_GPU_KERNELS,
    Batch,
    Largest,
    assert_same_bits,
    batches,
    counters,
    cpu_only,
    gpu_only,
    host_only,
    instruction_set,
    make_features,
    make_labels,
    make_unit,
    random_rows,
    reset_counters,
    threads,
)
from pddm_ext import candidates, reference

COUNTS = st.integers(1, 12)


def mask(columns: Tensor, n: int) -> Tensor:
    """Rows' columns, −1 where there are fewer, as (n, n) bool."""
    found = torch.zeros(n, n + 1, dtype=torch.bool, device=columns.device)
    found.scatter_(1, columns % (n + 1), True)
    return found[:, :n]


def chosen(feats: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Every row's nearest of other classes, and the farthest of its own."""
    both = candidates.lists(feats, labels, count)
    return both[:, :count], both[:, count:]


def named(row: Tensor) -> list[int]:
    return [column for column in row.tolist() if column >= 0]


def cost(call) -> int:
    reset_counters()
    call()
    return counters()["pairs_scored"]


def assert_largest(found: Tensor, alike: Tensor, allowed: Tensor, count: int) -> None:
    """Those found (n, c) are ``count`` of the largest allowed values, give or take rounding, or all of fewer."""
    for row, columns in enumerate(found.tolist()):
        there = [c for c in columns if c >= 0]
        assert there == sorted(set(there))
        assert columns == there + [-1] * (len(columns) - len(there))
        assert bool(allowed[row, there].all())
        values = alike[row, allowed[row]].sort(descending=True).values
        assert len(there) == min(count, len(values))
        if there:
            assert float(alike[row, there].min()) >= float(values[len(there) - 1]) - 1e-5


@given(batches(dtypes=FLOATS if ON_GPU_KERNELS else FLOATS[:3]), COUNTS)
def test_they_are_the_nearest_of_other_classes_and_the_farthest_of_the_own(batch: Batch, count: int):
    feats, labels = batch.feats, batch.labels
    n = len(feats)
    if count >= n:
        return
    with instruction_set(batch.capability):
        near, far = (t.cpu() for t in chosen(feats, labels, count))
    rows = F.normalize(feats.cpu().double(), dim=1)
    alike, same = rows @ rows.T, labels.cpu()[:, None] == labels.cpu()
    assert near.shape == (n, count)
    assert_largest(near, alike, ~same, count)
    assert_largest(far, -alike, same & ~torch.eye(n, dtype=torch.bool), count)


def small_numbers(n: int, dim: int, dtype: torch.dtype, *, least: int, classes: int) -> candidates.Rows:
    """Rows whose products are exact, so that many are equal, and of which some are not finite."""
    generator = torch.Generator().manual_seed(n + dim)
    unit = torch.randint(least, least + 4, (n, dim), generator=generator).to(dtype)
    finite = torch.rand(n, generator=generator) > 0.1
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    unit[~finite, 0] = bad[torch.arange(n)[~finite] % 3]
    numbers, sizes = torch.unique(
        torch.randint(0, classes, (n,), generator=generator), return_inverse=True, return_counts=True
    )[1:]
    return candidates.Rows(*(t.to(DEVICE) for t in (unit, finite, numbers, sizes)))


def by_sorting(rows: candidates.Rows, count: int) -> Tensor:
    """The nearest rows of all, where products are exact."""
    n = len(rows.unit)
    there = (rows.classes[:, None] != rows.classes) & rows.finite & rows.finite[:, None]
    order = (rows.unit @ rows.unit.T).masked_fill(~there, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    found = torch.where(there.gather(1, order), order, n)[:, :count].sort(dim=1).values
    return torch.where(found < n, found, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 17, 130])
@pytest.mark.parametrize("least", [-2, 100])  # far apart, and all as good as alike
def test_they_are_what_sorting_finds(capability, dtype, dim, least):
    for n in (2, 7, 15, 16, 17, 31, 32, 33, 100, 301):
        for classes in (1, 2, n):
            rows = small_numbers(n, dim, dtype, least=least, classes=classes)
            every = torch.arange(n, device=DEVICE)
            for count in {1, 2, n // 3 + 1, n - 1}:
                expected = by_sorting(rows, count)
                assert torch.equal(candidates.nearest(rows, None, count), expected)
                some = every[n // 2 :].flip(0)
                assert torch.equal(candidates.nearest(rows, some, count), expected[some])


def test_rows_that_are_all_equal_have_the_lowest(capability):
    rows = candidates.rows_of(torch.ones(700, 3, device=DEVICE), torch.arange(700, device=DEVICE) // 2)
    near = candidates.nearest(rows, None, 40)
    assert torch.equal(near, by_sorting(rows, 40))


@cpu_only("a GPU has no threads to choose")
def test_the_number_of_threads_does_not_show(capability):
    labels = make_labels(1100)
    for dim in (19, 40):
        for shift in (0.0, 30.0):  # of rows that nearly agree, too
            rows = candidates.rows_of(make_features(1100, dim) + shift, labels)
            found = []
            for count in (1, 2, 3, 8):
                with threads(count):
                    found.append(candidates.nearest(rows, None, 12))
            assert all(torch.equal(f, found[0]) for f in found)


@cpu_only("a GPU has no threads to choose")
def test_equal_products_are_chosen_from_alike_whatever_the_number_of_threads(capability):
    """Of rows that are one of three. The bits of torch's own products of such a width depend on the threads."""
    for seed in range(8):
        feats, labels = make_features(3, 513, seed=seed)[random_rows(3, 100, seed=seed)], random_rows(2, 100, seed=seed)
        rows, found = candidates.rows_of(feats, labels), []
        for count in (1, 4, 8):
            with threads(count):
                near = candidates.nearest(rows, torch.arange(7, 60), 3)
                found.append((near, candidates.farthest(rows, 3)))
        assert_same_bits(found[1], found[0])
        assert_same_bits(found[2], found[0])


@host_only("others have torch's own products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dot_products_are_those_of_definition(capability, dtype):
    for n, m, dim in ((1, 1, 1), (33, 70, 19), (64, 31, 130), (0, 5, 3), (5, 0, 3)):
        x, y = make_features(n, 2 * dim, dtype=dtype)[:, ::2], make_features(m, dim, seed=1, dtype=dtype)
        found = torch.ops.pddm.dot_products(x, y)
        rounding = torch.finfo(dtype).eps * dim * (x.double().abs() @ y.double().abs().T)
        assert found.dtype == dtype
        assert ((found - x.double() @ y.double().T).abs() <= rounding).all()
        with threads(3):
            assert_same_bits(torch.ops.pddm.dot_products(x, y), found)
    for x, y in ((torch.ones(2, 3), torch.ones(2, 4)), (torch.ones(3), torch.ones(2, 3)), (torch.ones(2, 0),) * 2):
        with pytest.raises(RuntimeError, match="x and y must be matrices of one width"):
            torch.ops.pddm.dot_products(x, y)


@cpu_only("a GPU's products are torch's")
@pytest.mark.skipif("avx512_bf16" not in CAPABILITIES, reason="without products of fewer bits")
@pytest.mark.parametrize("name", [name for name in CAPABILITIES if name in ("avx512_bf16", "amx")])
@pytest.mark.parametrize("dim", [32, 131])
def test_products_of_fewer_bits_leave_the_choice_as_it_is(dim, name):
    feats, labels = make_features(1300, dim), make_labels(1300)
    feats[1100:] = feats[:200] + 1e-4 * feats[200:400]  # some are nearly alike
    rows = candidates.rows_of(feats, labels)
    with instruction_set("avx512"):
        expected = candidates.nearest(rows, None, 9)
    with instruction_set(name):
        assert torch.equal(candidates.nearest(rows, None, 9), expected)


@cpu_only("torch's own memory is not counted")
def test_the_memory_of_the_choice_grows_with_the_rows_alone():
    rows = candidates.rows_of(make_features(4096, 8), make_labels(4096))
    reset_counters()
    candidates.nearest(rows, None, 4)
    assert 0 < counters()["bytes_peak"] < 4096 * 4096


@host_only("the operator is the CPU's")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(6)}, "a matrix"),
        ({"rows": torch.ones(6, 0)}, "a matrix"),
        ({"rows": torch.ones(6, 2).bfloat16()}, "float32 or float64"),
        ({"rows": torch.ones(6, 2).long()}, "float32 or float64"),
        ({"classes": torch.arange(5)}, "one class per row"),
        ({"classes": torch.arange(6) + 2**24}, "numbered up to 16777216"),
        ({"count": 0}, "count is 0"),
        ({"count": -1}, "count is -1"),
    ],
)
def test_a_direct_call_cannot_reach_foreign_memory(change, message):
    given = {"rows": torch.ones(6, 2), "classes": torch.arange(6), "count": 2, **change}
    with pytest.raises(RuntimeError, match=f"pddm: .*{message}"):
        torch.ops.pddm.nearest(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(6)}, "a matrix"),
        ({"values": torch.ones(3, 4).bfloat16()}, "float32 or float64"),
        ({"values": torch.ones(3, 4).long()}, "float32 or float64"),
        ({"own": torch.arange(4)}, "one class per row"),
        ({"classes": torch.arange(3)}, "one class per row"),
        ({"count": 0}, "count is 0"),
        ({"count": -1}, "count is -1"),
    ],
)
def test_a_direct_call_for_the_largest_cannot_either(change, message):
    given = {"values": torch.ones(3, 4), "own": torch.arange(3), "classes": torch.arange(4), "count": 2, **change}
    with pytest.raises(RuntimeError, match=f"pddm: .*{message}"):
        torch.ops.pddm.largest(**{k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in given.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 255), (2, 256), (5, 257), (2, 5000), (0, 4), (3, 0)])
def test_the_largest_are_what_sorting_finds(dtype, rows, columns):
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randint(-4, 5, (rows, columns), generator=generator).to(dtype)
    values[values == 4], values[values == -4], values[values == 3] = torch.inf, -torch.inf, -0.0
    values[torch.rand(rows, columns, generator=generator) < 0.1] = torch.nan
    own = torch.arange(rows) % 4 - 1
    classes = torch.randint(-1, 4, (columns,), generator=generator)
    there = (own[:, None] != classes) & (own[:, None] >= 0) & (classes >= 0)
    order = torch.where(values.isnan(), -1e30, values.clamp(-1e20, 1e20)).masked_fill(~there, -torch.inf)
    order = order.sort(dim=1, descending=True, stable=True).indices
    for count in {1, 2, 100, columns + 3}:
        best = torch.where(there.gather(1, order), order, columns)[:, :count].sort(dim=1).values
        expected = F.pad(torch.where(best < columns, best, -1), (0, max(0, count - columns)), value=-1)
        found = torch.ops.pddm.largest(*(t.to(DEVICE) for t in (values, own, classes)), count)
        assert torch.equal(found.cpu(), expected)


def lists_of_rows(n: int, room: int) -> Tensor:
    """Of each row some others, in ascending order, −1 after; some have none."""
    generator = torch.Generator().manual_seed(n + room)
    asks = torch.rand(n, n, generator=generator) < torch.rand(n, 1, generator=generator) * room / max(n, 1)
    lists = torch.where(asks & ~torch.eye(n, dtype=torch.bool), torch.arange(n), n).sort(dim=1).values[:, :room]
    return F.pad(torch.where(lists < n, lists, -1), (0, max(0, room - n)), value=-1)


@pytest.mark.parametrize(("n", "room"), [(0, 3), (4, 0), (1, 2), (5, 1), (70, 8), (33, 40), (300, 33)])
def test_a_pair_is_listed_once_whoever_asks(n, room):
    lists = lists_of_rows(n, room)
    i, j, places = (t.cpu() for t in torch.ops.pddm.asked_pairs(lists.to(DEVICE)))
    rows = torch.arange(n)[:, None].expand_as(lists)
    there = lists >= 0
    low, high = torch.minimum(rows, lists)[there], torch.maximum(rows, lists)[there]
    pairs = [*zip(i.tolist(), j.tolist(), strict=True)]
    assert sorted(pairs) == sorted({*zip(low.tolist(), high.tolist(), strict=True)})
    assert torch.equal(places >= 0, there)
    assert torch.equal(i[places[there]], low)
    assert torch.equal(j[places[there]], high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lowest", [False, True])
def test_the_best_of_a_list_is_its_first_that_is_no_nan(dtype, lowest):
    lists = lists_of_rows(70, 40)
    i, _, places = (t.cpu() for t in torch.ops.pddm.asked_pairs(lists.to(DEVICE)))
    scores = torch.randint(-3, 4, i.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    scores[scores == 3], scores[scores == -3], scores[scores == 0] = torch.nan, -torch.inf, torch.inf
    scores[places[20]] = torch.nan
    found = torch.ops.pddm.best_asked(*(t.to(DEVICE) for t in (scores, places, lists)), lowest)
    for row, (column, score, there) in enumerate(zip(*(t.tolist() for t in found), strict=True)):
        own = [(scores[p].item(), c) for p, c in zip(places[row].tolist(), lists[row].tolist(), strict=True) if p >= 0]
        own = [(-s if lowest else s, -c) for s, c in own if s == s]
        assert there == bool(own)
        expected = max(own) if own else (0.0, 1)
        assert (column, score) == (-expected[1], -expected[0] if lowest and own else expected[0])


@cpu_only("a GPU's kernels stop the process")
def test_lists_that_name_what_is_not_there_are_refused():
    lists = torch.tensor([[1, 2], [0, -1], [3, -1]], device=DEVICE)
    with pytest.raises(IndexError, match="pddm: a list names a row that is not there"):
        torch.ops.pddm.asked_pairs(lists)
    with pytest.raises(RuntimeError, match="pddm: lists must be a matrix"):
        torch.ops.pddm.asked_pairs(lists[0])
    scores = torch.ones(2, device=DEVICE)
    with pytest.raises(IndexError, match="pddm: a list names a score that is not there"):
        torch.ops.pddm.best_asked(scores, lists, lists, False)
    with pytest.raises(RuntimeError, match="one place per entry"):
        torch.ops.pddm.best_asked(scores, lists[:2], lists, False)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        torch.ops.pddm.best_asked(scores.half(), lists, lists, False)


@host_only("the operator is the CPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_beyond_the_largest_number_are_equal(dtype):
    rows = torch.full((700, 1), torch.finfo(dtype).max, dtype=dtype)
    with threads(4):
        found = torch.ops.pddm.nearest(rows, torch.arange(700), 3)
    assert found[0].tolist() == [1, 2, 3]
    assert found[-1].tolist() == [0, 1, 2]


@host_only("the operator is the CPU's")
def test_a_direct_call_takes_any_strides_and_more_than_there_are():
    rows = torch.arange(12.0).reshape(2, 6).T[::2]  # (0, 6), (2, 8), (4, 10)
    found = torch.ops.pddm.nearest(rows, torch.tensor([3, 1, -2], dtype=torch.int32), 5)
    assert found.tolist() == [[1, -1, -1, -1, -1], [0, -1, -1, -1, -1], [-1] * 5]
    assert torch.ops.pddm.nearest(torch.ones(0, 4), torch.arange(0), 3).shape == (0, 3)


def test_of_equal_products_the_lowest_rows_are_taken():
    rows = torch.eye(4, device=DEVICE).repeat(5, 1)  # whose products are exactly 0 and 1
    labels = torch.arange(20, device=DEVICE)
    near, _ = chosen(rows, labels, 3)
    assert near[0].tolist() == [4, 8, 12]
    assert near[19].tolist() == [3, 7, 11]
    assert chosen(rows, labels, 6)[0][0].tolist() == [1, 2, 4, 8, 12, 16]
    near, far = chosen(rows, torch.zeros_like(labels), 4)
    assert near.tolist() == [[-1] * 4] * 20
    assert far[0].tolist() == [1, 2, 3, 5]


def test_rows_that_are_not_finite_are_nobodys_candidates_and_have_none():
    feats = make_features(8, 3)
    feats[3], feats[6] = torch.nan, torch.inf
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2], device=DEVICE)
    near, far = chosen(feats, labels, 7)
    assert near[0].tolist() == [2, 4, 5, 7, -1, -1, -1]
    assert near[3].tolist() == near[6].tolist() == [-1] * 7
    assert named(far[2]) == [3]
    assert named(far[4]) == [5, 6, 7]
    assert chosen(feats, labels, 2)[1][4].tolist() == [5, 7]


@gpu_only("the operator is a device's")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [1, 7, 64, 131])
def test_rows_to_multiply_times_their_weights_are_unit_rows(dtype, dim):
    feats = make_features(40, dim, dtype=torch.float64) * 2.0 ** (torch.arange(40, device=DEVICE) % 24 - 12)[:, None]
    feats[3], feats[4], feats[5] = 0, torch.nan, torch.inf
    if dtype != torch.float16:  # beyond its range
        feats[6:9] *= 2.0**-70  # whose squares are none, or less than the least norm
        feats[9:12] *= 2.0**55
        feats[12] = 2.0 ** (100 if dim > 1 else 0)  # whose squares are infinite, of which torch has no need for one
    feats = feats.to(dtype)
    labels = make_labels(40, per_class=6)
    rows, weights, classes = torch.ops.pddm.candidate_rows(feats, labels)
    assert rows.dtype == dtype
    finite = candidates.rows_of(feats, labels).finite
    expected = F.normalize(feats.to(weights.dtype), dim=1)
    torch.testing.assert_close(
        (rows.to(weights.dtype) * weights[:, None])[finite], expected[finite], atol=1e-7, rtol=1e-6
    )
    if dtype in (torch.bfloat16, torch.float16):
        usual = finite & (rows != 0).any(1)
        usual[6:9] = False
        norms = rows[usual].double().norm(dim=1)
        least = 64 if dtype == torch.float16 else 1
        assert bool(((norms > 0.99 * least) & (norms < 2.01 * least)).all())
    order = labels.argsort(stable=True)
    begins = torch.searchsorted(labels[order], labels)
    assert torch.equal(
        classes.long(), torch.stack([begins.where(finite, -1), begins, (labels[:, None] == labels).sum(1), order])
    )


@pytest.mark.parametrize("dtype", FLOATS if ON_GPU_KERNELS else FLOATS[:3])
@pytest.mark.parametrize("count", [1, 32, 128, 129, 400])  # few, and those of which more find no room
def test_of_many_rows_they_are_what_sorting_finds(dtype, count):
    feats = torch.randint(-3, 4, (900, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    feats[::2] += 8  # whose products are nearly equal
    feats[7] = torch.nan
    labels = torch.arange(900, device=DEVICE) % 7 * (torch.arange(900, device=DEVICE) % 3 > 0)
    near, far = chosen(feats, labels, count)
    rows = F.normalize(feats.cpu().double(), dim=1)
    finite = ~rows.isnan().any(1)
    rows[~finite] = 0
    y = labels.cpu()
    alike, same = rows @ rows.T, y[:, None] == y
    assert_largest(near.cpu(), alike, ~same & finite & finite[:, None], count)
    assert not (far == 7).any() or int(same[7].sum()) - 1 <= count
    far, alike = far.cpu()[finite], alike[finite]
    alike[:, 7] = 2  # last
    assert_largest(far, -alike, (same & ~torch.eye(900, dtype=torch.bool))[finite], count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lists": torch.full((5, 2), -1)}, "lists of each row"),
        ({"lists": torch.full((6,), -1)}, "lists of each row"),
        ({"split": -1}, "split is -1 of 2 columns"),
        ({"split": 3}, "split is 3 of 2 columns"),
    ],
)
def test_a_direct_call_with_lists_cannot_either(change, message):
    unit = [p.detach() for p in make_unit(3).parameters()]
    given = {"lists": torch.full((6, 2), -1), "split": 1, **change}
    with pytest.raises(RuntimeError, match=f"pddm: .*{message}"):
        torch.ops.pddm.mine_listed(make_features(6, 3), given["lists"].to(DEVICE), given["split"], *unit, False, False)


@gpu_only("the CPU's products are of unit rows in float32")
def test_small_numbers_of_float16_count():
    feats = torch.tensor([[0, 1], [2048, 0], [2048, 2**-15], [2048, 2**-16]], device=DEVICE).half()
    near, _ = chosen(feats, torch.arange(4, device=DEVICE), 1)
    assert near[0].tolist() == [2]


@gpu_only("the operators are a device's")
def test_direct_calls_of_the_devices_operators_cannot_either():
    feats, labels = make_features(6, 3), make_labels(6)
    with pytest.raises(RuntimeError, match="one label per row"):
        torch.ops.pddm.candidate_rows(feats, labels[:5])
    with pytest.raises(RuntimeError, match="one label per row"):
        torch.ops.pddm.candidate_rows(feats[0], labels)
    rows, weights, classes = torch.ops.pddm.candidate_rows(feats, labels)
    given = {"products": rows @ rows.T, "first": 0, "weights": weights, "classes": classes, "count": 2}
    for change, message in [
        ({"products": rows[0]}, "a matrix"),
        ({"products": (rows @ rows.T).bfloat16()}, "float32 or float64"),
        ({"first": 1}, "rows 1 and following"),
        ({"first": -1}, "rows -1 and following"),
        ({"first": 2**63 - 1}, "and following"),
        ({"weights": weights[:5]}, "a weight and a class"),
        ({"classes": classes[:3]}, "a weight and a class"),
        ({"count": 0}, "count is 0"),
    ]:
        with pytest.raises(RuntimeError, match=f"pddm: .*{message}"):
            torch.ops.pddm.candidates(**{**given, **change})


@cpu_only(ANY_CALL)
@given(batches(dtypes=(torch.float32, torch.float64, torch.bfloat16)), COUNTS)
def test_what_is_mined_is_the_best_of_them_by_the_units_score(batch: Batch, count: int):
    feats, labels, unit = batch.feats, batch.labels, batch.unit
    n = len(feats)
    if count >= n:
        return
    near, far = chosen(feats, labels, count)
    negative, positive = mask(near, n), mask(far, n)
    with instruction_set(batch.capability), torch.no_grad():
        scores = pddm_ext.score_matrix(feats, unit)
        for mode in MODES:
            pairs = positive if mode == "anchor" else positive | positive.T
            expected = reference._select(scores, pairs, negative, mode)
            assert_same_bits(unit.mine(feats, labels, mode=mode, candidates=count), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS if ON_GPU_KERNELS else FLOATS[:3])
def test_it_is_what_the_reference_mines(dtype, mode):
    feats, labels = make_features(60, 17, dtype=dtype), make_labels(60, per_class=6)
    unit = make_unit(17, 13, 9)
    plain = reference.PDDM(17, 13, 9).to(DEVICE)
    plain.load_state_dict(unit.state_dict())
    got = unit.mine(feats, labels, mode=mode, candidates=4)
    expected = plain.mine(feats, labels, mode=mode, candidates=4)
    assert got.valid.shape == expected.valid.shape
    if dtype in (torch.float32, torch.float64):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    else:  # where rounding may decide who is best
        for name in ("s_ij", "s_ik", "s_jl"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_as_many_as_rows_leave_nothing_out(capability, mode):
    feats, labels, unit = make_features(50, 9), make_labels(50), make_unit(9)
    exact = unit.mine(feats, labels, mode=mode)
    for count in (50, 51, 10**9):
        assert_same_bits(unit.mine(feats, labels, mode=mode, candidates=count), exact)
    nearly = unit.mine(feats, labels, mode=mode, candidates=49)
    if ON_GPU_KERNELS:
        torch.testing.assert_close(nearly.s_ij, exact.s_ij)
    else:
        assert_same_bits(nearly, exact)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("per_class", [2, 4, 20])
def test_it_scores_no_more_than_it_may(per_class, count, mode):
    feats, labels, unit = make_features(80, 5), make_labels(80, per_class=per_class), make_unit(5)
    positives = 80 * (per_class - 1) // 2
    scored = cost(lambda: unit.mine(feats, labels, mode=mode, candidates=count))
    assert scored <= 80 * count + min(positives, 80 * count)
    near, far = (mask(t, 80) for t in chosen(feats, labels, count))
    pairs = int((far | far.T).triu().sum())
    assert scored == pairs + (2 * count if mode == "batch" else int((near | near.T).triu().sum()))


def test_rows_of_no_class_cost_nothing():
    feats, labels, unit = make_features(80, 5), make_labels(80), make_unit(5)
    known = torch.arange(80, device=DEVICE) < 20
    marked = torch.where(known, labels, -1)
    costs = [
        cost(lambda: unit.mine(feats, marked, mode="anchor", ignore_label=-1, candidates=3)),
        cost(lambda: unit.mine(feats[known], labels[known], mode="anchor", candidates=3)),
    ]
    assert costs[0] == costs[1] > 0


def test_nothing_of_the_size_of_the_matrix_is_kept(monkeypatch):
    feats, labels, unit = make_features(300, 8), make_labels(300, per_class=100), make_unit(8)
    limit = "_ENTRIES_OF_GPU" if ON_CUDA else "_ENTRIES"
    for mode in MODES:
        monkeypatch.setattr(candidates, limit, 2**22)
        whole = unit.mine(feats, labels, mode=mode, candidates=3)
        monkeypatch.setattr(candidates, limit, 900)  # three rows at a time
        with Largest() as largest:
            parts = unit.mine(feats, labels, mode=mode, candidates=3)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b)
        assert largest.elements <= 300 * 8


@pytest.mark.parametrize("mode", MODES)
def test_the_gradients_are_those_of_the_reference(mode):
    labels = make_labels(30)
    unit = make_unit(6, 5, 4).double()
    plain = reference.PDDM(6, 5, 4).double().to(DEVICE)
    plain.load_state_dict(unit.state_dict())
    gradients = []
    for scorer in (unit, plain):
        feats = make_features(30, 6, dtype=torch.float64).requires_grad_()
        quads = scorer.mine(feats, labels, mode=mode, candidates=3)
        loss = (quads.s_ij * 2 - quads.s_ik - quads.s_jl * 3).sum()
        gradients.append(torch.autograd.grad(loss, [feats, *scorer.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("package", [pddm_ext, reference])
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_no_class_are_nobodys_candidates(package, mode):
    feats, labels = make_features(40, 6), make_labels(40)
    unit = package.PDDM(6).to(DEVICE)
    known = torch.arange(40, device=DEVICE) % 5 != 0
    marked = torch.where(known, labels, -1)
    got = package.mine_and_score(feats, marked, unit, mode=mode, ignore_label=-1, candidates=4)
    kept = known.nonzero().flatten()
    alone = package.mine_and_score(feats[known], labels[known], unit, mode=mode, candidates=4)
    expected = [torch.where(alone.valid, kept[index], -1) for index in alone[:4]]
    if mode == "anchor":
        assert not got.valid[~known].any()
        got = package.Quadruplets(*(field[known] for field in got))
    for a, b in zip(got, (*expected, *alone[4:]), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_scores_in_its_dtype():
    feats, labels, unit = make_features(30, 8), make_labels(30), make_unit(8)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = unit.mine(feats, labels, mode="anchor", candidates=3)
    expected = unit.mine(feats.bfloat16(), labels, mode="anchor", candidates=3)
    assert got.s_ij.dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("package", [pddm_ext, reference])
@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (0, ValueError, "candidates is 0; at least 1 is accepted"),
        (-3, ValueError, "candidates is -3; at least 1"),
        (2.0, TypeError, "candidates is a float; an int is accepted"),
        (True, TypeError, "candidates is a bool; an int is accepted"),
        ("8", TypeError, "candidates is a str; an int is accepted"),
    ],
)
def test_what_is_no_number_of_candidates_is_refused(package, count, error, message):
    feats, labels, unit = make_features(6, 3), make_labels(6, per_class=2), package.PDDM(3).to(DEVICE)
    for call in (
        lambda: package.mine_and_score(feats, labels, unit, candidates=count),
        lambda: package.mine_and_score(feats, labels, candidates=count),
        lambda: unit.mine(feats, labels, candidates=count),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("mode", MODES)
def test_adapters_mine_among_them(mode):
    lightning = pytest.importorskip("pddm_ext.adapters.lightning")
    pml = pytest.importorskip("pddm_ext.adapters.pml")
    feats, labels, unit = make_features(20, 4), make_labels(20), make_unit(4)
    quads = unit.mine(feats, labels, mode=mode, candidates=2)
    assert not torch.equal(quads.k, unit.mine(feats, labels, mode=mode).k)
    i, j, k, l = torch.stack(quads[:4])[:, quads.valid]  # noqa: E741
    expected = torch.cat([i, j]), torch.cat([j, i]), torch.cat([k, l])
    got = pml.PDDMMiner(unit, mode, candidates=2)(feats, labels)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    loss = pddm_ext.QuadrupletLoss()(feats, quads)
    torch.testing.assert_close(pml.QuadrupletLoss(unit, mode, candidates=2)(feats, labels), loss)
    for made in (pml.PDDMMiner(unit, candidates=2), pml.QuadrupletLoss(unit, candidates=2)):
        with pytest.raises(NotImplementedError, match="candidates is 2, for pairs of the batch"):
            made(feats, labels, ref_emb=feats.clone(), ref_labels=labels.clone())
    module = lightning.MetricLearningModule(torch.nn.Identity(), 4, mode=mode, candidates=2).to(DEVICE)
    module.unit.load_state_dict(unit.state_dict())
    module.log = module.log_dict = lambda *_, **__: None
    torch.testing.assert_close(module.training_step((feats, labels), 0), loss)
    for wrong in (
        lambda: pml.PDDMMiner(unit, candidates=0),
        lambda: pml.QuadrupletLoss(unit, candidates=0),
        lambda: lightning.MetricLearningModule(torch.nn.Identity(), 4, candidates=0),
    ):
        with pytest.raises(ValueError, match="candidates is 0; at least 1 is accepted"):
            wrong()
