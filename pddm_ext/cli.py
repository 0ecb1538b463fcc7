"""The command line: ``pddm-ext train`` and ``pddm-ext info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from . import _C, __version__
from .quadruplets import MODES
from .training.settings import Settings

_EXTRAS = "pip install 'pddm-ext[train]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for bad input (a line on stderr says what), 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "info":
        print(info())
        return 0
    return _train(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pddm-ext", description="Deep metric learning with PDDM.")
    parser.add_argument("--version", action="version", version=f"pddm-ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("info", help="what was built, and what this machine will use")

    train = commands.add_parser(
        "train",
        help="train an embedding and report its retrieval on classes never seen",
        description="Train the same convnet on quadruplets mined by PDDM and by Euclidean distance, and compare their "
        "retrieval on classes never seen.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Settings()
    train.add_argument("--data", choices=("glyphs", "omniglot"), default=default.data, help="what to train on")
    train.add_argument("--root", type=Path, help="omniglot's folder or zip", default=argparse.SUPPRESS)
    train.add_argument("--mode", choices=MODES, default=default.mode, help="which quadruplets to mine")
    train.add_argument("--steps", type=int, default=default.steps, help="updates of each net")
    train.add_argument("--classes", type=int, default=default.classes, help="classes in a batch")
    train.add_argument("--samples", type=int, default=default.samples, help="samples of a class in a batch")
    train.add_argument("--dim", type=int, default=default.dim, help="length of a feature")
    train.add_argument("--lr", type=float, default=default.lr, help="learning rate of Adam")
    train.add_argument(
        "--unit-lr-factor", type=float, default=default.unit_lr_factor, help="the PDDM unit's learning rate over --lr"
    )
    train.add_argument("--seed", type=int, default=default.seed, help="of weights, batches and the test set")
    train.add_argument("--every", type=int, default=default.every, help="evaluate and checkpoint every so many steps")
    train.add_argument(
        "--out", type=Path, help="report folder, also of the checkpoint (default: runs/DATA)", default=argparse.SUPPRESS
    )
    train.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --out", default=argparse.SUPPRESS
    )
    return parser


def _fail(message: str) -> int:
    print(f"pddm-ext: error: {message}", file=sys.stderr)
    return 2


def _train(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    root: Path | None = given.get("root")
    folder: Path = given.get("out", Path("runs") / arguments.data)
    try:
        settings = Settings(**{field.name: given[field.name] for field in fields(Settings)})
        if (root is not None) != (settings.data == "omniglot"):
            raise ValueError("--data omniglot and --root go together: the folder or zip is read from there")

        from .training import glyphs, omniglot, report
        from .training.loop import Run

        dataset = glyphs.load() if root is None else omniglot.load(root)
        run = Run(settings, dataset)
        checkpoint = folder / "checkpoint.pt"
        if given.get("resume"):
            run.resume(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
    except ModuleNotFoundError as error:
        return _fail(f"training needs {error.name}, which is not there; install with {_EXTRAS}")
    except (ValueError, OSError) as error:
        return _fail(str(error))

    for verb, split in (("train on", dataset.train), ("search among", dataset.test)):
        print(f"{verb} {len(split.names)} classes, {len(split.labels)} drawings: {', '.join(split.groups)}")
    try:
        run.train(checkpoint)
    except FloatingPointError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        left = f"{checkpoint} is there; --resume continues from it" if checkpoint.exists() else "no checkpoint yet"
        print(f"\nstopped after {run.taken} steps; {left}", file=sys.stderr)
        return 130
    metrics = report.measure(run)
    print(report.table(metrics))
    print(f"report: {report.write(run, metrics, folder)}")
    return 0


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "but torch finds no GPU here"


def info() -> str:
    """What was built, and what this machine will use, one line each."""
    build, sets = _C.build_info(), _C.cpu_capabilities()
    lines = {
        "pddm-ext": __version__,
        "torch": f"{torch.__version__} running, {build['built_with_torch']} at build",
        "stable ABI": f"LibTorch {build['stable_abi']} and later",
        "compiler": build["compiler"],
        "CUDA": f"{build['cuda']}, {_gpu()}" if build["cuda"] else "not built (PDDM_CUDA=on at build, where nvcc is)",
        "instruction sets": ", ".join(f"{name} ({'supported' if has else 'not here'})" for name, has in sets.items()),
        "in use": _C.cpu_capability(),
        "bfloat16": "multiplied as such" if _C.multiplies_bfloat16() else "multiplied in float32",
        "threads": str(torch.get_num_threads()),
    }
    return "\n".join(f"{name:<18}{value}" for name, value in lines.items())
