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
from retrieval import SIZES, Grid, ahead, mean

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


def among(n: int, dim: int, size: int, **more: Any) -> Callable[[], Any]:
    """A step's mining among a full bank, the batch's own rows taken in first."""
    torch.manual_seed(0)
    unit, (feats, labels), bank = PDDM(dim).requires_grad_(False), rows(n, dim), MemoryBank(size, dim)
    earlier, classes = rows(size, dim, 1)
    bank.add(earlier, classes % (size // 64), torch.arange(size) + n)

    def step() -> Any:
        bank.add(feats, labels, torch.arange(n))
        return mine_and_score(feats, labels, unit, mode="anchor", ids=torch.arange(n), **bank.references(), **more)

    return step


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


def _mining(rank: int, world: int, n: int, dim: int, size: int) -> dict[str, float]:
    """Seconds and pairs of a step of the group, each process with its even share of the rows."""
    torch.manual_seed(0)
    unit, (feats, labels) = PDDM(dim).requires_grad_(False), rows(n, dim)
    own = slice(rank * n // world, (rank + 1) * n // world)
    feats, labels, ids = feats[own], labels[own], torch.arange(n)[own]
    group = dist.group.WORLD if world > 1 else None
    more: dict[str, Any] = {}
    if size:
        bank = MemoryBank(size, dim)
        earlier, classes = rows(size, dim, 1)
        bank.add(earlier, classes % (size // 64), torch.arange(size) + n)
        more = {"ids": ids, **bank.references()}

    def step() -> Any:
        if group is not None:
            dist.barrier()
        return mine_and_score(feats, labels, unit, mode="anchor", group=group, **more)

    return {"pairs": counted(step), "seconds": seconds(step)}


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
        "bank": lambda: among(n, dim, size),
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


def exact(c: dict[str, Any], n: int, dim: int, world: int = 1, share: float = 1.0) -> float:
    """Seconds of exact mining; ``share`` is of a core for each process."""
    return n**2 / 2 / world * operations(dim) / (c["rate"][str(dim)] * share) + talk(c, n, dim, world)


def banked(c: dict[str, Any], n: int, dim: int, size: int, world: int = 1, share: float = 1.0) -> float:
    """Of mining n rows among so many references: each row's pairs, and those of the j that differ, about one a row."""
    return 2 * n / world * size * operations(dim) / (c["rate"][str(dim)] * share) + (c["add"] if world == 1 else 0)


def by_candidates(c: dict[str, Any], n: int) -> float:
    return float(c["dot"] * n**2 + c["candidate"] * n)


#: Exchanges of a step in a group: row numbers and checks, features, classes, and four of the best of each row.
EXCHANGES = 8


def talk(c: dict[str, Any], n: int, dim: int, world: int) -> float:
    """Seconds of what is exchanged: features, and of each row 24 bytes twice; there and back."""
    if world == 1:
        return 0.0
    sent = (world - 1) / world * n * (4 * dim + 2 * 2 * 24)
    return float(sent / c[f"gather {world}"] + EXCHANGES * c[f"latency {world}"])


def checks(c: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model says of other sizes than its constants are of, and what they take."""
    found: list[dict[str, Any]] = []

    def told(what: str, predicted: float, run: dict[str, float], pairs: float) -> None:
        found.append({"what": what, "predicted": predicted, "expected pairs": pairs, **run})

    for world, n, dim in ((1, LARGE, 128), (2, LARGE, 128), (4, LARGE, 128), (2, 1024, 512), (4, 1024, 512)):
        share = min(1.0, torch.get_num_threads() / world)
        run = in_processes(world, "mining", n, dim, 0)
        processes = "one process" if world == 1 else f"{world} processes"
        told(f'`"anchor"`, n={n}, d={dim}, {processes}', exact(c, n, dim, world, share), run, n**2 / 2 / world)
    for world, size, dim in ((1, BANKS[0], 64), (1, BANKS[1], 64), (1, BANKS[0], 128), (2, BANKS[1], 64)):
        run = in_processes(world, "mining", BATCH, dim, size)
        what = f'`"anchor"`, n={BATCH} among {size:,} references, d={dim}, ' + (
            "one process" if world == 1 else f"{world} processes"
        )
        told(what, banked(c, BATCH, dim, size, world), run, 2 * BATCH / world * size)
    n = 2 * MANY
    call = mined(n, 128, candidates=CANDIDATES)
    run = {"pairs": counted(call), "seconds": seconds(call, 3)}
    told(f'`"anchor"` by {CANDIDATES} candidates, n={n}, d=128, one process', by_candidates(c, n), run, n * CANDIDATES)
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
    torch.set_num_threads(1)
    told = checks(c)
    torch.set_num_threads(cores)
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "pddm_ext": pddm_ext.__version__,
        "instructions": _C.cpu_capability(),
        "cores": cores,
        "constants": c,
        "checks": told,
        "memory": memory,
    }


# The plan


#: Rows, processes and length of a feature of the plan.
PLAN = {"rows": 10**6, "processes": 256, "dims": (128, 512), "candidates": 32}
#: Bytes a second that a GPU is taken to exchange with others beyond its machine: 400 Gbit/s, of which it gets 80 %.
LINK = 0.8 * 400e9 / 8


def plan(cuda: dict[str, Any]) -> list[dict[str, Any]]:
    """What a step's mining takes by the model, with the rates of a stored run on a GPU."""
    found = []
    by_dim = {int(row["what"].partition("m=")[2].partition(",")[0]): row for row in cuda["rows"] if _forward(row)}
    for dim in PLAN["dims"]:  # type: ignore[attr-defined]
        row, n, world = by_dim[dim], PLAN["rows"], PLAN["processes"]
        of = int(row["what"].partition("n=")[2].partition(",")[0])
        rate = of**2 / 2 * operations(dim) / (row["milliseconds"]["ours"] / 1e3)
        pairs = n**2 / 2 / world  # type: ignore[operator]
        sent = n * 2 * dim  # type: ignore[operator]
        dots = n**2 / world * 2 * dim  # type: ignore[operator]
        found.append(
            {
                "dim": dim,
                "rate": rate,
                "pairs": pairs,
                "score": pairs * operations(dim) / rate,
                "bytes": sent,
                "gather": sent / LINK,
                "dots": dots / (0.5 * matmul_rate(cuda)),
                "listed": n * PLAN["candidates"] * operations(dim) / rate / world,  # type: ignore[operator]
            }
        )
    return found


def _forward(row: dict[str, Any]) -> bool:
    return row["what"].startswith("forward") and row["what"].endswith("bfloat16")


def matmul_rate(cuda: dict[str, Any]) -> float:
    return 1e12 * next(row["matmul_tflops"] for row in cuda["rows"] if _forward(row))


def page() -> bytes:
    stored = json.loads(STORE.read_text("utf-8"))
    cuda = json.loads((ROOT / "bench/results/cuda.json").read_text("utf-8"))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(mean=mean, ahead=ahead)
    text = environment.from_string((ROOT / "bench" / TEMPLATE).read_text("utf-8")).render(
        s=stored, c=stored["constants"], cuda=cuda, plan=plan(cuda), of=PLAN, link=LINK, grid=Grid(GRID), sizes=SIZES
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
