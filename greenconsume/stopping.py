"""Owns the two things that end a wait: the stop signal and the monotonic deadline.

Every wait of the package is given both (law 3). Setting a signal never switches and is legal from any
greenlet, thread or signal handler; waiting on one belongs to a greenlet.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Protocol

from gevent import get_hub
from gevent.event import Event

from greenconsume.errors import StoppedError

#: The reason for which a forked child's copies of consumers are stopped.
FORK = "fork"


class StopSignal:
    """An event that remembers why it was set, and wakes everything that waits for it.

    Safe to set from any greenlet and any thread. Clearing it makes it usable again, for a restart.
    """

    __slots__ = ("__weakref__", "_callbacks", "_engaged", "reason")

    def __init__(self) -> None:
        self.reason: str | None = None
        self._callbacks: dict[Callable[[], object], object] = {}
        self._engaged = False

    def set(self, reason: str = "stop") -> None:
        """Stop whatever observes this signal; the first reason is kept.

        Switches: never. From any greenlet, thread or signal handler.
        """
        if self.reason is not None:
            return
        self.reason = reason
        for callback, loop in list(self._callbacks.items()):
            # The thread-safe call also serves this thread; asking which thread this is would
            # make gevent build a hub for a foreign one.
            loop.run_callback_threadsafe(callback)  # type: ignore[attr-defined]  # gevent's loops are untyped

    def engage(self) -> None:
        """Bind the signal to this process: in the children that it forks from now on, the copies are set.

        What was only made before a fork is each child's own. Linking engages, too. Idempotent.
        """
        if not self._engaged:
            self._engaged = True
            _signals.add(self)

    def clear(self) -> None:
        """Make the signal usable again, for a consumer that is restarted."""
        self.reason = None

    def is_set(self) -> bool:
        """Return whether a stop was asked for."""
        return self.reason is not None

    def link(self, callback: Callable[[], object]) -> None:
        """Have the hub call `callback` once the signal is set; at once if it is already.

        The callback runs in the hub of the greenlet that linked it: it must not switch.
        """
        self.engage()
        loop = get_hub().loop
        self._callbacks[callback] = loop
        if self.reason is not None:
            loop.run_callback(callback)

    def unlink(self, callback: Callable[[], object]) -> None:
        """Forget `callback`; harmless if it was never linked."""
        self._callbacks.pop(callback, None)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the signal is set, or for `timeout` seconds; return whether it is set.

        Switches: yes, unless it is set already.
        """
        if self.reason is None:
            wait(Event(), Deadline(timeout), self)
        return self.reason is not None

    def check(self) -> None:
        """Raise `StoppedError` if the signal is set."""
        if self.reason is not None:
            raise StoppedError(self.reason)

    def __repr__(self) -> str:
        return f"<StopSignal {'unset' if self.reason is None else self.reason!r}>"


#: Seconds between two questions to a consumer that can only be asked whether it stops.
ASK_INTERVAL = 1.0


@dataclass(frozen=True, slots=True)
class StopCheck:
    """The test for whether a consumer stops.

    Attributes:
        is_set: Tells it. Called for each message, and so without detours.
        signalled: The stop signal says it, and so wakes whoever waits; else it must be asked now and then.
    """

    is_set: Callable[[], bool]
    signalled: bool

    def wait(self, seconds: float | None, signal: StopSignal) -> None:
        """Wait for so many seconds, if any, or until the consumer stops.

        Args:
            seconds: How long; None: not at all.
            signal: Wakes whoever waits here, if it is set.

        Switches: yes, if `seconds` is more than 0.
        """
        deadline = Deadline(seconds or 0.0)
        while not (deadline.expired or self.is_set()):
            left = deadline.remaining or 0.0
            signal.wait(left if self.signalled else min(ASK_INTERVAL, left))


class Rungs:
    """Two signals that hurry a drain: end the wait for running handlers, and the wait for cancelled ones."""

    __slots__ = ("cancel", "kill")

    def __init__(self) -> None:
        self.cancel = StopSignal()
        self.kill = StopSignal()


class Deadline:
    """A point in monotonic time; `None` seconds make one that never comes."""

    __slots__ = ("_at",)

    def __init__(self, timeout: float | None) -> None:
        self._at = None if timeout is None else monotonic() + timeout

    @property
    def remaining(self) -> float | None:
        """The seconds that are left, never below zero; `None` if it never comes."""
        return None if self._at is None else max(0.0, self._at - monotonic())

    @property
    def expired(self) -> bool:
        """True once it has come."""
        return self._at is not None and monotonic() >= self._at

    def __repr__(self) -> str:
        return f"<Deadline in {self.remaining} s>"


class _Waitable(Protocol):
    def set(self) -> object: ...
    def wait(self, timeout: float | None = None) -> object: ...
    def is_set(self) -> bool: ...


def wait(event: _Waitable, deadline: Deadline, stop: StopSignal | None = None) -> bool:
    """Wait until `event` is set, the deadline comes or `stop` is set.

    The stop signal wakes the waiter by setting `event`, so the event must belong to this wait alone,
    or its other waiters must look again when they wake.

    Returns:
        Whether `event` was set, by its owner or by the stop signal.

    Switches: yes, unless `event` is set already.
    """
    if stop is None:
        event.wait(deadline.remaining)
        return event.is_set()
    wake = partial(event.set)  # equal to no other: leaving takes no other waiter's wake-up along
    stop.link(wake)
    try:
        event.wait(deadline.remaining)
    finally:
        stop.unlink(wake)
    return event.is_set()


def wait_open(gate: Event, deadline: Deadline, stop: StopSignal | None = None) -> bool:
    """Wait as `wait` does, for an event that others wait for as well: the stop signal does not set it.

    Returns:
        Whether `gate` is set.

    Switches: yes, unless it is set already.
    """
    if gate.is_set() or stop is None:
        return bool(gate.wait(deadline.remaining))
    either = Event()

    def notify(_gate: Event) -> None:
        either.set()

    gate.rawlink(notify)
    try:
        wait(either, deadline, stop)
    finally:
        gate.unlink(notify)
    return bool(gate.is_set())


_signals: weakref.WeakSet[StopSignal] = weakref.WeakSet()


def _stop_in_child() -> None:
    """Stop the copies of this process's consumers that a fork made: they share its sockets."""
    for signal in list(_signals):
        signal.set(FORK)


os.register_at_fork(after_in_child=_stop_in_child)
