"""Owns one green AMQP connection: its socket, its life, and who shares it.

Built on py-amqp's `Connection` for the handshake, SASL and TLS. The reader greenlet alone reads the
socket and never runs user code nor waits for a reply (law 1); the writer greenlet alone writes it.
Nobody is killed in either: a link ends by `fail`, which closes the socket under them, or by `close`.
Used by `Session`s, one a consumer; made by `Transport` and shared by `LinkPool`.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable
from time import monotonic
from typing import Any

import amqp
import gevent
from amqp import spec
from amqp.exceptions import RecoverableConnectionError, ResourceError, error_for_code
from amqp.method_framing import frame_handler
from amqp.serialization import dumps
from gevent.event import Event

from greenconsume.amqp import blame, link_socket
from greenconsume.amqp.blame import LinkLostError as LinkLostError
from greenconsume.amqp.blame import Part, Verdict
from greenconsume.amqp.channel_ids import CHANNEL_MAX, ChannelIds
from greenconsume.amqp.declared import DeclaredQueues
from greenconsume.amqp.frames import Sig, encode_content, encode_method
from greenconsume.amqp.heartbeats import beat
from greenconsume.amqp.link_reader import LinkReader
from greenconsume.amqp.link_users import LinkUser, TakesDeliveries
from greenconsume.amqp.link_writer import LinkWriter
from greenconsume.amqp.secret import UPDATED, explain
from greenconsume.amqp.tls import TLSTransport
from greenconsume.errors import ForkedError
from greenconsume.events import LinkBlocked, LinkDown, LinkUp, emit
from greenconsume.stopping import Deadline, StopSignal, wait

#: Seconds between connection heartbeats unless the user sets others.
DEFAULT_HEARTBEAT = 30.0
#: Seconds that closing a link or a channel may take.
DEFAULT_CLOSE_TIMEOUT = 5.0
#: Seconds that a call (declare, qos, consume, …) waits for its reply.
DEFAULT_CALL_TIMEOUT = 60.0
_INNOCENT = Part()
# By py-amqp's default the kernel drops a broker that takes no bytes for a second, as one does that blocks
# its publishers; here the heartbeats judge.
_SOCKET_SETTINGS = {socket.TCP_USER_TIMEOUT: 0} if hasattr(socket, "TCP_USER_TIMEOUT") else {}


class Link(amqp.Connection):  # type: ignore[misc]  # amqp is untyped
    """One AMQP connection, used by any number of sessions and greenlets.

    Args:
        close_timeout: Seconds that an orderly close may take before the socket is dropped.
        call_timeout: Seconds that a call waits for its reply before it raises `TimeoutError`.
        **options: As `amqp.Connection`.

    Attributes:
        uri: The broker's address, without its password.
        failure: Why the link ended; None while it has not.
        over: Set once the link has ended.
        sessions: Who shares it.
        declared: What is known of the queues that were declared over it.
        last_read: When the reader last read something (`time.monotonic`).
    """

    _METHODS = {
        **amqp.Connection._METHODS,
        spec.Connection.Blocked: spec.method(spec.Connection.Blocked, "s"),
        UPDATED: spec.method(UPDATED),
    }
    heartbeat: float
    channel_max: int
    frame_max: int
    confirm_publish: bool
    server_properties: dict[str, Any]
    channels: dict[int, Any]  # `LinkChannel`s, and the link itself as number 0, as py-amqp has it
    is_closing: bool

    def __init__(
        self,
        *,
        close_timeout: float = DEFAULT_CLOSE_TIMEOUT,
        call_timeout: float = DEFAULT_CALL_TIMEOUT,
        **options: Any,
    ) -> None:
        self._channel_limit = options.get("channel_max") or CHANNEL_MAX
        super().__init__(**options)
        self.close_timeout = close_timeout
        self.call_timeout = call_timeout
        self.uri = ""
        self.failure: BaseException | None = None
        self.sessions: set[LinkUser] = set()
        self.declared = DeclaredQueues()
        self._ids = ChannelIds()
        self._writer = LinkWriter(self)
        self._gate = self._writer.gate
        self._opened, self._closed, self.over = Event(), Event(), Event()
        self._login_size = 0
        self.last_read = monotonic()
        all_links.add(self)

    # -- the life of a link -------------------------------------------------------------------

    def connect(self, callback: Callable[[], object] | None = None) -> None:
        """Open the socket and shake hands, within `connect_timeout` seconds each.

        Raises:
            OSError: The broker cannot be reached, or does not answer.
            amqp.exceptions.AMQPError: It answered and refused.

        Switches: yes. A kill in here closes the socket; the link is then of no further use.
        """
        try:
            self._open_socket()
            wait(self._opened, Deadline(self.connect_timeout))
            error = self.failure
            if not self._opened.is_set():
                error = TimeoutError(
                    f"{self.host} accepted the connection, but does not speak AMQP"
                )
            if error is not None:
                raise explain(error, self._login_size)
        except BaseException as exc:  # a kill too must not leave the socket open
            self.fail(exc)
            raise
        if self.heartbeat:
            gevent.spawn(beat, self, self.over).name = f"heartbeat of {self.uri}"
        emit(LinkUp(self.uri))

    def Transport(  # noqa: N802  # py-amqp's plug point
        self, host: str, connect_timeout: float, ssl: Any = False, *timeouts: Any, **options: Any
    ) -> Any:
        """Make the socket that `connect` opens; with TLS, one that verifies names."""
        if not ssl:
            return super().Transport(host, connect_timeout, ssl, *timeouts, **options)
        options |= zip(("read_timeout", "write_timeout"), timeouts, strict=False)
        return TLSTransport(host, connect_timeout, ssl, **options)

    def _open_socket(self) -> None:
        self.transport = self.Transport(
            self.host,
            self.connect_timeout,
            self.ssl,
            self.read_timeout,
            self.write_timeout,
            socket_settings={**_SOCKET_SETTINGS, **(self.socket_settings or {})},
        )
        self.transport.connect()
        self.transport.sock.settimeout(None)  # TLS leaves the connect timeout on
        self.frame_writer = self._write_frames
        self.last_read = monotonic()
        reader = LinkReader(self)
        self.on_inbound_frame = frame_handler(self, reader.on_method)  # puts methods together
        gevent.spawn(reader.run).name = f"reader of {self.uri}"
        gevent.spawn(self._writer.run).name = f"writer of {self.uri}"

    @property
    def connected(self) -> bool:
        """True if the link is open and has not failed."""
        return self.failure is None and self._opened.is_set()

    def close(self, *args: object, deadline: Deadline | None = None) -> None:
        """Close in order: `Close`, wait for `CloseOk` up to the deadline, drop the socket.

        Args:
            *args: As `amqp.Connection.close`, and not looked at.
            deadline: `close_timeout` from now by default.

        Switches: yes. Never raises for what the broker does.
        """
        if self.failure is not None or self.is_closing:
            return
        deadline = deadline or Deadline(self.close_timeout)
        self.is_closing = True
        self.write_method(0, spec.Connection.Close, dumps("BsBB", (0, "", 0, 0)))
        try:
            wait(self._closed, deadline)
        finally:  # after a kill, too
            self.fail(RecoverableConnectionError("the link was closed"))

    def fail(self, error: BaseException) -> None:
        """End the link now: drop the socket and tell every channel and session. Never switches."""
        if self.failure is not None:
            return
        was_open = self._opened.is_set()
        self.failure = error
        for event in (self._opened, self._closed, self.over):
            event.set()
        self._writer.end()
        link_socket.drop(self._transport)
        blame.tell_culprit(error, self.channels)
        if was_open and not self.is_closing:
            emit(LinkDown(self.uri, error, len(self.sessions)))
        verdicts = blame.verdicts(error, self.sessions)
        for session in list(self.sessions):
            session.on_link_lost(verdicts.get(session, _INNOCENT))
        self.channels.clear()

    collect = close

    def heartbeat_tick(self, rate: int = 2) -> None:
        """Do nothing: a timer of the link's own sends and judges heartbeats. For py-amqp's users."""

    # -- what the broker says of the connection ---------------------------------------------------

    def note_read(self) -> None:
        """Note that the reader has just read something: the broker lives. Never switches."""
        self.last_read = monotonic()

    def listen(self, sig: Sig, callback: Callable[[], object]) -> None:
        """Have the reader call `callback`, which must not switch, for each such method of the broker's."""
        self._callbacks[sig] = callback

    def _on_tune(self, channel_max: int, frame_max: int, server_heartbeat: int) -> None:
        # py-amqp takes the server's channel_max even where the user asked for less.
        limit = min(channel_max or CHANNEL_MAX, self._channel_limit)
        super()._on_tune(limit, frame_max, server_heartbeat)

    def _on_open_ok(self) -> None:
        super()._on_open_ok()
        self._opened.set()

    def _on_close(self, reply_code: int, reply_text: str, class_id: int, method_id: int) -> None:
        self.write_method(0, spec.Connection.CloseOk)
        if not self.ssl:  # the reader is about to drop it; over TLS a try may block
            link_socket.send_at_once(self.transport, self._writer.take_unsent())
        raise error_for_code(reply_code, reply_text, (class_id, method_id), amqp.ConnectionError)

    def _on_close_ok(self) -> None:
        self._closed.set()

    def _on_blocked(self, reason: str = "") -> None:
        self._gate.block()
        emit(LinkBlocked(self.uri, True, reason))
        if self.on_blocked:
            gevent.spawn(self.on_blocked, reason)

    def _on_unblocked(self) -> None:
        self._gate.unblock()
        emit(LinkBlocked(self.uri, False, ""))
        if self.on_unblocked:
            gevent.spawn(self.on_unblocked)

    # -- writing --------------------------------------------------------------------------------

    def write_method(
        self, channel: int, sig: Sig, args: bytes = b"", content: amqp.Message | None = None
    ) -> None:
        """Encode one method, with its content if it has one, and queue it. Never switches."""
        if content is None:
            self.write([encode_method(channel, sig, args, self.frame_max)])
        else:
            self.write(encode_content(channel, sig, args, content, self.frame_max))

    def _write_frames(
        self, _type: int, channel: int, sig: Sig, args: bytes | str, content: amqp.Message | None
    ) -> None:
        """Write one method for py-amqp, whose `frame_writer` this is. Never switches."""
        args = args.encode() if isinstance(args, str) else args
        if sig == spec.Connection.StartOk:
            self._login_size = len(args)
        self.write_method(channel, sig, args, content)

    def write(self, frames: list[bytes]) -> None:
        """Queue frames for the writer, which sends them at the hub's next turn. Never switches.

        Raises:
            LinkLostError: The link is gone.
        """
        if self.failure is not None:
            raise self.lost()
        self._writer.put(frames)

    def flush_soon(self, deliveries: TakesDeliveries) -> None:
        """Have the writer ask a channel for its settles at the hub's next turn. Never switches."""
        self._writer.flush_soon(deliveries)

    @property
    def last_write(self) -> float:
        """The time at which the writer last wrote something (`time.monotonic`)."""
        return self._writer.last_write

    @property
    def has_unsent(self) -> bool:
        """True if the writer still has something to send."""
        return self._gate.has_unsent

    @property
    def blocked(self) -> bool:
        """True if the broker blocks this link's publishers."""
        return self._gate.is_blocked

    def is_publishable(self, channel: int) -> bool:
        """Return whether `wait_publishable` would return at once. Never switches."""
        return self._gate.is_open(channel)

    def wait_publishable(
        self, deadline: Deadline, stop: StopSignal | None = None, channel: int | None = None
    ) -> None:
        """Wait while the broker blocks this link's publishers, or too much is unsent.

        Args:
            deadline: When to give up.
            stop: Ends the wait.
            channel: The channel that is to publish; None: any of them.

        Raises:
            RecoverableConnectionError: The deadline came first (as py-amqp's `basic_publish`).
            LinkLostError: The link was lost meanwhile.
            StoppedError: `stop` was set.

        Switches: only while there is something to wait for.
        """
        self._gate.wait(deadline, stop, channel)
        if self.failure is not None:
            raise self.lost()

    # -- sessions and channel ids -----------------------------------------------------------------

    @property
    def session_size(self) -> int:
        """The number of channels that another session is taken to need."""
        return self._ids.session_size

    @property
    def has_room(self) -> bool:
        """True if another session would find its channel ids."""
        channel_count = len(self.channels) - 1  # the link itself is number 0
        return self._ids.has_room(len(self.sessions), channel_count, self.channel_max)

    def make_room(self, size: int) -> None:
        """Reckon with sessions of `size` channels from now on: one found no id for so many."""
        self._ids.make_room(size, self.channel_max)

    def allocate(self, channel_id: int | None = None) -> int:
        """Return a channel id that is not in use; an explicit one must be free.

        Raises:
            ResourceError: All ids up to the negotiated `channel_max` are in use.
        """
        try:
            return self._ids.allocate(channel_id, self.channels, self.channel_max)
        except ResourceError as exc:
            raise ResourceError(
                f"all {self.channel_max} channels of the link to {self.uri} are in use: "
                "raise channel_max at the broker, or use more links",
                spec.Channel.Open,
            ) from exc

    def forget(self, channel_id: int) -> None:
        """Make a channel's id free again: both sides have closed it."""
        if self.channels.pop(channel_id, None) is not None:
            self._ids.release(channel_id)

    def __repr__(self) -> str:
        # py-amqp's asks the socket for its address, and raises when that is closed.
        return f"<{type(self).__name__} {self.uri} {'open' if self.connected else 'not open'}>"

    def lost(self, part: Part = _INNOCENT) -> LinkLostError:
        """Return a new error that says why the link is gone, to who had this part in it."""
        error = LinkLostError(f"the link to {self.uri} is gone: {self.failure}")
        error.__cause__, error.group = self.failure, part.group
        error.is_suspect = part.verdict is Verdict.SUSPECT
        return error

    def on_fork(self) -> None:
        """Let go of the socket, in a forked child, without a word to the broker, which is the parent's."""
        if self.failure is not None or self._transport is None or not self._transport.sock:
            return
        link_socket.leave_to_parent(self._transport)
        self.is_closing = True
        self.fail(ForkedError("a broker link"))


all_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _leave_links_to_parent() -> None:
    for link in list(all_links):
        link.on_fork()


os.register_at_fork(after_in_child=_leave_links_to_parent)
