"""Ctrl-C where it does no harm: between two steps, in the midst of an evaluation, and in no process that starts. And
the end of processes whose leading one is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LEADER = "PDDM_LEADING_PROCESS"


@contextmanager
def leading() -> Iterator[None]:
    """What is started meanwhile, and calls :func:`follow`, ends when this process does."""
    os.environ[_LEADER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_LEADER]


def follow() -> None:
    """End with the process that has started this one as the leading of several, whatever ends it: killed before they
    have met, it would be waited for as long as torch.distributed waits for anybody, half an hour."""
    leader = int(os.environ.get(_LEADER, 0))

    def watch() -> None:
        while os.getppid() == leader:
            time.sleep(0.5)
        os._exit(1)

    if leader:
        threading.Thread(target=watch, daemon=True).start()


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, by which schedulers and containers end a process, is as Ctrl-C meanwhile, where nobody else hears it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Interrupts:
    """As long as this lasts, a first Ctrl-C waits for whoever asks for it, and a second one ends at once. SIGTERM does
    so, too, within :func:`terminable`.

    Python hears signals in the main thread alone, and what ignores Ctrl-C goes on ignoring it: there all is left as it
    was.

    Attributes:
        asked: whether there has been one.
        twice: whether there has been another after it.
    """

    def __init__(self) -> None:
        self.asked, self.twice, self._open = False, False, False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            heard = []
            if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
                heard.append(signal.SIGINT)
            if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
                heard.append(signal.SIGTERM)
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _hear(self, *_: object) -> None:
        self.twice, self.asked = self.asked, True
        if self.twice or self._open:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Meanwhile the first Ctrl-C does not wait either.

        Raises:
            KeyboardInterrupt: there has been one.
        """
        if self.asked:
            raise KeyboardInterrupt
        self._open = True
        try:
            yield
        finally:
            self._open = False


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits, and is blocked in processes that start meanwhile.

    It goes to all of them, and one that is still importing would answer with a page of traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
