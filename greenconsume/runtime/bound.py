"""Owns the bound of one stop: a drain that has to end sooner than its runtime and consumers say.

It hurries the ladder by the rungs that there are, and so holds for every consumer whatever its own
timeouts. It must never end a drain itself. Called by `runtime`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import gevent

from greenconsume.checks import is_seconds
from greenconsume.stopping import Rungs

#: Seconds that are kept for killing what is left and for saying goodbye to the broker.
_GOODBYE = 1.0


class DrainBound:
    """The end of a drain, in seconds from the moment that this is made.

    Args:
        within: Seconds until everything has ended.

    Raises:
        ValueError: `within` is negative.
    """

    __slots__ = ("_at", "within")

    def __init__(self, within: float) -> None:
        if not is_seconds(within):
            raise ValueError(f"within must be 0 seconds or more, not {within!r}")
        self.within = within
        self._at = monotonic()

    def shares(self, cancel_timeout: float) -> tuple[float, float]:
        """Return the seconds from now until what runs is cancelled, and until it is killed."""
        passed = monotonic() - self._at
        rest = self.within - min(_GOODBYE, self.within / 4)
        cancelling = min(cancel_timeout, rest / 4)
        return max(0.0, rest - cancelling - passed), max(0.0, rest - passed)


@contextmanager
def hurried(rungs: Rungs, bound: DrainBound | None, cancel_timeout: float) -> Iterator[None]:
    """Hurry the drain within the block so that it ends in time; without a bound, do not."""
    if bound is None:
        yield
        return
    loop = gevent.get_hub().loop
    timers = [loop.timer(seconds, ref=False) for seconds in bound.shares(cancel_timeout)]
    why = f"the drain has {bound.within:g} s in all"
    for timer, rung in zip(timers, (rungs.cancel, rungs.kill), strict=True):
        timer.start(rung.set, why)
    try:
        yield
    finally:
        for timer in timers:
            timer.stop()
            timer.close()
