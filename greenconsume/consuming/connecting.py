"""Owns how a consumer's connections come to be, and that their end is bounded.

Each is made over the consumer's links, and a stop ends the attempt. Called by `engine` for the connection
that consumes, and for the one that publishes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kombu import Connection

from greenconsume.handling.shield import shield_channels
from greenconsume.lifecycle import Lifecycle
from greenconsume.links.pool import LinkPool
from greenconsume.links.session import session_of
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


def errors_of(conn: Connection) -> tuple[type[BaseException], ...]:
    """Return what is raised where the connection or one of its channels is lost."""
    if not isinstance(conn, Connection):
        return ()
    return (*conn.connection_errors, *conn.channel_errors)
