"""A training loop among what loops have around them: a bank, candidates, a gradient scaler, workers, determinism."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import pddm_ext
from helpers import DEVICE, assert_same_bits, host_only, make_features, make_labels, make_unit

D = 6


def steps(count: int, **how: Any) -> Iterator[dict[str, Tensor]]:
    """Training steps of batches of changing sizes, among a bank, by candidates or by themselves in turn."""
    torch.manual_seed(0)
    net, unit, loss_of = nn.Linear(8, D).to(DEVICE), make_unit(D), pddm_ext.QuadrupletLoss()
    bank = pddm_ext.MemoryBank(64, D, device=DEVICE)
    optimizer = torch.optim.SGD([*net.parameters(), *unit.parameters()], lr=0.05)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=bool(how), **how)
    for step in range(count):
        n = 12 + 5 * (step % 4)
        labels, ids = make_labels(n, seed=step), torch.arange(step, step + n, device=DEVICE)
        feats = net(make_features(n, 8, seed=step))
        mode = ("batch", "anchor", "pair")[step % 3]
        if step % 2:
            quads, among = pddm_ext.mine_and_score(feats, labels, unit, mode=mode, candidates=5), None
        else:
            bank.add(feats, labels, ids)
            quads, among = pddm_ext.mine_and_score(feats, labels, unit, mode=mode, ids=ids, **bank.references()), bank
        loss = loss_of(feats, quads, ref_feats=None if among is None else among.feats)
        optimizer.zero_grad()
        scaler.scale(64 * loss).backward()
        scaler.step(optimizer)
        scaler.update()
        parameters = {f"{i}": p.detach().clone() for i, p in enumerate([*net.parameters(), *unit.parameters()])}
        yield {"loss": loss.detach(), "scale": torch.tensor(scaler.get_scale()), **parameters}


def test_a_scaler_goes_through_overflow() -> None:
    """Steps whose scaled gradients are infinite change nothing, and all others train."""
    seen = list(steps(24, init_scale=2.0**127, growth_interval=1000))
    scales = [float(each["scale"]) for each in seen]
    skipped = [step for step in range(1, 24) if scales[step] < scales[step - 1]]
    assert len(skipped) >= 4
    assert max(skipped) < 20
    for step in range(1, 24):
        moved = any(not torch.equal(seen[step][str(i)], seen[step - 1][str(i)]) for i in range(10))
        assert moved == (step not in skipped)
    assert all(value.isfinite().all() for each in seen for name, value in each.items() if name != "scale")


@host_only("what CUDA has no deterministic kernels for is torch's")
def test_all_of_it_has_deterministic_algorithms() -> None:
    expected = list(steps(12))
    torch.use_deterministic_algorithms(True)
    try:
        found = list(steps(12))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, expected, strict=True):
        for name in one:
            assert_same_bits(one[name], other[name])


class Mined(Dataset[Tensor]):
    """Mines where it is read, as a collate function that chooses batches would."""

    def __init__(self) -> None:
        self.unit = make_unit(D).cpu()

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> Tensor:
        feats, labels = make_features(20, D, seed=number).cpu(), make_labels(20, seed=number).cpu()
        bank = pddm_ext.MemoryBank(30, D)
        bank.add(feats, labels, torch.arange(20))
        with torch.no_grad():
            quads = self.unit.mine(feats, labels, mode="anchor", ids=torch.arange(20), **bank.references())
            near = self.unit.mine(feats, labels, mode="anchor", candidates=4)
        return torch.stack([quads.s_ij, quads.s_ik, quads.s_jl, near.s_ik])


@host_only("worker processes have the CPU")
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_workers_mine_whatever_made_them(start: str) -> None:
    """After the threads of this process have been at it."""
    list(steps(3))
    mined = Mined()
    expected = [mined[number] for number in range(len(mined))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a process with threads that forks
        loader = DataLoader(mined, batch_size=1, num_workers=2, multiprocessing_context=start, timeout=120)
        found = [batch[0] for batch in loader]
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
