"""What evaluation accepts, and the words for what it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pddm_ext
from helpers import FLOATS, make_unit
from pddm_ext.workbench.evaluation import probes, retrieval, separation
from pddm_ext.workbench.evaluation.evaluate import measure

N, D = 40, 6


def features(dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(N, D, generator=random), dim=1).to(dtype)


LABELS = torch.arange(N) % 4
ROWS = torch.arange(N)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return measure(features(), LABELS, None, seed=0, structure=features().exp())


# What is accepted


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.clone().requires_grad_(),
        lambda x: x.clone().requires_grad_() * 1,  # with a history
        lambda x: x.repeat(1, 2)[:, :D],  # strided
        lambda x: x.T.contiguous().T,
        lambda x: torch.nn.Parameter(x),
    ],
)
def test_the_same_features_in_another_form_have_the_same_figures(expected: dict[str, Any], change: Any) -> None:
    given = change(features())
    before = given.detach().clone()
    found = measure(given, LABELS.to(torch.int16), None, seed=0, structure=change(features().exp()))
    assert found == expected
    assert torch.equal(given.detach(), before)
    assert not isinstance(found["spread"], Tensor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_features_of_any_floating_dtype_with_a_unit(dtype: torch.dtype) -> None:
    """Rounded rows are of unit norm all the same; a score is of the unit's device and of float32."""
    found = measure(features(dtype), LABELS, make_unit(D, 8, 8), seed=0)
    assert found == measure(features(dtype).float(), LABELS, make_unit(D, 8, 8), seed=0)


def test_a_zero_row_is_what_normalize_leaves_of_one() -> None:
    x = features()
    x[3] = 0
    measure(x, LABELS, None, seed=0)


# What is named


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (features().numpy(), TypeError, "features is a ndarray; a tensor of float32, float64, bfloat16 or float16"),
        (features().tolist(), TypeError, "features is a list; a tensor"),
        (None, TypeError, "features is a NoneType; a tensor"),
        (features().int(), TypeError, "features has dtype torch.int32; float32"),
        (features().to(torch.complex64), TypeError, "features has dtype torch.complex64; float32"),
        (features().to_sparse(), TypeError, "features has layout torch.sparse_coo; a dense tensor"),
        (features().to_mkldnn(), TypeError, "features has layout torch._mkldnn; a dense tensor"),
        (nested(features()), TypeError, "features is nested; a dense tensor"),
        (features().to("meta"), TypeError, "features is on the meta device; a tensor that has values"),
        (features()[0], ValueError, r"features has shape \(6,\); \(rows, dim\) is accepted"),
        (features()[None], ValueError, r"features has shape \(1, 40, 6\); \(rows, dim\)"),
        (features()[:, :0], ValueError, r"features has shape \(40, 0\); at least one row and one dim"),
        (features()[:39], ValueError, "labels has length 40; features has 39"),
        (features() * 3, ValueError, r"features has rows that are not of unit norm: row 0 has norm 3; torch.nn.f"),
        (features() * torch.tensor([[1.0]] * 39 + [[1.1]]), ValueError, r"row 39 has norm 1.1; .*normalize\(features"),
        (features().index_fill(0, torch.tensor([5]), torch.nan), FloatingPointError, "the embedding is not finite"),
        (features().double() * 1e200, FloatingPointError, "the embedding is not finite"),
    ],
)
def test_features_that_are_not_accepted(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure(given, LABELS, None, seed=0)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (LABELS.numpy(), TypeError, "labels is a ndarray; a tensor of an integer dtype"),
        (LABELS.tolist(), TypeError, "labels is a list"),
        (LABELS.float(), TypeError, "labels has dtype torch.float32; an integer dtype"),
        (LABELS > 1, TypeError, "labels has dtype torch.bool; an integer dtype"),
        (LABELS[:, None], ValueError, r"labels has shape \(40, 1\); one dimension"),
        (LABELS[:39], ValueError, "labels has length 39; features has 40"),
        (torch.zeros(N, dtype=torch.int64), ValueError, "labels have 1 classes of two rows or more; at least 2"),
        (torch.arange(N), ValueError, "labels have 0 classes of two rows or more"),
        (LABELS.to_sparse(), TypeError, "labels has layout torch.sparse_coo"),
        (LABELS.to("meta"), TypeError, "labels is on the meta device"),
    ],
)
def test_labels_that_are_not_accepted(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure(features(), given, None, seed=0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"candidates": 0}, ValueError, "candidates is 0; at least 1"),
        ({"candidates": 2.5}, TypeError, "candidates is a float; an int"),
        ({"candidates": True}, TypeError, "candidates is a bool; an int"),
        ({"seed": -1}, ValueError, "seed is -1; at least 0"),
        ({"seed": 2**32}, ValueError, "seed is 4294967296; less than 2"),
        ({"seed": "0"}, TypeError, "seed is a str; an int"),
        ({"unit": make_unit(D + 1, 8, 8)}, ValueError, "unit scores features of dimension 7; these have 6"),
        ({"unit": torch.nn.Linear(D, 1)}, TypeError, "unit is a Linear; a PDDM"),
        ({"structure": features()[:5].exp()}, ValueError, r"structure has shape \(5, 6\)"),
        ({"structure": -features().exp()}, ValueError, "positive values are accepted"),
        ({"structure": features().exp().numpy()}, TypeError, "structure is a ndarray"),
        ({"structure": features() / 0}, FloatingPointError, "structure is not finite"),
    ],
)
def test_other_arguments_that_are_not_accepted(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"unit": None, "seed": 0, **changed}
    with pytest.raises(error, match=message):
        measure(features(), LABELS, arguments.pop("unit"), **arguments)


def empty() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


CALLS: dict[str, Any] = {
    "k of no row": (lambda: retrieval.by_distance(features(), ROWS, N), ValueError, "k is 40; 1 to 39, the other rows"),
    "k of zero": (lambda: retrieval.by_distance(features(), ROWS, 0), ValueError, "k is 0; at least 1"),
    "k of a float": (lambda: retrieval.by_distance(features(), ROWS, 3.0), TypeError, "k is a float"),
    "k by score": (lambda: retrieval.by_score(features(), ROWS, N, make_unit(D)), ValueError, "k is 40; 1 to 39"),
    "one row": (
        lambda: retrieval.by_distance(features()[:1], ROWS[:1], 1),
        ValueError,
        "k is 1; there is no other row",
    ),
    "a query": (lambda: retrieval.by_distance(features(), ROWS + 1, 3), IndexError, "queries are 1 to 40; 0 to 39"),
    "a float query": (lambda: retrieval.by_distance(features(), ROWS / 2, 3), TypeError, "queries has dtype"),
    "queries": (lambda: retrieval.by_distance(features(), ROWS[None], 3), ValueError, r"queries has shape \(1, 40\)"),
    "numpy": (lambda: retrieval.by_distance(features().numpy(), ROWS, 3), TypeError, "features is a ndarray"),
    "a ranked row": (
        lambda: retrieval.rerank(features(), ROWS, ROWS[:, None] + 5, make_unit(D), 1),
        IndexError,
        "ranked are 5 to 44; 0 to 39",
    ),
    "a ranking of others": (
        lambda: retrieval.rerank(features(), ROWS, ROWS[:7, None], make_unit(D), 1),
        ValueError,
        r"ranked has shape \(7, 1\); \(40, k\), a row for each of queries",
    ),
    "per query": (
        lambda: retrieval.per_query(ROWS[:7, None], ROWS, LABELS),
        ValueError,
        r"ranked has shape \(7, 1\); \(40, k\)",
    ),
    "a query alone in its class": (
        lambda: retrieval.per_query(ROWS[:, None], ROWS, ROWS),
        ValueError,
        "queries has row 0, which is alone in its class",
    ),
    "no candidates": (lambda: retrieval.retrieval(features(), LABELS, None, 0, 0), ValueError, "candidates is 0"),
    "nothing alike": (lambda: retrieval.retrieval(features(), ROWS, None, 0, 9), ValueError, "labels have no class of"),
    "nothing alike, recall": (lambda: retrieval.recall_at_k(features(), ROWS), ValueError, "labels have no class of"),
    "nothing at all": (
        lambda: retrieval.recall_at_k(features()[:0], empty()),
        ValueError,
        r"features has shape \(0, 6\)",
    ),
    "no pair": (lambda: separation.pairs(ROWS, 0, 9), ValueError, "labels have no positive pair, or no negative one"),
    "one class": (lambda: separation.pairs(ROWS * 0, 0, 9), ValueError, "labels have no positive pair, or no neg"),
    "no labels": (lambda: separation.pairs(empty(), 0, 9), ValueError, "labels have no positive pair, or no neg"),
    "float labels": (lambda: separation.separation(features(), LABELS / 1, None, 0), TypeError, "labels has dtype"),
    "a spread": (lambda: separation.spread(features() * 2), ValueError, "not of unit norm"),
    "a spread of none": (
        lambda: separation.spread(features()[:0]),
        ValueError,
        r"features has shape \(0, 6\); at least",
    ),
    "a rank": (lambda: separation.effective_rank(features().numpy()), TypeError, "features is a ndarray"),
    "a rank of none": (lambda: separation.effective_rank(features()[:0]), ValueError, r"features has shape \(0, 6\)"),
    "clusters": (lambda: probes.clustering(features(), LABELS[1:], 0), ValueError, "labels has length 39"),
    "no clusters": (lambda: probes.clustering(features()[:0], empty(), 0), ValueError, r"features has shape \(0, 6\)"),
    "a probe": (lambda: probes.transfer(features().int(), LABELS, 0), TypeError, "features has dtype torch.int32"),
    "a mean": (lambda: probes.zero_shot(features() / 0, LABELS, 0), FloatingPointError, "the embedding is not finite"),
    "halves": (lambda: probes.halves(ROWS, 0), ValueError, "labels have 0 classes of two rows or more"),
    "halves of numpy": (lambda: probes.halves(np.arange(4), 0), TypeError, "labels is a ndarray"),
}


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS)
def test_every_function_of_evaluation_names_what_it_does_not_accept(
    call: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_figure_needs_no_unit_on_the_features_device() -> None:
    """Nor a gradient of either."""
    unit = make_unit(D, 8, 8)
    found = retrieval.retrieval(features().requires_grad_(), LABELS, unit, 0, 10)
    assert found.keys() == {"distance", "score", "rerank"}
    assert isinstance(unit, pddm_ext.PDDM)
    assert unit.u.weight.grad is None
