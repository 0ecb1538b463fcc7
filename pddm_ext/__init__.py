"""Deep metric learning with a learned, position-dependent similarity (PDDM).

Source: Huang, Loy, Tang, *Local Similarity-Aware Deep Feature Embedding*, NIPS 2016.
"""

from importlib.metadata import version as _version

from . import reference
from .density import DensityRegularizer
from .health import HealthError, HealthWarning, set_health_checks
from .losses import QuadrupletLoss
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
