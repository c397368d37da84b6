"""Owns the measure of how late the hub is: a timer that is due now and then, and when it has its turn.

It runs only while somebody looks, and must never keep a hub alive. Called by whoever makes a status.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

import gevent

from greenconsume.admin.status import LagStatus
from greenconsume.tally import Timings

#: Seconds between two measures.
INTERVAL = 0.25


class LagWatch:
    """Measures the hub of the greenlet that makes it, until it is closed.

    Attributes:
        timings: How late it was, each time.
        last: How late it was last, in seconds.
    """

    def __init__(self) -> None:
        self.timings = Timings()
        self.last = 0.0
        self._due = monotonic() + INTERVAL
        self._timer: Any = gevent.get_hub().loop.timer(INTERVAL, INTERVAL, ref=False)
        self._timer.start(self._measure)

    def _measure(self) -> None:
        now = monotonic()
        self.last = max(0.0, now - self._due)
        self._due = now + INTERVAL
        self.timings.note(now, self.last)

    def status(self) -> LagStatus:
        """Return how late the hub was in the last minute. Never switches."""
        minute = self.timings.last_minute()
        half, most, all_ = (minute.quantile(share) for share in (0.5, 0.99, 1.0))
        return LagStatus(half, most, all_ or 0.0, self.timings)

    def close(self) -> None:
        """Measure no more. Idempotent. Never switches."""
        self._timer.stop()
        self._timer.close()
