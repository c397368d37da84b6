"""Owns what signals do to a runtime: SIGTERM and SIGINT drain it, SIGUSR1 has its greenlets logged.

The first one drains, each further one cuts the drain shorter. Called by `runtime`; afterwards the process
hears signals as it did before.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import gevent

from greenconsume.admin.greenlets import tree
from greenconsume.events import DrainEscalated, GreenletsDumped, emit

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DUMP = signal.SIGUSR1


@contextmanager
def rungs_on_signals(runtime: Drainable) -> Iterator[None]:
    """Have SIGTERM and SIGINT stop a runtime, within the block; each further one goes a rung down.

    Also, SIGUSR1 has the tree of greenlets logged, unless the program has its own use for it. In another
    thread than the main one they are left alone.
    """
    if not gevent.get_hub().main_hub:  # signals belong to the main thread
        yield
        return
    ladder = _Ladder(runtime)
    actions: dict[int, Callable[[int], None]] = dict.fromkeys(_SIGNALS, ladder.go_down)
    if signal.getsignal(_DUMP) is signal.SIG_DFL:
        actions[_DUMP] = _dump
    before = {signum: signal.getsignal(signum) for signum in actions}
    watchers = [gevent.signal_handler(signum, act, signum) for signum, act in actions.items()]
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.cancel()
        for signum, handler in before.items():
            if handler is not None:  # one that Python did not set, it cannot set again
                signal.signal(signum, handler)


def _dump(_signum: int) -> None:
    emit(GreenletsDumped(tree()))


class Drainable(Protocol):
    """A runtime, as a signal sees it."""

    @property
    def children(self) -> Sequence[Running]:
        """The consumers of the runtime."""

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

    def go_down(self, signum: int) -> None:
        name = signal.Signals(signum).name
        rung = next(self._rungs, None)
        if rung is None:
            running = sum(child.running for child in self._runtime.children)
            emit(DrainEscalated("exit at once", running, name))
            raise SystemExit(1)  # gevent raises it in the main greenlet
        rung(name)
