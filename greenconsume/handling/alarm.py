"""Owns the `handler_timeout`: what interrupts a handler that takes too long, and kills one that goes on.

Called by `boundary`, around one message.
"""

from __future__ import annotations

from collections.abc import Callable

import gevent

from greenconsume.errors import HandlerTimeout
from greenconsume.handling.jobs import Job

#: Seconds between two attempts to kill a handler that goes on, where `cancel_timeout` says less.
PATIENCE = 1.0


class Alarm:
    """Interrupts one handler at its `handler_timeout`, and kills it if it does not end then.

    Args:
        job: The handler.
        seconds: The timeout.
        cancel_timeout: Seconds that it has to clean up.
    """

    __slots__ = ("_cancel_timeout", "_job", "_seconds", "_timer")

    def __init__(self, job: Job, seconds: float, cancel_timeout: float) -> None:
        self._job, self._seconds, self._cancel_timeout = job, seconds, cancel_timeout

    def __enter__(self) -> None:
        self._start(self._seconds, self._time_out)

    def __exit__(self, *_exc: object) -> None:
        self._timer.stop()
        self._timer.close()

    def _start(self, seconds: float, action: Callable[[], None]) -> None:
        self._timer = gevent.get_hub().loop.timer(seconds)
        self._timer.start(action)

    def _again(self, seconds: float, action: Callable[[], None]) -> None:
        self.__exit__()
        self._start(seconds, action)

    def _time_out(self) -> None:
        self._again(self._cancel_timeout, self._kill)
        reason = f"handler_timeout of {self._seconds:g} s is over"
        self._job.interrupt(HandlerTimeout(self._seconds), reason)

    def _kill(self) -> None:
        self._again(max(self._cancel_timeout, PATIENCE), self._kill)
        self._job.kill("it goes on after its handler_timeout", by_force=False)
