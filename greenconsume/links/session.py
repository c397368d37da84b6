"""Owns what is common to the sessions of green links, AMQP's and Redis's: a connection's share of a link.

Called by `consuming` and `handling`, which know of no broker in particular.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from kombu import Connection

from greenconsume.stopping import Deadline, StopSignal


class SessionChannel(Protocol):
    """A channel of such a session, as far as its messages are looked after."""

    @property
    def oldest_unsettled(self) -> tuple[int, float] | None:
        """The delivery tag that has been unsettled for longest, and when it came (`time.monotonic`)."""


class Holding(Protocol):
    """The messages that a connection holds; a session of a green link is one."""

    @property
    def is_lost(self) -> bool:
        """True if nothing comes over it any more; who drains it may wait for a handler, and not know."""

    @property
    def backlog(self) -> int:
        """The number of messages that wait for `drain_events`."""

    @property
    def unsettled_count(self) -> int:
        """The number of messages that are not settled."""

    @property
    def oldest_unsettled_at(self) -> float | None:
        """The time at which the oldest of these came (`time.monotonic`), where that is known."""

    @property
    def prefetch_count(self) -> int:
        """The number of messages that may be taken ahead; 0: without a limit."""


class GreenSession(Holding, Protocol):
    """A connection's share of a link, of AMQP or Redis, as its consumers see it.

    Attributes:
        given_back_count: How many messages went back that no callback took.
    """

    @property
    def given_back_count(self) -> int: ...

    @property
    def channels(self) -> Mapping[int, SessionChannel]:
        """The channels of the session, by their ids."""

    @property
    def connected(self) -> bool:
        """True while it is open and its link lives."""

    @property
    def left(self) -> bool:
        """True once the link has forgotten it."""

    def begin_setup(self, stop: StopSignal) -> None:
        """Have `stop` end every call, with `StoppedError`, until it consumes. Never switches."""

    def begin_publishing(self, stop: StopSignal) -> None:
        """Have `stop` end every wait for a broker that blocks its publishers. Never switches."""

    def begin_consuming(self, attend: Callable[[bool], None] | None = None) -> None:
        """Have no stop end a call any more: what a callback calls may finish. Never switches.

        Args:
            attend: Called with whether any consumer runs, before it waits, where that can be told.
        """

    def begin_close(self, deadline: Deadline | None = None) -> None:
        """Give all that is still to be said to the broker one deadline; the first call counts."""

    def heartbeat_tick(self, rate: int = 2) -> None:
        """Raise `LinkLostError` if the link is gone."""

    def drain_events(self, timeout: float | None = None, stop: StopSignal | None = None) -> None:
        """Wait for one delivery, and run its callback in this greenlet. Switches: yes."""

    def announce_stop(self) -> None:
        """Tell the broker to send no more; give back what no callback has started. Never switches."""

    def collect(self) -> None:
        """Let go of everything at once, without waiting for the broker. Never switches."""


def session_of(conn: object) -> GreenSession | None:
    """Return what a connection over a link holds; unlike `conn.connection`, never a new one."""
    session = conn._connection if isinstance(conn, Connection) else None
    return session if hasattr(session, "begin_consuming") else None
