"""What mining returns."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

Mode = Literal["batch", "anchor", "pair"]

_ROWS: Final = "_pddm_rows"
_REFERENCES: Final = "_pddm_references"

#: The modes in the order the native core numbers them.
MODES: Final[tuple[Mode, ...]] = ("batch", "anchor", "pair")


class Quadruplets(NamedTuple):
    """Hard quadruplets (i, j, k, l) of a batch and the scores of their three pairs, each field of shape (Q,).

    (i, j) is a positive pair, k the hardest negative of i, l the hardest negative of j. Q is 1 in mode ``"batch"``,
    n in ``"anchor"`` (slot r belongs to row r) and the number of positive pairs in ``"pair"``. A slot that is not
    ``valid`` has indices −1 and scores 0 and carries no gradient. Mined among references, j, k and l are rows of these.
    """

    #: int64 row numbers.
    i: Tensor
    j: Tensor
    k: Tensor
    l: Tensor  # noqa: E741 - the paper's name
    #: float32 (float64 for float64 features), differentiable.
    s_ij: Tensor
    s_ik: Tensor
    s_jl: Tensor
    #: bool.
    valid: Tensor

    def of_rows(self, rows: int, references: int | None = None) -> Quadruplets:
        """These, known to be mined from so many rows, and among so many references if any; a loss of other numbers is
        then refused.

        The fields alone are the contract, so the number stands on a tensor, where copies and devices may lose it: on
        row numbers, which whoever counts rows otherwise replaces.
        """
        if not torch.compiler.is_compiling():
            setattr(self.i, _ROWS, rows)
            setattr(self.i, _REFERENCES, references)
        return self

    def mined_rows(self) -> int | None:
        """How many rows the batch had that these were mined from, where that is known."""
        return getattr(self.i, _ROWS, None)

    def mined_references(self) -> int | None:
        """Among how many references, where that is known and there were any."""
        return getattr(self.i, _REFERENCES, None)
