"""The laws of section 3, counted: pairs scored, bytes of scratch, and bits that depend on the input alone."""

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings

import pddm_ext
from helpers import (
    DEVICE,
    EMULATED,
    FLOATS,
    MODES,
    ON_CUDA,
    ON_GPU_KERNELS,
    Batch,
    assert_same_bits,
    batches,
    counters,
    cpu_only,
    gpu_only,
    instruction_set,
    make_features,
    make_labels,
    make_unit,
    matmul_precision,
    random_rows,
    reset_counters,
    threads,
)
from pddm_ext import _C
from processes import in_a_new_process


def counted(call) -> dict[str, int]:
    reset_counters()
    call()
    return counters()


def positive_pairs(labels: torch.Tensor) -> int:
    counts = labels.unique(return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def is_hopeless(labels: torch.Tensor) -> bool:
    return len(labels.unique()) < 2 or len(labels.unique()) == len(labels)


@given(batches(dtypes=(torch.float32, torch.float64)))
def test_each_mode_scores_the_pairs_it_asks_for_and_no_other(batch: Batch):
    feats, labels, unit = batch.feats, batch.labels, batch.unit
    n, p = len(feats), positive_pairs(labels)
    half = n * (n - 1) // 2
    expected = {"batch": p + 2 * n, "anchor": half, "pair": half}
    if ON_GPU_KERNELS:  # where the host does not wait to hear that there is nothing to find
        expected["batch"] = p + 2 * n if p else 0
    elif is_hopeless(labels):
        expected = dict.fromkeys(MODES, 0)
    # A GPU's float64 mining walks its pairs a second time, for the lowest index among equal scores.
    walks = 2 if ON_GPU_KERNELS and feats.dtype == torch.float64 else 1
    with instruction_set(batch.capability):
        for mode in MODES:
            scored = counted(lambda mode=mode: unit.mine(feats, labels, mode=mode))["pairs_scored"]
            assert scored == walks * expected[mode]


@given(batches())
def test_explicit_scores_cost_what_is_asked(batch: Batch):
    feats, unit = batch.feats, batch.unit
    n = len(feats)
    i, j = random_rows(max(n, 1), 2, 3 * n, seed=n)
    part = n // 3
    with instruction_set(batch.capability):
        costs = [
            (lambda: pddm_ext.score_matrix(feats, unit), n * (n + 1) // 2),
            (lambda: pddm_ext.score_matrix(feats[:part], unit, feats), part * n),
            (lambda: pddm_ext.score_pairs(feats, i, j, unit), 3 * n),
            (lambda: unit(feats, feats.flip(0)), n),
        ]
        if n:
            costs.append((lambda: pddm_ext.topk(feats[:part], feats, 1 + n // 2, unit), part * n))
        for call, cost in costs:
            assert counted(call)["pairs_scored"] == cost


@pytest.mark.parametrize("mode", MODES)
def test_backward_touches_at_most_three_pairs_of_a_quadruplet(capability, mode):
    n = 60 if EMULATED else 200
    unit, labels, x = make_unit(6, 5, 4), make_labels(n), make_features(n, 6).requires_grad_()
    quads = unit.mine(x, labels, mode=mode)
    slots = int(quads.valid.sum())
    assert slots == len(quads.valid)
    total = quads.s_ij.sum() + quads.s_ik.sum() + quads.s_jl.sum()
    assert counted(lambda: total.backward(retain_graph=True))["pairs_scored"] == 3 * slots
    assert counted(lambda: quads.s_ik.sum().backward())["pairs_scored"] == slots


def test_backward_skips_closed_hinges_and_slots_that_are_not_valid():
    unit, labels, x = make_unit(6, 5, 4), make_labels(60, per_class=3), make_features(60, 6).requires_grad_()
    labels[7] = 999
    quads = unit.mine(x, labels, mode="anchor")
    quads = quads._replace(s_ij=quads.s_ij + 0.2)  # as after some training, when many hinges are closed
    loss = pddm_ext.QuadrupletLoss(alpha=0)(x, quads)
    with torch.no_grad():
        first = (quads.s_ik - quads.s_ij > 0) & quads.valid
        second = (quads.s_jl - quads.s_ij > 0) & quads.valid
    open_pairs = int(first.sum() + second.sum() + (first | second).sum())
    assert 0 < open_pairs < 3 * 60
    assert counted(loss.backward)["pairs_scored"] == open_pairs


def test_backward_of_nothing_scores_nothing():
    unit, x = make_unit(6), make_features(20, 6).requires_grad_()
    loss = pddm_ext.QuadrupletLoss()(x, unit.mine(x, torch.arange(20, device=DEVICE), mode="anchor"))
    assert counted(loss.backward)["pairs_scored"] == 0


def test_backward_of_a_matrix_scores_each_unordered_pair_once():
    unit, x = make_unit(6), make_features(50, 6).requires_grad_()
    matrix = pddm_ext.score_matrix(x, unit)
    assert counted(lambda: matrix.sum().backward())["pairs_scored"] == 50 * 51 // 2
    across = pddm_ext.score_matrix(x, unit, x[:7])
    assert counted(lambda: across.sum().backward())["pairs_scored"] == 50 * 7


def test_counters_start_anew():
    pddm_ext.score_matrix(make_features(9, 4), make_unit(4))
    assert counters()["pairs_scored"] > 0
    assert (counters()["launches"] > 0) == ON_GPU_KERNELS
    reset_counters()
    assert counters() == {"pairs_scored": 0, "bytes_peak": 0, "launches": 0, "allocations": 0}


def test_counters_of_an_unknown_device_are_refused():
    with pytest.raises(ValueError, match="device is 'abacus', which this build has no counters for"):
        _C.counters("abacus")
    with pytest.raises(ValueError, match="device is 'abacus'"):
        _C.reset_counters("abacus")


# --- Launches ---------------------------------------------------------------------------------------------------------


@gpu_only("the CPU launches nothing")
@pytest.mark.parametrize("n", [2, 33, 130])
@pytest.mark.parametrize("dtype", FLOATS)
def test_mining_takes_few_launches_whatever_the_rows(dtype, n):
    unit, labels, x = make_unit(6, 5, 4), make_labels(n, per_class=2), make_features(n, 6, dtype=dtype)
    # Prepare, W_v f, positive pairs before every row; their scores, their partners' scores, and the choice.
    most = {"batch": 7, "anchor": 4}
    if dtype == torch.float64:  # walks twice for each of its bests, and has the unit in float64
        most = {"batch": 10, "anchor": 6}
    elif dtype != torch.float32:
        most = {"batch": 8, "anchor": 5}  # the rows in float32
    for mode, launches in most.items():
        assert counted(lambda mode=mode: unit.mine(x, labels, mode=mode))["launches"] <= launches


@gpu_only("the CPU launches nothing")
def test_the_loss_takes_two_launches_and_three_back():
    x, labels = make_features(64, 6).requires_grad_(), make_labels(64)
    quads = pddm_ext.Quadruplets(*(field.detach() for field in make_unit(6).mine(x, labels, mode="anchor")))
    value = pddm_ext.QuadrupletLoss()(x, quads)
    assert counted(lambda: pddm_ext.QuadrupletLoss()(x, quads))["launches"] == 2
    assert counted(value.backward)["launches"] == 3
    x = x.detach().bfloat16().requires_grad_()  # which is rounded on its way in, and its gradient on the way out
    value = pddm_ext.QuadrupletLoss()(x, quads)
    assert counted(lambda: pddm_ext.QuadrupletLoss()(x, quads))["launches"] == 3
    assert counted(value.backward)["launches"] == 5


@gpu_only("the CPU's scratch is native")
@pytest.mark.parametrize("mode", ["batch", "anchor", "pair"])
def test_a_small_batch_asks_for_scratch_once(mode):
    unit, labels, x = make_unit(64), make_labels(64), make_features(64, 64)
    # `pair` counts its pairs in a call of its own.
    calls = 2 if mode == "pair" else 1
    assert counted(lambda: unit.mine(x, labels, mode=mode))["allocations"] <= calls
    assert counted(lambda: pddm_ext.score_matrix(x, unit))["allocations"] == 1


@gpu_only("the CPU launches nothing")
def test_launches_of_the_other_entries_do_not_grow_with_the_rows():
    unit = make_unit(6, 5, 4)
    for call in (
        lambda x: pddm_ext.score_matrix(x, unit),
        lambda x: pddm_ext.score_pairs(x, *random_rows(len(x), 2, 3 * len(x)), unit),
        lambda x: unit.mine(x, make_labels(len(x)), mode="pair"),
    ):
        small, large = (counted(partial(call, make_features(n, 6)))["launches"] for n in (9, 100))
        assert 0 < small == large


# --- Bytes ------------------------------------------------------------------------------------------------------------


def scratch(n: int, mode: str, d: int = 64, *, backward: bool = False) -> int:
    unit, labels, x = make_unit(d), make_labels(n), make_features(n, d).requires_grad_()

    def step():
        quads = unit.mine(x, labels, mode=mode)
        if backward:
            (quads.s_ij.sum() + quads.s_ik.sum() + quads.s_jl.sum()).backward()

    return counted(step)["bytes_peak"]


@cpu_only("the GPU's workspace is another")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mode", ["batch", "anchor"])
def test_scratch_grows_with_the_rows_and_no_faster(capability, mode, backward):
    """Rows, their products, and the gradients of both: float32, a few copies of d + h numbers a row. Beyond these
    nothing grows: full blocks of pairs are of one size, and multiples of 512 rows leave no panel ragged.
    """
    d = 24
    at = [scratch(n, mode, d, backward=backward) for n in (512, 1024, 1536)]
    assert 0 < at[1] - at[0] <= 512 * 4 * (4 * 2 * 32 + 1)  # rows are padded to at most 32 numbers
    assert at[2] - at[1] == at[1] - at[0]


def padded(inputs: int, dtype: torch.dtype) -> int:
    """Inputs are walked 64 bytes at a time."""
    depth = 64 // (2 if dtype in (torch.bfloat16, torch.float16) else dtype.itemsize)
    return -(-inputs // depth) * depth


def gpu_bytes_per_row(d: int, h: int, m: int, mode: str, dtype: torch.dtype) -> tuple[int, float]:
    """How many bytes a row adds to the workspace, forward and backward, which are never there at once."""
    real = 8 if dtype == torch.float64 else 4
    bests = real // 4 * 8 * {"batch": 1, "anchor": 2, "pair": 1}[mode]  # words of the hardest positive and negative
    # To sort by label four numbers, and the sums of positive pairs; pair's slots are counted first and then placed.
    ranks = {"batch": 4 * 4 + 8, "anchor": 0, "pair": 2 * (4 * 4 + 8) + 8}[mode]
    row = real * (d + 1)
    if mode == "anchor":
        kept = 2 if dtype == torch.bfloat16 else real  # of an operand of a product
        # v goes by rows: a with its gradient, and the row as an operand.
        row += real * 2 * h + (kept * d if kept < real else 0)
        # A quadruplet's three pairs, while they are less than a chunk: rows, their order, weight and norms; [u'; v'],
        # c and u with their gradients; of every 64 of them sums.
        pair = 4 * 4 + real * 3 + kept * (2 * 2 * h + m + d) + real * (2 * m + 2 * h + 1) / 64
        row += 3 * pair
    return real * (padded(d, dtype) + padded(h, dtype) + 1) + bests + ranks, row


# Rows, as many that a chunk of backward is not yet full or always is; and (d, h, m) that take the same room in every
# shape of the kernels, but for the emulation, which is held to one shape.
STEP, ROOM = (48, (24, 20, 9)) if EMULATED else (1024, (64, 256, 256))


@gpu_only("the CPU's workspace is another")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
def test_scratch_on_the_gpu_grows_with_the_rows_as_the_formula_says(monkeypatch, mode, dtype):
    monkeypatch.setenv("PDDM_EMULATION_MULTIPROCESSORS", "1")
    d, h, m = ROOM
    unit = make_unit(d, h, m)
    forward, backward = [], []
    for n in (STEP, 2 * STEP, 3 * STEP):
        labels, x = make_labels(n), make_features(n, d, dtype=dtype).requires_grad_()
        quads = unit.mine(x, labels, mode=mode)
        forward.append(counted(lambda: unit.mine(x, labels, mode=mode))["bytes_peak"])  # noqa: B023 - called at once
        total = quads.s_ij.sum() + quads.s_ik.sum() + quads.s_jl.sum()
        backward.append(counted(total.backward)["bytes_peak"])
    by_row = gpu_bytes_per_row(d, h, m, mode, dtype)
    assert forward[1] - forward[0] == forward[2] - forward[1] == STEP * by_row[0]
    if mode != "pair":  # which has as many slots as the labels say
        assert backward[1] - backward[0] == backward[2] - backward[1] <= STEP * by_row[1]
    assert min(backward) > 0


@gpu_only("the CPU's workspace is another")
@pytest.mark.parametrize(("queries", "gallery"), [(3, 300), (3, 9000), (20, 300), (20, 9000)])
def test_ranking_on_the_gpu_keeps_lists_of_some_k_entries(queries, gallery):
    d, h, m = 8, 8, 8
    unit, few, many = make_unit(d, h, m), make_features(queries, d), make_features(gallery, d)
    at = {k: counted(lambda k=k: pddm_ext.topk(few, many, k, unit))["bytes_peak"] for k in (1, 50, 300)}
    # Of each query the best so far; and twice a list of it, and of each 1,024 scores that are there at once.
    for k in (50, 300):
        scores = min(gallery, max((queries + gallery) * (h + m) // queries, k))
        lists = 1 + 2 * (-(-scores // 1024) + 1)
        assert at[k] - at[1] <= queries * (8 + 4) * k * lists


@gpu_only("the CPU's workspace is another")
def test_ranking_on_the_gpu_keeps_no_matrix():
    d, h, m, queries = 8, 8, 8, 96
    unit, few = make_unit(d, h, m), make_features(queries, d)
    at = [counted(lambda g=g: pddm_ext.topk(few, make_features(g, d), 5, unit))["bytes_peak"] for g in (200, 300, 400)]
    # The gallery once more, its unit rows, W_v times these, a norm, and at most hidden + combined scores.
    row = 4 * (d + padded(d, torch.float32) + padded(h, torch.float32) + 1)
    scores = 4 * (h + m)
    for grown in (at[2] - at[1], at[1] - at[0]):
        assert 100 * row <= grown <= 100 * (row + scores) + 4 * queries  # a whole number of scores for every query
    assert row + scores < 4 * queries


@cpu_only("tests/test_cuda.py has the GPU's")
def test_a_training_step_of_4096_rows_stays_within_64_mib():
    assert scratch(4096, "anchor", backward=True) <= 64 << 20


@cpu_only("tests/test_cuda.py has the GPU's")
def test_a_training_step_of_4096_rows_stays_within_64_mib_as_the_system_counts_it():
    # The counter knows only what it was told of; resident memory knows all.
    resource = pytest.importorskip("resource")
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in other units elsewhere")
    assert resource
    code = """
import resource, torch, pddm_ext
torch.set_num_threads(2)
def step(n):
    x, labels = torch.randn(n, 64, requires_grad=True), torch.arange(n) // 4
    unit = pddm_ext.PDDM(64)
    def run():
        quads = unit.mine(x, labels, mode="anchor")
        pddm_ext.QuadrupletLoss()(x, quads).backward()
    return run
step(64)()
run = step(4096)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = in_a_new_process(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64 << 10


@cpu_only("the GPU prepares the whole gallery")
def test_ranking_keeps_no_matrix():
    unit, queries = make_unit(8), make_features(64, 8)
    short, long = (make_features(g, 8) for g in (4096, 16384))
    peaks = [counted(lambda g=g: pddm_ext.topk(queries, g, 5, unit))["bytes_peak"] for g in (short, long)]
    assert peaks[0] == peaks[1] < 4 * 64 * 16384


def test_scratch_is_given_back():
    unit, x, labels = make_unit(16), make_features(100, 16), make_labels(100)
    first = counted(lambda: unit.mine(x, labels, mode="anchor"))["bytes_peak"]
    for _ in range(5):
        assert counted(lambda: unit.mine(x, labels, mode="anchor"))["bytes_peak"] == first


# --- Bits -------------------------------------------------------------------------------------------------------------


def everything(x: torch.Tensor, labels: torch.Tensor, unit: pddm_ext.PDDM) -> list[torch.Tensor]:
    results = []
    for mode in MODES:
        feats = x.clone().requires_grad_()
        quads = unit.mine(feats, labels, mode=mode)
        criterion = pddm_ext.QuadrupletLoss()
        # The embedding's part is PyTorch's own operators, and some of their gradients add up in any order on CUDA.
        loss = criterion.similarity(quads) if ON_CUDA else criterion(feats, quads)
        results += [*quads, *torch.autograd.grad(loss, [feats, *unit.parameters()])]
    feats = x.clone().requires_grad_()
    matrix = pddm_ext.score_matrix(feats, unit)
    weight = make_features(*matrix.shape, seed=5, dtype=matrix.dtype)
    results += [matrix, *torch.autograd.grad((matrix * weight).sum(), [feats, *unit.parameters()])]
    results += [pddm_ext.score_matrix(x[:11], unit, x), *pddm_ext.topk(x[:40], x, 9, unit)]
    return results


@cpu_only("it has threads")
@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(capability, dtype, normalize_input):
    unit, labels = make_unit(21, 17, 30, normalize_input=normalize_input), make_labels(130)
    x = make_features(130, 21, dtype=dtype)
    x[100:104] = x[3]  # ties that threads might settle by arrival
    with threads(1):
        expected = everything(x, labels, unit)
    for count in (2, 3, 7):
        with threads(count):
            assert_same_bits(everything(x, labels, unit), expected)


@cpu_only("it has threads")
@settings(max_examples=25)
@given(batches(dtypes=(torch.float32,), most=60))
def test_the_number_of_threads_changes_no_bit_of_any_batch(batch: Batch):
    with instruction_set(batch.capability):
        results = []
        for count in (1, 4):
            with threads(count):
                results.append([batch.unit.mine(batch.feats, batch.labels, mode=mode) for mode in MODES])
    assert_same_bits(*results)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_call_gives_the_same_bits(dtype, precision):
    """Every entry, and back."""
    n = 50 if EMULATED else 130
    unit, x, labels = make_unit(21, 17, 30), make_features(n, 21, dtype=dtype), make_labels(n)
    x[40:44] = x[3].clone()  # ties that might be settled by arrival
    with matmul_precision(precision):
        expected = everything(x, labels, unit)
        for _ in range(1 if EMULATED else 3):
            assert_same_bits(everything(x, labels, unit), expected)
