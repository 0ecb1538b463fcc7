"""DensityRegularizer: values known in closed form, the direction of its force, invariances, cost and errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import DEVICE, FLOATS, ON_CUDA, Largest, on_one_thread, threads
from pddm_ext._checks import INTEGERS
from pddm_ext.density import DensityRegularizer


def measures(feats: Tensor, labels: Tensor, temperature: float = 0.05) -> tuple[Tensor, Tensor]:
    """r² and ρ² of every class of two rows or more, class by class, from the definition."""
    f = F.normalize(feats, dim=-1)
    classes = labels.unique()
    mu = {int(c): f[labels == c].mean(0) for c in classes}
    extents, rooms = [], []
    for c in mu:
        rows = f[labels == c]
        if len(rows) == 1:
            continue
        extents.append((rows - mu[c]).square().sum() / (len(rows) - 1))
        distances = torch.stack([(mu[c] - mu[b]).square().sum() for b in mu if b != c])
        w = torch.exp(-distances / temperature)
        rooms.append((w * distances).sum() / w.sum())
    return torch.stack(extents), torch.stack(rooms)


def literal(feats: Tensor, labels: Tensor, ratio: float = 0.5, temperature: float = 0.05, eps: float = 1e-4) -> Tensor:
    r2, rho2 = measures(feats, labels, temperature)
    return (((r2 + eps) / (rho2 + eps)).log() / 2 - math.log(ratio)).square().mean()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def imbalanced(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes of 1 to 7 rows about directions of their own, two of them singletons, in no order."""
    sizes = torch.tensor([3, 1, 7, 2, 5, 1], device=DEVICE)
    labels = torch.arange(6, device=DEVICE).repeat_interleave(sizes)
    feats = normal(6, 8, seed=seed)[labels] + 0.5 * normal(len(labels), 8, seed=seed + 1)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return feats[shuffled], labels[shuffled]


def cross(classes: int, axes: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos θ e_c ± sin θ g: each class about an axis of its own, its 2·axes rows along others of its own."""
    eye = torch.eye(classes * (1 + axes), dtype=torch.float64, device=DEVICE)
    feats, labels = [], []
    for c in range(classes):
        for k in range(axes):
            for sign in (1, -1):
                feats.append(math.cos(theta) * eye[c] + sign * math.sin(theta) * eye[classes + c * axes + k])
                labels.append(c)
    return torch.stack(feats), torch.tensor(labels, device=DEVICE)


def gradient(loss: DensityRegularizer, feats: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    feats = feats.detach().clone().requires_grad_()
    value = loss(feats, labels)
    (g,) = torch.autograd.grad(value, feats)
    return value.detach(), g


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "axes", "theta"), [(2, 1, 0.3), (3, 2, 0.7), (5, 3, 1.2)])
def test_closed_form_on_the_sphere(classes, axes, theta):
    """μ_c = cos θ e_c; r² = n sin²θ / (n − 1); all centroids are √2 cos θ apart, whatever T is."""
    feats, labels = cross(classes, axes, theta)
    n = 2 * axes
    ratio, eps = 0.3, 1e-3
    r2, rho2 = n * math.sin(theta) ** 2 / (n - 1), 2 * math.cos(theta) ** 2
    expected = (0.5 * math.log((r2 + eps) / (rho2 + eps)) - math.log(ratio)) ** 2
    for temperature in (0.01, 1.0):
        loss = DensityRegularizer(ratio, temperature, eps)(feats, labels)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_loss_is_zero_at_the_ratio_and_symmetric_about_it():
    feats, labels = cross(3, 2, 0.5)
    r2, rho2 = measures(feats, labels)
    actual = ((r2[0] + 1e-4) / (rho2[0] + 1e-4)).sqrt().item()
    assert DensityRegularizer(actual)(feats, labels).item() == pytest.approx(0, abs=1e-20)
    for factor in (0.5, 2.0):
        loss = DensityRegularizer(actual * factor)(feats, labels)
        assert loss.item() == pytest.approx(math.log(2) ** 2, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definition_class_by_class(seed):
    feats, labels = imbalanced(seed)
    for kwargs in ({}, {"ratio": 2.0, "temperature": 0.4, "eps": 0.01}):
        value, got = gradient(DensityRegularizer(**kwargs), feats, labels)
        x = feats.clone().requires_grad_()
        expected = literal(x, labels, **kwargs)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(got, torch.autograd.grad(expected, x)[0], rtol=1e-8, atol=1e-12)


def test_extent_of_gaussians_is_the_trace_of_their_covariance():
    """About far-away means rows stay Gaussian on the sphere, in the d − 1 directions along it."""
    d, n, sigma = 64, 2000, (0.002, 0.005, 0.01)
    labels = torch.arange(3, device=DEVICE).repeat_interleave(n)
    scale = torch.tensor(sigma, device=DEVICE, dtype=torch.float64)[labels]
    feats = torch.eye(d, dtype=torch.float64, device=DEVICE)[labels] + scale[:, None] * normal(3 * n, d)
    # Each class alone against its ratio: the others are one row each.
    for c, s in enumerate(sigma):
        alone = labels == c
        others = torch.tensor([n * b for b in range(3) if b != c], device=DEVICE)
        x, y = torch.cat([feats[alone], feats[others]]), torch.cat([labels[alone], labels[others]])
        mu = F.normalize(x, dim=-1)[:n].mean(0)
        rho2 = (mu - F.normalize(x[n:], dim=-1)).square().sum(-1).mean().item()  # 2 up to the rows' own noise
        ratio = math.sqrt(s**2 * (d - 1) / rho2)
        assert DensityRegularizer(ratio, 10.0, 1e-9)(x, y).item() < 0.01**2  # r within 1 % of √tr Σ


def test_the_room_is_that_to_the_nearest_centroid():
    """As T falls; a far class then counts for nothing."""
    feats, labels = cross(2, 1, 0.3)
    near = F.normalize(feats[:1] + 0.5 * feats[2:3], dim=-1)
    x, y = torch.cat([feats, near]), torch.cat([labels, labels.new_tensor([9])])
    f = F.normalize(x, dim=-1)
    mu = torch.stack([f[:2].mean(0), f[2:4].mean(0)])
    rho2 = (mu - near).square().sum(-1)
    r2 = torch.stack([(f[:2] - mu[0]).square().sum(), (f[2:4] - mu[1]).square().sum()])
    expected = (((r2 + 1e-4) / (rho2 + 1e-4)).log() / 2 - math.log(0.5)).square().mean()
    torch.testing.assert_close(DensityRegularizer(temperature=1e-3)(x, y), expected, rtol=1e-9, atol=0)


# --- Gradient ---------------------------------------------------------------------------------------------------------


@on_one_thread
def test_gradcheck():
    feats, labels = imbalanced()
    torch.autograd.gradcheck(DensityRegularizer(temperature=0.3), (feats.requires_grad_(), labels))


@pytest.mark.parametrize(("theta", "sign"), [(0.05, 1), (1.2, -1)])
def test_too_tight_spreads_and_too_wide_contracts(theta, sign):
    feats, labels = cross(4, 2, theta)
    feats = feats + 1e-3 * normal(*feats.shape)
    loss = DensityRegularizer()
    value, g = gradient(loss, feats, labels)
    moved = feats - 1e-3 * g / g.norm()

    def ratios(x: Tensor) -> Tensor:
        r2, rho2 = measures(x, labels)
        return (r2 / rho2).sqrt()

    assert ((0.5 - ratios(feats)) * sign > 0).all()
    assert ((ratios(moved) - ratios(feats)) * sign > 0).all()
    assert loss(moved, labels) < value
    r2, moved_r2 = measures(feats, labels)[0], measures(moved, labels)[0]
    assert ((moved_r2 - r2) * sign > 0).all()  # the class itself, not its room alone


def test_each_class_by_its_own_need():
    """One too tight, one too wide, each with a single row as its nearest neighbour, so that no room is shared."""
    tight, labels = cross(2, 2, 0.05)
    wide, _ = cross(2, 2, 0.9)
    feats = torch.where(labels[:, None] == 0, tight, wide)
    near = torch.tensor([[1.0, 0, 0, 0, 0, 0.5], [0, 0.6, 0.8, 0, 0, 0]], dtype=feats.dtype, device=DEVICE)
    x, y = torch.cat([feats, near]), torch.cat([labels, labels.new_tensor([8, 9])])
    _, g = gradient(DensityRegularizer(temperature=0.01), x, y)
    before, after = measures(x, y)[0], measures(x - 1e-3 * g, y)[0]
    assert after[0] > before[0] + 1e-6
    assert after[1] < before[1] - 1e-6


@on_one_thread
def test_descent_reaches_the_ratio():
    feats, labels = imbalanced()
    loss = DensityRegularizer(ratio=0.4)
    feats.requires_grad_()
    optimizer = torch.optim.Adam([feats], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss(feats, labels).backward()
        optimizer.step()
    r2, rho2 = measures(feats.detach(), labels)
    torch.testing.assert_close((r2 / rho2).sqrt(), torch.full_like(r2, 0.4), rtol=0.02, atol=0)


# --- Invariances ------------------------------------------------------------------------------------------------------


def test_names_of_classes_order_and_scale_of_rows_do_not_matter():
    feats, labels = imbalanced()
    loss = DensityRegularizer()
    value, g = gradient(loss, feats, labels)
    rows = torch.randperm(len(feats), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    names = torch.tensor([40, -3, 7, 2**62, -(2**62), 0], device=DEVICE)
    scales = normal(len(feats), 1).exp()
    for x, y in ((feats, names[labels]), (feats[rows], labels[rows]), (feats * scales, labels), (feats * 1e3, labels)):
        torch.testing.assert_close(loss(x, y), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(loss, feats[rows], labels[rows])[1], g[rows], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_dtype(dtype):
    feats, labels = imbalanced()
    ends = torch.iinfo(dtype)
    low, high = torch.tensor([ends.min, ends.max], dtype=dtype, device=DEVICE).split(1)
    names = torch.cat([low, high, torch.tensor([1, 2, 3, 4], device=DEVICE).to(dtype)])
    named = torch.stack([names[int(c)] for c in labels])
    assert named.dtype == dtype
    torch.testing.assert_close(DensityRegularizer()(feats, named), DensityRegularizer()(feats, labels))


def test_singletons_give_room_but_have_no_term():
    feats, labels = cross(2, 2, 0.5)
    loss = DensityRegularizer(temperature=0.3)
    near = F.normalize(feats[:1] + feats[4:5], dim=-1)
    x, y = torch.cat([feats, near]), torch.cat([labels, labels.new_tensor([9])])
    value, g = gradient(loss, x, y)
    torch.testing.assert_close(value, literal(x, y, temperature=0.3))
    assert not torch.isclose(value, loss(feats, labels), rtol=1e-2)
    assert g[-1].abs().max() > 1e-3
    # The mean is over the classes with a term: many singletons far from all change nothing when T is small.
    far = torch.cat([feats, torch.zeros(8, 5, dtype=feats.dtype, device=DEVICE)], dim=1)
    alone = torch.zeros(5, far.shape[1], dtype=feats.dtype, device=DEVICE)
    alone[:, feats.shape[1] :] = -torch.eye(5, dtype=feats.dtype, device=DEVICE)
    small = DensityRegularizer(temperature=1e-3)
    with_singletons = small(torch.cat([far, alone]), torch.cat([labels, torch.arange(10, 15, device=DEVICE)]))
    torch.testing.assert_close(with_singletons, small(far, labels), rtol=1e-9, atol=0)


# --- Degenerate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("labels", [[], [4], [4, 4, 4], [1, 2, 3]])
def test_without_a_class_of_two_or_a_second_class_the_loss_is_zero(dtype, labels):
    for feats in (normal(len(labels), 5, dtype=dtype), torch.zeros(len(labels), 5, dtype=dtype, device=DEVICE)):
        value, g = gradient(DensityRegularizer(), feats, torch.tensor(labels, dtype=torch.int64, device=DEVICE))
        assert value.shape == ()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.item() == 0
        assert g.shape == feats.shape
        assert not g.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("row", [[1.0, 2.0, -1.0], [0.0, 0.0, 0.0]])
def test_equal_rows_are_finite(dtype, row):
    """No extent and no room: ε/ε, to the rounding of the sums."""
    feats = torch.tensor([row] * 6, dtype=dtype, device=DEVICE)
    value, g = gradient(DensityRegularizer(), feats, torch.tensor([0, 0, 1, 1, 1, 2], device=DEVICE))
    assert value.item() == pytest.approx(math.log(0.5) ** 2, rel=1e-4)
    assert g.isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_rounding_leaves_no_room_below_zero(seed):
    """Two classes in one place, a third opposite: their room is what cancellation leaves, of either sign."""
    a = normal(1, 33, seed=seed, dtype=torch.float32)
    feats, labels = torch.cat([a.expand(5, -1), -a]), torch.tensor([0, 0, 1, 1, 1, 2], device=DEVICE)
    value, g = gradient(DensityRegularizer(eps=1e-12), feats, labels)
    assert value.isfinite()
    assert g.isfinite().all()


def test_a_class_that_is_a_point_pulls_with_a_bounded_force():
    feats, labels = cross(3, 2, 0.0)
    value, g = gradient(DensityRegularizer(), feats, labels)
    assert value.item() == pytest.approx((0.5 * math.log(1e-4 / (2 + 1e-4)) - math.log(0.5)) ** 2, rel=1e-9)
    assert g.isfinite().all()
    _, g = gradient(DensityRegularizer(), feats + 1e-9 * normal(*feats.shape), labels)
    assert g.abs().max() < 10


def test_close_classes_in_float32():
    """Differences of 1e-2 about a common direction: the room must not drown in rounding."""
    labels = torch.arange(6, device=DEVICE).repeat_interleave(4)
    feats = torch.ones(24, 32, dtype=torch.float64, device=DEVICE)
    feats += 0.02 * normal(6, 32)[labels] + 0.005 * normal(24, 32, seed=1)
    got = DensityRegularizer(temperature=1e-4, eps=1e-9)(feats.float(), labels)
    expected = literal(feats.float().double(), labels, temperature=1e-4, eps=1e-9)
    assert got.item() == pytest.approx(expected.item(), rel=1e-3)


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_are_in_float32_or_float64(dtype):
    feats, labels = imbalanced()
    feats = feats.to(dtype)
    value, g = gradient(DensityRegularizer(), feats, labels)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert g.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), literal(feats.double(), labels), rtol=tolerance, atol=0)


def test_autocast_changes_nothing():
    feats, labels = imbalanced()
    value, g = gradient(DensityRegularizer(), feats.float(), labels)
    x = feats.float().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        cast = DensityRegularizer()(x, labels)
    assert torch.equal(value, cast.detach())
    assert torch.equal(g, torch.autograd.grad(cast, x)[0])  # outside, as torch would have it


def test_same_bits_on_every_run_and_any_number_of_threads():
    labels = torch.randint(0, 40, (3000,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    feats = normal(3000, 33, dtype=torch.float32)
    results = []
    for count in (1, 2, 2):
        with threads(count):
            results.append(gradient(DensityRegularizer(), feats, labels))
    for value, g in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(g, results[0][1])


@pytest.mark.skipif(not ON_CUDA, reason="torch names the operators that are not deterministic on a GPU only")
def test_no_operator_is_left_to_chance():
    feats, labels = imbalanced()
    torch.use_deterministic_algorithms(True)
    try:
        gradient(DensityRegularizer(), feats.float(), labels)
    finally:
        torch.use_deterministic_algorithms(False)


# --- Cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "classes", "d"), [(20_000, 50, 8), (500, 250, 3)])
def test_no_tensor_is_larger_than_rows_or_pairs_of_classes(n, classes, d):
    labels = torch.arange(n, device=DEVICE) % classes
    feats = normal(n, d, dtype=torch.float32).requires_grad_()
    with Largest() as largest:
        DensityRegularizer()(feats, labels).backward()
    assert largest.elements == max(n * d, classes**2)


def test_singletons_cost_no_pairs_of_classes():
    """Only classes with a term ask for their room."""
    labels = torch.arange(20_000, device=DEVICE)
    labels[:4] = 0
    feats = normal(20_000, 4, dtype=torch.float32)
    with Largest() as largest:
        DensityRegularizer()(feats, labels)
    assert largest.elements == 20_000 * 4


# --- Errors -----------------------------------------------------------------------------------------------------------

X, LABELS = torch.zeros(8, 4, device=DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    ("feats", "labels", "error", "message"),
    [
        (X[0], LABELS, ValueError, r"feats has shape \(4,\); \(rows, dim\) is accepted"),
        (X[:, :0], LABELS, ValueError, r"feats has shape \(n, 0\); a dimension of at least 1 is accepted"),
        (X.int(), LABELS, TypeError, r"feats has dtype torch.int32; float32, float64, bfloat16 or float16 is accepted"),
        (X.tolist(), LABELS, TypeError, r"feats is a list; a tensor of"),
        (X, LABELS[:7], ValueError, r"labels has length 7; feats has 8"),
        (X, LABELS[:, None], ValueError, r"labels has shape \(8, 1\); one dimension is accepted"),
        (X, LABELS.float(), TypeError, r"labels has dtype torch.float32; an integer dtype is accepted"),
        (X, LABELS.to("meta"), RuntimeError, r"Expected all tensors to be on the same device"),
    ],
)
def test_bad_input_is_refused(feats, labels, error, message):
    with pytest.raises(error, match=message):
        DensityRegularizer()(feats, labels)


@pytest.mark.parametrize("name", ["ratio", "temperature", "eps"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_bad_parameters_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; a positive finite number is accepted"):
        DensityRegularizer(**{name: value})


def test_its_parameters_are_shown():
    assert repr(DensityRegularizer(0.3, 0.1, 0.01)) == "DensityRegularizer(ratio=0.3, temperature=0.1, eps=0.01)"
