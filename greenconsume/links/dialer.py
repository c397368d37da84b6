"""Owns one link of a pool and how it comes to be: one greenlet dials it, for all who wait for it.

A link that was lost is dialled again, with backoff and jitter, once somebody wants it. Who waits is told of
each failed attempt in his own greenlet, and leaves at his own stop. It must never dial for nobody. Called
by `pool`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from time import monotonic

import gevent
from gevent.event import Event
from kombu import Connection

from greenconsume.amqp.transport import Link
from greenconsume.links import backoff
from greenconsume.links.backoff import FailedAttempts, OnFailedAttempt, OnRefused
from greenconsume.stopping import Deadline, StopSignal, wait

#: Consumers come back to a new link spread over this many seconds each, up to MAX_SPREAD in all.
SPREAD = 0.001
MAX_SPREAD = 2.0
#: A link that is lost sooner than this many seconds after its dial was no success. The first such loss may
#: be chance; from the second in a row on, each counts as a failed attempt, which a delay follows. Else a
#: broker that accepts connections only to end them would be dialled as fast as it answers.
MIN_LIFE = 1.0


class Dialer:
    """Keeps the place of one link: has the link while it lives, and dials it while it is wanted.

    Args:
        on_refused: As `LinkPool` has it.
        longest_delay: Seconds between two attempts, at most.

    Attributes:
        link: The link, dialled last; it may be gone.
        uri: Where it leads, or is to lead, without the password.
        reconnect_count: How often it was dialled again.
    """

    def __init__(
        self, on_refused: OnRefused | None = None, longest_delay: float = backoff.MAX_DELAY
    ) -> None:
        self.link: Link | None = None
        self.uri = ""
        self.reconnect_count = 0
        self._on_refused = on_refused
        self._longest_delay = longest_delay
        self._dialling: gevent.Greenlet[..., None] | None = None
        self._attempts: list[_Attempt] = []
        self._waiting_count = 0
        self._succeeded = False
        self._dialled_at = 0.0
        self._brief_count = 0  # links in a row that were lost within MIN_LIFE
        self._delays: Iterator[float] = iter(())
        self._failed: FailedAttempts | None = None

    @property
    def is_live(self) -> bool:
        """True if there is a link that can be used."""
        return self.link is not None and self.link.connected and not self.link.is_closing

    @property
    def load(self) -> int:
        """The number of those who use the link or wait for it."""
        return self._waiting_count + (len(self.link.sessions) if self.is_live and self.link else 0)

    @property
    def session_size(self) -> int:
        """The number of channels that a session is taken to need."""
        return self.link.session_size if self.link else 1

    @property
    def has_room(self) -> bool:
        """True if another session would find its channels."""
        return not (self.is_live and self.link) or self.link.has_room

    def acquirer(self, connection: Connection) -> Callable[[], Link]:
        """Return what a transport calls for its link: the live one, or one attempt at a new one."""
        return _Acquirer(self, connection)

    def acquire(self, connection: Connection) -> Link:
        """Return the live link, or make one attempt at a new one. Switches: yes, for a new one."""
        if self.is_live and self.link is not None:
            return self.link
        with self._wanted():
            return self._attempt(connection, None)

    def wait_for_link(
        self,
        connection: Connection,
        stop: StopSignal,
        on_failed_attempt: OnFailedAttempt | None,
        max_retries: int | None,
    ) -> Link:
        """Return the live link, waiting for as many attempts as it takes; see `LinkPool.connect`."""
        returning = self._succeeded and not self.is_live
        with self._wanted():
            for retries in count():
                stop.check()
                if self.is_live and self.link is not None:
                    return self.link
                try:
                    self._attempt(connection, stop)
                except _AttemptFailed as failed:
                    backoff.raise_after(max_retries, retries, failed.error)
                    if on_failed_attempt is not None:
                        on_failed_attempt(failed.error, failed.delay)
                    if self._dialling is None:  # it succeeded, and what it dialled was lost at once
                        stop.wait(failed.delay)
                else:
                    if returning:
                        self._spread(stop)
        raise AssertionError("unreachable")

    def _spread(self, stop: StopSignal) -> None:
        # A link that comes back brings thousands of consumers: their declares need not arrive at once.
        spread = min(MAX_SPREAD, SPREAD * self._waiting_count)
        if self._waiting_count > 1 and stop.wait(random.uniform(0, spread)):
            stop.check()

    @contextmanager
    def _wanted(self) -> Iterator[None]:
        self._waiting_count += 1
        try:
            yield
        except BaseException:  # a kill too
            if self._waiting_count == 1:
                self._abandon()
            raise
        finally:
            self._waiting_count -= 1

    def _abandon(self) -> None:
        """End dialling, as nobody wants the link any more; close one that was dialled and nobody used."""
        if self._dialling is not None:
            self._stop_dialling()
        elif self.is_live and self.link is not None and not self.link.sessions:
            self.link.close()

    def _stop_dialling(self) -> None:
        if self._dialling is not None:
            self._dialling.kill(block=False)  # it closes its socket
            self._dialling = None

    # -- one attempt ----------------------------------------------------------------------------------

    def _attempt(self, connection: Connection, stop: StopSignal | None) -> Link:
        attempt = _Attempt()
        self._attempts.append(attempt)
        if self._dialling is None:
            self.uri = connection.as_uri()
            self._dialling = gevent.spawn(self._dial, connection.clone())
            self._dialling.name = f"dialer of {connection.as_uri()}"
        try:
            wait(attempt.ended, Deadline(None), stop)
        finally:
            if attempt in self._attempts:
                self._attempts.remove(attempt)
        if stop is not None:
            stop.check()
        error, delay = attempt.error, attempt.delay
        if error is None and self.link is not None:
            if self.link.connected:
                return self.link
            error = ConnectionResetError("the new link was lost at once")
            delay = backoff.FIRST_DELAY
        assert error is not None
        if delay is None or stop is None:
            raise error
        raise _AttemptFailed(error, delay)

    def _dial(self, connection: Connection) -> None:
        brief = self._brief_loss()
        if brief is None or self._failed is None:  # else as if the last dials had failed
            self._delays = backoff.delays(self._longest_delay)
            self._failed = FailedAttempts(connection, self._on_refused)
        failed = self._failed
        try:
            for retries, delay in enumerate(self._delays):
                if not connection.completes_cycle(retries):
                    delay = 0.0  # the next of the failover URLs is tried at once
                if brief is not None:
                    self._fail(connection, failed, brief, delay)
                    brief = None
                elif self._dial_once(connection, failed, delay):
                    return
        finally:
            if self._dialling is gevent.getcurrent():
                self._dialling = None

    def _brief_loss(self) -> BaseException | None:
        """Return why the last link was lost, if it and the one before it hardly lived."""
        link, age = self.link, monotonic() - self._dialled_at
        if link is None or link.is_closing or age >= MIN_LIFE:
            self._brief_count = 0
            return None
        self._brief_count += 1
        return link.lost() if self._brief_count > 1 else None

    def _fail(
        self, connection: Connection, failed: FailedAttempts, error: BaseException, delay: float
    ) -> None:
        failed.tell(connection, error, delay)
        self._end_attempts(error, delay)
        connection.maybe_switch_next()
        gevent.sleep(delay)

    def _dial_once(self, connection: Connection, failed: FailedAttempts, delay: float) -> bool:
        """Dial; return whether that was the last time."""
        try:
            link = connection.transport.dial()
        except backoff.connect_errors(connection) as exc:
            self._fail(connection, failed, exc, delay)
            return False
        except Exception as exc:  # no broker's error, so trying again is no remedy: for who waits
            self._end_attempts(exc, None)
            return True
        if self._dialling is not gevent.getcurrent():
            link.close()  # all who waited have left, and a kill is under way
            return True
        link.make_room(self.session_size)
        self.uri = link.uri
        self.reconnect_count += self._succeeded
        self.link, self._succeeded, self._dialled_at = link, True, monotonic()
        self._end_attempts(None, None)
        return True

    def _end_attempts(self, error: BaseException | None, delay: float | None) -> None:
        attempts, self._attempts = self._attempts, []
        for attempt in attempts:
            attempt.error, attempt.delay = error, delay
            attempt.ended.set()

    def close(self, deadline: Deadline) -> None:
        """End dialling, and the link with all that uses it. Switches: yes."""
        self._stop_dialling()
        if self.link is not None:
            self.link.close(deadline=deadline)


class _Acquirer:
    """Acquires a link for one connection; a class, for thousands of connections keep theirs."""

    __slots__ = ("_connection", "_dialer")

    def __init__(self, dialer: Dialer, connection: Connection) -> None:
        self._dialer, self._connection = dialer, connection

    def __call__(self) -> Link:
        return self._dialer.acquire(self._connection)


class _Attempt:
    """One attempt to dial, as one of those who wait for it sees it.

    Attributes:
        ended: Set when it succeeded or failed.
        error: Why it failed.
        delay: Seconds until the next one; None if there is none.
    """

    __slots__ = ("delay", "ended", "error")

    def __init__(self) -> None:
        self.ended = Event()
        self.error: BaseException | None = None
        self.delay: float | None = None


class _AttemptFailed(Exception):
    """An attempt failed; the next one follows after `delay` seconds."""

    def __init__(self, error: BaseException, delay: float) -> None:
        super().__init__(error)
        self.error = error
        self.delay = delay
