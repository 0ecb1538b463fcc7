"""The figures of a finished run: measured, printed as a table, written as a report folder."""

from __future__ import annotations

import base64
import colorsys
import io
import json
import platform
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from sklearn.manifold import TSNE
from torch import Tensor

import pddm_ext
from pddm_ext import _C

from .checkpoint import write_bytes
from .evaluate import KS, embed, histograms, pair_values, recall_at_k, recall_by_score, spread
from .loop import COLLAPSED, Run

METRICS, PAGE = "metrics.json", "report.html"
NAMES = {
    "raw": "raw pixels",
    "euclidean": "Euclidean-mined",
    "pddm": "PDDM-mined",
    "pddm_score": "PDDM-mined, by score",
}
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#2563eb", "#d97706", "#0f766e", "#e11d48", "#475569"
_COLOURS = {"euclidean": _ORANGE, "pddm": _BLUE}
_QUADRUPLETS, _MAP_CLASSES, _MAP_SAMPLES = 8, 40, 8


def measure(run: Run) -> dict[str, Any]:
    """Every figure of the report as plain numbers; what a clock decided is under ``"timing"`` alone."""
    results: dict[str, Any] = {"raw": {"recall": recall_at_k(run.images.flatten(1), run.labels)}}
    scores: dict[str, Any] = {}
    timing: dict[str, Any] = {}
    for name, learner in run.learners.items():
        features = embed(learner.net, run.images)
        results[name] = {
            "recall": recall_at_k(features, run.labels),
            "spread": spread(features),
            "collapsed": spread(features) < COLLAPSED,
        }
        timing[name] = {
            "steps_per_second": run.taken / learner.seconds,
            "mining_share": learner.mining_seconds / learner.seconds,
        }
        kinds = {f"{name} distance": -torch.cdist(features, features)}
        if learner.unit is not None:
            results["pddm_score"] = {"recall": recall_by_score(features, run.labels, learner.unit)}
            with torch.no_grad():
                kinds["pddm score"] = pddm_ext.score_matrix(features, learner.unit)
        for kind, values in kinds.items():
            positive, negative, edges, overlap = histograms(*pair_values(values, run.labels))
            scores[kind] = {
                "positive": positive.tolist(),
                "negative": negative.tolist(),
                "edges": edges.tolist(),
                "overlap": overlap,
            }
    train, test = run.dataset.train, run.dataset.test
    return {
        "settings": asdict(run.settings),
        "data": {
            "train": {"classes": list(train.names), "from": list(train.groups), "drawings": len(train.labels)},
            "test": {"classes": list(test.names), "from": list(test.groups), "drawings": len(test.labels)},
        },
        "results": results,
        "histograms": scores,
        "curves": run.curves,
        "timing": timing,
        "environment": {
            "pddm_ext": pddm_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "instruction_set": _C.cpu_capability(),
            "threads": torch.get_num_threads(),
        },
    }


def table(metrics: dict[str, Any]) -> str:
    """Recall@K of raw pixels and of each embedding, with speed, for a terminal."""
    head = f"{'':<22}" + "".join(f"{f'R@{k}':>8}" for k in KS) + f"{'steps/s':>10}{'mining':>9}{'spread':>9}"
    lines = [head]
    for name, label in NAMES.items():
        result, timing = metrics["results"][name], metrics["timing"].get(name)
        line = f"{label:<22}" + "".join(f"{result['recall'][k]:>8.1%}" for k in KS)
        if timing:
            line += f"{timing['steps_per_second']:>10.1f}{timing['mining_share']:>9.1%}{result['spread']:>9.4f}"
        lines.append(line)
    lines += [f"The {NAMES[name]} embedding has collapsed (spread below {COLLAPSED})." for name in collapsed(metrics)]
    return "\n".join(lines)


def collapsed(metrics: dict[str, Any]) -> list[str]:
    """The learners whose test features are nearly one point."""
    return [name for name, result in metrics["results"].items() if result.get("collapsed")]


def write(run: Run, metrics: dict[str, Any], folder: Path) -> Path:
    """Write ``metrics.json`` and the self-contained ``report.html`` into an existing folder; returns the page."""
    write_bytes(folder / METRICS, (json.dumps(metrics, indent=1, ensure_ascii=False) + "\n").encode())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = resources.files(__package__).joinpath("report.html.j2").read_text("utf-8")
    page = environment.from_string(template).render(
        metrics=metrics,
        names=NAMES,
        ks=KS,
        collapsed=[NAMES[name] for name in collapsed(metrics)],
        threshold=COLLAPSED,
        curves=_curves(metrics),
        histograms=_histograms(metrics),
        maps={NAMES[name]: _map(run, name) for name in run.learners},
        quadruplets={NAMES[name]: _quadruplets(run, name) for name in ("pddm", "euclidean")},
    )
    write_bytes(folder / PAGE, page.encode())
    return folder / PAGE


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _png(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return _data_uri(buffer.getvalue())


def _axes(title: str, xlabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 3.1), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10.5, loc="left", color="#0f172a")
    axes.set_xlabel(xlabel, fontsize=9, color=_GREY)
    axes.tick_params(labelsize=8, colors=_GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd5e1")
    return figure, axes


def _drawn(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return _data_uri(buffer.getvalue())


def _curves(metrics: dict[str, Any]) -> dict[str, str]:
    drawn = {}
    for key, title in (
        ("recall", "Recall@1, unseen classes"),
        ("loss", "Embedding loss $E_e$ of the mined quadruplets"),
        ("spread", "Spread of the embedding, unseen classes"),
    ):
        figure, axes = _axes(title, "step")
        if key == "recall":
            axes.axhline(metrics["results"]["raw"]["recall"][1], color=_GREY, lw=1, ls=":", label=NAMES["raw"])
        for name, curve in metrics["curves"].items():
            axes.plot(curve["step"], curve[key], color=_COLOURS[name], lw=1.8, marker=".", label=NAMES[name])
        if key != "loss":
            axes.set_ylim(0, 1.02)
        axes.legend(fontsize=8, frameon=False)
        drawn[title.replace("$E_e$", "Eₑ")] = _drawn(figure)
    return drawn


def _histograms(metrics: dict[str, Any]) -> dict[str, str]:
    drawn = {}
    for kind, title, xlabel in (
        ("pddm score", "PDDM score", "score S"),
        ("pddm distance", "Euclidean, PDDM-mined", "negative distance"),
        ("euclidean distance", "Euclidean, Euclidean-mined", "negative distance"),
    ):
        histogram = metrics["histograms"][kind]
        figure, axes = _axes(f"{title}: overlap {histogram['overlap']:.1%}", xlabel)
        for sign, colour in (("negative", _RED), ("positive", _GREEN)):
            axes.stairs(histogram[sign], histogram["edges"], fill=True, alpha=0.45, color=colour, label=f"{sign} pairs")
            axes.stairs(histogram[sign], histogram["edges"], color=colour, lw=1)
        axes.set_yticks([])
        axes.legend(fontsize=8, frameon=False)
        drawn[title] = _drawn(figure)
    return drawn


def _map(run: Run, name: str) -> str:
    """t-SNE of some test classes: every sample's picture at its place, in its class's colour."""
    generator = torch.Generator().manual_seed(run.settings.seed)
    classes = torch.randperm(len(run.dataset.test.names), generator=generator)[:_MAP_CLASSES].tolist()
    rows = torch.cat([(run.labels == c).nonzero().flatten()[:_MAP_SAMPLES] for c in classes])
    features = embed(run.learners[name].net, run.images[rows])
    tsne = TSNE(init="pca", perplexity=min(12, (len(rows) - 1) / 3), random_state=run.settings.seed)
    places = tsne.fit_transform(features.numpy())
    places = (places - places.min(0)) / np.maximum(places.max(0) - places.min(0), 1e-12)

    side, picture = 1000, run.images.shape[-1]
    canvas = np.ones((side, side, 3))
    for (x, y), row in zip(places * (side - picture), rows.tolist(), strict=True):
        hue = classes.index(int(run.labels[row])) / len(classes)
        # Neighbouring hues differ in brightness too.
        colour = np.array(colorsys.hsv_to_rgb(hue, 0.9, 0.55 + 0.3 * (classes.index(int(run.labels[row])) % 2)))
        # Below a quarter it is the noise of the test sample, not its ink.
        ink = ((run.images[row, 0].double().numpy() - 0.25) / 0.5).clip(0, 1)[:, :, None]
        window = canvas[int(y) : int(y) + picture, int(x) : int(x) + picture]
        window += ink * (colour - window)
    return _png((canvas * 255).round().astype(np.uint8))


def _quadruplets(run: Run, name: str) -> list[list[tuple[str, str, str]]]:
    """Some quadruplets of one training batch, the same for every learner: four of (role, picture, its score) each."""
    images, labels = run.sampler(torch.Generator().manual_seed(run.settings.seed + 1))
    learner = run.learners[name]
    features = embed(learner.net, images)
    with torch.no_grad():
        quads = learner.mine(features, labels)
    slots = quads.valid.nonzero().flatten()
    slots = slots[torch.linspace(0, len(slots) - 1, min(_QUADRUPLETS, len(slots))).long()]

    def picture(row: Tensor) -> str:
        return _png((255 - images[row, 0] * 255).round().byte().numpy())

    def value(score: Tensor) -> str:
        if learner.unit is not None:
            return f"S {score:.2f}"
        return f"D {-score:.2f}" if score < -0.01 else f"D {-score:.0e}"

    return [
        [
            ("anchor", picture(quads.i[q]), ""),
            ("positive", picture(quads.j[q]), value(quads.s_ij[q])),
            ("negative", picture(quads.k[q]), value(quads.s_ik[q])),
            ("negative", picture(quads.l[q]), value(quads.s_jl[q])),
        ]
        for q in slots
    ]
