"""Owns a session: one consumer's (or one `kombu.Connection`'s) share of a link.

It is what kombu holds as its connection: it owns channels of the link and the inbox of their deliveries,
and they end with it. The link's reader puts deliveries in; `drain_events` runs the user's callbacks,
in whichever greenlet calls it. A link closes with its last session.
"""

from __future__ import annotations

import atexit
import socket
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import gevent
from amqp.exceptions import RecoverableChannelError, RecoverableConnectionError, ResourceError
from gevent.event import Event
from kombu import Connection

from greenconsume.amqp import untold
from greenconsume.amqp.blame import Part, Verdict
from greenconsume.amqp.channel import Channel
from greenconsume.amqp.inbox import Inbox
from greenconsume.amqp.link import Link
from greenconsume.amqp.waits import CLOSED_IN_USE, Waits
from greenconsume.hub import MAX_TURN
from greenconsume.stopping import Deadline, StopSignal


class Session:
    """A share of a link: channels, and the inbox of what was delivered on them.

    Attributes:
        link: The link that it shares.
        client: The `kombu.Connection` that it serves.
        channels: Its open channels by id.
        inbox: What was delivered on them, and waits for `drain_events`.
        waits: When its waits end; set by the methods `begin_…`.
    """

    __slots__ = (
        "__weakref__",
        "_closed_in_use",
        "_inheritance",
        "_owes_its_end",
        "_part",
        "_turn_began",
        "channels",
        "client",
        "inbox",
        "is_closing",
        "link",
        "waits",
    )

    def __init__(self, link: Link, client: Connection) -> None:
        self.link = link
        self.client = client
        self.channels: dict[int, Channel] = {}
        self.is_closing = self._closed_in_use = False
        self._part = Part()
        self._owes_its_end = False
        self._inheritance = untold.Inheritance(client)
        self.inbox = Inbox()
        self.waits = Waits(link)
        self._turn_began = monotonic()
        link.sessions.add(self)
        _sessions.add(self)

    # -- its phases -----------------------------------------------------------------------------

    def begin_setup(self, stop: StopSignal) -> None:
        """Have `stop` end every call, with `StoppedError`, until it consumes. Never switches."""
        self.waits.begin_setup(stop)

    def begin_publishing(self, stop: StopSignal) -> None:
        """Have `stop` end every wait for a broker that blocks its publishers. Never switches."""
        self.waits.begin_publishing(stop)

    def begin_consuming(self, attend: Callable[[bool], None] | None = None) -> None:
        """Have no stop end a call any more: what a callback calls may finish. Never switches.

        Args:
            attend: Called with whether any consumer runs, before `drain_events` waits; must not switch.
        """
        self.waits.begin_consuming(attend)

    def begin_close(self, deadline: Deadline | None = None) -> None:
        """Give all that is still to be said to the broker one deadline; the first call counts.

        Args:
            deadline: By default the link's `close_timeout` from now.
        """
        self.waits.begin_close(deadline)

    def wait_for(self, event: Event) -> None:
        """Wait for what another session is doing, as for a reply: until a stop, or the call's timeout.

        Raises:
            StoppedError: The session is being set up, and its stop signal was set.

        Switches: yes.
        """
        self.waits.wait_for_reply(event)

    # -- what kombu asks a connection for ---------------------------------------------------------

    @property
    def connected(self) -> bool:
        """True if the session is open and its link lives."""
        return not self.is_closing and self.link.connected

    @property
    def is_current(self) -> bool:
        """True while no other may take its place: also of a lost link, until its drainer is told.

        kombu opens a new connection, without those consumers and without a word, in place of one that is not.
        """
        return self.connected or (self._owes_its_end and not self.is_closing)

    def channel(
        self, channel_id: int | None = None, callback: Callable[[Channel], object] | None = None
    ) -> Channel:
        """Open a channel, or return the session's own that has this id.

        Raises:
            ResourceError: The link's channels are used up.
            LinkLostError: The link is gone.

        Switches: yes, for a new channel.
        """
        self._tell_its_end()
        if channel_id in self.channels:
            return self.channels[channel_id]
        channel = Channel(self, channel_id, on_open=callback)
        try:
            if self.waits.is_setting_up:  # its next call is served, or fails, after it
                channel.core.calls.open()
            else:
                channel.open()
        except BaseException:  # nobody has it: its id must not stay taken
            channel.core.ask_to_close()
            channel.collect()
            raise
        return channel

    @property
    def heartbeat(self) -> float:
        """The heartbeat's interval in seconds, as agreed with the broker; 0: none."""
        return self.link.heartbeat

    @property
    def server_properties(self) -> dict[str, Any]:
        """The broker's words about itself: product, version, capabilities."""
        return self.link.server_properties

    @property
    def channel_max(self) -> int:
        """The largest channel id, as agreed with the broker."""
        return self.link.channel_max

    @property
    def frame_max(self) -> int:
        """The largest frame in bytes, as agreed with the broker."""
        return self.link.frame_max

    @property
    def confirm_publish(self) -> bool:
        """True if `basic_publish` waits for the confirm, by the transport option of this name."""
        return self.link.confirm_publish

    @property
    def transport(self) -> Any:
        """The transport of py-amqp, which holds the socket."""
        return self.link.transport

    def heartbeat_tick(self, rate: int = 2) -> None:
        """Do nothing while the link lives, which beats by itself.

        Raises:
            LinkLostError: The link is gone.
        """
        self._check_open()

    # -- deliveries -----------------------------------------------------------------------------

    def drain_events(self, timeout: float | None = None, stop: StopSignal | None = None) -> None:
        """Wait for one delivery, and run its callback in this greenlet.

        Args:
            timeout: Monotonic seconds to wait at the most; heartbeats and part frames do not extend it.
            stop: Once it is set nothing more is dispatched.

        Raises:
            TimeoutError: No delivery came in time (`socket.timeout` is its old name).
            StoppedError: `stop` was set.
            LinkLostError: The link is gone.
            amqp.exceptions.AMQPError: The broker closed a channel, or cancelled a consumer.

        Switches: yes. Any number of greenlets may drain one session.
        """
        if monotonic() - self._turn_began > MAX_TURN:
            gevent.sleep(0)
            self._turn_began = monotonic()
        if self._inheritance.drainer is not gevent.getcurrent():
            self._inheritance.note_drainer()
        inbox = self.inbox
        deadline: Deadline | None = None
        while True:
            if stop is not None and stop.reason is not None:
                stop.check()
            if inbox.hand_out():
                return
            self._tell_drainer()
            if inbox.paused:  # what paused them went without being handed out
                inbox.resume()
            deadline = deadline or Deadline(timeout)
            if deadline.expired:
                raise socket.timeout("timed out")
            if self.waits.attend is not None:
                self.waits.attend(self.has_consumers)
            inbox.wait(deadline, stop)
            self._turn_began = monotonic()

    @property
    def has_consumers(self) -> bool:
        """True while a consumer of any of its channels runs."""
        return any(each.deliveries.consumers.running for each in self.channels.values())

    @property
    def is_lost(self) -> bool:
        """True if its link, or the channel that it consumed on, is gone, also before its drainer saw that."""
        if not self.connected:
            return True
        return not self.has_consumers and any(
            each.core.is_broken for each in self.channels.values()
        )

    @property
    def has_news(self) -> bool:
        """True if `drain_events` would not wait."""
        return bool(self.inbox.entries) or self._inheritance.pending or not self.connected

    @property
    def expects_nothing(self) -> bool:
        """True if `drain_events` would wait, and nothing can come that it waits for."""
        handled = any(each.core.has_handlers for each in self.channels.values())
        return not (handled or self.has_consumers or self.has_news)

    @property
    def backlog(self) -> int:
        """The number of deliveries that wait for `drain_events`."""
        return len(self.inbox.entries)

    @property
    def unsettled_count(self) -> int:
        """The number of deliveries that are not settled."""
        return sum([each.unsettled_count for each in self.channels.values()])

    @property
    def oldest_unsettled_at(self) -> float | None:
        """The time at which the oldest of these came (`time.monotonic`)."""
        oldest = (each.oldest_unsettled for each in self.channels.values())
        return min((each[1] for each in oldest if each is not None), default=None)

    @property
    def prefetch_count(self) -> int:
        """The largest prefetch of its channels; 0: without a limit."""
        return max([each.prefetch_count for each in self.channels.values()], default=0)

    @property
    def given_back_count(self) -> int:
        """The number of deliveries that went back to their queues because no callback took them."""
        return self.inbox.given_back_count

    def note_consumer(self) -> None:
        """Note that this greenlet begins to consume. Never switches."""
        self._inheritance.note_consumer()

    def announce_stop(self) -> None:
        """Tell the broker to send no more; give back what no callback has started. Never switches."""
        for channel in list(self.channels.values()):
            channel.deliveries.announce_stop()

    # -- the end ----------------------------------------------------------------------------------

    def on_link_lost(self, part: Part) -> None:
        """Wake everything that waits; what was not dispatched is the broker's again."""
        self._part = part
        self._owes_its_end = self.has_consumers
        if self._owes_its_end:
            self._inheritance.bequeath(self.link.lost(part))
        own = self.link.failure if part.verdict is Verdict.GUILTY else None
        for channel in list(self.channels.values()):
            channel.core.on_link_lost(partial(self.link.lost, part), own)
        self.inbox.wake()

    def close(self, *_args: object, **_kwargs: object) -> None:
        """Close every channel, then leave the link, within the link's `close_timeout`.

        A channel that fails does not keep the others open. Never raises for what the broker does.

        Switches: yes.
        """
        if self.is_closing:
            return
        self._closed_in_use = self.waits.attend is not None  # else who consumes began the close
        self.is_closing = True
        untold.note_closed(self.client)
        deadline = self.waits.begin_close()
        channels = list(self.channels.values())
        try:
            for channel in channels:
                channel.core.ask_to_close()
            for channel in channels:
                channel.await_closed(deadline)
        except BaseException:  # a kill must not leave the link with a session that nobody has
            self.collect()
            raise
        self._leave()
        if not self.link.sessions:
            self.link.close(deadline=deadline)

    def collect(self) -> None:
        """Let go of everything at once, without waiting for the broker. Never switches."""
        self.is_closing = True
        for channel in list(self.channels.values()):
            channel.core.ask_to_close()
            channel.collect()
        self._leave()
        if not self.link.sessions and self.link.failure is None:
            self.link.is_closing = True
            self.link.fail(self.link.lost())

    @property
    def left(self) -> bool:
        """True if the link has forgotten the session."""
        return self not in self.link.sessions

    def _leave(self) -> None:
        self.link.sessions.discard(self)
        self.inbox.clear()

    def _tell_drainer(self) -> None:
        """Raise if the link is gone, or the one that another greenlet has replaced by this one."""
        is_lost = self.link.failure is not None
        if is_lost or self._inheritance.is_owed:
            self._inheritance.settle(self.has_consumers, is_lost)
        self._tell_its_end()

    def _tell_its_end(self) -> None:
        if self.link.failure is not None:
            self._owes_its_end = False
        self._check_open()

    def _check_open(self) -> None:
        if self._closed_in_use:  # its link may be gone with it
            raise RecoverableChannelError(CLOSED_IN_USE)
        failure = self.link.failure
        if failure is not None:
            if self._part.verdict is Verdict.GUILTY and not self.is_closing:
                raise failure  # no lost link: what this session did lost it
            raise self.link.lost(self._part)
        if self.is_closing:
            raise RecoverableConnectionError("the connection was closed")

    # -- what a lost link is looked into for ------------------------------------------------------

    @property
    def has_published(self) -> bool:
        """True if anything was published over it."""
        return any(channel.core.has_published for channel in self.channels.values())

    def awaits(self, method: tuple[int, int]) -> bool:
        """Return whether a call by this method has no answer yet."""
        return any(channel.core.calls.awaits(method) for channel in self.channels.values())

    def allocate(self, channel_id: int | None) -> int:
        """Return a free channel id of the link, or this one; see `Link.allocate`."""
        try:
            return self.link.allocate(channel_id)
        except ResourceError:
            self.link.make_room(len(self.channels) + 1)
            raise


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _send_what_is_left() -> None:
    # A program may publish and end without a close; py-amqp has sent by then what `publish` was given.
    for session in list(_sessions):
        if session.connected and session.link.has_unsent:
            session.close()


atexit.register(_send_what_is_left)
