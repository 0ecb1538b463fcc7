"""The paper's claims on real data: runs the grids, stores their figures, writes docs/results.md and -drawings.md.

``python bench/retrieval.py --omniglot FOLDER --grocery FOLDER`` runs what has not run yet (some hours on two cores) and
stores it in ``bench/results/retrieval/``. Without folders only the pages and the README's paragraph are written anew,
and with ``--check`` they are compared with what is stored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression

from pddm_ext import PDDM, mine_and_score
from pddm_ext.workbench import compare, measuring
from pddm_ext.workbench.checkpoint import write_bytes
from pddm_ext.workbench.console import Progress
from pddm_ext.workbench.data.splits import batches
from pddm_ext.workbench.evaluation import retrieval
from pddm_ext.workbench.evaluation.separation import pairs, separation, verification
from pddm_ext.workbench.fitting import SCALE, FittedUnit, fit
from pddm_ext.workbench.loop import CHECKPOINT, Run
from pddm_ext.workbench.methods import rank_by_distance
from pddm_ext.workbench.report import figures, page
from pddm_ext.workbench.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
STORE, DOCS, README = ROOT / "bench/results/retrieval", ROOT / "docs", ROOT / "README.md"
#: Pages and their templates.
PAGES = {
    DOCS / "results.md": "results.md.j2",
    DOCS / "results-drawings.md": "drawings.md.j2",
    DOCS / "candidates.md": "candidates.md.j2",
}
BEGIN, END = (f"<!-- bench/results/retrieval: {mark} -->\n" for mark in ("begin", "end"))
RUNS = ROOT / "runs/results"

SEEDS, STEPS, LRS = 5, 400, (3e-4, 1e-3, 3e-3, 1e-2)
METHODS = (
    "joint",
    "pddm-anchor",
    "pddm-pair",
    "pddm-batch",
    "euclidean-anchor",
    "euclidean-pair",
    "euclidean-batch",
    "triplet-hard",
    "triplet-hard:margin=0.05",
    "triplet-semihard",
    "triplet-all",
    "n-pair",
    "contrastive",
    "multi-similarity",
    "multi-similarity-mined",
)
#: pytorch-metric-learning's, as they come but for a margin; the rest is a paper's, or ours.
BASELINES = tuple(name for name in METHODS if not name.startswith(("joint", "pddm", "euclidean")))
#: What might explain how PDDM mining does: one change at a time, at one learning rate.
CAUSES = (
    "pddm-pair",
    "pddm-pair:unit_start=distance",
    "pddm-pair:distance_steps=100",
    "pddm-pair:unit_gradient=false",
    "pddm-pair:alpha=0.1",
    "pddm-pair:alpha=2",
    "pddm-pair:unit_lr_factor=0.3",
    "pddm-pair:unit_lr_factor=3",
    "pddm-pair:classes=8,samples=8",
    "pddm-pair:classes=32,samples=2",
)
#: PDDM's siblings, with and without, beside a triplet loss, our quadruplets, and the two best methods.
TERMS = ("", "density=0.03", "structure=0.3", "structure=0.3,clusters=4", "density=0.03,structure=0.3")
SIBLINGS = {
    base: tuple(f"{base}:{term}".rstrip(":") for term in terms)
    for base, terms in {
        "triplet-semihard": TERMS,
        "pddm-pair": TERMS,
        "multi-similarity": TERMS[:3],
        "joint": TERMS[:3],
    }.items()
}
#: Whether the order of the best is another where they have time to converge.
LONG = ("joint", "pddm-pair", "multi-similarity")
#: The two that lie closest, with as many seeds as it takes to tell whether either is ahead.
CLOSEST, MANY = ("joint", "multi-similarity"), 4 * SEEDS


@dataclass(frozen=True)
class Experiment:
    """Methods, each at the learning rate that does best on validation, on one data set.

    Attributes:
        methods: as ``pddm-ext compare --methods`` takes them.
        common: settings that they share; ``every`` is of the curves.
        lrs: learning rates to choose from; a single one is not chosen, and without any the settings have it.
        seeds: how many.
    """

    methods: tuple[str, ...]
    common: dict[str, Any]
    lrs: tuple[float, ...] = LRS
    seeds: int = SEEDS


def _drawings(data: str, methods: tuple[str, ...], steps: int = STEPS, augment: bool = True, **more: Any) -> Experiment:
    return Experiment(methods, {"data": data, "steps": steps, "every": steps // 16, "augment": augment}, **more)


#: What the score of `recommended` is not by itself: on known classes, and on unseen ones.
FALLING_BACK, ALONE = "recommended:unit_fallback=distance", "recommended:unit_fallback=none"


def _classes(data: str, methods: tuple[str, ...], *, known: bool) -> Experiment:
    common = {"data": data, "split": "known" if known else "half", "steps": 600, "every": 300}
    return Experiment(methods, common, LRS[1:])


def _photographs(
    methods: tuple[str, ...], *, unseen: bool = False, changed: dict[str, Any] | None = None, **more: Any
) -> Experiment:
    common = {
        "data": "grocery",
        "split": "unseen" if unseen else "half",
        "backbone": "efficientnet-lite0",
        "picture": 160,
        "freeze": True,
        "augment": False,
        "dim": 128,
        "steps": 800,
        "every": 400,
    }
    return Experiment(methods, common | (changed or {}), **more)


#: What PDDM's score is held against where classes are known: the best losses, each by distance.
STRONGEST = ("multi-similarity", "proxy-anchor", "norm-softmax", "sub-center-arcface", "sup-con")
SCORING = ("recommended", "joint", "pddm-pair")
#: On whose embedding a classifier is trained, too.
CLASSIFIED = "multi-similarity"
#: Numbers of candidates that are compared with exact mining, and the most rows it is done of.
COUNTS, MOST = (8, 16, 32, 64, 128), 2048
#: Whose units mine there: one trained together with the embedding, one afterwards.
MINING = ("pddm-pair", "recommended")
#: Whose thresholds are carried from validation to test.
CALIBRATED = (*SCORING, "multi-similarity")
#: `recommended` without the rows of earlier steps among which it mines, with its own 256, and with more.
UNBANKED = "recommended:bank=-1"
BANKS = (UNBANKED, "recommended", "recommended:bank=1024")
#: What else the second stage consists of, one change at a time to the first of these.
STAGE = (
    UNBANKED,
    *(
        f"{UNBANKED},{change}"
        for change in (
            "unit_start=random",
            "unit_start=distance",
            "unit_noise=0.001",
            "unit_noise=0.8",
            "unit_noise=1.6",
            "unit_steps=500",
            "unit_steps=3000",
            "unit_width=256",
            "alpha=0.1",
        )
    ),
)
#: Length of the layers of a unit on a backbone's own features, which are ten times as many as an embedding's.
NARROW = 256
#: What else than an embedding a unit is trained on (:func:`elsewhere`).
PLACES = ("the backbone's features", "both")
#: The two-stage method on other losses' embeddings.
OTHERS = ("proxy-anchor:unit_steps=1500,bank=-1", "sup-con:unit_steps=1500,bank=-1")
#: Wrong labels, and few of them; at the learning rates that are best with all of them right.
SPOILS = ("label_noise=0.2", "label_noise=0.4", "train_share=0.25")
ROBUST = ("recommended", "joint", "pddm-pair", "triplet-semihard", "norm-softmax:lr=0.003", "sup-con:lr=0.003")
SPOILT = {base: tuple(f"{base}{',' if ':' in base else ':'}{spoilt}" for spoilt in SPOILS) for base in ROBUST}
#: PDDM's siblings on photographs.
SIBLINGS_SEEN = tuple(
    f"{base}{term}"
    for base in ("multi-similarity", "triplet-semihard")
    for term in ("", ":density=0.03", ":density=0.3", ":structure=0.3", ":structure=0.3,centres=all", ":structure=1")
)
#: Rows of earlier batches to mine among, up to all that there have been; steps that make as many, and how many seeds.
SIZES = tuple(
    f"{method}{bank}" for method in ("pddm-anchor", "pddm-batch") for bank in ("", ":bank=4096", ":bank=65536")
)
FILLING, FEW = 1100, 3
#: The closest methods with the whole network trained, its backbone at a tenth of the rate.
FINE = ("recommended", "joint", "sup-con:lr=0.003")
WHOLE = {"freeze": False, "augment": True, "picture": 128, "steps": 200, "every": 200, "backbone_lr_factor": 0.1}
GRIDS = {
    "grocery-known": _photographs((*SCORING[:1], FALLING_BACK, *SCORING[1:], *STRONGEST)),
    "grocery-unseen": _photographs((*SCORING[:1], ALONE, *SCORING[1:], *STRONGEST), unseen=True),
    "grocery-stage": _photographs((*STAGE, *OTHERS), lrs=LRS[1:2]),
    "grocery-stage-unseen": _photographs((*STAGE, *OTHERS), unseen=True, lrs=LRS[1:2]),
    "grocery-bank": _photographs(BANKS, lrs=LRS[1:2]),
    "grocery-bank-unseen": _photographs(BANKS[:2], unseen=True, lrs=LRS[1:2]),
    "grocery-spoilt": _photographs(("triplet-semihard", *sum(SPOILT.values(), ())), lrs=()),
    "grocery-siblings": _photographs(SIBLINGS_SEEN, lrs=LRS[1:2]),
    "grocery-fine": _photographs(FINE, changed=WHOLE, lrs=(), seeds=2),
    **{f"{data}-known-bank": _classes(data, BANKS[:2], known=True) for data in ("omniglot", "glyphs")},
    **{
        f"{data}-known": _classes(data, (*SCORING[:1], FALLING_BACK, *SCORING[1:], *STRONGEST), known=True)
        for data in ("omniglot", "glyphs")
    },
    **{
        f"{data}-candidates": _drawings(
            data, ("pddm-pair", "pddm-pair:candidates=32", "pddm-pair:candidates=8"), lrs=LRS[1:2]
        )
        for data in ("omniglot", "glyphs")
    },
    "omniglot-bank": _drawings("omniglot", SIZES, FILLING, lrs=LRS[1:2], seeds=FEW),
    **{f"{data}-unseen": _classes(data, (*SCORING, *STRONGEST), known=False) for data in ("omniglot", "glyphs")},
    "omniglot": _drawings("omniglot", METHODS),
    "glyphs": _drawings("glyphs", METHODS),
    "omniglot-plain": _drawings("omniglot", METHODS, augment=False),
    "glyphs-plain": _drawings("glyphs", METHODS, augment=False),
    "omniglot-causes": _drawings("omniglot", CAUSES, lrs=LRS[1:2]),
    "glyphs-causes": _drawings("glyphs", CAUSES, lrs=LRS[1:2]),
    "omniglot-siblings": _drawings("omniglot", sum(SIBLINGS.values(), ())),
    "glyphs-siblings": _drawings("glyphs", sum(SIBLINGS.values(), ())),
    "omniglot-long": _drawings("omniglot", LONG, 3 * STEPS, lrs=LRS[1:]),
    "glyphs-long": _drawings("glyphs", LONG, 3 * STEPS, lrs=LRS[1:]),
    "omniglot-closest": _drawings("omniglot", CLOSEST, seeds=MANY),
    "glyphs-closest": _drawings("glyphs", CLOSEST, seeds=MANY),
}

Cells = dict[str, list[dict[str, Any]]]


def run(name: str, roots: dict[str, str], jobs: int, only: list[str] | None = None) -> None:
    """Run a grid, write its HTML report beside the runs, and store its figures; or those of some methods, beside what
    is stored of the others."""
    experiment = GRIDS[name]
    methods = tuple(text for text in experiment.methods if only is None or text in only)
    if not methods:
        return
    root = roots.get(experiment.common["data"], "")
    common = Settings(**experiment.common, root=root, schedule="cosine", accelerator="cpu")
    grid = compare.Grid(common, methods, range(experiment.seeds), RUNS / name, lrs=experiment.lrs)
    grid.folder.mkdir(parents=True, exist_ok=True)
    cells = grid.run(jobs)
    examples, raw = compare.examples(grid)
    page.write(grid.folder / "report.html", cells, raw, examples)
    file = STORE / f"{name}.json"
    stored: dict[str, Any] = json.loads(file.read_bytes()) if only is not None and file.exists() else {"cells": {}}
    found = stored["cells"] | {label: [_kept(metrics) for metrics in seeds] for label, seeds in cells.items()}
    more = (label for label in found if label in PLACES)
    stored |= {"raw": raw, "cells": {label: found[label] for label in (*experiment.methods, *more) if label in found}}
    of = {label: [cell for cell in grid.cells() if cell.label == label] for label in methods}
    if name.endswith("-known") and CLASSIFIED in of:
        stored["classifier"] = [_rounded(classifier(cell)) for cell in of[CLASSIFIED]]
    if name.endswith("-known") and set(MINING) <= set(methods):
        both = zip(*(of[label] for label in MINING), strict=True)
        stored["agreement"] = [_rounded(agreement(*cells)) for cells in both]
    if name == "grocery-stage" and STAGE[0] in of:
        seeds = [elsewhere(cell) for cell in of[STAGE[0]]]
        stored["cells"] |= {place: [_rounded(seed[place]) for seed in seeds] for place in seeds[0]}
    # Whose validation photographs are of all classes, and none is trained on.
    looks = {
        "grocery-known": ("calibration", calibration, CALIBRATED),
        "grocery-bank": ("validation", validated, BANKS),
    }
    if name in looks:
        key, look, labels = looks[name]
        told = {label: [_rounded(look(cell)) for cell in of[label]] for label in labels if label in of}
        stored[key] = stored.get(key, {}) | told
    STORE.mkdir(parents=True, exist_ok=True)
    write_bytes(file, (json.dumps(stored, separators=(",", ":")) + "\n").encode())


def validated(cell: compare.Cell) -> dict[str, dict[str, float]]:
    """A finished run's figures of the validation pictures, by distance and by score: MAP@R, and TPR at FPR 0.001."""
    run = _finished(cell)
    test = run.validation
    assert test is not None
    features, similarity = run.look_at(test).features, run.learner.similarity
    sides = {"queries": test.queries, "gallery": test.gallery}
    found = retrieval.retrieval(features, test.labels, similarity, cell.settings.seed, 1, **sides)
    separated = separation(features, test.labels, similarity, cell.settings.seed, *sides.values())
    return {
        by: {"MAP@R": found[by]["map_at_r"]["value"], "TPR at FPR 0.001": separated[by]["tpr"]["0.001"]}
        for by in ("distance", "score")
    }


def classifier(cell: compare.Cell) -> dict[str, Any]:
    """What knows nothing but the classes: a logistic regression on the embedding of a finished run's gallery, which is
    what was trained on. Two pictures are as alike as it is probable that they are of one class by it."""
    run = _finished(cell)
    features, test = run.look().features, run.test
    assert test.queries is not None
    assert test.gallery is not None
    labels = test.labels
    learnt = LogisticRegression(max_iter=5000).fit(SCALE * features[test.gallery].numpy(), labels[test.gallery].numpy())
    classes = torch.from_numpy(learnt.predict_proba(SCALE * features.numpy()))
    alike = classes[test.queries] @ classes[test.gallery].T
    ranked = test.gallery[(-alike).sort(dim=1, stable=True).indices]
    found = retrieval.summary(retrieval.per_query(ranked, test.queries, labels, test.gallery), cell.settings.seed)
    same = labels[test.queries][:, None] == labels[test.gallery]
    return {"results": found, "pairs": verification(alike[same].numpy(), alike[~same].numpy())}


def elsewhere(cell: compare.Cell) -> dict[str, Any]:
    """The second stage of a finished run on other features than its embedding: the backbone's, and both side by side.

    A unit with room for each of so many numbers would take hours, so that its layers are as long as :data:`NARROW`."""
    run = _finished(cell)
    run.look()
    test = run.test
    bar = Progress("measuring", len(test), 0, "picture", False)
    seen = measuring.look(run.learner.net, test, run._known.get(test), bare=True, bar=bar)
    assert seen.bare is not None
    assert test.gallery is not None
    both = torch.cat([seen.features, seen.bare], dim=1) / 2**0.5
    found: dict[str, Any] = {}
    for name, features in zip(PLACES, (seen.bare, both), strict=True):
        settings = replace(cell.settings, dim=features.shape[1], unit_width=NARROW)
        rows, labels = features[test.gallery], test.labels[test.gallery]
        fitted = FittedUnit(settings, int(labels.max()) + 1)
        split = replace(run.dataset.train, pictures=rows, labels=labels)
        drawn = batches(split, settings.classes, settings.samples, settings.unit_updates, seed=settings.seed)
        for _ in fit(fitted, rows, labels, drawn, settings, fall_back=False):
            pass
        sides = {"queries": test.queries, "gallery": test.gallery}
        results = retrieval.retrieval(features, test.labels, fitted.similarity, settings.seed, 1, **sides)
        separated = separation(features, test.labels, fitted.similarity, settings.seed, *sides.values())
        kept = ("overlap", "auc", "tpr", "eer")
        found[name] = {
            "settings": asdict(settings) | {"root": ""},
            "results": {by: results[by] for by in ("distance", "score")},
            "pairs": {by: {key: separated[by][key] for key in kept} for by in ("distance", "score")},
        }
    return found


def agreement(joint: compare.Cell, two_stages: compare.Cell) -> dict[str, dict[str, dict[str, float]]]:
    """How much of exact mining is left where each row has few candidates, on the features of finished runs' galleries.

    Returns:
        For each unit, by the number of candidates: ``k`` and ``l``, the shares of rows whose hardest negative, and
        whose positive's, is the exact one; ``loss``, by how much the score of k is lower in the mean, in standard
        deviations of all scores of k.
    """
    runs = {label: _finished(cell) for label, cell in zip(MINING, (joint, two_stages), strict=True)}
    rows, labels = {}, {}
    for label, run in runs.items():
        assert run.test.gallery is not None
        chosen = run.test.gallery[:MOST]
        rows[label], labels[label] = run.look().features[chosen], run.test.labels[chosen]
    generator = torch.Generator().manual_seed(joint.settings.seed)
    torch.manual_seed(joint.settings.seed)
    dim = joint.settings.dim
    near, far = PDDM(dim), PDDM(dim)
    rank_by_distance(near)
    rank_by_distance(far)
    with torch.no_grad():
        far.s.weight.neg_()
    trained = {label: (rows[label], run.learner.unit) for label, run in runs.items()}
    nowhere = torch.randn(rows["pddm-pair"].shape, generator=generator)
    cases = {
        "trained together (`pddm-pair`)": trained["pddm-pair"],
        "trained afterwards (`recommended`)": trained["recommended"],
        "starts as a function of the distance": (rows["pddm-pair"], near),
        "starts at random": (rows["pddm-pair"], PDDM(dim)),
        "trained together, on rows without any order": (nowhere, trained["pddm-pair"][1]),
        "says the opposite of the distance": (rows["pddm-pair"], far),
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (features, unit) in cases.items():
        classes = labels["recommended" if name.startswith("trained afterwards") else "pddm-pair"]
        with torch.no_grad():
            exact = mine_and_score(features, classes, unit, mode="anchor")
            found[name] = {}
            for count in COUNTS:
                some = mine_and_score(features, classes, unit, mode="anchor", candidates=count)
                found[name][str(count)] = {
                    "k": float((some.k == exact.k).double().mean()),
                    "l": float((some.l == exact.l).double().mean()),
                    "loss": float((exact.s_ik - some.s_ik).mean() / exact.s_ik.std()),
                }
    return found


def calibration(cell: compare.Cell) -> dict[str, Any]:
    """What the validation pictures' thresholds and probabilities are worth on the test's, by distance and by score.

    Returns:
        For each: ``carried``, by rate of false positives among validation pairs what share of the test's positive and
        negative pairs lie beyond that threshold; ``reliability``, for ten equal ranges of the probability that a
        logistic regression on the similarities of validation pairs gives (same and different ones as likely) its mean,
        the share of same pairs and that of all pairs in it; ``error``, the mean difference of the first two.
    """
    run = _finished(cell)
    assert run.validation is not None
    looks = {"validation": run.look_at(run.validation), "test": run.look()}
    tests = {"validation": run.validation, "test": run.test}
    found: dict[str, Any] = {}
    for by in ("distance", "score"):
        if by == "score" and run.learner.similarity is None:
            continue
        sides = {}
        for side, seen in looks.items():
            test = tests[side]
            both = pairs(test.labels, cell.settings.seed, 2**19, test.queries, test.gallery)
            rows = seen.features
            sides[side] = [
                -torch.linalg.vector_norm(rows[i] - rows[j], dim=1).numpy()
                if by == "distance"
                else run.learner.similarity.pairs(rows, i, j).cpu().numpy()
                for i, j in both
            ]
        (same, different), (positive, negative) = sides["validation"], sides["test"]
        cuts = {rate: cut for rate, cut in verification(same, different)["thresholds"].items() if cut is not None}
        kinds = np.repeat([1, 0], [len(same), len(different)])
        learnt = LogisticRegression(class_weight="balanced").fit(np.concatenate([same, different])[:, None], kinds)
        p = learnt.predict_proba(np.concatenate([positive, negative])[:, None])[:, 1]
        weight = np.repeat([0.5 / len(positive), 0.5 / len(negative)], [len(positive), len(negative)])
        of = np.repeat([1.0, 0.0], [len(positive), len(negative)])
        place = np.minimum((p * 10).astype(int), 9)
        share, mean, true = (np.bincount(place, weight * x, minlength=10) for x in (1, p, of))
        found[by] = {
            "carried": {
                rate: {"tpr": float((positive >= cut).mean()), "fpr": float((negative >= cut).mean())}
                for rate, cut in cuts.items()
            },
            "reliability": [
                [float(m / s), float(t / s), float(s)] for m, t, s in zip(mean, true, share, strict=True) if s > 0
            ],
            "error": float(np.abs(mean - true).sum()),
        }
    return found


def _finished(cell: compare.Cell) -> Run:
    run = Run(cell.settings, compare._dataset(cell.settings), features=cell.features)
    run.resume(cell.folder / CHECKPOINT)
    run.place()
    return run


def _kept(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without histograms and without what the machine's folders are called, in four digits."""
    kept = {**metrics, "settings": {**metrics["settings"], "root": ""}}
    figures = ("overlap", "auc", "tpr", "eer")
    kept["pairs"] = {kind: {key: pair[key] for key in figures} for kind, pair in metrics["pairs"].items()}
    return _rounded(kept)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


#: Where a cell's metrics have what the tables of known and unseen classes show; ``by`` is the ranking.
FIGURES = {
    "Recall@1": ("results", "by", "recall", "1", "value"),
    "Recall@8": ("results", "by", "recall", "8", "value"),
    "MAP@R": ("results", "by", "map_at_r", "value"),
    "TPR at FPR 0.01": ("pairs", "by", "tpr", "0.01"),
    "TPR at FPR 0.001": ("pairs", "by", "tpr", "0.001"),
    "EER": ("pairs", "by", "eer"),
}


class Grid:
    """What the page asks of a grid's stored cells: a value of each seed."""

    def __init__(self, name: str) -> None:
        stored = json.loads((STORE / f"{name}.json").read_text())
        self.raw, self.cells = stored["raw"], stored["cells"]
        self.agreement, self.validation = stored.get("agreement", []), stored.get("validation", {})
        self.classifier, self.calibration = stored.get("classifier", []), stored.get("calibration", {})

    def recall(self, label: str, ranking: str = "distance") -> list[float]:
        return [100 * metrics["results"][ranking]["recall"]["1"]["value"] for metrics in self.cells[label]]

    def map_at_r(self, label: str, ranking: str = "distance") -> list[float]:
        return [100 * metrics["results"][ranking]["map_at_r"]["value"] for metrics in self.cells[label]]

    def errors(self, label: str, by: str) -> list[float]:
        """How far the probabilities of :func:`calibration` are off, in percent."""
        return [100 * seed[by]["error"] for seed in self.calibration[label]]

    def column(self, label: str, what: str, by: str = "distance") -> list[float]:
        """One of :data:`FIGURES` of each seed, in percent."""
        path = FIGURES[what]
        return self.percent(label, *(by if key == "by" else key for key in path))

    def strongest(self, what: str, labels: tuple[str, ...]) -> str:
        """The best of these by distance, by the mean of a figure."""
        sign = -1 if what == "EER" else 1
        return max(labels, key=lambda label: sign * statistics.fmean(self.column(label, what)))

    def validated(self, label: str, what: str, by: str = "score") -> list[float]:
        """A figure of :func:`validated`, in percent."""
        return [100 * seed[by][what] for seed in self.validation[label]]

    def far_behind(self, label: str, ranking: str, points: float = 5) -> int:
        """How many seeds rank so much worse by ``ranking`` than by distance, in points of Recall@1."""
        return sum(a - b > points for a, b in zip(self.recall(label), self.recall(label, ranking), strict=True))

    def of(self, label: str, *path: str) -> list[float]:
        """Any stored number of each seed, by its keys."""
        values = []
        for metrics in self.cells[label]:
            value = metrics
            for key in path:
                value = value[key]
            values.append(value)
        return values

    def percent(self, label: str, *path: str) -> list[float]:
        """:meth:`of` a share."""
        return [100 * value for value in self.of(label, *path)]

    def classified(self, what: str) -> list[float]:
        """One of :data:`FIGURES` of the classifier beside the grid, in percent."""
        found = []
        for seed in self.classifier:
            value = seed
            for key in FIGURES[what]:
                value = value if key == "by" else value[key]
            found.append(100 * value)
        return found

    def agreed(self, case: str, count: int, what: str) -> list[float]:
        """``"k"`` and ``"l"`` in percent, or ``"loss"``, of :func:`agreement`."""
        return [seed[case][str(count)][what] * (1 if what == "loss" else 100) for seed in self.agreement]

    def carried(self, label: str, by: str, rate: str, what: str) -> list[float]:
        """``"tpr"`` or ``"fpr"`` on the test pictures at a threshold of the validation ones, in percent."""
        return [100 * seed[by]["carried"][rate][what] for seed in self.calibration[label]]

    def has(self, label: str, ranking: str) -> bool:
        return ranking in self.cells[label][0]["results"]

    def seconds(self, label: str) -> float:
        """Training seconds of a run: the least of the seeds, since other work on the machine only adds."""
        return min(metrics["curves"]["seconds"][-1] for metrics in self.cells[label])

    def steps_to(self, label: str, level: float) -> list[float]:
        """Steps until Recall@1 (%) first reaches a level, for each seed that does."""
        return [
            next(step for step, value in _points(metrics, "step") if value >= level)
            for metrics in self.cells[label]
            if 100 * max(metrics["curves"]["recall"]) >= level
        ]

    def at_seconds(self, label: str, seconds: float) -> list[float]:
        """Recall@1 (%) of each seed after as many steps as fit into so many seconds."""
        share = seconds / self.seconds(label)
        return [
            [value for step, value in _points(metrics, "step") if step <= share * metrics["settings"]["steps"]][-1]
            for metrics in self.cells[label]
        ]

    def best(self, labels: tuple[str, ...]) -> str:
        """The label with the highest mean Recall@1."""
        return max(
            (label for label in labels if label in self.cells), key=lambda label: statistics.fmean(self.recall(label))
        )


def _points(metrics: dict[str, Any], against: str) -> list[tuple[float, float]]:
    curves = metrics["curves"]
    return [(at, 100 * value) for at, value in zip(curves[against], curves["recall"], strict=True)]


def mean(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "never"
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def ahead(values: list[float], others: list[float], digits: int = 1) -> str:
    """Mean difference of equal seeds, which share weights, batches and test set, with its standard error."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.fmean(differences):+.{digits}f} ± {error:.{digits}f}"


def readme() -> bytes:
    """The README with its paragraph on the results."""
    before, rest = README.read_text("utf-8").split(BEGIN)
    return (before + BEGIN + _filled("headline.md.j2") + END + rest.split(END)[1]).encode()


def _filled(template: str) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(mean=mean, ahead=ahead, fmean=statistics.fmean)
    grids = {name: Grid(name) for name in GRIDS if (STORE / f"{name}.json").exists()}
    text = environment.from_string((ROOT / "bench" / template).read_text("utf-8")).render(
        grids=grids,
        figures=FIGURES,
        strongest=STRONGEST,
        scoring=SCORING,
        stage=STAGE,
        banks=BANKS,
        others=OTHERS,
        spoilt=SPOILT,
        places=PLACES,
        fine=FINE,
        seen=SIBLINGS_SEEN,
        baselines=BASELINES,
        causes=CAUSES,
        siblings=SIBLINGS,
        many=MANY,
        seeds=SEEDS,
        steps=STEPS,
        lrs=LRS,
        counts=COUNTS,
    )
    return text.strip() + "\n"


def _reliability(grid: Grid) -> Figure:
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#94a3b8", linestyle=":", label="as promised")
    for label, by in (("multi-similarity", "distance"), ("recommended", "score")):
        for place, seed in enumerate(grid.calibration[label]):
            told, true, _ = zip(*seed[by]["reliability"], strict=True)
            colour = {"distance": "#d55e00", "score": "#0072b2"}[by]
            axes.plot(told, true, color=colour, linewidth=1, label=f"{label}, by {by}" if place == 0 else None)
    axes.set_xlabel("probability that validation pictures promise")
    axes.set_ylabel("share of same pairs on test pictures")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _agreement(stored: dict[str, Grid]) -> Figure:
    figure = Figure(figsize=(4.2 * len(stored), 3.6), layout="constrained")
    for axes, (name, grid) in zip(figure.subplots(1, len(stored), squeeze=False)[0], stored.items(), strict=True):
        for case in grid.agreement[0]:
            shares = [statistics.fmean(grid.agreed(case, count, "k")) for count in COUNTS]
            axes.plot(COUNTS, shares, marker="o", markersize=3, linewidth=1.2, label=case.replace("`", ""))
        axes.set_xscale("log", base=2)
        axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axes.set_xlabel("candidates")
        axes.set_ylabel("rows whose k is the exact one, %")
        axes.set_title(name.capitalize(), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def draw() -> None:
    """The pages' plots, docs/results-*.svg."""
    write_bytes(DOCS / "results-reliability.svg", figures.svg(_reliability(Grid("grocery-known"))))
    known = {name: STORE / f"{name}-known.json" for name in ("grocery", "omniglot", "glyphs")}
    grids = {name: Grid(f"{name}-known") for name, path in known.items() if path.exists()}
    compared = {name: grid for name, grid in grids.items() if grid.agreement}
    if compared:
        write_bytes(DOCS / "results-candidates.svg", figures.svg(_agreement(compared)))
    for name in ("omniglot", "glyphs"):
        grid = Grid(name)
        for against in ("step", "seconds"):
            figure = figures.curves(grid.cells, "recall", against, {page.RAW: grid.raw["recall"]["1"]["value"]})
            write_bytes(DOCS / f"results-{name}-{against}.svg", figures.svg(figure))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--omniglot", help="folder of images_background_small1.zip; run the grids of drawings")
    parser.add_argument("--grocery", help="zip or folder of the Grocery Store Dataset; run the grids of photographs")
    parser.add_argument("--only", nargs="+", choices=GRIDS, default=list(GRIDS), help="of the grids")
    parser.add_argument("--methods", nargs="+", help="of a grid's; what is stored of its others stays (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--check", action="store_true", help="fail where the page is not what is stored")
    arguments = parser.parse_args()
    if arguments.check:
        written = {**{path: _filled(template).encode() for path, template in PAGES.items()}, README: readme()}
        stale = [str(path) for path, text in written.items() if path.read_bytes() != text]
        if stale:
            print(f"{', '.join(stale)}: not what is stored; run {sys.argv[0]}", file=sys.stderr)
        return len(stale)
    given = {"omniglot": arguments.omniglot, "grocery": arguments.grocery, "glyphs": arguments.omniglot and ""}
    roots = {data: root for data, root in given.items() if root is not None}
    for name in arguments.only:
        if GRIDS[name].common["data"] in roots:
            run(name, roots, arguments.jobs, arguments.methods)
    draw()
    for path, template in PAGES.items():
        write_bytes(path, _filled(template).encode())
    write_bytes(README, readme())
    return 0


if __name__ == "__main__":
    sys.exit(main())
