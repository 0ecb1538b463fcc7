"""The main job: its data, its figures, its command line, and runs that stop and continue."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pddm_ext
from pddm_ext import cli
from pddm_ext.training import checkpoint, evaluate, glyphs, omniglot, report
from pddm_ext.training.data import BatchSampler, Dataset, Split, distort, fit, frozen_test, plain
from pddm_ext.training.loop import Run, mine_by_distance
from pddm_ext.training.model import ConvNet
from pddm_ext.training.settings import Settings

OMNIGLOT = Path(__file__).parents[2] / "shared" / "data" / "omniglot" / "images_background_small1.zip"


@pytest.fixture(scope="module")
def characters() -> Dataset:
    return glyphs.load()


def blots(classes: int, drawings: int, seed: int) -> torch.Tensor:
    """Classes of random coarse patterns, each drawing a little different: (classes · drawings, 64, 64) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(classes, 1, 8, 8, generator=generator).repeat_interleave(drawings, 0)
    coarse = coarse + 0.3 * torch.rand(coarse.shape, generator=generator)
    return (torch.nn.functional.interpolate(coarse, scale_factor=8)[:, 0] * 190).byte()


@pytest.fixture
def tiny() -> Dataset:
    def split(classes: int, seed: int, names: tuple[str, ...]) -> Split:
        return Split(blots(classes, 4, seed), torch.arange(classes).repeat_interleave(4), names, ("blots",))

    names = tuple(f"<b>{c}" for c in "abcdef")
    return Dataset("glyphs", split(6, 0, names), split(5, 1, names[:5]), distort_test=True)


TINY = {"steps": 6, "classes": 4, "samples": 3, "dim": 8, "every": 2}
TINY_OPTIONS = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]


def make_archive(path: Path, alphabets: int = 5, broken: str | None = None) -> Path:
    """A small archive in the layout of the real one: 3 characters of 4 drawings for each alphabet."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images_background_small1/", "")
        for a in range(alphabets):
            for c in range(3):
                for d in range(4):
                    name = f"images_background_small1/Alphabet_{'EDCBA'[a]}/character{c + 1:02}/{a}{c}_{d}.png"
                    ink = np.full((105, 105), 255, np.uint8)
                    ink[20 + 5 * c : 80, 30 : 60 + 5 * a] = random.integers(0, 2, (60 - 5 * c, 30 + 5 * a)) * 255
                    with archive.open(name, "w") as file:
                        Image.fromarray(ink).convert("1").save(file, "PNG")
        if broken is not None:
            archive.writestr(f"images_background_small1/Alphabet_A/character01/{broken}", b"\x89PNG\r\n\x1a\nno more")
    return path


# Glyphs


def test_glyphs_are_open_set(characters: Dataset) -> None:
    train, test = characters.train, characters.test
    assert not set(train.names) & set(test.names)
    assert set(train.names) <= set("".join(glyphs.TRAIN_SCRIPTS.values()))
    assert set(test.names) <= set("".join(glyphs.TEST_SCRIPTS.values()))
    for scripts, split in ((glyphs.TRAIN_SCRIPTS, train), (glyphs.TEST_SCRIPTS, test)):
        for script, members in scripts.items():
            assert len(set(members) & set(split.names)) >= 5, script
        assert torch.bincount(split.labels).min() >= glyphs.MIN_FACES
        assert split.labels.max() + 1 == len(split.names)
        assert len(split.drawings) == len(split.labels)
    assert len(train.names) >= 50
    assert len(test.names) >= 80


def test_no_picture_has_two_labels(characters: Dataset) -> None:
    train, test = characters.train, characters.test
    drawings = torch.cat([train.drawings, test.drawings])
    labels = torch.cat([train.labels, test.labels + len(train.names)])
    alike = glyphs.similarity(drawings, drawings)
    other = labels[:, None] != labels[None, :]
    assert alike[other].max() < glyphs.ALIKE
    # By another measure too: no two classes share most of their ink.
    ink = (drawings > 127).flatten(1).float()
    both = ink @ ink.T
    union = ink.sum(1)[:, None] + ink.sum(1)[None, :] - both
    assert (both / union)[other].max() < 0.9


@pytest.mark.parametrize(
    "pair",
    [
        *("AА", "oо", "cс", "pр", "xх", "BВ", "HН", "iі", "cC", "sS", "Il", "0O", "6б"),
        *("oօ", "nո", "uս", "hհ", "gց", "qզ", "OՕ", "SՏ", "UՍ", "oס", "Iו", "Iן"),
    ],
)
def test_look_alikes_are_one_class_or_left_out(characters: Dataset, pair: str) -> None:
    kept = set(characters.train.names) | set(characters.test.names)
    assert len(kept & set(pair)) <= 1


def test_left_out_training_characters_are_not_tested(characters: Dataset) -> None:
    """A test class looks like no character of a training script, kept or not."""
    drawn = glyphs.draw("".join(glyphs.TRAIN_SCRIPTS.values()))
    for split_drawings in characters.test.drawings.split(256):
        assert glyphs.similarity(split_drawings, torch.cat(list(drawn.values()))).max() < glyphs.ALIKE


def test_only_glyphs_that_a_face_has_are_drawn() -> None:
    drawn = glyphs.draw("Aა中")
    assert "中" not in drawn
    assert len(drawn["A"]) == len(glyphs.FACES) == 16
    assert glyphs.MIN_FACES <= len(drawn["ა"]) < len(glyphs.FACES)


def test_missing_font_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "FACES", ("NoSuchFace",))
    with pytest.raises(FileNotFoundError, match=r"NoSuchFace\.ttf.*matplotlib"):
        glyphs.draw("A")


# Drawings and batches


def test_fit_normalises_place_and_size() -> None:
    small, large = Image.new("L", (105, 105)), Image.new("L", (200, 200))
    small.paste(255, (10, 20, 30, 60))
    large.paste(255, (90, 20, 150, 140))
    torch.testing.assert_close(fit(small), fit(large), rtol=0, atol=0)
    with pytest.raises(ValueError, match="blank"):
        fit(Image.new("L", (9, 9)))


def test_samples_are_fresh_in_training_and_frozen_at_test(tiny: Dataset) -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (distort(tiny.train.drawings, generator) for _ in range(2))
    assert first.shape == (24, 1, 32, 32)
    assert not torch.equal(first, second)
    assert first.min() >= 0
    assert first.max() <= 1
    images, labels = frozen_test(tiny, 3)
    again, same = frozen_test(tiny, 3)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert not torch.equal(images, frozen_test(tiny, 4)[0])
    undistorted = Dataset("omniglot", tiny.train, tiny.test, distort_test=False)
    images, _ = frozen_test(undistorted, 0)
    assert torch.equal(images.sum(0), plain(tiny.test.drawings).sum(0)) or torch.allclose(
        images.sum(0), plain(tiny.test.drawings).sum(0)
    )


def test_batches_are_classes_times_samples(tiny: Dataset) -> None:
    sampler = BatchSampler(tiny.train, classes=3, samples=6)  # more than the four drawings of a class
    images, labels = sampler(torch.Generator().manual_seed(0))
    assert images.shape == (18, 1, 32, 32)
    assert torch.bincount(labels).tolist().count(6) == 3
    assert torch.equal(images, sampler(torch.Generator().manual_seed(0))[0])


# Figures


def test_recall_counts_the_nearest_others() -> None:
    # On a line: 0 0 1 | 1 1 0 0 0 0 0; the second row's nearest is the first.
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0, 2])
    features = torch.tensor([0.0, 0.1, 0.25, 10, 10.1, 20, 20.1, 20.3, 20.6, 30])[:, None]
    recall = evaluate.recall_at_k(features, labels)
    assert recall[1] == pytest.approx(8 / 10)  # not the row at 0.25, nor the only one of class 2
    assert recall[2] == pytest.approx(8 / 10)
    assert recall[4] == pytest.approx(9 / 10)


def test_recall_by_score_leaves_the_row_itself_out() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    labels = torch.randint(0, 4, (40,), generator=generator)
    torch.manual_seed(0)
    unit = pddm_ext.PDDM(6)
    scores = pddm_ext.reference.score_matrix(features, unit).detach().fill_diagonal_(-torch.inf)
    nearest = scores.topk(8).indices
    expected = {k: (labels[nearest[:, :k]] == labels[:, None]).any(1).double().mean().item() for k in evaluate.KS}
    assert evaluate.recall_by_score(features, labels, unit) == pytest.approx(expected)


def test_spread_and_overlap_at_their_ends() -> None:
    assert evaluate.spread(torch.eye(4)[:1].expand(9, 4)) == pytest.approx(0)
    assert evaluate.spread(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(1)
    low, high = np.linspace(0, 1, 50), np.linspace(2, 3, 50)
    assert evaluate.histograms(low, high)[3] == 0
    assert evaluate.histograms(low, low)[3] == pytest.approx(1)
    assert evaluate.histograms(np.zeros(3), np.zeros(5))[3] == pytest.approx(1)  # a collapse to one point


@pytest.mark.parametrize("mode", ["batch", "anchor", "pair"])
def test_mining_by_distance_finds_the_farthest_positive_and_the_nearest_negatives(mode: str) -> None:
    feats = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 3
    quads = mine_by_distance(feats, labels, mode)
    unit = torch.nn.functional.normalize(feats.double(), dim=1)
    distance = torch.cdist(unit, unit)
    for i, j, k, l in zip(*(field.tolist() for field in quads[:4]), strict=True):  # noqa: E741
        others = labels != labels[i]
        assert k == distance[i].masked_fill(~others, torch.inf).argmin()
        assert l == distance[j].masked_fill(~others, torch.inf).argmin()
        if mode == "anchor":
            assert j == distance[i].masked_fill(others, -torch.inf).argmax()
    assert len(quads.i) == {"batch": 1, "anchor": 12, "pair": 18}[mode]


# Runs


def test_both_learners_start_from_the_same_net_and_torchs_generator_is_left_alone(tiny: Dataset) -> None:
    before = torch.random.get_rng_state()
    run = Run(Settings(**TINY), tiny)
    assert torch.equal(before, torch.random.get_rng_state())
    euclidean, pddm = (learner.net.state_dict() for learner in run.learners.values())
    assert all(torch.equal(euclidean[key], pddm[key]) for key in euclidean)
    assert not torch.equal(ConvNet(8, 0).layers[0].weight, ConvNet(8, 1).layers[0].weight)


def test_a_short_run_on_glyphs_learns(characters: Dataset, tmp_path: Path) -> None:
    run = Run(Settings(steps=80, every=80), characters)
    run.train(tmp_path / "checkpoint.pt", progress=False)
    raw = evaluate.recall_at_k(run.images.flatten(1), run.labels)
    assert run.curves["pddm"]["recall"][-1] > raw[1] + 0.05


def untimed(metrics: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in metrics.items() if key != "timing"}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    sample, calls = BatchSampler.__call__, []

    def interrupted(self: BatchSampler, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return sample(self, generator)

    monkeypatch.setattr(BatchSampler, "__call__", interrupted)


def train_to_the_end(tiny: Dataset, path: Path, *, resume: bool = False, **changed: object) -> dict[str, object]:
    run = Run(Settings(**{**TINY, **changed}), tiny)
    if resume:
        run.resume(path)
    run.train(path, progress=False)
    return untimed(report.measure(run))


@pytest.mark.parametrize("mode", ["batch", "anchor", "pair"])
def test_a_resumed_run_ends_at_the_same_numbers(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    whole = train_to_the_end(tiny, tmp_path / "whole.pt", mode=mode)
    stopped = tmp_path / "stopped.pt"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train_to_the_end(tiny, stopped, mode=mode)
    assert checkpoint.load(stopped)["taken"] == 2
    assert train_to_the_end(tiny, stopped, mode=mode, resume=True) == whole
    weights, same = (checkpoint.load(tmp_path / name)["learners"]["pddm"] for name in ("whole.pt", "stopped.pt"))
    for part in ("net", "unit"):
        assert all(torch.equal(weights[part][key], same[part][key]) for key in weights[part])


def test_a_finished_run_can_be_made_longer(tiny: Dataset, tmp_path: Path) -> None:
    longer = train_to_the_end(tiny, tmp_path / "longer.pt", steps=7)
    train_to_the_end(tiny, tmp_path / "grown.pt", steps=3)  # between two evaluations
    assert train_to_the_end(tiny, tmp_path / "grown.pt", steps=7, resume=True) == longer


def test_stopping_and_resuming_on_the_command_line(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(glyphs, "load", lambda: tiny)
    options = ["train", *TINY_OPTIONS, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        assert cli.main(options) == 130
    assert "stopped after 3 steps" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert cli.main([*options, "--resume"]) == 0
    written = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    whole = train_to_the_end(tiny, tmp_path / "whole.pt")
    assert untimed(written) == json.loads(json.dumps(whole))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--lr", "0.5"], "--lr was 0.001 in the run to resume and is 0.5 now"),
        (["--unit-lr-factor", "1"], "--unit-lr-factor was 3.0 in the run to resume and is 1.0 now"),
        (["--mode", "pair"], "--mode was anchor in the run to resume and is pair now"),
        (["--steps", "1"], "has taken 6 steps; --steps is 1"),
    ],
)
def test_resuming_under_other_options_names_them(
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(glyphs, "load", lambda: tiny)
    run = Run(Settings(**TINY), tiny)
    run.train(tmp_path / "checkpoint.pt", progress=False)
    assert cli.main(["train", *TINY_OPTIONS, *changed, "--out", str(tmp_path), "--resume"]) == 2
    assert message in capsys.readouterr().err


def test_resuming_on_other_drawings_is_refused(tiny: Dataset, tmp_path: Path) -> None:
    run = Run(Settings(**TINY), tiny)
    run.save(tmp_path / "checkpoint.pt")
    other = Dataset("glyphs", tiny.train, tiny.train, distort_test=True)
    with pytest.raises(ValueError, match="saw other drawings"):
        Run(Settings(**TINY), other).resume(tmp_path / "checkpoint.pt")


def test_a_missing_or_damaged_checkpoint_is_named(tiny: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt: no checkpoint"):
        checkpoint.load(path)
    Run(Settings(**TINY), tiny).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]  # no temporary file is left
    content = path.read_bytes()
    for damaged in (b"", b"nonsense", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint"):
            checkpoint.load(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of format"):
        checkpoint.load(path)
    torch.save({"format": 1, "call": print}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        checkpoint.load(path)


def test_the_report_folder(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(glyphs, "load", lambda: tiny)
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr()
    for text in ("R@1", "R@8", "raw pixels", "Euclidean-mined", "PDDM-mined", "steps/s", "mining"):
        assert text in printed.out
    assert "6/6" in printed.err  # the progress bar
    folder = tmp_path / "new" / "folder"
    assert sorted(file.name for file in folder.iterdir()) == ["checkpoint.pt", "metrics.json", "report.html"]

    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    for name in ("raw", "euclidean", "pddm", "pddm_score"):
        recall = metrics["results"][name]["recall"]
        assert list(recall) == ["1", "2", "4", "8"]
        assert sorted(recall.values()) == list(recall.values())
    assert metrics["curves"]["pddm"]["step"] == [2, 4, 6]
    for histogram in metrics["histograms"].values():
        assert sum(histogram["positive"]) == pytest.approx(1)
        assert 0 <= histogram["overlap"] <= 1

    page = (folder / "report.html").read_text("utf-8")
    assert "http:" not in page
    assert "https:" not in page
    assert page.count("data:image/png;base64,") >= 8
    assert "&lt;b&gt;a" in page
    assert "<b>" not in page


def test_a_collapse_is_said(tiny: Dataset, tmp_path: Path) -> None:
    run = Run(Settings(**TINY), tiny)
    run.train(tmp_path / "checkpoint.pt", progress=False)
    with torch.no_grad():
        last = run.learners["euclidean"].net.layers[-1]
        last.weight.zero_()
    metrics = report.measure(run)
    assert report.collapsed(metrics) == ["euclidean"]
    assert "The Euclidean-mined embedding has collapsed" in report.table(metrics)
    assert "The Euclidean-mined embedding has collapsed" in report.write(run, metrics, tmp_path).read_text("utf-8")


# Omniglot


def test_omniglot_from_zip_and_folders(tmp_path: Path) -> None:
    path = make_archive(tmp_path / "images_background_small1.zip", broken="._resource_fork.png")
    dataset = omniglot.load(path)
    assert dataset.train.groups == ("Alphabet_A", "Alphabet_B", "Alphabet_C")
    assert dataset.test.groups == ("Alphabet_D", "Alphabet_E")
    assert len(dataset.train.names) == 9
    assert len(dataset.test.labels) == 2 * 3 * 4
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(unpacked)
    for root in (tmp_path, unpacked, unpacked / "images_background_small1"):
        assert omniglot.load(root).digest() == dataset.digest()


def test_omniglot_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_archive(tmp_path / "small.zip")
    options = ["train", "--data", "omniglot", "--root", str(path), *TINY_OPTIONS, "--out", str(tmp_path / "out")]
    assert cli.main(options) == 0
    assert "search among 6 classes, 24 drawings: Alphabet_D, Alphabet_E" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "no zip", "picture", "alphabets", "empty"])
def test_bad_archives_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    path = tmp_path / "archive.zip"
    named = str(path)
    if damage == "alphabets":
        make_archive(path, alphabets=4)
    elif damage == "picture":
        make_archive(path, broken="0_9.png")
        named += "/images_background_small1/Alphabet_A/character01/0_9.png"
    elif damage == "no zip":
        path.write_text("<html>Not found</html>")
    elif damage == "empty":
        path.mkdir()
    elif damage != "missing":
        content = bytearray(make_archive(path).read_bytes())
        if damage == "truncated":
            del content[len(content) // 2 :]
        else:
            content[300:320] = bytes(20)
        path.write_bytes(content)
    assert cli.main(["train", "--data", "omniglot", "--root", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pddm-ext: error: ")
    assert named in error
    assert "ALPHABET/characterNN/*.png" in error
    assert "https://github.com/brendenlake/omniglot" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not OMNIGLOT.is_file(), reason=f"the public archive is not at {OMNIGLOT}")
def test_the_public_archive() -> None:
    dataset = omniglot.load(OMNIGLOT)
    assert dataset.train.groups == ("Balinese", "Early_Aramaic", "Greek")
    assert dataset.test.groups == ("Korean", "Latin")
    assert len(dataset.train.names) + len(dataset.test.names) == 136
    assert len(dataset.train.labels) + len(dataset.test.labels) == 2720
    assert torch.bincount(dataset.test.labels).unique().tolist() == [20]


# The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "omniglot"], "--data omniglot and --root go together"),
        (["--root", "somewhere"], "--data omniglot and --root go together"),
        (["--steps", "0"], "--steps is 0; at least 1 is accepted"),
        (["--classes", "1"], "--classes is 1; at least 2 is accepted"),
        (["--classes", "999"], "--classes is 999; glyphs has 6 to train on"),
        (["--samples", "1"], "--samples is 1; at least 2 is accepted"),
        (["--dim", "0"], "--dim is 0; at least 1 is accepted"),
        (["--lr", "nan"], "--lr is nan; a positive finite number is accepted"),
        (["--unit-lr-factor", "-1"], "--unit-lr-factor is -1.0; a positive finite number is accepted"),
        (["--seed", "-1"], "--seed is -1; at least 0 is accepted"),
        (["--seed", str(2**32)], "less than 2**32 is accepted"),
        (["--every", "0"], "--every is 0; at least 1 is accepted"),
        (["--resume"], "no checkpoint to resume from"),
    ],
)
def test_bad_options_fail_before_any_work(
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(glyphs, "load", lambda: tiny)
    assert cli.main(["train", *TINY_OPTIONS, *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pddm-ext: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_is_named(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(glyphs, "load", lambda: tiny)
    (tmp_path / "out").write_text("")
    assert cli.main(["train", *TINY_OPTIONS, "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_divergence_is_said(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(glyphs, "load", lambda: tiny)
    assert cli.main(["train", *TINY_OPTIONS, "--lr", "1e30", "--out", str(tmp_path)]) == 2
    assert "embedding is not finite" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_info_says_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    build = pddm_ext._C.build_info()
    for text in (pddm_ext.__version__, torch.__version__, build["compiler"], build["stable_abi"], "CUDA", "threads"):
        assert text in out
    for name in pddm_ext._C.cpu_capabilities():
        assert name in out


def test_info_needs_no_training_extra_and_train_says_how_to_get_them() -> None:
    program = """
import sys
for extra in ("matplotlib", "PIL", "tqdm", "sklearn", "jinja2"):
    sys.modules[extra] = None
from pddm_ext import cli
assert cli.main(["info"]) == 0
sys.exit(cli.main(["train"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "instruction sets" in done.stdout
    assert "pip install 'pddm-ext[train]'" in done.stderr
    assert "Traceback" not in done.stderr
