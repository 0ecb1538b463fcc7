"""pddm_ext.load: what a run leaves, as an embedder that prepares its pictures itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import pddm_ext
from pddm_ext.workbench import checkpoint
from pddm_ext.workbench.data.augment import Photographs
from pddm_ext.workbench.data.photos import folder as photo_folder
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.loop import CHECKPOINT, Run
from pddm_ext.workbench.settings import Settings
from runs import TINY, dropping, looked, trained
from small_data import make_folder

pytestmark = pytest.mark.usefixtures("one_thread")


class Colours(nn.Module):
    """A backbone of photographs with a BatchNorm, which evaluation must not move."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 10))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.net(pictures)


VIEW = Photographs(size=24, stored=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), interpolation="bilinear")


def photographs(tmp_path: Path) -> Run:
    """A run on a folder of photographs of one colour each."""
    data = photo_folder(make_folder(tmp_path / "photos"), VIEW)
    settings = Settings(**TINY, data="folder", root=str(tmp_path / "photos"), backbone="colours:Colours")
    run = Run(settings, data, tmp_path / "run", Colours())
    run.train(progress=False)
    return run


def drawing(seed: int = 0) -> Image.Image:
    ink = np.random.default_rng(seed).integers(0, 2, (10, 10)).repeat(5, 0).repeat(5, 1) * 255
    return Image.fromarray(ink.astype(np.uint8))


def test_features_are_those_that_the_run_is_measured_by(tiny: Dataset, tmp_path: Path) -> None:
    run = trained(tiny, tmp_path, structure=0.3)
    embedder = pddm_ext.load(tmp_path)
    stored = tiny.train.pictures[torch.arange(20)]
    run.learner.eval()
    with torch.no_grad():
        feats, structure = run.learner.net.both(tiny.view.plain(stored))
    found, structures = embedder.embed(stored)
    assert torch.equal(found, F.normalize(feats, dim=1))
    assert structures is not None
    assert torch.equal(structures, structure)
    assert torch.equal(embedder.module(stored), found)
    assert embedder.names == tiny.train.names
    assert embedder.settings == run.settings
    assert embedder.dim == 8
    assert embedder.structured
    for name, value in run.learner.unit.state_dict().items():
        assert torch.equal(embedder.unit.state_dict()[name], value)
    assert not any(
        parameter.requires_grad for parameter in [*embedder.module.parameters(), *embedder.unit.parameters()]
    )


def test_photographs_are_prepared_as_for_the_run(tmp_path: Path) -> None:
    run = photographs(tmp_path)
    embedder = pddm_ext.load(tmp_path / "run" / CHECKPOINT, backbone=Colours())
    assert embedder.view == VIEW
    features = looked(run.learner.net, run.test).features
    paths = [tmp_path / "photos" / str(run.test.file(row)) for row in range(len(run.test))]
    assert torch.allclose(embedder(paths), features, atol=1e-6)


def test_every_kind_of_picture_gives_the_same_feature(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path)
    embedder = pddm_ext.load(tmp_path)
    pictures = [drawing(seed) for seed in range(3)]
    paths = []
    for place, picture in enumerate(pictures):
        paths.append(tmp_path / f"{place}.png")
        picture.save(paths[-1])
    tensors = torch.stack([torch.from_numpy(np.array(picture))[None] for picture in pictures])
    expected = embedder(pictures)
    assert expected.shape == (3, 8)
    assert expected.dtype == torch.float32
    assert torch.allclose(expected.norm(dim=1), torch.ones(3))
    for same in (
        paths,
        [str(path) for path in paths],
        tuple(paths),
        iter(paths),
        tensors,
        list(tensors),
        [tensors],
        [tensors[:1], str(paths[1]), pictures[2]],
        [tensors[:1], tensors[1:]],
        tensors.expand(-1, 3, -1, -1),
    ):
        assert torch.allclose(embedder(same), expected, atol=1e-6)
    for one in (paths[0], str(paths[0]), pictures[0], tensors[0], tensors[:1]):
        assert torch.allclose(embedder(one), expected[:1], atol=1e-6)
    assert embedder([]).shape == (0, 8)
    assert embedder(tensors[:0]).shape == (0, 8)
    many = embedder([paths[place % 3] for place in range(70)])
    assert torch.allclose(many, expected[torch.arange(70) % 3], atol=1e-6)


@pytest.mark.parametrize(
    ("pictures", "error", "message"),
    [
        (np.zeros((4, 4), np.uint8), TypeError, "pictures is numpy.ndarray"),
        ([np.zeros((4, 4), np.uint8)], TypeError, "picture 0 is numpy.ndarray"),
        (b"a.png", TypeError, "pictures is bytes"),
        ({"a.png": 1}, TypeError, "pictures is dict"),
        (None, TypeError, "pictures is NoneType"),
        (3, TypeError, "pictures is int"),
        ([["a.png"]], TypeError, "picture 0 is list"),
        (torch.zeros(3, 8, 8), ValueError, r"picture 0 is a tensor of shape \(3, 8, 8\) and torch.float32"),
        (torch.zeros(8, 8, dtype=torch.uint8), ValueError, r"shape \(8, 8\)"),
        (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), ValueError, r"shape \(2, 2, 8, 8\)"),
        (torch.zeros(1, 0, 8, dtype=torch.uint8), ValueError, r"shape \(1, 0, 8\)"),
        ("nowhere.png", OSError, "nowhere.png"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_name(
    tiny: Dataset, tmp_path: Path, pictures: Any, error: type[Exception], message: str
) -> None:
    trained(tiny, tmp_path, steps=2)
    with pytest.raises(error, match=message):
        pddm_ext.load(tmp_path)(pictures)


def test_a_list_with_a_foreign_member_is_refused_before_any_is_embedded(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tiny, tmp_path, steps=2)
    embedder = pddm_ext.load(tmp_path)
    monkeypatch.setattr(embedder, "embed", lambda stored: pytest.fail("embedded"))
    with pytest.raises(TypeError, match="picture 40 is int"):
        embedder([*[drawing()] * 40, 7])


def test_nothing_takes_it_out_of_evaluation(tmp_path: Path) -> None:
    photographs(tmp_path)
    embedder = pddm_ext.load(tmp_path / "run", backbone=Colours())
    paths = sorted((tmp_path / "photos").rglob("*.png"))
    before, state = embedder(paths), {k: v.clone() for k, v in embedder.module.state_dict().items()}
    embedder.module.train()
    assert not any(module.training for module in embedder.module.modules())
    embedder.module.net.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedder(paths), before)
    for name, value in embedder.module.state_dict().items():
        assert torch.equal(value, state[name]), name
    torch.set_default_dtype(torch.float64)
    try:
        assert embedder(paths).dtype == torch.float32
        assert torch.allclose(embedder(paths), before, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_float64_run_is_computed_in_float64(tiny: Dataset, tmp_path: Path) -> None:
    run = trained(tiny, tmp_path, precision="64-true")
    embedder = pddm_ext.load(tmp_path)
    assert {parameter.dtype for parameter in embedder.module.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in embedder.unit.parameters()} == {torch.float64}
    stored = tiny.train.pictures[torch.arange(5)]
    run.learner.eval()
    feats = run.learner.net(tiny.view.plain(stored).double())
    assert torch.equal(embedder.embed(stored)[0], F.normalize(feats, dim=1).float())
    assert embedder.score(drawing(0), [drawing(0), drawing(1)]).dtype == torch.float32


def test_scores_are_the_units(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path)
    embedder = pddm_ext.load(tmp_path)
    a, b = [drawing(0), drawing(1)], [drawing(2), drawing(3)]
    expected = embedder.unit(embedder(a), embedder(b))
    assert torch.equal(embedder.score(a, b), expected)
    assert torch.allclose(embedder.score(a[0], b)[0], expected[0], atol=1e-6)
    assert torch.allclose(embedder.score(a, b[1])[1], expected[1], atol=1e-6)
    assert embedder.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="a is 2 pictures and b 3"):
        embedder.score(a, [*b, drawing(4)])


def test_without_a_unit_there_is_no_score(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path, method="contrastive")
    embedder = pddm_ext.load(tmp_path)
    assert embedder.unit is None
    assert not embedder.structured
    assert embedder.both(drawing())[1] is None
    with pytest.raises(ValueError, match="trained by contrastive, without a PDDM unit"):
        embedder.score(drawing(), drawing())


def test_the_digest_is_of_weights_and_view(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path / "one")
    trained(tiny, tmp_path / "other", steps=4)
    one, again, other = (pddm_ext.load(tmp_path / name).digest for name in ("one", "one", "other"))
    assert one == again != other
    state = checkpoint.load(tmp_path / "one" / CHECKPOINT)
    del state["format"]
    state["learner"] = {name: value + 1 if "unit" in name else value for name, value in state["learner"].items()}
    checkpoint.save(tmp_path / "unit.pt", state)
    assert pddm_ext.load(tmp_path / "unit.pt").digest == one  # features are the same


def test_the_best_step_is_taken_where_one_was_chosen(tiny: Dataset, tmp_path: Path) -> None:
    trained(tiny, tmp_path)
    thresholds = {"distance": {"0.01": 0.5, "0.001": 0.25, "eer": 0.75}, "score": {"0.01": 2.0}}
    changed(tmp_path, lambda state: state["best"].update({k: v * 2 for k, v in state["learner"].items()}))
    changed(tmp_path, lambda state: state["thresholds"].update(thresholds))
    embedder = pddm_ext.load(tmp_path)
    learner = checkpoint.load(tmp_path / CHECKPOINT)["learner"]
    assert torch.equal(embedder.module.net.head.weight, 2 * learner["net.head.weight"])
    assert embedder.threshold() == 0.5
    assert embedder.threshold("distance", "eer") == 0.75
    assert embedder.threshold("distance", 1e-3) == 0.25
    assert embedder.threshold("score", 0.01) == 2.0
    with pytest.raises(ValueError, match=r"apart by score at a rate of eer, or all alike; 0\.01 are there"):
        embedder.threshold("score", "eer")
    changed(tmp_path, lambda state: state["thresholds"].clear())
    with pytest.raises(ValueError, match="no threshold by score: a run chooses it on validation pictures, at its end"):
        pddm_ext.load(tmp_path).threshold("score")
    for wrong in (0.02, "0.01", True):
        with pytest.raises(ValueError, match=re.escape(f"fpr is {wrong!r}; 0.01, 0.001 and 'eer' are accepted")):
            embedder.threshold("distance", wrong)
    with pytest.raises(ValueError, match="by is 'structure'"):
        embedder.threshold("structure")


def changed(folder: Path, change: Any) -> None:
    """The folder's checkpoint with another state."""
    state = checkpoint.load(folder / CHECKPOINT)
    del state["format"]
    change(state)
    checkpoint.save(folder / CHECKPOINT, state)


DAMAGES: dict[str, tuple[Any, str]] = {
    "a setting that is none": (lambda state: state["settings"].update(step=5), "'step' is no setting"),
    "a setting out of range": (lambda state: state["settings"].update(steps=0), "--steps is 0"),
    "a huge length": (lambda state: state["settings"].update(dim=2**31 - 1), "features of length 2147483647"),
    "another length": (lambda state: state["settings"].update(dim=9), "features of length 9"),
    "another net": (lambda state: state["settings"].update(structure=1.0), "its weights do not fit"),
    "no weights": (lambda state: state["learner"].clear(), "no weights of a net"),
    "weights of another kind": (lambda state: state["learner"].update({"net.head.bias": [1.0]}), "no tensors by name"),
    "weights by number": (lambda state: state["learner"].update({3: torch.ones(1)}), "its weights are none"),
    "weights that diverged": (lambda state: state["learner"]["net.head.bias"].fill_(torch.nan), "not all finite"),
    "half a unit": (lambda state: state["learner"].pop("objective.unit.s.bias"), "its weights do not fit"),
    "no view": (lambda state: state["view"].clear(), "a view of the user's own"),
    "a view that is none": (lambda state: state["view"].update(kind="x"), "no description of a view"),
    "a view of another size": (lambda state: state["view"].update(size=3), "no description of a view"),
    "names that are none": (lambda state: state["names"].append(3), "not a checkpoint of format"),
    "thresholds that are none": (lambda state: state["thresholds"].update(distance=3), "its thresholds are none"),
    "no backbone": (lambda state: state["settings"].update(backbone="x"), "--backbone is 'x'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_in_a_line(tiny: Dataset, tmp_path: Path, damage: str) -> None:
    trained(tiny, tmp_path, steps=2)
    change, message = DAMAGES[damage]
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        pddm_ext.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / CHECKPOINT}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / CHECKPOINT))):
        pddm_ext.load(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint") as caught:
        pddm_ext.load(tmp_path)
    assert "\n" not in str(caught.value)


class Payload:
    """What would run if a checkpoint were unpickled freely."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("code of the file has run",))


def test_nothing_in_the_file_is_executed(tiny: Dataset, tmp_path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "payload": Payload()}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        pddm_ext.load(tmp_path)


def test_a_backbone_of_the_users(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_net.py").write_text("from runs import dropping as made\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = Run(Settings(**TINY, backbone="own_net:made"), tiny, tmp_path / "run", dropping())
    run.train(progress=False)
    with pytest.raises(ValueError, match=re.escape("its backbone is own_net:made, whose code would run; confirm")):
        pddm_ext.load(tmp_path / "run")
    with pytest.raises(ValueError, match=re.escape("its backbone is own_net:made; --backbone is other:made")):
        pddm_ext.load(tmp_path / "run", backbone="other:made")
    with pytest.raises(TypeError, match="backbone is int"):
        pddm_ext.load(tmp_path / "run", backbone=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="its weights do not fit its backbone or the one given"):
        pddm_ext.load(tmp_path / "run", backbone=nn.Flatten())
    stored = tiny.train.pictures[torch.arange(4)]
    for backbone in ("own_net:made", dropping()):
        embedder = pddm_ext.load(tmp_path / "run", backbone=backbone)
        run.learner.eval()
        expected = F.normalize(run.learner.net(tiny.view.plain(stored)), dim=1)
        assert torch.equal(embedder.embed(stored)[0], expected)


def test_published_weights_are_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create_model(name: str, pretrained: bool, num_classes: int) -> nn.Module:
        asked.append((name, pretrained, num_classes))
        return Colours()

    timm = ModuleType("timm")
    timm.create_model, timm.get_pretrained_cfg = create_model, lambda name: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    data = photo_folder(make_folder(tmp_path / "photos"), VIEW)
    settings = Settings(**TINY, data="folder", root=str(tmp_path / "photos"), backbone="timm/colours", pretrained=True)
    Run(settings, data, tmp_path / "run").train(progress=False)
    embedder = pddm_ext.load(tmp_path / "run")
    assert asked == [("colours", True, 0), ("colours", False, 0)]
    assert embedder.settings.pretrained
    assert embedder(tmp_path / "photos" / "a" / "0.png").shape == (1, 8)


def test_it_is_there_without_being_imported_with_the_package() -> None:
    assert "load" in dir(pddm_ext)
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        _ = pddm_ext.unload


def test_using_what_was_trained_loads_no_library_of_training(tmp_path: Path) -> None:
    """Which would take seconds, once for each command and each process that reads pictures."""
    libraries = "lightning_fabric", "pytorch_metric_learning", "torchmetrics", "sklearn", "scipy", "matplotlib"
    code = "import sys, pddm_ext.workbench.catalogue, pddm_ext.workbench.data.photos\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "pddm_ext.workbench.trained" in loaded
    assert loaded.isdisjoint(libraries)
