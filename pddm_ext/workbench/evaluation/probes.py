"""What else features of test classes are good for: finding the classes, and learning them from a few samples."""

from __future__ import annotations

import warnings

import faiss
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import FaissKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from . import inputs

#: Classes that are learned at most, a random choice of more; a linear probe holds numbers of rows × classes.
CLASSES = 500


def clustering(features: Tensor, labels: Tensor, seed: int, queries: Tensor | None = None) -> dict[str, float | None]:
    """Normalised and adjusted mutual information, ``nmi`` and ``ami``, of the classes and as many clusters by k-means.

    Both are None where no class has two rows, so that nothing belongs together.

    Args:
        features: (n, d).
        labels: (n,) integers.
        seed: decides where k-means starts.
        queries: (q,) distinct rows to cluster; all of them without it.

    Raises:
        TypeError, ValueError, IndexError, FloatingPointError: as :func:`.inputs.features`, :func:`.inputs.classes` and
            :func:`.inputs.sides` say.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    inputs.seed(seed)
    if queries is not None:
        rows, _ = inputs.sides(queries, None, len(features))
        features, labels = features[rows], inputs.classes(labels[rows], None)
    if len(torch.unique(labels)) == len(labels):
        return {"nmi": None, "ami": None}
    k_means = FaissKMeans(
        niter=20,
        seed=seed % 2**31,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,  # else faiss warns of classes of few pictures
    )
    calculator = AccuracyCalculator(include=("NMI", "AMI"), device=torch.device("cpu"), kmeans_func=k_means)
    figures = calculator.get_accuracy(features, labels)
    return {"nmi": float(figures["NMI"]), "ami": float(figures["AMI"])}


def halves(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to learn from and rows to test on, half of each class in either: two int64 vectors, drawn by the seed.

    Classes of fewer than two rows are left out, and all but :data:`CLASSES` of the rest.

    Raises:
        TypeError: labels are no integers.
        ValueError: labels are no (n,), or no two classes have two rows.
    """
    labels = inputs.classes(labels, None)
    inputs.seed(seed)
    names, counts = torch.unique(labels, return_counts=True)
    names = names[counts >= 2]
    if len(names) < 2:
        raise ValueError(f"labels have {len(names)} classes of two rows or more; at least 2 are accepted")
    kept = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:CLASSES]]
    rows = torch.isin(labels, kept).nonzero().flatten().numpy()
    support, query = train_test_split(rows, test_size=0.5, stratify=labels[rows].numpy(), random_state=seed)
    return torch.from_numpy(support), torch.from_numpy(query)


def learned(
    labels: Tensor, seed: int, queries: Tensor | None = None, gallery: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Rows to learn from and rows to test on: two int64 vectors without a row in common.

    Learned are the rows of the gallery that are no queries, tested the queries, of the classes that both have (of
    :data:`CLASSES` of them, drawn by the seed, where there are more). Where every row of the gallery is a query, as
    where all are searched among all, they are the :func:`halves` of the queries.

    Returns:
        None where a gallery has fewer than two such classes.

    Raises:
        TypeError: something is no integers.
        ValueError: a shape, queries or a gallery that are not accepted; or as :func:`halves` says.
        IndexError: a row that is not there.
    """
    labels = inputs.classes(labels, None)
    asked, among = inputs.sides(queries, gallery, len(labels))
    support = among[~torch.isin(among, asked)]
    if len(support) == 0:
        one, other = halves(labels[asked], seed)
        return asked[one], asked[other]
    inputs.seed(seed)
    shared = torch.unique(labels[support])
    shared = shared[torch.isin(shared, labels[asked])]
    if len(shared) < 2:
        return None
    kept = shared[torch.randperm(len(shared), generator=torch.Generator().manual_seed(seed))[:CLASSES]]
    return support[torch.isin(labels[support], kept)], asked[torch.isin(labels[asked], kept)]


def transfer(
    features: Tensor, labels: Tensor, seed: int, queries: Tensor | None = None, gallery: Tensor | None = None
) -> float | None:
    """Accuracy of a linear classifier trained on the rows to learn from, on those to test on, as :func:`learned` has
    them: with a gallery apart from the queries, how well the queries' classes are learned from it, however few samples
    of a class it has; else how well from half of each class.

    Features are (n, d) and stay as they are; labels (n,) integers; queries and gallery distinct rows. None where there
    is nothing to learn from.

    Raises:
        TypeError, ValueError, IndexError, FloatingPointError: as :func:`.inputs.features` and :func:`learned` say.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    rows = learned(labels, seed, queries, gallery)
    if rows is None:
        return None
    support, query = rows
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        # Of one or two samples a class, which are what a catalogue has.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        probe.fit(features[support].numpy(), labels[support].numpy())
    return float(probe.score(features[query].numpy(), labels[query].numpy()))


def zero_shot(
    features: Tensor, labels: Tensor, seed: int, queries: Tensor | None = None, gallery: Tensor | None = None
) -> float | None:
    """:func:`transfer` without training: accuracy of the nearest class mean of the rows to learn from.

    Of a gallery with one sample a class that is its nearest row.

    Raises:
        TypeError, ValueError, IndexError, FloatingPointError: as :func:`.inputs.features` and :func:`learned` say.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    rows = learned(labels, seed, queries, gallery)
    if rows is None:
        return None
    support, query = rows
    names, member, counts = torch.unique(labels[support], return_inverse=True, return_counts=True)
    sums = torch.zeros(len(names), features.shape[1]).index_add_(0, member, features[support])
    # Not scikit-learn's NearestCentroid, which refuses collapsed features, and divides by zero for classes of one row.
    index = faiss.IndexFlatL2(features.shape[1])
    index.add((sums / counts[:, None]).numpy())
    _, nearest = index.search(features[query].numpy(), 1)
    right = names[torch.from_numpy(nearest[:, 0])] == labels[query]
    return float(right.double().mean())
