"""The truth, in float64, how far rounding may lead from it, and comparisons that allow no more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import pddm_ext
from helpers import ON_GPU_KERNELS, assert_same_bits, bits, on_one_thread
from pddm_ext import _C, reference


def in_double(unit: reference.PDDM) -> reference.PDDM:
    """The same parameters in float64, on the plain-PyTorch unit, where they are."""
    plain = reference.PDDM(unit.dim, unit.hidden, unit.combined, normalize_input=unit.normalize_input)
    plain = plain.double().to(unit.u.weight.device)
    plain.load_state_dict(unit.state_dict())
    return plain


@on_one_thread
def truth(x: Tensor, unit: reference.PDDM, y: Tensor | None = None) -> Tensor:
    """score_matrix by `reference` in float64, on the CPU."""
    with torch.no_grad():
        y = None if y is None else y.cpu().double()
        return reference.score_matrix(x.cpu().double(), in_double(unit).cpu(), y)


def rounding_unit(dtype: torch.dtype) -> float:
    """Half a unit in the last place of the precision that features of this dtype are scored in."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


@on_one_thread
def rounding_bound(x: Tensor, unit: reference.PDDM, y: Tensor | None = None, *, operand: float = 0.0) -> Tensor:
    """How far a score of x's rows with y's may lie from the truth, whatever the order of the sums: (n, m), float64.

    A running error analysis, layer by layer. A sum of k products errs by at most γ_k = k·ε/(1 − k·ε) times the sum of
    their magnitudes (Higham, *Accuracy and Stability*, section 3.1); errors of the inputs pass through |W|, a relu
    passes them on where it may be alive, and a division by a norm divides them by it. ``operand`` is the relative
    rounding of what enters the products of W_u and W_c. The GPU rounds there what a norm divides afterwards, which is
    the same but for float16: below its normal numbers an operand errs by 2^-25, and the norm divides that.
    """
    eps = rounding_unit(x.dtype)
    # Tensor cores cut off what they add, where others round it.
    sum_eps = 2 * eps if operand and ON_GPU_KERNELS else eps
    below_normal = 2.0**-25 if x.dtype == torch.float16 and operand else 0.0

    def gamma(k: int, eps: float = eps) -> float:
        return k * eps / (1 - k * eps)

    parameter = {name: value.detach().cpu().double() for name, value in unit.named_parameters()}
    d, h, m = unit.dim, unit.hidden, unit.combined
    f, g = (F.normalize(t.detach().cpu().double(), dim=-1) for t in (x, x if y is None else y))
    a, b = f[:, None, :], g[None, :, :]
    e_rows = gamma(d + 4) * (a.abs() + b.abs())

    def linear(t: Tensor, weight: str) -> Tensor:
        return t @ parameter[weight].abs().T

    def over_norm(t: Tensor, error: Tensor, k: int) -> tuple[Tensor, Tensor]:
        norm, e_norm = t.norm(dim=-1, keepdim=True), error.norm(dim=-1, keepdim=True)
        unit_t = t / norm.clamp(min=1e-12)
        e = (error + unit_t.abs() * (e_norm + gamma(k) * norm)) / (norm - e_norm).clamp(min=1e-12)
        return unit_t, torch.minimum(e, unit_t.abs() + 1.01)  # nothing over its norm exceeds 1

    def relu(t: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(t), torch.where(t < -error, 0.0, error)

    def operands_below_normal(t: Tensor, weight: Tensor, given: Tensor, norm: Tensor) -> Tensor:
        """The weights' errors times t, and those of what was given (zeros have none), divided by its norm."""
        return below_normal * (t.sum(-1, keepdim=True) + (given > 0).double() @ weight.abs().T / norm)

    # Equal rows have u = 0, and rows of opposite sign v = 0, in any precision.
    difference, total = (a - b).abs(), a + b
    equal, opposite = (difference == 0).all(-1, keepdim=True), (total == 0).all(-1, keepdim=True)
    e_u = torch.where(equal, 0.0, e_rows + eps * difference)
    e_v = torch.where(opposite, 0.0, e_rows + eps * total.abs())
    u, v = difference, total / 2
    scale_v = torch.ones_like(v[..., :1])
    e_scale, norm_u = torch.zeros_like(scale_v), torch.ones_like(scale_v)
    if unit.normalize_input:
        norm_u = u.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        u, e_u = over_norm(u, e_u, d + 4)
        norm_v, e_norm = v.norm(dim=-1, keepdim=True), (e_v / 2).norm(dim=-1, keepdim=True)
        scale_v = 1 / norm_v.clamp(min=1e-12)
        e_scale = (e_norm + gamma(d + 4) * norm_v) / (norm_v - e_norm).clamp(min=1e-12)
        v = v * scale_v
    pre_u = u @ parameter["u.weight"].T + parameter["u.bias"]
    e_u = (
        linear(e_u, "u.weight")
        + (gamma(d + 4, sum_eps) + 2 * operand) * linear(u, "u.weight")
        + operands_below_normal(u, parameter["u.weight"], difference, norm_u)
        + gamma(4) * parameter["u.bias"].abs()
    )
    # W_v meets the rows before they are added.
    pre_v = v @ parameter["v.weight"].T + parameter["v.bias"]
    e_v = (linear(e_v, "v.weight") + gamma(d + 4) * linear(a.abs() + b.abs(), "v.weight")) / 2 * scale_v
    e_v = torch.where(opposite, 0.0, e_v + linear(v.abs(), "v.weight") * e_scale) + gamma(4) * parameter["v.bias"].abs()

    alive = [relu(pre_u, e_u), relu(pre_v, e_v)]
    (u, e_u), (v, e_v) = (over_norm(*t, h + 4) for t in alive)
    both, e_both = torch.cat([u, v], -1), torch.cat([e_u, e_v], -1)
    pre_c = both @ parameter["c.weight"].T + parameter["c.bias"]
    e_c = (
        linear(e_both + (gamma(2 * h + 8, sum_eps) + 2 * operand) * (both + e_both), "c.weight")
        + gamma(4) * parameter["c.bias"].abs()
    )
    for t, (before, e), weight in zip((u, v), alive, parameter["c.weight"].split(h, dim=1), strict=True):
        norm = (before.norm(dim=-1, keepdim=True) - e.norm(dim=-1, keepdim=True)).clamp(min=1e-12)
        e_c = e_c + operands_below_normal(t, weight, before + e, norm)
    c, e_c = relu(pre_c, e_c)
    return (linear(e_c + gamma(m + 4) * (c + e_c), "s.weight") + gamma(4) * parameter["s.bias"].abs()).squeeze(-1)


def operand_rounding(dtype: torch.dtype) -> float:
    """Relative rounding of a product's operand: half a unit in the last of the digits that features of this dtype are
    multiplied with, 0 where those are the sums' own.
    """
    if ON_GPU_KERNELS:
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-11 * tf32}.get(dtype, 0.0)
    return 2.0**-8 if dtype == torch.bfloat16 and _C.multiplies_bfloat16() else 0.0


def bound_of(x: Tensor, unit: reference.PDDM, y: Tensor | None = None) -> Tensor:
    """The bound of what is scored now: by these kernels, in the precision that is set."""
    return rounding_bound(x, unit, y, operand=operand_rounding(x.dtype))


def assert_within(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    error = (got.detach().cpu().double() - expected.cpu()).abs()
    assert not error.isnan().any(), "an unexpected NaN"
    # The truth is rounded too, at 2^-53.
    assert (error <= bound * (1 + 1e-6) + 1e-13).all(), f"off by up to {(error / (bound + 1e-30)).max():.3g} bounds"


def decided(scores: Tensor, bound: Tensor, allowed: Tensor, chosen: Tensor, smallest: bool) -> Tensor:
    """Assert, per row, that the chosen entry may be the best within rounding; returns the rows where only one may be.

    Where the margin between best and second best exceeds the bounds this is equality of indices. A NaN is never chosen.
    """
    allowed = allowed & ~scores.isnan()
    if not smallest:
        scores = -scores
    low, high = scores - bound, (scores + bound).masked_fill(~allowed, torch.inf)
    at = chosen[:, None]
    assert allowed.gather(1, at).all(), "not an entry that may be chosen"
    possible = allowed & (low <= high.amin(-1, keepdim=True))
    assert possible.gather(1, at).all(), "a better entry, beyond any rounding"
    return possible.sum(-1) == 1


@on_one_thread
def assert_mined(quads: pddm_ext.Quadruplets, feats: Tensor, labels: Tensor, unit: reference.PDDM, mode: str) -> float:
    """Compare with the truth; returns the share of choices that rounding left no doubt about."""
    n, labels = len(labels), labels.cpu()
    quads = type(quads)(*(field.detach().cpu() for field in quads))
    scores = truth(feats, unit)
    expected = reference.select_quadruplets(scores, labels, mode)
    assert torch.equal(quads.valid, expected.valid)
    for name in "ijkl":
        assert (getattr(quads, name)[~quads.valid] == -1).all()
    for name in ("s_ij", "s_ik", "s_jl"):
        assert (getattr(quads, name)[~quads.valid] == 0).all()
    if not quads.valid.any():
        return 1.0
    bound = bound_of(feats, unit)
    i, j, k, l = (index[quads.valid] for index in quads[:4])  # noqa: E741
    same = labels[:, None] == labels[None, :]
    positive = same & ~torch.eye(n, dtype=torch.bool)
    sure = [decided(scores[r], bound[r], ~same[r], c, smallest=False) for r, c in ((i, k), (j, l))]
    if mode == "batch":
        upper = positive.triu().reshape(1, -1)
        sure.append(decided(scores.reshape(1, -1), bound.reshape(1, -1), upper, i * n + j, smallest=True))
    elif mode == "anchor":
        assert torch.equal(i, torch.arange(n)[quads.valid])
        sure.append(decided(scores[i], bound[i], positive[i], j, smallest=True))
    else:
        assert torch.equal(quads.i, expected.i)
        assert torch.equal(quads.j, expected.j)
    for got, (r, c) in zip(quads[4:7], ((i, j), (i, k), (j, l)), strict=True):
        assert_within(got[quads.valid], scores[r, c], bound[r, c])
    return torch.cat(sure).double().mean().item()


def assert_lowest(quads: pddm_ext.Quadruplets, feats: Tensor, labels: Tensor, mode: str) -> None:
    """Ties to the lowest index, lexicographic for pairs: of equal rows, a choice is the first that it may be."""
    labels = labels.cpu()
    kind = bits(feats).unique(dim=0, return_inverse=True)[1]  # equal rows are of one kind
    rows = torch.arange(len(labels))
    for i, j, k, l in zip(*(field[quads.valid].tolist() for field in quads[:4]), strict=True):  # noqa: E741
        for row, chosen in ((i, k), (j, l)):
            assert chosen == rows[(kind == kind[chosen]) & (labels != labels[row])][0]
        if mode == "anchor":
            assert j == rows[(kind == kind[j]) & (labels == labels[i]) & (rows != i)][0]
        if mode == "batch":
            first, second = kind[:, None], kind[None, :]
            alike = (first == kind[i]) & (second == kind[j]) | (first == kind[j]) & (second == kind[i])
            positive = (labels[:, None] == labels[None, :]) & (rows[:, None] < rows[None, :])
            assert [i, j] == (alike & positive).nonzero()[0].tolist()


def assert_selected(quads: pddm_ext.Quadruplets, feats: Tensor, labels: Tensor, unit: pddm_ext.PDDM, mode: str) -> None:
    """The quadruplets of the kernels' own scores: to the bit where those are the same in every call."""
    if ON_GPU_KERNELS:
        assert_mined(quads, feats, labels, unit, mode)
        assert_lowest(quads, feats, labels, mode)
    else:
        matrix = pddm_ext.score_matrix(feats, unit).detach()
        assert_same_bits(quads, reference.select_quadruplets(matrix, labels, mode))


def assert_ranked(scores: Tensor, columns: Tensor, expected: Tensor, bound: Tensor) -> None:
    """A ranking of each row of the truth within its bounds: nothing better was left out, and ties are in order."""
    scores, columns = scores.detach().cpu(), columns.cpu()
    assert_within(scores, expected.gather(1, columns), bound.gather(1, columns))
    before, after = scores[:, :-1], scores[:, 1:]
    assert ((before > after) | ((before == after) & (columns[:, :-1] < columns[:, 1:]))).all()
    left_out = torch.ones_like(expected, dtype=torch.bool).scatter(1, columns, False)
    assert ((expected - bound).masked_fill(~left_out, -torch.inf) <= scores[:, -1:].double()).all()
