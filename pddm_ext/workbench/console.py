"""What a person sees of a run. Neither an encoding nor a reader that has left, nor a stream that is closed, ends it."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO


class _Lenient:
    """A text stream: what its encoding lacks is written as an escape, and what nobody reads any more is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            try:
                stream.reconfigure(errors="backslashreplace")
            except OSError:  # it writes out what it has
                self._drop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
        except ValueError:  # closed
            pass
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()
        except ValueError:
            pass

    def _drop(self) -> None:
        """What is still in the buffer, too, or the interpreter would stumble over it at its end."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except OSError:  # a stream without a file
            pass


@contextmanager
def lenient() -> Iterator[None]:
    """Standard output and error that take any text as long as this lasts."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            # Python has None where the stream was closed before it started.
            there = stack.enter_context(open(os.devnull, "w", encoding="utf-8")) if stream is None else stream
            kept = _Lenient(there)
            stack.callback(kept.flush)
            stack.enter_context(redirect(kept))
        yield


@contextmanager
def brief_warnings(of: str = "") -> Iterator[None]:
    """This package's warnings in a line each, as its errors are, as long as this lasts.

    Args:
        of: what they are about, in front of each.
    """
    usual = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category.__module__.partition(".")[0] == __name__.partition(".")[0]:
            return f"pddm-ext: warning: {of}{message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


class Progress:
    """A bar on a terminal; in a log, a line for each report.

    Args:
        what: is done, in a word.
        total: steps of it.
        done: of those, before.
        unit: what a step is called.
        show: the bar, on anything (True), nothing at all (False), or as standard error is (None).
    """

    def __init__(self, what: str, total: int, done: int, unit: str, show: bool | None) -> None:
        from tqdm import tqdm

        terminal = sys.stderr is not None and sys.stderr.isatty()
        bar = terminal if show is None else show
        self._what, self._lines = what, show is None and not terminal and sys.stderr is not None
        self._bar = tqdm(total=total, initial=done, unit=unit, desc=what, disable=not bar, mininterval=0.5)
        self._done, self._total, self._unit = done, total, unit

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        self._done += count
        self._bar.update(count)

    def report(self, text: str) -> None:
        self._bar.set_postfix_str(text)
        if self._lines:
            print(f"{self._what}: {self._unit} {self._done}/{self._total}, {text}", file=sys.stderr, flush=True)
