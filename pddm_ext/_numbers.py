"""Numbers given as arguments: the error names the argument, what it was and what is accepted."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, Literal

Kind = Literal["a finite number from 0", "a positive finite number"]


_MOST_BITS = sys.float_info.max_exp - 1  # of an int that is a float


def number(name: str, value: Any, kind: Kind) -> None:
    # A fraction is a number, and tensors cannot be multiplied with it.
    if isinstance(value, bool | Fraction) or not isinstance(value, Real):
        raise TypeError(f"{name} is a {type(value).__name__}; {kind} is accepted")
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError(f"{name} is an int of {value.bit_length()} bits; {kind} is accepted")
    if not math.isfinite(value) or value < 0 or (value == 0 and kind != "a finite number from 0"):
        raise ValueError(f"{name} is {value}; {kind} is accepted")


def integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is a {type(value).__name__}; an int is accepted")


def size(name: str, value: Any, least: int = 1) -> None:
    integer(name, value)
    if value < least:
        raise ValueError(f"{name} is {value}; at least {least} is accepted")


def switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; a bool is accepted")
