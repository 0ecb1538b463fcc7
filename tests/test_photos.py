"""Pictures in folders: which are taken, what they become, how they are distorted, and runs on them."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pddm_ext.workbench.data import augment, photos
from pddm_ext.workbench.data import load as by_name
from pddm_ext.workbench.data.splits import batches
from pddm_ext.workbench.loop import Run
from pddm_ext.workbench.settings import Settings
from small_data import BLUE, GREEN, RED, Colour, colours, cub, encoded, load, make_folder, plain, scatter

# Folders


def test_the_first_half_of_a_folder_trains(tmp_path: Path) -> None:
    dataset = photos.folder(make_folder(tmp_path, classes=5, pictures=2))
    assert (dataset.name, dataset.view) == ("folder", augment.PHOTOS)
    assert (dataset.train.names, dataset.test.names) == (("a", "b"), ("c", "d", "e"))
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not dataset.distort_test
    assert colours(dataset.train)[2:] == [("b", RED)] * 2


def test_train_and_test_folders_are_kept(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=2, side="train/z")
    make_folder(tmp_path, classes=3, side="test/")
    dataset = photos.folder(tmp_path)
    assert (dataset.train.names, dataset.test.names) == (("za", "zb"), ("a", "b", "c"))
    assert [name for name, _ in colours(dataset.test)] == [*"aaabbbccc"]


def test_what_is_no_picture_is_passed_over(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=4)
    before = photos.folder(tmp_path)
    scatter(tmp_path, {"README.txt": b"", "a/Thumbs.db": b"", "b/._0.png": b"", ".cache/x.png": b"", "c/x.eps": b""})
    assert photos.folder(tmp_path).digest() == before.digest()
    scatter(tmp_path, {"a/LAST.JPEG": plain(BLUE)})
    assert len(photos.folder(tmp_path).train.labels) == len(before.train.labels) + 1


@pytest.mark.parametrize(
    ("build", "error", "told"),
    [
        (lambda root: root.rmdir(), FileNotFoundError, "no such folder; expected ROOT/CLASS"),
        (
            lambda root: None,
            ValueError,
            "number of classes to train on is 0, at least 2 are needed; expected ROOT/CLASS",
        ),
        (lambda root: make_folder(root, classes=3), ValueError, "number of classes to train on is 1, at least"),
        (lambda root: (make_folder(root) / "aa").mkdir(), ValueError, "/aa: a class without pictures; .*webp"),
        (lambda root: make_folder(root, side="train/"), ValueError, "/train: a class without pictures"),
        (
            lambda root: (make_folder(root, 2, side="train/"), make_folder(root, 3, side="test/")),
            ValueError,
            "2 classes are in train and in test, such as a;",
        ),
        (
            lambda root: scatter(make_folder(root), {"c/1.png": b""}),
            FileNotFoundError,
            "23 of 24 pictures found; the first that is missing or empty is c/1.png",
        ),
    ],
)
def test_bad_folders_are_named(
    tmp_path: Path, build: Callable[[Path], object], error: type[Exception], told: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    build(root)
    with pytest.raises(error, match=rf"^{re.escape(str(root))}.*{told}"):
        photos.folder(root)


def test_the_digest_tells_pictures_apart_without_decoding(tmp_path: Path) -> None:
    scatter(tmp_path, {f"{c}/{p}.jpg": f"{c}{p}".encode() for c in "abcd" for p in range(2)})
    digests = [photos.folder(tmp_path).digest() for _ in range(2)]
    assert digests[0] == digests[1]
    for change in (
        lambda: (tmp_path / "a/0.jpg").write_bytes(b"longer"),
        lambda: (tmp_path / "a/1.jpg").rename(tmp_path / "a/2.jpg"),
        lambda: (tmp_path / "c/1.jpg").rename(tmp_path / "d/2.jpg"),
    ):
        change()
        digests.append(photos.folder(tmp_path).digest())
    assert len(set(digests)) == 4


# Pictures


def shown(path: Path, content: bytes) -> Tensor:
    path.write_bytes(content)
    return photos.Photos(path.parent, (path.name,), "expected nothing")[torch.tensor([0])][0]


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("RGB", RED, "PNG", RED),
        ("RGBA", (*RED, 255), "PNG", RED),
        ("L", 100, "PNG", (100, 100, 100)),
        ("LA", (100, 255), "PNG", (100, 100, 100)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("P", 7, "PNG", (7, 14, 21)),
        ("P", 7, "GIF", (7, 14, 21)),
        ("CMYK", (0, 255, 255, 0), "JPEG", (254, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "TIFF", RED),
        ("L", 100, "JPEG", (100, 100, 100)),
        ("RGB", BLUE, "BMP", BLUE),
        ("RGB", BLUE, "PPM", BLUE),
    ],
)
def test_every_mode_becomes_red_green_and_blue(
    tmp_path: Path, mode: str, colour: Any, kind: str, expected: Colour
) -> None:
    picture = Image.new(mode, (300, 280), colour)
    if mode == "P":
        picture.putpalette([value for place in range(256) for value in (place, place * 2 % 256, place * 3 % 256)])
    photo = shown(tmp_path / "picture", encoded(picture, kind))
    assert (photo.int() - torch.tensor(expected)[:, None, None]).abs().max() <= 1


@pytest.mark.parametrize(("orientation", "side"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
def test_pictures_stand_upright(tmp_path: Path, orientation: int, side: str) -> None:
    picture = Image.new("RGB", (512, 512), BLUE)
    picture.paste(RED, (0, 0, 256, 512))  # the stored left half
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = shown(tmp_path / "picture.png", encoded(picture, "PNG", exif=exif))
    half = {"left": photo[:, :, :120], "right": photo[:, :, 136:], "top": photo[:, :120], "bottom": photo[:, 136:]}
    assert {name for name, part in half.items() if (part[0] == 255).all() and (part[2] == 0).all()} == {side}


@pytest.mark.parametrize("size", [(600, 300), (300, 600), (64, 32), (8, 4000), (256, 256)])
def test_the_middle_square_is_kept(tmp_path: Path, size: tuple[int, int]) -> None:
    picture, short = Image.new("RGB", size, RED), min(size)
    left, top = (size[0] - short) // 2, (size[1] - short) // 2
    picture.paste(GREEN, (left, top, left + short, top + short))
    photo = shown(tmp_path / "picture", encoded(picture, "PNG"))
    edge = 2 * 256 // short + 1  # where bicubic weights reach over the edge of the square
    inside = photo[:, edge:-edge, edge:-edge].flatten(1)
    assert inside.amin(1).tolist() == inside.amax(1).tolist() == [0, 255, 0]


def test_resizing_is_bicubic_on_the_shorter_side(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 768, 3), dtype=np.uint8))
    photo = shown(tmp_path / "picture", encoded(picture, "PNG"))
    scaled = np.asarray(picture.resize((384, 256), Image.Resampling.BICUBIC))[:, 64 : 64 + 256]
    assert np.abs(photo.permute(1, 2, 0).numpy().astype(int) - scaled).max() <= 1


@pytest.mark.parametrize("damage", ["truncated", "text", "postscript", "16 bits", "gone"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    dataset = photos.folder(make_folder(tmp_path, classes=4))
    path = tmp_path / "d" / "1.png"
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "PNG")
    content = {
        "truncated": whole[: len(whole) // 2],
        "text": b"<html>Not found</html>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "16 bits": encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
        "gone": b"",
    }[damage]
    path.write_bytes(content)
    if damage == "gone":
        path.unlink()
    row = (dataset.test.labels == 1).nonzero().flatten()[1:2]
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}: not a readable picture \(.*\); expected ROOT/CLASS"
    ):
        dataset.test.pictures[row]
    assert dataset.test.pictures[row - 1].shape == (1, 3, 256, 256)
    if damage == "postscript":  # not even handed to an interpreter
        with pytest.raises(ValueError, match="cannot identify image file"):
            dataset.test.pictures[row]


def test_a_damaged_published_picture_says_where_it_comes_from(tmp_path: Path) -> None:
    members = cub()
    lost = next(path for path in members if "Wren" in path)
    dataset = load("cub200", scatter(tmp_path, members | {lost: members[lost][:300]}))
    with pytest.raises(ValueError, match=rf"^{tmp_path / lost}: not a readable picture .*CUB_200_2011.tgz of https://"):
        dataset.test.pictures[torch.arange(4)]


def test_worker_processes_read_the_same_pictures(tmp_path: Path) -> None:
    split = photos.folder(make_folder(tmp_path)).train
    drawn = [list(batches(split, 3, 2, 4, seed=5, workers=workers)) for workers in (0, 2)]
    assert len(drawn[0]) == len(drawn[1]) == 4
    for (pictures, labels), (others, same) in zip(*drawn, strict=True):
        assert pictures.shape == (6, 3, 256, 256)
        assert torch.equal(pictures, others)
        assert torch.equal(labels, same)
    again = pickle.loads(pickle.dumps(split.pictures))
    rows = torch.tensor([7, 0, 7])
    assert torch.equal(again[rows], split.pictures[rows])
    assert split.pictures[rows[:0]].shape == (0, 3, 256, 256)


# What a net sees


def test_distorted_photos_keep_colours_and_follow_their_generator() -> None:
    flat = torch.tensor([[200, 10, 90], [0, 255, 128]], dtype=torch.uint8)[:, :, None, None].expand(2, 3, 256, 256)
    generator = torch.Generator().manual_seed(0)
    seen = augment.PHOTOS.augment(flat, generator)
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, augment.PHOTOS.plain(flat))
    torch.testing.assert_close(augment.PHOTOS.show(seen) * 255, flat[:, :, :224, :224].float())
    noise = torch.randint(0, 256, (6, 3, 256, 256), dtype=torch.uint8)
    first, second = (augment.PHOTOS.augment(noise, generator) for _ in range(2))
    assert not torch.equal(first, second)
    again = torch.Generator().manual_seed(0)
    augment.PHOTOS.augment(flat, again)
    assert torch.equal(augment.PHOTOS.augment(noise, again), first)
    # Nothing lies outside the range of a picture, which showing it would cut off.
    torch.testing.assert_close(augment.PHOTOS._standard(augment.PHOTOS.show(first), 1), first, atol=1e-5, rtol=0)


def test_half_of_the_photos_are_mirrored_and_crops_keep_a_sixth() -> None:
    # Red grows to the right, green downwards: a crop's corners say where it was taken.
    ramp = torch.arange(256, dtype=torch.uint8)
    photo = torch.stack([ramp.expand(256, 256), ramp[:, None].expand(256, 256), torch.zeros(256, 256).byte()])
    seen = augment.PHOTOS.show(augment.PHOTOS.augment(photo.expand(64, 3, 256, 256), torch.Generator().manual_seed(1)))
    width, height = seen[:, 0, 112, -1] - seen[:, 0, 112, 0], seen[:, 1, -1, 112] - seen[:, 1, 0, 112]
    assert 20 <= (width < 0).sum() <= 44
    assert (height > 0).all()
    area = width.abs() * height
    assert area.min() > 0.14
    assert area.min() < 0.3
    assert area.max() > 0.8
    ratio = width.abs() / height
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_largest_crop_is_the_whole_photo(monkeypatch: pytest.MonkeyPatch, mirrored: bool) -> None:
    noise = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    drawn = torch.tensor([1.0, 0.5, 0.3, 0.9, 0.0 if mirrored else 1.0])[:, None].expand(5, 2)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: drawn)
    seen = augment.PHOTOS.show(augment.PHOTOS.augment(noise, torch.Generator()))
    whole = F.interpolate(noise.float() / 255, (224, 224), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen, whole.flip(3) if mirrored else whole, atol=1e-4, rtol=0)


# Runs


TINY = {"data": "folder", "classes": 3, "samples": 2, "steps": 2, "every": 1, "dim": 8, "accelerator": "cpu"}


class Means(nn.Sequential):
    """Mean colours of 2 x 2 places."""

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(2), nn.Flatten())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_a_folder(tmp_path: Path, workers: int) -> None:
    settings = Settings(**TINY, root=str(make_folder(tmp_path)), workers=workers)
    run = Run(settings, by_name.load(settings), backbone=Means())
    run.train(progress=False)
    assert run.taken == 2
    assert run.curves["step"] == [1, 2]
    assert np.isfinite(run.curves["loss"]).all()
    assert run.curves["recall"] == [1, 1]  # each class is a colour


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_backbone_whose_package_is_missing_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for module in (package, f"{package}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    scatter(tmp_path, {f"{c}/{p}.jpg": b"no picture" for c in "abcdefgh" for p in range(3)})
    settings = Settings(**TINY, root=str(tmp_path), backbone=f"{package}/resnet18")
    with pytest.raises(ModuleNotFoundError, match=package):
        Run(settings, by_name.load(settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()
