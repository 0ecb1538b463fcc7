"""The data sets: what is read, how it is split, and what is never taken for data."""

from __future__ import annotations

import http.client
import io
import pickle
import re
import sys
import tarfile
import urllib.error
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pddm_ext.workbench.data import augment, glyphs, omniglot, photos, published
from pddm_ext.workbench.data import load as by_name
from pddm_ext.workbench.data.splits import Dataset, Split, batches
from pddm_ext.workbench.loop import Run
from pddm_ext.workbench.settings import Settings

OMNIGLOT = Path(__file__).parents[2] / "shared" / "data" / "omniglot" / "images_background_small1.zip"

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
Colour = tuple[int, int, int]
Members = dict[str, bytes]
"""The files of an archive."""


def encoded(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(colour: Colour, place: int = 0) -> bytes:
    """A picture of one colour, of another size for each place."""
    return encoded(Image.new("RGB", (30 + 10 * place, 40), colour))


def scatter(root: Path, members: Members) -> Path:
    for name, content in members.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tgz(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def zipped(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def cub() -> Members:
    members, images, labels = {"attributes.txt": b"1 has_bill_shape::curved\n"}, "", ""
    classes = {1: ("001.Auk", RED), 100: ("100.Pelican", GREEN), 101: ("101.Wren", BLUE), 200: ("200.Jay", YELLOW)}
    for label, (name, colour) in classes.items():
        for place in range(2):
            number = len(members)
            members[f"CUB_200_2011/images/{name}/{name[4:]}_000{place}_{number}.jpg"] = plain(colour, place)
            images += f"{number} {name}/{name[4:]}_000{place}_{number}.jpg\n"
            labels += f"{number} {label}\n"
    return members | {
        "CUB_200_2011/images.txt": images.encode(),
        "CUB_200_2011/image_class_labels.txt": labels.encode(),
    }


def cars() -> Members:
    names = [f"Make Model {label}" for label in range(1, 197)]
    names[98] = "Ram C/V Cargo Van 2012"
    classes = {1: ("Make Model 1", RED), 98: ("Make Model 98", GREEN)}
    classes |= {99: ("Ram C-V Cargo Van 2012", BLUE), 196: ("Make Model 196", YELLOW)}
    members = {"names.csv": "\n".join(names).encode()}
    # The folders' own split has all classes on both sides.
    for place, side in enumerate(("train", "test")):
        rows = ""
        for label, (name, colour) in classes.items():
            members[f"car_data/car_data/{side}/{name}/{label:05}.jpg"] = plain(colour, place)
            rows += f"{label:05}.jpg,1,2,3,4,{label}\n"
        members[f"anno_{side}.csv"] = rows.encode()
    return members


def sop() -> Members:
    members: Members = {"__MACOSX/._Ebay_train.txt": b"\0"}
    number = 0
    for side, classes in {
        "train": {1: ("bicycle", 1110, RED), 2: ("sofa", 1111, GREEN)},
        "test": {11319: ("bicycle", 2220, BLUE), 11320: ("sofa", 2221, YELLOW)},
    }.items():
        rows = "image_id class_id super_class_id path\n"
        for label, (kind, product, colour) in classes.items():
            for place in range(2):
                number += 1
                path = f"{kind}_final/{product}_{place}.JPG"
                rows += f"{number} {label} 1 {path}\n"
                members[f"Stanford_Online_Products/{path}"] = plain(colour, place)
        members[f"Stanford_Online_Products/Ebay_{side}.txt"] = rows.encode()
    return members


PUBLISHED: dict[str, tuple[Callable[[], Members], Callable[[Path, Members], Path], str]] = {
    "cub200": (cub, tgz, "pytorch_metric_learning.datasets.cub._urlretrieve"),
    "cars196": (cars, zipped, "pytorch_metric_learning.datasets.cars196._urlretrieve"),
    "sop": (sop, zipped, "pytorch_metric_learning.datasets.sop._urlretrieve"),
}
CLASSES = {
    "cub200": (("001.Auk", "100.Pelican"), ("101.Wren", "200.Jay")),
    "cars196": (("Make Model 1", "Make Model 98"), ("Ram C-V Cargo Van 2012", "Make Model 196")),
    "sop": (("bicycle 1110", "sofa 1111"), ("bicycle 2220", "sofa 2221")),
}
every = pytest.mark.parametrize("name", PUBLISHED)


def load(name: str, root: Path, **options: bool) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the sizes are not the published ones
        return published.load(name, root, **options)


def archive(name: str, folder: Path, members: Members | None = None) -> Path:
    make, pack, _ = PUBLISHED[name]
    folder.mkdir(parents=True, exist_ok=True)
    return pack(folder / published.LAYOUTS[name].archives[0], make() if members is None else members)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def colours(split: Split) -> list[tuple[str, Colour]]:
    """The class and the colour of each picture, which has one colour."""
    pictures = split.pictures[torch.arange(len(split.labels))]
    assert pictures.shape == (len(split.labels), 3, 256, 256)
    assert pictures.dtype == torch.uint8
    flat = pictures.flatten(2).int()
    assert (flat.amax(2) - flat.amin(2)).max() == 0
    # JPEG keeps colours to a few steps.
    near = ((flat[:, :, 0] + 20) // 255 * 255).tolist()
    return [(split.names[label], tuple(colour)) for label, colour in zip(split.labels.tolist(), near, strict=True)]


# Published data sets


@every
@pytest.mark.parametrize("form", ["unpacked", "folder of the archive", "archive"])
def test_published_data_sets_have_their_usual_split(tmp_path: Path, name: str, form: str) -> None:
    root = tmp_path / "root"
    if form == "unpacked":
        scatter(root, PUBLISHED[name][0]())
    else:
        path = archive(name, root)
    dataset = load(name, path if form == "archive" else root)
    assert (dataset.train.names, dataset.test.names) == CLASSES[name]
    for split, shown in ((dataset.train, (RED, GREEN)), (dataset.test, (BLUE, YELLOW))):
        assert split.labels.dtype == torch.int64
        expected = [pair for pair in zip(split.names, shown, strict=True) for _ in range(2)]
        assert colours(split) == expected
        assert split.groups == (f"{split.names[0]} to {split.names[1]}",)
    if form != "unpacked":
        assert entries(root) == {path.name, *published.LAYOUTS[name].entries}
        path.unlink()
        assert load(name, root).digest() == dataset.digest()


@every
def test_sizes_other_than_the_published_ones_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    scatter(tmp_path, PUBLISHED[name][0]())
    layout = published.LAYOUTS[name]
    told = "4 training pictures of 2 classes and 4 test pictures of 2 classes"
    with pytest.warns(UserWarning, match=rf"{told}; {layout.title} as published has {layout.figures[0]:,} training"):
        published.load(name, tmp_path)
    monkeypatch.setitem(published.LAYOUTS, name, replace(layout, figures=(4, 2, 4, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        published.load(name, tmp_path)


@every
def test_nothing_there_says_where_it_comes_from(tmp_path: Path, name: str) -> None:
    layout = published.LAYOUTS[name]
    (tmp_path / "other.txt").write_text("")
    for root, told in ((tmp_path, "holds none of"), (tmp_path / "no", "no such folder")):
        with pytest.raises(FileNotFoundError) as raised:
            load(name, root)
        message = str(raised.value)
        assert message.startswith(f"{root}: {told}")
        for part in (layout.archives[0], layout.page, layout.kind.DOWNLOAD_URL, "--download"):
            assert part in message
        assert "\n" not in message


@every
def test_a_missing_index_file_is_named(tmp_path: Path, name: str) -> None:
    index = published.LAYOUTS[name].index
    for lost in index:
        root = scatter(tmp_path / lost.replace("/", "-"), PUBLISHED[name][0]())
        (root / lost).unlink()
        counts = f"{len(index) - 1} of {len(index)} index files found"
        with pytest.raises(
            FileNotFoundError, match=rf"^{re.escape(str(root))}: {counts}; .* missing is {lost}; .*https:"
        ):
            load(name, root)


@every
@pytest.mark.parametrize("lost", ["missing", "empty"])
def test_a_missing_picture_is_named_and_counted(tmp_path: Path, name: str, lost: str) -> None:
    members = PUBLISHED[name][0]()
    pictures = [path for path in members if path.lower().endswith(".jpg")]
    scatter(tmp_path, members)
    for path in pictures[2:4]:
        (tmp_path / path).unlink()
        if lost == "empty":
            (tmp_path / path).touch()
    first = f"({pictures[2]}|{pictures[3]})"
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: 6 of 8 pictures found; .* empty is {first}; .*https:"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "before", "after", "told"),
    [
        (
            "cub200",
            "images.txt",
            "8 200.Jay/Jay_0001_8.jpg\n",
            "",
            "7 pictures have a class, .*class_labels.txt list 8",
        ),
        ("cub200", "image_class_labels.txt", "8 200\n", "", "7 pictures have a class, .*images.txt list 8"),
        ("cub200", "image_class_labels.txt", "8 200\n", "8 201\n", "7 pictures have a class"),
        ("cub200", "image_class_labels.txt", "8 200\n", "9 200\n", "7 pictures have a class"),
        ("cub200", "image_class_labels.txt", "8 200\n", "8 Jay\n", "'Jay'"),
        ("cars196", "anno_test.csv", "00001.jpg,1,2,3,4,1\n", "00001.jpg,1,2,3,4,0\n", "7 pictures have a class"),
        ("cars196", "anno_test.csv", "00001.jpg,1,2,3,4,1\n", "00001.jpg,1,2,3,4,300\n", "index out of range"),
        ("sop", "Ebay_test.txt", "7 11320", "7 2", "puts class 2 on both sides"),
        ("sop", "Ebay_test.txt", "7 11320 1 sofa", "7\n11320 1 sofa", "index out of range"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, name: str, file: str, before: str, after: str, told: str) -> None:
    scatter(tmp_path, PUBLISHED[name][0]())
    (path,) = tmp_path.rglob(file)
    content = path.read_text()
    assert content.count(before) == 1
    path.write_text(content.replace(before, after))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}: the index .*{file}.*{told}.*https:"):
        load(name, tmp_path)


@every
def test_one_class_is_too_few(tmp_path: Path, name: str) -> None:
    scatter(tmp_path, PUBLISHED[name][0]())
    for file, pattern in (
        ("images.txt", r"[1234] .*\n"),
        ("image_class_labels.txt", r"[1234] .*\n"),
        ("anno_*.csv", r".*,(1|98)\n"),
        ("Ebay_train.txt", r"\d .*\n"),
    ):
        for path in tmp_path.rglob(file):
            path.write_text(re.sub(pattern, "", path.read_text()))
    with pytest.raises(ValueError, match=r"number of classes to train on is 0, at least 2 are needed"):
        load(name, tmp_path)


@every
@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_archive_is_named_and_leaves_nothing(tmp_path: Path, name: str, left: float) -> None:
    path = archive(name, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * left)])
    for root in (tmp_path, path):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: not a readable archive .*https:"):
            load(name, root, download=True)  # which must not hide it
        assert entries(tmp_path) == {path.name}
    path.write_bytes(content)
    assert load(name, tmp_path).train.names == CLASSES[name][0]


@every
def test_a_flipped_byte_of_an_archive_is_noticed(tmp_path: Path, name: str) -> None:
    path = archive(name, tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: not a readable archive"):
        load(name, tmp_path)
    assert entries(tmp_path) == {path.name}


@every
def test_an_incomplete_archive_is_named_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    members = PUBLISHED[name][0]()
    lost = next(path for path in members if path.lower().endswith(".jpg"))
    del members[lost]
    path = archive(name, tmp_path, members)
    with pytest.raises(FileNotFoundError, match=rf"^{re.escape(str(path))}: 7 of 8 pictures found; .* {lost};"):
        load(name, tmp_path)
    assert entries(tmp_path) == {path.name}


@every
@pytest.mark.parametrize("member", ["../evil.txt", "CUB_200_2011/../../../evil.txt", "..\\evil.txt", "/evil.txt"])
def test_members_that_lead_outside_are_refused(tmp_path: Path, name: str, member: str) -> None:
    root = tmp_path / "root"
    path = archive(name, root, PUBLISHED[name][0]() | {member: b"evil"})
    if name == "cub200" and member[0] in "./" and not member.startswith("../"):
        # What tarfile makes harmless instead: a leading slash is dropped; a backslash is a letter.
        load(name, root)
    else:
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: not a readable archive .*outside"):
            load(name, root)
        assert entries(root) == {path.name}
    assert not list(tmp_path.rglob("evil.txt"))
    assert not Path("/evil.txt").exists()


def test_links_that_lead_outside_are_refused(tmp_path: Path) -> None:
    path = archive("cub200", tmp_path)
    link = tarfile.TarInfo("CUB_200_2011/out")
    link.type, link.linkname = tarfile.SYMTYPE, "../../.."
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(link)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: not a readable archive .*outside"):
        load("cub200", tmp_path)
    assert entries(tmp_path) == {path.name}


def test_an_interrupted_unpacking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive("cub200", tmp_path)
    make, taken = tarfile.TarFile.makefile, []

    def interrupted(self: tarfile.TarFile, *args: Any) -> None:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(args)
        make(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "makefile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load("cub200", tmp_path)
    assert len(taken) == 3
    assert entries(tmp_path) == {path.name}
    assert load("cub200", tmp_path).train.names == CLASSES["cub200"][0]


@every
def test_two_processes_may_unpack_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, unpack = archive(name, tmp_path), published._unpack

    def overtaken(*args: Any) -> None:
        unpack(*args)
        monkeypatch.setattr(published, "_unpack", unpack)
        load(name, tmp_path)

    monkeypatch.setattr(published, "_unpack", overtaken)
    assert load(name, tmp_path).train.names == CLASSES[name][0]
    assert entries(tmp_path) == {path.name, *published.LAYOUTS[name].entries}


# Downloads


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Makes the library's downloads write these bytes and then raise, if asked to; the URLs that were asked for."""

    def serve(name: str, content: bytes, error: BaseException | None = None) -> list[str]:
        asked: list[str] = []

        def retrieve(url: str, filename: str) -> None:
            asked.append(url)
            Path(filename).write_bytes(content)
            if error is not None:
                raise error

        monkeypatch.setattr(PUBLISHED[name][2], retrieve)
        return asked

    yield serve
    assert tarfile.TarFile.extraction_filter is None


@every
def test_a_download_is_fetched_once(tmp_path: Path, served: Callable[..., list[str]], name: str) -> None:
    content = archive(name, tmp_path / "server").read_bytes()
    asked, root = served(name, content), tmp_path / "new" / "root"
    dataset = load(name, root, download=True)
    assert (dataset.train.names, dataset.test.names) == CLASSES[name]
    assert [colour for _, colour in colours(dataset.test)] == [BLUE, BLUE, YELLOW, YELLOW]
    assert entries(root) == set(published.LAYOUTS[name].entries)
    assert load(name, root, download=True).digest() == load(name, root).digest() == dataset.digest()
    assert asked == [published.LAYOUTS[name].kind.DOWNLOAD_URL]


@every
@pytest.mark.parametrize("root_is", ["new", "empty", "in use"])
@pytest.mark.parametrize(
    ("left", "error", "raised"),
    [
        (0.5, None, ValueError),
        (0.0, None, ValueError),
        (0.0, urllib.error.URLError("no network"), FileNotFoundError),
        (0.5, http.client.IncompleteRead(b""), FileNotFoundError),
        (0.5, KeyboardInterrupt(), KeyboardInterrupt),
        (0.5, OSError(28, "No space left on device"), OSError),
        (1.0, KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_half_a_download_is_never_data(
    tmp_path: Path,
    served: Callable[..., list[str]],
    name: str,
    root_is: str,
    left: float,
    error: BaseException | None,
    raised: type[BaseException],
) -> None:
    content, root = archive(name, tmp_path / "server").read_bytes(), tmp_path / "root"
    if root_is != "new":
        root.mkdir()
    if root_is == "in use":
        (root / "other.txt").write_text("kept")
    before = set(tmp_path.rglob("*"))
    served(name, content[: int(len(content) * left)], error)
    with pytest.raises(raised) as caught:
        load(name, root, download=True)
    if raised in (ValueError, FileNotFoundError):
        for part in (str(root), published.LAYOUTS[name].kind.DOWNLOAD_URL, published.LAYOUTS[name].page):
            assert part in str(caught.value)
    assert set(tmp_path.rglob("*")) == before
    with pytest.raises(FileNotFoundError, match=r"holds none of|no such folder"):
        load(name, root)
    served(name, content)
    assert load(name, root, download=True).train.names == CLASSES[name][0]


@every
@pytest.mark.parametrize("kind", ["picture", "index"])
def test_an_incomplete_download_is_refused(
    tmp_path: Path, served: Callable[..., list[str]], name: str, kind: str
) -> None:
    members = PUBLISHED[name][0]()
    picture = next(path for path in members if path.lower().endswith(".jpg"))
    lost = picture if kind == "picture" else published.LAYOUTS[name].index[-1]
    del members[lost]
    served(name, archive(name, tmp_path / "server", members).read_bytes())
    root = tmp_path / "root"
    with pytest.raises(FileNotFoundError, match=rf"^{root}: the download from https:.* of .* found; .* {lost};"):
        load(name, root, download=True)
    assert not root.exists()


def test_a_downloaded_member_that_leads_outside_is_refused(tmp_path: Path, served: Callable[..., list[str]]) -> None:
    served("cub200", archive("cub200", tmp_path / "server", cub() | {"../../evil.txt": b"evil"}).read_bytes())
    with pytest.raises(ValueError, match=r"not a readable archive .*evil\.txt.*outside"):
        load("cub200", tmp_path / "root", download=True)
    assert entries(tmp_path) == {"server"}


@every
def test_what_is_incomplete_is_not_fetched_over(tmp_path: Path, served: Callable[..., list[str]], name: str) -> None:
    asked = served(name, archive(name, tmp_path / "server").read_bytes())
    root = scatter(tmp_path / "root", PUBLISHED[name][0]())
    (root / published.LAYOUTS[name].index[0]).unlink()
    with pytest.raises(FileNotFoundError, match="index files found"):
        load(name, root, download=True)
    assert asked == []


# Folders


def make_folder(root: Path, classes: int = 8, pictures: int = 3, side: str = "") -> Path:
    """Classes a, b, c, … of different colours."""
    for c in range(classes):
        colour = (255 * (c & 1), 127 * (c >> 1 & 1) + 128 * (c >> 3), 255 * (c >> 2 & 1))
        for place in range(pictures):
            scatter(
                root,
                {
                    f"{side}{'abcdefghijklmnop'[c]}/{place}.png": encoded(
                        Image.new("RGB", (40, 30 + place), colour), "PNG"
                    )
                },
            )
    return root


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
    seen = augment.distort_photos(flat, generator)
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, augment.plain_photos(flat))
    torch.testing.assert_close(augment.PHOTOS.show(seen) * 255, flat[:, :, :224, :224].float())
    noise = torch.randint(0, 256, (6, 3, 256, 256), dtype=torch.uint8)
    first, second = (augment.distort_photos(noise, generator) for _ in range(2))
    assert not torch.equal(first, second)
    again = torch.Generator().manual_seed(0)
    augment.distort_photos(flat, again)
    assert torch.equal(augment.distort_photos(noise, again), first)
    # Nothing lies outside the range of a picture, which showing it would cut off.
    torch.testing.assert_close(augment._standard(augment.PHOTOS.show(first), 1), first, atol=1e-5, rtol=0)


def test_half_of_the_photos_are_mirrored_and_crops_keep_a_sixth() -> None:
    # Red grows to the right, green downwards: a crop's corners say where it was taken.
    ramp = torch.arange(256, dtype=torch.uint8)
    photo = torch.stack([ramp.expand(256, 256), ramp[:, None].expand(256, 256), torch.zeros(256, 256).byte()])
    seen = augment.PHOTOS.show(augment.distort_photos(photo.expand(64, 3, 256, 256), torch.Generator().manual_seed(1)))
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
    seen = augment.PHOTOS.show(augment.distort_photos(noise, torch.Generator()))
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


@pytest.mark.parametrize("name", [*PUBLISHED, "folder", "omniglot", "glyphs"])
def test_settings_pick_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name in PUBLISHED:
        scatter(tmp_path, PUBLISHED[name][0]())
    elif name == "folder":
        make_folder(tmp_path)
    elif name == "omniglot":
        make_omniglot(tmp_path / "images_background_small1.zip")
    else:
        # Drawing them takes seconds and is tested elsewhere.
        monkeypatch.setattr(glyphs, "load", lambda: Dataset("glyphs", augment.DRAWINGS, None, None))  # type: ignore[arg-type]
    root = "" if name == "glyphs" else str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert by_name.load(Settings(data=name, root=root)).name == name
    if name not in PUBLISHED:
        with pytest.raises(ValueError, match=f"--download fetches cub200, cars196 and sop; --data is {name}"):
            by_name.load(Settings(data=name, root=root, download=True))


# Omniglot


def make_omniglot(path: Path, alphabets: int = 5, extra: Members | None = None) -> Path:
    """A small archive in the layout of the real one: 3 characters of 4 drawings for each alphabet, backwards."""
    random = np.random.default_rng(0)
    members: Members = {"images_background_small1/": b""}
    for a in reversed(range(alphabets)):
        for c in reversed(range(3)):
            for d in range(4):
                ink = np.full((105, 105), 255, np.uint8)
                ink[20 + 5 * c : 80, 30 : 60 + 5 * a] = random.integers(0, 2, (60 - 5 * c, 30 + 5 * a)) * 255
                name = f"images_background_small1/Alphabet_{'ABCDE'[a]}/character{c + 1:02}/{a}{c}_{d}.png"
                members[name] = encoded(Image.fromarray(ink).convert("1"), "PNG")
    return zipped(path, members | (extra or {}))


def test_omniglot_is_split_by_alphabet(tmp_path: Path) -> None:
    fork = {"images_background_small1/Alphabet_A/character01/._00_0.png": b"Mac OS X"}
    path = make_omniglot(tmp_path / "images_background_small1.zip", extra=fork)
    dataset = omniglot.load(path)
    assert dataset.train.groups == ("Alphabet_A", "Alphabet_B", "Alphabet_C")
    assert dataset.test.groups == ("Alphabet_D", "Alphabet_E")
    assert dataset.train.names == tuple(f"Alphabet_{a} character0{c}" for a in "ABC" for c in (1, 2, 3))
    assert dataset.test.labels.tolist() == torch.arange(6).repeat_interleave(4).tolist()
    pictures = dataset.test.pictures[torch.arange(24)]
    assert pictures.shape == (24, 1, 64, 64)
    assert pictures.dtype == torch.uint8
    # Ink is bright and fills 44 pixels one way; wide drawings of alphabet E become flat ones.
    inked = (pictures[:, 0] > 30).any(1).sum(1), (pictures[:, 0] > 30).any(2).sum(1)
    assert all(40 <= max(width, height) <= 46 for width, height in zip(*(i.tolist() for i in inked), strict=True))
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(path) as members:
        members.extractall(unpacked)
    for root in (tmp_path, unpacked, unpacked / "images_background_small1"):
        assert omniglot.load(root).digest() == dataset.digest()


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "flipped", "no zip", "picture", "blank", "alphabets", "single", "empty"]
)
def test_bad_omniglot_archives_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "archive.zip"
    named, error = str(path), ValueError
    drawing = "images_background_small1/Alphabet_A/character01/0_9.png"
    if damage == "missing":
        error = FileNotFoundError
    elif damage == "alphabets":
        make_omniglot(path, alphabets=4)
    elif damage in ("picture", "blank"):
        blank = encoded(Image.new("1", (105, 105), 1), "PNG")
        make_omniglot(path, extra={drawing: blank if damage == "blank" else b"\x89PNG\r\n\x1a\nno more"})
        named = f"{path}/{drawing}"
    elif damage == "single":
        inked = encoded(Image.new("1", (105, 105), 0), "PNG")
        make_omniglot(path, extra={"images_background_small1/Alphabet_A/character09/0_0.png": inked})
        named = f"{path}: Alphabet_A/character09 has a single drawing"
    elif damage == "no zip":
        path.write_text("<html>Not found</html>")
    elif damage == "empty":
        path.mkdir()
    else:
        content = bytearray(make_omniglot(path).read_bytes())
        if damage == "truncated":
            del content[len(content) // 2 :]
        else:
            content[300:320] = bytes(20)
        path.write_bytes(content)
    with pytest.raises(error) as raised:
        omniglot.load(path)
    message = str(raised.value)
    assert message.startswith(named)
    assert "ALPHABET/characterNN/*.png" in message
    assert "https://github.com/brendenlake/omniglot" in message
    assert "\n" not in message


@pytest.mark.skipif(not OMNIGLOT.is_file(), reason=f"the public archive is not at {OMNIGLOT}")
def test_the_public_omniglot_archive() -> None:
    dataset = omniglot.load(OMNIGLOT)
    assert dataset.train.groups == ("Balinese", "Early_Aramaic", "Greek")
    assert dataset.test.groups == ("Korean", "Latin")
    assert len(dataset.train.names) + len(dataset.test.names) == 136
    assert len(dataset.train.labels) + len(dataset.test.labels) == 2720
    assert torch.bincount(dataset.test.labels).unique().tolist() == [20]
