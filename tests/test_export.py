"""Every public entry exports with dynamic rows, strict and not; the documentation's table is made of these results.

``python tests/test_export.py`` writes the table of docs/transforms.md anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import pddm_ext
from helpers import host_only, make_features, make_labels

pytestmark = host_only("a graph is the same on every device")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "transforms.md"
BEGIN, END = "<!-- made by tests/test_export.py: begin -->\n", "<!-- made by tests/test_export.py: end -->\n"

D, K = 6, 3
#: By a letter, the rows of the example, of another call, and the fewest that the entry takes.
ROWS = {"n": (8, 13, 2), "m": (9, 17, K + 1), "p": (5, 11, 2)}


class Entries(nn.Module):
    """What is exported, by name: each a method of tensors, of which rows are dynamic."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unit, self.head = pddm_ext.PDDM(D), pddm_ext.StructureHead(D)
        self.loss, self.ranking = pddm_ext.QuadrupletLoss(), pddm_ext.MultiClusterRankingLoss()
        self.name = ""

    def forward(self, *arguments: Tensor) -> Any:
        return EXPORTED[self.name][1](self, *arguments)


def features(rows: int, seed: int) -> Tensor:
    return make_features(rows, D, seed=seed)


def labels(rows: int, seed: int) -> Tensor:
    return make_labels(rows, per_class=2, seed=seed)


def below(letter: str) -> Callable[[int, int], Tensor]:
    """Row numbers of what has that letter's rows, in the example and in the other call."""

    def numbers(rows: int, seed: int) -> Tensor:
        most = ROWS[letter][0]
        return torch.randint(0, most, (rows,), generator=torch.Generator().manual_seed(seed))

    return numbers


def candidates(rows: int, seed: int) -> Tensor:
    return torch.randint(-1, ROWS["m"][0], (rows, 4), generator=torch.Generator().manual_seed(seed))


def mined(mode: str, **options: Any) -> Callable[..., Any]:
    return lambda self, x, y: tuple(pddm_ext.mine_and_score(x, y, self.unit, mode=mode, **options))


def method(mode: str) -> Callable[..., Any]:
    return lambda self, x, y: tuple(self.unit.mine(x, y, mode=mode))


N, M = ("n", features), ("m", features)
LABELLED = [N, ("n", labels)]
#: The arguments, each with the letter of its rows and how it is made, and the call.
EXPORTED: dict[str, tuple[list[tuple[str, Callable[[int, int], Tensor]]], Callable[..., Any]]] = {
    "`unit(x, y)`": ([N, N], lambda self, x, y: self.unit(x, y)),
    '`unit.mine`, `"batch"`': (LABELLED, method("batch")),
    '`unit.mine`, `"anchor"`': (LABELLED, method("anchor")),
    '`unit.mine`, `"pair"`': (LABELLED, method("pair")),
    '`mine_and_score`, `"batch"`': (LABELLED, mined("batch")),
    '`mine_and_score`, `"anchor"`': (LABELLED, mined("anchor")),
    '`mine_and_score`, `"pair"`': (LABELLED, mined("pair")),
    "`mine_and_score(…, ignore_label=-3)`": (LABELLED, mined("anchor", ignore_label=-3)),
    "`score_pairs`": (
        [N, ("p", below("n")), ("p", below("n"))],
        lambda self, x, i, j: pddm_ext.score_pairs(x, i, j, self.unit),
    ),
    "`score_matrix`": ([N], lambda self, x: pddm_ext.score_matrix(x, self.unit)),
    "`score_matrix` of two": ([N, M], lambda self, x, y: pddm_ext.score_matrix(x, self.unit, y)),
    "`topk`": ([N, M], lambda self, q, g: pddm_ext.topk(q, g, K, self.unit)),
    "`QuadrupletLoss`": (LABELLED, lambda self, x, y: self.loss(x, self.unit.mine(x, y, mode="anchor"))),
    '`QuadrupletLoss`, `"pair"`': (LABELLED, lambda self, x, y: self.loss(x, self.unit.mine(x, y, mode="pair"))),
    "`StructureHead`": ([N], lambda self, x: self.head(x)),
    "`MultiClusterRankingLoss`": ([N], lambda self, x: self.ranking(x, self.head(x))),
    "`adaptive_distance`": ([N, M], lambda self, q, g: pddm_ext.adaptive_distance(q, self.head(q), g)),
    "`structure_rerank`": (
        [N, M, ("n", candidates)],
        lambda self, q, g, r: pddm_ext.structure_rerank(q, self.head(q), g, r),
    ),
    "`concatenated_queries`": ([N], lambda self, q: pddm_ext.concatenated_queries(q, self.head(q))),
    "`concatenated_gallery`": ([N], lambda self, g: pddm_ext.concatenated_gallery(g)),
    "`reference.mine_and_score`": (
        LABELLED,
        lambda self, x, y: tuple(pddm_ext.reference.mine_and_score(x, y, self.unit, mode="anchor")),
    ),
    "`reference.topk`": ([N, M], lambda self, q, g: pddm_ext.reference.topk(q, g, K, self.unit)),
}
STRICT = {"`strict=False`": False, "`strict=True`": True}


def outcome(name: str, strict: bool) -> str:
    """Exported with one number of rows and called with another, it gives what the entry gives."""
    module = Entries()
    module.name = name
    made, _ = EXPORTED[name]
    example, other = (
        [make(ROWS[letter][call], seed=3 * call + k) for k, (letter, make) in enumerate(made)] for call in (0, 1)
    )
    dims = {letter: Dim(letter, min=least, max=10_000) for letter, (_, _, least) in ROWS.items()}
    graph = export(
        module, tuple(example), dynamic_shapes=(tuple({0: dims[letter]} for letter, _ in made),), strict=strict
    )
    for arguments in (other, example):
        torch.testing.assert_close(graph.module()(*arguments), module(*arguments))
    return "right"


def table() -> str:
    lines = [f"| rows dynamic | {' | '.join(STRICT)} |", "|---|" + "---|" * len(STRICT)]
    lines += [f"| {name} | {' | '.join(outcome(name, strict) for strict in STRICT.values())} |" for name in EXPORTED]
    return "\n".join(lines) + "\n"


def on_page() -> dict[str, list[str]]:
    text = PAGE.read_text("utf-8")
    body = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()[2:]]
    return {name: found for name, *found in cells}


@pytest.mark.parametrize("strict", STRICT)
@pytest.mark.parametrize("name", EXPORTED)
def test_the_page_says_what_exports(name: str, strict: str) -> None:
    assert on_page()[name][list(STRICT).index(strict)] == outcome(name, STRICT[strict])


def test_the_page_has_every_public_entry() -> None:
    assert list(on_page()) == list(EXPORTED)
    text = " ".join(EXPORTED)
    calls = {name for name in pddm_ext.__all__ if name not in ("PDDM", "Quadruplets", "reference", "default_unit")}
    # Health checks and a bank, whose rows change, are no part of a graph; the page says what becomes of the density
    # regularizer.
    for name in calls - {"HealthError", "HealthWarning", "set_health_checks", "DensityRegularizer", "MemoryBank"}:
        assert f"`{name}" in text, name


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    PAGE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + table() + text[text.index(END) :], "utf-8")
    sys.exit(0)
