"""The eight parameters of a PDDM unit and their sizes; every score, fused or plain, is a function of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._numbers import size, switch


class Parameters(nn.Module):
    """Position-dependent deep metric unit: the score of a pair of features, learned.

    With f the L2-normalised rows of x and y, σ the relu::

        u  = |f_x − f_y|            v  = (f_x + f_y) / 2
        u' = σ(W_u u + b_u)         v' = σ(W_v v + b_v)
        c  = σ(W_c [u'/‖u'‖ ; v'/‖v'‖] + b_c)
        S  = w_s · c + b_s

    Args:
        dim: length d of a feature.
        hidden: length h of u' and v'; ``dim`` by default.
        combined: length m of c; ``dim`` by default.
        normalize_input: feed u/‖u‖ and v/‖v‖ to W_u and W_v.

    Raises:
        ValueError: a size is not positive.
        TypeError: a size is no int, or normalize_input no bool.
    """

    def __init__(
        self, dim: int, hidden: int | None = None, combined: int | None = None, *, normalize_input: bool = False
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        combined = dim if combined is None else combined
        for name, value in (("dim", dim), ("hidden", hidden), ("combined", combined)):
            size(name, value)
        switch("normalize_input", normalize_input)
        self.dim, self.hidden, self.combined = dim, hidden, combined = int(dim), int(hidden), int(combined)
        self.normalize_input = normalize_input
        self.u = nn.Linear(dim, hidden)
        self.v = nn.Linear(dim, hidden)
        self.c = nn.Linear(2 * hidden, combined)
        self.s = nn.Linear(combined, 1)

    def tensors(self) -> list[Tensor]:
        """Weights and biases of u, v, c and s, in the order in which operators take them.

        Of a plain layer without the detour of a module's attributes, which a small batch would notice.
        """
        found: list[Any] = []
        for name in "uvcs":
            layer: Any = self._modules[name]
            own = layer._parameters
            plain = "weight" in own and "bias" in own
            found += (own["weight"], own["bias"]) if plain else (layer.weight, layer.bias)
        return found

    def extra_repr(self) -> str:
        return f"{self.dim}, hidden={self.hidden}, combined={self.combined}, normalize_input={self.normalize_input}"
