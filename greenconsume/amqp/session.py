"""Owns a session: one consumer's (or one `kombu.Connection`'s) share of a link.

It is what kombu holds as its connection: it owns channels of the link and the inbox of their deliveries,
and they end with it. The link's reader puts deliveries in; `drain_events` runs the user's callbacks,
in whichever greenlet calls it. A link closes with its last session.
"""

from __future__ import annotations

import atexit
import socket
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

import gevent
from amqp.exceptions import RecoverableConnectionError, ResourceError
from gevent.event import Event

from greenconsume.amqp.channel import RESUME_AT, Channel
from greenconsume.amqp.link import Link
from greenconsume.stopping import Deadline, StopSignal, wait

#: Callbacks that never wait may run this many seconds before the hub gets a turn.
_TURN = 0.002


class Session:
    """A share of a link: channels, and the inbox of what was delivered on them.

    Attributes:
        stop: While set up: the signal that ends a wait for a reply, with `StoppedError`.
        publish_stop: The signal that ends a wait for a broker that blocks publishers, if any.
        deadline: While closing: when every wait for a reply ends, with `TimeoutError`.
    """

    def __init__(self, link: Link, client: Any) -> None:
        self.link = link
        self.client = client
        self.channels: dict[int, Channel] = {}
        self.is_closing = False
        self.stop: StopSignal | None = None
        self.publish_stop: StopSignal | None = None
        self.deadline: Deadline | None = None
        self.given_back_count = 0  # deliveries that no callback took
        self.lasting_queues: set[str] = set()  # declared here, and not deleted when unused
        self.paused: list[tuple[Channel, str, bytes]] = []
        self._inbox: deque[tuple[Channel | None, Any, Callable[[Any], object]]] = deque()
        self._arrival = Event()
        self._turn_began = monotonic()
        link.sessions.add(self)
        _sessions.add(self)

    def __getattr__(self, name: str) -> Any:
        """What is the link's (heartbeat, server_properties, channel_max, …) reads through."""
        return getattr(self.link, name)

    @property
    def connected(self) -> bool:
        """Whether the session is open and its link lives."""
        return not self.is_closing and self.link.connected

    def channel(
        self, channel_id: int | None = None, callback: Callable[[Channel], object] | None = None
    ) -> Channel:
        """Open a channel, or return the session's own that has this id.

        Raises:
            ResourceError: The link's channels are used up.
            LinkLostError: The link is gone.

        Switches: yes, for a new channel.
        """
        self._check_open()
        if channel_id in self.channels:
            return self.channels[channel_id]
        channel = Channel(self, channel_id, on_open=callback)
        try:
            channel.open()
        except BaseException:  # nobody has it: its id must not stay taken
            channel.ask_to_close()
            channel.collect()
            raise
        return channel

    # -- deliveries -----------------------------------------------------------------------------

    def put(self, channel: Channel | None, item: Any, callback: Callable[[Any], object]) -> None:
        """Queue one thing for `drain_events`: it calls `callback(item)`. Never switches."""
        self._inbox.append((channel, item, callback))
        if not self._arrival.is_set():
            self._arrival.set()

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
        if monotonic() - self._turn_began > _TURN:
            gevent.sleep(0)
            self._turn_began = monotonic()
        deadline: Deadline | None = None
        while True:
            if stop is not None and stop.reason is not None:
                stop.check()
            if self._inbox:
                _, item, callback = self._inbox.popleft()
                if self.paused and len(self._inbox) <= RESUME_AT:
                    self._resume()
                callback(item)
                return
            self._check_open()
            if self.paused:  # what paused them went without being handed out
                self._resume()
            deadline = deadline or Deadline(timeout)
            if deadline.expired:
                raise socket.timeout("timed out")
            self._arrival.clear()
            wait(self._arrival, deadline, stop)
            self._turn_began = monotonic()

    @property
    def backlog(self) -> int:
        """How many deliveries wait for `drain_events`."""
        return len(self._inbox)

    def _resume(self) -> None:
        paused, self.paused = self.paused, []
        for channel, consumer_tag, args in paused:
            channel.resume(consumer_tag, args)

    def forget_paused(self, channel: Channel, consumer_tag: str | None = None) -> None:
        """Do not resume this consumer, or any of the channel. Never switches."""
        self.paused = [
            each
            for each in self.paused
            if each[0] is not channel or consumer_tag not in (None, each[1])
        ]

    def take_back(self, wanted: Callable[[Channel | None, Any], bool]) -> list[Any]:
        """Remove and return the items of the inbox that are `wanted`. Never switches."""
        taken = [item for channel, item, _ in self._inbox if wanted(channel, item)]
        kept = [entry for entry in self._inbox if not wanted(entry[0], entry[1])]
        self._inbox.clear()
        self._inbox.extend(kept)
        return taken

    def announce_stop(self) -> None:
        """Tell the broker to send no more; give back what no callback has started. Never switches."""
        for channel in list(self.channels.values()):
            channel.announce_stop()

    # -- the end ----------------------------------------------------------------------------------

    def on_link_lost(self) -> None:
        """Wake everything that waits; what was not dispatched is the broker's again."""
        for channel in list(self.channels.values()):
            channel.on_link_lost()
        self._arrival.set()

    def close(self, *_args: Any, **_kwargs: Any) -> None:
        """Close every channel, then leave the link, within the link's `close_timeout`.

        A channel that fails does not keep the others open. Never raises for what the broker does.

        Switches: yes.
        """
        if self.is_closing:
            return
        self.is_closing = True
        self.stop = None
        self.deadline = self.deadline or Deadline(self.link.close_timeout)
        channels = list(self.channels.values())
        try:
            for channel in channels:
                channel.ask_to_close()
            for channel in channels:
                channel.await_closed(self.deadline)
        except BaseException:  # a kill must not leave the link with a session that nobody has
            self.collect()
            raise
        self._leave()
        if not self.link.sessions:
            self.link.close(deadline=self.deadline)

    def collect(self) -> None:
        """Let go of everything at once, without waiting for the broker. Never switches."""
        self.is_closing = True
        for channel in list(self.channels.values()):
            channel.ask_to_close()
            channel.collect()
        self._leave()
        if not self.link.sessions:
            self.link.is_closing = True
            self.link.fail(self.link.lost())

    @property
    def left(self) -> bool:
        """Whether the link has forgotten the session."""
        return self not in self.link.sessions

    def _leave(self) -> None:
        self.link.sessions.discard(self)
        self._inbox.clear()
        self._arrival.set()

    def heartbeat_tick(self, rate: int = 2) -> None:
        """Do nothing while the link lives, which beats by itself.

        Raises:
            LinkLostError: The link is gone.
        """
        self._check_open()

    def _check_open(self) -> None:
        if self.link.failure is not None:
            raise self.link.lost()
        if self.is_closing:
            raise RecoverableConnectionError("the connection was closed")

    # -- what py-amqp's Channel asks its connection for ---------------------------------------------

    def _get_free_channel_id(self) -> int:
        try:
            return self.link.allocate()
        except ResourceError:
            self.link.make_room(len(self.channels) + 1)
            raise

    def _claim_channel_id(self, channel_id: int) -> int:
        return self.link.allocate(channel_id)


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _send_what_is_left() -> None:
    # A program may publish and end without a close; py-amqp has sent by then what `publish` was given.
    for session in list(_sessions):
        if session.connected and session.link.has_unsent:
            session.close()


atexit.register(_send_what_is_left)
