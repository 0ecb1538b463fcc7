"""Drawn characters: the glyphs of fonts, and Omniglot."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from pddm_ext.workbench.data import glyphs, omniglot
from pddm_ext.workbench.data.splits import Dataset, fit
from pddm_ext.workbench.evaluation.retrieval import recall_at_k
from pddm_ext.workbench.loop import Run
from pddm_ext.workbench.settings import Settings
from small_data import encoded, make_omniglot, scatter, zipped

pytestmark = pytest.mark.usefixtures("one_thread")

OMNIGLOT = Path(__file__).parents[2] / "shared" / "data" / "omniglot" / "images_background_small1.zip"


@pytest.fixture(scope="module")
def characters() -> Dataset:
    return glyphs.load()


# Glyphs


def test_glyphs_are_open_set(characters: Dataset) -> None:
    train, test = characters.train, characters.test
    assert not set(train.names) & set(test.names)
    for scripts, split in ((glyphs.TRAIN_SCRIPTS, train), (glyphs.TEST_SCRIPTS, test)):
        assert split.groups == tuple(scripts)
        for place, (script, members) in enumerate(scripts.items()):
            kept = {name for name, group in zip(split.names, split.group_of, strict=True) if group == place}
            assert kept <= set(members), script
            assert len(kept) >= 5, script
        assert torch.bincount(split.labels).min() >= glyphs.MIN_FACES
        assert split.labels.max() + 1 == len(split.names)
        assert len(split.pictures) == len(split.labels)
    assert len(train.names) >= 50
    assert len(test.names) >= 80


def test_no_picture_has_two_labels(characters: Dataset) -> None:
    splits = characters.train, characters.test
    drawings = torch.cat([split.pictures[torch.arange(len(split.labels))] for split in splits])
    labels = torch.cat([splits[0].labels, splits[1].labels + len(splits[0].names)])
    alike = glyphs.similarity(drawings, drawings)
    other = labels[:, None] != labels[None, :]
    assert alike[other].max() < glyphs.ALIKE
    # By another measure too: no two classes share most of their ink.
    ink = (drawings > 127).flatten(1).float()
    both = ink @ ink.T
    union = ink.sum(1)[:, None] + ink.sum(1)[None, :] - both
    assert (both / union)[other].max() < 0.9


@pytest.mark.parametrize(
    "pair",
    [
        *("AА", "oо", "cс", "pр", "xх", "BВ", "HН", "iі", "cC", "sS", "Il", "0O", "6б"),
        *("oօ", "nո", "uս", "hհ", "gց", "qզ", "OՕ", "SՏ", "UՍ", "oס", "Iו", "Iן"),
    ],
)
def test_look_alikes_are_one_class_or_left_out(characters: Dataset, pair: str) -> None:
    kept = set(characters.train.names) | set(characters.test.names)
    assert len(kept & set(pair)) <= 1


def test_left_out_training_characters_are_not_tested(characters: Dataset) -> None:
    """A test class looks like no character of a training script, kept or not."""
    drawn = torch.cat(list(glyphs.draw("".join(glyphs.TRAIN_SCRIPTS.values())).values()))
    for rows in torch.arange(len(characters.test.labels)).split(256):
        assert glyphs.similarity(characters.test.pictures[rows], drawn).max() < glyphs.ALIKE


def test_only_glyphs_that_a_face_has_are_drawn() -> None:
    drawn = glyphs.draw("Aა中")
    assert "中" not in drawn
    assert len(drawn["A"]) == len(glyphs.FACES) == 16
    assert glyphs.MIN_FACES <= len(drawn["ა"]) < len(glyphs.FACES)


def test_missing_font_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "FACES", ("NoSuchFace",))
    with pytest.raises(FileNotFoundError, match=r"NoSuchFace\.ttf.*matplotlib"):
        glyphs.draw("A")


def test_fit_normalises_place_and_size() -> None:
    small, large = Image.new("L", (105, 105)), Image.new("L", (200, 200))
    small.paste(255, (10, 20, 30, 60))
    large.paste(255, (90, 20, 150, 140))
    torch.testing.assert_close(fit(small), fit(large), rtol=0, atol=0)
    with pytest.raises(ValueError, match="blank"):
        fit(Image.new("L", (9, 9)))


def test_a_short_run_on_glyphs_learns(characters: Dataset) -> None:
    run = Run(Settings(steps=80, every=80, accelerator="cpu"), characters)
    run.train(progress=False)
    pixels = run.test[torch.arange(len(run.test))].flatten(1)
    assert run.curves["recall"][-1] > recall_at_k(pixels, run.test.labels)[1] + 0.05


# Omniglot


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


def test_a_drawing_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(make_omniglot(tmp_path / "once.zip")) as members:
        once = {name: members.read(name) for name in members.namelist() if name.endswith(".png")}
    own = {name: f"images_evaluation/{name.partition('/')[2]}" for name in once}
    path = zipped(tmp_path / "twice.zip", once | {own[name]: content for name, content in once.items()})
    first = "Alphabet_A/character01/00_0.png"
    folder = scatter(tmp_path / "folder", {f"images_background/{n.partition('/')[2]}": c for n, c in once.items()})
    scatter(folder, {own[name]: content for name, content in once.items()})
    for root in (path, folder):
        with pytest.raises(ValueError, match=rf"^{root}: {first} is there twice, as images_.*/{first} and as images_"):
            omniglot.load(root)
    name, content = next(iter(once.items()))
    with zipfile.ZipFile(tmp_path / "once.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(name, content)
    drawing = name.partition("/")[2]
    with pytest.raises(ValueError, match=rf"/once.zip: {drawing} is there twice, as {name} and as {name}; leave one"):
        omniglot.load(tmp_path / "once.zip")


def test_drawings_may_lie_at_any_depth_of_a_zip_and_in_another_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(make_omniglot(tmp_path / "once.zip")) as members:
        once = {name.partition("/")[2]: members.read(name) for name in members.namelist() if name.endswith(".png")}
    whole = omniglot.load(tmp_path / "once.zip").digest()
    for above in ("", "mine/", "mine/of/old/"):
        path = zipped(tmp_path / "moved.zip", {above + name: content for name, content in once.items()})
        assert omniglot.load(path).digest() == whole
    folder = scatter(tmp_path / "folder", {f"mine/{name}": content for name, content in once.items()})
    assert omniglot.load(folder).digest() == whole
    # Beside the known folder other drawings are nobody's.
    scatter(tmp_path / "both", {f"images_background_small1/{name}": content for name, content in once.items()})
    scatter(tmp_path / "both", {f"images_background/{name}": content for name, content in once.items()})
    scatter(tmp_path / "both", {"images_evaluation/Alphabet_Z/character01/0.png": b"no picture"})
    assert omniglot.load(tmp_path / "both").digest() == whole


@pytest.mark.skipif(not OMNIGLOT.is_file(), reason=f"the public archive is not at {OMNIGLOT}")
def test_the_public_omniglot_archive() -> None:
    dataset = omniglot.load(OMNIGLOT)
    assert dataset.train.groups == ("Balinese", "Early_Aramaic", "Greek")
    assert dataset.test.groups == ("Korean", "Latin")
    assert len(dataset.train.names) + len(dataset.test.names) == 136
    assert len(dataset.train.labels) + len(dataset.test.labels) == 2720
    assert torch.bincount(dataset.test.labels).unique().tolist() == [20]
