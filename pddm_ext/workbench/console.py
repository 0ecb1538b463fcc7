"""What a person sees of a run. Neither an encoding nor a reader that has left, nor a stream that is closed, ends it."""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
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


def own(path: str | os.PathLike[str]) -> int | None:
    """The descriptor of this process's output or errors, where the path leads to the same file, as /dev/stdout does."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


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
        stays: whether the bar is left standing at its end.
    """

    def __init__(self, what: str, total: int, done: int, unit: str, show: bool | None, *, stays: bool = True) -> None:
        from tqdm import tqdm

        class Bar(tqdm):  # type: ignore[misc]
            @property
            def format_dict(bar) -> Any:
                """With a rate that makes tqdm's estimate that of :meth:`Progress.remaining`."""
                values, left = super().format_dict, self.remaining()
                if left:
                    values["rate"] = (self._total - self._done) / left
                return values

        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown = terminal if show is None else show
        self._what, self._lines = what, show is None and not terminal and sys.stderr is not None
        self._first, self._done, self._total, self._unit = done, done, total, unit
        self._every, self._asides, self._aside_seconds, self._begun = 0, 0, 0.0, time.perf_counter()
        self._bar = Bar(
            total=total, initial=done, unit=unit, desc=what, disable=not self._shown, mininterval=0.5, leave=stays
        )

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

    def expect(self, every: int) -> None:
        """An aside comes after every so many steps, and at the end: the estimate of what remains counts them."""
        self._every = every

    @contextmanager
    def aside(self, what: str, total: int, unit: str) -> Iterator[Progress]:
        """Work between two steps, with a bar of its own that goes when it is done."""
        begun = time.perf_counter()
        with Progress(what, total, 0, unit, self._shown, stays=False) as bar:
            yield bar
        self._asides += 1
        self._aside_seconds += time.perf_counter() - begun

    def remaining(self) -> float | None:
        """Seconds that the steps left, and the asides among them, will take as they did so far; None before a step."""
        steps = self._done - self._first
        if not steps:
            return None
        left = self._total - self._done
        seconds = left * (time.perf_counter() - self._begun - self._aside_seconds) / steps
        if self._every and self._asides:
            asides = self._total // self._every - self._done // self._every + (self._total % self._every > 0)
            seconds += asides * self._aside_seconds / self._asides
        return seconds
