"""The scikit-learn adapter: values against `reference`, the library's estimators and checks, training that learns."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.metrics import pairwise_distances, pairwise_kernels
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import check_estimator
from torch import Tensor

import pddm_ext
from helpers import assert_same_bits, make_features, make_unit, threads
from pddm_ext import reference
from pddm_ext.adapters import sklearn as adapter
from pddm_ext.adapters.sklearn import PDDMDistance, PDDMKernel, PDDMNeighborsClassifier
from truth import in_double, truth

TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _one_thread(_seed_and_threads: None) -> Iterator[None]:
    """Pairs one at a time are too small to share."""
    with threads(1):
        yield


def rows(n: int, d: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> np.ndarray:
    return make_features(n, d, seed=seed, dtype=dtype, device="cpu").numpy()


def scores(x: np.ndarray, unit: pddm_ext.PDDM, y: np.ndarray | None = None) -> np.ndarray:
    """By `reference` in float64."""
    return truth(torch.tensor(x), unit, None if y is None else torch.tensor(y)).numpy()


def parameters(unit: pddm_ext.PDDM) -> list[Tensor]:
    return [p.detach().clone() for p in unit.parameters()]


def places(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Six places of two classes. In each place another coordinate tells its classes apart; the others are noise."""
    rng = np.random.default_rng(seed)
    place, side = rng.integers(6, size=n), rng.integers(2, size=n)
    told = 2.0 * rng.standard_normal((n, 6))
    told[np.arange(n), place] = 2 * side - 1 + 0.5 * rng.standard_normal(n)
    return np.hstack([4 * np.eye(6)[place], told]), 2 * place + side


def fast(**kwargs: Any) -> PDDMNeighborsClassifier:
    return PDDMNeighborsClassifier(**{"n_neighbors": 3, "steps": 5, "hidden": 8, "random_state": 0, **kwargs})


# --- Kernel and distance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize_input", [False, True])
def test_a_matrix_equals_the_reference(normalize_input):
    unit, x, y = make_unit(6, 9, 5, normalize_input=normalize_input), rows(20), rows(7, seed=1)
    kernel, distance = PDDMKernel(unit), PDDMDistance(unit)
    for got, expected in ((kernel(x, y), scores(x, unit, y)), (kernel(x), scores(x, unit))):
        np.testing.assert_allclose(got, expected, **TIGHT)
    for got, expected in ((distance(x, y), scores(x, unit, y)), (distance(x), scores(x, unit))):
        np.testing.assert_allclose(got, np.log(1 + np.exp(-expected)), **TIGHT)
    np.testing.assert_array_equal(kernel(x), kernel(x).T)


def test_float32_is_scored_in_float32_and_all_else_in_float64():
    unit, x = make_unit(6), rows(9, dtype=torch.float32)
    single = pddm_ext.score_matrix(torch.tensor(x, device=unit.u.weight.device), unit).detach().cpu().numpy()
    got = PDDMKernel(unit)(x)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, single)
    assert np.abs(got - scores(x, unit)).max() > 1e-9
    np.testing.assert_allclose(PDDMKernel(unit)(x, x.astype(np.float64)), scores(x, unit), **TIGHT)
    whole = np.arange(18).reshape(3, 6)
    np.testing.assert_allclose(PDDMKernel(unit)(whole.tolist()), scores(whole.astype(float), unit), **TIGHT)


def test_any_layout_and_memory_that_must_not_be_written_to(recwarn):
    unit, x = make_unit(6), rows(10)
    expected = scores(x, unit)[::-2, ::-2]
    backwards = np.asfortranarray(x)[::-2]
    x.flags.writeable = backwards.flags.writeable = False
    np.testing.assert_allclose(PDDMKernel(unit)(backwards), expected, **TIGHT)
    np.testing.assert_allclose(PDDMKernel(unit)(x), scores(x.copy(), unit), **TIGHT)
    fast().fit(x, np.arange(10) % 2).predict(backwards)
    assert not recwarn.list


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_pairwise_functions_equal_the_matrix(n_jobs):
    unit, x, y = make_unit(6), rows(12), rows(5, seed=1)
    kernel, distance = PDDMKernel(unit), PDDMDistance(unit)
    for y_ in (None, y):
        got = pairwise_kernels(x, y_, metric=kernel, n_jobs=n_jobs)
        np.testing.assert_allclose(got, kernel(x, y_), **TIGHT)
        got = pairwise_distances(x, y_, metric=distance, n_jobs=n_jobs)
        np.testing.assert_allclose(got, distance(x, y_), **TIGHT)
    assert type(kernel(x[0], y[0])) is float
    assert kernel(x[0], y[0]) == pytest.approx(scores(x, unit, y)[0, 0], rel=1e-10)


def test_distances_rank_as_scores_do_however_far_those_reach():
    unit, x = make_unit(6).double(), rows(30)
    with torch.no_grad():
        unit.s.weight *= 800
        unit.s.bias -= float(np.median(scores(x, unit)))
    s, d = scores(x, unit), PDDMDistance(unit)(x)
    assert s.min() < -40
    assert s.max() > 40
    assert (d > 0).all()
    np.testing.assert_array_equal(d.ravel().argsort(), (-s).ravel().argsort())


def test_svc_with_the_kernel_equals_svc_with_the_reference_matrix():
    unit, x, y = make_unit(6), rows(60), rows(60)[:, 0] > 0
    q = rows(20, seed=1)
    direct = SVC(kernel=PDDMKernel(unit)).fit(x, y)
    expected = SVC(kernel="precomputed").fit(scores(x, unit), y).decision_function(scores(q, unit, x))
    np.testing.assert_allclose(direct.decision_function(q), expected, atol=1e-6)
    again = pickle.loads(pickle.dumps(direct))
    np.testing.assert_array_equal(again.decision_function(q), direct.decision_function(q))
    copy = clone(direct)
    assert copy.kernel.unit is not unit
    np.testing.assert_array_equal(copy.fit(x, y).decision_function(q), direct.decision_function(q))


def test_processes():
    unit, (x, y) = make_unit(12), places(80, seed=0)
    for estimator in (SVC(kernel=PDDMKernel(unit)), fast()):
        parallel, serial = (cross_val_predict(estimator, x, y, cv=2, n_jobs=n_jobs) for n_jobs in (2, None))
        np.testing.assert_array_equal(parallel, serial)


@pytest.mark.parametrize("kind", [PDDMKernel, PDDMDistance])
def test_bad_input_of_a_kernel(kind):
    x, unit = rows(4), make_unit(6)
    for args, error, message in [
        ((x[:, :5],), ValueError, "unit scores features of dimension 6; these have 5"),
        ((x[0, :5], x[0, :5]), ValueError, "unit scores features of dimension 6; these have 5"),
        ((x, x[:, :5]), ValueError, "Incompatible dimension"),
        ((x[0],), ValueError, "Expected 2D array, got 1D"),
        ((x, x[0]), ValueError, "Expected 2D array, got 1D"),
        ((np.where(x > 0, np.nan, x),), ValueError, "contains NaN"),
        ((csr_matrix(x),), TypeError, "[Ss]parse"),
    ]:
        with pytest.raises(error, match=message):
            kind(unit)(*args)
    with pytest.raises(TypeError, match="unit is a Linear; a PDDM is accepted"):
        kind(torch.nn.Linear(6, 1))(x)


# --- Neighbours -------------------------------------------------------------------------------------------------------


def test_neighbours_equal_the_reference():
    unit, x, q = make_unit(6), rows(40), rows(15, seed=1)
    model = fast(unit=unit).fit(x, np.arange(40) % 3)
    distances, nearest = model.kneighbors(q, 7)
    s, i = reference.topk(torch.tensor(q), torch.tensor(x), 7, in_double(unit).cpu())
    np.testing.assert_array_equal(nearest, i)
    np.testing.assert_allclose(distances, np.log(1 + np.exp(-s.numpy())), **TIGHT)
    np.testing.assert_array_equal(model.kneighbors(q, return_distance=False), i[:, :3])


def test_a_row_fitted_is_not_its_own_neighbour():
    """Though it may not be its own nearest, and may have equals."""
    unit, x = make_unit(6), np.vstack([rows(20), rows(20)[:8]])
    model = fast(unit=unit).fit(x, np.arange(28) % 3)
    s = scores(x, unit)
    assert (s.argmax(1) % 20 != np.arange(28) % 20).any()
    np.fill_diagonal(s, -np.inf)
    for k in (1, 5, 27):
        distances, nearest = model.kneighbors(n_neighbors=k)
        assert (nearest != np.arange(28)[:, None]).all()
        assert (np.diff(np.sort(nearest)) > 0).all()
        expected = np.log(1 + np.exp(np.sort(-s)[:, :k]))
        np.testing.assert_allclose(distances, expected, **TIGHT)
        np.testing.assert_allclose(np.log(1 + np.exp(-np.take_along_axis(s, nearest, 1))), expected, **TIGHT)
    shares = np.stack([np.bincount(near % 3, minlength=3) / 3 for near in model.kneighbors(return_distance=False)])
    np.testing.assert_allclose(model.predict_proba(None), shares)


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_predicts_as_the_library_does_by_the_same_distance(weights):
    unit, x, q = make_unit(6, 24, 24), rows(40), rows(20, seed=1)  # wide enough that no two scores are equal
    y = np.array(["a", "b", "c"])[(3 * x[:, 0]).astype(int) % 3]
    model = fast(unit=unit, n_neighbors=4, weights=weights).fit(x, y)
    library = KNeighborsClassifier(4, weights=weights, algorithm="brute", metric=PDDMDistance(unit)).fit(x, y)
    for got, expected in zip(model.kneighbors(q), library.kneighbors(q), strict=True):
        np.testing.assert_allclose(got, expected, **TIGHT)
    np.testing.assert_allclose(model.predict_proba(q), library.predict_proba(q), **TIGHT)
    np.testing.assert_array_equal(model.predict(q), library.predict(q))
    assert model.score(q, library.predict(q)) == 1
    assert list(model.classes_) == ["a", "b", "c"]
    assert len({*model.predict(q)}) == 3


def test_votes_by_distances_that_underflow():
    """Softplus of −1000 is 0: such neighbours share the vote equally."""
    unit, x = make_unit(6), rows(9)
    with torch.no_grad():
        unit.s.weight.zero_()
        unit.s.bias.fill_(1000)
    model = fast(unit=unit, weights="distance").fit(x, [0, 0, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(model.predict_proba(x), [[2 / 3, 1 / 3]] * 9)  # equal scores: the lowest rows


def test_float32_rows_stay_float32_and_queries_follow():
    unit, x = make_unit(6), rows(30, dtype=torch.float32)
    y = np.arange(30) % 2
    on = unit.u.weight.device
    s, _ = pddm_ext.topk(torch.tensor(x, device=on), torch.tensor(x, device=on), 3, unit)
    expected = np.logaddexp(0, -s.cpu().double().numpy())
    for q in (x, x.astype(np.float64)):
        distances, _ = fast(unit=unit).fit(x, y).kneighbors(q)
        assert distances.dtype == np.float64
        np.testing.assert_array_equal(distances, expected)


def test_a_given_unit_is_used_and_left_as_it_is():
    unit, x = make_unit(6), rows(30)
    before = parameters(unit)
    model = fast(unit=unit).fit(x, np.zeros(30))  # one class: nothing is to be trained
    assert (model.predict(x) == 0).all()
    assert model.unit_ is unit
    assert model.loss_curve_ == []
    assert_same_bits(parameters(unit), before)
    assert all(p.grad is None for p in unit.parameters())
    assert_same_bits(parameters(clone(model).unit), before)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_learns_which_coordinate_counts_in_which_place():
    """No one distance can: every coordinate is noise in five places of six."""
    (x, y), (q, z) = places(400, seed=0), places(400, seed=1)
    for metric in ("euclidean", "cosine"):
        assert KNeighborsClassifier(metric=metric).fit(x, y).score(q, z) < 0.85
    model = PDDMNeighborsClassifier(steps=400, lr=3e-3, random_state=0).fit(x, y)
    assert model.score(q, z) > 0.95  # at half the steps 0.9475 to 0.97, by instruction set and seed
    assert np.mean(model.loss_curve_[-20:]) < 0.8 * np.mean(model.loss_curve_[:5])
    assert len(model.loss_curve_) == 400
    untrained = PDDMNeighborsClassifier(steps=1, lr=0, random_state=0).fit(x, y)
    assert untrained.score(q, z) < 0.85
    # It is a unit like any other.
    np.testing.assert_allclose(PDDMKernel(model.unit_)(q[:20]), scores(q[:20], model.unit_), **TIGHT)


def test_balanced_batches_and_the_loss_of_every_step(monkeypatch):
    batches = []

    def spy(feats, labels, unit, *, mode):
        batches.append((feats, labels, mode))
        return pddm_ext.mine_and_score(feats, labels, unit, mode=mode)

    monkeypatch.setattr(adapter, "mine_and_score", spy)
    sizes = np.array([30, 3, 1, 12, 9, 2])
    x, y = rows(57), np.repeat(np.arange(6), sizes)
    for batch_size, classes, per_class in ((24, 6, 4), (48, 6, 8), (8, 2, 4), (17, 4, 4)):
        batches.clear()
        model = fast(batch_size=batch_size, lr=0, weight_decay=0).fit(x, y)
        for feats, labels, mode in batches:
            drawn, counts = labels.unique(return_counts=True)
            assert len(drawn) == classes
            assert counts.tolist() == np.minimum(sizes[drawn], per_class).tolist()
            assert len(feats.unique(dim=0)) == len(feats)
            which = (feats[:, None] == torch.tensor(adapter._scaled(x)).float()).all(-1).nonzero()[:, 1]
            np.testing.assert_array_equal(y[which], labels)
            assert mode == "pair"
        assert len({feats[0, 0].item() for feats, _, _ in batches}) > 1
        unit = in_double(model.unit_)  # of learning rate 0, the one that every step had
        expected = [
            reference.QuadrupletLoss()
            .similarity(reference.mine_and_score(feats.double(), labels, unit, mode="pair"))
            .item()
            for feats, labels, _ in batches
        ]
        np.testing.assert_allclose(model.loss_curve_, expected, rtol=1e-4)
        assert len(batches) == 5


def test_steps_are_adams():
    """Two steps by `reference` and autograd, from the same weights, on batches of all rows."""
    x, y = rows(8), np.repeat([0, 1], 4)
    unit = fast(steps=1, batch_size=8, lr=0).fit(x, y).unit_
    optimizer = torch.optim.Adam(unit.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        quads = reference.mine_and_score(torch.tensor(x).float(), torch.tensor(y), unit, mode="pair")
        optimizer.zero_grad()
        reference.QuadrupletLoss().similarity(quads).backward()
        optimizer.step()
    trained = fast(steps=2, batch_size=8, lr=0.01, weight_decay=0.1).fit(x, y).unit_
    for got, expected in zip(trained.parameters(), unit.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_starts_as_linear_layers_do():
    x, y = rows(8, 3), np.repeat([0, 1], 4)
    unit = fast(hidden=80, steps=1, lr=0).fit(x, y).unit_
    assert (unit.dim, unit.hidden, unit.combined) == (3, 80, 80)
    for layer, fan_in in ((unit.u, 3), (unit.v, 3), (unit.c, 160)):
        for p in (layer.weight, layer.bias):
            bound = fan_in**-0.5
            assert p.abs().max() <= bound
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_one_random_state_makes_one_unit_and_torchs_generator_stays():
    x, y = places(60, seed=0)
    before = torch.get_rng_state()
    first = parameters(fast().fit(x, y).unit_)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert_same_bits(parameters(fast().fit(x, y).unit_), first)
    assert_same_bits(parameters(fast(random_state=np.random.RandomState(0)).fit(x, y).unit_), first)
    others = Parallel(n_jobs=2, prefer="threads")(delayed(fast().fit)(x, y) for _ in range(4))
    for other in others:
        assert_same_bits(parameters(other.unit_), first)
    assert not torch.equal(fast(random_state=1).fit(x, y).unit_.u.weight, first[0])


@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_batches_without_a_positive_pair_train_nothing():
    """Of 40 classes one has two rows; a batch of two classes seldom draws it."""
    x, y = rows(41), np.r_[np.arange(40), 0]
    curve = fast(steps=30, batch_size=8).fit(x, y).loss_curve_
    assert curve.count(0.0) > 15
    assert max(curve) > 0.5


# --- As an estimator --------------------------------------------------------------------------------------------------


def test_the_librarys_checks():
    """All of them, but the one that asks for SCIPY_ARRAY_API to be set before SciPy is imported."""
    results = check_estimator(PDDMNeighborsClassifier(steps=20), on_skip=None, on_fail="raise")
    assert len(results) > 40
    assert {result["check_name"] for result in results if result["status"] != "passed"} <= {"check_array_api_input"}


def test_in_a_pipeline_and_a_grid_search():
    x, y = places(150, seed=0)
    labels = np.array(list("abcdefghijkl"))[y]
    pipeline = make_pipeline(StandardScaler(), fast(steps=40))
    grid = {"pddmneighborsclassifier__n_neighbors": np.array([1, 5]), "pddmneighborsclassifier__hidden": [4, 32]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(x, labels)
    scaler, model = search.best_estimator_
    assert model.n_features_in_ == 12
    assert {*search.predict(x)} <= {*labels}
    again = pickle.loads(pickle.dumps(search))
    np.testing.assert_array_equal(again.predict_proba(x), search.predict_proba(x))
    np.testing.assert_array_equal(model.predict(scaler.transform(x)), search.predict(x))
    refitted = clone(search.best_estimator_).fit(x, labels)
    np.testing.assert_array_equal(refitted.predict_proba(x), search.predict_proba(x))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n_neighbors": 0}, ValueError, "n_neighbors == 0, must be >= 1"),
        ({"n_neighbors": 2.0}, TypeError, "n_neighbors must be an instance of int"),
        ({"weights": "cosine"}, ValueError, "weights is 'cosine'; 'uniform', 'distance' are accepted"),
        ({"hidden": 0}, ValueError, "hidden == 0"),
        ({"steps": 0}, ValueError, "steps == 0"),
        ({"batch_size": 7}, ValueError, "batch_size == 7, must be >= 8"),
        ({"lr": -1.0}, ValueError, "lr is -1.0; a finite number from 0 is accepted"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay is -1.0; a finite number from 0 is accepted"),
        ({"random_state": "now"}, ValueError, "'now' cannot be used to seed"),
        ({"unit": pddm_ext.PDDM(5)}, ValueError, "unit scores features of dimension 5; these have 6"),
        ({"unit": torch.nn.Linear(6, 1)}, TypeError, "unit is a Linear; a PDDM is accepted"),
    ],
)
def test_bad_parameters(kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fast(**kwargs).fit(rows(8), np.arange(8) % 2)


def test_bad_data():
    x = rows(8)
    for y, message in (
        (np.zeros(8), "y has 1 class(es) of at most 8 row(s); to train a unit 2 classes are needed"),
        (np.arange(8), "y has 8 class(es) of at most 1 row(s); to train a unit 2 classes are needed"),
        (np.linspace(0, 1, 8), "Unknown label type"),
        (np.arange(7), "inconsistent numbers of samples"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            fast().fit(x, y)
    model = fast()
    with pytest.raises(NotFittedError):
        model.predict(x)
    model.fit(x, np.arange(8) % 2)
    for args, error, message in (
        ((x[:, :5],), ValueError, "X has 5 features, but PDDMNeighborsClassifier is expecting 6 features"),
        ((x, 9), ValueError, "n_neighbors is 9; 1 to 8 is accepted with 8 rows fitted"),
        ((None, 8), ValueError, "n_neighbors is 8; 1 to 7 is accepted with 8 rows fitted"),
        ((x, 0), ValueError, "n_neighbors == 0"),
        ((x, 1.5), TypeError, "n_neighbors must be an instance of int"),
        ((csr_matrix(x),), TypeError, "dense data is required"),
    ):
        with pytest.raises(error, match=message):
            model.kneighbors(*args)


@pytest.mark.parametrize("scale", [1e-300, 1e-42, 1e36, 1e300])
def test_only_the_direction_of_a_row_counts_however_long_it_is(scale):
    X, y = load_iris(return_X_y=True)
    plain, scaled = (PDDMNeighborsClassifier(steps=5, random_state=0).fit(rows, y) for rows in (X, X * scale))
    np.testing.assert_allclose(scaled.loss_curve_, plain.loss_curve_, rtol=1e-5)
    assert (scaled.predict(X * scale) == plain.predict(X)).mean() > 0.98


@pytest.mark.parametrize("rate", [np.inf, np.nan, 1e30])
def test_training_that_cannot_go_well_is_said(rate):
    X, y = load_iris(return_X_y=True)
    with pytest.raises((ValueError, FloatingPointError), match=r"lr (is|\d)"):
        PDDMNeighborsClassifier(steps=3, lr=rate, random_state=0).fit(X, y)


def test_a_unit_that_is_not_finite_is_refused():
    X, y = load_iris(return_X_y=True)
    unit = pddm_ext.PDDM(4)
    with torch.no_grad():
        unit.s.bias.fill_(np.nan)
    with pytest.raises(ValueError, match="unit has a parameter that is not finite"):
        PDDMNeighborsClassifier(unit=unit).fit(X, y)


def test_weights_are_checked_whenever_they_are_used():
    X, y = load_iris(return_X_y=True)
    fitted = PDDMNeighborsClassifier(steps=2, random_state=0).fit(X, y).set_params(weights="bogus")
    with pytest.raises(ValueError, match="weights is 'bogus'"):
        fitted.predict(X)


def test_fitting_does_not_depend_on_the_mode_torch_is_in():
    X, y = load_iris(return_X_y=True)

    def curve():
        return PDDMNeighborsClassifier(steps=5, random_state=0).fit(X, y).loss_curve_

    plain = curve()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert curve() == plain
    with torch.no_grad():
        assert curve() == plain
    with torch.inference_mode():
        assert curve() == plain
    torch.set_default_dtype(torch.float64)
    try:
        assert curve() == plain
    finally:
        torch.set_default_dtype(torch.float32)
