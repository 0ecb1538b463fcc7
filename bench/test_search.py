"""Photographs embedded and searched for, over what the libraries underneath take alone.

EfficientNet-Lite0 at 224 pixels, features of 128 numbers.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import torch

import photographs
from pddm_ext.workbench.catalogue import Catalogue
from pddm_ext.workbench.model import pieces
from races import race, row, seconds


@torch.no_grad()
def test_embedding_a_folder(benchmark: Any, tmp_path: Path) -> None:
    """A catalogue from its files on, decoding and writing included, over the backbone's forward passes alone.

    These are of 32 photographs, as a loop over a loader makes them, and of the two at a time that ours makes: on both
    cores, where decoding takes its time from them, and on one, where the other is left to decoding.
    """
    trained = photographs.embedder()
    folder, out = tmp_path / "photographs", tmp_path / "catalogues"
    folder.mkdir()
    out.mkdir()
    names = photographs.folder(folder, 256)
    stored = torch.stack([trained.prepare(folder / name) for name in names])
    seen = [trained.view.plain(part) for part in torch.split(stored, 32)]

    def ours() -> None:
        with TemporaryDirectory(dir=out) as fresh:
            Catalogue.build(trained, folder, fresh, workers=2)

    backbone = trained.module.net.backbone

    def few() -> None:
        for part in seen:
            for piece in pieces(part):
                backbone(piece)

    both = race(benchmark, ours, {"forward": lambda: [backbone(part) for part in seen], "few": few}, rounds=5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratio = statistics.median(seconds(few) / seconds(ours) for _ in range(5))
    finally:
        torch.set_num_threads(threads)
    row(
        benchmark,
        "a catalogue of 256 photographs, two workers",
        **{
            "the forward pass alone, 32 photographs at once": (both["forward"], 0.9),
            "the forward pass alone, 2 at once, as embedding does": (both["few"], 0),
            "the same, both on one core, the other left to decoding": (ratio, 0),
        },
    )


@torch.no_grad()
def test_search(benchmark: Any, tmp_path: Path) -> None:
    trained = photographs.embedder()
    (name,) = photographs.folder(tmp_path, 1)
    catalogue = photographs.opened(tmp_path, trained, 100_000)
    index = faiss.IndexFlatL2(trained.dim)
    index.add(np.array(catalogue.features))
    stored = trained.prepare(tmp_path / name)[None]

    def parts() -> None:
        index.search(trained.module(stored).numpy(), 100)

    ratio = race(
        benchmark, lambda: catalogue.search(tmp_path / name, by="score", candidates=100), {"parts": parts}, rounds=31
    )
    row(
        benchmark,
        "a photograph searched for among 100,000, 100 re-ranked by score",
        **{"faiss and a forward pass alone": (1 / ratio["parts"], -1.5)},
    )
