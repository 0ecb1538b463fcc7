"""The comparison of methods over seeds: a table for a terminal, and one self-contained HTML page."""

from __future__ import annotations

import math
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
from ..evaluation.separation import FPRS
from ..measuring import COLLAPSED
from . import figures, pictures
from .figures import Cells
from .pictures import Examples
from .templates import environment

PAGE = "report.html"
RANKINGS = {"distance": "by distance", "score": "by score", "rerank": "re-ranked", "structure": "by structure"}
RAW = "raw pixels"
#: What training began with, by the names that ``metrics.json`` has for it.
BASELINES = {"backbone": "backbone features", "untrained": "untrained"}
#: The settings that such a baseline depends on, beside the data and the seed.
_DEPENDS = {name: ("backbone", "pretrained", "picture", "dim")[: 3 + (name == "untrained")] for name in BASELINES}

#: What the page calls the sides of the data.
_SIDES = {"train": "train", "val": "validation", "test": "test", "gallery": "gallery"}

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class _Column:
    """A figure of the table: its group and name there, how it is written, and whether more of it is better (1), less
    (-1), or neither (0)."""

    group: str
    name: str
    percent: bool = True
    digits: int = 1
    better: int = 1

    def text(self, value: float | None) -> str:
        if value is None:
            return "—"
        return f"{100 * value if self.percent else value:.{self.digits}f}"


_COLUMNS = {
    **{f"recall@{k}": _Column("Recall at, %", str(k)) for k in KS},
    "map_at_r": _Column("Ranking, %", "MAP@R"),
    "r_precision": _Column("Ranking, %", "R-prec."),
    **{f"tpr@{rate}": _Column("Same or not, %", f"TPR@1e{math.log10(rate):.0f}") for rate in FPRS},
    "eer": _Column("Same or not, %", "EER", better=-1),
    "nmi": _Column("Clusters, %", "NMI"),
    "ami": _Column("Clusters, %", "AMI"),
    "transfer": _Column("Learned, %", "transfer"),
    "zero_shot": _Column("Learned, %", "zero-shot"),
    "spread": _Column("Embedding", "spread", percent=False, digits=3, better=0),
    "effective_rank": _Column("Embedding", "eff. rank", percent=False, better=0),
    "speed": _Column("Speed", "steps/s", percent=False),
}
_SHORT = {"recall@1": "R@1", "recall@8": "R@8", "map_at_r": "MAP@R", "spread": "spread", "speed": "steps/s"}


@dataclass(frozen=True)
class _Value:
    """A figure over seeds: the mean with the sample standard deviation, or one seed's with its interval, if any.

    The mean is None where there was nothing to measure.
    """

    mean: float | None
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
class _Below:
    """A method that ends below a baseline: on which of its seeds, and figures, in percent, of these seeds and of it."""

    label: str
    baseline: str
    below: tuple[int, ...]
    seeds: int
    figures: str

    def __str__(self) -> str:
        on = f" on {len(self.below)} of {_count(self.seeds, 'seed')} ({_listed(self.below)})" if self.label else ""
        return f"{self.label or 'The run'} has ended below {self.baseline}{on}, by distance: {self.figures}"


@dataclass(frozen=True)
class _Collapse:
    label: str
    collapsed: tuple[int, ...]
    seeds: int


def table(cells: Cells, raw: Metrics | None = None) -> str:
    """The main figures of each method as lines for a terminal, which methods collapsed, and which ended below what they
    began with.

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
    lines += [f"{below}." for below in _below(cells)]
    return "\n".join(lines)


def summary(metrics: Metrics) -> str:
    """Every figure of one run as lines for a terminal, rankings side by side, in percent with 95 % intervals.

    Then what training began with, and what a reader of the figures has to know of the run.
    """
    rows = [row for row in _rows({"": [metrics]}, None) if row.seeds]
    lines = [["", *(RANKINGS[row.ranking] for row in rows)]]
    for key, column in _columns(rows).items():
        name = f"Recall@{column.name}" if key.startswith("recall") else column.name
        lines.append([name, *(_interval(column, row.values[key]) if key in row.values else "" for row in rows)])
    for key in ("overlap", "auc"):
        pairs = [metrics["pairs"].get(row.ranking) for row in rows]
        lines.append(
            ["AUC" if key == "auc" else key, *("" if pair is None else f"{100 * pair[key]:.1f}" for pair in pairs)]
        )
    text = _aligned(lines, "<")
    started = _baselines({"": [metrics]})
    if started:
        shown = {key: column for key, column in _COLUMNS.items() if key in ("recall@1", "recall@8", "map_at_r")}
        names = [f"Recall@{column.name}" if key != "map_at_r" else column.name for key, column in shown.items()]
        before = [
            [row.label, *(_interval(column, row.values[key]) for key, column in shown.items())] for row in started
        ]
        text += ["", *_aligned([["before training, by distance", *names], *before], "<")]
    left_out = _left_out([metrics])
    if left_out:
        text.append(left_out)
    if metrics.get("chosen_step") is not None:
        last = metrics["curves"]["step"][-1]
        text.append(f"Figures are those of step {metrics['chosen_step']} of {last}, the best on validation pictures.")
    text += [f"{below}." for below in _below({"": [metrics]})]
    if metrics["collapsed"]:
        text.append(f"The embedding has collapsed: its spread is below {COLLAPSED}.")
    return "\n".join(text)


def _interval(column: _Column, value: _Value) -> str:
    low_high = f" ({column.text(value.interval[0])} to {column.text(value.interval[1])})" if value.interval else ""
    return column.text(value.mean) + low_high


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
    columns = _columns(rows)
    everything = [metrics for seeds in cells.values() for metrics in seeds]
    templates = environment()
    templates.filters["breakable"] = _breakable
    shared, differing = _settings(cells)
    page = templates.get_template("page.html.j2").render(
        rows=rows,
        groups=_groups(columns),
        columns=columns,
        best=_best(rows),
        rankings=RANKINGS,
        baselines=[row.label for row in _baselines(cells)],
        listed=_listed,
        count=_count,
        seeds=_distinct(metrics["settings"]["seed"] for metrics in everything),
        several=any(len(seeds) > 1 for seeds in cells.values()),
        leader=_leader(rows),
        collapses=_collapses(cells),
        below=_below(cells),
        threshold=COLLAPSED,
        protocols=_distinct(metrics["data"].get("protocol", "unseen") for metrics in everything),
        notes=_distinct(note for metrics in everything for note in metrics["data"].get("notes", ())),
        left_out=_left_out(everything),
        validated=_distinct(metrics.get("curves_of", "test") == "validation" for metrics in everything),
        chosen={
            label: steps
            for label, seeds in cells.items()
            if None not in (steps := [metrics.get("chosen_step") for metrics in seeds])
        },
        methods=list(cells),
        curves=_curves(cells, rows),
        histograms=_histograms(cells),
        maps={} if examples is None else {label: pictures.chart(examples, label) for label in examples.shown},
        legend=[] if examples is None else pictures.legend(examples),
        queries=[] if examples is None else pictures.queries(examples),
        quadruplets={}
        if examples is None
        else {label: quads for label in examples.shown if (quads := pictures.quadruplets(examples, label))},
        examples=examples,
        shared=shared,
        differing=differing,
        data={
            side: described
            for side in ("train", "val", "test", "gallery")
            if (described := [_split(split) for split in _distinct(m["data"].get(side) for m in everything) if split])
        },
        sides=_SIDES,
        gallery=any(metrics["data"].get("gallery") for metrics in everything),
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


def _points(result: Metrics) -> dict[str, _Value]:
    """A ranking's figures with their intervals."""
    return {key: _Value(v["value"], interval=(v["low"], v["high"])) for key, v in _ranked(result).items()}


def _figures(metrics: Metrics, ranking: str) -> dict[str, _Value]:
    """One cell's figures under a ranking; those of the embedding stand with the distance."""
    values = _points(metrics["results"][ranking])
    pairs = metrics["pairs"].get(ranking, {})
    rest = {f"tpr@{rate}": value for rate, value in pairs.get("tpr", {}).items()}
    if "eer" in pairs:
        rest["eer"] = pairs["eer"]
    if ranking == "distance":
        rest |= metrics["clustering"]
        rest |= {key: metrics[key] for key in ("transfer", "zero_shot", "spread", "effective_rank")}
        steps, seconds = (metrics["curves"][against][-1] for against in ("step", "seconds"))
        rest["speed"] = steps / seconds if seconds else None
    return values | {key: _Value(rest[key]) for key in _COLUMNS if key in rest}


def _rows(cells: Cells, raw: Metrics | None) -> list[_Row]:
    if not cells:
        raise ValueError("cells is empty; at least one method is accepted")
    rows = [] if raw is None else [_Row(RAW, "distance", (), (), _points(raw))]
    for label, seeds in cells.items():
        if not seeds:
            raise ValueError(f"{label} has no finished seed; at least one is accepted")
    rows += _baselines(cells)
    for label, seeds in cells.items():
        numbers = tuple(metrics["settings"]["seed"] for metrics in seeds)
        collapsed = tuple(metrics["settings"]["seed"] for metrics in seeds if metrics["collapsed"])
        for ranking in RANKINGS:
            if ranking in seeds[0]["results"]:
                each = [_figures(metrics, ranking) for metrics in seeds]
                values = {
                    key: _over_seeds([figures[key] for figures in each])
                    for key in each[0]
                    if all(key in figures for figures in each)
                }
                rows.append(_Row(label, ranking, numbers, collapsed, values))
    return rows


def _baselines(cells: Cells) -> list[_Row]:
    """What the methods began with: a row for each backbone, and for each embedder before its training, that differ."""
    rows = []
    for name, called in BASELINES.items():
        found: dict[tuple[Any, ...], list[Metrics]] = {}
        for metrics in (metrics for seeds in cells.values() for metrics in seeds):
            figures = metrics.get("baselines", {}).get(name)
            if figures is not None:
                same = found.setdefault(tuple(metrics["settings"].get(setting) for setting in _DEPENDS[name]), [])
                if figures not in same:
                    same.append(figures)
        differing = [len(set(values)) > 1 for values in zip(*found, strict=True)]
        for key, each in found.items():
            settings = zip(_DEPENDS[name], key, differing, strict=True)
            own = ",".join(f"{setting}={value}" for setting, value, differs in settings if differs)
            points = [_points(figures) for figures in each]
            values = {figure: _over_seeds([point[figure] for point in points]) for figure in points[0]}
            rows.append(_Row(f"{called}:{own}" if own else called, "distance", (), (), values))
    return rows


def _below(cells: Cells) -> list[_Below]:
    """Methods whose seeds rank worse by distance than what they began with: by Recall@1, and by MAP@R where it ties."""
    found = []
    for label, seeds in cells.items():
        for name, called in (("backbone", "its backbone's bare features"), ("untrained", "the untrained embedder")):
            pairs = {
                metrics["settings"]["seed"]: [
                    (figures["recall"]["1"]["value"], figures["map_at_r"]["value"])
                    for figures in (metrics["results"]["distance"], metrics["baselines"][name])
                ]
                for metrics in seeds
                if name in metrics.get("baselines", {})
            }
            lower = {seed: pair for seed, pair in pairs.items() if _written(pair[0]) < _written(pair[1])}
            if lower:
                means = [
                    [100 * statistics.fmean(pair[side][figure] for pair in lower.values()) for side in (0, 1)]
                    for figure in (0, 1)
                ]
                if all(f"{now:.1f}" == f"{was:.1f}" for now, was in means):
                    continue
                figures = ", ".join(
                    f"{figure} {now:.1f} % against {was:.1f} %"
                    for figure, (now, was) in zip(("Recall@1", "MAP@R"), means, strict=True)
                )
                found.append(_Below(label, called, tuple(lower), len(seeds), figures))
    return found


def _written(figures: Sequence[float]) -> tuple[float, ...]:
    """Shares to the precision that they are printed with: below is what a reader sees to be below."""
    return tuple(float(f"{100 * figure:.1f}") for figure in figures)


def _left_out(everything: Sequence[Metrics]) -> str:
    """Which test pictures no ranking counts, in a sentence; nothing where all count."""
    counts = _distinct(metrics.get("left_out", 0) for metrics in everything)
    if not any(counts):
        return ""
    number, verb = " to ".join(map(str, sorted({min(counts), max(counts)}))), "is" if counts == [1] else "are"
    if any(metrics["data"].get("gallery") for metrics in everything):
        return f"{number} of the queries {verb} of a class that the gallery lacks; rankings leave them out."
    return f"{number} of the test pictures {verb} alone in the class; rankings leave them out."


def _over_seeds(values: Sequence[_Value]) -> _Value:
    if len(values) == 1:
        return values[0]
    means = [value.mean for value in values if value.mean is not None]
    if len(means) < len(values):
        return _Value(None)
    return _Value(statistics.fmean(means), deviation=statistics.stdev(means))


def _line(column: _Column, value: _Value) -> str:
    return column.text(value.mean) + ("" if value.deviation is None else f" ± {column.text(value.deviation)}")


def _columns(rows: Sequence[_Row]) -> dict[str, _Column]:
    """Those of which a row has a figure: earlier runs lack some."""
    return {key: column for key, column in _COLUMNS.items() if any(key in row.values for row in rows)}


def _best(rows: Sequence[_Row]) -> dict[str, str]:
    """The best value of each column as it is written, so that what looks equal is marked alike."""
    best = {}
    for key, column in _COLUMNS.items():
        means = [row.values[key].mean for row in rows if key in row.values]
        known = [column.better * mean for mean in means if mean is not None]
        if column.better and known:
            best[key] = column.text(column.better * max(known))
    return best


def _leader(rows: Sequence[_Row]) -> _Row:
    return max((row for row in rows if row.seeds), key=lambda row: row.values["recall@1"].mean or 0.0)


def _groups(columns: Mapping[str, _Column]) -> list[tuple[str, int]]:
    names = [column.group for column in columns.values()]
    return [(name, names.count(name)) for name in dict.fromkeys(names)]


def _collapses(cells: Cells) -> list[_Collapse]:
    found = []
    for label, seeds in cells.items():
        collapsed = tuple(metrics["settings"]["seed"] for metrics in seeds if metrics["collapsed"])
        if collapsed:
            found.append(_Collapse(label, collapsed, len(seeds)))
    return found


def _curves(cells: Cells, rows: Sequence[_Row]) -> list[tuple[str, Markup]]:
    """Titles and drawings, with levels of what is not trained; validation pictures have others."""
    of_test = all(metrics.get("curves_of", "test") == "test" for seeds in cells.values() for metrics in seeds)
    drawn = [row for row in rows if not row.seeds and not row.label.startswith(BASELINES["untrained"])]
    levels = {row.label: mean for row in drawn if (mean := row.values["recall@1"].mean) is not None and of_test}
    return [
        (title, _drawn(figures.curves(cells, quantity, against, levels if quantity == "recall" else None), name))
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
        for kind, name, axis in (("distance", "distance", "negative distance"), ("score", "score", "score S")):
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
