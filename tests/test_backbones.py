"""Backbones: of one's own, by name, and those that do not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pddm_ext.workbench import cli, compare, outcome
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.loop import CHECKPOINT, Run
from pddm_ext.workbench.model import embedder
from pddm_ext.workbench.settings import Settings
from runs import TINY, TINY_OPTIONS, dropping, looked, trained
from small_data import make_folder

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_backbone_of_ones_own_is_trained_and_measured_in_evaluation_mode(tiny: Dataset) -> None:
    backbone = dropping()
    before = [parameter.clone() for parameter in backbone.parameters()]
    run = trained(tiny, backbone=backbone)
    for one, parameter in zip(before, backbone.parameters(), strict=True):
        assert not torch.equal(one, parameter)
    assert torch.equal(looked(run.learner.net, run.test).features, looked(run.learner.net, run.test).features)
    assert run.learner.net.training


class Quadratic(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures[:, 0]


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Quadratic(), r"gives \(1, 32, 32\) torch.float32 for one picture; floating features \(1, f\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), r"does not take pictures of shape \(1, 32, 32\)"),
    ],
)
def test_a_backbone_that_does_not_fit_is_told(tiny: Dataset, backbone: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(Settings(**TINY), tiny, backbone=backbone)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "convnet, efficientnet-lite0, timm/NAME, torchvision/NAME and MODULE:CALLABLE are accepted"),
        ("timm/", "convnet, efficientnet-lite0, timm/NAME, torchvision/NAME and MODULE:CALLABLE are accepted"),
        ("collections:NoSuchThing", "--backbone collections:NoSuchThing: .*NoSuchThing"),
        ("collections:OrderedDict", "gives OrderedDict; a torch.nn.Module is accepted"),
    ],
)
def test_bad_backbone_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedder(Settings(backbone=name), (1, 32, 32))


_RAISING = """
import sys
from torch import nn

class Raises(nn.Module):
    def forward(self, pictures):
        return {}["x"]

class Integers(nn.Module):
    def forward(self, pictures):
        return pictures.flatten(1).long()

def made():
    return {}["x"]

def exits():
    sys.exit(3)

def lines():
    raise RuntimeError("one\\n  two")

def nothing():
    raise NotImplementedError
"""


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("made", "KeyError: 'x'"),
        ("Raises", "KeyError: 'x'; it does not take pictures of shape (1, 32, 32)"),
        ("exits", "SystemExit: 3"),
        ("lines", "RuntimeError: one two"),
        ("nothing", "NotImplementedError"),
        ("absent", "AttributeError: module 'raising_for_a_test' has no attribute 'absent'"),
        ("Integers", "gives (1, 1024) torch.int64 for one picture; floating features (1, f) are accepted"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_whatever_a_backbone_raises_is_named_with_it(
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    attribute: str,
    message: str,
) -> None:
    (tmp_path / "raising_for_a_test.py").write_text(_RAISING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(compare, "_each", lambda cells, *_: (compare.run_cell(cell, 1) or cell for cell in cells))
    compare._loaded.cache_clear()
    name = f"raising_for_a_test:{attribute}"
    assert cli.main([command, *TINY_OPTIONS, "--backbone", name, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.replace(f"{name}: ", f"{name} ").startswith(f"pddm-ext: error: --backbone {name} {message}")
    compare._loaded.cache_clear()


def test_a_backbone_that_is_handed_over_and_raises_is_named_too(tiny: Dataset) -> None:
    class Raises(nn.Module):
        def forward(self, pictures: Tensor) -> Tensor:
            raise KeyError("x")

    with pytest.raises(ValueError, match=r"^the backbone: KeyError: 'x'; it does not take pictures of shape"):
        Run(Settings(**TINY), tiny, backbone=Raises())


@pytest.fixture
def module_of_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``mine:net``, whose import leaves a mark."""
    mark = tmp_path / "imported"
    (tmp_path / "mine_for_a_test.py").write_text(
        f"from pathlib import Path\nfrom torch import nn\nPath({str(mark)!r}).touch()\n"
        "def net():\n    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 16), nn.ReLU())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_for_a_test", raising=False)
    return mark


def test_eval_runs_a_backbones_code_only_when_confirmed(
    tiny: Dataset, tmp_path: Path, module_of_mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, path = "mine_for_a_test:net", str(tmp_path / "run" / CHECKPOINT)
    assert cli.main(["train", *TINY_OPTIONS, "--backbone", name, "--out", str(tmp_path / "run")]) == 0
    del sys.modules["mine_for_a_test"]
    module_of_mine.unlink()
    for unconfirmed in ([], ["--backbone", "mine_for_a_test:other"]):
        assert cli.main(["eval", path, *unconfirmed]) == 2
        assert f"confirm with --backbone {name}" in capsys.readouterr().err
        assert not module_of_mine.exists()
    assert cli.main(["eval", path, "--backbone", name, "--json", str(tmp_path / "again.json")]) == 0
    assert module_of_mine.exists()
    assert json.loads((tmp_path / "again.json").read_text()) == outcome.read(tmp_path / "run")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_backbone_library_that_is_missing_is_named(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], library: str
) -> None:
    for module in (library, f"{library}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    options = ["train", *TINY_OPTIONS, "--backbone", f"{library}/resnet18", "--out", str(tmp_path / "out")]
    assert cli.main(options) == 2
    error = capsys.readouterr().err
    assert f"this needs {library}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


_IMPORTS = {
    "import not_there": "ModuleNotFoundError: No module named 'not_there' ({0}, line 2)",
    "from math import no_such_name": "ImportError: cannot import name 'no_such_name' from 'math' ",
    "import helper_of_mine": "ModuleNotFoundError: No module named 'nor_this_one' ({1}, line 1)",
    "1 / 0": "ZeroDivisionError: division by zero ({0}, line 2)",
}


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("line", _IMPORTS)
def test_an_error_in_ones_own_module_shows_it_with_its_line(
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    line: str,
) -> None:
    """And not how to install what training needs."""
    files = [tmp_path / "importing_for_a_test.py", tmp_path / "helper_of_mine.py"]
    files[0].write_text(f"from torch import nn\n{line}\nnet = nn.Flatten\n")
    files[1].write_text("import nor_this_one\n")
    monkeypatch.syspath_prepend(tmp_path)
    compare._loaded.cache_clear()
    name, out = "importing_for_a_test:net", tmp_path / "out"
    assert cli.main([command, *TINY_OPTIONS, "--backbone", name, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pddm-ext: error: --backbone {name}: {_IMPORTS[line].format(*files)}")
    assert error.count("\n") == 1
    assert "install" not in error
    assert not list(tmp_path.rglob("config.json"))
    assert cli.main([command, *TINY_OPTIONS, "--backbone", "no_such_module_of_mine:net", "--out", str(out)]) == 2
    assert "no_such_module_of_mine:net: ModuleNotFoundError: No module named 'no_such" in capsys.readouterr().err


def test_a_side_that_is_asked_for_reaches_the_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training, in evaluation and in each method of a comparison."""
    (tmp_path / "sides_for_a_test.py").write_text(
        "from torch import nn\n\nseen = []\n\nclass Net(nn.Module):\n    def forward(self, pictures):\n"
        "        seen.append(pictures.shape[1:])\n        return pictures[:, :, ::8, ::8].mean(1).flatten(1)[:, :16]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(compare, "_each", lambda cells, *_: (compare.run_cell(cell, 1) or cell for cell in cells))
    compare._loaded.cache_clear()
    root, name = make_folder(tmp_path / "photos", classes=8, pictures=4), "sides_for_a_test:Net"
    data = ["--data", "folder", "--root", str(root), "--backbone", name, "--steps", "2", "--picture", "48"]
    out = tmp_path / "out"
    assert cli.main(["train", *TINY_OPTIONS, *data, "--method", "contrastive", "--out", str(out)]) == 0
    seen = sys.modules["sides_for_a_test"].seen
    assert set(seen) == {(3, 48, 48)}
    seen.clear()
    assert cli.main(["eval", str(out / CHECKPOINT), "--backbone", name]) == 0
    assert set(seen) == {(3, 48, 48)}
    seen.clear()
    methods = [
        "--methods",
        "euclidean-anchor",
        "euclidean-pair:picture=40",
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "grid"),
    ]
    assert cli.main(["compare", *TINY_OPTIONS, *data, *methods]) == 0
    assert set(seen) == {(3, 48, 48), (3, 40, 40)}
    compare._loaded.cache_clear()
