"""The batch of all processes: what they mine together is what one mines of the whole, and so are the gradients."""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pddm_ext
from helpers import MODES, assert_same_bits, counters, host_only, make_features, make_labels, make_unit, reset_counters
from pddm_ext import reference
from processes import in_processes, in_two_processes

pytestmark = host_only("gloo and small CPU tensors")

DIM = 6
#: Rows of each process: even, uneven, none, one, and with one whose rows are all of a class of their own.
SHARDS = {
    1: [(9,)],
    2: [(12, 12), (7, 16), (0, 11)],
    3: [(8, 8, 8), (0, 0, 0), (1, 0, 17)],
    4: [(16, 16, 16, 16), (3, 12, 0, 6)],
}


def batch(rows: int, *, alone: slice = slice(0, 0), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    labels = make_labels(rows, per_class=4)
    labels[alone] = torch.arange(1000, 1000 + rows)[alone]
    return make_features(rows, DIM, dtype=dtype), labels


def cases(world: int) -> list[tuple[tuple[int, ...], slice, int | None]]:
    """Shards, rows that have no partner, and the label that is no class."""
    own = [(shards, slice(0, 0), None) for shards in SHARDS[world]]
    first = SHARDS[world][0]
    return [*own, (first, slice(0, first[0]), None), (first, slice(0, 0), -3)]


def own_rows(shards: tuple[int, ...], rank: int) -> slice:
    return slice(sum(shards[:rank]), sum(shards[: rank + 1]))


def as_one_of(rank: int, world: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)
    pddm_ext.set_health_checks("ignore")
    try:
        results: dict[str, Any] = {}
        for case, (shards, alone, ignored) in enumerate(cases(world)):
            feats, labels = batch(sum(shards), alone=alone)
            own, unit = own_rows(shards, rank), make_unit(DIM)
            for mode in MODES:
                reset_counters()
                quads = unit.mine(feats[own], labels[own], mode=mode, ignore_label=ignored, group=dist.group.WORLD)
                scored = counters()["pairs_scored"]
                results[f"{case} {mode}"] = [*quads, torch.tensor(scored)]
                ids, among = references_of(sum(shards))
                reset_counters()
                given = {**among, "ids": ids[own], "group": dist.group.WORLD}
                quads = unit.mine(feats[own], labels[own], mode=mode, ignore_label=ignored, **given)
                scored = counters()["pairs_scored"]
                results[f"{case} {mode} among"] = [*quads, torch.tensor(scored)]
        shards = SHARDS[world][-1]
        feats, labels = batch(sum(shards))
        plain = reference.PDDM(DIM)
        plain.load_state_dict(make_unit(DIM).state_dict())
        own = own_rows(shards, rank)
        for mode in MODES:
            ids, among = references_of(sum(shards))
            quads = plain.mine(feats[own], labels[own], mode=mode, group=dist.group.WORLD)
            results[f"plain {mode}"] = [field.detach() for field in quads]
            quads = plain.mine(feats[own], labels[own], mode=mode, group=dist.group.WORLD, ids=ids[own], **among)
            results[f"plain {mode} among"] = [field.detach() for field in quads]
        results["gradients"] = gradients(rank, world)
        results["wrong"] = refused(rank, world)
        results["empty"] = with_an_empty_shard(rank, world)
        results["copies"] = copies()
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def references_of(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    """The numbers of a batch's samples, and references, some of which are samples of the batch."""
    labels = torch.cat([make_labels(rows)[: rows // 2], make_labels(20, seed=1)])
    feats = make_features(len(labels), DIM, seed=4, dtype=dtype)
    return torch.arange(rows), {"ref_feats": feats, "ref_labels": labels, "ref_ids": torch.arange(len(labels))}


def learner() -> tuple[nn.Module, pddm_ext.PDDM]:
    torch.manual_seed(0)
    return nn.Linear(DIM, DIM).double(), make_unit(DIM, 9, 7).double()


def gradients(rank: int, world: int) -> list[list[Tensor]]:
    """Of a net in DDP and a unit beside it, whose gradients are averaged; and the losses' mean."""
    found = []
    shards = SHARDS[world][-1]
    own = own_rows(shards, rank)
    feats, labels = batch(sum(shards), dtype=torch.float64)
    for mode in MODES:
        for reduction in ("mean", "sum"):
            net, unit = learner()
            loss_fn = pddm_ext.QuadrupletLoss(reduction=reduction, group=dist.group.WORLD)
            wrapped = DistributedDataParallel(net)
            out = wrapped(feats[own])
            loss = loss_fn(out, unit.mine(out, labels[own], mode=mode, group=dist.group.WORLD))
            loss.backward()
            value = loss.detach()
            for mean in (value, *(p.grad for p in unit.parameters())):
                dist.all_reduce(mean)
                mean /= world
            found.append([value, *(p.grad for p in (*net.parameters(), *unit.parameters()))])
        # References that learn, the same in every process, as the unit is.
        net, unit = learner()
        ids, among = references_of(sum(shards), torch.float64)
        among["ref_feats"].requires_grad_()
        wrapped = DistributedDataParallel(net)
        out = wrapped(feats[own])
        quads = unit.mine(out, labels[own], mode=mode, group=dist.group.WORLD, ids=ids[own], **among)
        loss_fn = pddm_ext.QuadrupletLoss(group=dist.group.WORLD)
        loss_fn(out, quads, ref_feats=among["ref_feats"]).backward()
        everywhere = [*unit.parameters(), among["ref_feats"]]
        for p in everywhere:
            dist.all_reduce(p.grad)
            p.grad /= world
        found.append([p.grad for p in (*net.parameters(), *everywhere)])
    return found


def with_an_empty_shard(rank: int, world: int) -> Tensor:
    """The gradient of process 0's rows, where the last process has none, and so none that ask for a gradient."""
    feats, labels = batch(8)
    x = feats.clone().requires_grad_() if rank == 0 or rank < world - 1 else torch.empty(0, DIM)
    quads = make_unit(DIM).mine(x, labels[: len(x)], mode="pair", group=dist.group.WORLD)
    pddm_ext.QuadrupletLoss(group=dist.group.WORLD)(x, quads).backward()
    return torch.zeros(8, DIM) if x.grad is None else x.grad


def copies() -> list[bool]:
    """Whether copies, deep or not, share the group, and what is pickled has none."""
    found = []
    for module in (pddm_ext.QuadrupletLoss(group=dist.group.WORLD), pddm_ext.MemoryBank(4, 3, group=dist.group.WORLD)):
        found += [copied(module).group is module.group for copied in (copy.copy, copy.deepcopy)]
        found.append(pickle.loads(pickle.dumps(module)).group is None)
    return found


def refused(rank: int, world: int) -> list[str]:
    feats, labels = batch(8)
    unit, told = make_unit(DIM), []
    last = world - 1
    group = dist.group.WORLD
    loss_fn = pddm_ext.QuadrupletLoss(group=group)
    with_regularizer = pddm_ext.QuadrupletLoss(group=group, regularizer=lambda x, y: x.sum() * 0)
    quads = unit.mine(feats, labels, group=group)
    calls = [
        lambda: unit.mine(feats[:, : DIM - (rank == last)], labels, group=group),
        lambda: unit.mine(feats.double() if rank == last and world > 1 else feats, labels, group=group),
        lambda: unit.mine(feats, labels, mode="pair" if rank == last and world > 1 else "batch", group=group),
        lambda: unit.mine(feats, labels.float() if rank == last else labels, group=group),
        lambda: unit.mine(feats, labels, candidates=3, group=group),
        lambda: unit.mine(feats, labels, ref_feats=feats, group=group),
        lambda: unit.mine(feats, labels, group="all"),
        lambda: pddm_ext.mine_and_score(feats, labels.float() if rank == last else labels, group=group),
        lambda: pddm_ext.mine_and_score(feats, labels, "unit" if rank == last else unit, group=group),
        lambda: loss_fn.similarity("quads" if rank == last else quads),
        lambda: with_regularizer(feats, quads, None if rank == last else labels),
        lambda: loss_fn(feats[1:] if rank == last else feats, quads),
        lambda: loss_fn(feats, quads, ref_feats=feats),
        lambda: unit.mine(
            feats, labels, ref_feats=feats[0, 0] if rank == last else feats, ref_labels=labels, group=group
        ),
    ]
    for call in calls:
        try:
            call()
            told.append("")
        except (ValueError, TypeError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def told(request, tmp_path_factory) -> tuple[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("group")
    return request.param, in_processes(as_one_of, request.param, folder, preload="pddm_ext")


@pytest.mark.parametrize("kind", ["", " among"])
def test_together_they_mine_what_one_process_mines_of_the_whole(told, kind):
    world, results = told
    for case, (shards, alone, ignored) in enumerate(cases(world)):
        feats, labels = batch(sum(shards), alone=alone)
        ids, among = references_of(sum(shards))
        given = {"ids": ids, **among} if kind else {}
        for mode in MODES:
            whole = make_unit(DIM).mine(feats, labels, mode=mode, ignore_label=ignored, **given)
            parts = [pddm_ext.Quadruplets(*result[f"{case} {mode}{kind}"][:8]) for result in results]
            if mode == "batch":
                kept = [part for part in parts if part.valid.any()] or parts[:1]
                assert len(kept) == 1
                assert_same_bits(kept[0], whole)
                owner = next((r for r, part in enumerate(parts) if part.valid.any()), None)
                assert owner is None or own_rows(shards, owner).start <= int(whole.i) < own_rows(shards, owner).stop
            else:
                together = [torch.cat(fields) for fields in zip(*parts, strict=True)]
                assert_same_bits(together, list(whole))


def test_the_reference_keeps_the_same_slots(told):
    world, results = told
    for result in results:
        for mode in MODES:
            for kind in ("", " among"):
                fused = result[f"{len(SHARDS[world]) - 1} {mode}{kind}"][:8]
                for a, b in zip(result[f"plain {mode}{kind}"], fused, strict=True):
                    torch.testing.assert_close(a, b.detach(), atol=1e-4, rtol=1e-4)


def test_each_scores_its_part_of_the_pairs(told):
    world, results = told
    for case, (shards, alone, ignored) in enumerate(cases(world)):
        n = sum(shards)
        for mode in ("anchor", "pair"):
            scored = [int(result[f"{case} {mode}"][8]) for result in results]
            assert sum(scored) == n * (n - 1) // 2 + n  # a square's diagonal is scored, too
            if shards == SHARDS[world][0] and n >= 64:
                assert max(scored) <= 1.1 * n * n / 2 / world
        labels = batch(n, alone=alone)[1]
        positives = int((labels[:, None] == labels).triu(1).sum()) if ignored is None else 0
        scored = [int(result[f"{case} batch"][8]) for result in results]
        if ignored is None:
            assert sum(scored) == (positives + 2 * n if positives else 0)
            assert max(scored) <= (positives + 2 * n) / world + 3
        for mode in ("anchor", "pair"):
            of = [result[f"{case} {mode} among"] for result in results]
            m = len(references_of(n)[1]["ref_labels"])
            distinct = len(torch.unique(torch.cat([quads[1][quads[7]] for quads in of])))
            # A positive without a negative of its own is compared, too, and then not valid.
            assert n * m + distinct * m <= sum(int(quads[8]) for quads in of) <= n * m + m * m


def test_gradients_and_loss_are_those_of_one_process_with_the_whole_batch(told):
    world, results = told
    shards = SHARDS[world][-1]
    feats, labels = batch(sum(shards), dtype=torch.float64)
    expected = []
    for mode in MODES:
        for reduction in ("mean", "sum"):
            net, unit = learner()
            out = net(feats)
            loss = pddm_ext.QuadrupletLoss(reduction=reduction)(out, unit.mine(out, labels, mode=mode))
            loss.backward()
            expected.append([loss.detach(), *(p.grad for p in (*net.parameters(), *unit.parameters()))])
        net, unit = learner()
        ids, among = references_of(sum(shards), torch.float64)
        out, others = net(feats), among["ref_feats"].requires_grad_()
        quads = unit.mine(out, labels, mode=mode, ids=ids, **among)
        pddm_ext.QuadrupletLoss()(out, quads, ref_feats=others).backward()
        expected.append([p.grad for p in (*net.parameters(), *unit.parameters(), others)])
    for result in results:
        for got, wanted in zip(result["gradients"], expected, strict=True):
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b)


def test_copies_share_the_group_and_pickles_have_none(told):
    assert all(result["copies"] == [True] * 6 for result in told[1])


def test_a_process_without_rows_takes_part_in_the_backward_pass(told):
    world, results = told
    rows = 8 * max(world - 1, 1)
    feats = batch(8)[0].repeat(rows // 8, 1).requires_grad_()
    labels = batch(8)[1].repeat(rows // 8)
    pddm_ext.QuadrupletLoss()(feats, make_unit(DIM).mine(feats, labels, mode="pair")).backward()
    for rank, result in enumerate(results[: max(world - 1, 1)]):
        expected = feats.grad[8 * rank : 8 * rank + 8] * world
        torch.testing.assert_close(result["empty"], expected, atol=1e-5, rtol=1e-4)


def _killed_at_work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timeout)
    feats, labels = batch(12)
    unit = make_unit(DIM)
    unit.mine(feats, labels, mode="anchor", group=dist.group.WORLD)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        unit.mine(feats, labels, mode="anchor", group=dist.group.WORLD)
    except RuntimeError as error:  # torch.distributed's own are of this kind
        (folder / "error").write_text(f"{type(error).__module__} {error}")
    (folder / f"seconds-{rank}").write_text(str(time.monotonic() - begun))
    os._exit(0)  # the group has no way to say goodbye


def test_a_process_that_is_killed_fails_the_others_within_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):  # of their exit codes
        in_two_processes(_killed_at_work, tmp_path, preload="pddm_ext")
    assert "Connection closed by peer" in (tmp_path / "error").read_text() or "gloo" in (tmp_path / "error").read_text()
    (seconds,) = tmp_path.glob("seconds-*")
    assert seconds.name == "seconds-0"
    assert float(seconds.read_text()) < 40


def test_what_one_process_refuses_fails_in_all_of_them(told):
    world, results = told
    own = [
        "ValueError: unit scores features of dimension 6; these have 5",
        "",
        "",
        "TypeError: labels has dtype torch.float32",
        "ValueError: candidates is 3 beside group",
        "ValueError: ref_labels is missing; ref_feats has 8 rows",
        "ValueError: group is 'all'; a process group that this process is in",
        "TypeError: labels has dtype torch.float32",
        "TypeError: unit is a str; a PDDM is accepted",
        "TypeError: quads is a str; Quadruplets are accepted",
        "ValueError: labels are missing; a loss with a regularizer",
        "ValueError: the group's feats have",
        "ValueError: ref_feats has 8 rows; quads were mined among no references",
        "ValueError: ref_feats has shape (); (rows, dim) is accepted",
    ]
    others = [
        f"RuntimeError: process {world - 1} of the group has refused",
        f"RuntimeError: process {world - 1} of the group has dtype number 1 where process 0 has 0",
        f"RuntimeError: process {world - 1} of the group has mode number 2 where process 0 has 0",
        f"RuntimeError: process {world - 1} of the group has refused",
        *own[4:7],
        *(f"RuntimeError: process {world - 1} of the group has refused",) * 4,
        *own[11:13],
        f"RuntimeError: process {world - 1} of the group has refused",
    ]
    if world > 1:
        own[1:3] = others[1:3]
    for rank, result in enumerate(results):
        for told_in_words, start in zip(result["wrong"], own if rank == world - 1 else others, strict=True):
            assert told_in_words.startswith(start)
            assert bool(told_in_words) == bool(start)
