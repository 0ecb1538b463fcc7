"""What people write instead: the peers that the fused kernels are measured against.

``reference`` is in the package. This is the best chunked PyTorch we could write: the v branch once per row, W_c in
halves so that norms scale rows instead of a concatenation, each unordered pair once up to the width of a chunk, and no
tensor longer than a chunk of pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pddm_ext import PDDM, Quadruplets, reference

#: Rows per chunk; the quickest of 4 … 64 at n = 256, d = 512 on two cores. A GPU's is found where it is measured.
ROWS = 16


def chunked_score_matrix(x: Tensor, unit: PDDM, chunk: int = ROWS) -> Tensor:
    f = F.normalize(x, dim=-1)
    half_a = F.linear(f, unit.v.weight) / 2
    weight_u, weight_v = unit.c.weight.split(unit.hidden, dim=1)
    chunks = []
    for first in range(0, len(f), chunk):
        last = min(first + chunk, len(f))
        u = (f[first:last, None] - f[None, first:]).abs().flatten(0, 1)
        u = F.relu(F.linear(u, unit.u.weight, unit.u.bias))
        v = F.relu((half_a[first:last, None] + half_a[None, first:]).flatten(0, 1) + unit.v.bias)
        c = F.linear(u, weight_u) / u.norm(dim=1, keepdim=True).clamp(min=1e-12)
        c = c + F.linear(v, weight_v) / v.norm(dim=1, keepdim=True).clamp(min=1e-12)
        s = F.linear(F.relu(c + unit.c.bias), unit.s.weight, unit.s.bias)
        chunks.append(F.pad(s.reshape(last - first, len(f) - first), (first, 0)))
    upper = torch.cat(chunks).triu()
    return upper + upper.triu(1).T


def chunked_mine(feats: Tensor, labels: Tensor, unit: PDDM, mode: str, chunk: int = ROWS) -> Quadruplets:
    return reference.select_quadruplets(chunked_score_matrix(feats, unit, chunk), labels, mode)


compiled_mine = torch.compile(reference.mine_and_score)
