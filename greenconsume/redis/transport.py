"""Owns the kombu transports for Redis and Valkey, over green links.

kombu resolves `redis`, `rediss`, `valkey`, `valkeys` and `sentinel` to these once they are registered. A
connection made by itself has a link of its own; a `LinkPool` sets `acquire`, and then connections share
links.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis
from gevent.lock import BoundedSemaphore
from kombu import Connection
from kombu.transport import virtual
from redis import exceptions

from greenconsume.errors import EventLoopError
from greenconsume.events import PollingTransport, emit
from greenconsume.patching import require_patched
from greenconsume.redis import channel as channels
from greenconsume.redis.address import database_of, dialler_of, sentinel_dialler_of
from greenconsume.redis.fanout import Fanout, ensure_fanout
from greenconsume.redis.feed import POLLING_INTERVAL, ensure_feeds
from greenconsume.redis.handshake import OLDER, REFUSALS, protocol_of
from greenconsume.redis.keyspace import Keyspace
from greenconsume.redis.ledger import ensure_ledger
from greenconsume.redis.link import DEFAULT_CLOSE_TIMEOUT, HEALTH_INTERVAL, Link
from greenconsume.redis.session import Session
from greenconsume.stopping import StopSignal

_announced: set[str] = set()


class Transport(virtual.Transport):  # type: ignore[misc]  # kombu is untyped
    """kombu's transport for Redis over a green link.

    `transport_options` are kombu's, and `delivery_limit`, `close_timeout`, `health_check_interval` (5 s),
    `protocol` (3; 2 for what does not know HELLO) and `polling_interval`, for servers that do not let us
    track their keys.

    Attributes:
        session: Its share of a link, once it is connected.
        keyspace: The names of the server's keys.
        fleeting: The queues that are deleted with their user.
        fanout_topics: What queues that are bound to a fanout exchange listen to.
    """

    Channel = channels.Channel

    #: Its `drain_events` waits without polling and takes a `stop`.
    wakes = True
    #: Its connections may share links.
    shares_links = True
    #: What says that the server was reached and refused; trying again does not help by itself.
    refusals = REFUSALS
    default_port = 6379
    driver_type = "redis"
    driver_name = "greenconsume"
    implements = virtual.Transport.implements.extend(
        asynchronous=False, exchange_type=frozenset(["direct", "topic", "fanout"])
    )
    connection_errors = (
        *virtual.Transport.connection_errors,
        OSError,
        exceptions.ConnectionError,
        exceptions.TimeoutError,
    )
    channel_errors = (
        *virtual.Transport.channel_errors,
        exceptions.DataError,
        exceptions.InvalidResponse,
        exceptions.ResponseError,
    )
    #: Gives a link that is shared; set by a `LinkPool`.
    acquire: Callable[[], Link] | None = None
    session: Session

    def __init__(self, client: Connection, **kwargs: object) -> None:
        super().__init__(client, **kwargs)
        self.keyspace = Keyspace.of(client.transport_options, database_of(client))
        self.fleeting: set[str] = set()
        self.fanout_topics: dict[str, str] = {}
        self._dialling = BoundedSemaphore(1)
        self._is_begun = False

    def driver_version(self) -> str:
        """Return the version of redis-py."""
        return str(redis.__version__)

    # -- connecting -----------------------------------------------------------------------------------

    def establish_connection(self) -> Session:
        """Return a session: over a shared link where a pool gives one, else over a new one.

        Greenlets that use an unconnected `kombu.Connection` at once get one session, not one each.

        Switches: yes, to dial.
        """
        with self._dialling:
            if not (self._is_begun and self.session.connected):
                self._begin(self.acquire() if self.acquire is not None else self.dial())
            return self.session

    def _begin(self, link: Link) -> None:
        ledger = ensure_ledger(self._server(), self.keyspace)
        self.session, self._is_begun = Session(link, ledger, self.client), True
        interval = float(self.client.transport_options.get("polling_interval") or POLLING_INTERVAL)
        ensure_feeds(link, ledger, interval)
        if not link.greeting.tracks and link.uri not in _announced:
            _announced.add(link.uri)
            why = "which refuses CLIENT TRACKING"
            if protocol_of(self.client.transport_options) == OLDER:
                why = "as protocol=2 has no CLIENT TRACKING"
            emit(PollingTransport(f"{link.uri} ({why})", interval))

    def _server(self) -> str:
        info = self.client.info()
        # By user as well: what one may say to the server is for another not to say.
        names = ("transport", "hostname", "port", "virtual_host", "alternates", "userid")
        return " ".join(str(info.get(name)) for name in names)

    def dial(self) -> Link:
        """Return a new, connected link; one attempt.

        Raises:
            NotPatchedError: The process is not patched by gevent, so that the link would wait for ever.

        Switches: yes.
        """
        require_patched()
        options = self.client.transport_options
        health = options.get("health_check_interval", HEALTH_INTERVAL)
        close_timeout = options.get("close_timeout", DEFAULT_CLOSE_TIMEOUT)
        uri, protocol = self.client.as_uri(), protocol_of(options)
        link = Link(uri, self.dialler(), health or 0.0, close_timeout, protocol=protocol)
        link.connect()
        return link

    def dialler(self) -> Callable[[int], Any]:
        """Return what makes redis-py's connections to the server."""
        return dialler_of(self.client, self.client.transport_options)

    def verify_connection(self, connection: Session) -> bool:
        """Return whether kombu is to go on with it: see `Session.is_current`. Never switches."""
        return connection.is_current

    # -- channels -------------------------------------------------------------------------------------

    def create_channel(self, connection: Session) -> channels.Channel:
        """Open a channel. Never switches.

        Raises:
            LinkLostError: The link is gone, and its consumers were not told yet.
        """
        if not connection.connected:
            connection.tell_its_end()
        channel = channels.Channel(self)
        self.channels.append(channel)
        connection.channels[channel.channel_id] = channel
        return channel

    def close_channel(self, channel: channels.Channel) -> None:
        """Forget a channel that closes. Never switches."""
        channel.session.channels.pop(channel.channel_id, None)
        super().close_channel(channel)

    @property
    def fanout(self) -> Fanout:
        """The ear for fanout exchanges, of all who share the link."""
        return ensure_fanout(self.session.link, self.dialler())

    def drain_events(
        self, connection: Session, timeout: float | None = None, stop: StopSignal | None = None
    ) -> None:
        """See `Session.drain_events`."""
        connection.drain_events(timeout, stop)

    def register_with_event_loop(self, connection: object, loop: object) -> None:
        """Refuse kombu's asynchronous hub, which reads sockets by itself.

        Raises:
            EventLoopError: Always; it says what to do instead.
        """
        raise EventLoopError

    def close_connection(self, connection: Session) -> None:
        """See `Session.close`."""
        connection.close()

    def _collect(self, connection: Session) -> None:
        # Without it, kombu's Connection.collect changes the socket timeout of the whole process.
        connection.collect()


class SSLTransport(Transport):
    """The same over TLS."""

    def __init__(self, client: Connection, **kwargs: object) -> None:
        if not client.ssl:
            client.ssl = True
        super().__init__(client, **kwargs)


class SentinelTransport(Transport):
    """The same to whatever server the sentinels say is the master."""

    default_port = 26379

    def dialler(self) -> Callable[[int], Any]:
        """See `Transport.dialler`."""
        return sentinel_dialler_of(self.client, self.client.transport_options)


__all__ = ["SSLTransport", "SentinelTransport", "Session", "Transport"]
