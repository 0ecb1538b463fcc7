"""Data sets in small: files and archives in the layouts of the real ones, and what their pictures show."""

from __future__ import annotations

import io
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pddm_ext.workbench.data import published
from pddm_ext.workbench.data.splits import Dataset, Split

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


def inshop() -> Members:
    """In-Shop in small: two items to train on, and two of which one picture each is searched for among another."""
    items = {"id_00000001": RED, "id_00000002": GREEN, "id_00000003": BLUE, "id_00000004": YELLOW}
    rows, members = [], {}
    for number, (item, colour) in enumerate(items.items()):
        for place in range(2):
            path = f"img/WOMEN/Dresses/{item}/0{place}_1_front.jpg"
            members[path] = plain(colour, place)
            rows.append(f"{path}    {item} {'train' if number < 2 else ('query', 'gallery')[place]}")
    text = "\n".join([str(len(rows)), "image_name item_id evaluation_status", *rows, ""])
    return members | {"Eval/list_eval_partition.txt": text.encode()}


def grocery() -> Members:
    """The Grocery Store data set in small: three classes, of which validation has two."""
    classes = {"Royal-Gala": ("Fruit/Apple", RED), "Kiwi": ("Fruit", GREEN), "Oatly": ("Packages", BLUE)}
    members: Members = {}
    table = (
        "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),Iconic Image Path (str),Text\r\n"
    )
    listed: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for label, (name, (kind, colour)) in enumerate(classes.items()):
        icon = f"iconic-images-and-descriptions/{kind}/{name}/{name}_Iconic.jpg"
        members[f"dataset/{icon}"] = plain(colour, 5)
        table += f"{name},{label},{kind},0,/{icon},/none.txt\r\n"
        for side, count in (("train", 3), ("val", label > 0), ("test", 2)):
            for place in range(int(count)):
                path = f"{side}/{kind}/{name}/{name}_{place:03}.jpg"
                members[f"dataset/{path}"] = plain(colour, place)
                listed[side].append(f"{path}, {label}, 0\n")
    index = {f"dataset/{side}.txt": "".join(rows).encode() for side, rows in listed.items()}
    return members | index | {"dataset/classes.csv": table.removesuffix("\r\n").encode()}


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


def load(name: str, root: Path, **options: Any) -> Dataset:
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


def make_photographs(folder: Path) -> None:
    """Sixteen things of five photographs each in FOLDER/photographs, a red kettle among them, and one more of that."""
    random = np.random.default_rng(0)
    views = ("front", "side", "above", "far", "near")
    for thing in ("red-kettle", *(f"thing-{number:02}" for number in range(15))):
        base = random.integers(0, 256, (6, 8, 3))
        for view in (*views, *(["kettle"] if thing == "red-kettle" else [])):
            noisy = (base + random.integers(-40, 41, base.shape)).clip(0, 255).astype(np.uint8)
            picture = Image.fromarray(noisy).resize((120, 90), Image.Resampling.BICUBIC)
            name = f"{view}.jpg" if view == "kettle" else f"photographs/{thing}/{view}.jpg"
            scatter(folder, {name: encoded(picture)})


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
