"""Retrieval figures of an embedding on the test set."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

import pddm_ext

KS = (1, 2, 4, 8)


def embed(net: nn.Module, images: Tensor) -> Tensor:
    """Unit features (n, dim) of images (n, 1, 32, 32), in evaluation mode; the net's mode is put back."""
    was_training = net.training
    net.eval()
    with torch.no_grad():
        features = torch.cat([net(part) for part in torch.split(images, 256)])
    net.train(was_training)
    return F.normalize(features, dim=1)


def _recall(neighbours: Tensor, labels: Tensor) -> dict[int, float]:
    hits = labels[neighbours] == labels[:, None]
    return {k: hits[:, :k].any(1).double().mean().item() for k in KS}


def recall_at_k(features: Tensor, labels: Tensor) -> dict[int, float]:
    """Share of rows (n, d) with their own class among the K nearest other rows (Euclidean), for K = 1, 2, 4, 8."""
    search = NearestNeighbors(n_neighbors=max(KS), algorithm="brute").fit(features.numpy())
    return _recall(torch.from_numpy(search.kneighbors(return_distance=False)), labels)


def recall_by_score(features: Tensor, labels: Tensor, unit: pddm_ext.PDDM) -> dict[int, float]:
    """:func:`recall_at_k` with the unit's score instead of the Euclidean distance."""
    _, ranked = pddm_ext.topk(features, features, max(KS) + 1, unit)
    # The score need not put a row itself first; a stable sort moves it last, wherever it is.
    itself = ranked == torch.arange(len(ranked))[:, None]
    ranked = ranked.gather(1, itself.byte().sort(dim=1, stable=True).indices)
    return _recall(ranked[:, :-1], labels)


def spread(features: Tensor) -> float:
    """Half the mean squared distance between unit features: 1 around the whole sphere, 0 when all are one point."""
    return 1 - features.mean(0).square().sum().item()


def pair_values(values: Tensor, labels: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The entries above the diagonal of an (n, n) matrix: those of positive pairs, those of negative pairs."""
    i, j = torch.triu_indices(len(labels), len(labels), 1)
    above, same = values[i, j].double(), labels[i] == labels[j]
    return above[same].numpy(), above[~same].numpy()


def histograms(
    positive: NDArray[np.float64], negative: NDArray[np.float64], bins: int = 60
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
    """Shares of positive and of negative pairs in common bins, the bins' edges, and the overlap of the two.

    The overlap is the sum over bins of the smaller share: 0 for separate histograms, 1 for equal ones.
    """
    low, high = min(positive.min(), negative.min()), max(positive.max(), negative.max())
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    p, n = (np.histogram(values, edges)[0] / len(values) for values in (positive, negative))
    return p, n, edges, float(np.minimum(p, n).sum())
