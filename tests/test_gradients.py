"""Gradients are right: gradcheck in float64, the reference's autograd, and zeros where nothing is valid."""

import copy

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import pddm_ext
from derivatives import ENTRIES, assert_close_relatively, entries, gradients
from helpers import (
    CAPABILITIES,
    DEVICE,
    MODES,
    ON_GPU_KERNELS,
    PARAMETERS,
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
    on_one_thread,
    random_rows,
)
from pddm_ext import reference
from truth import assert_within, bound_of, in_double, truth


@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
@on_one_thread
def test_gradcheck(capability, entry, normalize_input):
    # float64 and random inputs: no relu lies within gradcheck's step of its kink, and no margin of the mining either.
    unit = make_unit(2, 3, 4, normalize_input=normalize_input, seed=3).double()
    x = make_features(5, 2, dtype=torch.float64).requires_grad_()
    scores = entries(5)[entry][0]
    parameters = [unit.get_parameter(name).detach().clone().requires_grad_() for name in PARAMETERS]
    for name in PARAMETERS:  # plain attributes, so that gradcheck's own tensors can be put there
        layer, kind = name.split(".")
        del getattr(unit, layer)._parameters[kind]

    def function(feats: Tensor, *values: Tensor) -> Tensor:
        for name, value in zip(PARAMETERS, values, strict=True):
            layer, kind = name.split(".")
            setattr(getattr(unit, layer), kind, value)
        return scores(feats, unit)

    assert torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize("entry", ["matrix", "anchor"])
def test_gradcheck_of_the_loss(entry):
    unit = make_unit(3, 4, 5, seed=3).double()
    labels = make_labels(9, per_class=3)
    loss = pddm_ext.QuadrupletLoss(alpha=3.0, beta=4.0)  # wide enough that most hinges are open

    def function(feats: Tensor) -> Tensor:
        if entry == "matrix":
            quads = reference.select_quadruplets(pddm_ext.score_matrix(feats, unit), labels, "pair")
        else:
            quads = unit.mine(feats, labels, mode=entry)
        return loss(feats, quads)

    x = make_features(9, 3, dtype=torch.float64).requires_grad_()
    # The loss is PyTorch's own operators, and some of their gradients add up in any order on CUDA.
    assert torch.autograd.gradcheck(function, x, nondet_tol=1e-12 if DEVICE.type == "cuda" else 0.0)


@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("size", [(5, 1, 1, 1), (14, 17, 13, 25), (20, 33, 29, 7), (40, 16, 24, 12)], ids=str)
def test_float64_gradients_are_those_of_the_reference(capability, size, entry, normalize_input):
    # 40 rows give 1,600 pairs: more than one chunk of the backward. Two float64 computations of one formula agree to
    # some 1e3 · 2^-53 of the largest entry (sums of up to 1,600 terms, and a division by norms of order 1).
    n, d, h, m = size
    unit = make_unit(d, h, m, normalize_input=normalize_input).double()
    x = make_features(n, d, dtype=torch.float64)
    fused, plain = entries(n)[entry]
    expected = on_one_thread(gradients)(plain, x, in_double(unit))
    assert_close_relatively(gradients(fused, x, unit), expected, 1e-11)


@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("entry", ["pairs", "matrix", "rectangle", "call", "anchor"])
def test_float32_gradients_are_as_good_as_autograd_through_the_reference(capability, entry, normalize_input):
    """Both are float32 roundings of one formula, so ours may err by what PyTorch's own errs, times 8 for another order
    of the sums (one by one here, in blocks there), plus a few roundings for where PyTorch is exact by luck.

    The truth is the float64 kernel on the same numbers, compared with the reference above. Relus flip where a
    preactivation lies within rounding of 0, which no tolerance covers: these inputs have none.
    """
    n, d, h, m = 24, 33, 13, 25
    unit = make_unit(d, h, m, normalize_input=normalize_input, seed=1)
    x = make_features(n, d, seed=1)
    assert smallest_preactivation(x, unit) > 1e-5  # rounding is below 4e-6 here: (33 + 4) · 2^-24 · Σ|w||x|
    fused, plain = entries(n)[entry]
    expected = gradients(fused, x.double(), copy.deepcopy(unit).double())
    peer = reference.PDDM(d, h, m, normalize_input=normalize_input).to(DEVICE)
    peer.load_state_dict(unit.state_dict())
    ours, theirs = gradients(fused, x, unit), on_one_thread(gradients)(plain, x, peer)
    assert_as_good(ours, theirs, expected, 2.0**-24)


def assert_as_good(ours: list[Tensor], theirs: list[Tensor], expected: list[Tensor], rounding: float) -> None:
    for name, a, b, exact in zip(["feats", *PARAMETERS], ours, theirs, expected, strict=True):
        scale = exact.abs().max()
        error, allowed = (a - exact).abs(), 8 * (b - exact).abs().max() + 8 * rounding * scale
        # Gradients are rounded to the dtype of what they belong to.
        allowed = allowed + (torch.finfo(a.dtype).eps * exact.abs() if a.dtype.itemsize == 2 else 0)
        assert (error <= allowed).all(), f"{name}: {(error / scale).max():.3g} of its largest"
        assert allowed.max() < 5e3 * max(rounding, 2.0**-22) * scale, f"{name}: the comparison says nothing"


def settle_relus(unit: pddm_ext.PDDM) -> None:
    """Biases so large that every relu is open or shut whatever its input, and no rounding can flip one."""
    with torch.no_grad():
        for layer, norm in ((unit.u, 2.0), (unit.v, 1.0), (unit.c, 2.0**0.5)):  # of what can enter it
            largest = 1.1 * norm * layer.weight.norm(dim=1) + 0.1
            # Two of three are open.
            shut = torch.arange(len(largest), device=largest.device) % 3 == 2
            layer.bias.copy_(torch.where(shut, -largest, largest))


class _RoundedLinear(torch.autograd.Function):
    """F.linear as the GPU's backward has its products: operands rounded to so many significant bits, sums exact."""

    @staticmethod
    def rounded(t: Tensor, bits: int) -> Tensor:
        mantissa, exponent = torch.frexp(t)
        return torch.ldexp(torch.round(mantissa * 2**bits) / 2**bits, exponent)

    @staticmethod
    def forward(ctx, x, weight, bias, bits):
        x, weight = (_RoundedLinear.rounded(t, bits) for t in (x, weight))
        ctx.save_for_backward(x, weight)
        ctx.bits = bits
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx, upstream):
        x, weight = ctx.saved_tensors
        g = _RoundedLinear.rounded(upstream, ctx.bits)
        d_weight = g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return g @ weight, d_weight, upstream.reshape(-1, g.shape[-1]).sum(0), None


@gpu_only("the CPU goes back in float32")
@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("entry", ["pairs", "matrix", "rectangle", "call"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(18, 33, 13, 25), (15, 68, 96, 72), (17, 72, 264, 136)], ids=str)
def test_gradients_are_as_good_as_autograd_with_rounded_operands(size, dtype, entry, normalize_input):
    """As above, with the reference's products rounded as the GPU's: as TF32 rounds for float32 at precision "high" and
    for float16, which so keeps float32's range, and as bfloat16 rounds for bfloat16. The larger sizes have products in
    large blocks, copied 16 bytes at a time, the last one with what is left over beside full blocks.
    """
    n, d, h, m = size
    bits = 8 if dtype == torch.bfloat16 else 11
    unit = make_unit(d, h, m, normalize_input=normalize_input, seed=1)
    settle_relus(unit)
    x = make_features(n, d, seed=1, dtype=dtype)
    fused, plain = entries(n)[entry]
    double = in_double(unit)
    expected = gradients(plain, x.double(), double)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lambda *operands: _RoundedLinear.apply(*operands, bits))
        theirs = gradients(plain, x.double(), double)
    with matmul_precision("high"):
        ours = gradients(fused, x, unit)
    assert_as_good(ours, theirs, expected, 2.0 ** -(bits + 1))


@gpu_only("the CPU has one way for all widths")
@pytest.mark.parametrize("hidden", [512, 520, 1024, 1032, 2048, 2056])
def test_bfloat16_gradients_of_wide_units_are_as_good_as_the_float32_ones(hidden):
    """Rows of up to so many numbers stay in registers on their way through a norm."""
    d, m, n = 8, 8, 8
    unit = make_unit(d, hidden, m, seed=1)
    settle_relus(unit)
    x = make_features(n, d, seed=1, dtype=torch.bfloat16)
    scores = entries(n)["matrix"][0]
    exact = gradients(scores, x.double(), in_double(unit))
    for name, a, b in zip(["feats", *PARAMETERS], gradients(scores, x, unit), exact, strict=True):
        assert (a - b).abs().max() <= 2.0**-6 * b.abs().max(), name


def smallest_preactivation(x: Tensor, unit: reference.PDDM) -> float:
    """Distance of the nearest relu from its kink, over all pairs of different rows."""
    seen: list[Tensor] = []
    relu = torch.nn.functional.relu

    def spy(t: Tensor) -> Tensor:
        seen.append(t.detach().abs().min())
        return relu(t)

    i, j = torch.combinations(torch.arange(len(x), device=DEVICE)).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "relu", spy)
        reference.score_pairs(x.double(), i, j, in_double(unit))
    assert len(seen) == 3
    return torch.stack(seen).min().item()


@settings(max_examples=60)
@given(batches(dtypes=(torch.float64,), most=30))
def test_gradients_of_any_batch_are_those_of_the_reference(batch: Batch):
    """Duplicates, opposites, zero rows and dead relus in float64, where only exact kinks remain: |0|, and a norm of 0.

    A clamped norm multiplies the features' gradient by 1e12: of a row of zeros, and of v = 0 with normalize_input (by
    1e24 where both are). Where what it multiplies cancels, in the sum over the pairs or on the way through the row's
    own norm, rounding leaves 2^-53 of each pair's term, and a term is of the parameters' gradients' order. So much is
    not compared, there.
    """
    x, unit = batch.feats, batch.unit.double()
    n = len(x)
    i, j = all_pairs(n, n)
    ahead = i <= j
    i, j = i[ahead], j[ahead]
    weight = make_features(len(i), 1, dtype=torch.float64)[:, 0]
    expected = on_one_thread(gradients)(
        lambda x, unit: reference.score_pairs(x, i, j, unit), x, in_double(unit), weight
    )
    with instruction_set(batch.capability):
        got = gradients(lambda x, unit: pddm_ext.score_pairs(x, i, j, unit), x, unit, weight)
    f = torch.nn.functional.normalize(x, dim=-1)
    clamps = int((f == 0).all(-1).any()) + int(unit.normalize_input and (f[i] == -f[j]).all(-1).any())
    term = max((g.abs().max().item() for g in expected[1:]), default=0.0)
    assert_close_relatively(got, expected, 1e-9, lost=len(i) * term * 1e12**clamps * 2**-53 if clamps else 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_mined_scores_have_the_gradients_of_their_pairs(capability, mode):
    unit, labels = make_unit(9, 6, 7), make_labels(40, per_class=3)
    labels[5] = 1000  # a slot that is not valid
    x = make_features(40, 9)
    with torch.no_grad():
        q = unit.mine(x, labels, mode=mode)
    i, j, k, l = (t[q.valid] for t in q[:4])  # noqa: E741

    def mined(x, unit):
        q = unit.mine(x, labels, mode=mode)
        return torch.cat([s[q.valid] for s in q[4:7]])

    def listed(x, unit):
        return pddm_ext.score_pairs(x, torch.cat([i, i, j]), torch.cat([j, k, l]), unit)

    if ON_GPU_KERNELS:  # where other pairs beside them may change the order of the sums
        first, second = torch.cat([i, i, j]).cpu(), torch.cat([j, k, l]).cpu()
        expected, bound = (t[first, second] for t in (truth(x, unit), bound_of(x, unit)))
        assert_within(mined(x, unit), expected, bound)
        assert_close_relatively(gradients(mined, x, unit), gradients(listed, x, unit), 120 * 2.0**-24)
        return
    assert_same_bits(mined(x, unit), listed(x, unit))
    assert_same_bits(gradients(mined, x, unit), gradients(listed, x, unit))


@pytest.mark.parametrize("wanted", [("s_ij",), ("s_ik",), ("s_jl",), ("s_ij", "s_jl")])
def test_gradient_through_some_of_the_scores_only(wanted):
    unit, x, labels = make_unit(9, 6, 7).double(), make_features(20, 9, dtype=torch.float64), make_labels(20)

    def some(package):
        return lambda x, unit: torch.cat(
            [getattr(package.mine_and_score(x, labels, unit, mode="anchor"), name) for name in wanted]
        )

    assert_close_relatively(gradients(some(pddm_ext), x, unit), gradients(some(reference), x, in_double(unit)), 1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "labels",
    [torch.zeros(12, dtype=torch.int64, device=DEVICE), torch.arange(12, device=DEVICE)],
    ids=["one class", "singletons"],
)
def test_nothing_valid_is_a_loss_of_zero_with_zero_gradients(labels, mode):
    unit, x = make_unit(5), make_features(12, 5).requires_grad_()
    loss = pddm_ext.QuadrupletLoss()(x, unit.mine(x, labels, mode=mode))
    assert loss.item() == 0
    grads = torch.autograd.grad(loss, [x, *unit.parameters()], allow_unused=True, materialize_grads=True)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_loss_of_an_empty_or_single_row_batch_is_zero_and_can_go_back(n, mode):
    unit, x = make_unit(5), make_features(n, 5).requires_grad_()
    loss = pddm_ext.QuadrupletLoss()(x, unit.mine(x, torch.arange(n, device=DEVICE), mode=mode))
    assert loss.item() == 0
    loss.backward()
    assert x.grad.shape == (n, 5)
    assert (x.grad == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_over_nothing_valid_is_never_nan(bad):
    # The first row is what an index of −1 might be read as.
    unit, x = make_unit(5), make_features(8, 5)
    x[0] = bad
    x.requires_grad_()
    loss = pddm_ext.QuadrupletLoss()(x, unit.mine(x, torch.zeros(8, dtype=torch.int64, device=DEVICE), mode="anchor"))
    assert loss.item() == 0
    loss.backward()
    assert (x.grad == 0).all()


def test_a_bad_row_that_no_valid_quadruplet_names_leaves_the_gradients_alone():
    # A NaN score never wins, so that the bad row is mined by none; its own slot is not valid.
    unit, x, labels = make_unit(5), make_features(20, 5), make_labels(20)
    x[0] = torch.nan
    x.requires_grad_()
    quads = unit.mine(x, labels, mode="anchor")
    assert quads.valid.sum() > 10
    pddm_ext.QuadrupletLoss()(x, quads).backward()
    assert not x.grad[1:].isnan().any()
    assert all(not p.grad.isnan().any() for p in unit.parameters())
    assert (x.grad[0] == 0).all()


def test_pairs_without_weight_contribute_nothing():
    unit, x = make_unit(5), make_features(10, 5)
    x[9] = torch.nan
    i, j = torch.tensor([0, 1, 9], device=DEVICE), torch.tensor([2, 3, 4], device=DEVICE)
    weight = torch.tensor([1.0, 0.0, 0.0], device=DEVICE)
    got = gradients(lambda x, unit: pddm_ext.score_pairs(x, i, j, unit), x, unit, weight)
    one = gradients(lambda x, unit: pddm_ext.score_pairs(x, i[:1], j[:1], unit), x, unit, weight[:1])
    assert_same_bits(got, one)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 1023, 1024, 1025, 2048, 2500])
def test_chunks_of_any_length_add_up(capability, count):
    unit, x = make_unit(4, 3, 5).double(), make_features(50, 4, dtype=torch.float64)
    i, j = random_rows(50, 2, count, seed=count)
    fused = gradients(lambda x, unit: pddm_ext.score_pairs(x, i, j, unit), x, unit)
    plain = gradients(lambda x, unit: reference.score_pairs(x, i, j, unit), x, in_double(unit))
    assert_close_relatively(fused, plain, 1e-11)


@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("count", [1024, 1025, 2048, 2500])
def test_chunks_of_layers_in_several_panels_add_up(capability, count, normalize_input):
    unit = make_unit(70, 37, 90, normalize_input=normalize_input).double()
    x = make_features(50, 70, dtype=torch.float64)
    i, j = random_rows(50, 2, count, seed=count)
    fused = gradients(lambda x, unit: pddm_ext.score_pairs(x, i, j, unit), x, unit)
    plain = gradients(lambda x, unit: reference.score_pairs(x, i, j, unit), x, in_double(unit))
    assert_close_relatively(fused, plain, 1e-11)


@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("size", [(130, None), (9, 1100), (1100, 9)], ids=str)
def test_matrices_of_more_than_one_chunk_add_up(capability, size, normalize_input):
    n, columns = size
    unit = make_unit(3, 2, 3, normalize_input=normalize_input).double()
    x = make_features(n + (columns or 0), 3, dtype=torch.float64)

    def scores(package):
        if columns is None:
            return lambda x, unit: package.score_matrix(x, unit)
        return lambda x, unit: package.score_matrix(x[:n], unit, x[n:])

    assert_close_relatively(
        gradients(scores(pddm_ext), x, unit), gradients(scores(reference), x, in_double(unit)), 1e-11
    )


@pytest.mark.parametrize("normalize_input", [False, True])
def test_a_row_in_every_pair_has_the_gradients_of_all(capability, normalize_input):
    unit = make_unit(4, 3, 5, normalize_input=normalize_input).double()
    x = make_features(50, 4, dtype=torch.float64)
    i, j = random_rows(50, 2, 2500, seed=1)
    i[:], j[::3], j[1000:1200] = 7, j[::3] % 5, 7
    i[1::2], j[1::2] = j[1::2].clone(), i[1::2].clone()
    fused = gradients(lambda x, unit: pddm_ext.score_pairs(x, i, j, unit), x, unit)
    plain = gradients(lambda x, unit: reference.score_pairs(x, i, j, unit), x, in_double(unit))
    assert_close_relatively(fused, plain, 1e-11)


def test_repeated_pairs_and_pairs_of_a_row_with_itself():
    unit, x = make_unit(4, 3, 5).double(), make_features(6, 4, dtype=torch.float64)
    i, j = torch.tensor([[2, 2, 3, 3, 5, 2], [3, 3, 2, 3, 5, 3]], device=DEVICE)
    fused = gradients(lambda x, unit: pddm_ext.score_pairs(x, i, j, unit), x, unit)
    plain = gradients(lambda x, unit: reference.score_pairs(x, i, j, unit), x, in_double(unit))
    assert_close_relatively(fused, plain, 1e-11)
    assert (fused[0][[0, 1, 4]] == 0).all()


def test_no_pairs_have_zero_gradients():
    unit, x = make_unit(4), make_features(6, 4)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for scores in (
        lambda x, unit: pddm_ext.score_pairs(x, none, none, unit),
        lambda x, unit: pddm_ext.score_matrix(x[:0], unit),
        lambda x, unit: pddm_ext.score_matrix(x, unit, x[:0]),
        lambda x, unit: unit(x[:0], x[:0]),
    ):
        assert all((g == 0).all() for g in gradients(scores, x, unit))


def test_w_v_has_a_gradient_where_inputs_are_normalised():
    # The pull on ‖v‖ goes through W_v's product, which is linear and taken before the norm.
    unit, x = make_unit(3, 2, 2, normalize_input=True).double(), make_features(4, 3, dtype=torch.float64)
    kill_relus(unit, "u")
    fused = gradients(lambda x, unit: pddm_ext.score_matrix(x, unit), x, unit)
    plain = gradients(lambda x, unit: reference.score_matrix(x, unit), x, in_double(unit))
    assert plain[3].abs().max() > 0
    assert_close_relatively(fused, plain, 1e-11)


@cpu_only("the GPU goes back in half precision's products, or TF32's")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_the_float32_ones_rounded(dtype):
    unit, x = make_unit(19, 9, 14), make_features(40, 19, dtype=dtype)
    i, j = random_rows(40, 2, 100)

    def scores(x, unit):
        return pddm_ext.score_pairs(x, i, j, unit)

    weight = torch.ones(100)
    half, full = gradients(scores, x, unit, weight), gradients(scores, x.float(), unit, weight)
    assert_same_bits(half[0], full[0].to(dtype))
    assert_same_bits(half[1:], full[1:])


@cpu_only("they have instruction sets")
@pytest.mark.parametrize("name", CAPABILITIES)
def test_float32_agrees_across_instruction_sets(name):
    # Not to the bit: their tiles sum in their own order, fused or not. Both are as good as the test above says.
    unit, x = make_unit(33, 13, 25, seed=1), make_features(24, 33, seed=1)
    scores = entries(24)["anchor"][0]
    best = gradients(scores, x, unit)
    with instruction_set(name):
        assert_close_relatively(gradients(scores, x, unit), best, 1e-4)


def test_rows_without_a_pair_leave_no_trace_even_where_they_are_nan():
    unit, x = make_unit(3), torch.full((2, 3), torch.nan, device=DEVICE, requires_grad=True)
    pddm_ext.score_matrix(x, unit, x.detach()[:0]).sum().backward()
    for leaf in (x, *unit.parameters()):
        assert not leaf.grad.any()
