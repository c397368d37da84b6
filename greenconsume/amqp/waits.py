"""Owns when the waits of one session end: at a stop signal or a deadline, as its phase has it (law 3).

The session says which phase begins; its channels wait here and know no phase. Sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gevent.event import Event

from greenconsume.stopping import Deadline, StopSignal, wait, wait_open

#: What is said where a session is closed while it consumes, by another than who consumes.
CLOSED_IN_USE = (
    "a handler, or a library that it uses, closed the connection that its consumer consumes over: use "
    "another there, connection.clone()"
)


class Limits(Protocol):
    """The seconds that a link allows for an answer, and for a close."""

    call_timeout: float
    close_timeout: float


class Waits:
    """The stop signals and the deadline of a session, of which each phase has its own.

    Attributes:
        stop: Ends a wait for a reply, with `StoppedError`: while the session is set up.
        publish_stop: Ends a wait for a broker that blocks publishers: while the session publishes.
        deadline: When every wait for a reply ends, with `TimeoutError`: while the session closes.
        attend: Called with whether any consumer runs, before the session waits for messages: while it
            consumes.
    """

    __slots__ = ("_limits", "attend", "deadline", "publish_stop", "stop")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.stop: StopSignal | None = None
        self.publish_stop: StopSignal | None = None
        self.deadline: Deadline | None = None
        self.attend: Callable[[bool], None] | None = None

    def begin_setup(self, stop: StopSignal) -> None:
        """Have `stop` end every wait for a reply."""
        self.stop = stop

    def begin_publishing(self, stop: StopSignal) -> None:
        """Have `stop` end every wait for a broker that blocks publishers, and no call."""
        self.publish_stop = stop

    def begin_consuming(self, attend: Callable[[bool], None] | None = None) -> None:
        """Have no stop end a call: what a callback calls may finish."""
        self.stop, self.attend = None, attend

    def begin_close(self, deadline: Deadline | None = None) -> Deadline:
        """Have every wait for a reply end at one deadline, which is returned; the first call sets it."""
        self.stop = self.attend = None
        if self.deadline is None:
            self.deadline = deadline or Deadline(self._limits.close_timeout)
        return self.deadline

    @property
    def is_setting_up(self) -> bool:
        """True until it consumes, if it is to."""
        return self.stop is not None

    @property
    def close_deadline(self) -> Deadline:
        """The deadline of a channel that is closed now: its session's, or in `close_timeout`."""
        return self.deadline or Deadline(self._limits.close_timeout)

    @property
    def publishing(self) -> StopSignal | None:
        """The signal that ends a wait for a broker that blocks publishers."""
        return self.stop or self.publish_stop

    def wait_alone(self, event: Event, timeout: float | None = None) -> None:
        """Wait as `wait_for_reply` does for an event that nobody else waits for: a stop sets it, too."""
        wait(event, self._reply_deadline(timeout), self.stop)

    def wait_for_reply(self, event: Event, timeout: float | None = None) -> bool:
        """Wait for a reply, by default for `call_timeout` seconds; return whether it came.

        Raises:
            StoppedError: The stop signal was set first.
        """
        if wait_open(event, self._reply_deadline(timeout), self.stop):
            return True
        if self.stop is not None:
            self.stop.check()
        return False

    def wait_for_confirm(self, event: Event, timeout: float | None) -> bool:
        """Wait for a confirm as for a reply; once its consumer stops, no longer than a close may take."""
        limit = timeout or self._limits.call_timeout
        deadline, stop = Deadline(limit), self.publish_stop
        if stop is not None:
            wait_open(event, deadline, stop)
            if stop.is_set() and not event.is_set():
                deadline = Deadline(min(limit, self._limits.close_timeout))
        return self.wait_for_reply(event, deadline.remaining)

    def _reply_deadline(self, timeout: float | None) -> Deadline:
        if timeout is not None:
            return Deadline(timeout)
        return self.deadline or Deadline(self._limits.call_timeout)
