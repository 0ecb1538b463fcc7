"""A frozen backbone: nothing of it changes, and where pictures do not either, it sees each of them once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pddm_ext.workbench import cli, kept, outcome
from pddm_ext.workbench.data import photos
from pddm_ext.workbench.data.augment import Photographs
from pddm_ext.workbench.data.splits import Dataset, Joined, Rows, TestSet
from pddm_ext.workbench.interrupts import Interrupts
from pddm_ext.workbench.kept import Kept
from pddm_ext.workbench.loop import CHECKPOINT, Run
from pddm_ext.workbench.model import embedder
from pddm_ext.workbench.settings import Settings
from runs import TINY, TINY_OPTIONS, Counted, differences, interrupt_at, make_tiny, trained, untimed, with_gallery
from small_data import make_folder

pytestmark = pytest.mark.usefixtures("one_thread")

FROZEN = {"freeze": True, "augment": False, "method": "contrastive"}


@pytest.mark.parametrize("augment", [True, False])
def test_nothing_of_a_frozen_backbone_changes(tiny: Dataset, augment: bool) -> None:
    """Not the statistics of batch normalisation either; and dropout drops nothing."""
    backbone = Counted()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    run = Run(Settings(**{**TINY, **FROZEN, "augment": augment, "weight_decay": 0.1}), tiny, backbone=backbone)
    head = run.learner.net.head.weight.clone()
    modes: list[bool] = []
    backbone.layers.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    run.train(progress=False)
    run.learner.train()
    assert not any(module.training for module in backbone.modules())
    assert run.learner.net.head.training
    assert not differences(before, backbone.state_dict())
    assert not any(modes)
    assert modes
    assert not torch.equal(head, run.learner.net.head.weight)


def test_a_backbone_that_is_not_frozen_trains_in_training_mode(tiny: Dataset) -> None:
    backbone = Counted()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    trained(tiny, backbone=backbone, method="contrastive")
    assert set(differences(before, backbone.state_dict())) == {f"/{name}" for name in before}


def curves(run: Run) -> dict[str, Tensor]:
    return {name: torch.tensor(curve[1:]) for name, curve in run.curves.items() if name != "seconds"}


@pytest.mark.parametrize(
    "changed", [{}, {"structure": 0.3, "method": "recommended", "unit_steps": 4, "accumulate": 2}, {"patience": 5}]
)
@pytest.mark.parametrize("data", ["distorted", "gallery"])
def test_a_frozen_backbone_sees_each_picture_once_and_all_is_as_if_it_saw_them_each_time(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, changed: dict[str, Any]
) -> None:
    dataset = tiny if data == "distorted" else with_gallery(tiny)
    changed = {**FROZEN, "classes": 3, **changed}
    one, each, again = Counted(), Counted(), Counted()
    run = trained(dataset, tmp_path, one, **changed)
    figures = outcome.figures(run)
    # Beside the one of zeros by which it is looked at first.
    assert one.pictures - 1 == (32 + 20 if data == "distorted" else 32)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_know", lambda *_: None)
        plain = trained(dataset, None, each, **changed)
    assert each.pictures > one.pictures
    for name, curve in curves(plain).items():
        torch.testing.assert_close(curves(run)[name], curve, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.learner.state_dict(), plain.learner.state_dict(), rtol=1e-3, atol=1e-5)
    expected = outcome.figures(plain)
    assert figures["results"]["distance"]["recall"]["1"] == expected["results"]["distance"]["recall"]["1"]
    # A run that goes on finds them on the disk, whole.
    files = sorted((tmp_path / "features").glob("[!.]*"))
    assert files
    assert all(path.suffix == ".npy" for path in files)
    trained(dataset, tmp_path, again, **{**changed, "steps": 8})
    assert again.pictures - 1 <= len(files) * kept._PROBED
    assert sorted((tmp_path / "features").glob("[!.]*")) == files


def test_a_run_on_kept_features_ends_at_the_same_bits_after_an_interrupt(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tiny, tmp_path / "whole", Counted(), **FROZEN)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            trained(tiny, tmp_path / "stopped", Counted(), **FROZEN)
    stopped = trained(tiny, tmp_path / "stopped", Counted(), **FROZEN)
    assert not differences(whole.learner.state_dict(), stopped.learner.state_dict())
    assert untimed(outcome.figures(whole)) == untimed(outcome.figures(stopped))


def features(dataset: Dataset, folder: Path | None, backbone: nn.Module, **changed: Any) -> Kept:
    view = dataset.view
    settings = Settings(**{**TINY, **FROZEN, **changed})
    return Kept(embedder(settings, (view.channels, view.size, view.size), backbone), dataset, folder)


def test_kept_features_are_the_backbones_row_by_row(tiny: Dataset) -> None:
    backbone = Counted()
    data = with_gallery(tiny)
    found = features(data, None, backbone)
    for dataset, seed in ((data, 0), (data, 3)):
        test = TestSet(dataset, seed)
        rows = torch.arange(len(test))
        torch.testing.assert_close(found.of_test(dataset, seed), backbone(test[rows]))
    rows = torch.tensor([3, 1, 1])
    torch.testing.assert_close(
        found.of(Joined(Rows(data.train.pictures, rows), data.test.pictures)),
        backbone(data.view.plain(torch.cat([data.train.pictures[rows], data.test.pictures[torch.arange(8)]]))),
    )
    distorted = features(tiny, None, backbone).of_test(tiny, 2)
    torch.testing.assert_close(distorted, backbone(TestSet(tiny, 2)[torch.arange(20)]))


def test_features_are_computed_anew_where_anything_that_they_depend_on_has_changed(
    tiny: Dataset, tmp_path: Path
) -> None:
    def seen(dataset: Dataset = tiny, change: Any = None, **changed: Any) -> int:
        backbone = Counted()
        if change is not None:
            change(backbone)
        features(dataset, tmp_path, backbone, **changed)
        return backbone.pictures - 1

    assert seen() == 32
    assert seen() == kept._PROBED
    assert seen(replace(tiny, train=tiny.train.some(torch.arange(30)))) == 30
    assert seen(change=lambda backbone: backbone.layers[2].weight.data.mul_(1.5)) == 32
    assert seen(change=lambda backbone: backbone.layers[3].running_mean.add_(1)) == 32
    assert seen(change=lambda backbone: backbone.layers.append(nn.Tanh())) == 32
    assert seen(dim=9) == kept._PROBED  # the head is nothing to them
    other = make_tiny()
    pictures = other.train.pictures[torch.arange(32)].flip(3)
    assert seen(replace(other, train=replace(other.train, pictures=pictures, digest="other"))) == 32

    class Otherwise(Counted):
        """Code that has changed, with the same parts."""

        def forward(self, pictures: Tensor) -> Tensor:
            return super().forward(pictures) + 1

    Otherwise.__name__ = Otherwise.__qualname__ = "Counted"
    backbone = Otherwise()
    found = features(tiny, tmp_path, backbone)
    assert backbone.pictures - 1 == kept._PROBED + 32
    torch.testing.assert_close(
        found.of(tiny.train.pictures), backbone(tiny.view.plain(tiny.train.pictures[torch.arange(32)]))
    )


def test_features_of_files_that_were_written_again_are_computed_anew(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "pictures", 6, 3)
    for path in root.rglob("*.png"):
        Image.open(path).resize((40, 40)).save(path.with_suffix(".bmp"))
        path.unlink()
    view = Photographs(32, 32)
    settings = Settings(data="folder", root=str(root), backbone="mine:net", method="contrastive", freeze=True, dim=8)

    def seen() -> int:
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
        for parameter in backbone.parameters():
            nn.init.ones_(parameter)
        net, counts = embedder(settings, (3, 32, 32), backbone), []
        backbone.register_forward_hook(lambda _, given, __: counts.append(len(given[0])))
        Kept(net, photos.folder(root, view), tmp_path / "features")
        return sum(counts)

    assert seen() == 18
    assert seen() == 2 * kept._PROBED
    last = sorted(root.rglob("*.bmp"))[-1]
    size, time = last.stat().st_size, last.stat().st_mtime_ns
    Image.new("RGB", (40, 40), "red").save(last)
    os.utime(last, ns=(time + 1, time + 1))
    assert last.stat().st_size == size
    assert seen() == kept._PROBED + 9  # it is on the test side


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_of_features_is_written_anew(tiny: Dataset, tmp_path: Path, damage: bytes | None) -> None:
    features(tiny, tmp_path, Counted())
    (path,) = tmp_path.glob("*.npy")
    content = path.read_bytes()
    if damage is None:
        np.save(path, np.zeros((3, 3), np.float32))
    else:
        path.write_bytes(damage)
    features(tiny, tmp_path, Counted())
    assert path.read_bytes() == content
    assert list(tmp_path.glob("*.npy")) == [path]


@pytest.mark.parametrize("earlier", [False, True])
def test_features_that_are_not_those_written_are_computed_anew(tiny: Dataset, tmp_path: Path, earlier: bool) -> None:
    """Beyond the rows that are looked at, too; and those of a file without a digest, which earlier versions wrote."""
    clean = features(tiny, tmp_path, Counted()).of(tiny.train.pictures)
    (path,) = tmp_path.glob("*.npy")
    content = path.read_bytes()
    assert torch.equal(torch.from_numpy(np.load(path)), clean)
    half = len(content) // 2
    path.write_bytes(content[: -kept._DIGEST] if earlier else content[:half] + bytes(len(content) - half))
    backbone = Counted()
    assert torch.equal(features(tiny, tmp_path, backbone).of(tiny.train.pictures), clean)
    assert backbone.pictures - 1 == 32
    assert path.read_bytes() == content


def test_features_that_are_not_finite_are_said(tiny: Dataset) -> None:
    class Overflows(Counted):
        def forward(self, pictures: Tensor) -> Tensor:
            return super().forward(pictures) / (pictures.sum() == 0)

    for changed in (FROZEN, {"method": "contrastive"}):
        with pytest.raises(FloatingPointError, match="the backbone's features are not finite before any training"):
            trained(tiny, backbone=Overflows(), **changed)


_NET = """
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 16))

    def forward(self, pictures):
        with open(os.environ["SEEN_BY_A_NET"], "a") as file:
            file.write(f"{len(pictures)}\\n")
        return self.layers(pictures)
"""


def test_the_cells_of_a_grid_share_their_features(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of folds and methods alike; the test pictures are distorted by the seed here."""
    (tmp_path / "net_that_counts.py").write_text(_NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SEEN_BY_A_NET", str(tmp_path / "seen"))
    frozen = ["--backbone", "net_that_counts:Net", "--freeze", "--no-augment", "--classes", "3", "--steps", "2"]
    grid = ["--methods", "contrastive", "n-pair:dim=6", "--seeds", "1", "--lrs", "0.1", "0.01"]
    out = tmp_path / "grid"
    assert cli.main(["compare", *TINY_OPTIONS, *frozen, *grid, "--out", str(out)]) == 0
    seen = [int(line) for line in (tmp_path / "seen").read_text().splitlines()]
    # A fold's and the final runs' training pictures once for all of them, and their test pictures, which are distorted.
    assert sorted(count for count in seen if count > kept._PROBED) == [12, 20, 20, 32]
    assert {path.suffix for path in (out / "features").iterdir() if path.name != ".lock"} == {".npy"}
    assert not list(out.rglob("seed-*/features"))
    assert (out / "report.html").exists()


def test_ctrl_c_while_features_are_computed_leaves_none(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kept, "over", interrupted)
    options = ["--freeze", "--no-augment", "--out", str(tmp_path)]
    assert cli.main(["train", *TINY_OPTIONS, *options]) == 130
    assert "stopped after 0 steps; no checkpoint yet" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.npy"))
    assert not (tmp_path / CHECKPOINT).exists()


def test_interrupts_are_heard_in_the_main_thread_alone_and_left_as_they_were() -> None:
    import signal
    import threading

    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as heard:
        assert signal.getsignal(signal.SIGINT) != before
        signal.raise_signal(signal.SIGINT)
        assert heard.asked
        with pytest.raises(KeyboardInterrupt), heard.at_once():
            pytest.fail("went on")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert heard.twice
    assert signal.getsignal(signal.SIGINT) == before
    failures = []

    def elsewhere() -> None:
        try:
            with Interrupts() as none:
                failures.append(none.asked or signal.getsignal(signal.SIGINT) != before)
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert failures == [False]
