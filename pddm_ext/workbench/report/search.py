"""What a search of a catalogue found: a table for a terminal, and one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..catalogue import Catalogue, Match
from ..checkpoint import deliver
from ..data.splits import printable
from ..trained import Trained
from .page import RANKINGS, _aligned
from .pictures import Picture, _data_uri, _thumbnails
from .templates import environment

#: Side of a photograph on the page, in pixels of its own; it is shown at up to half of that.
_SIDE = 240


@dataclass(frozen=True)
class _Shown:
    """A match on the page; one whose file is no longer there, or no longer readable, has no picture."""

    picture: Picture | None
    name: str
    folder: str
    values: tuple[str, ...] = ()


def table(photos: Sequence[Path], found: Sequence[Sequence[Match]]) -> str:
    """Each photograph's matches as aligned lines for a terminal, best first."""
    blocks = []
    for photo, matches in zip(photos, found, strict=True):
        numbers: dict[str, list[float | None]] = {
            "distance": [match.distance for match in matches],
            "score": [match.score for match in matches],
            "adaptive": [match.adaptive for match in matches],
        }
        shown = {name: values for name, values in numbers.items() if any(value is not None for value in values)}
        head = ["", "file", "class", *shown]
        lines = []
        for place, match in enumerate(matches):
            names = [printable(match.path), printable(match.label or "")]
            lines.append([str(place + 1), *names, *(_number(values[place]) for values in shown.values())])
        blocks.append("\n".join([printable(str(photo)), *("  " + line for line in _aligned([head, *lines], "<"))]))
    return "\n\n".join(blocks)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def plain(photos: Sequence[Path], found: Sequence[Sequence[Match]]) -> list[dict[str, Any]]:
    """The matches as JSON holds them; a score that is no number is null."""

    def number(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else value

    return [
        {
            "photo": str(photo),
            "matches": [
                {
                    "path": match.path,
                    "label": match.label,
                    "distance": match.distance,
                    "score": number(match.score),
                    "adaptive": number(match.adaptive),
                }
                for match in matches
            ],
        }
        for photo, matches in zip(photos, found, strict=True)
    ]


def write(path: Path, catalogue: Catalogue, photos: Sequence[Path], found: Sequence[Sequence[Match]], by: str) -> Path:
    """Write the page: photographs as the net sees them, each with its matches; one HTML file that fetches nothing.

    Args:
        path: of the file, in an existing folder; a link is followed.
        catalogue: that was searched.
        photos: that were searched for.
        found: what :meth:`.catalogue.Catalogue.search` gave for them.
        by: what ranked.

    Returns:
        ``path``.

    Raises:
        ValueError, OSError: a photograph cannot be read, or the page not be written.
    """
    trained = catalogue.trained
    # A picture that was found for several photographs is in the page once for each, as a page has to show them.
    queries = [
        (
            _Shown(_picture(trained, photo, f"searched for: {photo.name}"), photo.name, str(photo.parent)),
            [_match(catalogue, place, match, by) for place, match in enumerate(matches, start=1)],
        )
        for photo, matches in zip(photos, found, strict=True)
    ]
    text = (
        environment()
        .get_template("search.html.j2")
        .render(
            queries=queries,
            ranking=RANKINGS[by],
            count=len(catalogue),
            folder=str(catalogue.folder),
            index=catalogue.index,
            drawings=trained.view.channels == 1,
        )
    )
    deliver(path, text.encode("utf-8", "backslashreplace"))
    return path


def _match(catalogue: Catalogue, place: int, match: Match, by: str) -> _Shown:
    folder, _, name = match.path.rpartition("/")
    text = f"{place}: {match.path}"
    try:
        picture = _picture(catalogue.trained, catalogue.folder / match.path, text)
    except (OSError, ValueError):
        picture = None
    ranked = {"score": (f"score {_number(match.score)}",), "structure": (f"adaptive {_number(match.adaptive)}",)}
    return _Shown(picture, name, folder, (*ranked.get(by, ()), f"distance {_number(match.distance)}"))


def _picture(trained: Trained, path: Path, text: str) -> Picture:
    view = trained.view
    seen = view.show(view.plain(trained.prepare(path)[None]).to("cpu", torch.float32))
    return Picture(_data_uri(_thumbnails(seen, _SIDE)[0]), text)
