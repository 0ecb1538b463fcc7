"""Ten thousand steps of changing sizes, with a bank and by candidates: what a process grows by.

``python tests/endurance/soak.py [STEPS]`` (some minutes): prints, at ten moments, resident memory, threads and open
files, and fails where any of them grows over the second half.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import torch

import pddm_ext

D, LARGEST, BANK, CANDIDATES = 32, 96, 512, 8
#: By which resident memory may differ, in bytes: what an allocator keeps or gives back.
SLACK = 8 * 2**20


def now() -> tuple[int, int, int]:
    """Resident bytes, threads and open files of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    torch.manual_seed(0)
    net, unit, loss_of = torch.nn.Linear(48, D), pddm_ext.PDDM(D), pddm_ext.QuadrupletLoss()
    optimizer = torch.optim.Adam([*net.parameters(), *unit.parameters()], lr=1e-3)
    bank = pddm_ext.MemoryBank(BANK, D)
    seen, begun = [], time.monotonic()
    for step in range(count):
        n = 2 + int(torch.randint(LARGEST - 1, ()))
        labels, ids = torch.randint(12, (n,)), torch.randint(4000, (n,))
        feats = net(torch.randn(n, 48) + labels[:, None].float())
        mode = ("batch", "anchor", "pair")[step % 3]
        if step % 2:
            quads, among = unit.mine(feats, labels, mode=mode, candidates=CANDIDATES), None
        else:
            bank.add(feats, labels, ids)
            quads, among = unit.mine(feats, labels, mode=mode, ids=ids, **bank.references()), bank.feats
        optimizer.zero_grad()
        loss_of(feats, quads, ref_feats=among).backward()
        optimizer.step()
        if (step + 1) % (count // 10) == 0:
            seen.append(now())
            memory, threads, files = seen[-1]
            print(
                f"step {step + 1}: {memory / 2**20:.1f} MiB, {threads} threads, {files} files, "
                f"{(time.monotonic() - begun) / (step + 1) * 1e3:.1f} ms a step",
                flush=True,
            )
    memory, threads, files = zip(*seen[4:], strict=True)
    assert max(memory) - memory[0] < SLACK, "memory grows"
    assert max(threads) == threads[0], "threads"
    assert max(files) == files[0], "open files"
    assert all(p.isfinite().all() for p in (*net.parameters(), *unit.parameters()))


if __name__ == "__main__":
    main()
