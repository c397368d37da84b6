"""Owns what kombu sees as a channel: consumers, and what they were delivered.

Messages come by a feed and wait for `drain_events`; settling them never waits, as the ledger says it. A
link may be lost under a channel: what handlers have then stays theirs to settle. Called by kombu and by its
feed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from kombu import Connection
from kombu.utils.json import dumps
from kombu.utils.uuid import uuid

from greenconsume.redis.calls import CALL_TIMEOUT
from greenconsume.redis.errand import Errand
from greenconsume.redis.fanout import PREFIX, Fanout
from greenconsume.redis.feed import Feed, FeedState, ensure_feeds
from greenconsume.redis.keeper import ensure_keeper
from greenconsume.redis.message import HeldMessage, message_of
from greenconsume.redis.qos import QoS
from greenconsume.redis.scripts import DELAY
from greenconsume.redis.subscription import NotesConsumers, Subscription
from greenconsume.redis.take import Delivery
from greenconsume.redis.topology import Payload, Topology, TopologySession, TopologyTransport
from greenconsume.stopping import Deadline
from greenconsume.virtual import publish_plain

#: How many messages a channel without a prefetch has waiting.
WINDOW = 16
#: A channel, the consumer that it is for, what it is held as, and its bytes.
Waiting: TypeAlias = "tuple[Channel, Subscription, str, bytes]"


class ChannelSession(TopologySession, NotesConsumers, Protocol):
    """A session, as its channels see it."""

    channels: dict[int, Channel]
    given_back_count: int

    def put(self, deliveries: Iterable[Waiting]) -> None:
        """Queue messages for `drain_events`."""

    def put_first(
        self, channel: Channel, subscription: Subscription, field: str, raw: bytes
    ) -> None:
        """Queue one before all others."""

    def tell(self, error: BaseException) -> None:
        """Have `drain_events` raise."""

    def take_back(self, channel: Channel, subscription: Subscription | None) -> list[str]:
        """Remove what waits for a channel, or for one consumer of it; return its fields."""


class ChannelTransport(TopologyTransport, Protocol):
    """A transport, as its channels see it."""

    client: Connection

    @property
    def session(self) -> ChannelSession:
        """The share of a link that its channels use."""

    @property
    def fanout(self) -> Fanout:
        """The ear for fanout exchanges."""

    def close_channel(self, channel: Channel) -> None:
        """Forget a channel."""


@dataclass(eq=False, slots=True)
class _Line:
    """Those who consume one queue of a channel, in turn."""

    subscriptions: deque[Subscription] = field(default_factory=deque)

    def next(self) -> Subscription:
        self.subscriptions.rotate(-1)
        return self.subscriptions[-1]


class Channel(Topology):
    """A channel of a connection to Redis."""

    QoS = QoS
    Message = HeldMessage
    connection: ChannelTransport
    session: ChannelSession

    def __init__(self, connection: ChannelTransport, **kwargs: object) -> None:
        super().__init__(connection, **kwargs)
        options = connection.client.transport_options
        self.waiting = 0  # delivered to this channel, and not handed out
        self._unsettled: QoS = self.qos  # kombu makes it when it is first asked for
        self._consumers: dict[str, Subscription] = {}  # kombu's is a set of the tags
        self._lines: dict[str, _Line] = {}
        self._strategy = options.get("queue_order_strategy", "round_robin")
        self._feed: Feed | None = None
        self._takes = False
        self.ledger.consuming.add(self)

    # -- publishing ---------------------------------------------------------------------------------

    def basic_publish(self, message: Payload, *args: Any, **kwargs: Any) -> None:
        """Put a message into every queue that it is routed to. Switches: until the server has it."""
        publish_plain(self.publish_as_is, message, *args, **kwargs)

    def publish_as_is(self, message: Payload, *args: object, **kwargs: object) -> None:
        """Publish as `basic_publish`, whatever is entered around a producer's messages."""
        super().basic_publish(message, *args, **kwargs)

    # -- consuming ----------------------------------------------------------------------------------

    def basic_consume(
        self,
        queue: str,
        no_ack: bool,
        callback: Callable[[HeldMessage], object],
        consumer_tag: str = "",
        **kwargs: object,
    ) -> str:
        """Subscribe to a queue; return the consumer's tag."""
        self._require_open()
        self.session.note_consumer()
        self.basic_cancel(consumer_tag)
        tag = consumer_tag or f"amq.ctag-{uuid()}"
        subscription = Subscription(queue, tag, no_ack, callback)
        self._consumers[tag] = subscription
        topic = self.connection.fanout_topics.get(queue)
        if topic is not None:
            try:
                self.connection.fanout.listen(topic, self, subscription, self.session.waits.stop)
            except BaseException:  # a kill too: nobody consumes then
                self._consumers.pop(tag, None)
                raise
            return tag
        self._lines.setdefault(queue, _Line()).subscriptions.append(subscription)
        self._rejoin()
        return tag

    def basic_cancel(self, consumer_tag: str, **kwargs: object) -> None:
        """End a subscription: what it was dealt and has not started goes back at once. Never switches."""
        subscription = self._consumers.pop(consumer_tag, None)
        if subscription is None:
            return
        if subscription.queue not in self._lines:
            self._stop_listening(subscription)
            return
        line = self._lines[subscription.queue].subscriptions
        line.remove(subscription)
        if not line:
            del self._lines[subscription.queue]
        self._rejoin()
        self._give_back_waiting(subscription)

    @property
    def expiring_bindings(self) -> dict[tuple[str, str], int]:
        """Those of the expiring queues that it consumes; see `Ledger`."""
        found: dict[tuple[str, str], int] = {}
        if self.link.failure is None:
            for subscription in self._consumers.values():
                found |= self._bound.get(subscription.queue, {})
        return found

    @property
    def expiring_queues(self) -> dict[str, int]:
        """The expiring queues that it consumes; see `Ledger`."""
        lines = self._lines if self.link.failure is None else {}
        return {queue: self._expires[queue] for queue in lines if queue in self._expires}

    def announce_stop(self) -> None:
        """Take nothing more; give back what was not started. Never switches."""
        self._leave()
        for subscription in self._consumers.values():
            if subscription.queue not in self._lines:
                self._stop_listening(subscription)
        self._give_back_waiting(None)

    def _give_back_waiting(self, subscription: Subscription | None) -> None:
        fields = self.session.take_back(self, subscription)
        self.waiting -= len(fields)
        self.session.given_back_count += len(fields)
        self.ledger.give_back(fields)

    def _stop_listening(self, subscription: Subscription) -> None:
        topic = self.connection.fanout_topics.get(subscription.queue)
        if topic is not None and self.link.failure is None:
            self.connection.fanout.leave(topic, subscription)
        self._give_back_waiting(subscription)

    def _rejoin(self) -> None:
        if self._lines and self._feed is not None and self._feed.awaits(self, self._rejoin):
            return  # what is under way would go back too late, and so out of its order
        self._leave()
        if self._lines and self.link.failure is None:
            self._takes = True
            ensure_keeper(self.ledger)
            queues = list(self._lines)
            expires = self.expiring_queues
            if expires:
                self.ledger.changed.set()  # the keeper is to know
            feeds = ensure_feeds(self.link, self.ledger)
            self._feed = feeds.join(self, queues, expires, self._strategy)

    def _leave(self) -> None:
        feed, self._feed, self._takes = self._feed, None, False
        if feed is not None:
            ensure_feeds(self.link, self.ledger).leave(self, feed)

    @property
    def room(self) -> int:
        """The number of messages that it takes; see `feed.Taker`."""
        if not self._takes:
            return 0
        unsettled = self._unsettled
        limit = unsettled.prefetch_count
        if not limit:
            return WINDOW - self.waiting
        return limit - self.waiting - len(unsettled._delivered) - unsettled.returning_count

    @property
    def is_hungry(self) -> bool:
        """True if less waits than there is room for; see `feed.Taker`."""
        return self.waiting < self.room

    def offer(self) -> None:
        """Have more taken if less waits than there is room for. Never switches."""
        feed = self._feed
        if feed is not None and feed.state is FeedState.RESTING and self.is_hungry:
            feed.want()

    def deliver(self, queue: str, deliveries: list[Delivery]) -> None:
        """Have messages wait for `drain_events`. Never switches."""
        line = self._lines.get(queue)
        if line is None or self.closed:
            self.ledger.give_back([field for field, _ in deliveries])
            return
        self.waiting += len(deliveries)
        self.session.put([(self, line.next(), *each) for each in deliveries])

    def hear(self, subscription: Subscription, field: str, raw: bytes) -> None:
        """Have what was published to a fanout exchange wait for `drain_events`. Never switches."""
        self.waiting += 1
        self.session.put([(self, subscription, field, raw)])

    def repeat(self, message: HeldMessage) -> None:
        """Have it wait once more: no server has it. Never switches."""
        subscription = self._consumers.get(message.delivery_info.get("consumer_tag", ""))
        if subscription is not None and not self.closed:
            self.waiting += 1
            payload = {**message._raw, "redelivered": True}
            raw = dumps(payload).encode()
            self.session.put_first(self, subscription, message.epoch, raw)

    def on_feed_failed(self, error: BaseException) -> None:
        """Have `drain_events` raise it. Never switches."""
        self.session.tell(error)

    def dispatch(self, subscription: Subscription, field: str, raw: bytes) -> HeldMessage:
        """Hand out a message that waited, and return it. Switches: as the callback does."""
        self.waiting -= 1
        message = message_of(self, raw, field, subscription.queue, subscription.tag)
        if subscription.no_ack:
            self.ledger.ack(field)
        else:
            self._unsettled.append(message, field)
        self.offer()
        subscription.callback(message)
        return message

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: object) -> HeldMessage | None:
        """Take a message if there is one. Switches: yes."""
        self._require_open()
        ensure_keeper(self.ledger)
        # What this greenlet has just put back is there to be taken.
        self.ledger.wait_for_returns(self.session.waits.deadline or Deadline(CALL_TIMEOUT))
        expires = self._expires.get(queue, 0)
        errand = Errand(self.link, self.ledger, queue, expires)
        taken = errand.wait(self.session.waits.stop, self.session.waits.deadline)
        if taken is None:
            return None
        field, raw = taken
        message = message_of(self, raw, field, queue, "")
        if no_ack:
            self.ledger.ack(field)
        else:
            self.qos.append(message, field)
        return message

    # -- settling -----------------------------------------------------------------------------------

    def holds(self, epoch: str) -> bool:
        """Return whether a message can still be settled."""
        return epoch in self.ledger.held or epoch.startswith(PREFIX)

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Settle a message, or all up to it. Never switches."""
        self._unsettled.ack(delivery_tag, multiple)

    def basic_nack(self, delivery_tag: str, multiple: bool = False, requeue: bool = True) -> None:
        """Give a message back that nobody has started, uncounted. Never switches."""
        if requeue:
            self.qos.give_back(delivery_tag, multiple)
        else:
            self.qos.ack(delivery_tag, multiple)

    def basic_qos(
        self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False
    ) -> None:
        """Bound what this channel holds and has not settled; no bound if it is 0. Never switches."""
        self.qos.prefetch_count = prefetch_count
        self.offer()

    @property
    def delivery_limit(self) -> int | None:
        """The number of times that a message comes back unsettled before it is set aside; None: any."""
        return self.keyspace.delivery_limit

    def delay(self, message: HeldMessage, payload: Payload, seconds: float) -> bool:
        """Settle a message, and in the same moment have a copy come back to its queue after `seconds`.

        It waits in the server, and nothing of it here. Works over another link, if this channel's is lost.

        Returns:
            Whether the message was still held.

        Switches: yes.
        """
        link = self.ledger.link
        if link is None:
            raise self.link.lost()
        self._inplace_augment_message(payload, "", message.queue)
        space = self.keyspace
        key = space.key(message.queue, space.priority_of(payload))
        keys = (space.unacked, space.index, space.delayed, space.delayed_index)
        arguments = (message.epoch, seconds, f"{key}\n{dumps(payload)}")
        moved = bool(link.call_script(DELAY, keys, arguments, deadline=self.session.waits.deadline))
        self.qos.forget(message.epoch)
        message._state = "ACK"
        if moved:
            ensure_keeper(self.ledger).expect(seconds)
        return moved

    @property
    def unsettled_count(self) -> int:
        """The number of messages that are not settled."""
        return len(self.qos._delivered)

    @property
    def oldest_unsettled(self) -> None:
        """Always None: Redis sets no deadline for a message whose lease is refreshed."""

    @property
    def has_consumers(self) -> bool:
        """True while a consumer of it runs."""
        return bool(self._consumers)

    # -- closing --------------------------------------------------------------------------------------

    def on_link_lost(self) -> None:
        """Keep what handlers have, and give back what nobody has. Never switches."""
        self._feed, self._takes = None, False
        self._give_back_waiting(None)
        if self._qos is not None:
            self._qos.leave_to_handlers()

    def close(self) -> None:
        """Cancel its consumers and give back what is not settled. Closing again does nothing."""
        if self.closed:
            return
        self.closed = True
        try:
            self.announce_stop()
            for tag in list(self._consumers):
                self.basic_cancel(tag)
            if self._qos is not None:
                self._qos.restore_unacked()
            if self.link.failure is None:
                self._delete_fleeting()
        finally:
            self._close_client()
            if self.connection is not None:
                self.connection.close_channel(self)
            self.exchange_types = None

    def _delete_fleeting(self) -> None:
        """Unbind the queues of fanout exchanges that go with their user, as kombu does."""
        for queue in self.connection.fleeting & self.connection.fanout_topics.keys():
            self.connection.fleeting.discard(queue)
            for exchange, routing_key, _ in list(self.state.queue_bindings(queue)):
                member = self.keyspace.binding(routing_key, "", queue)
                for key in (self.keyspace.bindings, self.keyspace.lasting_bindings):
                    self.link.send(("SREM", key(exchange), member), matters=False)
            self.state.queue_bindings_delete(queue)
