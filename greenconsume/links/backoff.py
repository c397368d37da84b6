"""Owns when a failed attempt to connect is followed by another, and what is told of it.

It connects nothing itself. Called by whatever connects: `dialer`, `unpooled`, and a publisher's sender.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from kombu import Connection
from kombu.exceptions import OperationalError

from greenconsume import logs as _logs  # noqa: F401  # the first hook subscribes itself
from greenconsume.events import ConnectFailed, emit

#: Is told the error of each failed attempt, and the seconds until the next one.
OnFailedAttempt = Callable[[BaseException, float], object]
#: Is told the URI and the error when every broker of a connection has refused it, one after the other;
#: returns whether that is raised to somebody. It must not switch.
OnRefused = Callable[[str, BaseException], bool]

FIRST_DELAY = 1.0
MAX_DELAY = 4.0
#: The same for publishing: somebody waits for each message, and one link serves all of a process.
MAX_PUBLISHING_DELAY = FIRST_DELAY


def delays(longest: float = MAX_DELAY) -> Iterator[float]:
    """Yield the seconds between attempts: doubling from 1 to `longest`, each with a quarter of jitter.

    No longer than 4, so that thousands of consumers are back within 10 s of their broker however long it
    was away: 5 s until it is tried, 2 s of spread, and their declares.
    """
    delay = FIRST_DELAY
    while True:
        yield delay * random.uniform(0.75, 1.25)
        delay = min(delay * 2, longest)


def raise_after(max_retries: int | None, retries: int, error: BaseException) -> None:
    """Raise `OperationalError`, as kombu does, once `max_retries` attempts were made after the first."""
    if max_retries is not None and retries >= max_retries:
        raise OperationalError(str(error)) from error


def connect_errors(connection: Connection) -> tuple[type[BaseException], ...]:
    """Return the errors of a broker that cannot be connected to; another attempt may succeed."""
    return (
        *connection.connection_errors,
        *connection.channel_errors,
        *connection.recoverable_connection_errors,
    )


class FailedAttempts:
    """Tells of the failed attempts of one dialer: observers, and who waits for a start.

    An error that somebody raises is not logged as well.
    """

    __slots__ = ("_broker_count", "_count", "_on_refused", "_refused_count")

    def __init__(self, connection: Connection, on_refused: OnRefused | None) -> None:
        self._broker_count = len(connection.alt or ()) or 1
        self._on_refused = on_refused
        self._count = self._refused_count = 0

    def tell(self, connection: Connection, error: BaseException, delay: float) -> None:
        """Tell of one; the next attempt follows in `delay` seconds. Never switches."""
        refused = isinstance(error, getattr(connection.transport, "refusals", ()))
        self._count += 1
        self._refused_count = self._refused_count + 1 if refused else 0  # in a row
        uri, raised = connection.as_uri(), False
        # One alternative of a failover URL that refuses leaves the others to be tried.
        if self._refused_count >= self._broker_count and self._on_refused is not None:
            raised = self._on_refused(uri, error)
        emit(ConnectFailed(uri, error, self._count, delay, refused, raised))
