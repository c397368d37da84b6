"""Owns one green connection to a server: its socket, its reader, its writer, its pings.

Commands of any number of greenlets go out together at the hub's next turn, and their replies come back in
order. The reader alone reads the socket, never runs user code nor waits for a reply (law 1); nobody is
killed in I/O (law 2): a link ends by `fail`, which closes the socket under both. redis-py opens the socket
and logs in. Used by `feed`, `ledger`, `keeper` and the channels of many connections; made by `transport`
and shared by a `LinkPool`.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
from amqp.exceptions import RecoverableConnectionError
from gevent.event import Event
from redis import exceptions

from greenconsume.amqp.link import LinkLostError
from greenconsume.errors import ForkedError
from greenconsume.events import LinkDown, LinkUp, emit
from greenconsume.redis.calls import CALL_TIMEOUT, Calls, OnReply
from greenconsume.redis.handshake import NEWEST, Greeting, greet
from greenconsume.redis.outgoing import Outgoing
from greenconsume.redis.pings import watch
from greenconsume.redis.protocol import Argument, Parser, ProtocolError, Push, encode
from greenconsume.redis.scripts import Script
from greenconsume.stopping import Deadline, wait

if TYPE_CHECKING:
    from redis.connection import AbstractConnection as RedisConnection

READ_SIZE = 131072
#: Seconds within which a server that is gone is noticed though its connection stands: a silent one is asked
#: whether it lives.
HEALTH_INTERVAL = 5.0
DEFAULT_CLOSE_TIMEOUT = 5.0
#: Seconds that a close waits for answers that do not matter: a server that is well gives them at once.
GRACE = 0.01
#: What says that this server is the wrong one to talk to.
_WRONG_SERVER = (
    exceptions.ReadOnlyError,
    exceptions.MasterDownError,
    exceptions.BusyLoadingError,
    exceptions.AuthenticationError,
)


_TO_SUBSCRIBERS = (b"psubscribe", b"punsubscribe", b"pmessage")


class Link(Calls):
    """One connection to a server, used by any number of sessions and greenlets.

    Args:
        uri: The server's address, without its password.
        dialler: Makes a redis-py connection, not connected, that speaks a protocol, 2 or 3.
        health_interval: See `HEALTH_INTERVAL`; 0: never asked.
        close_timeout: Seconds that an orderly close may take before the socket is dropped.
        subscribes: It listens to what is published, and does nothing else.
        protocol: The version of the protocol to begin with; see `greet`.

    Attributes:
        greeting: What the server said of itself.
        sessions: Who uses it.
        failure: Why it has ended.
        on_push: Called with each push in the reader, where it must not switch.
        before_write: Called in the writer before it sends: the moment to add what was gathered in a turn.
        on_end: Called once it has failed, before its sessions are told.
    """

    session_size = 1
    has_room = True
    blocked = False  # no server blocks its publishers

    def __init__(
        self,
        uri: str,
        dialler: Callable[[int], Any],
        health_interval: float = HEALTH_INTERVAL,
        close_timeout: float = DEFAULT_CLOSE_TIMEOUT,
        subscribes: bool = False,
        protocol: int = NEWEST,
    ) -> None:
        self.uri = uri
        self.close_timeout = close_timeout
        self.call_timeout = CALL_TIMEOUT
        self.greeting = Greeting()
        self.sessions: set[Any] = set()
        self.failure: BaseException | None = None
        self.is_closing = False
        self.on_push: list[Callable[[Any], object]] = []
        self.before_write: list[Callable[[], object]] = []
        self.on_end: list[Callable[[], object]] = []
        self._dialler = dialler
        self._health_interval = health_interval
        self._subscribes, self._protocol = subscribes, protocol
        self._connection: Any = None  # redis-py's
        self._sock: Any = None
        self._replies: deque[tuple[OnReply | None, bool]] = deque()
        self._owed_count = 0  # replies that a close waits for
        self._outgoing = Outgoing()
        self._known: set[str] = set()  # scripts that the server has seen
        self._has_unsent, self._dead, self._quiet = Event(), Event(), Event()
        self._opened = False
        self._last_read = monotonic()
        all_links.add(self)

    # -- the life of a link -------------------------------------------------------------------------

    def connect(self) -> None:
        """Open the socket and log in; one attempt.

        Raises:
            redis.exceptions.RedisError: The server cannot be reached, or refuses.
            OSError: Likewise.

        Switches: yes. A kill in here closes the socket; the link is then of no further use.
        """
        try:
            self._connection, self.greeting = greet(self._dialler, self._took, self._protocol)
        except BaseException as exc:  # a kill too must not leave the socket open
            self.fail(exc)
            raise
        self._sock = self._connection._sock
        self._sock.settimeout(None)
        self._opened, self._last_read = True, monotonic()
        gevent.spawn(self._read).name = f"reader of {self.uri}"
        gevent.spawn(self._write).name = f"writer of {self.uri}"
        if self._health_interval:
            gevent.spawn(watch, self, self._health_interval).name = f"pings of {self.uri}"
        emit(LinkUp(self.uri))

    def _took(self, connection: RedisConnection) -> None:
        self._connection = connection

    @property
    def connected(self) -> bool:
        """True while it is open and has not failed."""
        return self._opened and self.failure is None

    def make_room(self, size: int) -> None:
        """Do nothing: there is room for any number of sessions."""

    def close(self, *, deadline: Deadline | None = None) -> None:
        """Wait for the answers that matter, up to the deadline, and drop the socket.

        Args:
            deadline: `close_timeout` from now by default.

        Switches: only if there is something to wait for. Never raises for what the server does.
        """
        if self.failure is not None or self.is_closing:
            return
        self.is_closing = True
        deadline = deadline or Deadline(self.close_timeout)
        try:
            for gather in self.before_write:
                gather()
            self.flush_now()
            self._has_unsent.set()
            left = deadline.remaining
            grace = Deadline(GRACE if left is None else min(GRACE, left))
            while self._owed_count or self._replies:  # none are owed once it has failed
                until = deadline if self._owed_count else grace
                if until.expired:
                    break
                self._quiet.clear()
                wait(self._quiet, until)
        finally:  # after a kill, too
            self.fail(RecoverableConnectionError("the link was closed"))

    collect = close

    def fail(self, error: BaseException) -> None:
        """End the link now: drop the socket, and tell all who wait or use it. Never switches."""
        if self.failure is not None:
            return
        self.failure = error
        self._drop_socket()
        sessions = list(self.sessions)
        if self._opened and not self.is_closing:
            emit(LinkDown(self.uri, error, len(sessions)))
        replies, self._replies = self._replies, deque()
        self._owed_count = 0
        for on_reply, _ in replies:
            if on_reply is not None:
                on_reply(self.lost())
        self._outgoing.clear()
        for event in (self._has_unsent, self._dead, self._quiet):
            event.set()
        for ended in self.on_end:
            ended()
        for session in sessions:
            session.on_link_lost()
        self.on_push.clear()
        self.before_write.clear()
        self.on_end.clear()

    def _drop_socket(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()  # which shuts the socket down first, and so wakes the reader

    def lost(self) -> LinkLostError:
        """Return a new error that says why the link is gone."""
        error = LinkLostError(f"the link to {self.uri} is gone: {self.failure}")
        error.__cause__ = self.failure
        return error

    # -- commands -------------------------------------------------------------------------------------

    def send(
        self,
        arguments: Sequence[Argument],
        on_reply: OnReply | None = None,
        matters: bool = True,
    ) -> None:
        """Have a command sent at the hub's next turn. Never switches.

        Args:
            arguments: The command.
            on_reply: Called with the reply, or with a `LinkLostError`.
            matters: An orderly close waits for the reply.

        Raises:
            LinkLostError: The link is gone.
        """
        self.send_encoded(encode(arguments), on_reply, matters)

    def send_encoded(
        self, command: bytes, on_reply: OnReply | None = None, matters: bool = True
    ) -> None:
        """Have a command sent, as `send` does, that is encoded already. Never switches."""
        if self.failure is not None:
            raise self.lost()
        self._outgoing.put(command)
        self._replies.append((on_reply, matters))
        self._owed_count += matters
        self._has_unsent.set()

    def say(self, arguments: Sequence[Argument]) -> None:
        """Have a command sent that is answered by pushes alone. Never switches."""
        if self.failure is not None:
            raise self.lost()
        self._outgoing.put(encode(arguments))
        self._has_unsent.set()

    def run(
        self,
        script: Script,
        keys: Sequence[Argument],
        arguments: Iterable[Argument],
        on_reply: OnReply | None = None,
        matters: bool = True,
    ) -> None:
        """Have a script run, as `send` does a command. Never switches."""
        body = (len(keys), *keys, *arguments)
        if script.sha not in self._known:
            self._known.add(script.sha)
            self.send(("EVAL", script.text, *body), on_reply, matters)
            return

        def replied(reply: object) -> None:
            if isinstance(reply, exceptions.NoScriptError) and self.failure is None:
                self.send(("EVAL", script.text, *body), on_reply, matters)  # it has forgotten it
            elif on_reply is not None:
                on_reply(reply)

        self.send(("EVALSHA", script.sha, *body), replied, matters)

    # -- reading ----------------------------------------------------------------------------------------

    def _read(self) -> None:
        parser, recv = Parser(), self._sock.recv
        try:
            while self.failure is None:
                data = recv(READ_SIZE)
                if not data:
                    raise ConnectionResetError("the server closed the connection")
                self._last_read = monotonic()
                for reply in parser.feed(data):
                    self._take(reply)
                    if self.failure is not None:
                        return
                gevent.sleep(0)  # recv does not switch while data keeps coming
        except (OSError, exceptions.RedisError) as exc:
            self.fail(exc)

    def _take(self, reply: Any) -> None:
        if isinstance(reply, Push) or (self._subscribes and _is_subscribers(reply)):
            for take in self.on_push:
                take(reply)
            return
        if not self._replies:
            raise ProtocolError("a reply to nothing")
        on_reply, matters = self._replies.popleft()
        self._owed_count -= matters
        if isinstance(reply, _WRONG_SERVER):
            self.fail(
                reply
            )  # a master that became a replica, for one: another server is to be found
            reply = self.lost()
        if on_reply is not None:
            on_reply(reply)
        if self.is_closing and not self._owed_count:
            self._quiet.set()

    # -- writing ----------------------------------------------------------------------------------------

    def flush_soon(self) -> None:
        """Have what was gathered sent at the hub's next turn. Never switches."""
        self._has_unsent.set()

    def flush_now(self) -> None:
        """Send what can be sent without waiting: this greenlet keeps the hub for long. Never switches."""
        self._outgoing.send_now(self._sock)

    def _write(self) -> None:
        sendall, outgoing = self._sock.sendall, self._outgoing
        try:
            while self.failure is None:
                self._has_unsent.wait()
                self._has_unsent.clear()
                for gather in self.before_write:
                    gather()
                if not outgoing:
                    continue  # it was sent at once
                outgoing.is_sending = True
                sendall(outgoing.take())
                outgoing.is_sending = False
                if outgoing:
                    gevent.sleep(0)  # sendall does not switch while the kernel takes all
        except OSError as exc:
            self.fail(exc)

    # -- pings ----------------------------------------------------------------------------------------

    @property
    def last_read(self) -> float:
        """The monotonic time at which the server last said something."""
        return self._last_read

    @property
    def heartbeat(self) -> float:
        """The seconds within which it is heard of; 0: not looked at."""
        return self._health_interval

    def wait_for_end(self, seconds: float) -> bool:
        """Wait until it has failed, for so many seconds; return whether it has. Switches: yes."""
        return bool(self._dead.wait(seconds))

    def ping(self) -> None:
        """Have the server asked whether it lives. Never switches."""
        self.send(("PING",), matters=False)

    # -- forks ----------------------------------------------------------------------------------------------

    def on_fork(self) -> None:
        """Let go of the socket, in a forked child, without a word to the server, which is the parent's."""
        if self.failure is not None or self._sock is None:
            return
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, self._sock.fileno())  # shutdown() would end the parent's connection
        os.close(null)
        self.is_closing = True
        self._replies.clear()
        self.on_end.clear()
        self.fail(ForkedError("a Redis link"))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.uri} {'open' if self.connected else 'not open'}>"


def _is_subscribers(reply: Any) -> bool:
    # In the older protocol nothing else tells them from replies.
    return type(reply) is list and bool(reply) and reply[0] in _TO_SUBSCRIBERS


#: Every link of this process that somebody still holds; some have ended.
all_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _leave_links_to_parent() -> None:
    for link in list(all_links):
        link.on_fork()


os.register_at_fork(after_in_child=_leave_links_to_parent)
