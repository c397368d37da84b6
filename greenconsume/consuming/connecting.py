"""Owns how a consumer's connections come to be, and that their end is bounded.

Each is made over the consumer's links, and a stop ends the attempt. Called by `engine` for the connection
that consumes, and for the one that publishes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kombu import Connection

from greenconsume.handling.shield import shield_channels
from greenconsume.lifecycle import Lifecycle
from greenconsume.links.pool import LinkPool
from greenconsume.links.session import GreenSession, session_of
from greenconsume.stopping import StopCheck, StopSignal


@dataclass(frozen=True, slots=True)
class Attempt:
    """The terms on which a consumer connects.

    Attributes:
        max_retries: Failures that are followed by another attempt; None: all.
        on_failed: Called after each; None where nobody overrides what kombu calls then.
        stopping: Ends the attempts.
    """

    max_retries: int | None
    on_failed: Callable[[BaseException, float], object] | None
    stopping: StopCheck


class Connects(Protocol):
    """A consumer, as far as it connects."""

    def create_connection(self) -> Any: ...

    def on_connection_error(self, exc: BaseException, interval: float) -> None: ...


class Connected:
    """A block within which a consumer is connected; a class, for thousands of consumers are in theirs.

    Args:
        consumer: Makes the connection.
        links: Returns the links that it connects over.
        life: The consumer's lifecycle.
        attempt: On what terms.
    """

    __slots__ = ("_attempt", "_conn", "_consumer", "_life", "_links", "_session")

    def __init__(
        self,
        consumer: Connects,
        links: Callable[[], LinkPool],
        life: Lifecycle,
        attempt: Attempt,
    ) -> None:
        self._consumer, self._links, self._life = consumer, links, life
        self._attempt: Attempt | None = attempt
        self._conn: Any = None
        self._session: GreenSession | None = None

    def __enter__(self) -> Any:
        self._conn = self._consumer.create_connection()
        conn = self._conn.__enter__()
        try:
            self._connect(conn)
        except BaseException:  # a kill, too
            self._conn.__exit__(*sys.exc_info())
            raise
        return conn

    def _connect(self, conn: Any) -> None:
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        if isinstance(conn, Connection):
            connect(conn, self._links(), self._life, attempt)
        else:
            conn.ensure_connection(self._consumer.on_connection_error, attempt.max_retries)
        self._session = session_of(conn)

    def __exit__(self, *error: Any) -> None:
        session = self._session
        try:
            if session is not None:
                session.begin_close()
            self._conn.__exit__(*error)
        finally:
            if session is not None and not session.left:
                session.collect()  # a kill cut its close short, in kombu's code


def connect(conn: Connection, links: LinkPool, life: Lifecycle, attempt: Attempt) -> None:
    """Connect what is to consume. Until it consumes, a stop ends its calls.

    Raises:
        StoppedError: A stop ended the attempts.

    Switches: yes.
    """
    ask = None if attempt.stopping.signalled else attempt.stopping.is_set
    links.connect(conn, life.stop, attempt.on_failed, attempt.max_retries, False, ask, life.name)
    shield_channels(conn)
    session = session_of(conn)
    if session is not None:
        session.begin_setup(life.stop)


def connect_to_publish(
    conn: Connection, links: LinkPool, life: Lifecycle, attempt: Attempt
) -> None:
    """Connect what is to publish. Once its consumer stops there is one attempt, for handlers that finish.

    Raises:
        StoppedError: A stop ended the attempts.

    Switches: yes.
    """
    stop, retries = life.stop, attempt.max_retries
    if stop.is_set():
        stop, retries = StopSignal(), 0
    ask = None if attempt.stopping.signalled else attempt.stopping.is_set
    links.connect(conn, stop, attempt.on_failed, retries, True, ask)
    shield_channels(conn)
    session = session_of(conn)
    if session is not None:
        session.begin_publishing(life.stop)  # a broker may block its publishers for hours


def bound_close(conn: Connection) -> None:
    """Give all that is still to be said to the broker one deadline; the first call counts."""
    session = session_of(conn)
    if session is not None:
        session.begin_close()


def lost_errors(conn: Connection) -> tuple[type[BaseException], ...]:
    """Return what is raised where the connection or one of its channels is lost."""
    if not isinstance(conn, Connection):
        return ()
    return (*conn.connection_errors, *conn.channel_errors)
