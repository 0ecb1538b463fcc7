"""On a GPU: what PyTorch promises of its own operators there, and the same quadruplets as on the CPU.

The rest of the suite runs there too: PDDM_TEST_DEVICE=cuda pytest tests
"""

import copy

import pytest
import torch

import pddm_ext
from helpers import (
    DEVICE,
    FLOATS,
    MODES,
    ON_CUDA,
    assert_same_bits,
    make_features,
    make_labels,
    make_unit,
    matmul_precision,
)
from processes import in_a_new_process
from truth import assert_mined, assert_within, bound_of, decided, truth

pytestmark = pytest.mark.skipif(not ON_CUDA, reason="PDDM_TEST_DEVICE is not cuda")


def everything(x: torch.Tensor, labels: torch.Tensor, unit: pddm_ext.PDDM) -> list[torch.Tensor]:
    """Of every entry, the way back included."""
    results = [*pddm_ext.topk(x[:40], x, 9, unit)]
    for mode in MODES:
        feats = x.clone().requires_grad_()
        quads = unit.mine(feats, labels, mode=mode)
        loss = pddm_ext.QuadrupletLoss().similarity(quads)
        results += [*(field.detach() for field in quads), *torch.autograd.grad(loss, [feats, *unit.parameters()])]
    feats = x.clone().requires_grad_()
    matrix = pddm_ext.score_matrix(feats, unit)
    return [*results, matrix.detach(), *torch.autograd.grad(matrix.square().sum(), [feats, *unit.parameters()])]


# --- As the CPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_mined_indices_are_the_cpus_where_the_margin_exceeds_the_bounds(dtype, mode):
    n = 400
    unit, x, labels = make_unit(64, 48, 40), make_features(n, 64, dtype=dtype), make_labels(n)
    ours = unit.mine(x, labels, mode=mode)
    cpus = copy.deepcopy(unit).cpu().mine(x.cpu(), labels.cpu(), mode=mode)
    for quads in (ours, cpus):
        assert_mined(quads, x, labels, unit, mode)
    assert_same_bits(ours.valid, cpus.valid)

    ours, labels = type(ours)(*(field.detach().cpu() for field in ours)), labels.cpu()
    scores, bound = truth(x, unit), bound_of(x, unit)
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(n, dtype=torch.bool)
    i, j, k, l = ours[:4]  # noqa: E741
    if mode == "batch":
        upper = positive.triu().reshape(1, -1)
        sure = decided(scores.reshape(1, -1), bound.reshape(1, -1), upper, i * n + j, smallest=True)
    elif mode == "anchor":
        sure = decided(scores[i], bound[i], positive[i], j, smallest=True)
    else:
        sure = torch.ones_like(ours.valid)
    sure_of_k = sure & decided(scores[i], bound[i], ~same[i], k, smallest=False)
    sure_of_l = sure & decided(scores[j], bound[j], ~same[j], l, smallest=False)
    for mask, name in ((sure, "i"), (sure, "j"), (sure_of_k, "k"), (sure_of_l, "l")):
        assert torch.equal(getattr(ours, name)[mask], getattr(cpus, name)[mask])
    if dtype in (torch.float32, torch.float64):
        assert sure_of_k.double().mean() > 0.8


def test_batch_mode_reaches_twenty_thousand_rows():
    n = 20_000
    # In float64 no margin is within rounding.
    unit, x, labels = make_unit(6, 5, 4), make_features(n, 6, dtype=torch.float64), make_labels(n)
    ours, cpus = unit.mine(x, labels), copy.deepcopy(unit).cpu().mine(x.cpu(), labels.cpu())
    assert_same_bits(ours[:4], cpus[:4])
    for a, b in zip(ours[4:7], cpus[4:7], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-12)
    single = unit.mine(x.float(), labels)
    torch.testing.assert_close(single.s_ij.double(), ours.s_ij, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(20, 2048, 2048, 2048), (70, 512, 512, 512), (12, 8, 4096, 10)], ids=str)
def test_large_units_score_within_their_bounds(size, dtype, precision):
    # 4,096 hidden numbers do not fit in the shared memory of any GPU.
    if precision == "high" and dtype != torch.float32:
        pytest.skip("the precision of float32 products only")
    n, d, h, m = size
    unit, x = make_unit(d, h, m), make_features(n, d, dtype=dtype)
    with matmul_precision(precision):
        got = pddm_ext.score_matrix(x, unit)
        assert_within(got, truth(x, unit), bound_of(x, unit))
        assert_mined(unit.mine(x, make_labels(n), mode="anchor"), x, make_labels(n), unit, "anchor")
    if precision == "high":
        assert (got != pddm_ext.score_matrix(x, unit)).any()  # it did round


# --- Bits, streams and devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_run_gives_the_same_bits(dtype):
    # Enough pairs that many blocks race to offer their bests.
    unit, x, labels = make_unit(48, 40, 32), make_features(700, 48, dtype=dtype), make_labels(700)
    x[600:650] = x[3].clone()
    expected = everything(x, labels, unit)
    for _ in range(10):
        assert_same_bits(everything(x, labels, unit), expected)


def test_streams_at_once_get_the_same_bits():
    unit, x, labels = make_unit(48, 40, 32), make_features(300, 48), make_labels(300)
    expected = everything(x, labels, unit)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(everything(x, labels, unit))
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(result, expected)


@pytest.mark.skipif(not ON_CUDA or torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_work_is_done_on_the_inputs_device_whichever_is_current():
    unit, x, labels = make_unit(48, 40, 32), make_features(100, 48), make_labels(100)
    expected = everything(x, labels, unit)
    with torch.cuda.device(0):
        got = everything(x.to("cuda:1"), labels.to("cuda:1"), copy.deepcopy(unit).to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert {t.device for t in got} == {torch.device("cuda:1")}
    for a, b in zip(got, expected, strict=True):  # the devices may differ
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-3, atol=1e-4)


def test_another_device_than_the_features_is_refused():
    unit, x, labels = make_unit(8), make_features(12, 8), make_labels(12)
    i = torch.arange(12, device=DEVICE)
    calls = [
        lambda: pddm_ext.mine_and_score(x, labels, copy.deepcopy(unit).cpu()),
        lambda: pddm_ext.mine_and_score(x, labels.cpu(), unit),
        lambda: pddm_ext.mine_and_score(x.cpu(), labels.cpu(), unit),
        lambda: pddm_ext.score_pairs(x, i.cpu(), i, unit),
        lambda: pddm_ext.score_matrix(x, copy.deepcopy(unit).cpu()),
        lambda: pddm_ext.score_matrix(x, unit, x.cpu()),
        lambda: pddm_ext.topk(x, x.cpu(), 1, unit),
        lambda: unit(x, x.cpu()),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device, .* (cpu|cuda:\d+)"):
            call()


def test_the_same_process_serves_the_cpu():
    unit, x, labels = make_unit(8, device="cpu"), make_features(12, 8, device="cpu"), make_labels(12, device="cpu")
    quads = unit.mine(x, labels, mode="anchor")
    assert quads.i.device.type == "cpu"
    assert_mined(quads, x, labels, unit, "anchor")


def test_a_row_number_out_of_range_is_an_error_of_the_device():
    # In a process of its own, for it ends the device's work there.
    code = """
import torch, pddm_ext
x, unit = torch.randn(8, 4, device="cuda"), pddm_ext.PDDM(4).cuda()
i = torch.tensor([0, 8], device="cuda")
try:
    pddm_ext.score_pairs(x, i, i, unit)
    torch.cuda.synchronize()
except RuntimeError as error:
    print("refused:", error, flush=True)
"""
    done = in_a_new_process(code)
    assert "refused: " in done.stdout, done.stdout + done.stderr


# --- The host does not wait -------------------------------------------------------------------------------------------


def training_step(feats, labels, unit, mode):
    """Results of one step, which also moves the unit's parameters."""
    x = feats.detach().requires_grad_()
    quads = unit.mine(x, labels, mode=mode)
    loss = pddm_ext.QuadrupletLoss()(x, quads)
    d_x, *d_unit = torch.autograd.grad(loss, [x, *unit.parameters()])
    with torch.no_grad():
        for p, d in zip(unit.parameters(), d_unit, strict=True):
            p.sub_(d, alpha=0.01)
    return [*(field.detach() for field in quads), loss.detach(), d_x]


@pytest.mark.parametrize("mode", ["batch", "anchor"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_step_does_not_synchronise_with_the_host(dtype, mode):
    unit, x, labels = make_unit(32), make_features(200, 32, dtype=dtype), make_labels(200)
    training_step(x, labels, unit, mode)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(x, labels, unit, mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["batch", "anchor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_replays_from_a_cuda_graph(dtype, mode):
    n = 120
    batches = [(make_features(n, 32, seed=s, dtype=dtype), make_labels(n, seed=s)) for s in range(4)]
    batches.append((batches[0][0], torch.zeros_like(batches[0][1])))  # nothing valid
    captured, eager = make_unit(32, 24, 16), make_unit(32, 24, 16)
    x, labels = (t.clone() for t in batches[0])

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            training_step(x, labels, captured, mode)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = training_step(x, labels, captured, mode)
    captured.load_state_dict(eager.state_dict())

    for feats, ids in batches:
        x.copy_(feats)
        labels.copy_(ids)
        graph.replay()
        expected = training_step(feats, ids, eager, mode)
        assert_same_bits(results[:-1], expected[:-1])
        # The loss's own gradient is PyTorch's, which adds up in any order.
        torch.testing.assert_close(results[-1], expected[-1])
        assert_same_bits(list(captured.parameters()), list(eager.parameters()))


# --- Memory -----------------------------------------------------------------------------------------------------------


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_a_step_of_16384_rows_takes_no_more_than_128_mib_beyond_its_inputs_and_outputs():
    n, d = 16384, 512
    unit, labels = make_unit(d), make_labels(n)
    x = make_features(n, d, dtype=torch.bfloat16).requires_grad_()

    def peak(call) -> tuple[int, tuple[torch.Tensor, ...]]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - bytes_of(*results), results

    forward, quads = peak(lambda: unit.mine(x, labels, mode="anchor"))
    total = quads.s_ij.sum() + quads.s_ik.sum() + quads.s_jl.sum()
    backward, _ = peak(lambda: torch.autograd.grad(total, [x, *unit.parameters()]))
    assert forward <= 128 << 20
    assert backward <= 128 << 20


# --- Mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_with_autocast_and_a_scaler_survives_an_overflow(dtype):
    net, unit = torch.nn.Linear(24, 16).to(DEVICE), make_unit(16, 12, 8)
    images, labels = make_features(64, 24), make_labels(64)
    parameters = [*net.parameters(), *unit.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**8)
    criterion = pddm_ext.QuadrupletLoss()

    def step(times: float) -> bool:
        """Whether it moved the parameters."""
        before = [p.detach().clone() for p in parameters]
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=dtype):
            feats = net(images)
            assert feats.dtype == dtype
            quads = unit.mine(feats, labels, mode="anchor")
            loss = criterion(feats, quads)
        assert quads.s_ij.dtype == torch.float32
        scaler.scale(loss * times).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(p.isfinite().all() for p in parameters)
        return not all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))

    assert step(1.0)
    assert scaler.get_scale() == 2.0**8
    assert not step(3e38)
    assert scaler.get_scale() == 2.0**7
    assert step(1.0)
    assert scaler.get_scale() == 2.0**7
