"""What mining beyond one batch and one process costs: constants, a model made of them, and runs that check it.

``python bench/scaling.py`` measures (some minutes on two idle cores) and writes ``bench/results/scaling.json`` and
docs/scaling.md; with ``--page`` the page alone, and with ``--check`` it compares that with what is stored.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import torch
import torch.distributed as dist
from retrieval import Grid, ahead, mean

import pddm_ext
from pddm_ext import _C, PDDM, MemoryBank, mine_and_score
from pddm_ext.workbench.checkpoint import write_bytes

ROOT = Path(__file__).resolve().parent.parent
STORE, PAGE, TEMPLATE = ROOT / "bench/results/scaling.json", ROOT / "docs/scaling.md", "scaling.md.j2"
GRID = "omniglot-bank"

DIMS, PER_CLASS, CANDIDATES = (64, 128, 512), 4, 32
#: Rows that the constants are taken from, and those that check the model.
SMALL, LARGE = 2048, 4096
BANKS = (4096, 65536)
BATCH = 64
#: Of a candidate's dot product: rows of the two runs that tell what is n² and what is n.
FEW, MANY = 2048, 8192


def operations(dim: int) -> float:
    """Of a pair, with d = h = m, as the design counts them."""
    return 6.0 * dim**2


# What is measured


def seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rows(n: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator), torch.arange(n) // PER_CLASS


def mined(n: int, dim: int, **more: Any) -> Callable[[], Any]:
    torch.manual_seed(0)
    unit, (feats, labels) = PDDM(dim).requires_grad_(False), rows(n, dim)
    return lambda: mine_and_score(feats, labels, unit, mode="anchor", **more)


def full(size: int, dim: int) -> dict[str, torch.Tensor]:
    """A full bank's references, none of which is a sample of a batch."""
    bank, (feats, labels) = MemoryBank(size, dim), rows(size, dim, 1)
    bank.add(feats, labels % (size // 64), -1 - torch.arange(size))
    return bank.references()


def counted(call: Callable[[], Any]) -> int:
    """Pairs that a call scores."""
    _C.reset_counters()
    call()
    return int(_C.counters()["pairs_scored"])


def _alone(rank: int, world: int, port: int, task: Any, to: Any) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    name, *given = task
    found = TASKS[name](rank, world, *given)
    if rank == 0:
        to.put(found)
    if world > 1:
        dist.destroy_process_group()


def in_processes(world: int, *task: Any) -> Any:
    """What a task of one thread in each of so many new processes finds in the first."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    to = context.SimpleQueue()
    every = [context.Process(target=_alone, args=(rank, world, port, task, to)) for rank in range(world)]
    for process in every:
        process.start()
    for process in every:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process has ended with {process.exitcode}")
    return to.get()


def _mining(rank: int, world: int, n: int, dim: int, size: int, candidates: int) -> dict[str, float]:
    """Seconds and pairs of a step of the group, each process with its even share of the rows."""
    torch.manual_seed(0)
    unit, (feats, labels) = PDDM(dim).requires_grad_(False), rows(n, dim)
    own = slice(rank * n // world, (rank + 1) * n // world)
    feats, labels, ids = feats[own], labels[own], torch.arange(n)[own]
    group = dist.group.WORLD if world > 1 else None
    more: dict[str, Any] = {"candidates": candidates or None}
    if size:
        more = {"ids": ids, **full(size, dim)}

    def step() -> Any:
        if group is not None:
            dist.barrier()
        return mine_and_score(feats, labels, unit, mode="anchor", group=group, **more)

    return {"pairs": counted(step), "seconds": seconds(step, 3)}


def _gather(rank: int, world: int, n: int, dim: int) -> float:
    """Seconds of gathering rows (n, dim) of all."""
    own = torch.randn(n // world, dim)
    every = [torch.empty_like(own) for _ in range(world)]
    return seconds(lambda: (dist.barrier(), dist.all_gather(every, own)), 9) - seconds(dist.barrier, 9)


def _latency(rank: int, world: int) -> float:
    one = torch.zeros(1)
    return seconds(lambda: [dist.all_reduce(one) for _ in range(50)], 9) / 50


def _memory(rank: int, world: int, kind: str, n: int, dim: int, size: int) -> float:
    """Bytes by which a call's process grows beyond its inputs."""
    calls = {
        "anchor": lambda: mined(n, dim),
        "candidates": lambda: mined(n, dim, candidates=CANDIDATES),
        "bank": lambda: mined(n, dim, ids=torch.arange(n), **full(size, dim)),
    }
    mined(64, dim)()  # what the first call of all takes
    call = calls[kind]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = _peak()
    call()
    return _peak() - before


def _peak() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024.0 * int(line.split()[1])


TASKS = {"mining": _mining, "gather": _gather, "latency": _latency, "memory": _memory}


def constants() -> dict[str, Any]:
    """Each of one thread."""
    found: dict[str, Any] = {"rate": {}}
    for dim in DIMS:
        pairs = counted(mined(SMALL, dim))
        found["rate"][str(dim)] = pairs * operations(dim) / seconds(mined(SMALL, dim), 3)
    few, many = (seconds(mined(n, 128, candidates=CANDIDATES), 3) for n in (FEW, MANY))
    # t = a n² + b n
    found["dot"] = (many / MANY - few / FEW) / (MANY - FEW)
    found["candidate"] = few / FEW - found["dot"] * FEW
    bank, big = MemoryBank(BANKS[1], 128), rows(BATCH, 128)
    found["add"] = seconds(lambda: bank.add(*big, torch.arange(BATCH)), 9)
    for world in (2, 4):
        taken = in_processes(world, "gather", 2**17, 128)
        found[f"gather {world}"] = (world - 1) / world * 2**17 * 128 * 4 / taken
        found[f"latency {world}"] = in_processes(world, "latency")
    return found


# The model


#: Exchanges of a step in a group: row numbers and checks, features, classes, and four of the best of each row.
EXCHANGES = 8


def talk(c: dict[str, Any], n: int, dim: int, world: int) -> float:
    """Seconds of what is exchanged: features, and of each row its best two, 12 bytes each, there and back."""
    if world == 1:
        return 0.0
    sent = (world - 1) / world * n * (4 * dim + 2 * 2 * 12)
    return float(sent / c[f"gather {world}"] + EXCHANGES * c[f"latency {world}"])


def predicted(stored: dict[str, Any], n: int, dim: int, world: int, size: int, candidates: int) -> tuple[float, float]:
    """Pairs that a process scores and seconds that it takes, where each has its share of the cores."""
    c = stored["constants"]
    if candidates:
        return n * candidates, c["dot"] * n**2 + c["candidate"] * n
    # Each row with each reference, and so each j, of which there are about as many.
    pairs = 2 * n * size / world if size else n**2 / 2 / world
    rate = c["rate"][str(dim)] * min(1.0, stored["cores"] / world)
    return pairs, pairs * operations(dim) / rate + (0 if size else talk(c, n, dim, world))


#: Rows, dimension, processes, references and candidates of the runs that check it.
CHECKS = (
    (LARGE, 128, 1, 0, 0),
    (LARGE, 128, 2, 0, 0),
    (LARGE, 128, 4, 0, 0),
    (1024, 512, 2, 0, 0),
    (1024, 512, 4, 0, 0),
    (BATCH, 64, 1, BANKS[0], 0),
    (BATCH, 64, 1, BANKS[1], 0),
    (BATCH, 128, 1, BANKS[0], 0),
    (BATCH, 64, 2, BANKS[1], 0),
    (2 * MANY, 128, 1, 0, CANDIDATES),
)


def told(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model says of each run, beside what it took."""
    found = []
    for run in stored["checks"]:
        n, dim, world, size, candidates = run["of"]
        pairs, takes = predicted(stored, n, dim, world, size, candidates)
        how = f" among {size:,} references" if size else f" by {candidates} candidates" if candidates else ""
        processes = "one process" if world == 1 else f"{world} processes"
        what = f'`"anchor"`, n={n}, d={dim}{how}, {processes}'
        found.append({**run, "what": what, "expected pairs": pairs, "predicted": takes})
    return found


def measure() -> dict[str, Any]:
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    c = constants()
    torch.set_num_threads(cores)
    memory = {
        what: in_processes(1, "memory", *given)
        for what, given in {
            f"exact, n={LARGE}": ("anchor", LARGE, 128, 0),
            f"exact, n={4 * LARGE}": ("anchor", 4 * LARGE, 128, 0),
            f"{CANDIDATES} candidates, n={LARGE}": ("candidates", LARGE, 128, 0),
            f"{CANDIDATES} candidates, n={4 * LARGE}": ("candidates", 4 * LARGE, 128, 0),
            f"n={BATCH} among {BANKS[0]:,}": ("bank", BATCH, 128, BANKS[0]),
            f"n={BATCH} among {BANKS[1]:,}": ("bank", BATCH, 128, BANKS[1]),
        }.items()
    }
    checks = [{"of": of, **in_processes(of[2], "mining", *of[:2], *of[3:])} for of in CHECKS]
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "pddm_ext": pddm_ext.__version__,
        "instructions": _C.cpu_capability(),
        "cores": cores,
        "constants": c,
        "checks": checks,
        "memory": memory,
    }


# The plan


#: Rows, processes and candidates of the plan.
PLAN = {"rows": (2**16, 2**18, 10**6), "processes": 256, "candidates": 32}
#: Bytes a second that a GPU is taken to receive from beyond its machine: 400 Gbit/s, of which it gets 80 %.
LINK = 0.8 * 400e9 / 8
#: Of an H100, by its data sheet, of which 70 % are taken to be had; and how often products are written or read.
MEMORY, PASSES = 0.7 * 3.35e12, 3


def plan(cuda: dict[str, Any], dim: int) -> list[dict[str, float]]:
    """What a step's mining takes in each process by the model, with the rates of a stored run on a GPU."""
    forward = {row["what"]: row for row in cuda["rows"] if row["what"].startswith("forward")}
    (what,) = (what for what in forward if f"m={dim}, bfloat16" in what and "beside" not in what)
    of = int(what.partition("n=")[2].partition(",")[0])
    rate = of**2 / 2 * operations(dim) / (forward[what]["milliseconds"]["ours"] / 1e3)
    dots = 1e12 * next(row["matmul_tflops"] for row in forward.values() if "matmul_tflops" in row)  # of bfloat16
    found, world = [], PLAN["processes"]
    for n in PLAN["rows"]:  # type: ignore[attr-defined]
        pairs, products = n**2 / 2 / world, n**2 / world
        found.append(
            {
                "rows": n,
                "own": n / world,
                "rate": rate,
                "pairs": pairs,
                "score": pairs * operations(dim) / rate,
                "bytes": n * 2 * dim,
                "gather": n * 2 * dim / LINK,
                "dots": products * 2 * dim / dots + PASSES * 4 * products / MEMORY,
                "listed": n * PLAN["candidates"] * operations(dim) / rate / world,
            }
        )
    return found


def page() -> bytes:
    stored = json.loads(STORE.read_text("utf-8"))
    cuda = json.loads((ROOT / "bench/results/cuda.json").read_text("utf-8"))
    grid = Grid(GRID)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(mean=mean, ahead=ahead)
    text = environment.from_string((ROOT / "bench" / TEMPLATE).read_text("utf-8")).render(
        s=stored,
        c=stored["constants"],
        checks=told(stored),
        cuda=cuda,
        plans={dim: plan(cuda, dim) for dim in (128, 512)},
        of=PLAN,
        link=LINK,
        memory=MEMORY,
        passes=PASSES,
        grid=grid,
        sizes=list(grid.cells),
    )
    return (text.strip() + "\n").encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--check", action="store_true", help="fail where the page is not what is stored")
    arguments = parser.parse_args()
    if arguments.check:
        if PAGE.read_bytes() != page():
            print(f"{PAGE} is not what is stored; run python bench/scaling.py --page", file=sys.stderr)
            return 1
        return 0
    if not arguments.page:
        write_bytes(STORE, (json.dumps(measure(), indent=1) + "\n").encode())
    write_bytes(PAGE, page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
