"""What a run's numbers depend on. Imports no training extra, so that the command line can show its defaults."""

from __future__ import annotations

from dataclasses import dataclass

from pddm_ext.quadruplets import MODES, Mode


@dataclass(frozen=True)
class Settings:
    """The options of ``pddm-ext train``, by their names there.

    Raises:
        ValueError: a value that cannot be trained with; the message names the option.
    """

    data: str = "glyphs"
    mode: Mode = "anchor"
    steps: int = 600
    classes: int = 16
    samples: int = 4
    dim: int = 64
    lr: float = 1e-3
    unit_lr_factor: float = 3.0
    seed: int = 0
    every: int = 50

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"--mode is {self.mode!r}; {', '.join(MODES)} are accepted")
        for name, least in (("steps", 1), ("classes", 2), ("samples", 2), ("dim", 1), ("every", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"--{name} is {value}; at least {least} is accepted")
        if self.seed >= 2**32:
            raise ValueError(f"--seed is {self.seed}; less than 2**32 is accepted")
        for name in ("lr", "unit_lr_factor"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{option(name)} is {value}; a positive finite number is accepted")


def option(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")
