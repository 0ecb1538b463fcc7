"""How the gradients take part in autograd: dtypes, strides, what is frozen, graphs, and what has no derivative."""

import copy

import pytest
import torch

import pddm_ext
from derivatives import ENTRIES, entries, gradients
from helpers import DEVICE, PARAMETERS, assert_same_bits, make_features, make_labels, make_unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype, parameters):
    unit = make_unit(6, 5, 4).to(parameters)
    x = make_features(20, 6, dtype=dtype).requires_grad_()
    unit.mine(x, make_labels(20), mode="anchor").s_ij.sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == parameters and p.grad.shape == p.shape for p in unit.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("entry", ENTRIES)
def test_numbers_of_another_dtype_are_what_torch_makes_of_them(entry, dtype, parameters):
    own, converted, x = make_unit(6, 5, 4), make_unit(6, 5, 4), make_features(20, 6, dtype=dtype)
    with torch.no_grad():
        own.u.weight[0] *= 1e-5  # below the normal numbers of float16
    own.to(parameters)
    converted.load_state_dict(own.state_dict())
    scores, _ = entries(20)[entry]
    assert_same_bits(scores(x, own), scores(x, converted))
    expected = gradients(scores, x, converted)
    for got, of, to in zip(gradients(scores, x, own), expected, [dtype] + [parameters] * 8, strict=True):
        assert_same_bits(got, of.to(to))


def test_autocast_goes_back_to_the_features_dtype():
    unit, x, labels = make_unit(9), make_features(20, 9).requires_grad_(), make_labels(20)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        quads = unit.mine(x, labels, mode="anchor")
        loss = pddm_ext.QuadrupletLoss()(x, quads)
    loss.backward()
    assert x.grad.dtype == torch.float32
    assert x.grad.abs().max() > 0
    assert all(p.grad.dtype == torch.float32 for p in unit.parameters())


def test_strided_upstream_gradients_and_inputs():
    unit, x = make_unit(5), make_features(12, 5)
    weight = make_features(12, 24, seed=4)[:, ::2].T
    expected = gradients(lambda x, unit: pddm_ext.score_matrix(x, unit), x, unit, weight.contiguous())
    assert_same_bits(gradients(lambda x, unit: pddm_ext.score_matrix(x, unit), x, unit, weight), expected)
    strided = gradients(lambda x, unit: pddm_ext.score_matrix(x.T.contiguous().T, unit), x, unit, weight)
    assert_same_bits(strided, expected)
    ones = torch.ones(12, 12, device=DEVICE)
    broadcast = gradients(lambda x, unit: pddm_ext.score_matrix(x, unit).sum().reshape(1), x, unit, ones[0, :1])
    ones = gradients(lambda x, unit: pddm_ext.score_matrix(x, unit), x, unit, ones)
    assert_same_bits(broadcast, ones)


@pytest.mark.parametrize("trainable", [(), ("s.weight",), ("u.weight", "c.bias"), ("v.weight",)])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("entry", ["pairs", "matrix", "anchor"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(entry, features, trainable):
    unit, x = make_unit(5), make_features(12, 5)
    scores = entries(12)[entry][0]
    weight = torch.ones_like(scores(x, unit))
    everything = dict(zip(["feats", *PARAMETERS], gradients(scores, x, unit, weight), strict=True))
    for name, p in unit.named_parameters():
        p.requires_grad_(name in trainable)
    x.requires_grad_(features)
    total = scores(x, unit).sum()
    assert total.requires_grad == (features or bool(trainable))
    if total.requires_grad:
        total.backward()
    for name, leaf in {"feats": x, **dict(unit.named_parameters())}.items():
        if leaf.requires_grad:
            assert_same_bits(leaf.grad, everything[name])
        else:
            assert leaf.grad is None


def test_gradients_accumulate_over_two_calls():
    unit, x, labels = make_unit(5), make_features(12, 5).requires_grad_(), make_labels(12)
    unit.mine(x, labels).s_ij.sum().backward()
    once = x.grad.clone()
    unit.mine(x, labels).s_ij.sum().backward()
    assert_same_bits(x.grad, once + once)


def test_backward_twice_with_a_retained_graph():
    unit, x = make_unit(5), make_features(12, 5).requires_grad_()
    total = unit.mine(x, make_labels(12), mode="anchor").s_ij.sum()
    first = torch.autograd.grad(total, x, retain_graph=True)[0]
    assert_same_bits(torch.autograd.grad(total, x)[0], first)


def test_large_gradients_are_nobody_elses_memory(tmp_path):
    """On the CPU they lie in what earlier ones have left."""
    unit, x, labels = make_unit(200), make_features(400, 200).requires_grad_(), make_labels(400)
    inputs = [x, *unit.parameters()]

    def backward(weight):
        quads = unit.mine(x, labels, mode="anchor")
        return torch.autograd.grad((weight * quads.s_ij).sum(), inputs)

    first, kept = backward(1.0), [g.clone() for g in backward(1.0)]
    assert max(g.numel() * g.element_size() for g in first) >= 2**18
    backward(3.0)
    twice = backward(2.0)
    assert_same_bits(first, kept)
    assert_same_bits(twice, [2 * g for g in kept])
    assert len({g.untyped_storage().data_ptr() for g in (*first, *twice)}) == 2 * len(first)
    del twice
    torch.save(first, tmp_path / "gradients.pt")
    assert_same_bits(torch.load(tmp_path / "gradients.pt"), kept)
    for gradient, expected in zip(first, kept, strict=True):
        assert_same_bits(copy.deepcopy(gradient), expected)
        assert_same_bits(gradient.mul_(4), 4 * expected)


@pytest.mark.parametrize("entry", ["pairs", "matrix", "anchor"])
def test_a_change_of_the_features_before_backward_is_noticed(entry):
    unit, leaf = make_unit(5), make_features(12, 5).requires_grad_()
    x = leaf * 1
    total = entries(12)[entry][0](x, unit).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_change_of_a_parameter_before_backward_is_noticed():
    unit = make_unit(5)
    total = unit.mine(make_features(12, 5), make_labels(12)).s_ij.sum()
    with torch.no_grad():
        unit.c.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_none_is_wanted(context):
    unit, x, labels = make_unit(5), make_features(12, 5).requires_grad_(), make_labels(12)
    with context():
        quads = unit.mine(x, labels, mode="anchor")
        scores = pddm_ext.score_matrix(x, unit)
    assert not quads.s_ij.requires_grad
    assert not scores.requires_grad
    assert_same_bits(quads.s_ij, unit.mine(x, labels, mode="anchor").s_ij)


def test_only_scores_carry_gradient():
    unit, x, labels = make_unit(5), make_features(12, 5).requires_grad_(), make_labels(12)
    quads = unit.mine(x, labels)
    assert [field.requires_grad for field in quads] == [False] * 4 + [True] * 3 + [False]
    scores, indices = pddm_ext.topk(x, x, 3, unit)
    assert not scores.requires_grad
    assert not indices.requires_grad


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_second_derivative_says_that_there_is_none(entry):
    unit, x = make_unit(5).double(), make_features(12, 5, dtype=torch.float64).requires_grad_()
    total = entries(12)[entry][0](x, unit).square().sum()
    (first,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()


def test_a_training_step_lowers_the_loss():
    unit, x, labels = make_unit(8), make_features(40, 8).requires_grad_(), make_labels(40)
    optimizer = torch.optim.SGD([x, *unit.parameters()], lr=0.05)
    criterion = pddm_ext.QuadrupletLoss()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = criterion(x, unit.mine(x, labels, mode="anchor"))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
