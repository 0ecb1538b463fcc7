"""Deep metric learning with a learned, position-dependent similarity (PDDM).

Source: Huang, Loy, Tang, *Local Similarity-Aware Deep Feature Embedding*, NIPS 2016.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import Any as _Any

from . import reference
from ._installing import bring as _bring
from .density import DensityRegularizer
from .health import HealthError, HealthWarning, set_health_checks
from .losses import QuadrupletLoss
from .memory_bank import MemoryBank
from .mining import mine_and_score
from .quadruplets import Quadruplets
from .scoring import score_matrix, score_pairs, topk
from .structure import (
    MultiClusterRankingLoss,
    StructureHead,
    adaptive_distance,
    concatenated_gallery,
    concatenated_queries,
    structure_rerank,
)
from .unit import PDDM, default_unit

__version__ = _version("pddm-ext")

__all__ = [
    "PDDM",
    "DensityRegularizer",
    "HealthError",
    "HealthWarning",
    "MemoryBank",
    "MultiClusterRankingLoss",
    "QuadrupletLoss",
    "Quadruplets",
    "StructureHead",
    "adaptive_distance",
    "concatenated_gallery",
    "concatenated_queries",
    "default_unit",
    "mine_and_score",
    "reference",
    "score_matrix",
    "score_pairs",
    "set_health_checks",
    "structure_rerank",
    "topk",
]


def __getattr__(name: str) -> _Any:
    """``load``, which the extra ``train`` brings: importing the package needs torch and numpy alone."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _import_module(".workbench.trained", __name__).load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"pddm_ext.load needs {error.name}, which is not there; it comes with {_bring('train')}", name=error.name
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), "load"])
