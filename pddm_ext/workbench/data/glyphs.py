"""Characters drawn from the TrueType fonts that matplotlib ships: retrieval data that needs no download.

A class is a character, a drawing is one face of it. Scripts share shapes (Latin A, Cyrillic А; Latin o, Armenian օ), so
characters are taken in order, training scripts first, and one that looks like any earlier character in any pair of
faces is left out. No picture has two labels, and none is on both sides of the split.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .augment import DRAWINGS
from .splits import Dataset, Split, fit, in_memory

FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)


def _characters(*ranges: tuple[int, int]) -> str:
    return "".join(chr(code) for first, last in ranges for code in range(first, last + 1))


TRAIN_SCRIPTS = {
    "Latin": _characters((0x41, 0x5A), (0x61, 0x7A)),
    "digits": _characters((0x30, 0x39)),
    "Cyrillic": _characters((0x410, 0x44F), (0x402, 0x40B), (0x40F, 0x40F), (0x452, 0x45B), (0x45F, 0x45F)),
}
TEST_SCRIPTS = {
    "Georgian": _characters((0x10D0, 0x10F0), (0x10A0, 0x10C5)),
    "Armenian": _characters((0x531, 0x556), (0x561, 0x586)),
    "Hebrew": _characters((0x5D0, 0x5EA)),
    "Lao": _characters((0xE81, 0xEAE)),
}

#: A class needs this many faces, to have positives that differ.
MIN_FACES = 4

#: Two pictures are alike from this similarity on. Pairs above it are the same shape or differ by a serif's width (U and
#: Armenian Ս, 6 and Cyrillic б, g and 9 in a bold face); pairs just below differ to the eye (m and ш, P and p).
ALIKE = 0.93

_POINT_SIZE = 88


def draw(characters: str) -> dict[str, Tensor]:
    """Each character in every face that has a glyph for it: (faces, 1, 64, 64) uint8. Those with none are missing.

    Raises:
        FileNotFoundError: matplotlib's installation lacks a face.
    """
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn: dict[str, list[Tensor]] = {}
    for face in FACES:
        path = fonts / f"{face}.ttf"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: a font that comes with matplotlib was expected; reinstall matplotlib")
        covered = FT2Font(str(path)).get_charmap()
        font = ImageFont.truetype(str(path), _POINT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        for character in characters:
            # Glyph 0 is .notdef, the box that fonts draw for what they lack.
            if covered.get(ord(character), 0) != 0:
                left, top, right, bottom = font.getbbox(character)
                picture = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
                ImageDraw.Draw(picture).text((2 - left, 2 - top), character, font=font, fill=255)
                drawn.setdefault(character, []).append(fit(picture))
    return {character: torch.stack(pictures) for character, pictures in drawn.items()}


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """How alike drawings look, 1 for the same: (n, 1, 64, 64) and (m, 1, 64, 64) uint8 to (n, m).

    Normalised correlation at a quarter of the resolution, the best over shifts by one of those coarse pixels.
    """

    def coarse(drawings: Tensor) -> Tensor:
        return F.avg_pool2d(drawings.float(), 4)

    def standard(pictures: Tensor) -> Tensor:
        rows = pictures.flatten(1)
        return F.normalize(rows - rows.mean(1, keepdim=True), dim=1)

    x, y = coarse(x), coarse(y)
    fixed = standard(x)
    best = torch.full((len(x), len(y)), -1.0)
    for shift in ((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
        best = torch.maximum(best, fixed @ standard(y.roll(shift, (2, 3))).T)
    return best


def distinct(drawn: dict[str, Tensor]) -> list[str]:
    """The characters that look like none before them, kept or not, in any pair of faces."""
    owner = torch.repeat_interleave(torch.tensor([len(pictures) for pictures in drawn.values()]))
    pictures = torch.cat(list(drawn.values()))
    a, b = (similarity(pictures, pictures) >= ALIKE).nonzero(as_tuple=True)
    later = torch.unique(owner[a][owner[b] < owner[a]])
    left_out = set(later.tolist())
    return [character for index, character in enumerate(drawn) if index not in left_out]


def load() -> Dataset:
    """Latin, digits and Cyrillic to train on; Georgian, Armenian, Hebrew and Lao to search among.

    Raises:
        FileNotFoundError: matplotlib's installation lacks a face.
    """
    drawn = draw("".join((*TRAIN_SCRIPTS.values(), *TEST_SCRIPTS.values())))
    drawn = {character: pictures for character, pictures in drawn.items() if len(pictures) >= MIN_FACES}
    kept = set(distinct(drawn))

    def split(scripts: dict[str, str]) -> Split:
        return in_memory({name: {c: drawn[c] for c in characters if c in kept} for name, characters in scripts.items()})

    return Dataset("glyphs", DRAWINGS, split(TRAIN_SCRIPTS), split(TEST_SCRIPTS), distort_test=True)
