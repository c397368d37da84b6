"""Owns the loop that receives a consumer's messages, one after the other, and calls `on_iteration` between.

A green connection is woken by a message or the stop; a polled one looks now and then. Called by `engine`.
Here are the calls that each message costs: none may be added.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kombu import Connection

from greenconsume.amqp.blame import LinkLostError
from greenconsume.errors import StoppedError
from greenconsume.links.session import session_of
from greenconsume.stopping import Deadline, StopSignal

#: Receives one message, or raises `socket.timeout` after some seconds; the signal ends it, too.
Receive = Callable[[float | None, StopSignal], object]


@dataclass(frozen=True, slots=True)
class Loop:
    """The terms of a loop: when it ends, and what is called in between.

    Attributes:
        limit: Messages after which it ends; None: no limit.
        timeout: Seconds without a message after which it raises; None: waits for ever.
        safety_interval: The longest time between two iterations of a consumer that wants them.
        stopping: Tells, for each message, whether to leave.
        on_iteration: Called before each message; None where nobody overrides it.
        ticks: Iterations are wanted also while there is no message.
    """

    limit: int | None
    timeout: float | None
    safety_interval: float
    stopping: Callable[[], bool]
    on_iteration: Callable[[], object] | None
    ticks: bool


def receive(
    conn: Connection, loop: Loop, stop: StopSignal, attend: Callable[[bool], None]
) -> Iterator[None]:
    """Receive messages from a kombu connection; yield after each.

    Args:
        conn: The connection.
        loop: How long to receive.
        stop: Ends the wait for a message.
        attend: Called with whether any consumer runs, before it waits for a message.

    Raises:
        TimeoutError: No message came for `timeout` seconds.
        OSError: The connection was lost.

    Switches: yes.
    """
    receive_one, wakes = _receiver(conn, attend)
    tick = loop.safety_interval if loop.ticks or not wakes else None
    stopping, on_iteration = loop.stopping, loop.on_iteration
    limit, timeout = loop.limit, loop.timeout
    received, idle = 0, Deadline(timeout or None)
    while not stopping() and not (limit and received >= limit):
        if on_iteration is not None:
            on_iteration()
        try:
            receive_one(_least(tick, idle.remaining) if timeout else tick, stop)
        except socket.timeout:
            if not wakes:
                conn.heartbeat_check()
            if idle.expired:
                raise
        except (OSError, StoppedError) as exc:
            if not _is_orderly(exc, stopping):
                raise
        else:
            received += 1
            yield
            if timeout:
                idle = Deadline(timeout)


def _is_orderly(error: BaseException, stopping: Callable[[], bool]) -> bool:
    # Where it stops, `on_consume_end` is yet to be called. But a lost link took what was gathered along: it
    # comes again.
    return not isinstance(error, LinkLostError) and stopping()


def _receiver(conn: Connection, attend: Callable[[bool], None]) -> tuple[Receive, bool]:
    """Return what receives one message, and whether a stop wakes it (or it polls)."""
    if not getattr(conn.transport, "wakes", False):
        return lambda seconds, _stop: conn.drain_events(timeout=seconds), False
    session = session_of(conn)
    if session is None:
        return lambda seconds, stop: conn.drain_events(timeout=seconds, stop=stop), True
    session.begin_consuming(attend)
    # Not kombu's: where a link was lost it would connect again, and wait without any consumer.
    return session.drain_events, True


def receive_from_double(conn: Connection, loop: Loop) -> Iterator[None]:
    """Receive from what is no kombu connection (a test's mock), as kombu does."""
    received, elapsed = 0, 0.0
    while not loop.stopping() and not (loop.limit and received >= loop.limit):
        if loop.on_iteration is not None:
            loop.on_iteration()
        try:
            conn.drain_events(timeout=loop.safety_interval)
        except socket.timeout:
            conn.heartbeat_check()
            elapsed += loop.safety_interval
            if loop.timeout and elapsed >= loop.timeout:
                raise
        except OSError:
            if not loop.stopping():
                raise
        else:
            received += 1
            yield
            elapsed = 0.0


def _least(*seconds: float | None) -> float | None:
    return min((s for s in seconds if s is not None), default=None)
