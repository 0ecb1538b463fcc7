"""In-Shop and the Grocery Store data set: queries and their gallery, read from folders and zips, and damage refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pddm_ext.workbench.data import grocery as grocery_module
from pddm_ext.workbench.data import inshop as inshop_module
from pddm_ext.workbench.data import load as by_name
from pddm_ext.workbench.data import scan
from pddm_ext.workbench.data.inshop import INDEX
from pddm_ext.workbench.data.splits import Dataset, TestSet, batches
from pddm_ext.workbench.settings import Settings
from small_data import BLUE, GREEN, RED, YELLOW, Members, colours, entries, grocery, inshop, scatter, zipped

MODULES = {"in-shop": inshop_module, "grocery": grocery_module}
REAL = Path(__file__).parents[2] / "shared" / "data" / "grocery" / "GroceryStoreDataset-160.zip"


def load(name: str, root: Path, **options: Any) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the sizes are not the published ones
        return by_name.load(Settings(data=name, root=str(root), **options))


def moved(members: Members, change: Callable[[str], str]) -> Members:
    return {change(name): content for name, content in members.items()}


def make_inshop(root: Path, form: str, members: Members | None = None) -> Path:
    members = inshop() if members is None else members
    if form == "img.zip":
        pictures = {name: content for name, content in members.items() if name.startswith("img/")}
        scatter(root, {name: content for name, content in members.items() if name not in pictures})
        (root / "Img").mkdir(parents=True)
        zipped(root / "Img" / "img.zip", pictures)
        return root
    within = {"Img/img": "Img/", "img": ""}[form]
    return scatter(root, moved(members, lambda name: f"{within}{name}" if name.startswith("img/") else name))


def make_grocery(root: Path, form: str, members: Members | None = None) -> Path:
    """Gives what ``--root`` is to be."""
    members = grocery() if members is None else members
    if form == "repository":
        return scatter(root, members)
    if form == "dataset":
        return scatter(root, members) / "dataset"
    if form == "folder above":
        scatter(root, moved(members, lambda name: f"GroceryStoreDataset-master/{name}"))
        return root
    root.mkdir()
    path = zipped(root / "GroceryStoreDataset-1.zip", moved(members, lambda name: f"GroceryStoreDataset-master/{name}"))
    return path if form == "zip" else root


def made(name: str, root: Path, members: Members | None = None) -> Path:
    """The form that is a zip."""
    return make_inshop(root, "img.zip", members) if name == "in-shop" else make_grocery(root, "zip", members)


both = pytest.mark.parametrize("name", MODULES)


@pytest.mark.parametrize("form", ["img", "Img/img", "img.zip"])
def test_inshop_has_its_queries_and_gallery(tmp_path: Path, form: str) -> None:
    root = make_inshop(tmp_path / "root", form)
    before = set(root.rglob("*"))
    dataset = load("in-shop", root)
    assert (dataset.name, dataset.protocol, dataset.val) == ("in-shop", "unseen", None)
    assert dataset.gallery is not None
    assert colours(dataset.train) == [*[("id_00000001", RED)] * 2, *[("id_00000002", GREEN)] * 2]
    assert colours(dataset.test) == colours(dataset.gallery) == [("id_00000003", BLUE), ("id_00000004", YELLOW)]
    assert TestSet(dataset, 0).file(0) in {f"img/WOMEN/Dresses/id_0000000{n}/00_1_front.jpg" for n in (3, 4)}
    assert dataset.digest() == load("in-shop", make_inshop(tmp_path / "other", "img")).digest()
    assert set(root.rglob("*")) == before  # nothing is unpacked


@pytest.mark.parametrize("form", ["repository", "dataset", "folder above", "zip", "folder of a zip"])
@pytest.mark.parametrize("gallery", ["train", "catalogue"])
def test_grocery_searches_known_products(tmp_path: Path, form: str, gallery: str) -> None:
    root = make_grocery(tmp_path / "root", form)
    before = set((tmp_path / "root").rglob("*"))
    dataset = load("grocery", root, gallery=gallery)
    assert (dataset.name, dataset.protocol) == ("grocery", "known")
    assert dataset.gallery is not None
    assert dataset.val is not None
    products = [("Royal-Gala", RED), ("Kiwi", GREEN), ("Oatly", BLUE)]
    assert colours(dataset.train) == [product for product in products for _ in range(3)]
    assert colours(dataset.test) == [product for product in products for _ in range(2)]
    assert colours(dataset.val) == products[1:]
    assert (dataset.gallery is dataset.train) == (gallery == "train")
    if gallery == "catalogue":
        assert colours(dataset.gallery) == products
    test = TestSet(dataset, 0)
    for row in range(6):
        name = test.names[test.labels[row]]
        assert re.fullmatch(rf"test/.*/{name}/{name}_00[01].jpg", str(test.file(row)))
    assert dataset.digest() == load("grocery", make_grocery(tmp_path / "b", "repository"), gallery=gallery).digest()
    assert set((tmp_path / "root").rglob("*")) == before


@both
def test_worker_processes_read_from_the_zip(tmp_path: Path, name: str) -> None:
    split = load(name, made(name, tmp_path / "root")).train
    drawn = [list(batches(split, 2, 2, 3, seed=5, workers=workers)) for workers in (0, 2)]
    for (pictures, labels, rows), (others, same, places) in zip(*drawn, strict=True):
        assert torch.equal(pictures, others)
        assert torch.equal(labels, same)
        assert torch.equal(rows, places)


@both
def test_sizes_other_than_published_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = made(name, tmp_path / "root")
    settings = Settings(data=name, root=str(root))
    told, figures = {
        "in-shop": (
            "4 training pictures of 2 items, 2 queries and 2 gallery pictures of 2 items; In-Shop as published has "
            "25,882 training pictures of 3,997 items, 14,218 queries and 12,612 gallery pictures of 3,985 items",
            (4, 2, 2, 2, 2),
        ),
        "grocery": (
            "9 training, 2 validation and 6 test photographs of 3 classes; the Grocery Store Dataset as published has "
            "2,640 training, 296 validation and 2,485 test photographs of 81 classes",
            (9, 2, 6, 3),
        ),
    }[name]
    with pytest.warns(UserWarning, match=told):
        by_name.load(settings)
    monkeypatch.setattr(MODULES[name], "FIGURES", figures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_name.load(settings)


def test_an_archive_is_no_folder_of_the_shop(tmp_path: Path) -> None:
    (path,) = make_inshop(tmp_path, "img.zip").rglob("img.zip")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: a file, where --data in-shop takes the folder"):
        load("in-shop", path)


@both
def test_nothing_there_says_where_it_comes_from(tmp_path: Path, name: str) -> None:
    for root in (tmp_path, tmp_path / "no"):
        with pytest.raises(FileNotFoundError, match=rf"^{re.escape(str(root))}: .*; expected .*https://[^\n]*$"):
            load(name, root)
    with pytest.raises(ValueError, match=f"^--download fetches cub200, cars196 and sop; --data is {name}$"):
        load(name, tmp_path, download=True)


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
def test_every_second_product_may_be_unseen() -> None:
    known, unseen = (
        by_name.load(Settings(data="grocery", root=str(REAL), split=split)) for split in ("half", "unseen")
    )
    assert unseen.protocol == "unseen"
    assert unseen.train.names == known.train.names[::2]
    assert unseen.test.names == unseen.gallery.names == known.train.names[1::2]
    assert unseen.val is None
    assert set(unseen.others.names) <= set(unseen.train.names)
    of = {side: set(getattr(unseen, side).pictures.paths) for side in ("train", "test", "gallery", "others")}
    assert of["gallery"] | of["train"] == set(known.train.pictures.paths)
    assert not of["gallery"] & of["train"]
    assert of["test"] < set(known.test.pictures.paths)
    assert of["others"] < set(known.val.pictures.paths)
    held = unseen.validation(0)
    assert set(held.test.names) <= set(held.gallery.names) <= set(unseen.train.names)


def test_a_choice_of_galleries_is_for_grocery(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--gallery catalogue is for --data grocery; --data is in-shop"):
        load("in-shop", make_inshop(tmp_path / "root", "img"), gallery="catalogue")


@pytest.mark.parametrize(
    ("name", "file", "before", "after", "told"),
    [
        ("in-shop", INDEX, "8\n", "9\n", "it announces 9 pictures and lists 8"),
        ("in-shop", INDEX, "8\n", "eight\n", "eight"),
        ("in-shop", INDEX, "id_00000004 query", "id_00000004 test", "a line has .* test'"),
        ("in-shop", INDEX, " id_00000004 query", " query", "a line has .* query'"),
        (
            "in-shop",
            INDEX,
            "id_00000004 query",
            "id_00000004 gallery",
            "id_00000004 is not in both",
        ),
        (
            "in-shop",
            INDEX,
            "id_00000004 query",
            "id_00000001 query",
            "00001 is in train and in query",
        ),
        (
            "in-shop",
            INDEX,
            "img/WOMEN/Dresses/id_00000004/00",
            "../../00",
            "leads out of its folder",
        ),
        ("in-shop", INDEX, "id_00000004/00", "id_00000004/01", "lists a picture twice"),
        ("grocery", "test.txt", "Kiwi_001.jpg, 1, 0", "Kiwi_001.jpg, 3, 0", "class 3 is not in classes.csv"),
        ("grocery", "test.txt", "Kiwi_001.jpg, 1, 0", "Kiwi_001.jpg, 1", "values to unpack"),
        ("grocery", "test.txt", "Kiwi_001.jpg, 1, 0", "Kiwi_001.jpg, one, 0", "'one'"),
        ("grocery", "test.txt", "Kiwi_001.jpg", "Kiwi_000.jpg", "lists a picture twice"),
        ("grocery", "train.txt", "train/Fruit/Kiwi/Kiwi_001.jpg", "../Kiwi_001.jpg", "leads out of its folder"),
        ("grocery", "classes.csv", "Oatly,2", "Oatly,1", "class IDs are not 0, 1, 2"),
        ("grocery", "classes.csv", "Oatly,2", "Kiwi,2", "no name of its own"),
        ("grocery", "classes.csv", "Iconic Image Path", "Icon", "a column is missing"),
        ("grocery", "classes.csv", "/iconic-images-and-descriptions/Fruit/Kiwi", "/../Kiwi", "leads out of its folder"),
    ],
)
@pytest.mark.parametrize("zip_it", [False, True])
def test_a_damaged_index_is_refused(
    tmp_path: Path, name: str, file: str, before: str, after: str, told: str, zip_it: bool
) -> None:
    members = inshop() if name == "in-shop" else grocery()
    (path,) = (member for member in members if member.endswith(file))
    text = members[path].decode()
    assert text.count(before) == 1
    members[path] = text.replace(before, after).encode()
    if zip_it:
        root = made(name, tmp_path / "root", members)
    else:
        root = make_inshop(tmp_path / "root", "img", members) if name == "in-shop" else scatter(tmp_path, members)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(root))}[^\n]*{file}[^\n]*{told}[^\n]*https:[^\n]*$"):
        load(name, root)


@both
def test_a_missing_index_or_picture_is_named(tmp_path: Path, name: str) -> None:
    members = inshop() if name == "in-shop" else grocery()
    for number, lost in enumerate(members):
        if "Iconic" in lost:
            continue
        left = {path: content for path, content in members.items() if path != lost}
        root = made(name, tmp_path / str(number), left)
        short = lost.removeprefix("dataset/").removeprefix("Eval/")
        with pytest.raises(FileNotFoundError, match=rf"^{re.escape(str(root))}.*{short}.*https:"):
            load(name, root)


@both
@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_zip_is_named(tmp_path: Path, name: str, left: float) -> None:
    root = made(name, tmp_path / "root")
    (path,) = (tmp_path / "root").rglob("*.zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: not a readable archive .*https:"):
        load(name, root)
    path.write_bytes(content)
    assert len(load(name, root).train.labels) > 0


@both
def test_a_flipped_byte_in_a_zipped_picture_is_found_by_the_look(tmp_path: Path, name: str) -> None:
    root = made(name, tmp_path / "root")
    (path,) = (tmp_path / "root").rglob("*.zip")
    content = bytearray(path.read_bytes())
    # In the scan lines of a picture to train on, behind its head.
    content[content.index(b"\xff\xda", content.index(b"train/") if name == "grocery" else 0) + 20] ^= 0xFF
    path.write_bytes(content)
    dataset = load(name, root)
    (reason,) = scan.scan(dataset, progress=False).unreadable.values()
    assert re.fullmatch(rf"{re.escape(str(path))}/.*\.jpg: .*Bad CRC-32.*", reason)
    assert scan.scan(dataset, "test", progress=False).unreadable == {} or name == "grocery"
    kept, lost = scan.examined(dataset, skip=True, progress=False)
    assert (len(kept.train.labels), len(lost)) == (len(dataset.train.labels) - 1, 1)
    assert (kept.gallery is kept.train) == (name == "grocery")


def test_several_zips_are_not_chosen_from(tmp_path: Path) -> None:
    for number in (1, 2):
        zipped(tmp_path / f"GroceryStoreDataset-{number}.zip", grocery())
    with pytest.raises(FileNotFoundError, match=r"holds 2 zips, GroceryStoreDataset-1.zip and others: name one"):
        load("grocery", tmp_path)
    assert entries(tmp_path) == {"GroceryStoreDataset-1.zip", "GroceryStoreDataset-2.zip"}


@pytest.mark.skipif(not REAL.is_file(), reason=f"the public data set is not at {REAL}")
def test_the_real_grocery_store_has_its_published_size() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = by_name.load(Settings(data="grocery", root=str(REAL), gallery="catalogue"))
    assert dataset.gallery is not None
    assert len(dataset.gallery.labels) == len(dataset.train.names) == 81
    assert dataset.test.pictures[torch.tensor([0, 2484])].shape == (2, 3, 256, 256)
