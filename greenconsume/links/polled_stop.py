"""Owns the stop of a consumer that nothing signals: it can only be asked, now and then.

Called by `pool`, for consumers whose class has a `should_stop` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gevent

from greenconsume.stopping import ASK_INTERVAL, StopSignal


@contextmanager
def polled_stop(stop: StopSignal, should_stop: Callable[[], object] | None) -> Iterator[StopSignal]:
    """Give a signal that is set with `stop`, and soon after `should_stop` begins to return something true."""
    if should_stop is None:
        yield stop
        return
    either = StopSignal()

    def follow() -> None:
        either.set(stop.reason or "should_stop")

    def ask() -> None:
        while not either.wait(ASK_INTERVAL):
            if should_stop():
                follow()

    stop.link(follow)
    asking = gevent.spawn(ask)
    try:
        yield either
    finally:
        asking.kill(block=False)
        stop.unlink(follow)
