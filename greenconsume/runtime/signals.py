"""Owns what SIGTERM and SIGINT do to a runtime: the first drains it, each further one cuts the drain shorter.

Called by `runtime`; afterwards the process hears signals as it did before.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import gevent

from greenconsume.events import DrainEscalated, emit

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def rungs_on_signals(runtime: Drainable) -> Iterator[None]:
    """Have SIGTERM and SIGINT stop a runtime, within the block; each further one goes a rung down.

    In another thread than the main one they are left alone.
    """
    if not gevent.get_hub().main_hub:  # signals belong to the main thread
        yield
        return
    ladder = _Ladder(runtime)
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    watchers = [gevent.signal_handler(signum, ladder.climb, signum) for signum in _SIGNALS]
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()
        for signum, handler in before.items():
            if handler is not None:  # one that Python did not set, it cannot set again
                signal.signal(signum, handler)


class Drainable(Protocol):
    """A runtime, as a signal sees it."""

    @property
    def children(self) -> Sequence[Running]:
        """Its consumers."""

    def stop(self, reason: str) -> None:
        """Drain."""

    def cancel(self, reason: str) -> None:
        """Cancel what still runs."""

    def kill(self, reason: str) -> None:
        """Kill what still runs."""


class Running(Protocol):
    """A consumer, as a signal sees it."""

    @property
    def running(self) -> bool:
        """True while its greenlet has yet to finish."""


class _Ladder:
    """The steps that signals take: each further one goes a rung down."""

    def __init__(self, runtime: Drainable) -> None:
        self._runtime = runtime
        self._rungs = iter((runtime.stop, runtime.cancel, runtime.kill))

    def climb(self, signum: int) -> None:
        name = signal.Signals(signum).name
        rung = next(self._rungs, None)
        if rung is None:
            running = sum(child.running for child in self._runtime.children)
            emit(DrainEscalated("exit at once", running, name))
            raise SystemExit(1)  # gevent raises it in the main greenlet
        rung(name)
