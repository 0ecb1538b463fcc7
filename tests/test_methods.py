"""The methods: what each mines, that each trains, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pddm_ext
from pddm_ext.workbench.data.splits import Dataset
from pddm_ext.workbench.learner import Learner
from pddm_ext.workbench.loop import Run
from pddm_ext.workbench.methods import mine_by_distance, objective
from pddm_ext.workbench.model import embedder
from pddm_ext.workbench.settings import METHODS, PROXIES, Settings
from processes import in_two_processes
from runs import TINY, differences, pictures_of, trained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mode", ["batch", "anchor", "pair"])
def test_mining_by_distance_finds_the_farthest_positive_and_the_nearest_negatives(mode: Any) -> None:
    feats = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 3
    quads = mine_by_distance(feats, labels, mode)
    unit = torch.nn.functional.normalize(feats.double(), dim=1)
    distance = torch.cdist(unit, unit)
    for i, j, k, l in zip(*(field.tolist() for field in quads[:4]), strict=True):  # noqa: E741
        others = labels != labels[i]
        assert k == distance[i].masked_fill(~others, torch.inf).argmin()
        assert l == distance[j].masked_fill(~others, torch.inf).argmin()
        if mode == "anchor":
            assert j == distance[i].masked_fill(others, -torch.inf).argmax()
    assert len(quads.i) == {"batch": 1, "anchor": 12, "pair": 18}[mode]


def test_a_unit_that_starts_by_distance_ranks_by_it() -> None:
    made = objective(Settings(method="pddm-pair", dim=16, unit_start="distance"), 8)
    assert made.unit is not None
    feats = torch.nn.functional.normalize(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    i, j = torch.triu_indices(60, 60, 1)
    scores, distances = pddm_ext.score_matrix(feats, made.unit)[i, j].detach(), torch.cdist(feats, feats)[i, j]
    ranks = torch.stack([scores.argsort().argsort(), distances.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] < -0.9
    assert scores[distances.argmin()] > scores[distances.argmax()]


def test_first_updates_can_be_mined_by_distance(tiny: Dataset) -> None:
    made = objective(Settings(method="pddm-anchor", dim=8, distance_steps=1, accumulate=2), 8)
    feats, labels = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4).repeat(3)
    mined = []
    made.loss.similarity = lambda quads: (mined.append(quads), quads.s_ij.sum())[1]  # type: ignore[method-assign]
    for _ in range(3):  # two batches of the first update, and one of the second
        made(feats, labels, torch.arange(12))
    by_distance, by_score = mine_by_distance(feats, labels, "anchor"), made.mine(feats, labels)
    assert not all(torch.equal(one, other) for one, other in zip(by_distance[:4], by_score[:4], strict=True))
    for quads, expected in zip(mined, (by_distance, by_distance, by_score), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(quads[:4], expected[:4], strict=True))
        scores = pddm_ext.score_pairs(feats, quads.i, quads.j, made.unit)
        torch.testing.assert_close(quads.s_ij, scores)
        torch.testing.assert_close(quads.s_jl, pddm_ext.score_pairs(feats, quads.j, quads.l, made.unit))


def test_a_unit_can_score_the_nearest_alone() -> None:
    feats, labels = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4).repeat(3)
    mined = {count: objective(Settings(method="pddm-pair", dim=8, candidates=count), 8) for count in (0, 2, 40)}
    quads = {count: made.mine(feats, labels) for count, made in mined.items()}
    expected = pddm_ext.mine_and_score(feats, labels, mined[2].unit, mode="pair", candidates=2)
    assert all(torch.equal(one, other) for one, other in zip(quads[2], expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(quads[0], quads[40], strict=True))
    assert not torch.equal(quads[0].k, quads[2].k)


@pytest.mark.parametrize("method", ["pddm-anchor", "pddm-batch", "joint"])
def test_a_bank_holds_what_went_before(method: str) -> None:
    made = objective(Settings(method=method, dim=8, classes=4, samples=3, bank=20), 8)
    generator = torch.Generator().manual_seed(0)
    labels, seen = torch.arange(4).repeat(3), []
    made.NOISE = 0.0  # of `joint`
    made.loss.similarity = lambda quads: (seen.append(quads), quads.s_ij.sum())[1]  # type: ignore[method-assign]
    batches = [(torch.randn(12, 8, generator=generator), torch.randperm(40, generator=generator)[:12]) for _ in "123"]
    for feats, rows in batches:
        terms = made(feats, labels, rows)
    assert made.bank is not None
    assert sorted(made.bank.ids.tolist()) == sorted(torch.cat([rows for _, rows in batches])[-20:].tolist())
    quads, given = seen[-1], made.bank.references()
    feats = batches[-1][0]
    expected = pddm_ext.mine_and_score(feats, labels, made.unit, mode=made.mode, ids=batches[-1][1], **given)
    for one, other in zip(quads, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert (made.bank.ids[quads.j] != batches[-1][1][quads.i])[quads.valid].all()
    if method == "pddm-anchor":
        loss = made.loss.embedding(feats, expected, ref_feats=made.bank.feats)
        torch.testing.assert_close(made.loss.weight * loss, terms["embedding"])


def _one_of_two(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    kept: dict[str, Any] = {}
    for gather in (False, True):
        torch.manual_seed(0)
        settings = Settings(**TINY, method="pddm-anchor", devices=2, gather=gather, bank=30)
        net = embedder(settings, (1, 64, 64))
        learner = DistributedDataParallel(Learner(net, objective(settings, 8), settings))
        generator = torch.Generator().manual_seed(rank)
        for _ in range(3):
            rows = torch.randperm(40, generator=generator)[:12]
            terms = learner(torch.rand(12, 1, 64, 64, generator=generator), torch.arange(4).repeat(3), rows)
            torch.stack(list(terms.values())).sum().backward()
        # What mines by distance has nothing to gather, and mines its own batch.
        feats = torch.randn(12, 8, generator=generator, requires_grad=True)
        alone = objective(Settings(method="euclidean-anchor", dim=8, devices=2, gather=gather), 8)
        alone(feats, torch.arange(4).repeat(3), rows)["embedding"].backward()
        kept[str(gather)] = {
            "by distance": feats.grad,
            "bank": learner.module.objective.bank.state_dict(),
            "ids": rows,
            "grad": learner.module.unit.u.weight.grad,
        }
    torch.save(kept, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_have_one_bank(tmp_path: Path) -> None:
    """Of the batches of all, whether they mine together or not."""
    one, two = in_two_processes(_one_of_two, tmp_path, preload="pddm_ext.workbench.loop")
    for each in (one, two):
        assert not differences(each["True"]["by distance"], each["False"]["by distance"])
    for gather in ("False", "True"):
        assert not differences(one[gather]["bank"], two[gather]["bank"])
        assert len(one[gather]["bank"]["ring_ids"]) == 30
        for each in (one, two):
            assert set(each[gather]["ids"].tolist()) <= set(one[gather]["bank"]["ring_ids"].tolist())
        torch.testing.assert_close(one[gather]["grad"], two[gather]["grad"])
        assert one[gather]["grad"].abs().sum() > 0


def test_processes_that_gather_mine_with_all() -> None:
    feats, labels = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4).repeat(3)
    alone, together = (
        objective(Settings(method="pddm-pair", dim=8, devices=2, gather=gather), 8) for gather in (False, True)
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        terms = [
            {name: term.detach() for name, term in made(feats, labels, torch.arange(12)).items()}
            for made in (alone, together)
        ]
        assert (alone.loss.group, together.loss.group) == (None, dist.group.WORLD)
        together.mine(feats, labels)  # what a report looks at is the leading process's alone
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*terms)


@pytest.mark.parametrize("flows", [True, False])
def test_the_score_loss_trains_the_embedding_only_if_asked(flows: bool) -> None:
    made = objective(Settings(method="pddm-pair", dim=8, unit_gradient=flows), 8)
    feats = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    terms = made(feats, torch.arange(4).repeat(3), torch.arange(12))
    assert terms["score"] > 0
    terms["score"].backward()
    assert (feats.grad is not None and feats.grad.abs().sum() > 0) == flows
    assert made.unit.u.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        *((method, {}) for method in METHODS),
        *((method, {"density": 0.1, "structure": 0.3}) for method in ("pddm-anchor", "multi-similarity")),
    ],
)
def test_each_method_trains(tiny: Dataset, method: str, terms: dict[str, Any]) -> None:
    """Every parameter moves, and on a fixed batch the loss comes down."""
    run = Run(Settings(**TINY, method=method, lr=3e-3, **terms), tiny)
    assert (run.learner.unit is not None) == (method.startswith("pddm-") or method in ("joint", "recommended"))
    before = {name: value.clone() for name, value in run.learner.named_parameters()}
    pictures, labels = pictures_of(tiny)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)  # the same noise, where a method has some
        loss = sum(run.learner(pictures, labels, torch.arange(len(labels))).values())
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in run.learner.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("fitted."), name  # whose time is yet to come


@pytest.mark.parametrize("method", ["euclidean-anchor", "multi-similarity"])
def test_density_and_structure_are_terms_beside_any_loss(tiny: Dataset, method: str) -> None:
    common = {**TINY, "method": method}
    plain, both = (
        Run(Settings(**common, **more), tiny).learner
        for more in ({}, {"density": 0.1, "density_ratio": 0.7, "structure": 0.3, "clusters": 3})
    )
    pictures, labels = pictures_of(tiny)
    rows = torch.arange(len(labels))
    terms, bare = both(pictures, labels, rows), plain(pictures, labels, rows)
    feats, structure = both.net.both(pictures)
    assert structure is not None
    expected = {
        **bare,
        "density": 0.1 * pddm_ext.DensityRegularizer(0.7)(feats, labels),
        "structure": 0.3 * pddm_ext.MultiClusterRankingLoss(3)(feats, structure),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    assert plain.net.both(pictures)[1] is None
    assert {name for name, _ in both.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        "net.structure.linear.weight",
        "net.structure.linear.bias",
    }


@pytest.mark.parametrize("method", METHODS)
def test_divergence_of_any_method_is_said(tiny: Dataset, method: str) -> None:
    with pytest.raises(FloatingPointError, match="embedding is not finite after 2 steps"):
        trained(tiny, method=method, lr=1e30, proxy_lr_factor=1.0)


def test_every_method_starts_from_the_same_net_and_torchs_generator_is_left_alone(tiny: Dataset) -> None:
    before = torch.random.get_rng_state()
    nets = [Run(Settings(**TINY, method=method), tiny).learner.net.state_dict() for method in METHODS]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(not differences(nets[0], net) for net in nets)
    units = [objective(Settings(**TINY, method=method), 8).state_dict() for method in METHODS if "pddm" in method]
    assert all(not differences(units[0], unit) for unit in units)
    other = Run(Settings(**TINY, seed=1), tiny).learner.net.state_dict()
    assert "/backbone.0.weight" in differences(nets[0], other)


@pytest.mark.parametrize(
    ("changed", "rates"),
    [
        ({"method": "pddm-pair", "unit_lr_factor": 5.0}, {"head": 0.01, "backbone": 0.01, "objective": 0.05}),
        ({"method": "n-pair", "backbone_lr_factor": 0.1}, {"head": 0.01, "backbone": 0.001}),
        ({"method": "n-pair", "structure": 0.3}, {"head": 0.01, "structure": 0.01, "backbone": 0.01}),
        ({"method": "norm-softmax", "unit_lr_factor": 5.0}, {"head": 0.01, "backbone": 0.01, "objective": 1.0}),
        ({"method": "proxy-anchor", "proxy_lr_factor": 3.0}, {"head": 0.01, "backbone": 0.01, "objective": 0.03}),
        ({"method": "joint", "freeze": True}, {"head": 0.01, "objective": 0.01}),
    ],
)
def test_each_part_has_its_learning_rate(tiny: Dataset, changed: dict[str, Any], rates: dict[str, float]) -> None:
    """And every parameter that trains is in one group."""
    run = Run(Settings(**TINY, lr=0.01, weight_decay=0.25, **changed), tiny)
    of = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {group["weight_decay"] for group in run.optimizer.param_groups} == {0.25}
    assert len(of) == sum(len(group["params"]) for group in run.optimizer.param_groups)
    found: dict[str, set[float]] = {}
    for name, parameter in run.learner.named_parameters():
        part = name.removeprefix("net.").partition(".")[0]
        if parameter.requires_grad:
            found.setdefault(part, set()).add(round(of[id(parameter)], 9))
        else:
            assert part == "backbone"
            assert changed["freeze"]
            assert id(parameter) not in of
    assert found == {part: {rate} for part, rate in rates.items()}


@pytest.mark.parametrize("method", PROXIES)
def test_proxies_depend_on_the_seed_and_their_number_alone(tiny: Dataset, method: str) -> None:
    one, same, other = (
        objective(Settings(**TINY, method=method, seed=seed, lr=lr), 8).state_dict()
        for seed, lr in ((1, 0.1), (1, 0.2), (2, 0.1))
    )
    assert not differences(one, same)
    assert differences(one, other)
    fewer = Run(Settings(**TINY, method=method), tiny.validation(0)).learner.objective
    (proxies,) = fewer.parameters()
    assert proxies.numel() == 5 * TINY["dim"] * (3 if method == "sub-center-arcface" else 1)
