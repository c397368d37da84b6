"""Owns who gets which link: many connections share a few links to each broker.

A `LinkPool` belongs to a runtime, or to a single consumer or publisher. It dials nothing itself and must
never give a link that consumes to one that publishes. Called by whatever connects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from kombu import Connection

from greenconsume.amqp.link import DEFAULT_CLOSE_TIMEOUT
from greenconsume.checks import is_count
from greenconsume.links.backoff import MAX_PUBLISHING_DELAY, OnFailedAttempt, OnRefused
from greenconsume.links.dialer import Dialer
from greenconsume.links.polled_stop import polled_stop
from greenconsume.links.quarantine import Quarantine
from greenconsume.links.unpooled import connect_unpooled
from greenconsume.patching import require_patched
from greenconsume.stopping import Deadline, StopSignal
from greenconsume.transports import registry


class LinkPool:
    """A few links to each broker, shared by the connections that are connected through it.

    Args:
        links: How many links to each broker; more are opened where these have no channel left.
        on_refused: Called when every broker of a connection refuses a consumer: with the URI and the error;
            returns whether that is raised to somebody, so that the log need not tell it.

    Raises:
        ValueError: `links` is less than one.
    """

    def __init__(self, links: int = 1, on_refused: OnRefused | None = None) -> None:
        if not is_count(links):
            raise ValueError(f"links must be at least 1, not {links!r}")
        self.size = links
        self._on_refused = on_refused
        self.quarantine = Quarantine()
        self._dialers: dict[tuple[object, ...], list[Dialer]] = {}
        _pools.add(self)

    def connect(
        self,
        connection: Connection,
        stop: StopSignal,
        on_failed_attempt: OnFailedAttempt | None = None,
        max_retries: int | None = None,
        publishing: bool = False,
        should_stop: Callable[[], object] | None = None,
        consumer: str = "",
    ) -> None:
        """Connect `connection`, trying until it succeeds, over a shared link where its transport has them.

        Args:
            connection: A kombu connection that is not connected.
            stop: Ends the attempt, or the backoff, at once.
            on_failed_attempt: Called after every failed attempt, in this greenlet.
            max_retries: How many failures are followed by another attempt; None: all.
            publishing: The link must not be one that consumes: the broker blocks publishers by link.
            should_stop: Says, when it is asked, whether to stop; for a consumer whose stop nothing signals.
            consumer: The name of the consumer, which may be in quarantine.

        Raises:
            NotPatchedError: The process is not patched by gevent, and the transport waits for a network.
            StoppedError: `stop` was set.
            kombu.exceptions.OperationalError: `max_retries` is used up.
            UnsupportedTransportError: The transport is unknown, or blocks the hub.

        Switches: yes.
        """
        _require_usable(connection)
        with polled_stop(stop, should_stop) as stop:
            if getattr(connection.transport, "shares_links", False):
                dialer = self._dialer_for(
                    connection, stop, on_failed_attempt, max_retries, publishing, consumer
                )
                connection.transport.acquire = dialer.acquirer(connection)
                connection.ensure_connection(max_retries=0)
            else:
                refused = None if publishing else self._on_refused
                connect_unpooled(connection, stop, on_failed_attempt, max_retries, refused)

    def _dialer_for(
        self,
        connection: Connection,
        stop: StopSignal,
        on_failed_attempt: OnFailedAttempt | None,
        max_retries: int | None,
        publishing: bool,
        consumer: str,
    ) -> Dialer:
        """Return one whose link lives and has room. Switches: yes, to dial."""
        broker = _broker_of(connection, publishing)
        group = self.quarantine.group_of(consumer)
        self._forget_quarantines(len(broker))
        if group:
            broker = (*broker, group)
        dialers = self._dialers.setdefault(broker, [])
        while True:
            dialer = self._choose(dialers, publishing)
            link = dialer.wait_for_link(connection, stop, on_failed_attempt, max_retries)
            # What one link has learned holds for all: else its sessions fill the next one the same way.
            link.make_room(max(each.session_size for each in dialers))
            if link.has_room:
                return dialer

    def _forget_quarantines(self, shared: int) -> None:
        """Let go of the links of groups that nobody is of any more: they close with their last session."""
        groups = self.quarantine.groups
        for key in [each for each in self._dialers if len(each) > shared]:
            if key[-1] not in groups:
                del self._dialers[key]

    def _choose(self, dialers: list[Dialer], publishing: bool) -> Dialer:
        with_room = [each for each in dialers if each.has_room]
        if len(dialers) < self.size or not with_room:
            # Only a consumer fails its runtime's start.
            dialers.append(
                Dialer(longest_delay=MAX_PUBLISHING_DELAY)
                if publishing
                else Dialer(self._on_refused)
            )
            return dialers[-1]
        return min(with_room, key=lambda each: each.load)

    def close(self, timeout: float | None = None) -> None:
        """Drop what is left of the links, within `timeout` seconds (by default 5). Switches: yes."""
        deadline = Deadline(DEFAULT_CLOSE_TIMEOUT if timeout is None else timeout)
        for dialers in self._dialers.values():
            for dialer in dialers:
                dialer.close(deadline)
        self._dialers.clear()

    @property
    def open_count(self) -> int:
        """The number of open links."""
        return sum(dialer.is_live for dialers in self._dialers.values() for dialer in dialers)

    @property
    def dialers(self) -> list[Dialer]:
        """The places of its links, with the links that live."""
        return [dialer for dialers in self._dialers.values() for dialer in dialers]


_pools: WeakSet[LinkPool] = WeakSet()


def all_pools() -> list[LinkPool]:
    """Return the pools of this process: those of its runtimes, publishers and single consumers."""
    return list(_pools)


def _require_usable(connection: Connection) -> None:
    registry.register()
    registry.require_green(connection)
    if not getattr(connection.transport, "in_process", False):
        require_patched()  # it would wait for ever, as nothing lets the link's greenlets run


def _broker_of(connection: Connection, publishing: bool) -> tuple[object, ...]:
    info: dict[str, Any] = connection.info()
    return (publishing, *(repr(info[key]) for key in sorted(info)))
