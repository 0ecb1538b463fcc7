"""The command line: ``pddm-ext train``, ``eval``, ``compare``, ``embed``, ``search``, ``export`` and ``info``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import _C, __version__
from .._installing import bring
from .console import brief_warnings, lenient, own
from .interrupts import follow, terminable
from .settings import DRAWINGS, WORKERS, Settings, difference, option, parse, read, written

#: Runs of a method in a comparison: beyond, their seeds would be those of the runs that choose a learning rate.
_SEEDS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for bad input (a line on stderr says what), 130 when interrupted or
    terminated."""
    with lenient(), brief_warnings(), terminable():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        command = {
            "info": _info,
            "train": _train,
            "eval": _eval,
            "compare": _compare,
            "embed": _embed,
            "search": _search,
            "export": _export,
        }[arguments.command]
        return command(arguments)
    except ModuleNotFoundError as error:
        print(
            f"pddm-ext: error: this needs {error.name}, which is not there; training's packages come with "
            f"{bring('train')}, those of a backbone by themselves",
            file=sys.stderr,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"pddm-ext: error: {_line(error)}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(
            f"pddm-ext: error: out of memory ({_line(error)}); lower --classes, --samples, --dim or --jobs",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 2


def _line(error: BaseException) -> str:
    """An error in one line. From a loader's worker comes its whole traceback, which ends with the error."""
    lines = [line.strip() for line in str(error).splitlines()]
    if lines and "in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines) or type(error).__name__


def _out_of_memory(error: BaseException) -> bool:
    """Of the CPU's memory torch says it by a RuntimeError like any other."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error) or "DataLoader worker (pid" in str(error)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line, without the screen of options in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; '{self.prog} --help' says what is accepted\n")


def _parser() -> _Parser:
    parser = _Parser(prog="pddm-ext", description="Deep metric learning with PDDM.")
    parser.add_argument("--version", action="version", version=f"pddm-ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    # Without abbreviations, of which compare's --seed would be one of --seeds.
    exact: dict[str, Any] = {"allow_abbrev": False}

    commands.add_parser("info", help="what was built, and what this machine will use")

    train = commands.add_parser(
        "train",
        help="train an embedding and measure its retrieval",
        description="Train an embedding and measure how it retrieves other classes, or other pictures of those it was "
        "trained on, as the data have them. The folder gets config.json, checkpoint.pt, metrics.json and TensorBoard "
        "logs.",
        **exact,
    )
    _add_settings(train)
    train.add_argument("--out", type=_folder, help="folder of the run (default: runs/DATA/METHOD/seed-SEED)")
    train.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --out, by its config.json"
    )
    train.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="with --resume, go on where pictures have come, gone or changed since",
    )
    _add_progress(train)

    evaluate = commands.add_parser(
        "eval",
        help="measure a checkpoint",
        description="Measure a checkpoint's embedding on the test side of its data, or of any other (--root): by "
        "distance, and where it has a PDDM unit by score and re-ranked, and re-ranked by structure where it has a head "
        "for that. Of the chosen step, where validation pictures chose one.",
        **exact,
    )
    evaluate.add_argument("checkpoint", type=Path, help="checkpoint.pt of a run, or the run's folder")
    evaluate.add_argument(
        "--root", help="where the data are now, or others that are to be measured (default: the run's)"
    )
    for name in ("data", "split", "gallery"):
        setting = Settings.__dataclass_fields__[name]
        evaluate.add_argument(
            option(name), choices=setting.metadata["choices"], help=f"{setting.metadata['help']} (default: the run's)"
        )
    evaluate.add_argument(
        "--skip-unreadable",
        action=argparse.BooleanOptionalAction,
        help="leave out pictures that cannot be read (default: the run's)",
    )
    evaluate.add_argument("--accelerator", help="device kind to measure on (default: the run's)")
    evaluate.add_argument("--workers", type=int, help="processes that read pictures (default: the run's)")
    evaluate.add_argument("--backbone", help="confirms a backbone MODULE:CALLABLE, whose code will run")
    evaluate.add_argument("--candidates", type=int, default=100, help="nearest rows that are re-ranked (default: 100)")
    evaluate.add_argument(
        "--json", type=Path, help="write every figure to this file, too, in the place of an earlier one"
    )
    _add_progress(evaluate)

    compare = commands.add_parser(
        "compare",
        help="run a grid of methods and seeds, and report it on one page",
        description="Train each method with each seed on equal steps and write report.html. Runs that have "
        "finished are kept: the same command goes on where it stopped.",
        **exact,
    )
    _add_settings(compare, but=("method", "seed"))
    compare.add_argument(
        "--methods",
        nargs="+",
        default=["pddm-anchor", "euclidean-anchor"],
        metavar="METHOD[:SETTING=VALUE,...]",
        help="what to compare (default: pddm-anchor euclidean-anchor)",
    )
    compare.add_argument("--seeds", type=int, default=5, help="runs of each method, up to 1000 (default: 5)")
    compare.add_argument(
        "--lrs",
        type=float,
        nargs="+",
        default=[],
        help="learning rates to choose from on validation classes, or pictures of known ones",
    )
    compare.add_argument("--tries", type=int, default=1, help="runs for each of --lrs, up to 1000 (default: 1)")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    compare.add_argument("--out", type=_folder, help="folder of the grid (default: runs/DATA)")
    _add_progress(compare)

    embed = commands.add_parser(
        "embed",
        help="make a catalogue of a folder of pictures, or bring it up to date",
        description="Embed the pictures of a folder, of any depth, into a catalogue that 'pddm-ext search' searches. "
        "Of a catalogue that is there only what has changed in the folder is embedded again.",
        **exact,
    )
    _add_trained(embed)
    embed.add_argument("folder", type=Path, help="of the pictures")
    embed.add_argument("--out", type=_folder, required=True, help="folder of the catalogue")
    embed.add_argument(
        "--index",
        default="auto",
        choices=("auto", "flat", "hnsw", "ivf-pq"),
        help="how it is searched: flat is exact, the others are quick among many (default: auto, by size)",
    )
    embed.add_argument(
        "--workers", type=int, default=2, help="processes that read pictures, at most one for each 32 (default: 2)"
    )
    embed.add_argument("--skip-unreadable", action="store_true", help="leave out pictures that cannot be read")
    _add_progress(embed)

    search = commands.add_parser(
        "search",
        help="find what in a catalogue is nearest to photographs",
        description="Print the nearest pictures of a catalogue for each photograph: file, class and distance.",
        **exact,
    )
    _add_trained(search)
    search.add_argument("catalogue", type=Path, help="folder that 'pddm-ext embed' wrote")
    search.add_argument("photos", type=Path, nargs="+", metavar="photo", help="what to search for")
    search.add_argument("-k", type=int, default=10, help="matches of each photograph (default: 10)")
    search.add_argument(
        "--by",
        default="distance",
        choices=("distance", "score", "structure"),
        help="what ranks the candidates (default: distance)",
    )
    search.add_argument(
        "--candidates", type=int, default=100, help="nearest by distance that are ranked (default: 100)"
    )
    search.add_argument("--json", type=Path, help="write the matches to this file, too, in the place of an earlier one")
    search.add_argument(
        "--page", type=Path, help="write a page of pictures to this file, too, in the place of an earlier one"
    )

    export = commands.add_parser(
        "export",
        help="write what was trained for programs without this package",
        description="Write a checkpoint's embedder and, where it has one, its PDDM unit as graphs that take any number "
        "of pictures or pairs, and preprocessing.json, which says how a picture is prepared.",
        **exact,
    )
    _add_trained(export, computes=False)
    export.add_argument("--out", type=_folder, required=True, help="folder to make, or an empty one")
    export.add_argument(
        "--format",
        nargs="+",
        choices=("torch", "onnx"),
        help="torch.export's and ONNX (default: both, where ONNX's packages are installed)",
    )
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _folder(text: str) -> Path:
    """A folder to write into. An empty name, as of a shell's variable that is not set, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"it is {text!r}; the name of a folder is accepted, as . is for this one")
    return Path(text)


def _add_trained(parser: argparse.ArgumentParser, computes: bool = True) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a run, or the run's folder")
    if computes:
        parser.add_argument("--accelerator", default="auto", help="device kind to embed on (default: auto)")
    parser.add_argument("--backbone", help="confirms a backbone MODULE:CALLABLE, whose code will run")


def _add_settings(parser: argparse.ArgumentParser, but: tuple[str, ...] = ()) -> None:
    """An option for each setting; one that is not given is left out, for ``--config`` to decide."""
    parser.add_argument(
        "--config", type=Path, help="JSON of settings, such as a run's config.json; options override it"
    )
    for setting in fields(Settings):
        if setting.name in but:
            continue
        default = setting.default if setting.default != "" else "none"
        kind: dict[str, Any] = {"type": type(setting.default)}
        if isinstance(setting.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
            default = "yes" if setting.default else "no"
        elif setting.metadata["choices"]:
            kind["choices"] = setting.metadata["choices"]
        parser.add_argument(
            option(setting.name),
            help=f"{setting.metadata['help']} (default: {default})",
            default=argparse.SUPPRESS,
            **kind,
        )


def _add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="a bar, or nothing (default: a bar on a terminal, else a line for each measurement or run)",
    )


def _settings(arguments: argparse.Namespace) -> Settings:
    given = {} if arguments.config is None else read(arguments.config)
    options = {name: value for name, value in vars(arguments).items() if name in Settings.__dataclass_fields__}
    settings = Settings(**{**given, **parse(options, "the command line")})
    if settings.backbone == "convnet" and settings.data not in DRAWINGS:
        raise ValueError(
            f"--backbone convnet is for drawings ({', '.join(DRAWINGS)}); for --data {settings.data} choose "
            f"efficientnet-lite0, timm/NAME, torchvision/NAME or MODULE:CALLABLE"
        )
    return settings


def _out(folder: Path, settings: Settings) -> Path:
    """The folder, of a name that TensorBoard can write to, and not among the pictures.

    Raises:
        ValueError: it is neither.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--out is {folder}, which is no UTF-8 under this locale; such a name is accepted") from error
    if settings.data == "folder" and folder.resolve().is_relative_to(Path(settings.root).resolve()):
        raise ValueError(
            f"--out is {folder}, inside {settings.root}, where it would be taken for a class of pictures; choose a "
            f"folder outside"
        )
    return folder


def _resumed(arguments: argparse.Namespace) -> tuple[Settings, Path]:
    """The settings and the folder of ``train``: with ``--resume`` alone those of the folder's ``config.json``."""
    options = {name: value for name, value in vars(arguments).items() if name in Settings.__dataclass_fields__}
    folder = arguments.out
    if folder is None:
        named = {**({} if arguments.config is None else read(arguments.config)), **options}
        data, method, seed = (named.get(name, getattr(Settings, name)) for name in ("data", "method", "seed"))
        folder = Path("runs") / data / method / f"seed-{seed}"
    config = folder / "config.json"
    if arguments.resume and arguments.config is None and config.is_file():
        arguments.config = config
    settings = _settings(arguments)
    return settings, _out(folder, settings)


def _refuse_another(folder: Path, settings: Settings) -> None:
    """Refuse to begin a run in a folder that holds one."""
    try:
        changed = difference(read(folder / "config.json"), settings)
    except (ValueError, OSError):
        changed = ""
    if changed:
        raise ValueError(
            f"{folder} holds a run of other settings ({changed}); another --out begins a new one, and --resume with "
            f"the settings of {folder / 'config.json'}, or without any, continues that one"
        )
    raise ValueError(f"{folder} holds a run; --resume continues it, another --out begins a new one")


def _started(arguments: argparse.Namespace) -> None:
    """As many devices as torchrun has started processes, where it has.

    Raises:
        ValueError: other devices were asked for, or there are processes on other machines.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    here, everywhere = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if here != everywhere:
        raise ValueError(f"torchrun has started {everywhere} processes, {here} of them here; one machine is accepted")
    if getattr(arguments, "devices", here) != here:
        raise ValueError(f"--devices is {arguments.devices}; torchrun has started {here}, and as many are accepted")
    arguments.devices = here


def _train(arguments: argparse.Namespace) -> int:
    follow()
    _started(arguments)
    settings, folder = _resumed(arguments)

    from lightning_fabric.utilities.rank_zero import rank_zero_only

    from . import backbones, checkpoint, devices, loop, outcome, trained
    from .data import scan
    from .report import page

    def look() -> None:
        if not arguments.resume and (folder / loop.CHECKPOINT).exists():
            _refuse_another(folder, settings)
        if arguments.resume:
            checkpoint.there(folder / loop.CHECKPOINT)

    look()
    leads = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if leads:
        changed = [s.name for s in fields(settings) if getattr(settings, s.name) != s.default]
        for name in (name for name in changed if name in settings.idle()):
            print(f"pddm-ext: warning: {option(name)} does nothing with --method {settings.method}", file=sys.stderr)
        trained.accelerated(settings.accelerator)  # a look alone, before any picture is read
    dataset = scan.ready(settings, backbones.view(settings), progress=arguments.progress, leads=leads)
    run = loop.Run(settings, dataset, folder)
    # Of several processes the leading one writes, and it claims the folder before it starts the others.
    with checkpoint.claimed(folder) if leads else nullcontext(), devices.parted():
        if leads:
            look()  # again: another run may have begun and ended meanwhile
        if arguments.resume:
            for change in run.resume(accept_changed_data=arguments.accept_changed_data):
                rank_zero_only(print)(
                    f"warning: {change}; curves and baselines before are of what was", file=sys.stderr
                )
        if leads:
            checkpoint.write_bytes(folder / loop.CONFIG, written(settings))
        for line in scan.introduction(run.dataset, held_out=dataset.val is None):
            rank_zero_only(print)(line)
        try:
            run.train(progress=arguments.progress)
            if not run.leads:
                return 0
            metrics = outcome.figures(run, progress=arguments.progress)
        except KeyboardInterrupt:
            if not run.leads:
                return 0  # what starts the processes would kill the leading one for less
            left = f"{folder / loop.CHECKPOINT} of step {run.saved} is there; --resume continues from it"
            hint = "no checkpoint yet" if run.saved is None else left
            print(f"\nstopped after {run.taken} steps; {hint}", file=sys.stderr)
            return 130
        outcome.write(folder, metrics)
    print(page.summary(metrics))
    print(f"run: {folder}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.candidates < 1:
        raise ValueError(f"--candidates is {arguments.candidates}; at least 1 is accepted")
    _file("--json", arguments.json, [arguments.checkpoint])

    from . import backbones, checkpoint, devices, outcome, trained
    from .data import scan
    from .data.augment import PHOTOS, Photographs, from_description
    from .data.load import takes
    from .report import page

    path = arguments.checkpoint / "checkpoint.pt" if arguments.checkpoint.is_dir() else arguments.checkpoint
    state = checkpoint.load(path)
    saved = parse(state["settings"], str(path))
    backbone = saved.get("backbone", Settings.backbone)
    if ":" in backbone and arguments.backbone != backbone:
        raise ValueError(f"{path} has a backbone whose code would run; confirm with --backbone {backbone}")
    view = from_description(state["view"])
    data = arguments.data or saved.get("data", Settings.data)
    if isinstance(view, Photographs) == (data in DRAWINGS):
        seen = "photographs" if isinstance(view, Photographs) else "drawings"
        raise ValueError(f"--data is {data}; {path} was trained on {seen}, which are accepted")
    names = ("data", "root", "split", "gallery", "skip_unreadable", "workers")
    given = {name: getattr(arguments, name) for name in names}
    chosen = {**saved, **{name: v for name, v in given.items() if v is not None}, "download": False}
    if arguments.data is not None or arguments.root is not None:
        # What the run's own data took others may not.
        own = (chosen.get("root", ""), chosen.get("split", Settings.split), chosen.get("gallery", Settings.gallery))
        for name, taken in zip(("split", "gallery"), takes(data, *own), strict=True):
            if given[name] is None and not taken:
                chosen[name] = getattr(Settings, name)
    settings = Settings(**chosen)
    module = backbones.named(backbone, False, view.size) if ":" in backbone else None
    shown = view if isinstance(view, Photographs) else PHOTOS
    dataset = scan.ready(settings, shown, only="test", progress=arguments.progress)
    for line in scan.introduction(dataset, only="test"):
        print(line)
    used = trained.load(path, backbone=module)
    print(outcome.familiar(used.names, dataset))
    kind = arguments.accelerator or settings.accelerator
    used.to(devices.fabric(settings, kind, 1, used.unit is not None).device)
    metrics = outcome.again(
        state, used, dataset, candidates=arguments.candidates, workers=settings.workers, progress=arguments.progress
    )
    if arguments.json is not None:
        checkpoint.deliver(arguments.json, checkpoint.as_json(metrics))
    print(page.summary(metrics))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    common = _settings(arguments)
    folder = _out(arguments.out or Path("runs") / common.data, common)
    for name, most in (("seeds", _SEEDS), ("tries", _SEEDS), ("jobs", None)):
        value = getattr(arguments, name)
        if value < 1:
            raise ValueError(f"--{name} is {value}; at least 1 is accepted")
        if most is not None and value > most:
            raise ValueError(f"--{name} is {value}; at most {most} is accepted")

    from . import checkpoint, compare
    from .report import page

    grid = compare.Grid(
        common, arguments.methods, range(arguments.seeds), folder, lrs=arguments.lrs, tries=arguments.tries
    )
    with checkpoint.claimed(folder):
        try:
            cells = grid.run(arguments.jobs, progress=arguments.progress)
            examples, raw = compare.examples(grid)
        except KeyboardInterrupt:
            print(
                f"\nstopped; what has finished is in {folder}, and the same command goes on from there", file=sys.stderr
            )
            return 130
        report = page.write(folder / page.PAGE, cells, raw, examples)
    print(page.table(cells, raw))
    print(f"report: {report}")
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    if not 0 <= arguments.workers <= WORKERS:
        raise ValueError(f"--workers is {arguments.workers}; at least 0, and at most {WORKERS}, is accepted")
    if not arguments.folder.is_dir():
        raise FileNotFoundError(f"{arguments.folder}: no such folder; a folder of pictures is expected")

    from . import trained
    from .catalogue import UNFINISHED, Catalogue

    embedder = trained.load(
        arguments.checkpoint, backbone=arguments.backbone, device=trained.accelerated(arguments.accelerator)
    )
    try:
        catalogue = Catalogue.build(
            embedder,
            arguments.folder,
            arguments.out,
            index=arguments.index,
            workers=arguments.workers,
            skip_unreadable=arguments.skip_unreadable,
            progress=arguments.progress,
        )
    except KeyboardInterrupt:
        kept = f"what was embedded is kept in {arguments.out}, and the same command goes on from there"
        hint = kept if (arguments.out / UNFINISHED).exists() else "nothing was embedded yet"
        print(f"\nstopped; {hint}", file=sys.stderr)
        return 130
    for line in catalogue.changes.said():
        print(line)
    pictures = f"{len(catalogue)} picture{'' if len(catalogue) == 1 else 's'}"
    print(f"catalogue: {arguments.out}, {pictures}, {catalogue.index} index")
    return 0


def _search(arguments: argparse.Namespace) -> int:
    for name in ("k", "candidates"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"{'-k' if name == 'k' else option(name)} is {getattr(arguments, name)}; at least 1 is accepted"
            )
    for name in ("json", "page"):
        _file(option(name), getattr(arguments, name), [arguments.checkpoint, arguments.catalogue, *arguments.photos])
    if arguments.json and arguments.page and _same(arguments.json, arguments.page):
        raise ValueError(f"--json and --page are both {arguments.page}; two files are accepted")
    missing = [str(photo) for photo in arguments.photos if not photo.is_file()]
    if missing:
        raise FileNotFoundError(f"no such photo: {', '.join(missing)}")

    from . import checkpoint, trained
    from .catalogue import Catalogue
    from .report import search

    embedder = trained.load(
        arguments.checkpoint, backbone=arguments.backbone, device=trained.accelerated(arguments.accelerator)
    )
    catalogue = Catalogue.open(arguments.catalogue, embedder)
    found = catalogue.search(arguments.photos, arguments.k, arguments.by, arguments.candidates)
    if arguments.json is not None:
        checkpoint.deliver(arguments.json, checkpoint.as_json(search.plain(arguments.photos, found)))
    if arguments.page is not None:
        search.write(arguments.page, catalogue, arguments.photos, found, arguments.by)
    print(search.table(arguments.photos, found))
    if arguments.page is not None:
        print(f"page: {arguments.page}")
    return 0


#: What commands write into the folder of a run or of a catalogue.
_WRITTEN = {
    ".lock",
    "checkpoint.pt",
    "config.json",
    "metrics.json",
    "catalogue.json",
    "features.npy",
    "structures.npy",
    "index.faiss",
    "features",
    "tensorboard",
    ".unfinished",
}


#: How files that were written for --page and --json begin.
_PAGE = re.compile(rb"<!doctype html>.*?<title>pddm-ext: \d+ searched for among ", re.DOTALL)
_JSON = re.compile(rb"\s*([\[{]|$)")


def _same(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one file, be it there or not."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def _file(name: str, path: Path | None, inputs: Sequence[Path]) -> None:
    """Refuse a file to write that is no file, is read or written by a command, or holds something else.

    Args:
        name: ``--json`` or ``--page``, which says what it is to hold.
        path: the file, if one was asked for.
        inputs: files that are read, and folders of runs and catalogues.

    Raises:
        ValueError: it is one of these.
    """
    if path is None:
        return
    real = Path(os.path.realpath(path))  # what is behind a link is what is written
    if path.is_dir() or real.is_symlink() or not real.parent.is_dir():
        raise ValueError(f"{name} is {path}; a file in a folder that is there is accepted")
    for read_from in inputs:
        if not read_from.is_dir() and _same(real, read_from):
            raise ValueError(f"{name} is {path}, which is read; another file is accepted")
        run = not read_from.is_dir() and (read_from.parent / "config.json").is_file()
        folder = read_from.parent if run else read_from
        holders = [parent for parent in real.parents if folder.is_dir() and _same(parent, folder)]
        if holders and real.relative_to(holders[0]).parts[0] in _WRITTEN:
            raise ValueError(f"{name} is {path}, which is of {folder}; a file elsewhere is accepted")
    # A device or a pipe holds nothing, and this process's own output is not overwritten.
    if not real.is_file() or own(path) is not None:
        return
    kind, begins = ("page of a search", _PAGE) if name == "--page" else ("JSON", _JSON)
    try:
        with real.open("rb") as file:
            begin = file.read(4096)
    except OSError as error:
        raise ValueError(f"{name} is {path} ({error.strerror}); a file that can be written is accepted") from error
    if begin and not begins.match(begin):
        raise ValueError(
            f"{name} is {path}, which holds something that is no {kind}; a new file, or an earlier one, is accepted"
        )


def _export(arguments: argparse.Namespace) -> int:
    from . import export, trained

    without_onnx = "onnx" not in export.available()
    if without_onnx and "onnx" in (arguments.format or ()):
        raise ValueError(f"--format onnx needs packages that come with {bring('export')}")
    embedder = trained.load(arguments.checkpoint, backbone=arguments.backbone)
    for path in export.export(embedder, arguments.out, arguments.format):
        print(path)
    if embedder.unit is None and embedder.settings.unit_updates:
        print(f"not written: a unit of {embedder.settings.method}, {embedder.lacks}")
    if without_onnx and arguments.format is None:
        print(f"not written: ONNX, whose packages come with {bring('export')}")
    return 0


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "but torch finds no GPU here"
    kernel = "Hopper's" if _C.warpgroups(torch.cuda.current_device()) else "the portable"
    return f"{torch.cuda.get_device_name()}, half precisions by {kernel} kernel"


def _info(arguments: argparse.Namespace) -> int:
    print(info())
    return 0


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
