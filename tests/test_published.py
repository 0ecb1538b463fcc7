"""The published data sets: what is read and fetched, how it is split, and what is never taken for data."""

from __future__ import annotations

import http.client
import re
import tarfile
import urllib.error
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pddm_ext.workbench.data import load as by_name
from pddm_ext.workbench.data import photos, published
from pddm_ext.workbench.settings import Settings
from small_data import BLUE, CLASSES, GREEN, PUBLISHED, RED, YELLOW, archive, colours, cub, entries, load, scatter

every = pytest.mark.parametrize("name", PUBLISHED)


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
def test_their_classes_can_be_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of two pictures a class none would be held out."""
    scatter(tmp_path, PUBLISHED[name][0]())
    monkeypatch.setattr(photos, "held_out", lambda count: count // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dataset = by_name.load(Settings(data=name, root=str(tmp_path), split="known"))
    both = (*CLASSES[name][0], *CLASSES[name][1])
    assert dataset.train.names == dataset.test.names == both
    assert (dataset.protocol, len(dataset.train.labels), len(dataset.test.labels)) == ("known", 4, 4)
    assert dataset.gallery is dataset.train
    assert not set(dataset.train.pictures.paths) & set(dataset.test.pictures.paths)


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
