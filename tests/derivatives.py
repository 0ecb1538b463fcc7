"""Every differentiable entry beside the reference's, and gradients of their scores."""

from collections.abc import Callable

import torch
from torch import Tensor

import pddm_ext
from helpers import MODES, PARAMETERS, all_pairs, make_features, make_labels
from pddm_ext import reference

Scores = Callable[[Tensor, reference.PDDM], Tensor]


def gradients(scores: Scores, feats: Tensor, unit: reference.PDDM, weight: Tensor | None = None) -> list[Tensor]:
    """Of Σ weight · scores: with respect to the features, then the eight parameters."""
    x = feats.detach().clone().requires_grad_()
    values = scores(x, unit)
    if weight is None:
        weight = make_features(values.numel(), 1, seed=9, dtype=values.dtype).reshape(values.shape)
    leaves = [x, *(unit.get_parameter(name) for name in PARAMETERS)]
    got = torch.autograd.grad((values * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [g.detach() for g in got]


def assert_close_relatively(got: list[Tensor], expected: list[Tensor], tolerance: float, lost: float = 0.0) -> None:
    """Relative to the largest entry of all: one that vanishes by cancellation is compared with what cancelled.

    The features may be off by ``lost`` more. Theirs may be of another order and do not count for the parameters.
    """
    largest = [b.double().abs().max().item() if b.numel() else 0.0 for b in expected]
    for name, a, b in zip(["feats", *PARAMETERS], got, expected, strict=True):
        allowed = tolerance * max(largest) + lost if name == "feats" else tolerance * max(largest[1:])
        error = (a.double() - b.double()).abs()
        assert not error.isnan().any(), name
        assert (error <= allowed).all(), f"{name}: off by {error.max():.3g}, {allowed:.3g} allowed"


def entries(n: int) -> dict[str, tuple[Scores, Scores]]:
    """Every differentiable entry, and the reference's."""
    i, j = all_pairs(n, n)
    labels = make_labels(n, per_class=3)

    def mined(package, mode):
        def scores(x: Tensor, unit: reference.PDDM) -> Tensor:
            q = package.mine_and_score(x, labels, unit, mode=mode)
            return torch.stack([q.s_ij, q.s_ik, q.s_jl])

        return scores

    def both(make) -> tuple[Scores, Scores]:
        return make(pddm_ext), make(reference)

    return {
        "pairs": both(lambda p: lambda x, unit: p.score_pairs(x, i, j, unit)),
        "matrix": both(lambda p: lambda x, unit: p.score_matrix(x, unit)),
        "rectangle": both(lambda p: lambda x, unit: p.score_matrix(x[: n // 3], unit, x[n // 3 :])),
        "call": both(lambda _: lambda x, unit: unit(x[i], x[j])),
        **{mode: both(lambda p, mode=mode: mined(p, mode)) for mode in MODES},
    }


ENTRIES = list(entries(2))
