"""The page on loops of one's own over several processes: its code takes the steps of one process with both batches."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_docs import ROOT, blocks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pddm_ext
from helpers import host_only
from processes import in_two_processes

pytestmark = host_only("gloo and small CPU tensors")

PAGE = ROOT / "docs" / "distributed.md"


def page() -> dict[str, Any]:
    """The names that the page's blocks define, in the order of the page."""
    names: dict[str, Any] = {}
    for code in blocks(PAGE):
        exec(code, names)
    return names


def parts(seed: int = 0) -> tuple[nn.Module, pddm_ext.PDDM]:
    torch.manual_seed(seed)
    return nn.Linear(12, 8), pddm_ext.PDDM(8)


def batches(rank: int, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randn(24, 12, generator=generator), torch.arange(6).repeat_interleave(4)) for _ in range(count)]


def state(*modules: nn.Module) -> dict[str, Tensor]:
    return {f"{k}.{name}": p.detach().clone() for k, m in enumerate(modules) for name, p in m.state_dict().items()}


def message(call: Any) -> str:
    with pytest.raises(TypeError) as error:
        call()
    return str(error.value)


def as_one_of_two(rank: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    try:
        names = page()
        results: dict[str, Any] = {}

        net, unit = parts()
        learner = names["Learner"](net, 8)
        learner.unit = unit
        names["train"](DistributedDataParallel(learner), batches(rank))
        results["one module"] = state(net, unit)

        net, _ = parts()
        unit = parts(rank)[1] if rank == 0 else pddm_ext.PDDM(8)  # of its own until rank 0's comes
        names["train_beside"](DistributedDataParallel(net), unit, batches(rank))
        results["beside"] = state(net, unit)

        net, unit = parts()
        learner = names["Together"](net, 8, dist.group.WORLD)
        learner.unit = unit
        names["train"](DistributedDataParallel(learner), batches(rank))
        results["together"] = state(net, unit)

        net, unit = parts()
        wrapped = DistributedDataParallel(unit)
        ((images, labels),) = batches(rank, 1)
        feats = net(images)
        pddm_ext.QuadrupletLoss()(feats, wrapped.module.mine(feats, labels, mode="pair")).backward()
        results["wrong"] = {name: p.grad for name, p in unit.named_parameters()}

        net, unit = parts()
        feats = net(images)
        alone = unit.mine(feats, labels, mode="anchor")
        shards = parts()[1]
        names["fully_shard"](shards)
        results["refusals"] = [
            message(lambda: shards.mine(feats, labels)),
            message(lambda: pddm_ext.score_matrix(feats, shards)),
            message(lambda: pddm_ext.topk(feats, feats, 2, shards)),
            message(lambda: pddm_ext.score_pairs(feats, labels, labels, shards)),
            message(lambda: pddm_ext.reference.mine_and_score(feats, labels, shards)),
        ]
        sharded = names["sharded"](parts()[1])
        mined = sharded.mine(feats, labels, mode="anchor")
        again = pddm_ext.mine_and_score(feats, labels, sharded, mode="anchor")
        results["sharded"] = all(
            torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(alone, mined, again, strict=True)
        )
        sharded.unshard()
        results["unsharded"] = torch.equal(pddm_ext.score_matrix(feats, sharded), pddm_ext.score_matrix(feats, unit))
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two_processes(as_one_of_two, tmp_path_factory.mktemp("two"), preload="torch.distributed.fsdp")


def as_one() -> dict[str, Tensor]:
    """One process, whose loss is the mean of both batches' losses."""
    net, unit = parts()
    loss_fn = pddm_ext.QuadrupletLoss()
    optimizer = torch.optim.SGD([*net.parameters(), *unit.parameters()], lr=0.1)
    for both in zip(batches(0), batches(1), strict=True):
        optimizer.zero_grad()
        for images, labels in both:
            feats = net(images)
            (loss_fn(feats, unit.mine(feats, labels, mode="pair")) / 2).backward()
        optimizer.step()
    return state(net, unit)


@pytest.mark.parametrize("route", ["one module", "beside"])
def test_both_routes_take_the_steps_of_one_process(two_processes, route):
    expected = as_one()
    start = state(*parts())
    for results in two_processes:
        torch.testing.assert_close(results[route], expected, rtol=1e-5, atol=1e-6)
    for name in expected.keys() - {"1.s.bias"}:  # whose gradient is 0 but for rounding
        assert (expected[name] - start[name]).abs().max() > 1e-5, name


def test_together_they_take_the_steps_of_one_process_with_the_whole_batch(two_processes):
    net, unit = parts()
    learner = page()["Together"](net, 8)
    learner.unit = unit
    page()["train"](
        learner, [tuple(map(torch.cat, zip(*both, strict=True))) for both in zip(batches(0), batches(1), strict=True)]
    )
    expected = state(net, unit)
    for results in two_processes:
        torch.testing.assert_close(results["together"], expected, rtol=1e-5, atol=1e-6)


def test_mining_behind_a_wrapper_is_as_wrong_as_the_page_says(two_processes):
    first, second = (results["wrong"]["u.weight"] for results in two_processes)
    assert (first - second).abs().max() > 1e-4


def test_a_sharded_unit_is_refused_with_the_way_out_and_then_works(two_processes):
    for results in two_processes:
        for refusal in results["refusals"]:
            assert "u.weight is a DTensor" in refusal
            assert "register_fsdp_forward_method(unit, 'mine')" in refusal
        assert results["sharded"]
        assert results["unsharded"]
