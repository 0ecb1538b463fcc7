"""What errors say about installing: what brings an extra, and why the native module does not load."""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch


def bring(extra: str) -> str:
    """The command that installs an extra. There is no release yet, so that no index has one."""
    return f"pip install '.[{extra}]' in pddm_ext's source folder"


def explain(error: ImportError) -> str:
    """What stands where this package was found, and what to do about it."""
    folder = Path(__file__).resolve().parent
    fitting = [f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    here = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    found = [name for name in here if name in fitting]
    reason = f"pddm_ext's native module does not load ({error}). "
    for entry in sys.path:
        other = Path(entry).resolve() / "pddm_ext"
        # (Of an editable installation there is the native module alone.)
        if other != folder and (other / "__init__.py").exists() and any((other / name).exists() for name in fitting):
            return reason + (
                f"The folder {folder} hides the package installed in {other}: Python looks first in the folder that it "
                "is started in or that PYTHONPATH names. Start it in another folder, or install with "
                "'pip install --editable .', which uses the source folder itself."
            )
    if found:
        return reason + (
            f"{folder / found[0]} is there, and torch is {torch.__version__}: it needs 2.10 or later. Where it is, "
            "install the package again, with 'pip install .' from its repository."
        )
    if here:
        return reason + (
            f"{folder} has one for another Python ({', '.join(here)}) than this, {sys.implementation.cache_tag}: "
            "install the package with this one, by 'python -m pip install .' from its repository."
        )
    return reason + (
        f"{folder} has none: a source folder is not enough. Install the package with 'pip install .' from its "
        "repository, and start Python in another folder; or with 'pip install --editable .'."
    )
