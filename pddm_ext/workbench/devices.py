"""Where a run computes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger

from pddm_ext import _C

from .settings import Settings

#: Seconds for what is finished already.
_LET_GO = 0.5


@contextmanager
def parted() -> Iterator[None]:
    """Leave the processes' group at the end: its threads would otherwise outlive the interpreter now and then, which
    ends in an abort. Whoever drops the group's last reference waits for them, holding Python's lock, which they may
    want once more to let go of the last tensors: so they get the time for it before."""
    try:
        yield
    finally:
        if dist.is_initialized():
            time.sleep(_LET_GO)
            dist.destroy_process_group()


def fabric(settings: Settings, accelerator: str, devices: int, scores: bool, loggers: Sequence[Logger] = ()) -> Fabric:
    """What is named is taken or refused; ``auto`` is the same for every method, so that those of a comparison share a
    device: what Lightning Fabric chooses, or the CPU where the kernels do not have that.

    Args:
        settings: say the precision.
        accelerator: by Lightning Fabric's names.
        devices: processes.
        scores: whether there is a PDDM unit.
        loggers: get what the run logs.

    Raises:
        ValueError: the accelerator is not there, or the kernels do not have it.
    """
    try:
        made = Fabric(
            accelerator=accelerator,
            devices=devices,
            precision=settings.precision,  # type: ignore[arg-type]
            loggers=list(loggers),
        )
    except (RuntimeError, ImportError, ValueError) as error:
        hint = "" if accelerator == "cpu" else "; --accelerator cpu is there on every machine"
        raise ValueError(f"--accelerator {accelerator} is not to be had: {error}{hint}") from error
    kind = made.device.type
    served = ("cpu", "cuda") if _C.build_info()["cuda"] not in (None, "emulated") else ("cpu",)
    if kind in served:
        return made
    here = f"this build of pddm_ext scores on {' and '.join(served)}"
    if accelerator == "auto":
        warnings.warn(f"--accelerator auto would be {kind} here; {here}: on the CPU instead", stacklevel=3)
        return fabric(settings, "cpu", devices, scores, loggers)
    if scores:
        raise ValueError(f"--accelerator {accelerator} is {kind} here; {here}; --accelerator cpu is accepted")
    return made
