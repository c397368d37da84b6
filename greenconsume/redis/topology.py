"""Owns a channel's queues, exchanges and bindings, and what is published to them.

Each waits for its reply, up to the connection's stop: what `basic_publish` returned from is in the server.
Called by kombu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

from amqp.exceptions import RecoverableConnectionError
from kombu.transport import virtual
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.utils.json import dumps

from greenconsume.amqp.waits import Waits
from greenconsume.redis.feed import ensure_feeds
from greenconsume.redis.keyspace import Keyspace
from greenconsume.redis.ledger import Ledger
from greenconsume.redis.link import Link
from greenconsume.redis.plain_client import plain_client
from greenconsume.redis.protocol import Argument
from greenconsume.redis.scripts import REFRESH_BINDING, SWEEP_BINDINGS, Script
from greenconsume.virtual import next_channel_id

Payload = dict[str, Any]


class TopologySession(Protocol):
    """A session, as what declares and publishes sees it."""

    link: Link
    ledger: Ledger
    waits: Waits


class TopologyTransport(Protocol):
    """A transport, as what declares and publishes sees it.

    Attributes:
        fleeting: The queues that go with their last consumer.
        fanout_topics: What queues that are bound to a fanout exchange listen to.
    """

    keyspace: Keyspace
    fleeting: set[str]
    fanout_topics: dict[str, str]

    @property
    def session(self) -> TopologySession:
        """The share of a link that its channels use."""

    def dialler(self) -> Callable[[int], Any]:
        """Return what makes a connection, not connected, that speaks a protocol, 2 or 3."""


class Topology(virtual.Channel):  # type: ignore[misc]  # kombu is untyped
    """The part of a channel that declares and publishes."""

    supports_fanout = True
    connection: TopologyTransport
    closed: bool

    def __init__(self, connection: TopologyTransport, **kwargs: object) -> None:
        super().__init__(connection, **kwargs)
        self.session = connection.session
        self.link = self.session.link
        self.ledger = self.session.ledger
        self.keyspace = connection.keyspace
        self._expires: dict[str, int] = {}  # by queue, in milliseconds
        self._bound: dict[str, dict[tuple[str, str], int]] = {}  # of those, their bindings

    @cached_property
    def client(self) -> Any:
        """A `redis.Redis` to the same database, over a connection of its own; as kombu's channels have."""
        return plain_client(self.connection.dialler(), self.keyspace.prefix)

    def _close_client(self) -> None:
        client = self.__dict__.pop("client", None)
        if client is not None:
            client.connection_pool.disconnect()

    # -- queues -------------------------------------------------------------------------------------

    def prepare_queue_arguments(self, arguments: object, **kwargs: object) -> Any:
        """Return a queue's arguments with what `Queue(expires=…)` and its like stand for."""
        return to_rabbitmq_queue_arguments(arguments, **kwargs)

    def queue_delete(
        self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: object
    ) -> None:
        """Delete a queue, its messages and its bindings."""
        if if_empty and self._size(queue):
            return
        super().queue_delete(queue, if_unused, False, **kwargs)
        self._delete_keys(queue)  # kombu's leaves the messages of one that is not bound

    def _new_queue(self, queue: str, auto_delete: bool = False, **kwargs: Any) -> None:
        if auto_delete:
            self.connection.fleeting.add(queue)
        try:
            self._expires[queue] = int(kwargs["arguments"]["x-expires"])
        except (KeyError, TypeError, ValueError):
            self._expires.pop(queue, None)
            self._bound.pop(queue, None)

    def _has_queue(self, queue: str, **kwargs: object) -> bool:
        return bool(self._call("EXISTS", *self.keyspace.keys(queue)))

    def _size(self, queue: str) -> int:
        return sum(self._call_all([("LLEN", key) for key in self.keyspace.keys(queue)]))

    def _purge(self, queue: str) -> int:
        size = self._size(queue)
        self._delete_keys(queue)
        return size

    def _delete_keys(self, queue: str) -> None:
        keys = self.keyspace.keys(queue)
        self._call("DEL", *keys)
        self._touch(keys)

    def _delete(self, queue: str, exchange: str, *meta: str, **kwargs: object) -> None:
        self.connection.fleeting.discard(queue)
        routing_key, pattern = meta[:2] or ("", "")
        member = self.keyspace.binding(routing_key, pattern, queue)
        self._bound.get(queue, {}).pop((exchange, member), None)
        keys = (self.keyspace.bindings(exchange), self.keyspace.lasting_bindings(exchange))
        self._call_all([("SREM", key, member) for key in keys])

    # -- exchanges ------------------------------------------------------------------------------------

    def get_table(self, exchange: str) -> list[tuple[str, ...]]:
        """Return the bindings of an exchange, of all who share the database."""
        members = self._call("SMEMBERS", self.keyspace.bindings(exchange))
        return [tuple(member.decode().split(self.keyspace.sep)) for member in members]

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        if self.typeof(exchange).type == "fanout":
            topic = self.keyspace.topic(exchange, (routing_key or "").replace("#", "*"))
            self.connection.fanout_topics[queue] = topic
        member = self.keyspace.binding(routing_key, pattern, queue)
        if queue in self._expires:
            self._refresh_binding(exchange, member, queue)
            return
        keys = (self.keyspace.bindings(exchange), self.keyspace.lasting_bindings(exchange))
        self._call_all([("SADD", key, member) for key in keys])

    def _refresh_binding(self, exchange: str, member: str, queue: str) -> None:
        keys = (self.keyspace.bindings(exchange), self.keyspace.binding_deadlines)
        ttl = self.keyspace.binding_ttl(self._expires[queue])
        self._call_script(REFRESH_BINDING, keys, (member, exchange, ttl))
        self._bound.setdefault(queue, {})[exchange, member] = ttl

    def sweep_bindings(self, limit: int = 100) -> None:
        """Delete the bindings of expiring queues that nobody has kept, as kombu's does. Switches: yes."""
        space = self.keyspace
        prefixes = (*space.binding_prefixes, limit)
        self._call_script(SWEEP_BINDINGS, (space.binding_deadlines,), prefixes)

    # -- publishing -----------------------------------------------------------------------------------

    def _put(self, queue: str, message: Payload, **kwargs: object) -> None:
        key = self.keyspace.key(queue, self._get_message_priority(message, reverse=False))
        commands: list[tuple[Argument, ...]] = [("LPUSH", key, dumps(message))]
        if queue in self._expires:
            expires = self._expires[queue]
            commands += [("PEXPIRE", each, expires) for each in self.keyspace.keys(queue)]
        try:
            self._call_all(commands)
        except BaseException:  # a kill or a timeout: the server may have it all the same
            self._touch_later([key])
            raise
        self._touch([key])

    def _put_fanout(
        self, exchange: str, message: Payload, routing_key: str, **kwargs: object
    ) -> None:
        self._call("PUBLISH", self.keyspace.topic(exchange, routing_key), dumps(message))

    # -- commands -------------------------------------------------------------------------------------

    def _touch(self, keys: Sequence[str]) -> None:
        # The server does not tell us of what we changed ourselves.
        ensure_feeds(self.link, self.ledger).touch(keys)

    def _touch_later(self, keys: Sequence[str]) -> None:
        # What is asked last is answered last: by then the change was made, or never will be.
        if self.link.failure is None:
            self.link.send(("PING",), lambda _: self._touch(keys), matters=False)

    def _call(self, *command: Argument) -> Any:
        self._require_open()
        return self.link.call(
            *command, stop=self.session.waits.stop, deadline=self.session.waits.deadline
        )

    def _call_all(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        self._require_open()
        return self.link.call_all(commands, self.session.waits.stop, self.session.waits.deadline)

    def _call_script(
        self, script: Script, keys: Sequence[Argument], arguments: Sequence[Argument]
    ) -> Any:
        self._require_open()
        stop, deadline = self.session.waits.stop, self.session.waits.deadline
        return self.link.call_script(script, keys, arguments, stop, deadline)

    def _require_open(self) -> None:
        if self.closed:
            raise RecoverableConnectionError("the channel is closed")
        if self.link.failure is not None:
            raise self.link.lost()

    def _get_free_channel_id(self) -> int:
        return next_channel_id()

    def _reset_cycle(self) -> None:
        """Do nothing: nobody polls."""
