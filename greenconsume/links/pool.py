"""Owns how connections come to be: many consumers over a few links, one dialer a link, backoff with jitter.

A `LinkPool` belongs to a runtime, or to a single consumer. A lost link is dialled again once for all that
used it; they wait for that, each until its own stop signal. Transports without links are connected one
by one, with the same backoff. Called by `mixins`; runs the user's `on_connection_error` in the waiter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import gevent
from gevent.event import Event
from kombu import Connection
from kombu.exceptions import OperationalError

from greenconsume import logs as _logs  # noqa: F401  # the first hook subscribes itself
from greenconsume.amqp.transport import REFUSALS, Link, Transport
from greenconsume.events import ConnectFailed, emit
from greenconsume.stopping import Deadline, StopSignal, wait
from greenconsume.transports import registry

#: Called with the error and the seconds until the next attempt.
OnError = Callable[[BaseException, float], object]

FIRST_DELAY = 1.0
MAX_DELAY = 4.0
#: Seconds between two questions to a consumer that can only be asked whether it is to stop.
ASK_INTERVAL = 1.0
#: Consumers come back to a new link spread over this many seconds each, up to MAX_SPREAD in all.
_SPREAD = 0.001
_MAX_SPREAD = 2.0


def delays() -> Iterator[float]:
    """Yield the seconds between attempts: doubling from 1 to 4, each with a quarter of jitter.

    Not more, so that thousands of consumers are back within 10 s of their broker however long it was away:
    5 s until it is tried, 2 s of spread, and their declares.
    """
    delay = FIRST_DELAY
    while True:
        yield delay * random.uniform(0.75, 1.25)
        delay = min(delay * 2, MAX_DELAY)


class LinkPool:
    """A few links to each broker, shared by the connections that are connected through it.

    Args:
        links: How many links to each broker; more are opened where these have no channel left.

    Attributes:
        republishers: What publishes retries over it, by broker; see `republishing`.

    Raises:
        ValueError: `links` is less than one.
    """

    def __init__(self, links: int = 1) -> None:
        if links < 1:
            raise ValueError(f"links must be at least 1, not {links!r}")
        self.size = links
        self.republishers: dict[str, Any] = {}
        self._slots: dict[tuple[object, ...], list[_Slot]] = {}

    def connect(
        self,
        connection: Connection,
        stop: StopSignal,
        on_error: OnError | None = None,
        max_retries: int | None = None,
        publishing: bool = False,
        ask: Callable[[], object] | None = None,
    ) -> None:
        """Connect `connection`, trying until it succeeds, over a shared link where its transport has them.

        Args:
            connection: A kombu connection that is not connected.
            stop: Ends the attempt, or the backoff, at once.
            on_error: Called after every failed attempt, in this greenlet.
            max_retries: How many failures are followed by another attempt; None: all.
            publishing: The link must not be one that consumes: the broker blocks publishers by link.
            ask: Says, when it is asked, whether to stop; for a consumer whose stop nothing signals.

        Raises:
            StoppedError: `stop` was set.
            kombu.exceptions.OperationalError: `max_retries` is used up.
            UnsupportedTransportError: The transport is unknown, or blocks the hub.

        Switches: yes.
        """
        registry.register()
        registry.require_green(connection)
        with _asking(stop, ask) as stop:
            self._connect(connection, stop, on_error, max_retries, publishing)

    def _connect(
        self,
        connection: Connection,
        stop: StopSignal,
        on_error: OnError | None,
        max_retries: int | None,
        publishing: bool,
    ) -> None:
        if not isinstance(connection.transport, Transport):
            _connect_alone(connection, stop, on_error, max_retries)
            return
        slots = self._slots.setdefault(_broker_of(connection, publishing), [])
        while True:
            slot = self._choose(slots)
            link = slot.wait_for_link(connection, stop, on_error, max_retries)
            # What one link has learned holds for all: else its sessions fill the next one the same way.
            link.make_room(max(each.session_size for each in slots))
            if link.has_room:
                break
        connection.transport.acquire = slot.link_for(connection)
        connection.ensure_connection(max_retries=0)

    def close(self, timeout: float | None = None) -> None:
        """Drop what is left of the links, for consumers that were killed. Switches: yes."""
        deadline = Deadline(timeout)
        for slots in self._slots.values():
            for slot in slots:
                slot.close(deadline)
        self._slots.clear()

    @property
    def open_count(self) -> int:
        """How many links are open."""
        return sum(slot.live for slots in self._slots.values() for slot in slots)

    def _choose(self, slots: list[_Slot]) -> _Slot:
        with_room = [slot for slot in slots if slot.has_room]
        if len(slots) < self.size or not with_room:
            slots.append(_Slot())
            return slots[-1]
        return min(with_room, key=lambda slot: slot.load)


class _Ticket:
    """One waiter for one attempt of a slot's dialer."""

    __slots__ = ("delay", "error", "event")

    def __init__(self) -> None:
        self.event = Event()
        self.error: BaseException | None = None
        self.delay: float | None = None


class _Slot:
    """The place of one link: the link while it lives, else the greenlet that dials it."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self._dialer: gevent.Greenlet[..., None] | None = None
        self._tickets: list[_Ticket] = []
        self._waiting = 0
        self._dialled = False

    @property
    def live(self) -> bool:
        return self.link is not None and self.link.connected and not self.link.is_closing

    @property
    def load(self) -> int:
        return self._waiting + (len(self.link.sessions) if self.live and self.link else 0)

    @property
    def session_size(self) -> int:
        return self.link.session_size if self.link else 1

    @property
    def has_room(self) -> bool:
        return not (self.live and self.link) or self.link.has_room

    def link_for(self, connection: Connection) -> Callable[[], Link]:
        """Return what a transport calls for its link: the live one, or one attempt at a new one."""

        def acquire() -> Link:
            if self.live and self.link is not None:
                return self.link
            with self._wanted():
                return self._attempt(connection, None)

        return acquire

    def wait_for_link(
        self,
        connection: Connection,
        stop: StopSignal,
        on_error: OnError | None,
        max_retries: int | None,
    ) -> Link:
        """Return the live link, waiting for the dialer as often as it takes."""
        returning = self._dialled and not self.live
        with self._wanted():
            for retries in count():
                stop.check()
                if self.live and self.link is not None:
                    return self.link
                try:
                    self._attempt(connection, stop)
                except _AttemptFailed as failed:
                    _give_up_after(max_retries, retries, failed.error)
                    if on_error is not None:
                        on_error(failed.error, failed.delay)
                    if self._dialer is None:  # it succeeded, and what it dialled was lost at once
                        stop.wait(failed.delay)
                else:
                    if returning:
                        self._spread(stop)
        raise AssertionError("unreachable")

    def _spread(self, stop: StopSignal) -> None:
        # A link that comes back brings thousands of consumers: their declares need not arrive at once.
        spread = min(_MAX_SPREAD, _SPREAD * self._waiting)
        if self._waiting > 1 and stop.wait(random.uniform(0, spread)):
            stop.check()

    @contextmanager
    def _wanted(self) -> Iterator[None]:
        self._waiting += 1
        try:
            yield
        except BaseException:  # a kill too
            if self._waiting == 1:
                self._abandon()
            raise
        finally:
            self._waiting -= 1

    def _abandon(self) -> None:
        """Nobody wants the link any more: end the dialer, or drop what it dialled and nobody used."""
        if self._dialer is not None:
            self._dialer.kill(block=False)  # it closes its socket
            self._dialer = None
        elif self.live and self.link is not None and not self.link.sessions:
            self.link.close()

    def _attempt(self, connection: Connection, stop: StopSignal | None) -> Link:
        ticket = _Ticket()
        self._tickets.append(ticket)
        if self._dialer is None:
            self._dialer = gevent.spawn(self._dial, connection.clone())
            self._dialer.name = f"dialer of {connection.as_uri()}"
        try:
            wait(ticket.event, Deadline(None), stop)
        finally:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
        if stop is not None:
            stop.check()
        error, delay = ticket.error, ticket.delay
        if error is None and self.link is not None:
            if self.link.connected:
                return self.link
            error, delay = ConnectionResetError("the new link was lost at once"), FIRST_DELAY
        assert error is not None
        if delay is None or stop is None:
            raise error
        raise _AttemptFailed(error, delay)

    def _dial(self, connection: Connection) -> None:
        try:
            for attempt, delay in enumerate(delays(), 1):
                if self._dial_once(connection, attempt, delay):
                    return
        finally:
            if self._dialer is gevent.getcurrent():
                self._dialer = None

    def _dial_once(self, connection: Connection, attempt: int, delay: float) -> bool:
        try:
            link = connection.transport.dial()
        except _errors_of(connection) as exc:
            if not connection.completes_cycle(attempt - 1):
                delay = 0.0  # the next of the failover URLs is tried at once
            _tell(connection, exc, attempt, delay)
            self._answer(exc, delay)
            connection.maybe_switch_next()
            gevent.sleep(delay)
            return False
        except (
            Exception
        ) as exc:  # no broker's error, so trying again is no remedy: the waiter's to raise
            self._answer(exc, None)
            return True
        if self._dialer is not gevent.getcurrent():
            link.close()  # all who waited have left, and a kill is under way
            return True
        link.make_room(self.session_size)
        self.link, self._dialled = link, True
        self._answer(None, None)
        return True

    def _answer(self, error: BaseException | None, delay: float | None) -> None:
        tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            ticket.error, ticket.delay = error, delay
            ticket.event.set()

    def close(self, deadline: Deadline) -> None:
        """End the dialer, and the link with all that uses it."""
        if self._dialer is not None:
            self._dialer.kill(block=False)
            self._dialer = None
        if self.link is not None:
            self.link.close(deadline=deadline)


class _AttemptFailed(Exception):
    def __init__(self, error: BaseException, delay: float) -> None:
        super().__init__(error)
        self.error = error
        self.delay = delay


@contextmanager
def _asking(stop: StopSignal, ask: Callable[[], object] | None) -> Iterator[StopSignal]:
    """Give a signal that is set with `stop`, and also when `ask`, every now and then, says so."""
    if ask is None:
        yield stop
        return
    either = StopSignal()

    def follow() -> None:
        either.set(stop.reason or "should_stop")

    def watch() -> None:
        while not either.wait(ASK_INTERVAL):
            if ask():
                follow()

    stop.link(follow)
    watcher = gevent.spawn(watch)
    try:
        yield either
    finally:
        watcher.kill(block=False)
        stop.unlink(follow)


def _connect_alone(
    connection: Connection, stop: StopSignal, on_error: OnError | None, max_retries: int | None
) -> None:
    for retries, delay in enumerate(delays()):
        stop.check()
        try:
            _interruptible(lambda: connection.ensure_connection(max_retries=0), stop)
            return
        except (OperationalError, *_errors_of(connection)) as exc:
            error = exc.__cause__ if isinstance(exc, OperationalError) and exc.__cause__ else exc
        _give_up_after(max_retries, retries, error)
        if not connection.completes_cycle(retries):
            delay = 0.0
        _tell(connection, error, retries + 1, delay)
        if on_error is not None:
            on_error(error, delay)
        connection.maybe_switch_next()
        stop.wait(delay)


def _interruptible(action: Callable[[], object], stop: StopSignal) -> None:
    """Run `action` in a greenlet; a stop leaves it behind, killed: nobody uses what it was making."""
    greenlet = gevent.spawn(_outcome, action)
    done = Event()
    greenlet.rawlink(lambda _greenlet: done.set())
    try:
        wait(done, Deadline(None), stop)
    finally:
        if not greenlet.ready():
            greenlet.kill(block=False)
    if not greenlet.ready():
        stop.check()
    if greenlet.value is not None:
        raise greenlet.value


def _outcome(action: Callable[[], object]) -> BaseException | None:
    try:
        action()
    except Exception as exc:  # handed to the waiter, which raises it
        return exc
    return None


def _give_up_after(max_retries: int | None, retries: int, error: BaseException) -> None:
    if max_retries is not None and retries >= max_retries:
        raise OperationalError(str(error)) from error


def _errors_of(connection: Connection) -> tuple[type[BaseException], ...]:
    return (
        *connection.connection_errors,
        *connection.channel_errors,
        *connection.recoverable_connection_errors,
    )


def _tell(connection: Connection, error: BaseException, attempt: int, delay: float) -> None:
    emit(ConnectFailed(connection.as_uri(), error, attempt, delay, isinstance(error, REFUSALS)))


def _broker_of(connection: Connection, publishing: bool) -> tuple[object, ...]:
    info: dict[str, Any] = connection.info()
    return (publishing, *(repr(info[key]) for key in sorted(info)))
