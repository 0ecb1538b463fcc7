"""Pictures in folders: which are taken, what they become, how they are distorted, and runs on them."""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor, nn

from pddm_ext.workbench.data import augment, files, photos, reading
from pddm_ext.workbench.data import load as by_name
from pddm_ext.workbench.data.splits import TestSet, batches
from pddm_ext.workbench.loop import Run
from pddm_ext.workbench.settings import Settings
from small_data import BLUE, GREEN, RED, Colour, colours, cub, encoded, load, make_folder, plain, scatter, zipped

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
            lambda root: (root.rmdir(), zipped(root, {"a/1.jpg": plain(RED)})),
            ValueError,
            ": a file, where --data folder takes a folder: unpack an archive first; expected ROOT/CLASS",
        ),
        (
            lambda root: None,
            ValueError,
            "number of classes to train on is 0, at least 2 are needed; expected ROOT/CLASS",
        ),
        (lambda root: make_folder(root, classes=3), ValueError, "number of classes to train on is 1, at least"),
        (lambda root: (make_folder(root) / "aa").mkdir(), ValueError, "/aa: a class without pictures; .*webp"),
        (lambda root: make_folder(root, side="train/"), ValueError, " has train/ but no test/; expected train/ with"),
        (lambda root: make_folder(root, side="test/"), ValueError, " has test/ but no train/"),
        (lambda root: make_folder(root, side="val/"), ValueError, " has val/ but no test/ and train/"),
        (
            lambda root: (make_folder(root, side="train/"), make_folder(root, side="query/")),
            ValueError,
            " has query/ and train/ but no gallery/",
        ),
        (
            lambda root: (make_folder(root, side="train/"), make_folder(root, side="gallery/")),
            ValueError,
            " has gallery/ and train/ but no query/",
        ),
        (
            lambda root: [make_folder(root, side=f"{side}/") for side in ("train", "test", "query", "gallery")],
            ValueError,
            " has gallery/, query/, test/ and train/; expected train/ with",
        ),
        (
            lambda root: (make_folder(root, 2, side="train/"), make_folder(root, 3, side="test/")),
            ValueError,
            ": 2 of the 3 classes in test/ are in train/, too, such as a, and 1 are not, such as c; .* into query/ .*"
            "gallery/",
        ),
        (
            lambda root: scatter(root, {f"{side}/1.jpg": plain(RED) for side in ("train", "test")}),
            ValueError,
            "number of classes to train on is 0",
        ),
        (
            lambda root: scatter(make_folder(root), {"i/more/1.png": plain(RED), "i/x.xyz": b"", "i/IMG_1": b""}),
            ValueError,
            r"/i: a class without pictures \(1 file without an extension, such as i/IMG_1; 1 folder in class folders, "
            r"such as i/more, with 1 picture; 1 file of the kind .xyz, such as i/x.xyz\)",
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


def test_every_kind_of_what_is_passed_over_is_counted_and_named(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=4)
    extra = (
        "a/more/1.jpg",
        "a/more/deep/2.PNG",
        "b/more/3.jpg",
        "c/IMG_1",
        "c/IMG_2",
        "d/x.xyz",
        "d/y.XYZ",
        "loose.jpg",
    )
    scatter(tmp_path, dict.fromkeys(extra, plain(RED)))
    (tmp_path / "d" / "broken.png").symlink_to("nowhere")
    dataset = photos.folder(tmp_path)
    assert len(dataset.train.labels) + len(dataset.test.labels) == 12
    assert set(dataset.notes) == {
        "passed over: 2 folders in class folders, such as a/more, with 3 pictures",
        "passed over: 2 files without an extension, such as c/IMG_1",
        "passed over: 2 files of the kind .xyz, such as d/x.xyz",
        "passed over: 1 broken link or special file, such as d/broken.png",
        "passed over: 1 picture outside class folders, such as loose.jpg",
    }


def test_what_stands_beside_the_sides_is_named(tmp_path: Path) -> None:
    for side in ("train", "test"):
        make_folder(tmp_path, 2, side=f"{side}/{side}")
    make_folder(tmp_path, 2, side="extra/")
    assert photos.folder(tmp_path).notes == ("passed over: 1 folder beside the sides, such as extra, with 6 pictures",)


@pytest.mark.parametrize("kind", [".heic", ".avif"])
def test_a_format_that_is_not_read_here_is_named_with_what_would_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(photos, "extensions", lambda: reading.EXTENSIONS)
    scatter(make_folder(tmp_path, classes=4), {f"a/1{kind}": b"", f"b/2{kind.upper()}": b""})
    reader = {".heic": "pillow-heif", ".avif": "a Pillow that reads AVIF"}[kind]
    assert photos.folder(tmp_path).notes == (
        f"passed over: 2 files of the kind {kind}, such as a/1{kind} ({reader} would read them)",
    )


# Protocols


def test_known_classes_are_searched_for_among_the_training_pictures(tmp_path: Path) -> None:
    make_folder(tmp_path, 4, side="train/")
    make_folder(tmp_path, 3, pictures=2, side="test/")
    make_folder(tmp_path, 4, pictures=1, side="val/")
    dataset = photos.folder(tmp_path)
    assert (dataset.protocol, dataset.gallery is dataset.train) == ("known", True)
    assert (dataset.test.names, len(dataset.test.labels)) == (("a", "b", "c"), 6)
    assert dataset.test.groups == ("a to c, all of them trained on, searched for among the training pictures",)
    assert dataset.val is not None
    assert len(dataset.val.labels) == 4
    selecting = dataset.selecting()
    assert selecting is not None
    assert selecting.gallery is dataset.train
    # As the test pictures are, so are the validation ones searched for among a gallery that has their classes.
    shelf = dataset.train.some(torch.tensor([0, 3, 6, 9]))
    for gallery, among in ((shelf, shelf), (dataset.test, dataset.train)):
        other = replace(dataset, gallery=gallery).selecting()
        assert other is not None
        assert other.gallery is among


@pytest.mark.parametrize(
    ("train", "protocol", "words"),
    [
        ("abcd", "known", ", all of them trained on"),
        ("cdef", "known", ", 2 of 4 of them trained on"),
        ("efgh", "unseen", ""),
    ],
)
def test_queries_and_a_gallery_may_have_any_classes(tmp_path: Path, train: str, protocol: str, words: str) -> None:
    for side, names in (("train", train), ("query", "abcd"), ("gallery", "abcdefgh")):
        scatter(tmp_path, {f"{side}/{name}/{p}.jpg": plain(RED, p) for name in names for p in range(3)})
    dataset = photos.folder(tmp_path)
    assert dataset.protocol == protocol
    assert dataset.gallery is not None
    assert ["".join(split.names) for split in (dataset.train, dataset.test, dataset.gallery)] == [
        train,
        "abcd",
        "abcdefgh",
    ]
    assert dataset.test.groups == (f"a to d{words}",)
    assert dataset.notes == ()
    test = TestSet(dataset, 0)
    assert (len(test.queries), len(test.gallery)) == (12, 24)  # type: ignore[arg-type]
    for row in range(len(test)):
        side = "query" if row < 12 else "gallery"
        assert test.file(row).startswith(f"{side}/{test.names[test.labels[row]]}/")  # type: ignore[union-attr]


def test_queries_that_the_gallery_lacks_are_said(tmp_path: Path) -> None:
    for side, names in (("train", "xyz"), ("query", "abc"), ("gallery", "ab")):
        scatter(tmp_path, {f"{side}/{name}/{p}.jpg": plain(RED, p) for name in names for p in range(3)})
    assert photos.folder(tmp_path).notes == (
        "1 of 3 classes in query/ are not in gallery/, such as c: for their 3 pictures there is nothing to be found",
    )
    for name in "ab":
        (tmp_path / "gallery" / name).rename(tmp_path / "gallery" / f"other {name}")
    with pytest.raises(
        ValueError, match="none of the 3 classes to search for, such as a, is among the 2 to search among"
    ):
        photos.folder(tmp_path)


def test_a_split_is_by_name_by_seed_or_none_and_says_which(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=8)
    made = {
        (split, seed): by_name.load(Settings(data="folder", root=str(tmp_path), split=split, seed=seed))
        for split in ("half", "random", "none")
        for seed in (0, 1)
    }
    assert made["half", 0].train.names == made["half", 1].train.names == tuple("abcd")
    assert made["half", 0].train.groups == ("a to d, the first half of the classes by name",)
    for seed in (0, 1):
        drawn = made["random", seed]
        assert (len(drawn.train.names), drawn.protocol) == (4, "unseen")
        assert sorted(drawn.train.names + drawn.test.names) == [*"abcdefgh"]
        assert drawn.test.groups[0].endswith(f", half of the classes, drawn by seed {seed}")
    assert made["random", 0].digest() != made["random", 1].digest()
    assert made["random", 0].digest() == photos.folder(tmp_path, split="random", seed=0).digest()
    everything = made["none", 0]
    assert (everything.protocol, everything.train.names, everything.test.names) == (
        "seen",
        (*"abcdefgh",),
        (*"abcdefgh",),
    )
    assert everything.train.digest == everything.test.digest
    assert everything.test.groups == ("a to h, the very pictures to train on: none are held out for a test",)


def test_where_all_classes_train_those_held_out_are_searched_for_among_them(tmp_path: Path) -> None:
    root = make_folder(tmp_path, 4, 6)
    dataset = photos.folder(root, split="none").hold_out(0)
    selecting = dataset.selecting()
    assert selecting is not None
    assert selecting.gallery is dataset.train
    assert (len(dataset.train.labels), len(selecting.test.labels)) == (20, 4)


def test_what_is_held_out_is_said_to_be_a_part(tmp_path: Path) -> None:
    dataset = photos.folder(make_folder(tmp_path, 16)).hold_out(0)
    assert dataset.train.groups == ("some of a to h, the first half of the classes by name",)
    assert dataset.val is not None
    assert dataset.val.groups == dataset.train.groups


def test_known_classes_are_searched_for_by_their_last_pictures(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=3, pictures=11)
    make_folder(tmp_path, classes=1, pictures=3, side="z")
    make_folder(tmp_path, classes=1, pictures=2, side="small-")
    dataset = photos.folder(tmp_path, split="known")
    assert dataset.protocol == "known"
    assert dataset.gallery is dataset.train
    assert dataset.train.names == ("a", "b", "c", "small-a", "za")
    assert dataset.test.names == ("a", "b", "c", "za")  # two pictures are trained on alone
    assert torch.bincount(dataset.train.labels).tolist() == [9, 9, 9, 2, 2]
    assert [dataset.test.pictures.paths[row] for row in range(7)] == [
        *(f"{name}/{place}.png" for name in "abc" for place in (8, 9)),
        "za/2.png",
    ]
    assert dataset.test.groups == ("a to za, the last fifth of them",)
    assert dataset.validation(0).gallery is not None


def test_known_classes_have_pictures(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=3, pictures=2)
    with pytest.raises(ValueError, match="number of classes to search among is 0, at least 2 are needed"):
        photos.folder(tmp_path, split="known")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: a class without pictures"):
        photos.folder(tmp_path, split="known")


@pytest.mark.parametrize("split", ["random", "none", "known"])
def test_a_split_of_what_has_sides_is_refused(tmp_path: Path, split: str) -> None:
    for side in ("train", "test"):
        make_folder(tmp_path, 2, side=f"{side}/{side}")
    with pytest.raises(
        ValueError, match=rf"^--split {split} is for a folder of class folders; .* in test/ and train/$"
    ):
        photos.folder(tmp_path, split=split)
    with pytest.raises(
        ValueError, match=rf"--split {split} is for --data folder(, \w+)*; in-shop has a split of its own"
    ):
        by_name.load(Settings(data="in-shop", root=str(tmp_path), split=split))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    scatter(tmp_path, {f"{name}/{p}.jpg": plain(RED, p) for name in ("bus", "car", "test", "train") for p in range(2)})
    assert photos.folder(tmp_path).test.names == ("test", "train")


# One half


def test_what_is_not_measured_need_not_be_whole(tmp_path: Path) -> None:
    for side in ("train", "test"):
        make_folder(tmp_path, 3, side=f"{side}/{side}")
    before = photos.folder(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="train/empty: a class without pictures"):
        photos.folder(tmp_path)
    measured = photos.folder(tmp_path, only="test")
    assert measured.test.digest == before.test.digest
    assert measured.protocol == "unseen"
    (tmp_path / "train" / "empty").rmdir()
    (tmp_path / "test" / "empty").mkdir()
    assert photos.folder(tmp_path, only="train").train.digest == before.train.digest
    with pytest.raises(ValueError, match="test/empty: a class without pictures"):
        photos.folder(tmp_path, only="test")


def test_to_measure_no_training_pictures_are_needed(tmp_path: Path) -> None:
    for side in ("query", "gallery"):
        make_folder(tmp_path, 3, side=f"{side}/")
    dataset = photos.folder(tmp_path, only="test")
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (0, 9)


def test_a_damaged_published_half_leaves_the_other_one(tmp_path: Path) -> None:
    members = cub()
    scatter(tmp_path, members)
    whole = load("cub200", tmp_path)
    lost = {name: next(path for path in members if name in path) for name in ("Auk", "Wren")}
    for gone, only, side in (("Auk", "test", "test"), ("Wren", "train", "train")):
        (tmp_path / lost[gone]).unlink()
        assert getattr(load("cub200", tmp_path, only=only), side).digest == getattr(whole, side).digest
        other = "train" if only == "test" else "test"
        with pytest.raises(FileNotFoundError, match=f"3 of 4 pictures found; .* {lost[gone]}"):
            load("cub200", tmp_path, only=other)
        scatter(tmp_path, {lost[gone]: members[lost[gone]]})


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


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    # Of one size whatever is in it: small, and of some megabytes.
    bitmaps = {side: Image.new("RGB", (side, side), RED) for side in (40, 1000)}
    root = scatter(make_folder(tmp_path, classes=4), {f"a/{s}.bmp": encoded(b, "BMP") for s, b in bitmaps.items()})
    jpeg = encoded(Image.effect_noise((2000, 2000), 90).convert("RGB"), quality=95)
    assert len(jpeg) > 2**20
    scatter(root, {"a/large.jpg": jpeg})
    digests = [photos.folder(root).digest(), photos.folder(root).digest()]
    assert digests[0] == digests[1]
    for side, bitmap in bitmaps.items():
        before = (root / f"a/{side}.bmp").read_bytes()
        bitmap.putpixel((side // 2, side // 2), GREEN)
        scatter(root, {f"a/{side}.bmp": encoded(bitmap, "BMP")})
        assert len(before) == len(encoded(bitmap, "BMP"))
        digests.append(photos.folder(root).digest())
    for content in (jpeg[:-2000] + bytes(2000), jpeg[:2000] + bytes(2000) + jpeg[4000:]):
        scatter(root, {"a/large.jpg": content})
        digests.append(photos.folder(root).digest())
    assert len(set(digests)) == 5
    (root / "a/large.jpg").touch()  # a copy has another time
    assert photos.folder(root).digest() == digests[-1]


@pytest.mark.parametrize("kind", ["BMP", "PNG"])
def test_a_file_is_stamped_alike_in_an_archive_and_unpacked(tmp_path: Path, kind: str) -> None:
    large = encoded(Image.effect_noise((1400, 1400), 90), kind)
    assert len(large) > 2**20
    members = {"one/large": large, "one/small": plain(RED), "one/empty": b""}
    packed = files.Archive(zipped(tmp_path / "1.zip", members), "one/")
    folder = scatter(tmp_path, members) / "one"
    stamps = [[files.stamp(place, name) for name in ("large", "small", "empty", "no")] for place in (packed, folder)]
    assert stamps[0] == stamps[1]
    assert stamps[0][2:] == ["0 00000000"] * 2


def test_of_the_half_that_does_not_matter_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = photos.folder(make_folder(tmp_path))
    read: list[str] = []
    stamp = files.stamp
    monkeypatch.setattr(files, "stamp", lambda folder, name: (read.append(name), stamp(folder, name))[1])
    measured = photos.folder(tmp_path, only="test")
    assert measured.test.digest == whole.test.digest
    assert {path[0] for path in read} == {*"efgh"}


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
        # What is transparent is white, in any part.
        ("RGBA", (*RED, 0), "PNG", (255, 255, 255)),
        ("RGBA", (*RED, 51), "TIFF", (255, 204, 204)),
        ("RGBA", (*RED, 51), "PNG", (255, 204, 204)),
        ("LA", (100, 0), "PNG", (255, 255, 255)),
        ("LA", (0, 51), "PNG", (204, 204, 204)),
        # 16 bits become 8.
        ("I;16", 0, "PNG", (0, 0, 0)),
        ("I;16", 40000, "PNG", (156, 156, 156)),
        ("I;16", 65535, "PNG", (255, 255, 255)),
        ("I;16", 40000, "TIFF", (156, 156, 156)),
        ("I;16B", 40000, "TIFF", (156, 156, 156)),
        ("I", 40000, "PPM", (156, 156, 156)),
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


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_is_white(tmp_path: Path, kind: str) -> None:
    picture = Image.new("P", (300, 300), 3)
    picture.putpalette([*(9, 9, 9), *RED, *GREEN, *BLUE])
    picture.paste(1, (0, 0, 300, 150))
    photo = shown(tmp_path / "picture", encoded(picture, kind, transparency=3))
    assert photo[:, 20, 128].tolist() == [*RED]
    assert photo[:, 236, 128].tolist() == [255, 255, 255]


def test_a_transparent_colour_without_a_palette_is_white(tmp_path: Path) -> None:
    assert (shown(tmp_path / "one", encoded(Image.new("RGB", (300, 300), RED), "PNG", transparency=RED)) == 255).all()
    assert (shown(tmp_path / "two", encoded(Image.new("L", (300, 300), 7), "PNG", transparency=7)) == 255).all()


@pytest.mark.parametrize("value", [200, 40000])
def test_pixels_without_a_known_range_are_refused(tmp_path: Path, value: int) -> None:
    for mode in ("I", "F"):
        told = rf"picture \(its pixels are of Pillow's mode {mode}, not of 8 or 16 bits a channel\)"
        with pytest.raises(ValueError, match=told):
            shown(tmp_path / "picture", encoded(Image.new(mode, (300, 280), value), "TIFF"))
    with pytest.raises(ValueError, match="mode I, not of 8 or 16 bits"):
        reading.pictured(Image.new("I", (300, 280), value), augment.PHOTOS)
    with Image.open(io.BytesIO(encoded(Image.new("I;16", (300, 280), value), "PNG"))) as picture:
        as_before = picture.convert("I")  # what Pillow opened it as until 11.3
        as_before.format = "PNG"
        assert torch.equal(reading.pictured(as_before, augment.PHOTOS), reading.pictured(picture, augment.PHOTOS))


def test_a_transparent_colour_of_16_bits_is_white(tmp_path: Path) -> None:
    grey = np.full((300, 300), 70, np.uint8)
    grey[150:] = 20
    twin = shown(tmp_path / "8", encoded(Image.fromarray(grey), "PNG", transparency=70))
    assert (twin[:, 20] == 255).all()
    assert (twin[:, 236] == 20).all()
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert torch.equal(shown(tmp_path / "16", encoded(wide, "PNG", transparency=70 * 257)), twin)
    assert (shown(tmp_path / "near", encoded(wide, "PNG", transparency=70 * 257 + 1))[:, 20] == 70).all()


def test_pictures_in_memory_are_prepared_as_those_in_files(tmp_path: Path) -> None:
    half = Image.new("RGBA", (300, 280), (*RED, 51))
    premultiplied = Image.new("La", (300, 280), (0, 51))
    for picture, colour in ((half, [255, 204, 204]), (premultiplied, [204, 204, 204])):
        assert reading.pictured(picture, augment.PHOTOS)[:, 9, 9].tolist() == colour
    pixels = torch.from_numpy(np.array(half)).permute(2, 0, 1)
    assert reading.pictured(pixels, augment.PHOTOS)[:, 9, 9].tolist() == [255, 204, 204]


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_newer_formats_are_read_where_they_can_be(tmp_path: Path, kind: str) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    if kind not in reading.formats():
        pytest.skip(f"this Pillow has no {kind}")
    name = {"AVIF": "1.avif", "HEIF": "1.HEIC"}[kind]
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (512, 512), BLUE)
    picture.paste(RED, (0, 0, 256, 512))
    content = encoded(picture, kind, exif=exif)
    photo = shown(tmp_path / "picture", content).int()
    # Its left is up. HEIC is turned by a property of its own, not by EXIF's.
    red = photo[:, 20, 128] if kind == "AVIF" else photo[:, 128, 20]
    assert (red - torch.tensor(RED)).abs().max() < 20
    scatter(make_folder(tmp_path / "root", classes=4), {f"a/{name}": content})
    dataset = photos.folder(tmp_path / "root")
    assert (len(dataset.train.labels), dataset.notes) == (7, ())
    (tmp_path / "picture").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="picture: not a readable picture"):
        reading.read(tmp_path / "picture", augment.PHOTOS)


def test_jfif_is_jpeg_by_another_name(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=4)
    for path in tmp_path.rglob("*.png"):
        path.rename(path.with_suffix(".JFIF"))
    assert len(photos.folder(tmp_path).train.labels) == 6


def test_a_large_jpeg_is_decoded_near_the_size_needed_and_hardly_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    shapes = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((4000, 3000), Image.BICUBIC)
    grain = random.normal(0, 12, (3000, 4000, 1))
    picture = Image.fromarray((np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture, "JPEG", quality=90, exif=exif)
    sizes: list[tuple[int, int]] = []
    transpose = ImageOps.exif_transpose

    def seen(image: Image.Image) -> Image.Image:
        sizes.append(image.size)
        return transpose(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", seen)
    near = shown(tmp_path / "near", content)
    monkeypatch.setattr(JpegImageFile, "draft", lambda self, mode, size: None)
    full = shown(tmp_path / "full", content)
    assert sizes == [(1000, 750), (4000, 3000)]
    apart = (near.int() - full.int()).abs().float()
    assert apart.mean() < 1
    assert apart.max() <= 8


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


def bomb() -> bytes:
    """A PNG that says it has 20,000 × 20,000 pixels."""
    head = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize("damage", ["truncated", "text", "postscript", "32 bits", "floats", "bomb", "empty", "gone"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    dataset = photos.folder(make_folder(tmp_path, classes=4))
    path = tmp_path / "d" / "1.png"
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "PNG")
    content = {
        "truncated": whole[: len(whole) // 2],
        "text": b"<html>Not found</html>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "32 bits": encoded(Image.fromarray(np.full((9, 9), 70000, np.int32)), "TIFF"),
        "floats": encoded(Image.new("F", (9, 9), 0.5), "TIFF"),
        "bomb": bomb(),
        "empty": b"",
        "gone": b"",
    }[damage]
    path.write_bytes(content)
    if damage == "gone":
        path.unlink()
    row = (dataset.test.labels == 1).nonzero().flatten()[1:2]
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}: not a readable picture \([^\n]+\); expected ROOT/CLASS[^\n]+$"
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
    for (pictures, labels, rows), (others, same, places) in zip(*drawn, strict=True):
        assert pictures.shape == (6, 3, 256, 256)
        assert torch.equal(pictures, others)
        assert torch.equal(labels, same)
        assert torch.equal(rows, places)
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
    assert run.curves["step"] == [0, 1, 2]
    assert np.isfinite(np.array(run.curves["loss"][1:], float)).all()
    assert run.curves["recall"] == [1, 1, 1]  # each class is a colour


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
