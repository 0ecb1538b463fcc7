"""pddm_ext in the libraries people train with: a module for each, none of them imported before it is asked for."""

from __future__ import annotations

import importlib

from .._installing import bring


def needs(package: str, extra: str) -> None:
    """Import a package that an adapter is for.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what installs it.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"this adapter needs {package}, which is not there: {bring(extra)}", name=error.name
        ) from error
