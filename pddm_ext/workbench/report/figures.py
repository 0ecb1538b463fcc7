"""Curves and histograms of a comparison, as matplotlib figures and as SVG whose bytes depend on the numbers alone."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

#: The metrics of each method's seeds, as ``metrics.json`` holds them, by the method's label.
Cells = Mapping[str, Sequence[Mapping[str, Any]]]
Floats = NDArray[np.float64]

# Okabe and Ito's palette without its yellow; what comes after the seventh is told apart by its dashes.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2937")
_DASHES = ("solid", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
POSITIVE, NEGATIVE = "#0072b2", "#d55e00"
_LEVELS = (":", (0, (1, 3)), (0, (3, 2, 1, 2)))
_INK, _GREY, _LINE = "#0f172a", "#475569", "#cbd5e1"

#: What :func:`curves` draws: the title of each quantity's axis, and of each axis to draw it against.
QUANTITIES = {"recall": "Recall@1", "spread": "spread", "effective_rank": "effective rank", "loss": "loss"}
AGAINST = {"step": "steps", "seconds": "seconds of training"}


@contextmanager
def _style() -> Iterator[None]:
    # A label may hold a dollar sign, and fonts are the reader's.
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none", "font.size": 9}):
        yield


def svg(figure: Figure) -> bytes:
    """A figure as an SVG document without a date; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with _style(), matplotlib.rc_context({"svg.hashsalt": "pddm-ext"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return buffer.getvalue()


def inline(figure: Figure, name: str) -> str:
    """A figure as an SVG element for an HTML page.

    Args:
        figure: what to draw.
        name: of letters and digits, unlike that of any other figure of the page; keeps their identifiers apart.
    """
    text = svg(figure).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    # Identifiers of groups are referred to by nobody; those of shapes are, within the figure.
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    width, height = re.findall(r' (?:width|height)="([0-9.]+)pt"', text)[:2]
    return text.replace(f' width="{width}pt"', "", 1).replace(f' height="{height}pt"', "", 1)


def _axes(size: tuple[float, float], xlabel: str, ylabel: str = "") -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel, color=_GREY)
    axes.set_ylabel(ylabel, color=_GREY)
    axes.tick_params(labelsize=8, colors=_GREY, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    return figure, axes


def _over_seeds(seeds: Sequence[Mapping[str, Any]], quantity: str, against: str) -> tuple[Floats, Floats, Floats]:
    """Places, means and standard deviations, where all seeds have values; between its points a seed is linear.

    A point without a value, as of the loss before the first step, is none; of a seed without a point there is no curve.
    """
    curves = [metrics["curves"] for metrics in seeds]
    points = [
        np.array([point for point in zip(curve[against], curve[quantity], strict=True) if point[1] is not None], float)
        for curve in curves
    ]
    points = [each for each in points if len(each)]
    if not points:
        return np.empty(0), np.empty(0), np.empty(0)
    places, values = [each[:, 0] for each in points], [each[:, 1] for each in points]
    grid = places[0]
    if any(not np.array_equal(grid, other) for other in places[1:]):
        first, last = max(place[0] for place in places), min(place[-1] for place in places)
        grid = np.linspace(first, last, 100) if last > first else np.array([first])
    stacked = np.stack([np.interp(grid, place, value) for place, value in zip(places, values, strict=True)])
    deviation = stacked.std(0, ddof=1) if len(stacked) > 1 else np.zeros(len(grid))
    return grid, stacked.mean(0), deviation


def curves(
    cells: Cells, quantity: str = "recall", against: str = "step", levels: Mapping[str, float] | None = None
) -> Figure:
    """A quantity on the test pictures during training: a line per method, with a band of ± s.d. over its seeds.

    Args:
        cells: the metrics of each method's seeds.
        quantity: a key of :data:`QUANTITIES`.
        against: ``"step"`` or ``"seconds"``.
        levels: values by name, such as that of raw pixels, drawn as level lines.
    """
    with _style():
        figure, axes = _axes((6.0, 3.7), AGAINST[against], QUANTITIES[quantity])
        ends: list[tuple[str, float, float, Any]] = []
        for number, (label, seeds) in enumerate(cells.items()):
            colour, turn = _COLOURS[number % len(_COLOURS)], number // len(_COLOURS) % len(_DASHES)
            place, mean, deviation = _over_seeds(seeds, quantity, against)
            if not len(place):
                continue
            if deviation.any():
                axes.fill_between(
                    place,
                    mean - deviation,
                    mean + deviation,
                    color=colour,
                    alpha=0.14 if len(cells) < 7 else 0.07,
                    lw=0,
                )
            marker = "o" if len(place) == 1 else None
            axes.plot(place, mean, color=colour, lw=1.8, ls=_DASHES[turn], marker=marker, solid_capstyle="round")
            ends.append((label, place[-1], mean[-1], {"color": colour, "ls": _DASHES[turn]}))
        for number, (label, level) in enumerate((levels or {}).items()):
            dash = _LEVELS[number % len(_LEVELS)]
            axes.axhline(level, color=_GREY, lw=1, ls=dash)
            ends.append((label, np.inf, level, {"color": _GREY, "ls": dash}))
        axes.grid(axis="y", color="#eef2f7")
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=against == "step"))
        if quantity == "recall":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        else:
            axes.set_ylim(0, max(axes.get_ylim()[1], 1e-6))
        _name_ends(axes, ends)
    return figure


def _name_ends(axes: Axes, ends: list[tuple[str, float, float, Any]]) -> None:
    """Names at the right, each as near the height of its line's end as the others leave room for."""
    if not ends:
        return
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    ends = sorted(ends, key=lambda end: end[2])
    wanted = np.array([(value - low) / (high - low) for _, _, value, _ in ends])
    heights = _apart(wanted, min(0.062, 1 / max(1, len(ends) - 1)))
    for (label, place, value, line), height in zip(ends, heights, strict=True):
        start = (min(1.0, (place - left) / (right - left)), (value - low) / (high - low))
        # A thin line back to the end of the curve, then a piece of the curve's own as a key.
        axes.plot([start[0], 1.02], [start[1], height], color=line["color"], lw=0.6, alpha=0.55, **_outside(axes))
        axes.plot([1.02, 1.07], [height, height], lw=1.8, **line, **_outside(axes))
        axes.annotate(
            label,
            (1.07, height),
            xytext=(3.5, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_INK,
        )


def _outside(axes: Axes) -> dict[str, Any]:
    return {"transform": axes.transAxes, "clip_on": False, "scalex": False, "scaley": False}


def _apart(wanted: Floats, gap: float) -> Floats:
    """Ascending heights moved as little as keeps them ``gap`` apart: neighbours that touch share their mean place."""
    groups: list[tuple[float, int]] = []  # (middle, members)
    for height in wanted:
        middle, count = float(height), 1
        while groups and middle - groups[-1][0] < gap * (count + groups[-1][1]) / 2:
            other, members = groups.pop()
            middle, count = (middle * count + other * members) / (count + members), count + members
            middle = min(max(middle, gap * (count - 1) / 2), 1 - gap * (count - 1) / 2)
        groups.append((middle, count))
    return np.concatenate([middle + gap * (np.arange(count) - (count - 1) / 2) for middle, count in groups])


def _shares(histogram: Mapping[str, Any], kind: str, edges: Floats) -> Floats:
    """A histogram's shares in other bins that cover its own, each of which counts as even within."""
    share = np.concatenate([[0.0], np.cumsum(histogram[kind])])
    return np.diff(np.interp(edges, histogram["edges"], share))


def pairs(histograms: Sequence[Mapping[str, Any]], xlabel: str) -> Figure:
    """Similarities of positive and of negative pairs: the mean of the seeds' shares as areas, each seed as a line.

    Args:
        histograms: ``positive`` and ``negative`` shares between ``edges``, one histogram per seed.
        xlabel: what the similarity is.
    """
    bounds = [histogram["edges"][end] for histogram in histograms for end in (0, -1)]
    edges = np.linspace(min(bounds), max(bounds), len(histograms[0]["edges"]))
    with _style():
        figure, axes = _axes((4.4, 2.2), xlabel)
        for kind, colour, dash in (("negative", NEGATIVE, (0, (3, 1.2))), ("positive", POSITIVE, "solid")):
            shares = np.stack([_shares(histogram, kind, edges) for histogram in histograms])
            axes.stairs(shares.mean(0), edges, fill=True, alpha=0.3, color=colour, lw=0)
            axes.stairs(shares.mean(0), edges, color=colour, lw=1.4, ls=dash)
            if len(shares) > 1:
                for share in shares:
                    axes.stairs(share, edges, color=colour, lw=0.5, alpha=0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.01)
        axes.set_ylim(bottom=0)
    return figure
