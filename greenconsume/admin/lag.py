"""Owns the measure of how late the hub is: a timer that is due now and then, and when it has its turn.

It runs only while somebody looks, or consumers are to take less while the hub is late; it must never keep a
hub alive. Called by `control`.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

import gevent

from greenconsume.admin.status import LagStatus
from greenconsume.tally import Timings

#: Seconds between two measures.
INTERVAL = 0.25


class LagWatch:
    """Measures the hub of the greenlet that makes it, until it is closed.

    Args:
        on_lag: Called with each measure, in the hub: it must not switch.

    Attributes:
        timings: How late it was, each time.
        last: How late it was last, in seconds.
    """

    def __init__(self, on_lag: Callable[[float], object] | None = None) -> None:
        self._on_lag = on_lag
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
        if self._on_lag is not None:
            self._on_lag(self.last)

    def status(self) -> LagStatus:
        """Return how late the hub was in the last minute. Never switches."""
        minute = self.timings.last_minute()
        half, most, all_ = (minute.quantile(share) for share in (0.5, 0.99, 1.0))
        return LagStatus(half, most, all_ or 0.0, self.timings)

    def close(self) -> None:
        """Measure no more. Idempotent. Never switches."""
        self._timer.stop()
        self._timer.close()
