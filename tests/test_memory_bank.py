"""The memory bank: which rows it holds, in which order in every process, and that it comes back as it was."""

from __future__ import annotations

import copy
import datetime
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import pddm_ext
from helpers import DEVICE, host_only, make_features, make_unit
from pddm_ext import MemoryBank
from processes import in_two_processes


def rows(first: int, count: int, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and numbers from which each row can be told."""
    numbers = torch.arange(first, first + count, device=DEVICE)
    return numbers[:, None] * torch.ones(dim, device=DEVICE), numbers.int() // 2, numbers.short()


def held(bank: MemoryBank) -> list[int]:
    assert len(bank) == len(bank.feats) == len(bank.labels) == len(bank.ids)
    assert bank.feats[:, 0].tolist() == bank.ids.tolist()
    assert bank.labels.tolist() == [number // 2 for number in bank.ids.tolist()]
    return bank.ids.tolist()


def test_the_newest_rows_take_the_places_of_the_oldest():
    bank = MemoryBank(5, 3).to(DEVICE)
    assert held(bank) == []
    bank.add(*rows(0, 3))
    assert held(bank) == [0, 1, 2]
    bank.add(*rows(3, 0))
    bank.add(*rows(3, 3))
    assert held(bank) == [5, 1, 2, 3, 4]
    bank.add(*rows(6, 1))
    assert held(bank) == [5, 6, 2, 3, 4]
    bank.add(*rows(7, 12))  # more than there is room for
    assert sorted(held(bank)) == [14, 15, 16, 17, 18]
    bank.clear()
    assert held(bank) == []
    bank.add(*rows(1, 2))
    assert held(bank) == [1, 2]


def test_while_it_warms_up_it_keeps_the_newest_batch_alone():
    bank = MemoryBank(10, 3, warm_up=2).to(DEVICE)
    for first, expected in ((0, [0, 1]), (2, [2, 3]), (4, [2, 3, 4, 5]), (6, [2, 3, 4, 5, 6, 7])):
        bank.add(*rows(first, 2))
        assert held(bank) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_keeps_the_dtype_asked_for_and_no_gradient(dtype):
    bank = MemoryBank(8, 3, dtype=dtype).to(DEVICE)
    feats, labels, ids = rows(0, 4)
    bank.add(feats.requires_grad_(), labels, ids)
    assert bank.feats.dtype == dtype
    assert not bank.feats.requires_grad
    bank.add(feats.detach().double(), labels.to(torch.uint8), ids)
    assert bank.ids.tolist() == [0, 1, 2, 3] * 2


def test_it_comes_back_from_its_state_as_it_was(tmp_path):
    bank = MemoryBank(5, 3, warm_up=1).to(DEVICE)
    bank.add(*rows(0, 4))
    bank.add(*rows(4, 3))
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    again = MemoryBank(5, 3, warm_up=1).to(DEVICE)
    again.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    for one in (again, copy.deepcopy(bank)):
        assert held(one) == held(bank)
        one.add(*rows(7, 2))
    bank.add(*rows(7, 2))
    assert held(again) == held(bank) == [5, 6, 7, 8, 4]


def test_three_lines_mine_among_earlier_batches():
    bank, unit, loss_fn = MemoryBank(12, 3).to(DEVICE), make_unit(3), pddm_ext.QuadrupletLoss()
    labels = torch.arange(6, device=DEVICE) // 2
    for step in range(3):
        feats, ids = make_features(6, 3, seed=step).requires_grad_(), torch.arange(6, device=DEVICE) + 6 * (step % 2)
        bank.add(feats, labels, ids)
        quads = unit.mine(feats, labels, mode="pair", ids=ids, **bank.references())
        loss = loss_fn(feats, quads, ref_feats=bank.feats)
        loss.backward()
        assert bool(feats.grad.any())
        assert int((bank.ids[quads.j] == ids[quads.i]).sum()) == 0
        assert len(quads.i) == [6, 18, 18][step]  # of four rows of a class one or, from the third step on, two are old


def test_steps_can_be_summed_before_the_backward_pass():
    labels = torch.arange(6, device=DEVICE) // 2
    bank, unit, total = MemoryBank(8, 12).to(DEVICE), make_unit(12), 0
    for step in range(3):
        feats = make_features(6, 12, seed=step).requires_grad_()
        ids = torch.arange(6, device=DEVICE) + 6 * step
        bank.add(feats, labels, ids)
        quads = unit.mine(feats, labels, ids=ids, **bank.references())
        total = total + quads.s_ij.sum()
    total.backward()
    assert bool(feats.grad.any())


def test_the_state_of_another_bank_is_refused_and_nothing_is_lost():
    bank = MemoryBank(5, 3).to(DEVICE)
    bank.add(*rows(0, 3))
    for other in (MemoryBank(9, 3), MemoryBank(5, 4)):
        with pytest.raises(RuntimeError, match=r"ring_feats has shape .*; \(5, 3\) is accepted"):
            bank.load_state_dict(other.state_dict())
        assert held(bank) == [0, 1, 2]


def test_one_made_without_gradients_can_be_added_to_later():
    with torch.inference_mode():
        bank = MemoryBank(5, 3).to(DEVICE)
        copied = copy.deepcopy(bank)  # its buffers are made in this mode
    for one in (bank, copied):
        one.add(*rows(0, 3))
        assert held(one) == [0, 1, 2]


@pytest.mark.parametrize("warm_up", [0, 9])
def test_its_own_rows_can_be_added_once_more(warm_up):
    bank = MemoryBank(6, 3, warm_up=warm_up).to(DEVICE)
    bank.add(*rows(0, 5))
    bank.add(bank.feats[1:], bank.labels[1:], bank.ids[1:])
    assert held(bank) == ([1, 2, 3, 4] if warm_up else [2, 3, 4, 3, 4, 1])


def test_its_state_is_on_the_host_whatever_the_default_device():
    bank = MemoryBank(6, 3)
    bank.add(*(x.cpu() for x in rows(0, 5)))
    with torch.device("meta"):
        state = bank.state_dict()
    other = MemoryBank(6, 3)
    other.load_state_dict(state)
    assert held(other) == held(bank)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size is 0; at least 1 is accepted"),
        ({"size": 2.0}, TypeError, "size is a float; an int is accepted"),
        ({"dim": 0}, ValueError, "dim is 0; at least 1"),
        ({"warm_up": -1}, ValueError, "warm_up is -1; at least 0 is accepted"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8; float32, float64, bfloat16 or float16 is accepted"),
        ({"group": "all"}, ValueError, "group is 'all'; a process group that this process is in, or None"),
    ],
)
def test_what_makes_no_bank_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        MemoryBank(**{"size": 4, "dim": 3, **arguments})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            (torch.ones(2, 4), None, None),
            ValueError,
            r"feats has shape \(2, 4\); the bank holds features of dimension 3",
        ),
        ((torch.ones(2, 3).int(), None, None), TypeError, "feats has dtype torch.int32"),
        ((None, torch.zeros(3).int(), None), ValueError, "labels has length 3; feats has 2"),
        ((None, torch.zeros(2), None), TypeError, "labels has dtype torch.float32"),
        ((None, None, torch.zeros(1).int()), ValueError, "ids has length 1; feats has 2"),
        ((None, None, [0, 1]), TypeError, "ids is a list"),
    ],
)
def test_what_is_no_batch_is_refused_and_nothing_is_lost(changed, error, message):
    bank = MemoryBank(5, 3).to(DEVICE)
    bank.add(*rows(0, 3))
    given = [
        old if new is None else new.to(DEVICE) if isinstance(new, Tensor) else new
        for new, old in zip(changed, rows(3, 2), strict=True)
    ]
    with pytest.raises(error, match=message):
        bank.add(*given)
    assert held(bank) == [0, 1, 2]


def as_one_of_two(rank: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    try:
        own = dist.new_group([0])
        refused = ""
        try:
            MemoryBank(4, 3, group=own)
        except ValueError as error:
            refused = str(error)
        bank = MemoryBank(9, 3, group=dist.group.WORLD)
        for first, lengths in ((0, (2, 3)), (5, (0, 1)), (6, (0, 0)), (6, (3, 0)), (9, (4, 2))):
            start = first + sum(lengths[:rank])
            bank.add(*rows(start, lengths[rank]))
        before = bank.ids.clone()
        wrong = ""
        try:
            bank.add(*rows(0, 2, dim=3 + rank))
        except (ValueError, RuntimeError) as error:
            wrong = f"{type(error).__name__}: {error}"
        assert torch.equal(before, bank.ids)
        torch.save({"ids": bank.ids, "feats": bank.feats, "wrong": wrong, "refused": refused}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@host_only("gloo and small CPU tensors")
def test_rows_stand_in_one_order_in_every_process(tmp_path: Path):
    first, second = in_two_processes(as_one_of_two, tmp_path, preload="pddm_ext")
    assert first["ids"].tolist() == second["ids"].tolist() == [9, 10, 11, 12, 13, 14, 6, 7, 8]
    assert torch.equal(first["feats"], second["feats"])
    assert first["wrong"].startswith("RuntimeError: process 1 of the group has refused")
    assert second["wrong"].startswith("ValueError: feats has shape (2, 4)")
    assert first["refused"] == ""
    assert "a process group that this process is in" in second["refused"]
