"""Owns which of a server's workers run the consumers, where not all are to: a few places, each held by one.

A place is a byte of a file that the arbiter makes and its workers inherit, and holding it is a lock on that
byte. The kernel gives it back however its holder ends, kill -9 included. It must import neither gevent nor
kombu at its top, for the arbiter imports it. Called by `consumers`, in the arbiter, and by `host`.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

#: Kept over a reload: the new workers wait for the old ones, and have to find the same file.
_known: dict[tuple[str, int], Turns] = {}


class Turns:
    """A number of places for workers.

    Args:
        count: How many there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._fd, path = tempfile.mkstemp(prefix="greenconsume-")
        os.unlink(path)
        self._held: int | None = None

    def take(self, on_taken: Callable[[], object]) -> bool:
        """Take a place if one is free, else have native threads wait for one. Never switches.

        Args:
            on_taken: Called in one of these threads when it has a place.

        Returns:
            Whether one was free.
        """
        for place in range(self.count):
            if self._lock(place, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._held = place
                return True
        # Here, as this is the worker: what is native must be asked for once gevent has patched.
        from gevent import monkey

        guard = monkey.get_original("_thread", "allocate_lock")()
        start_new_thread: Any = monkey.get_original("_thread", "start_new_thread")
        for place in range(self.count):
            start_new_thread(self._wait, (place, guard, on_taken))
        return False

    def release(self) -> None:
        """Let another worker have the place. Idempotent. Never switches."""
        held, self._held = self._held, None
        if held is not None:
            self._lock(held, fcntl.LOCK_UN)

    def _wait(
        self, place: int, guard: AbstractContextManager[object], on_taken: Callable[[], object]
    ) -> None:
        # There is no way but this to be woken by a lock.
        if not self._lock(place, fcntl.LOCK_EX):
            return
        with guard:
            is_first = self._held is None
            if is_first:
                self._held = place
        if is_first:
            on_taken()
        else:
            self._lock(place, fcntl.LOCK_UN)

    def _lock(self, place: int, how: int) -> bool:
        try:
            fcntl.lockf(self._fd, how, 1, place)
        except OSError:
            return False
        return True


def ensure_turns(target: str, count: int) -> Turns:
    """Return the places for a target in this server, after a reload the same ones."""
    if (target, count) not in _known:
        _known[target, count] = Turns(count)
    return _known[target, count]
