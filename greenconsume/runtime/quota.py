"""Owns the end of a runtime that has handled enough messages. Called by `runtime`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gevent

from greenconsume.runtime.child import Child

#: Seconds between two looks. To look with each message would cost every message more than this costs a
#: process.
_INTERVAL = 0.25


class Quota:
    """Stops what handles messages when it has handled so many, or soon after.

    Args:
        count: How many.
        children: The consumers that handle them.
        stop: Called once, in the hub: it must not switch.
    """

    def __init__(
        self, count: int, children: Sequence[Child], stop: Callable[[str], object]
    ) -> None:
        self._children, self._stop = children, stop
        self._due = self._handled() + count
        self._why = f"max_messages of {count} are handled"
        self._timer = gevent.get_hub().loop.timer(_INTERVAL, _INTERVAL, ref=False)
        self._timer.start(self._look)

    def close(self) -> None:
        """Look no more. Idempotent. Never switches."""
        self._timer.stop()
        self._timer.close()

    def _handled(self) -> int:
        return sum(child.tally.ok + child.tally.failed for child in self._children)

    def _look(self) -> None:
        if self._handled() >= self._due:
            self._timer.stop()
            self._stop(self._why)
