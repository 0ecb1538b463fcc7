"""Adaptive distances, the loss that trains their structure, and rankings by them, against the formulas spelled out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pddm_ext
from helpers import DEVICE, FLOATS, Largest, host_only, make_features, on_one_thread, threads
from pddm_ext import structure as module
from pddm_ext._checks import INTEGERS
from pddm_ext.structure import (
    MultiClusterRankingLoss,
    StructureHead,
    adaptive_distance,
    concatenated_gallery,
    concatenated_queries,
    structure_rerank,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def weights(*shape: int, seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return (0.5 + normal(*shape, seed=seed).mul(2).sigmoid()).to(dtype)


def literal_distances(e: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """Every pair and coordinate."""
    e, g = F.normalize(e, dim=-1), F.normalize(g, dim=-1)
    return (w[:, None] * (e[:, None] - g[None]).square()).sum(-1)


def off_diagonal(x: Tensor) -> Tensor:
    return x[~torch.eye(len(x), dtype=torch.bool, device=x.device)]


def literal_centres(e: Tensor, clusters: int = 2, spread: float = 3.0, over: str = "pairs") -> list[Tensor]:
    """Both ends by NASA's definition, with the gradient they would have."""
    d = literal_distances(e, torch.ones_like(e), e)
    d = d.flatten().clamp(min=0).sqrt() if over == "all" else off_diagonal(d).sqrt()
    mean = d.mean()
    nearest = torch.maximum(0.2 * mean, mean - spread * (d.std() if over == "all" else d.std(correction=0)))
    return [mean + (nearest - mean) * k / (clusters - 1) for k in range(clusters)]


def literal_loss(e: Tensor, w: Tensor, centres: list[Tensor], scale: float = 10.0) -> Tensor:
    d = off_diagonal(literal_distances(e, w, e)).sqrt()
    offsets = torch.stack([(d - eta).abs() for eta in centres])
    weight = torch.exp(-scale * offsets)
    return (weight * offsets).sum(0).div(weight.sum(0)).mean()


def gradients(loss: nn.Module, e: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    e, w = e.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    value = loss(e, w)
    return value.detach(), *torch.autograd.grad(value, [e, w])


def clustered(n: int = 12, d: int = 6) -> Tensor:
    """Three tight groups, so that some pairs belong to the near centre and some to the far one."""
    groups = torch.arange(n, device=DEVICE) % 3
    return 3 * normal(3, d)[groups] + 0.6 * normal(n, d, seed=1)


# --- Distance ---------------------------------------------------------------------------------------------------------


def test_adaptive_distance_is_the_sum_over_coordinates():
    e, w, g = normal(7, 5), weights(7, 5), 3 * normal(11, 5, seed=1)
    got = adaptive_distance(e, w, g)
    torch.testing.assert_close(got, literal_distances(e, w, g).sqrt(), rtol=1e-12, atol=0)
    assert not torch.allclose(adaptive_distance(g, w[:1].expand(11, -1), e).T, got)  # by the query's structure


@on_one_thread
def test_adaptive_distance_gradcheck():
    inputs = normal(4, 3).requires_grad_(), weights(4, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    torch.autograd.gradcheck(adaptive_distance, inputs)


def test_structure_of_one_gives_plain_distances():
    e, g = normal(7, 5), normal(11, 5, seed=1)
    expected = torch.cdist(F.normalize(e, dim=-1), F.normalize(g, dim=-1), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(adaptive_distance(e, torch.ones_like(e), g), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_at_distance_zero_the_gradient_is_finite(dtype):
    e, w = normal(6, 33, dtype=dtype).requires_grad_(), weights(6, 33, dtype=dtype).requires_grad_()
    adaptive_distance(e, w, e).sum().backward()
    own = adaptive_distance(e, w, e).diagonal()
    assert (own >= 0).all()
    assert (own < 2e-3).all()
    assert e.grad.isfinite().all()
    assert w.grad.isfinite().all()
    exact = torch.eye(4, dtype=dtype, device=DEVICE).requires_grad_()  # nothing to round: exactly 0
    ones = torch.ones_like(exact)
    d = adaptive_distance(exact, ones, exact)
    assert not d.diagonal().any()
    (g,) = torch.autograd.grad(d.diagonal().sum(), exact)
    assert not g.any()


def test_nan_is_not_a_distance():
    e = normal(2, 3)
    e[1, 0] = math.nan
    d = adaptive_distance(e, torch.ones_like(e), normal(4, 3, seed=1))
    assert d[0].isfinite().all()
    assert d[1].isnan().all()


# --- Head -------------------------------------------------------------------------------------------------------------


def test_head_is_half_plus_a_sigmoid_and_starts_at_one():
    head = StructureHead(5, 3).to(DEVICE)
    x = normal(7, 5, dtype=torch.float32)
    assert torch.equal(head(x), torch.ones(7, 3, device=DEVICE))
    nn.init.normal_(head.linear.weight, generator=torch.Generator(DEVICE).manual_seed(0))
    nn.init.normal_(head.linear.bias, generator=torch.Generator(DEVICE).manual_seed(1))
    w = head(x)
    torch.testing.assert_close(w, 0.5 + 1 / (1 + torch.exp(-(x @ head.linear.weight.T + head.linear.bias))))
    assert (w > 0.5).all()
    assert (w < 1.5).all()
    assert StructureHead(4).to(DEVICE)(x[:, :4]).shape == (7, 4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64, torch.bfloat16])
def test_head_of_any_dtype(dtype, parameters):
    head = StructureHead(5, 3).to(DEVICE, parameters)
    assert head(normal(7, 5, dtype=dtype)).dtype == (torch.float64 if parameters == torch.float64 else torch.float32)


@on_one_thread
def test_head_learns_which_coordinates_matter():
    """The loss goes down, and samples come to weigh coordinates differently."""
    e, head, loss = clustered(30, 8), StructureHead(8).to(DEVICE, torch.float64), MultiClusterRankingLoss()
    first = loss(e, head(e)).item()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(e, head(e)).backward()
        optimizer.step()
    w = head(e).detach()
    assert loss(e, w).item() < 0.95 * first
    assert w.std(0).max() > 0.05  # by sample
    assert w.std(1).max() > 0.05  # by coordinate


# --- Loss -------------------------------------------------------------------------------------------------------------


def test_two_clusters_are_nasas():
    e, w = clustered(), weights(12, 6)
    for spread in (0.5, 3.0):  # the second ends at 0.2 of the mean, the first above it
        far, near = literal_centres(e, spread=spread)
        assert (near > 0.21 * far) == (spread == 0.5)
        got = MultiClusterRankingLoss(spread=spread)(e, w)
        torch.testing.assert_close(got, literal_loss(e, w, [far, near]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("clusters", "scale", "spread"), [(2, 4.0, 1.0), (3, 10.0, 3.0), (5, 25.0, 0.7)])
def test_loss_and_gradients_equal_the_literal_formula(clusters, scale, spread):
    e, w = 5 * clustered(), weights(12, 6)
    value, g_e, g_w = gradients(MultiClusterRankingLoss(clusters, scale, spread), e, w)
    e, w = e.requires_grad_(), w.requires_grad_()
    constants = [eta.detach() for eta in literal_centres(e, clusters, spread)]
    expected = literal_loss(e, w, constants, scale)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    expected_e, expected_w = torch.autograd.grad(expected, [e, w])
    torch.testing.assert_close(g_e, expected_e, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(g_w, expected_w, rtol=1e-9, atol=1e-13)
    # With centres that follow the embeddings it would be another one.
    (moving,) = torch.autograd.grad(literal_loss(e, w, literal_centres(e, clusters, spread), scale), e)
    assert (moving - g_e).norm() > 0.01 * g_e.norm()


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_centres_of_all_entries_are_those_of_nasas_code(spread):
    e, w = clustered(), weights(12, 6)
    far, near = literal_centres(e, spread=spread, over="all")
    got = MultiClusterRankingLoss(spread=spread, over="all")(e, w)
    torch.testing.assert_close(got, literal_loss(e, w, [far, near]), rtol=1e-12, atol=0)
    assert far < literal_centres(e)[0]


def test_zeros_of_the_diagonal_halve_the_near_centre_of_alike_distances():
    """Of 32 rows at right angles all distances are √2: over the pairs both centres are there."""
    e = torch.eye(32, dtype=torch.float64, device=DEVICE)
    itself = torch.eye(32, dtype=torch.bool, device=DEVICE)
    pairs, every = (MultiClusterRankingLoss(over=over)._centres(e, itself) for over in ("pairs", "all"))
    torch.testing.assert_close(pairs / 2**0.5, torch.ones_like(pairs))
    n = 32 * 32
    mean = 1 - 1 / 32
    deviation = ((32 * mean**2 + (n - 32) * (1 - mean) ** 2) / (n - 1)) ** 0.5
    assert (every / 2**0.5).tolist() == pytest.approx([mean, mean - 3 * deviation])
    assert every[1] < 0.5 * pairs[1]


@on_one_thread
def test_loss_gradcheck():
    """In the structure; the centres move with the embeddings, whose differences are therefore no measure of theirs."""
    e = clustered(6, 4)
    torch.autograd.gradcheck(lambda w: MultiClusterRankingLoss(3)(e, w), weights(6, 4).requires_grad_())


def test_the_embeddings_can_be_left_alone():
    e, w = clustered().requires_grad_(), weights(12, 6).requires_grad_()
    MultiClusterRankingLoss()(e.detach(), w).backward()
    assert e.grad is None
    assert w.grad.any()


def test_order_and_scale_of_rows_do_not_matter():
    e, w, loss = clustered(), weights(12, 6), MultiClusterRankingLoss(3)
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for x, y in ((e[rows], w[rows]), (e * normal(12, 1).exp(), w)):
        torch.testing.assert_close(loss(x, y), loss(e, w), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [0, 1])
def test_without_a_pair_the_loss_is_zero(n, dtype):
    value, g_e, g_w = gradients(MultiClusterRankingLoss(), normal(n, 4, dtype=dtype), weights(n, 4, dtype=dtype))
    assert value.shape == ()
    assert value.item() == 0
    assert g_e.shape == g_w.shape == (n, 4)
    assert not g_e.any()
    assert not g_w.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("row", [[1.0, 0.0, 0.0], [0.3, -2.0, 0.7], [0.0, 0.0, 0.0]])
def test_equal_rows_are_finite(dtype, row):
    e = torch.tensor([row] * 5, dtype=dtype, device=DEVICE)
    value, g_e, g_w = gradients(MultiClusterRankingLoss(), e, weights(5, 3, dtype=dtype))
    assert 0 <= value.item() < 2e-3
    assert g_e.abs().max() < 0.1
    assert g_w.abs().max() < 0.1


def test_two_rows_have_one_centre():
    """One distance, no spread: the loss is how far the structure takes it from there."""
    e, w = normal(2, 4), weights(2, 4)
    plain = literal_distances(e, torch.ones_like(e), e).sqrt()[0, 1]
    expected = off_diagonal((literal_distances(e, w, e).sqrt() - plain).abs()).mean()
    torch.testing.assert_close(MultiClusterRankingLoss(4)(e, w), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("structure", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_are_in_float32_or_float64(dtype, structure):
    e, w = clustered().to(dtype), weights(12, 6, dtype=structure)
    value, g_e, g_w = gradients(MultiClusterRankingLoss(), e, w)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (g_e.dtype, g_w.dtype) == (dtype, structure)
    expected = literal_loss(e.double(), w.double(), literal_centres(e.double()))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0)


def test_autocast_changes_nothing():
    e, w = clustered().float(), weights(12, 6).float()
    value, g_e, g_w = gradients(MultiClusterRankingLoss(), e, w)
    e, w = e.requires_grad_(), w.requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        cast = MultiClusterRankingLoss()(e, w)
    assert torch.equal(cast, value)
    for got, expected in zip(torch.autograd.grad(cast, [e, w]), (g_e, g_w), strict=True):
        assert torch.equal(got, expected)


def test_same_bits_with_any_number_of_threads():
    e, w = normal(300, 33, dtype=torch.float32), weights(300, 33, dtype=torch.float32)
    results = []
    for count in (1, 2, 2):
        with threads(count):
            results.append(gradients(MultiClusterRankingLoss(), e, w))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_loss_is_one_graph_to_the_compiler():
    e, w = clustered().float(), weights(12, 6).float()
    loss = MultiClusterRankingLoss(3)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(e, w), loss(e, w))


def test_no_tensor_of_pairs_times_coordinates():
    n, d, clusters = 64, 128, 3
    e = normal(n, d, dtype=torch.float32).requires_grad_()
    w = weights(n, d, dtype=torch.float32).requires_grad_()
    with Largest() as largest:
        MultiClusterRankingLoss(clusters)(e, w).backward()
    assert largest.elements == n * n * clusters
    with Largest() as largest:
        adaptive_distance(e, w, normal(n, d, dtype=torch.float32)).sum().backward()
    assert largest.elements == n * d


# --- Rankings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gathered", [1, 300, 1 << 24])
def test_rerank_of_all_candidates_is_the_full_ranking(gathered, monkeypatch):
    """However few rows are gathered at once."""
    monkeypatch.setattr(module, "_GATHERED", gathered)
    e, w, g = normal(9, 5), weights(9, 5), 2 * normal(20, 5, seed=1)
    ranked = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i)) for i in range(9)]).to(DEVICE)
    full = literal_distances(e, w, g).argsort(1)
    assert torch.equal(structure_rerank(e, w, g, ranked), full)
    assert torch.equal(full, adaptive_distance(e, w, g).argsort(1))
    plain = structure_rerank(e, torch.ones_like(w), g, ranked)
    assert torch.equal(plain, torch.cdist(F.normalize(e, dim=-1), F.normalize(g, dim=-1)).argsort(1))
    assert not torch.equal(plain, full)


def test_rerank_keeps_the_candidates():
    e, w, g = normal(9, 5), weights(9, 5), normal(20, 5, seed=1)
    ranked = normal(9, 20, seed=2).argsort(1)[:, :6]
    before = ranked.clone()
    got = structure_rerank(e, w, g, ranked)
    assert torch.equal(ranked, before)
    assert torch.equal(got.sort(1).values, ranked.sort(1).values)
    d = adaptive_distance(e, w, g).gather(1, got)
    assert (d[:, 1:] >= d[:, :-1]).all()


def test_rerank_keeps_ties_in_order_and_puts_absent_ones_last():
    e = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=DEVICE)
    g = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], device=DEVICE)
    ranked = torch.tensor([[2, -1, 0, 3, 1], [3, 1, 2, -1, 0]], device=DEVICE)
    expected = torch.tensor([[3, 1, 2, 0, -1], [2, 0, 3, 1, -1]], device=DEVICE)
    assert torch.equal(structure_rerank(e, torch.ones_like(e), g, ranked), expected)
    many = torch.randperm(400, generator=torch.Generator().manual_seed(0)).to(DEVICE)[None]
    far, near = many[many % 2 == 0], many[many % 2 == 1]
    got = structure_rerank(e[:1], torch.ones_like(e[:1]), g.repeat(100, 1), many)
    assert torch.equal(got[0], torch.cat([near, far]))


def test_rerank_keeps_nothing_for_a_gradient():
    e, w, g = (x.requires_grad_() for x in (normal(3, 5), weights(3, 5), normal(6, 5, seed=1)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        structure_rerank(e, w, g, torch.arange(6, device=DEVICE).expand(3, 6))
    assert kept == []


@pytest.mark.parametrize("dtype", INTEGERS)
def test_rerank_takes_and_returns_any_integer_dtype(dtype):
    e, w, g = normal(3, 5), weights(3, 5), normal(6, 5, seed=1)
    ranked = torch.arange(6, device=DEVICE).expand(3, 6).to(dtype)
    got = structure_rerank(e, w, g, ranked)
    assert got.dtype == dtype
    assert torch.equal(got.long(), literal_distances(e, w, g).argsort(1))


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 0, 2), (3, 4, 0)])
def test_rerank_of_nothing(shape):
    q, g, k = shape
    ranked = torch.full((q, k), -1, device=DEVICE)
    e, w = normal(q, 5).requires_grad_(), weights(q, 5)
    got = structure_rerank(e, w, normal(g, 5), ranked)
    assert torch.equal(got, ranked)
    assert got.data_ptr() != ranked.data_ptr() or got.numel() == 0


def test_concatenated_vectors_rank_alike_by_inner_product():
    e, w, g = normal(9, 5), weights(9, 5), 2 * normal(20, 5, seed=1)
    queries, gallery = concatenated_queries(e, w), concatenated_gallery(g)
    assert queries.shape == (9, 10)
    assert gallery.shape == (20, 10)
    own = (w * F.normalize(e, dim=-1).square()).sum(1, keepdim=True)
    torch.testing.assert_close(own - queries @ gallery.T, literal_distances(e, w, g), rtol=1e-12, atol=1e-14)


def test_one_more_coordinate_ranks_alike_in_a_plain_l2_index():
    """As the documentation says."""
    e, w, g = normal(9, 5), weights(9, 5), 2 * normal(20, 5, seed=1)
    queries, gallery = concatenated_queries(e, w), concatenated_gallery(g)
    full = literal_distances(e, w, g).argsort(1)
    assert not torch.equal(torch.cdist(queries, gallery).argsort(1), full)
    filled = (2 - gallery.square().sum(1, keepdim=True)).sqrt()
    l2 = torch.cdist(F.pad(queries, (0, 1)), torch.cat([gallery, filled], dim=1))
    assert torch.equal(l2.argsort(1), full)


def test_concatenated_vectors_in_faiss():
    faiss = pytest.importorskip("faiss")
    e, w, g = (x.float() for x in (normal(9, 16), weights(9, 16), normal(50, 16, seed=1)))
    index = faiss.IndexFlatIP(32)
    index.add(concatenated_gallery(g).cpu().numpy())
    _, found = index.search(concatenated_queries(e, w).cpu().numpy(), 50)
    assert torch.equal(torch.from_numpy(found).to(DEVICE), literal_distances(e, w, g).argsort(1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rankings_of_any_dtype(dtype):
    e, w, g = normal(4, 5, dtype=dtype), weights(4, 5, dtype=dtype), normal(7, 5, seed=1, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = literal_distances(e.to(wide), w.to(wide), g.to(wide)).sqrt()
    for result in (concatenated_queries(e, w), concatenated_gallery(g), adaptive_distance(e, w, g)):
        assert result.dtype == wide
    torch.testing.assert_close(adaptive_distance(e, w, g), expected)
    ranked = torch.arange(7, device=DEVICE).expand(4, 7)
    assert torch.equal(structure_rerank(e, w, g, ranked), expected.argsort(1))


# --- Errors -----------------------------------------------------------------------------------------------------------

E, W, G = (torch.ones(n, 4, device=DEVICE) for n in (8, 8, 5))
RANKED = torch.zeros(8, 3, dtype=torch.int64, device=DEVICE)
HERE = r"Expected all tensors to be on the same device"


@pytest.mark.parametrize(
    ("e", "w", "error", "message"),
    [
        (E[0], W[0], ValueError, r"{e} has shape \(4,\); \(rows, dim\) is accepted"),
        (E, W[0], ValueError, r"{w} has shape \(4,\); \(rows, dim\) is accepted"),
        (E, W[:7], ValueError, r"{w} has shape \(7, 4\); {e} has \(8, 4\)"),
        (E, W[:, :3], ValueError, r"{w} has shape \(8, 3\); {e} has \(8, 4\)"),
        (E[:, :0], W[:, :0], ValueError, r"{e} has shape \(n, 0\); a dimension of at least 1 is accepted"),
        (E.int(), W, TypeError, r"{e} has dtype torch.int32; float32, float64, bfloat16 or float16 is accepted"),
        (E, W.int(), TypeError, r"{w} has dtype torch.int32; float32, float64, bfloat16 or float16 is accepted"),
        (E, None, TypeError, r"{w} is a NoneType; a tensor of"),
        (E, W.to("meta"), RuntimeError, HERE),
    ],
)
def test_bad_embeddings_or_structure_are_refused(e, w, error, message):
    with pytest.raises(error, match=message.format(e="embeddings", w="structure")):
        MultiClusterRankingLoss()(e, w)
    message = message.format(e="query_embeddings", w="query_structure")
    for call in (
        lambda: adaptive_distance(e, w, G),
        lambda: structure_rerank(e, w, G, RANKED),
        lambda: concatenated_queries(e, w),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("gallery", "error", "message"),
    [
        (G[0], ValueError, r"gallery has shape \(4,\); \(rows, dim\) is accepted"),
        (G[:, :3], ValueError, r"gallery has shape \(5, 3\); query_embeddings has dimension 4"),
        (G.double(), TypeError, r"query_embeddings has dtype torch.float32 and gallery torch.float64; one dtype"),
        (G.to("meta"), RuntimeError, HERE),
    ],
)
def test_a_bad_gallery_is_refused(gallery, error, message):
    for call in (lambda: adaptive_distance(E, W, gallery), lambda: structure_rerank(E, W, gallery, RANKED)):
        with pytest.raises(error, match=message):
            call()


def test_a_bad_gallery_is_not_concatenated():
    with pytest.raises(ValueError, match=r"gallery has shape \(4,\); \(rows, dim\) is accepted"):
        concatenated_gallery(G[0])
    with pytest.raises(TypeError, match=r"gallery has dtype torch.int32"):
        concatenated_gallery(G.int())


ROWS_ARE_CHECKED = host_only("elsewhere nothing waits to find out")


@pytest.mark.parametrize(
    ("ranked", "error", "message"),
    [
        (RANKED.float(), TypeError, r"ranked has dtype torch.float32; an integer dtype is accepted"),
        (RANKED.cpu().numpy(), TypeError, r"ranked is a ndarray; a tensor of an integer dtype is accepted"),
        (RANKED[0], ValueError, r"ranked has shape \(3,\); \(8, k\), a row per query, is accepted"),
        (RANKED[:7], ValueError, r"ranked has shape \(7, 3\); \(8, k\), a row per query, is accepted"),
        pytest.param(RANKED + 5, IndexError, r"ranked\[0, 0\] is 5; gallery has 5 rows", marks=ROWS_ARE_CHECKED),
        pytest.param(RANKED - 2, IndexError, r"ranked\[0, 0\] is -2; gallery has 5 rows", marks=ROWS_ARE_CHECKED),
        (RANKED.to("meta"), RuntimeError, HERE),
    ],
)
def test_bad_candidates_are_refused(ranked, error, message):
    with pytest.raises(error, match=message):
        structure_rerank(E, W, G, ranked)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"clusters": 1}, ValueError, r"clusters is 1; at least 2 is accepted"),
        ({"clusters": 2.0}, TypeError, r"clusters is a float; an int is accepted"),
        ({"clusters": True}, TypeError, r"clusters is a bool; an int is accepted"),
        ({"over": "none"}, ValueError, r"over is 'none'; 'pairs', 'all' are accepted"),
        ({"scale": 0}, ValueError, r"scale is 0; a positive finite number is accepted"),
        ({"scale": math.inf}, ValueError, r"scale is inf; a positive finite number is accepted"),
        ({"spread": -1}, ValueError, r"spread is -1; a positive finite number is accepted"),
        ({"spread": math.nan}, ValueError, r"spread is nan; a positive finite number is accepted"),
    ],
)
def test_bad_parameters_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        MultiClusterRankingLoss(**kwargs)


def test_the_head_refuses_what_it_was_not_made_for():
    for kwargs, name in (({"dim": 0}, "dim"), ({"dim": 3, "out": 0}, "out")):
        with pytest.raises(ValueError, match=f"{name} is 0; at least 1 is accepted"):
            StructureHead(**kwargs)
    head = StructureHead(5).to(DEVICE)
    with pytest.raises(ValueError, match=r"x has shape \(8, 4\); \(rows, 5\) is accepted"):
        head(E)
    with pytest.raises(TypeError, match=r"x has dtype torch.int32; float32, float64, bfloat16 or float16 is accepted"):
        head(E.int())
    with pytest.raises(RuntimeError, match=HERE):
        head(torch.zeros(2, 5, device="meta"))


def test_the_parameters_are_shown():
    assert repr(MultiClusterRankingLoss(over="all")).endswith("spread=3.0, over='all')")
    assert repr(MultiClusterRankingLoss(3)) == "MultiClusterRankingLoss(clusters=3, scale=10.0, spread=3.0)"


def test_what_has_no_distance_comes_after_what_has_one_and_before_nothing():
    gallery = make_features(7, 6)
    gallery[3] = math.nan
    ranked = torch.tensor([[-1, 3, 1, 2, -1, 5]], device=DEVICE)
    ones = torch.ones(1, 6, device=DEVICE)
    found = pddm_ext.structure_rerank(gallery[5:6], ones, gallery, ranked)[0].tolist()
    assert found[0] == 5
    assert set(found[1:3]) == {1, 2}
    assert found[3:] == [3, -1, -1]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="values are looked at where that waits for nothing")
def test_negative_weights_are_refused():
    feats = make_features(4, 6)
    negative = torch.ones(4, 6)
    negative[2, 1] = -0.25
    negative[3, 1] = torch.nan
    message = "structure has a negative weight, -0.25; weights from 0 are accepted"
    for call in (
        lambda: pddm_ext.adaptive_distance(feats, negative, feats),
        lambda: pddm_ext.structure_rerank(feats, negative, feats, torch.zeros(4, 1, dtype=torch.int64)),
        lambda: pddm_ext.MultiClusterRankingLoss()(feats, negative),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_distances_survive_among_rows_that_are_nearly_equal():
    """They are all 1e-4 of their length apart, where norms and products alone would leave rounding errors."""
    random = torch.Generator().manual_seed(0)
    feats = torch.ones(30, 16, dtype=torch.float64) + 1e-4 * torch.randn(30, 16, generator=random, dtype=torch.float64)
    structure = 0.5 + torch.rand(30, 16, generator=random, dtype=torch.float64)
    rows, weights = feats.float().to(DEVICE), structure.float().to(DEVICE)
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    exact = (weights.double()[:, None] * (unit[:, None] - unit).square()).sum(-1).sqrt()
    found = pddm_ext.adaptive_distance(rows, weights, rows).double()
    apart = ~torch.eye(30, dtype=torch.bool, device=DEVICE)
    # Unit rows of float32 are themselves only known to 6e-8 an entry, of differences of 3e-5.
    assert ((found - exact).abs() / exact)[apart].max() < 0.02


@pytest.mark.skipif(DEVICE.type != "cpu", reason="compiled once, where it is quick")
def test_reranking_compiles_to_one_graph():
    feats, structure = make_features(9, 6), torch.rand(9, 6, generator=torch.Generator().manual_seed(0))
    ranked = torch.randint(0, 9, (9, 4), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(pddm_ext.structure_rerank, fullgraph=True, backend="eager")
    expected = pddm_ext.structure_rerank(feats, structure, feats, ranked)
    assert torch.equal(compiled(feats, structure, feats, ranked), expected)


def test_gallery_vectors_need_a_dimension():
    with pytest.raises(ValueError, match=r"gallery has shape \(n, 0\); a dimension of at least 1 is accepted"):
        pddm_ext.concatenated_gallery(make_features(7, 6)[:, :0])


@pytest.mark.parametrize("value", ["a", True, None])
def test_parameters_that_are_no_numbers_are_named(value):
    for make, name in (
        (lambda: pddm_ext.StructureHead(value), "dim"),
        (lambda: pddm_ext.MultiClusterRankingLoss(scale=value), "scale"),
        (lambda: pddm_ext.MultiClusterRankingLoss(clusters=value), "clusters"),
        (lambda: pddm_ext.DensityRegularizer(ratio=value), "ratio"),
    ):
        with pytest.raises(TypeError, match=f"{name} is a {type(value).__name__}; "):
            make()
