"""PDDM in scikit-learn: a unit's score as a kernel and as a dissimilarity, and a nearest-neighbours classifier by it.

What scikit-learn gives as float64 is scored in float64; float32 rows are scored in float32, in half the time.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .. import _checks, _numbers
from ..losses import QuadrupletLoss
from ..mining import mine_and_score
from ..parameters import Parameters
from ..scoring import score_matrix, topk
from ..unit import PDDM
from . import needs

needs("sklearn", "sklearn")

from sklearn.base import BaseEstimator, ClassifierMixin  # noqa: E402
from sklearn.metrics.pairwise import check_pairwise_arrays  # noqa: E402
from sklearn.utils import check_random_state, check_scalar  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

__all__ = ["PDDMDistance", "PDDMKernel", "PDDMNeighborsClassifier"]

Array: TypeAlias = NDArray[Any]


def _tensor(rows: Array, unit: PDDM) -> Tensor:
    """A copy, where the unit is: joblib hands processes arrays that are not to be written to, which torch would do."""
    if not isinstance(unit, Parameters):
        raise TypeError(f"unit is a {type(unit).__name__}; a PDDM is accepted")
    return torch.tensor(_scaled(rows), device=unit.u.weight.device)


def _scaled(rows: Array) -> Array:
    """Rows by powers of two such that the largest number of each is about 1: no direction overflows, or vanishes."""
    scaled: Array = np.ldexp(rows, -np.frexp(np.abs(rows).max(1, keepdims=True, initial=0))[1])
    return scaled


def _distance(scores: Any) -> Any:
    return np.logaddexp(0.0, -scores)


class PDDMKernel:
    """A unit's score S as a kernel: for ``SVC(kernel=kernel)``, ``pairwise_kernels(X, metric=kernel)``, ``kernel(X)``.

    S is symmetric and not positive semi-definite, and S(x, x) varies from place to place. An SVC fits all the same,
    but to a stationary point that need not be the optimum; methods that rely on eigenvalues or inverses of the kernel
    matrix (Gaussian processes, KernelPCA, KernelRidge) lose their meaning.

    Matrices, as SVC passes them, are scored by one call of the fused kernels. ``pairwise_kernels`` passes two rows at
    a time, n·m times: better give ``kernel(X, Y)``, of the same values, to an estimator's ``"precomputed"`` kernel.

    ``clone`` and joblib's processes work, for a unit can be copied and pickled.

    Args:
        unit: a trained unit, on any device. It is not copied: training it further changes the kernel.

    Shape:
        X (n, d) and Y (m, d), or None for X with itself; or both (d,), one pair. Both are scored in float32 if both
        are float32, else in float64. The result is (n, m) float64, or a float for one pair.

    Raises:
        ValueError: a shape or feature dimension that does not fit; NaN or infinity in X or Y.
        TypeError: unit is not a PDDM; X or Y is sparse.
    """

    def __init__(self, unit: PDDM) -> None:
        self.unit = unit

    def __call__(self, X: ArrayLike, Y: ArrayLike | None = None) -> Array | float:
        one_pair = Y is not None and np.ndim(X) == 1 and np.ndim(Y) == 1
        x, y = check_pairwise_arrays([X] if one_pair else X, [Y] if one_pair else Y, accept_sparse=False)
        with torch.no_grad():
            scores = score_matrix(_tensor(x, self.unit), self.unit, None if y is x else _tensor(y, self.unit))
        return scores.item() if one_pair else scores.cpu().numpy().astype(np.float64)


class PDDMDistance:
    """log(1 + exp(−S)), S a unit's score, as a dissimilarity: for ``pairwise_distances(X, metric=distance)``.

    This, softplus(−S), is non-negative and falls as S rises: nearest is what scores highest. It is not a metric:
    d(x, x) is not 0, and the triangle inequality does not hold. scikit-learn's search trees need that inequality and
    may miss neighbours, so a neighbours estimator takes ``metric=distance`` with ``algorithm="brute"`` only;
    ``"auto"`` means a tree. Asked without X for the neighbours of the rows fitted, it takes a row for its own nearest
    and may drop another: :class:`PDDMNeighborsClassifier` does not, and makes no matrix.

    As with :class:`PDDMKernel`, scikit-learn passes two rows at a time. ``distance(X, Y)``, of the same values, goes
    with ``metric="precomputed"`` (KNeighborsClassifier, AgglomerativeClustering, DBSCAN, …).

    Args:
        unit: a trained unit, as for :class:`PDDMKernel`.

    Shape:
        As of :class:`PDDMKernel`.

    Raises:
        ValueError, TypeError: as of :class:`PDDMKernel`.
    """

    def __init__(self, unit: PDDM) -> None:
        self.unit = unit

    def __call__(self, X: ArrayLike, Y: ArrayLike | None = None) -> Array | float:
        distances: Array | float = _distance(PDDMKernel(self.unit)(X, Y))
        return distances


class PDDMNeighborsClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """k-nearest-neighbours classifier by the score of a PDDM unit, which ``fit`` trains.

    Predicts as ``KNeighborsClassifier(metric=PDDMDistance(unit_), algorithm="brute")`` would, by a streamed top-k: no
    matrix of all pairs is made.

    ``fit`` trains the unit by the score loss on hard quadruplets of class-balanced batches. The features stay as they
    are. Every positive pair gives a quadruplet (mode ``"pair"``): where the score loss is alone, the hardest positives
    of the other modes tend to draw all scores together. A batch has equally many rows of each class, 4 at least (fewer
    of a class that has fewer), and of as many classes as then fit, drawn anew each time. Training is in float32 on the
    CPU; to train on a GPU, or a network with the unit, write the loop yourself and pass ``unit``.

    The unit L2-normalises rows, so only their direction counts, as in cosine similarity. Nothing else is done to them:
    put a ``StandardScaler`` before this in a pipeline where features differ in scale or have a common offset, and then
    ``PolynomialFeatures(1)`` where the length matters, too: its constant column keeps it.

    Args:
        n_neighbors: how many neighbours vote.
        weights: ``"uniform"``, or ``"distance"`` for votes that weigh 1/distance.
        unit: a trained unit of the features' dimension, used as it is and never changed. Without one, one is trained
            by what follows.
        hidden: length of the unit's hidden and combined layers.
        steps: how many batches to train on.
        batch_size: rows of a batch, 8 at least.
        lr: learning rate of Adam. Too high a one draws all scores together: the loss stays at 1.
        weight_decay: of Adam.
        random_state: int, RandomState or None, for the initial weights and the batches. An int makes the same unit
            every time. Torch's global generator is neither used nor moved.
        ignore_label: the label of rows whose class is not known, such as −1: they are left out.

    Attributes:
        unit_: the unit, trained or given.
        loss_curve_: the loss of every step, a list; empty where a unit was given.
        classes_: (c,) sorted class labels.
        n_samples_fit_: rows fitted.
        n_features_in_, feature_names_in_: as in all of scikit-learn.

    Source: Huang, Loy, Tang, NIPS 2016, section 3, for the score and its loss.
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        weights: str = "uniform",
        unit: PDDM | None = None,
        hidden: int = 64,
        steps: int = 1000,
        batch_size: int = 64,
        lr: float = 1e-3,
        weight_decay: float = 5e-4,
        random_state: int | np.random.RandomState | None = None,
        ignore_label: int | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.weights = weights
        self.unit = unit
        self.hidden = hidden
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.random_state = random_state
        self.ignore_label = ignore_label

    def fit(self, X: ArrayLike, y: ArrayLike) -> PDDMNeighborsClassifier:
        """Keep the rows to compare with, and train the unit unless one is given.

        Args:
            X: (n, d), kept in float32 or float64.
            y: (n,) class labels, numbers or strings.

        Returns:
            self.

        Raises:
            ValueError: a parameter, shape or feature dimension that does not fit; NaN or infinity; y has no classes,
                or, where a unit is to be trained, one class or no class of two rows.
            TypeError: a parameter of a wrong type; X is sparse.
            FloatingPointError: training diverged.
        """
        check_scalar(self.n_neighbors, "n_neighbors", Integral, min_val=1)
        self._check_weights()
        rows, targets = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(targets)
        if self.ignore_label is not None:
            known = targets != self.ignore_label
            if not known.any():
                raise ValueError(f"y has no label but {self.ignore_label}, which ignore_label leaves out")
            rows, targets = rows[known], targets[known]
        self.classes_, labels = np.unique(targets, return_inverse=True)
        if self.unit is None:
            # Whatever mode torch is in around fit, or a loss could have no gradient, or another value.
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
                self.unit_, self.loss_curve_ = self._train(rows, labels)
        else:
            _checks.matrix(_tensor(rows[:1], self.unit), self.unit, None)
            if not _finite(self.unit):
                raise ValueError("unit has a parameter that is not finite")
            self.unit_, self.loss_curve_ = self.unit, []
        self._rows, self._labels, self.n_samples_fit_ = rows, labels, len(rows)
        return self

    def kneighbors(
        self, X: ArrayLike | None = None, n_neighbors: int | None = None, return_distance: bool = True
    ) -> tuple[Array, Array] | Array:
        """The rows fitted that score highest with each row of X.

        Args:
            X: (q, d), or None for the rows fitted, of which none is its own neighbour.
            n_neighbors: how many; by default the parameter of that name.
            return_distance: whether the distances are wanted.

        Returns:
            Distances (q, k) float64, those of :class:`PDDMDistance`, nearest first; and rows (q, k) int64, ties by the
            lowest. Without ``return_distance`` the rows alone.

        Raises:
            ValueError: a shape or number that does not fit; NaN or infinity.
            TypeError: n_neighbors is no integer; X is sparse.
            NotFittedError: before ``fit``.
        """
        check_is_fitted(self)
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        most = self.n_samples_fit_ - (X is None)
        check_scalar(k, "n_neighbors", Integral, min_val=1)
        if k > most:
            raise ValueError(f"n_neighbors is {k}; 1 to {most} is accepted with {self.n_samples_fit_} rows fitted")
        gallery = _tensor(self._rows, self.unit_)
        if X is None:
            queries = gallery
        else:
            queries = _tensor(validate_data(self, X, reset=False, dtype=self._rows.dtype), self.unit_)
        scores, rows = (t.cpu().numpy() for t in topk(queries, gallery, int(k) + (X is None), self.unit_))
        if X is None:
            others = rows != np.arange(len(rows))[:, None]
            others[others.all(1), -1] = False  # a row need not be among its own nearest
            scores, rows = scores[others].reshape(-1, k), rows[others].reshape(-1, k)
        return (_distance(scores.astype(np.float64)), rows) if return_distance else rows

    def predict_proba(self, X: ArrayLike | None) -> Array:
        """Each class's share of the neighbours' votes.

        Args:
            X: (q, d), or None for the rows fitted, of which none is its own neighbour.

        Returns:
            (q, c) float64, in the order of ``classes_``.

        Raises:
            ValueError, TypeError, NotFittedError: as of :meth:`kneighbors`.
        """
        self._check_weights()
        distances, rows = self.kneighbors(X)
        if self.weights == "distance":
            nearest = np.maximum(distances, np.finfo(np.float64).tiny)  # softplus(−S) underflows at S = 745
            votes = nearest[:, :1] / nearest
        else:
            votes = np.ones_like(distances)
        shares = np.zeros((len(rows), len(self.classes_)))
        np.add.at(shares, (np.arange(len(rows))[:, None], self._labels[rows]), votes)
        shares /= votes.sum(1, keepdims=True)
        return shares

    def predict(self, X: ArrayLike | None) -> Array:
        """The class of most votes; ties go to the first in ``classes_``. As :meth:`predict_proba` otherwise.

        Returns:
            (q,) labels, of the dtype of ``classes_``.
        """
        best = self.predict_proba(X).argmax(1)
        labels: Array = self.classes_[best]
        return labels

    def _check_weights(self) -> None:
        if self.weights not in ("uniform", "distance"):
            raise ValueError(f"weights is {self.weights!r}; 'uniform', 'distance' are accepted")

    def _train(self, rows: Array, labels: Array) -> tuple[PDDM, list[float]]:
        check_scalar(self.hidden, "hidden", Integral, min_val=1)
        check_scalar(self.steps, "steps", Integral, min_val=1)
        check_scalar(self.batch_size, "batch_size", Integral, min_val=8)
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            _numbers.number(name, value, "a finite number from 0")
        sizes = np.bincount(labels)
        if len(sizes) == 1 or sizes.max() == 1:
            raise ValueError(
                f"y has {len(sizes)} class(es) of at most {sizes.max()} row(s); to train a unit 2 classes are needed, "
                "one of them of 2 rows"
            )
        rng = check_random_state(self.random_state)
        unit = _initial_unit(rows.shape[1], int(self.hidden), rng)
        loss_fn = QuadrupletLoss()
        optimizer = torch.optim.Adam(unit.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        feats, ids = torch.tensor(_scaled(rows), dtype=torch.float32), torch.tensor(labels)
        classes = np.split(labels.argsort(kind="stable"), sizes.cumsum()[:-1])
        per_class = max(4, self.batch_size // len(classes))
        losses = []
        for _ in range(self.steps):
            drawn = rng.permutation(len(classes))[: self.batch_size // per_class]
            batch = torch.from_numpy(np.concatenate([rng.permutation(classes[c])[:per_class] for c in drawn]))
            loss = loss_fn.similarity(mine_and_score(feats[batch], ids[batch], unit, mode="pair"))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        if not _finite(unit):
            raise FloatingPointError(f"training diverged at lr {self.lr}; lower it")
        return unit, losses


def _finite(unit: PDDM) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in unit.parameters())


def _initial_unit(dim: int, hidden: int, rng: np.random.RandomState) -> PDDM:
    """A unit with nn.Linear's initial distribution: its own draws would be torch's, which other threads share."""
    with torch.device("meta"):
        unit = PDDM(dim, hidden, hidden).float()
    unit.to_empty(device="cpu")
    with torch.no_grad():
        for layer in (unit.u, unit.v, unit.c, unit.s):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                parameter.copy_(torch.from_numpy(rng.uniform(-bound, bound, parameter.shape)))
    return unit
