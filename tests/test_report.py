"""The page and the table of a comparison, from metrics and test sets made up here."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pddm_ext
from pddm_ext.workbench import outcome
from pddm_ext.workbench.data.augment import DRAWINGS, PHOTOS
from pddm_ext.workbench.data.splits import Dataset, Split, TestSet, in_memory
from pddm_ext.workbench.evaluation.retrieval import recall_at_k
from pddm_ext.workbench.outcome import raw_pixels
from pddm_ext.workbench.report import figures, page, pictures
from pddm_ext.workbench.report.pictures import Examples, Shown
from runs import trained

AWKWARD = '<b>$x$ & "y"</b>:alpha=1,beta=2'


def ranking(recall: float) -> dict[str, Any]:
    def point(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.02, "high": value + 0.02}

    return {
        "recall": {str(k): point(recall + 0.01 * k) for k in (1, 2, 4, 8)},
        "map_at_r": point(recall / 2),
        "r_precision": point(recall / 2 + 0.1),
    }


def pairs(shift: float) -> dict[str, Any]:
    shares = np.ones(60) / 60
    edges = np.linspace(-2 + shift, shift, 61)
    return {
        "positive": shares.tolist(),
        "negative": shares[::-1].tolist(),
        "edges": edges.tolist(),
        "overlap": 0.25 + shift,
        "auc": 0.75,
    }


def cell(seed: int = 0, recall: float = 0.5, *, unit: bool = False, collapsed: bool = False) -> dict[str, Any]:
    ways = {"distance": ranking(recall)}
    if unit:
        ways |= {"score": ranking(recall - 0.1), "rerank": ranking(recall + 0.1)}
    spread = 0.003 if collapsed else 0.8
    split = {"classes": 4, "from": ["A<i>"], "pictures": 16}
    return {
        "settings": {"method": "m", "lr": 0.001, "steps": 20, "root": "", "seed": seed},
        "data": {"train": split, "test": split | {"classes": 5}},
        "curves": {
            "step": [10, 20],
            "seconds": [1.0 + seed, 2.0 + 2 * seed],
            "loss": [1.0, 0.5],
            "recall": [recall - 0.2, recall],
            "spread": [spread, spread],
            "effective_rank": [9.0, 8.0],
        },
        "results": ways,
        "clustering": {"nmi": 0.6, "ami": 0.5},
        "transfer": 0.7,
        "zero_shot": 0.65,
        "pairs": {"distance": pairs(0.0), **({"score": pairs(seed / 10)} if unit else {})},
        "spread": spread,
        "effective_rank": 8.0,
        "collapsed": collapsed,
        "environment": {"torch": "2.0", "threads": 1, "device": "cpu"},
    }


def same_or_not(metrics: dict[str, Any], kind: str, tpr: float | None, eer: float) -> dict[str, Any]:
    metrics["pairs"][kind] |= {"tpr": {"0.01": tpr, "0.001": None}, "eer": eer, "thresholds": {}}
    return metrics


def dataset(*, photographs: bool = False) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    channels, side = (3, 256) if photographs else (1, 64)

    def split(name: str) -> Any:
        shape = (4, channels, side, side)
        classes = {f"<u>{name}{c}": torch.randint(0, 256, shape, generator=generator).byte() for c in range(4)}
        return in_memory({name: classes})

    return Dataset("some", PHOTOS if photographs else DRAWINGS, split("train"), split("test"))


def examples(*labels: str, dim: int = 6, photographs: bool = False) -> Examples:
    test = TestSet(dataset(photographs=photographs), 0)
    generator = torch.Generator().manual_seed(1)
    shown = {}
    for number, label in enumerate(labels):
        features = F.normalize(torch.randn(len(test), dim, generator=generator), dim=1)
        torch.manual_seed(number)
        unit = None if number else pddm_ext.PDDM(dim)
        quads = None if unit is None else pddm_ext.mine_and_score(features[:8], test.labels[:8], unit, mode="anchor")
        shown[label] = Shown(features, unit, quads)
    return Examples(0, test, test[torch.arange(8)], shown)


def written_page(tmp_path: Path, *args: Any) -> str:
    return page.write(tmp_path / "report.html", *args).read_text("utf-8")


class Links(HTMLParser):
    """Whatever a browser would fetch, and the text between the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.identifiers: list[str] = []
        self.tags: set[str] = set()
        self.unnamed: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.fetched.append(value or "")
            if name == "id":
                self.identifiers.append(value or "")
        if tag == "img" and not dict(attrs).get("alt"):
            self.unnamed.append(str(attrs)[:80])

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_fetches_nothing_and_is_the_same_each_time(tmp_path: Path) -> None:
    cells = {"first": [cell(0, unit=True), cell(1, unit=True)], "second": [cell(0), cell(1)]}
    written = written_page(tmp_path, cells, ranking(0.3), examples("first", "second"))
    links = Links(written)
    assert all(link.startswith(("data:image/", "#")) for link in links.fetched)
    assert "http" not in re.sub(r"data:image/[^\"]*", "", written)
    assert not re.search(r"@import|url\((?!#)", written)
    assert not links.tags & {"script", "link", "iframe", "object"}
    assert links.unnamed == []
    assert len(links.identifiers) == len(set(links.identifiers))
    assert {link[1:] for link in links.fetched if link.startswith("#")} <= set(links.identifiers)
    assert set(re.findall(r"url\(#([^)]*)\)", written)) <= set(links.identifiers)
    torch.manual_seed(99)
    assert written_page(tmp_path, cells, ranking(0.3), examples("first", "second")) == written
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    written = written_page(tmp_path, {AWKWARD: [cell(unit=True)]}, None, examples(AWKWARD))
    links = Links(written)
    assert not links.tags & {"i", "u"}
    assert "<b>$x$" not in written
    assert "A<i>" in links.text
    assert ":<wbr>alpha=1,<wbr>beta=2" in written
    assert "<u>test" in links.text
    assert links.text.count(AWKWARD) >= 8  # also in the drawings, where a dollar sign would start a formula


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    cells = {"plain": [cell(0), cell(1)]}
    text = Links(written_page(tmp_path, cells)).text
    for absent in ("raw pixels", "by PDDM score", "Retrieval", "Mined quadruplets", "collapsed on"):
        assert absent not in text
    shown = Links(written_page(tmp_path, cells, ranking(0.3), examples("unit", "plain"))).text
    assert "raw pixels" in shown
    assert "Retrieval" in shown


def test_collapsed_seeds_are_said_in_words(tmp_path: Path) -> None:
    cells = {"good": [cell(0), cell(3)], "bad": [cell(0), cell(3, collapsed=True)]}
    text = " ".join(Links(written_page(tmp_path, cells)).text.split())
    assert "bad has collapsed on 1 of 2 seeds (3)." in text
    assert "nearly all pictures, alike or not, are put at one point" in text
    assert "collapsed, 1 of 2" in text
    assert "good has collapsed" not in text
    assert page.table(cells).endswith("bad has collapsed on 1 of 2 seeds (3): spread below 0.04.")


def test_one_seed_has_its_interval_and_several_their_deviation(tmp_path: Path) -> None:
    one = Links(written_page(tmp_path, {"m": [cell(recall=0.5)]})).text
    assert "49.0–53.0" in one
    assert "(95 % interval 49.0 to 53.0)" in " ".join(one.split())
    assert "± " not in one
    several = Links(written_page(tmp_path, {"m": [cell(0, 0.5), cell(1, 0.6)]})).text
    assert "56.0± 7.1" in several
    assert "49.0–53.0" not in several


def test_the_best_of_each_column_is_marked(tmp_path: Path) -> None:
    cells = {"low": [cell(recall=0.4)], "high": [cell(recall=0.5, unit=True)]}
    written = written_page(tmp_path, cells, ranking(0.3))
    best = re.findall(r'<td class="best"><b>([^<]*)</b>', written)
    # Re-ranked six times, then what low and high share; never spread or effective rank.
    assert best[-6:] == ["61.0", "62.0", "64.0", "68.0", "30.0", "40.0"]
    assert sorted(best[:-6]) == sorted(2 * ["60.0", "50.0", "70.0", "65.0", "10.0"])
    assert "The highest Recall@1 is 61.0 %, of high re-ranked" in " ".join(Links(written).text.split())


def test_settings_are_told_apart(tmp_path: Path) -> None:
    cells = {"a": [cell(0), cell(1)], "b": [cell(0), cell(1)]}
    for metrics in cells["b"]:
        metrics["settings"] |= {"method": "other", "lr": 0.01}
    cells["b"][1]["environment"] = cells["b"][1]["environment"] | {"device": "cuda"}
    written = written_page(tmp_path, cells)
    table = written[written.index('<table class="plain">') :]
    assert re.findall(r'<th scope="col">(\w+)</th>', table) == ["method", "method", "lr"]
    assert re.findall(r"<td>([^<]*)</td>", table[: table.index("</table>")]) == ["m", "0.001", "other", "0.01"]
    assert "<dt>steps</dt><dd>20</dd>" in table
    assert "<dt>seeds</dt><dd>0, 1</dd>" in table
    assert "<dt>device</dt><dd>cpu, cuda</dd>" in table


def test_the_terminal_table(tmp_path: Path) -> None:
    cells = {"long-name": [cell(0, 0.5, unit=True), cell(1, 0.6, unit=True)], "n": [cell(0)]}
    lines = page.table(cells, ranking(0.3)).splitlines()
    assert lines[0].split() == ["R@1", "R@8", "MAP@R", "spread", "steps/s"]
    assert [line.partition("  ")[0] for line in lines[1:]] == [
        "raw pixels",
        "long-name",
        "long-name, by score",
        "long-name, re-ranked",
        "n",
    ]
    assert "56.0 ± 7.1" in lines[2]
    assert lines[5].split()[1:] == ["51.0", "58.0", "25.0", "0.800", "10.0"]
    assert max(map(len, lines)) <= 100
    assert lines[2].index("56.0 ± 7.1") + len("56.0 ± 7.1") == lines[0].index("R@1") + 3  # columns end together


def test_nothing_to_report_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cells is empty"):
        page.write(tmp_path / "report.html", {})
    with pytest.raises(ValueError, match="m has no finished seed"):
        page.table({"m": []})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="shown is empty"):
        examples()
    made = examples("m")
    with pytest.raises(ValueError, match="m has 3 features; the test set has 16 rows"):
        Examples(0, made.test, made.batch, {"m": Shown(torch.eye(3))})


# Drawings


def test_curves_are_means_over_seeds_on_a_common_grid() -> None:
    cells = {"m": [cell(0, 0.5), cell(1, 0.7)]}
    steps = figures.curves(cells).axes[0]
    assert steps.lines[0].get_xydata() == pytest.approx(np.array([[10, 0.4], [20, 0.6]]))
    assert steps.collections[0].get_paths()[0].get_extents().y1 == pytest.approx(0.6 + 0.1 * 2**0.5)
    # Seconds 1 to 2 and 2 to 4: they share only second 2, the end of the first and the begin of the other.
    seconds = figures.curves(cells, against="seconds").axes[0]
    assert seconds.lines[0].get_xydata()[0] == pytest.approx([2, (0.5 + 0.5) / 2])
    assert not figures.curves({"m": [cell(0)]}).axes[0].collections  # one seed has no band


@pytest.mark.parametrize("quantity", figures.QUANTITIES)
@pytest.mark.parametrize("against", figures.AGAINST)
def test_a_figure_is_an_svg_document_that_names_each_method(quantity: str, against: str) -> None:
    cells = {f"method {n}": [cell(s, 0.3 + n / 100) for s in range(2)] for n in range(16)}
    figure = figures.curves(cells, quantity, against, {"raw pixels": 0.2})
    document = figures.svg(figure)
    texts = [element.text for element in ElementTree.fromstring(document).iter("{http://www.w3.org/2000/svg}text")]
    assert {*cells, "raw pixels"} <= set(texts)
    assert figures.svg(figures.curves(copy.deepcopy(cells), quantity, against, {"raw pixels": 0.2})) == document
    assert b"<dc:date>" not in document


def test_names_keep_apart_and_in_order() -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 14):
        wanted = np.sort(random.random(count) ** 3)
        placed = figures._apart(wanted, 0.07)
        assert (np.diff(placed) > 0.07 - 1e-9).all()
        assert placed.min() > -1e-9
        assert placed.max() < 1 + 1e-9
    assert figures._apart(np.array([0.1, 0.5, 0.9]), 0.07) == pytest.approx([0.1, 0.5, 0.9])


def test_histograms_are_pooled_by_place() -> None:
    narrow = {"positive": [0.25, 0.75], "negative": [1.0, 0.0], "edges": [0.0, 1.0, 2.0]}
    wide = {"positive": [1.0, 0.0], "negative": [0.0, 1.0], "edges": [0.0, 2.0, 4.0]}
    drawn = figures.pairs([narrow, wide], "x").axes[0]
    filled = {patch.get_facecolor()[:3]: patch.get_data() for patch in drawn.patches if patch.get_fill()}
    (negative, edges, _), (positive, _, _) = filled.values()
    assert edges == pytest.approx([0, 2, 4])
    assert positive == pytest.approx([1, 0])
    assert negative == pytest.approx([0.5, 0.5])


# Pictures


def test_queries_show_errors_first_and_never_themselves() -> None:
    made = examples("first", "second", dim=4)
    found = pictures.queries(made)
    rights = [query.right for query in found]
    assert rights == sorted(rights)
    assert rights.count(False) >= 3
    for query in found:
        assert [(label, way) for label, way, _ in query.answers] == [
            ("first", "by distance"),
            ("first", "by score"),
            ("second", "by distance"),
        ]
        for _, _, neighbours in query.answers:
            assert len(neighbours) == 10
            assert query.picture.source not in [neighbour.picture.source for neighbour in neighbours]
            assert all(n.right == n.picture.text.endswith(f"class {query.picture.name}") for n in neighbours)
        assert query.answers[0][2][0].right == query.right


def test_a_faultless_embedding_has_only_hits() -> None:
    made = examples("m")
    perfect = Examples(0, made.test, made.batch, {"m": Shown(F.one_hot(made.test.labels).float())})
    found = pictures.queries(perfect)
    assert len(found) == 6
    assert all(query.right for query in found)


@pytest.mark.parametrize("features", [torch.ones(16, 4) / 2, torch.ones(16, 1)], ids=["collapsed", "one dimension"])
def test_degenerate_embeddings_can_be_shown(tmp_path: Path, features: torch.Tensor) -> None:
    made = examples("m")
    flat = Examples(0, made.test, made.batch, {"m": Shown(features)})
    assert written_page(tmp_path, {"m": [cell(collapsed=True)]}, None, flat).count("data:image/png") > 10


def test_photographs_are_scaled_down(tmp_path: Path) -> None:
    written = written_page(tmp_path, {"m": [cell(unit=True)]}, None, examples("m", photographs=True))
    assert written.count("data:image/jpeg") > 60
    assert "data:image/png" not in written
    assert len(written) < 2_000_000


def test_a_summary_has_every_figure_of_a_run() -> None:
    metrics = cell(recall=0.5, unit=True, collapsed=True)
    text = page.summary(metrics)
    lines = {name: cells for name, *cells in (re.split("  +", line) for line in text.splitlines()[1:-1])}
    assert [part.strip() for part in text.splitlines()[0].split("  ") if part] == [
        "by distance",
        "by score",
        "re-ranked",
    ]
    assert [part.strip() for part in lines["Recall@1"] if part] == [
        "51.0 (49.0 to 53.0)",
        "41.0 (39.0 to 43.0)",
        "61.0 (59.0 to 63.0)",
    ]
    assert set(lines) >= {"Recall@8", "MAP@R", "NMI", "AMI", "transfer", "zero-shot", "spread", "overlap", "AUC"}
    assert lines["AUC"][0].strip() == "75.0"
    assert "collapsed" in text.splitlines()[-1]
    assert "by score" not in page.summary(cell(recall=0.5))


def certain(**options: Any) -> dict[str, Any]:
    """A run in which all is at its best, with every ranking."""
    metrics = cell(unit=True, **options)
    point = {"value": 1.0, "low": 1.0, "high": 1.0}
    figures = {"recall": dict.fromkeys(("1", "2", "4", "8"), point), "map_at_r": point, "r_precision": point}
    metrics["results"] = dict.fromkeys(("distance", "score", "rerank", "structure"), figures)
    return metrics


def test_columns_of_a_summary_never_touch() -> None:
    lines = page.summary(certain()).splitlines()
    rows = {name: cells for name, *cells in (re.split("  +", line) for line in lines[1:])}
    for name in ("Recall@1", "Recall@8", "MAP@R", "R-prec."):
        assert rows[name] == ["100.0 (100.0 to 100.0)"] * 4
    heads = re.split("  +", lines[0].strip())
    assert heads == ["by distance", "by score", "re-ranked", "by structure"]
    for head, start in zip(heads, [match.start() for match in re.finditer(r"100\.0 \(", lines[1])], strict=True):
        assert lines[0].index(head) == start


@pytest.mark.parametrize("label", ["m", "pddm-pair:" + "x" * 90, "backbone=日本語:ネット", "e\u0301" * 9])
def test_columns_of_a_table_never_touch_and_end_together(label: str) -> None:
    """As a terminal shows them: a Japanese letter takes two columns, an accent that stands on another letter none."""

    def shown(text: str) -> int:
        return sum(0 if c == "\u0301" else 2 if c > "\u3000" else 1 for c in text)

    cells = {label: [certain(seed=0), certain(seed=1)], "n": [cell(recall=0.0, seed=0), cell(recall=1.0, seed=1)]}
    lines = page.table(cells).splitlines()
    assert re.split("  +", lines[1])[:4] == [label, "100.0 ± 0.0", "100.0 ± 0.0", "100.0 ± 0.0"]
    for column in ("R@1", "MAP@R"):
        end = lines[0].index(column) + len(column)
        for line in lines[1:]:
            taken = [shown(line[: match.end()]) for match in re.finditer(r"[^ ]( |$)", line)]
            assert end in [t - 1 for t in taken] or end in taken


# Same or not


def test_same_or_not_stands_with_distance_and_score_and_less_error_is_better(tmp_path: Path) -> None:
    one = same_or_not(same_or_not(cell(unit=True), "distance", 0.125, 0.311), "score", 0.225, 0.322)
    other = same_or_not(cell(), "distance", 0.175, 0.333)
    written = written_page(tmp_path, {"one": [one], "other": [other]})
    heads = re.findall(r'<th scope="col">([^<]*)</th>', written)
    assert heads[heads.index("R-prec.") + 1 :][:3] == ["TPR@1e-2", "TPR@1e-3", "EER"]
    assert 'colspan="3" scope="colgroup">Same or not, %' in written
    best = re.findall(r'<td class="best"><b>([^<]*)</b>', written)
    assert "22.5" in best
    assert "31.1" in best
    assert {"12.5", "17.5", "32.2", "33.3", "—"}.isdisjoint(best)
    assert written.count("<b>—</b>") == 3
    # Runs of earlier versions have no such figures.
    assert "Same or not" not in written_page(tmp_path, {"one": [cell()]})
    assert "TPR" not in page.summary(cell())


def test_a_summary_has_same_or_not_of_each_similarity() -> None:
    metrics = same_or_not(same_or_not(cell(unit=True), "distance", 0.125, 0.311), "score", None, 0.322)
    lines = {name: cells for name, *cells in (re.split("  +", line) for line in page.summary(metrics).splitlines()[1:])}
    assert lines["TPR@1e-2"] == ["12.5", "—"]
    assert lines["TPR@1e-3"] == ["—", "—"]
    assert lines["EER"] == ["31.1", "32.2"]


def test_what_some_seeds_could_not_measure_has_no_mean(tmp_path: Path) -> None:
    cells = {"m": [same_or_not(cell(s), "distance", 0.5 if s else None, 0.2) for s in range(2)]}
    cells["m"][0]["clustering"] = {"nmi": None, "ami": None}
    cells["m"][0]["transfer"] = None
    text = Links(written_page(tmp_path, cells)).text
    assert text.count("—") >= 4
    page.table(cells)
    assert "—" in page.summary(cells["m"][0])


# What training began with


def began(metrics: dict[str, Any], backbone: float, untrained: float, /, **settings: Any) -> dict[str, Any]:
    metrics["settings"] |= {"backbone": "convnet", "dim": 64, **settings}
    return metrics | {"baselines": {"backbone": ranking(backbone), "untrained": ranking(untrained)}}


def rows_of(text: str) -> list[list[str]]:
    return [re.split("  +", line) for line in text.splitlines()]


def test_a_backbone_of_several_methods_is_one_row(tmp_path: Path) -> None:
    cells = {label: [began(cell(s), 0.3 + s / 10, 0.2) for s in range(2)] for label in ("a", "b")}
    rows = rows_of(page.table(cells, ranking(0.1)))
    assert [row[0] for row in rows[1:]] == ["raw pixels", "backbone features", "untrained", "a", "b"]
    assert rows[2][1] == "36.0 ± 7.1"  # over seeds
    assert rows[3][1] == "21.0"  # one and the same
    text = Links(written_page(tmp_path, cells, ranking(0.1))).text
    assert text.count("backbone features") >= 2  # in the table, and in the drawings
    assert "36.0± 7.1" in text
    assert "ended below" not in text


def test_different_backbones_are_told_apart() -> None:
    cells = {
        "a": [began(cell(), 0.3, 0.2)],
        "b": [began(cell(), 0.4, 0.3, backbone="timm/x", dim=32)],
        "c": [began(cell(), 0.3, 0.1, dim=16)],
    }
    names = [row[0] for row in rows_of(page.table(cells))[1:]]
    assert names[:5] == [
        "backbone features:backbone=convnet",
        "backbone features:backbone=timm/x",
        "untrained:backbone=convnet,dim=64",
        "untrained:backbone=timm/x,dim=32",
        "untrained:backbone=convnet,dim=16",
    ]


def test_a_method_that_ends_below_what_it_began_with_is_said_in_words(tmp_path: Path) -> None:
    good = [began(cell(s, 0.5), 0.4, 0.3) for s in range(2)]
    bad = [began(cell(0, 0.5), 0.6, 0.3), began(cell(4, 0.5), 0.4, 0.55)]
    cells = {"good": good, "bad": bad}
    lines = [
        "bad has ended below its backbone's bare features on 1 of 2 seeds (0), by distance: "
        "Recall@1 51.0 % against 61.0 %, MAP@R 25.0 % against 30.0 %.",
        "bad has ended below the untrained embedder on 1 of 2 seeds (4), by distance: "
        "Recall@1 51.0 % against 56.0 %, MAP@R 25.0 % against 27.5 %.",
    ]
    assert page.table(cells).splitlines()[-2:] == lines
    text = " ".join(Links(written_page(tmp_path, cells)).text.split())
    assert all(line in text for line in lines)
    assert "Training has made that embedding worse" in text
    assert "good has ended" not in text
    told = page.summary(bad[0]).splitlines()
    assert told[-1] == (
        "The run has ended below its backbone's bare features, by distance: "
        "Recall@1 51.0 % against 61.0 %, MAP@R 25.0 % against 30.0 %."
    )
    assert "ended below" not in page.summary(good[0])


def test_equal_recall_is_decided_by_map() -> None:
    metrics = began(cell(recall=0.5), 0.5, 0.5)
    assert "ended below" not in page.summary(metrics)
    metrics["baselines"]["untrained"]["map_at_r"] = {"value": 0.9, "low": 0.9, "high": 0.9}
    assert "below the untrained embedder" in page.summary(metrics)
    metrics["baselines"]["untrained"]["recall"]["1"] = {"value": 0.4, "low": 0.4, "high": 0.4}
    assert "ended below" not in page.summary(metrics)


def test_a_summary_shows_what_training_began_with() -> None:
    rows = {name: cells for name, *cells in rows_of(page.summary(began(cell(recall=0.5), 0.4, 0.3)))}
    assert rows["before training, by distance"] == ["Recall@1", "Recall@8", "MAP@R"]
    assert rows["backbone features"][0] == "41.0 (39.0 to 43.0)"
    assert rows["untrained"][2] == "15.0 (13.0 to 17.0)"
    assert "before training" not in page.summary(cell())


def test_a_baseline_that_is_missing_is_left_out(tmp_path: Path) -> None:
    metrics = began(cell(), 0.9, 0.2)
    del metrics["baselines"]["backbone"]
    older = began(cell(), 0.3, 0.2)
    del older["baselines"]
    text = Links(written_page(tmp_path, {"m": [metrics], "n": [older]})).text
    assert "untrained" in text
    assert "ended below" not in text
    assert page.table({"m": [metrics], "n": [older]}).count("backbone") == 0


def test_what_is_to_be_known_of_the_pictures_is_said_once(tmp_path: Path) -> None:
    metrics = cell()
    metrics["data"]["notes"] = ["2 of 16 test pictures look the same as <one>"]
    text = Links(written_page(tmp_path, {"m": [metrics], "n": [metrics]})).text
    assert text.count("Of the pictures: 2 of 16 test pictures look the same as <one>.") == 1
    assert "Of the pictures" not in Links(written_page(tmp_path, {"m": [cell()]})).text


# Protocols


def searching(protocol: str, *, gallery: bool = False, **more: Any) -> dict[str, Any]:
    metrics = cell()
    metrics["data"]["protocol"] = protocol
    if gallery:
        metrics["data"]["gallery"] = {"classes": 7, "from": ["shelf"], "pictures": 70}
    return metrics | more


def test_classes_never_seen_are_said_of_such_alone(tmp_path: Path) -> None:
    def text(metrics: dict[str, Any]) -> str:
        return " ".join(Links(written_page(tmp_path, {"m": [metrics]}, None, examples("m"))).text.split())

    for metrics in (cell(), searching("unseen")):
        assert "searched among classes never seen in training: 5 classes, 16 pictures" in text(metrics)
        assert "Every test picture searches among all the others." in text(metrics)
        assert "gallery" not in text(metrics)
        assert "test classes unseen in training" in text(metrics).replace("classesunseen", "classes unseen")
    known, seen, shelf = text(searching("known", gallery=True)), text(searching("seen")), None
    for words in (known, seen):
        assert "never seen" not in words
        assert "unseen" not in words
    assert "tested on other pictures of known classes: 5 classes, 16 pictures" in known
    assert "searched for among a gallery: 7 classes, 70 pictures: shelf." in known
    assert "all the others" not in known
    assert "learned the frozen features of the gallery, on the queries" in known
    assert "nothing was held out" in seen
    shelf = text(searching("unseen", gallery=True))
    assert "classes never seen in training: 5 classes" in shelf
    assert "7 classes, 70 pictures: shelf" in shelf


def test_queries_that_are_left_out_are_counted_in_words(tmp_path: Path) -> None:
    lacking = "3 of the queries are of a class that the gallery lacks; rankings leave them out."
    alone = "1 of the test pictures is alone in the class; rankings leave them out."
    for metrics, line in (
        (searching("known", gallery=True, left_out=3), lacking),
        (searching("unseen", left_out=1), alone),
    ):
        assert line in page.summary(metrics).splitlines()
        assert line in " ".join(Links(written_page(tmp_path, {"m": [metrics]})).text.split())
    assert "leave them out" not in page.summary(searching("unseen", left_out=0))


def test_the_step_that_validation_chose_is_told(tmp_path: Path) -> None:
    chosen = [searching("unseen", chosen_step=10, curves_of="validation") for _ in range(2)]
    assert "Figures are those of step 10 of 20, the best on validation pictures." in page.summary(chosen[0])
    text = " ".join(Links(written_page(tmp_path, {"m": chosen}, ranking(0.3))).text.split())
    assert "Measured on the validation pictures while training" in text
    assert "best on validation pictures: m steps 10, 10. The test pictures select nothing." in text
    assert "last step" not in text
    assert text.count("raw pixels") == 1  # in the table; the curves are of other pictures
    text = " ".join(Links(written_page(tmp_path, {"m": chosen, "n": [cell(), cell()]})).text.split())
    assert "m steps 10, 10; those of the other methods are of the last step." in text
    plain = " ".join(Links(written_page(tmp_path, {"n": [cell()]})).text.split())
    assert "Measured on the test pictures while training" in plain
    assert "the figures above are those of the last step." in plain


# From the first step on


def from_nought(seed: int = 0) -> dict[str, Any]:
    metrics = cell(seed)
    for name, value in (("step", 0), ("seconds", 0.0), ("loss", None), ("recall", 0.1), ("spread", 0.9)):
        metrics["curves"][name] = [value, *metrics["curves"][name]]
    metrics["curves"]["effective_rank"] = [20.0, *metrics["curves"]["effective_rank"]]
    return metrics


@pytest.mark.parametrize("against", figures.AGAINST)
def test_curves_begin_where_training_does_and_the_loss_after_it(against: str) -> None:
    cells = {"m": [from_nought(0), from_nought(1)]}
    recall = figures.curves(cells, "recall", against).axes[0].lines[0].get_xydata()
    assert recall[0] == pytest.approx([0, 0.1])
    loss = figures.curves(cells, "loss", against).axes[0].lines[0].get_xydata()
    assert loss[0, 0] > 0
    assert np.isfinite(loss).all()


def test_a_run_that_has_not_begun_can_be_shown(tmp_path: Path) -> None:
    metrics = from_nought()
    metrics["curves"] = {name: values[:1] for name, values in metrics["curves"].items()}
    assert not figures.curves({"m": [metrics]}, "loss").axes[0].lines
    assert "—" in page.table({"m": [metrics]})
    written_page(tmp_path, {"m": [metrics, from_nought(1)]})


# Files and names


class Files:
    """Stands for photographs in files."""

    def __init__(self, pictures: torch.Tensor, paths: list[str]) -> None:
        self.pictures, self.paths = pictures, paths

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.pictures[rows]


def shelf() -> Examples:
    """Queries and a gallery of one picture a class, both in files, and one class that the gallery lacks."""
    random = torch.Generator().manual_seed(3)

    def split(classes: list[str], each: int, side: str) -> Split:
        paths = [
            f"{side}/{name}/a-long-name-of-a-photograph-{place:04}.jpg" for name in classes for place in range(each)
        ]
        pictures = torch.randint(0, 256, (len(paths), 3, 256, 256), generator=random).byte()
        labels = torch.arange(len(classes)).repeat_interleave(each)
        return Split(Files(pictures, paths), labels, tuple(classes), (side,), side)

    names = [f"<u>{c}" for c in "abcde"]
    known = Dataset(
        "some", PHOTOS, split(names, 4, "train"), split([*names, "lost"], 3, "query"),
        gallery=split(names[::-1], 1, "gallery"), protocol="known",
    )  # fmt: skip
    test = TestSet(known, 0)
    torch.manual_seed(0)
    features = F.normalize(torch.randn(len(test), 6, generator=random), dim=1)
    unit = pddm_ext.PDDM(6)
    quads = pddm_ext.mine_and_score(features[:8], test.labels[:8], unit, mode="anchor")
    return Examples(0, test, test[torch.arange(8)], {"m": Shown(features, unit, quads)}, list("ABCDEFGH"))


def test_queries_find_their_neighbours_in_the_gallery() -> None:
    made = shelf()
    found = pictures.queries(made)
    assert len(found) == 6
    for query in found:
        assert query.picture.name in {f"<u>{c}" for c in "abcde"}  # none of the class without an answer
        assert query.picture.file is not None
        assert query.picture.file.startswith(f"query/{query.picture.name}/a-long-name")
        for _, _, neighbours in query.answers:
            assert sorted(n.picture.file or "" for n in neighbours) == [
                f"gallery/<u>{c}/a-long-name-of-a-photograph-0000.jpg" for c in "abcde"
            ]
            assert [n.right for n in neighbours] == [n.picture.name == query.picture.name for n in neighbours]
        assert query.right == query.answers[0][2][0].right


def test_files_and_classes_are_named_under_their_pictures(tmp_path: Path) -> None:
    made = shelf()
    written = written_page(tmp_path, {"m": [searching("known", gallery=True)]}, None, made)
    text = Links(written).text
    for query in pictures.queries(made):
        assert f'title="{query.picture.file}"'.replace("<", "&lt;").replace(">", "&gt;") in written
        assert f"<b>{query.picture.name}</b>".replace("<u>", "&lt;u&gt;") in written
    assert ", gallery/&lt;u&gt;a/a-long-name-of-a-photograph-0000.jpg" in written
    assert "a-l…aph-0000" in text
    assert "a-long-n…a-photograph-000" in text
    assert re.search(r'<b title="[A-H]">[A-H]</b>', written)
    assert "<u>" not in re.sub(r"data:image/[^\"]*", "", written)
    for name, colour in pictures.legend(made):
        assert f'<span style="background: {colour}"></span>{name}'.replace("<u>", "&lt;u&gt;") in written


def test_the_legend_names_the_maps_classes() -> None:
    names = [name for name, _ in pictures.legend(shelf())]
    assert sorted(names) == [*(f"<u>{c}" for c in "abcde"), "lost"]
    colours = [colour for _, colour in pictures.legend(shelf())]
    assert len(set(colours)) == 6
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)


@pytest.mark.parametrize(
    ("file", "short"),
    [
        ("a/b/cat.jpg", "cat.jpg"),
        ("twelve-.jpeg", "twelve-.jpeg"),
        ("thirteen-.jpg", "thirteen-"),
        ("a/very-long-photograph-0012.jpg", "ver…aph-0012"),
        ("folder.of.dots/IMG_20240131_120000.jpeg", "IMG…1_120000"),
        (r"windows\\style\\cat.jpg", "cat.jpg"),
        (None, ""),
    ],
)
def test_a_files_name_is_shortened_where_it_tells_least(file: str | None, short: str) -> None:
    assert pictures.Picture("", "", "", file).short(12) == short


def test_classes_of_a_batch_are_as_many_as_its_pictures() -> None:
    made = shelf()
    with pytest.raises(ValueError, match="classes has length 3; batch has 8 pictures"):
        Examples(0, made.test, made.batch, made.shown, ["a", "b", "c"])


def test_raw_pixels_search_the_gallery() -> None:
    test = shelf().test
    found = raw_pixels(test, 0)
    pixels = torch.cat([F.adaptive_avg_pool2d(test[torch.tensor([row])], 32).flatten(1) for row in range(len(test))])
    expected = recall_at_k(F.normalize(pixels, dim=1), test.labels, test.queries, test.gallery)
    assert {int(k): point["value"] for k, point in found["recall"].items()} == pytest.approx(expected)


def test_metrics_say_how_the_data_were_used(tiny: Dataset) -> None:
    run = trained(tiny, steps=2)
    found = outcome.figures(run)
    assert found["data"]["protocol"] == "unseen"
    assert found["data"]["test"] == {"classes": 5, "from": ["three"], "pictures": 20}
    assert "gallery" not in found["data"]
    assert found["pairs"]["distance"].keys() >= {"tpr", "eer", "thresholds"}
