"""What else the features of unseen classes are good for: finding the classes, and learning them from a few samples."""

from __future__ import annotations

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


def clustering(features: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Normalised and adjusted mutual information, ``nmi`` and ``ami``, of the classes and as many clusters by k-means.

    Features are (n, d), labels (n,) integers; the seed decides where k-means starts.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`.inputs.features` and :func:`.inputs.classes` say.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    inputs.seed(seed)
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


def transfer(features: Tensor, labels: Tensor, seed: int) -> float:
    """Accuracy of a linear classifier trained on one of the :func:`halves`, on the other one.

    Features are (n, d) and stay as they are; labels (n,) integers.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`.inputs.features` and :func:`halves` say.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    support, query = halves(labels, seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(features[support].numpy(), labels[support].numpy())
    return float(probe.score(features[query].numpy(), labels[query].numpy()))


def zero_shot(features: Tensor, labels: Tensor, seed: int) -> float:
    """Accuracy of the nearest class mean of one of the :func:`halves`, on the other one; nothing is trained.

    Features are (n, d), labels (n,) integers.

    Raises:
        TypeError, ValueError, FloatingPointError: as :func:`.inputs.features` and :func:`halves` say.
    """
    features = inputs.features(features)
    labels = inputs.classes(labels, len(features))
    support, query = halves(labels, seed)
    names, member, counts = torch.unique(labels[support], return_inverse=True, return_counts=True)
    sums = torch.zeros(len(names), features.shape[1]).index_add_(0, member, features[support])
    # Not scikit-learn's NearestCentroid, which refuses collapsed features, and divides by zero for classes of one row.
    index = faiss.IndexFlatL2(features.shape[1])
    index.add((sums / counts[:, None]).numpy())
    _, nearest = index.search(features[query].numpy(), 1)
    right = names[torch.from_numpy(nearest[:, 0])] == labels[query]
    return float(right.double().mean())
