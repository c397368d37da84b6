"""Owns places that are given out in order: how many handlers of a pool, or of a runtime, run at once.

It must never start anything. Called by `pool`.
"""

from __future__ import annotations

from collections import deque

from gevent.event import Event

from greenconsume.stopping import Deadline, StopSignal, wait


class Slots:
    """A number of places, given out in the order in which they were asked for.

    Args:
        count: How many there are.

    Raises:
        ValueError: `count` is less than one.
    """

    __slots__ = ("_queue", "count", "free")

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"there must be at least 1 slot, not {count!r}")
        self.count = self.free = count
        self._queue: deque[Event] = deque()

    def acquire(self, stop: StopSignal) -> bool:
        """Take a place, waiting for one; return False, without one, if `stop` is set by then.

        Switches: only if none is free.
        """
        if stop.is_set():
            return False
        if self.free and not self._queue:
            self.free -= 1
            return True
        turn = Event()
        self._queue.append(turn)
        try:
            wait(turn, Deadline(None), stop)
        except BaseException:  # a kill: whoever waits behind it is not to wait for ever
            self._decline(turn)
            raise
        if stop.is_set():
            self._decline(turn)
            return False
        return True

    def _decline(self, turn: Event) -> None:
        if turn in self._queue:
            self._queue.remove(turn)
        else:  # its turn had come
            self.release()

    def release(self) -> None:
        """Give a place back, to whoever has waited longest. Never switches."""
        if self._queue:
            self._queue.popleft().set()
        else:
            self.free += 1
