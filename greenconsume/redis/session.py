"""Owns one connection's share of a link: its channels, and what waits in them for `drain_events`.

It must never keep a message that nobody has started once it stops. What it holds is given back, also over
the next link where this one is lost. Made by `transport`; called by kombu through it, and by the consumers'
engine.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic

import gevent
from amqp.exceptions import RecoverableChannelError, RecoverableConnectionError
from gevent.event import Event
from kombu import Connection

from greenconsume.amqp import untold
from greenconsume.amqp.waits import CLOSED_IN_USE, Waits
from greenconsume.hub import MAX_TURN
from greenconsume.redis.channel import Channel, Waiting
from greenconsume.redis.feed import ensure_feeds
from greenconsume.redis.keeper import ensure_keeper
from greenconsume.redis.ledger import MAX_UNCONFIRMED, Ledger
from greenconsume.redis.link import Link
from greenconsume.redis.subscription import Subscription
from greenconsume.stopping import Deadline, StopSignal, wait
from greenconsume.virtual import close_all


class Session:
    """A share of a link.

    Attributes:
        link: The link.
        ledger: What this process holds of the server's messages.
        channels: Its channels, by their number.
        waits: When its waits end; set by the methods `begin_…`.
        given_back_count: How many messages went back that no callback took.
    """

    def __init__(self, link: Link, ledger: Ledger, client: Connection) -> None:
        self.link = link
        self.ledger = ledger
        self.client = client
        self.channels: dict[int, Channel] = {}
        self.waits = Waits(link)
        self.given_back_count = 0
        self.is_closing = self._closed_in_use = False
        self._owes_its_end = False
        self._inheritance = untold.Inheritance(client)
        self._inbox: deque[Waiting] = deque()
        self._errors: deque[BaseException] = deque()
        self._arrival = Event()
        self._turn_began = monotonic()
        self._settles_at_once = False  # the last message was settled when its callback returned
        link.sessions.add(self)
        ledger.attach(link)
        if ledger.doubtful or ledger.failed:  # by a lost link; perhaps nobody consumes any more
            ensure_keeper(ledger)

    @property
    def connected(self) -> bool:
        """True while it is open and its link lives."""
        return not self.is_closing and self.link.connected

    @property
    def is_lost(self) -> bool:
        """True if its link is gone, also before its drainer saw that."""
        return not self.connected

    @property
    def is_current(self) -> bool:
        """True while no other may take its place: also of a lost link, until its drainer is told.

        kombu opens a new connection, without those consumers and without a word, in place of one that is not.
        """
        return self.connected or (self._owes_its_end and not self.is_closing)

    # -- its phases -----------------------------------------------------------------------------------

    def begin_setup(self, stop: StopSignal) -> None:
        """Have `stop` end every call, with `StoppedError`, until it consumes. Never switches."""
        self.waits.begin_setup(stop)

    def begin_publishing(self, stop: StopSignal) -> None:
        """Do nothing: no server blocks its publishers. Never switches."""

    def begin_consuming(self, attend: Callable[[bool], None] | None = None) -> None:
        """Have no stop end a call any more: what a callback calls may finish. Never switches."""
        self.waits.begin_consuming(attend)

    def begin_close(self, deadline: Deadline | None = None) -> None:
        """Give all that is still to be said to the server one deadline; the first call counts."""
        self.waits.begin_close(deadline)

    # -- deliveries -----------------------------------------------------------------------------------

    def put(self, deliveries: Iterable[Waiting]) -> None:
        """Queue messages for `drain_events`. Never switches."""
        self._inbox.extend(deliveries)
        if not self._arrival.is_set():
            self._arrival.set()

    def put_first(
        self, channel: Channel, subscription: Subscription, field: str, raw: bytes
    ) -> None:
        """Queue one before all others. Never switches."""
        self._inbox.appendleft((channel, subscription, field, raw))
        self._arrival.set()

    @property
    def backlog(self) -> int:
        """The number of messages that wait for `drain_events`."""
        return len(self._inbox)

    @property
    def unsettled_count(self) -> int:
        """The number of messages that are not settled."""
        waiting = len(self._inbox)  # no channel counts them before they are delivered
        return waiting + sum(each.unsettled_count for each in self.channels.values())

    #: Not known: no server loses its patience with a message.
    oldest_unsettled_at: float | None = None

    @property
    def prefetch_count(self) -> int:
        """The largest prefetch of its channels; 0: without a limit."""
        return max((each.qos.prefetch_count for each in self.channels.values()), default=0)

    def tell(self, error: BaseException) -> None:
        """Have `drain_events` raise. Never switches."""
        self._errors.append(error)
        self._arrival.set()

    def take_back(self, channel: Channel, subscription: Subscription | None) -> list[str]:
        """Remove what waits for a channel, or for one consumer of it; return its fields. Never switches."""

        def wanted(entry: Waiting) -> bool:
            return entry[0] is channel and subscription in (None, entry[1])

        taken = [entry[2] for entry in self._inbox if wanted(entry)]
        if taken:
            kept = [entry for entry in self._inbox if not wanted(entry)]
            self._inbox.clear()
            self._inbox.extend(kept)
        return taken

    def drain_events(self, timeout: float | None = None, stop: StopSignal | None = None) -> None:
        """Deliver one message, waiting for it. Whatever the callback raises is raised here.

        Any number of greenlets may drain one session.

        Args:
            timeout: Monotonic seconds to wait; None: for ever, 0: not at all.
            stop: Once it is set nothing more is delivered.

        Raises:
            StoppedError: `stop` was set.
            TimeoutError: No message came in time (`socket.timeout` is its old name).
            LinkLostError: The link is gone.
            redis.exceptions.ResponseError: The server refused to give messages out.

        Switches: yes; also without having to wait, when nobody else had the hub for 2 ms.
        """
        if monotonic() - self._turn_began > MAX_TURN:
            gevent.sleep(0)
            self._turn_began = monotonic()
        if self._inheritance.drainer is not gevent.getcurrent():
            self._inheritance.note_drainer()
        deadline: Deadline | None = None
        ledger = self.ledger
        while True:
            if stop is not None and stop.reason is not None:
                stop.check()
            is_behind = self._settles_at_once and ledger.unconfirmed_count >= MAX_UNCONFIRMED
            if self._inbox and not is_behind:
                channel, subscription, field, raw = self._inbox.popleft()
                message = channel.dispatch(subscription, field, raw)
                self._settles_at_once = message.acknowledged
                return
            self._tell_drainer()
            deadline = deadline or Deadline(timeout)
            if deadline.expired:
                raise socket.timeout("timed out")
            if is_behind:
                ledger.wait_for_confirmation(deadline, stop)
            else:
                self._arrival.clear()
                wait(self._arrival, deadline, stop)
            self._turn_began = monotonic()

    def _tell_drainer(self) -> None:
        """Raise if the link is gone, or the one that another greenlet has replaced by this one."""
        is_lost = self.link.failure is not None
        if is_lost or self._inheritance.is_owed:
            self._inheritance.settle(self._has_consumers, is_lost)
        self.tell_its_end()

    @property
    def _has_consumers(self) -> bool:
        return any(channel.has_consumers for channel in self.channels.values())

    def tell_its_end(self) -> None:
        """Raise the error that ended it; after that another session may take its place. Never switches.

        Raises:
            LinkLostError: The link is gone.
        """
        if self.link.failure is not None:
            self._owes_its_end = False
        self._check()

    def _check(self) -> None:
        if self._errors:
            raise self._errors.popleft()
        if self._closed_in_use:  # its link may be gone with it
            raise RecoverableChannelError(CLOSED_IN_USE)
        if self.link.failure is not None:
            raise self.link.lost()
        if self.is_closing:
            raise RecoverableConnectionError("the connection was closed")

    # -- the end ----------------------------------------------------------------------------------------

    def note_consumer(self) -> None:
        """Note that this greenlet begins to consume. Never switches."""
        self._inheritance.note_consumer()

    def announce_stop(self) -> None:
        """Take nothing more, and give back what no callback has started. Never switches."""
        for channel in list(self.channels.values()):
            channel.announce_stop()

    def on_link_lost(self) -> None:
        """Wake everything that waits; what was not started goes back over the next link. Never switches."""
        self._owes_its_end = self._has_consumers
        if self._owes_its_end:
            self._inheritance.bequeath(self.link.lost())
        for channel in list(self.channels.values()):
            channel.on_link_lost()
        self._arrival.set()

    def close(self) -> None:
        """Close every channel, also when one raises, and leave the link; the last one closes it.

        Switches: only where the server has yet to answer, up to `close_timeout`.
        """
        untold.note_closed(self.client)
        if not self.is_closing:
            self._closed_in_use = self.waits.attend is not None  # else who consumes began the close
        try:
            close_all([channel.close for channel in self.channels.values()])
        finally:
            deadline = self.waits.close_deadline
            if self.link.sessions == {self}:
                self.ledger.wait_for_returns(deadline)
            if self._leave():
                self.link.close(deadline=deadline)

    def collect(self) -> None:
        """Let go of everything at once, without waiting for the server. Never switches."""
        try:
            close_all([channel.close for channel in self.channels.values()])
        finally:
            if self._leave():
                self.link.close(deadline=Deadline(0))

    def _leave(self) -> bool:
        """Leave the link; return whether it is to be closed."""
        if self.is_closing:
            return False
        self.is_closing = True
        self._inbox.clear()
        self._arrival.set()
        self.link.sessions.discard(self)
        if self.link.sessions or self.link.failure is not None:
            return False
        ensure_feeds(self.link, self.ledger).recall()
        if not self.ledger.held and self.ledger.links == [self.link]:
            # Nothing of this process is to be looked for here, once it has said what it has to say.
            self.ledger.flush()
            owners = self.ledger.keyspace.owners
            self.link.send(("HDEL", owners, self.ledger.owner), matters=False)
        return True

    @property
    def left(self) -> bool:
        """True once the link has forgotten it."""
        return self.is_closing

    def heartbeat_tick(self, rate: int = 2) -> None:
        """Do nothing while the link lives, which pings by itself.

        Raises:
            LinkLostError: The link is gone.
        """
        self._check()
