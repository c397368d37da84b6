"""Owns the warning that something blocks the hub: a handler that computes, or waits in C, stops everybody.

A thread of its own asks the hub for a sign of life, and where none comes looks at what the hub's thread is
doing. gevent has a monitor thread too, but that one prints the tree of all greenlets for each warning,
hooks into every switch, and is switched on for the whole process. Nothing ends a handler that never
waits: no timeout, no signal but SIGKILL. Called by `runtime`, where it is asked for.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import gevent
from gevent import monkey

from greenconsume.events import HubBlocked, emit
from greenconsume.handling.jobs import job_on


class BlockWatch:
    """Watches the hub of the greenlet that makes it, until it is closed.

    Args:
        seconds: For how long the hub must have been blocked to be told of.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        hub = gevent.get_hub()
        self._loop, self._thread = hub.loop, hub.thread_ident
        self._asked = self._answered = 0
        # The unpatched ones, looked up here: kept at import they would look like names that escaped gevent.
        self._closed: Any = monkey.get_original("_thread", "allocate_lock")()
        self._closed.acquire()
        start_new_thread: Any = monkey.get_original("_thread", "start_new_thread")
        start_new_thread(self._watch, ())

    def close(self) -> None:
        """End the thread, soon. Idempotent. Never switches."""
        if self._closed.locked():
            self._closed.release()

    def _watch(self) -> None:
        asked_at, told = monotonic(), True
        while not self._closed.acquire(timeout=self._seconds / 4):
            if self._answered == self._asked:
                asked_at, told = monotonic(), False
                self._asked += 1
                self._loop.run_callback_threadsafe(self._answer)
            elif not told and monotonic() - asked_at >= self._seconds:
                told = True
                self._tell(monotonic() - asked_at)

    def _answer(self) -> None:
        self._answered = self._asked

    def _tell(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._thread)
        job = job_on(self._thread)
        consumer, tag = (job.owner, job.message.delivery_tag) if job is not None else ("", None)
        stack = "".join(traceback.format_stack(frame)).rstrip() if frame is not None else ""
        emit(HubBlocked(consumer, tag, seconds, stack))


@contextmanager
def watched_hub(seconds: float | None) -> Iterator[None]:
    """Watch this greenlet's hub until the end of the block; with None, do not."""
    watch = BlockWatch(seconds) if seconds is not None else None
    try:
        yield
    finally:
        if watch is not None:
            watch.close()
