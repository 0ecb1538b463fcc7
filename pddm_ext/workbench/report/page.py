"""The comparison of methods over seeds: a table for a terminal, and one self-contained HTML page."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import combining, east_asian_width

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from ..checkpoint import write_bytes
from ..evaluation.retrieval import KS
from ..measuring import COLLAPSED
from . import figures, pictures
from .figures import Cells
from .pictures import Examples
from .templates import environment

PAGE = "report.html"
RANKINGS = {"distance": "by distance", "score": "by score", "rerank": "re-ranked", "structure": "by structure"}
RAW = "raw pixels"

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class _Column:
    """A figure of the table: its group and name there, how it is written, and whether more of it is better."""

    group: str
    name: str
    percent: bool = True
    digits: int = 1
    better: bool = True

    def text(self, value: float) -> str:
        return f"{100 * value if self.percent else value:.{self.digits}f}"


_COLUMNS = {
    **{f"recall@{k}": _Column("Recall at, %", str(k)) for k in KS},
    "map_at_r": _Column("Ranking, %", "MAP@R"),
    "r_precision": _Column("Ranking, %", "R-prec."),
    "nmi": _Column("Clusters, %", "NMI"),
    "ami": _Column("Clusters, %", "AMI"),
    "transfer": _Column("New classes, %", "transfer"),
    "zero_shot": _Column("New classes, %", "zero-shot"),
    "spread": _Column("Embedding", "spread", percent=False, digits=3, better=False),
    "effective_rank": _Column("Embedding", "eff. rank", percent=False, better=False),
    "speed": _Column("Speed", "steps/s", percent=False),
}
_SHORT = {"recall@1": "R@1", "recall@8": "R@8", "map_at_r": "MAP@R", "spread": "spread", "speed": "steps/s"}


@dataclass(frozen=True)
class _Value:
    """A figure over seeds: the mean with the sample standard deviation, or one seed's with its interval, if any."""

    mean: float
    deviation: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Row:
    label: str
    ranking: str
    seeds: tuple[int, ...]
    collapsed: tuple[int, ...]
    values: dict[str, _Value]


@dataclass(frozen=True)
class _Collapse:
    label: str
    collapsed: tuple[int, ...]
    seeds: int


def table(cells: Cells, raw: Metrics | None = None) -> str:
    """The main figures of each method as lines for a terminal, and which methods collapsed.

    Args:
        cells: the metrics of each method's seeds, as in ``metrics.json``.
        raw: a ranking's figures (``recall``, ``map_at_r``, ``r_precision``) for raw pixels.

    Raises:
        ValueError: nothing to tabulate; the message names it.
    """
    rows = _rows(cells, raw)
    names = [row.label + ("" if row.ranking == "distance" else f", {RANKINGS[row.ranking]}") for row in rows]
    texts = [[_line(_COLUMNS[key], row.values[key]) if key in row.values else "" for key in _SHORT] for row in rows]
    lines = _aligned([["", *_SHORT.values()], *([name, *line] for name, line in zip(names, texts, strict=True))], ">")
    for collapse in _collapses(cells):
        lines.append(
            f"{collapse.label} has collapsed on {len(collapse.collapsed)} of {_count(collapse.seeds, 'seed')} "
            f"({_listed(collapse.collapsed)}): spread below {COLLAPSED}."
        )
    return "\n".join(lines)


def summary(metrics: Metrics) -> str:
    """Every figure of one run as lines for a terminal, rankings side by side, in percent with 95 % intervals."""
    rows = _rows({"": [metrics]}, None)
    lines = [["", *(RANKINGS[row.ranking] for row in rows)]]
    for key, column in _COLUMNS.items():
        values = [row.values[key] for row in rows if key in row.values]
        texts = [
            column.text(value.mean)
            + (f" ({column.text(value.interval[0])} to {column.text(value.interval[1])})" if value.interval else "")
            for value in values
        ]
        lines.append([f"Recall@{column.name}" if key.startswith("recall") else column.name, *texts])
    for key in ("overlap", "auc"):
        pairs = (metrics["pairs"][row.ranking] for row in rows if row.ranking in metrics["pairs"])
        lines.append(["AUC" if key == "auc" else key, *(f"{100 * pair[key]:.1f}" for pair in pairs)])
    text = "\n".join(_aligned(lines, "<"))
    if metrics["collapsed"]:
        text += f"\nThe embedding has collapsed: its spread is below {COLLAPSED}."
    return text


def _aligned(lines: Sequence[Sequence[str]], side: str) -> list[str]:
    """Lines of cells in columns that never touch, the first to the left and the others to a side, "<" or ">"."""
    columns = max(map(len, lines))
    widths = [max(_width(line[c]) for line in lines if c < len(line)) for c in range(columns)]

    def cell(text: str, width: int, side: str) -> str:
        padding = " " * (width - _width(text))
        return text + padding if side == "<" else padding + text

    sides = ["<", *side * (columns - 1)]
    return ["  ".join(map(cell, line, widths, sides)).rstrip() for line in lines]


def _width(text: str) -> int:
    """Columns of a terminal: East Asian letters take two, marks that stand on others none."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def write(path: Path, cells: Cells, raw: Metrics | None = None, examples: Examples | None = None) -> Path:
    """Write the page of a comparison: one HTML file that fetches nothing, the same bytes for the same input.

    Args:
        path: of the file, in an existing folder.
        cells: the metrics of each method's seeds, as in ``metrics.json``.
        raw: a ranking's figures (``recall``, ``map_at_r``, ``r_precision``) for raw pixels.
        examples: what to show in pictures; without it the page has none.

    Returns:
        ``path``.

    Raises:
        ValueError: nothing to report; the message names it.
    """
    rows = _rows(cells, raw)
    everything = [metrics for seeds in cells.values() for metrics in seeds]
    templates = environment()
    templates.filters["breakable"] = _breakable
    shared, differing = _settings(cells)
    page = templates.get_template("page.html.j2").render(
        rows=rows,
        groups=_groups(),
        columns=_COLUMNS,
        best=_best(rows),
        rankings=RANKINGS,
        raw=RAW,
        listed=_listed,
        count=_count,
        seeds=_distinct(metrics["settings"]["seed"] for metrics in everything),
        several=any(len(seeds) > 1 for seeds in cells.values()),
        leader=_leader(rows),
        collapses=_collapses(cells),
        threshold=COLLAPSED,
        methods=list(cells),
        curves=_curves(cells, raw),
        histograms=_histograms(cells),
        maps={} if examples is None else {label: pictures.chart(examples, label) for label in examples.shown},
        queries=[] if examples is None else pictures.queries(examples),
        quadruplets={}
        if examples is None
        else {label: quads for label in examples.shown if (quads := pictures.quadruplets(examples, label))},
        examples=examples,
        shared=shared,
        differing=differing,
        data={
            side: [_split(split) for split in _distinct(metrics["data"][side] for metrics in everything)]
            for side in ("train", "test")
        },
        environment={
            name: _distinct(metrics["environment"][name] for metrics in everything)
            for name in everything[0]["environment"]
        },
    )
    write_bytes(path, page.encode("utf-8", "backslashreplace"))  # a file's name may hold what UTF-8 does not
    return path


def _ranked(result: Metrics) -> dict[str, Metrics]:
    recall = {f"recall@{k}": result["recall"][str(k)] for k in KS}
    return {**recall, "map_at_r": result["map_at_r"], "r_precision": result["r_precision"]}


def _figures(metrics: Metrics, ranking: str) -> dict[str, _Value]:
    """One cell's figures under a ranking; those of the embedding stand with the distance."""
    values = {
        key: _Value(figure["value"], interval=(figure["low"], figure["high"]))
        for key, figure in _ranked(metrics["results"][ranking]).items()
    }
    if ranking == "distance":
        curves = metrics["curves"]
        rest = {
            **metrics["clustering"],
            **{key: metrics[key] for key in ("transfer", "zero_shot", "spread", "effective_rank")},
            "speed": curves["step"][-1] / curves["seconds"][-1],
        }
        values |= {key: _Value(rest[key]) for key in _COLUMNS if key in rest}
    return values


def _rows(cells: Cells, raw: Metrics | None) -> list[_Row]:
    if not cells:
        raise ValueError("cells is empty; at least one method is accepted")
    rows = []
    if raw is not None:
        values = {key: _Value(v["value"], interval=(v["low"], v["high"])) for key, v in _ranked(raw).items()}
        rows.append(_Row(RAW, "distance", (), (), values))
    for label, seeds in cells.items():
        if not seeds:
            raise ValueError(f"{label} has no finished seed; at least one is accepted")
        numbers = tuple(metrics["settings"]["seed"] for metrics in seeds)
        collapsed = tuple(metrics["settings"]["seed"] for metrics in seeds if metrics["collapsed"])
        for ranking in RANKINGS:
            if ranking in seeds[0]["results"]:
                each = [_figures(metrics, ranking) for metrics in seeds]
                values = {key: _over_seeds([figures[key] for figures in each]) for key in each[0]}
                rows.append(_Row(label, ranking, numbers, collapsed, values))
    return rows


def _over_seeds(values: Sequence[_Value]) -> _Value:
    if len(values) == 1:
        return values[0]
    means = [value.mean for value in values]
    return _Value(statistics.fmean(means), deviation=statistics.stdev(means))


def _line(column: _Column, value: _Value) -> str:
    return column.text(value.mean) + ("" if value.deviation is None else f" ± {column.text(value.deviation)}")


def _best(rows: Sequence[_Row]) -> dict[str, str]:
    """The best value of each column as it is written, so that what looks equal is marked alike."""
    return {
        key: column.text(max(row.values[key].mean for row in rows if key in row.values))
        for key, column in _COLUMNS.items()
        if column.better and any(key in row.values for row in rows)
    }


def _leader(rows: Sequence[_Row]) -> _Row:
    return max((row for row in rows if row.seeds), key=lambda row: row.values["recall@1"].mean)


def _groups() -> list[tuple[str, int]]:
    names = [column.group for column in _COLUMNS.values()]
    return [(name, names.count(name)) for name in dict.fromkeys(names)]


def _collapses(cells: Cells) -> list[_Collapse]:
    found = []
    for label, seeds in cells.items():
        collapsed = tuple(metrics["settings"]["seed"] for metrics in seeds if metrics["collapsed"])
        if collapsed:
            found.append(_Collapse(label, collapsed, len(seeds)))
    return found


def _curves(cells: Cells, raw: Metrics | None) -> list[tuple[str, Markup]]:
    """Titles and drawings."""
    level = None if raw is None else raw["recall"]["1"]["value"]
    return [
        (title, _drawn(figures.curves(cells, quantity, against, level if quantity == "recall" else None), name))
        for name, title, quantity, against in (
            ("c1", "Recall@1 over steps", "recall", "step"),
            ("c2", "Recall@1 over training time", "recall", "seconds"),
            ("c3", "Spread over steps", "spread", "step"),
            ("c4", "Effective rank over steps", "effective_rank", "step"),
        )
    ]


@dataclass(frozen=True)
class _Histogram:
    label: str
    kind: str
    drawn: Markup
    overlap: str
    auc: str


def _histograms(cells: Cells) -> list[_Histogram]:
    drawn: list[_Histogram] = []
    for label, seeds in cells.items():
        for kind, name, axis in (("distance", "distance", "negative distance"), ("score", "PDDM score", "score S")):
            each = [metrics["pairs"][kind] for metrics in seeds if kind in metrics["pairs"]]
            if each:
                # Distances have one scale. A score has its own in each run, so that a mean of them would show nothing.
                figure = _drawn(figures.pairs(each if kind == "distance" else each[:1], axis), f"h{len(drawn)}")
                overlap, auc = (_over_seeds([_Value(pair[key]) for pair in each]) for key in ("overlap", "auc"))
                percent, plain = _Column("", ""), _Column("", "", percent=False, digits=3)
                drawn.append(_Histogram(label, name, figure, _line(percent, overlap) + " %", _line(plain, auc)))
    return drawn


def _drawn(figure: Figure, name: str) -> Markup:
    return Markup(figures.inline(figure, name))


def _settings(cells: Cells) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Settings that all cells share, and the others by name: each method's values."""
    every = {label: [metrics["settings"] for metrics in seeds] for label, seeds in cells.items()}
    shared: dict[str, Any] = {}
    differing: dict[str, list[Any]] = {}
    for name in next(iter(every.values()))[0]:
        values = [_distinct(settings[name] for settings in seeds) for seeds in every.values()]
        if name == "seed":
            continue
        if name != "method" and all(value == values[0] and len(value) == 1 for value in values):
            shared[name] = values[0][0]
        else:
            differing[name] = [_listed(value) for value in values]
    return shared, differing


def _split(split: Metrics) -> str:
    return f"{split['classes']} classes, {split['pictures']} pictures: {', '.join(split['from'])}"


def _breakable(label: str) -> Markup:
    """A label that may be broken between its settings."""
    # Of a str: a Markup would escape what is put into it.
    return Markup(re.sub("([:,])", r"\1<wbr>", str(escape(label))))


def _distinct(values: Iterator[Any] | Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
