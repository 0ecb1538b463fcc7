"""The compiler sees the operators: fake kernels, schemas and gradients agree with the real ones, in one graph."""

import copy

import pytest
import torch

import pddm_ext
from helpers import DEVICE, assert_same_bits, host_only, make_features, make_labels, make_unit, threads
from pddm_ext import ops, reference
from pddm_ext.quadruplets import MODES


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    with threads(1):  # tracing is many small operations
        yield
    torch._dynamo.reset()


def loss_calls(x: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> dict[str, tuple]:
    *indices, s_ij, s_ik, s_jl, valid = make_unit(5).mine(x.detach(), labels, mode="anchor")
    scores = [s.detach().to(dtype).requires_grad_(x.requires_grad) for s in (s_ij, s_ik, s_jl)]
    margins = (0.5, 1.0, 0.5)
    loss, opened = torch.ops.pddm.quadruplet_loss(x.detach(), *(s.detach() for s in scores), *indices, valid, *margins)
    return {
        "quadruplet_loss": (torch.ops.pddm.quadruplet_loss, (x, *scores, *indices, valid, *margins)),
        "quadruplet_loss_backward": (
            torch.ops.pddm.quadruplet_loss_backward,
            (loss.detach(), opened, x, *scores, *indices, valid, 0.5),
        ),
    }


def operator_calls(dtype: torch.dtype, requires_grad: bool) -> dict[str, tuple]:
    unit = make_unit(5, 4, 3).requires_grad_(requires_grad)
    x, labels = make_features(9, 5, dtype=dtype).requires_grad_(requires_grad), make_labels(9, per_class=3)
    i, j = torch.tensor([[0, 3, 3, 8], [1, 2, 3, 0]], device=DEVICE)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    p = ops.unit_arguments(unit)
    return {
        **{f"mine {mode}": (torch.ops.pddm.mine, (x, labels, *p, number)) for number, mode in enumerate(MODES)},
        **{
            f"mine_candidates {mode}": (torch.ops.pddm.mine_candidates, (x, labels, *p, number, 2))
            for number, mode in enumerate(MODES)
        },
        **{
            f"mine_references {mode}": (
                torch.ops.pddm.mine_references,
                (
                    x,
                    labels.abs(),
                    x.detach().flip(0).requires_grad_(requires_grad),
                    labels.abs().flip(0),
                    i,
                    j,
                    *p,
                    number,
                ),
            )
            for number, mode in enumerate(MODES)
            for i, j in ((None, None), (labels, labels.flip(0)))[number % 2 :][:1]
        },
        "score_pairs": (torch.ops.pddm.score_pairs, (x, i, j, *p)),
        "score_matrix": (torch.ops.pddm.score_matrix, (x, -1, *p)),
        "score_matrix of two": (torch.ops.pddm.score_matrix, (x, 4, *p)),
        "topk": (torch.ops.pddm.topk, (x[:4].detach(), x.detach(), 3, *(t.detach() for t in p[:8]), *p[8:])),
        **loss_calls(x, labels, out),
        "score_pairs_backward": (
            torch.ops.pddm.score_pairs_backward,
            (torch.ones(4, dtype=out, device=DEVICE), x, i, j, *p),
        ),
        "mine_backward": (
            torch.ops.pddm.mine_backward,
            (torch.ones(4, dtype=out, device=DEVICE), None, torch.ones(4, dtype=out, device=DEVICE), x, i, j, j, i, *p),
        ),
        "mine_listed": (
            torch.ops.pddm.mine_listed,
            (
                x.detach(),
                torch.stack([labels.roll(3), labels.roll(1)], 1).abs() % 9,
                1,
                *(t.detach() for t in p[:8]),
                *p[8:],
            ),
        ),
        "score_matrix_backward": (
            torch.ops.pddm.score_matrix_backward,
            (torch.ones(9, 9, dtype=out, device=DEVICE), x, -1, *p),
        ),
    }


@pytest.mark.parametrize(
    ("dtype", "requires_grad"), [(torch.float32, False), (torch.float64, True), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("name", list(operator_calls(torch.float32, False)))
def test_opcheck(name, dtype, requires_grad):
    operator, arguments = operator_calls(dtype, requires_grad)[name]
    if requires_grad and name.endswith("_backward"):
        # opcheck's comparison of traced gradients goes back through every result, which these refuse by design.
        utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
        torch.library.opcheck(operator.default, arguments, test_utils=utilities)
        return
    torch.library.opcheck(operator.default, arguments)


@host_only("the operator is the CPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_the_choice_of_candidates(dtype):
    rows, classes = make_features(20, 9, dtype=dtype).T, make_labels(9)
    torch.library.opcheck(torch.ops.pddm.nearest.default, (rows, classes, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_the_largest(dtype):
    values, labels = make_features(20, 9, dtype=dtype).T, make_labels(29)
    torch.library.opcheck(torch.ops.pddm.largest.default, (values, labels[:9], labels[9:], 3))


def test_opcheck_of_what_rows_ask_for():
    lists = torch.tensor([[1, 2], [0, -1], [-1, -1]], device=DEVICE)
    torch.library.opcheck(torch.ops.pddm.asked_pairs.default, (lists,))
    scores, places = make_features(2, 2)[0], torch.tensor([[0, 1], [0, -1], [-1, -1]], device=DEVICE)
    torch.library.opcheck(torch.ops.pddm.best_asked.default, (scores, places, lists, True))


def test_opcheck_of_strided_inputs():
    unit, x = make_unit(5).requires_grad_(False), make_features(5, 9).T
    torch.library.opcheck(torch.ops.pddm.mine.default, (x, make_labels(18)[::2], *ops.unit_arguments(unit), 1))
    torch.library.opcheck(torch.ops.pddm.score_matrix.default, (x, 3, *ops.unit_arguments(unit)))


def training_step(mode: str):
    criterion = pddm_ext.QuadrupletLoss()

    def step(net: torch.nn.Module, unit: pddm_ext.PDDM, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        feats = net(images)
        return criterion(feats, pddm_ext.mine_and_score(feats, labels, unit, mode=mode))

    return step


def compare_steps(step, compiled, n: int = 20) -> None:
    net, unit = torch.nn.Linear(6, 5).to(DEVICE), make_unit(5)
    images, labels = make_features(n, 6), make_labels(n)
    results = []
    for function in (step, compiled):
        leaves = copy.deepcopy([net, unit])
        loss = function(*leaves, images, labels)
        loss.backward()
        results.append([loss.detach(), *(p.grad for module in leaves for p in module.parameters())])
    # The kernels are the same; the fused elementwise code around them may contract and reorder sums of n · d terms.
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "anchor"])
def test_a_whole_training_step_compiles_into_one_graph(mode):
    step = training_step(mode)
    compare_steps(step, torch.compile(step, fullgraph=True))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_traces_with_dynamic_shapes(mode):
    step = training_step(mode)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 28, 9):
        compare_steps(step, compiled, n)


def test_a_batch_of_another_size_does_not_break_a_compiled_step():
    step = training_step("anchor")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (20, 24, 31):
        compare_steps(step, compiled, n)


def compilations(function, *calls) -> int:
    """How many graphs a function is compiled into over these calls."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for call in calls:
        compiled(*call())
    return counter.frame_count


@pytest.mark.parametrize("mode", ["batch", "anchor"])
def test_sizes_that_change_are_compiled_twice(mode):
    """The first size as it is, and then once for all: of the batch, of candidates, and of a bank that fills."""
    unit, sizes = make_unit(5), (20, 24, 31, 8, 57, 20, 33, 12)
    given = [(make_features(n, 5), make_labels(n)) for n in sizes]

    def plain(feats, labels):
        return pddm_ext.mine_and_score(feats, labels, unit, mode=mode).s_ik

    def by_candidates(feats, labels):
        return pddm_ext.mine_and_score(feats, labels, unit, mode=mode, candidates=3).s_ik

    def among(feats, labels, ids, ref_feats, ref_labels, ref_ids):
        among = {"ref_feats": ref_feats, "ref_labels": ref_labels, "ids": ids, "ref_ids": ref_ids}
        return pddm_ext.mine_and_score(feats, labels, unit, mode=mode, **among).s_ik

    bank, calls = pddm_ext.MemoryBank(70, 5, device=DEVICE), []
    for feats, labels in given:
        ids = torch.arange(len(labels), device=DEVICE)
        bank.add(feats, labels, ids)
        calls.append((feats, labels, ids, *(x.clone() for x in bank.references().values())))
    for function in (plain, by_candidates):
        assert compilations(function, *((lambda one=one: one) for one in given)) == 2
    # The bank's size changes at the second call and is another number than the batch's from the first; the last calls
    # find it full.
    assert compilations(among, *((lambda one=one: one) for one in calls)) <= 3


@pytest.mark.parametrize(
    "call", ["score_pairs", "score_matrix", "score_matrix of two", "topk", "unit", "method", "some"]
)
def test_every_entry_compiles_into_one_graph(call):
    unit, x, labels = make_unit(5), make_features(12, 5), make_labels(12)
    i = torch.arange(12, device=DEVICE)
    functions = {
        "score_pairs": lambda x: pddm_ext.score_pairs(x, i, i.flip(0), unit),
        "score_matrix": lambda x: pddm_ext.score_matrix(x, unit),
        "score_matrix of two": lambda x: pddm_ext.score_matrix(x[:5], unit, x[5:]),
        "topk": lambda x: pddm_ext.topk(x[:3], x, 4, unit)[1],
        "unit": lambda x: unit(x, x.flip(0)),
        "method": lambda x: unit.mine(x, labels, mode="anchor").s_ik,
        "some": lambda x: unit.mine(x, labels, mode="anchor", candidates=3).s_ik,
    }
    compiled = torch.compile(functions[call], fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), functions[call](x))


def test_autocast_holds_in_a_compiled_graph():
    unit, x, labels = make_unit(5), make_features(12, 5), make_labels(12)

    def mined(x):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return unit.mine(x, labels, mode="anchor").s_ij

    assert_same_bits(torch.compile(mined, fullgraph=True, backend="aot_eager")(x), mined(x))
    assert_same_bits(mined(x), unit.mine(x.bfloat16(), labels, mode="anchor").s_ij)


@host_only("others are checked by the kernels")
def test_a_row_number_out_of_range_is_still_an_error_when_compiled():
    unit, x = make_unit(5), make_features(12, 5)
    compiled = torch.compile(lambda x, i: pddm_ext.score_pairs(x, i, i, unit), fullgraph=True, backend="aot_eager")
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        compiled(x, torch.tensor([3, 12]))


def test_mining_with_the_default_unit_compiles_where_it_exists():
    x, labels = make_features(12, 31), make_labels(12)
    pddm_ext.default_unit(31, DEVICE)
    compiled = torch.compile(lambda x: pddm_ext.mine_and_score(x, labels).s_ij, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), pddm_ext.mine_and_score(x, labels).s_ij)


def test_fake_shapes_are_the_real_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode

    unit, x, labels = make_unit(5, 4, 3), make_features(12, 5), make_labels(12)
    for mode, some in (("batch", None), ("anchor", None), ("batch", 3), ("anchor", 3)):
        real = unit.mine(x, labels, mode=mode, candidates=some)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode:
            fake = unit.mine(fake_mode.from_tensor(x), fake_mode.from_tensor(labels), mode=mode, candidates=some)
        assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


def test_the_reference_compiles_too():
    unit, x, labels = reference.PDDM(5).to(DEVICE), make_features(12, 5), make_labels(12)
    compiled = torch.compile(
        lambda x: reference.mine_and_score(x, labels, unit, mode="anchor").s_ij, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), reference.mine_and_score(x, labels, unit, mode="anchor").s_ij)
