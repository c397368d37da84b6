"""Owns the green `memory://` transport: kombu's, whose consumers are woken instead of polling.

For the embedded default, tests and examples: messages pass between the greenlets of one hub and end with
the process. As in kombu's, with which it shares its queues, every connection sees the same ones whatever
its host and virtual host, a message for a queue that was not declared waits in it, and priorities, expiry
and `auto_delete` have no effect. Unlike kombu's:

- a channel that closes gives back what it has not settled, at the head of the queue that it came from and
  marked as redelivered; a requeue does the same, and never reaches the other queues of the exchange;
- a deleted queue stays away until it is declared or published to; a consumer that it had waits for that;
- several consumers of one connection may have the same queue, and several greenlets may drain it;
- headers are copied on their way, so that neither side sees what the other makes of its own.

How a message finds a greenlet is told in `memory_queues`. Called by kombu.
"""

from __future__ import annotations

import socket
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty
from time import monotonic
from typing import Any, TypeAlias

import gevent
from amqp.exceptions import RecoverableConnectionError
from gevent.event import Event
from kombu import Connection
from kombu.transport import memory as kombu_memory
from kombu.transport import virtual
from kombu.utils.uuid import uuid

from greenconsume.errors import EventLoopError
from greenconsume.hub import MAX_TURN, kept_waiting
from greenconsume.stopping import Deadline, StopSignal, wait
from greenconsume.transports import memory_queues as queues
from greenconsume.transports.memory_queues import Payload, Queue, Subscription
from greenconsume.transports.memory_unsettled import UnsettledMessages
from greenconsume.virtual import close_all, next_channel_id, publish_plain


class Channel(kombu_memory.Channel):  # type: ignore[misc]  # kombu is untyped
    """A channel whose subscriptions wait in line for messages.

    Switches: never. From any greenlet of the hub.
    """

    QoS = UnsettledMessages
    body_encoding = None  # a body that goes nowhere needs no base64

    def __init__(self, connection: Transport, **kwargs: object) -> None:
        self._ready: OrderedDict[Subscription, None] = OrderedDict()
        super().__init__(connection, **kwargs)
        self._consumers: dict[str, Subscription] = {}  # kombu's is a set of the tags

    def queue_delete(
        self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: object
    ) -> None:
        """Delete a queue and its bindings; kombu's leaves it in the tables of its exchanges."""
        if if_empty and self._size(queue):
            return
        for exchange in {binding.exchange for binding in self.state.queue_bindings(queue)}:
            known = self.state.exchanges.get(exchange, {})
            known["table"] = [entry for entry in known.get("table", ()) if entry[2] != queue]
        self.state.queue_bindings_delete(queue)
        self.queues.pop(queue, None)

    def basic_publish(self, message: Payload, *args: Any, **kwargs: Any) -> None:
        """Put a message into every queue that it is routed to; each wakes one consumer."""
        publish_plain(self.publish_as_is, message, *args, **kwargs)

    def publish_as_is(self, message: Payload, *args: object, **kwargs: object) -> None:
        """Publish as `basic_publish`, whatever is entered around a producer's messages."""
        self._require_open()
        own = {name: queues.copied(message.get(name) or {}) for name in ("headers", "properties")}
        super().basic_publish({**message, **own}, *args, **kwargs)

    def basic_consume(
        self,
        queue: str,
        no_ack: bool,
        callback: Callable[[virtual.Message], object],
        consumer_tag: str = "",
        **kwargs: object,
    ) -> str:
        """Subscribe to a queue; return the consumer's tag."""
        self._require_open()
        self.basic_cancel(consumer_tag)
        tag = consumer_tag or f"amq.ctag-{uuid()}"
        subscription = Subscription(self, queue, tag, no_ack, callback)
        self._consumers[tag] = subscription
        self.make_ready(subscription)
        return tag

    def basic_cancel(self, consumer_tag: str, **kwargs: object) -> None:
        """End a subscription; what it has delivered stays to be settled."""
        subscription = self._consumers.pop(consumer_tag, None)
        if subscription is not None:
            self._ready.pop(subscription, None)
            queues.leave_line(subscription)

    def basic_get(
        self, queue: str, no_ack: bool = False, **kwargs: object
    ) -> virtual.Message | None:
        """Take a message if there is one."""
        self._require_open()
        try:
            payload = self._get(queue)
        except Empty:
            return None
        return self._receive(queue, payload, no_ack)

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """Settle a message, or all up to it."""
        self.qos.ack(delivery_tag, multiple)

    def basic_qos(self, *args: object, **kwargs: object) -> None:
        """Bound what this channel has delivered and not settled; no bound if it is 0."""
        super().basic_qos(*args, **kwargs)
        self.offer()

    def close(self) -> None:
        """Cancel its consumers and give back what is not settled. Closing again does nothing."""
        # Not super(): kombu's memory channel looks at every queue of the process.
        virtual.Channel.close(self)

    def make_ready(self, subscription: Subscription) -> bool:
        """Have `subscription` looked at; return whether that woke a drainer."""
        self._ready[subscription] = None
        return self.offer(subscription.queue)

    def offer(self, queue: str | None = None) -> bool:
        """Have what is ready looked at, if the prefetch allows; return whether that woke a drainer."""
        if not self._ready or self.closed or not self.qos.can_consume():
            return False
        transport: Transport = self.connection
        return transport.offer(self, queue)

    def take(self) -> tuple[Subscription, virtual.Message] | None:
        """Take the next message, from each queue in its turn; None if there is none, or none is allowed."""
        while self._ready and self.qos.can_consume():
            subscription, _ = self._ready.popitem(last=False)
            try:
                payload = self._get(subscription.queue)
            except Empty:
                queues.line_up(subscription)
                continue
            message = self._receive(subscription.queue, payload, subscription.no_ack)
            message.delivery_info["consumer_tag"] = subscription.tag
            self._look_again(subscription)
            return subscription, message
        return None

    def _look_again(self, subscription: Subscription) -> None:
        """Put a subscription that has had its turn where it belongs: this greenlet may be long away."""
        if queues.has_message(subscription.queue):
            self.make_ready(subscription)
        else:
            queues.line_up(subscription)
            self.offer()

    def _receive(self, queue: str, payload: Payload, no_ack: bool) -> virtual.Message:
        # A message that is in several queues is one payload, so a copy is delivered. `origin` is what to
        # put back, and where.
        properties = queues.copied(payload["properties"])
        properties["delivery_tag"] = self._next_delivery_tag()
        properties["delivery_info"]["redelivered"] = payload.get("redelivered", False)
        headers = queues.copied(payload.get("headers"))
        message = self.Message(
            {**payload, "properties": properties, "headers": headers}, channel=self
        )
        message.origin = (queue, payload)
        if not no_ack:
            self.qos.append(message, message.delivery_tag)
        return message

    def restore(self, message: virtual.Message) -> None:
        """Put a message back at the head of its queue. One that was deleted took its messages along."""
        queue, payload = message.origin
        if queue in self.queues:
            self._queue_for(queue).queue.appendleft({**payload, "redelivered": True})
            queues.wake_for(queue)

    _restore = restore  # kombu's name

    def _get(self, queue: str, timeout: float | None = None) -> Payload:
        if queue not in self.queues:
            raise Empty  # kombu's brings a deleted queue back by looking
        return self._queue_for(queue).get(block=False)

    def _new_queue(self, queue: str, **kwargs: object) -> None:
        self._queue_for(queue)

    def _queue_for(self, queue: str) -> Queue:
        found = self.queues.get(queue)
        if not isinstance(found, Queue):
            # One that kombu's own transport made, before this one took its place, keeps its messages.
            found = self.queues[queue] = Queue(queue, deque(found.queue if found else ()))
        return found

    def _next_delivery_tag(self) -> Any:
        return next(self._delivery_tags)  # one counter for the process: no tag fits another channel

    def _get_free_channel_id(self) -> int:
        return next_channel_id()

    def _require_open(self) -> None:
        if self.closed:
            raise RecoverableConnectionError("the channel is closed")


_Channel: TypeAlias = Channel  # within Transport, kombu has an attribute of that name


class Transport(kombu_memory.Transport):  # type: ignore[misc]  # kombu is untyped
    """kombu's memory transport, with a `drain_events` that parks its greenlet and can be stopped."""

    Channel = Channel

    #: It works in a process that gevent has not patched, too: its greenlets wait for each other alone.
    in_process = True
    #: Its `drain_events` waits without polling and takes a `stop`.
    wakes = True

    def __init__(self, client: Connection, **kwargs: object) -> None:
        super().__init__(client, **kwargs)
        self._ready: OrderedDict[_Channel, None] = OrderedDict()
        self._idle: OrderedDict[_Drainer, None] = OrderedDict()
        self._closed = False
        self._last_turn = monotonic()

    def establish_connection(self) -> Transport:
        """Open the connection, which is this object."""
        self._closed = False
        super().establish_connection()
        return self

    def register_with_event_loop(self, connection: object, loop: object) -> None:
        """Refuse kombu's asynchronous hub, which reads sockets by itself.

        Raises:
            EventLoopError: Always; it says what to do instead.
        """
        raise EventLoopError

    def drain_events(
        self,
        connection: Transport | None,
        timeout: float | None = None,
        stop: StopSignal | None = None,
    ) -> None:
        """Deliver one message, waiting for it; messages of several channels and queues take turns.

        Any number of greenlets may drain one connection. Whatever the callback raises is raised here.

        Args:
            connection: What `establish_connection` returned.
            timeout: Seconds to wait; None: for ever, 0: not at all.
            stop: Once it is set nothing more is delivered.

        Raises:
            StoppedError: `stop` was set.
            socket.timeout: No message came in time.
            amqp.exceptions.RecoverableConnectionError: The connection is closed, or was meanwhile.

        Switches: yes; also without having to wait, when nobody else had the hub for `MAX_TURN`.
        """
        deadline = Deadline(timeout)
        self._breathe()
        drainer = _Drainer()
        try:
            subscription, message = self._next(connection, drainer, deadline, stop)
        except BaseException:  # however the wait ends, by a kill too, another gets the wake-up
            self._pass_on(drainer)
            raise
        if drainer.owed not in (None, subscription.queue):
            self._pass_on(drainer)
        subscription.callback(message)

    def close_channel(self, channel: _Channel) -> None:
        """Forget a channel that closes."""
        self._ready.pop(channel, None)
        super().close_channel(channel)

    def close_connection(self, connection: Transport | None) -> None:
        """Close every channel, also when one raises; who drains the connection is told by an error."""
        self._closed = True
        try:
            close_all([channel.close for channel in (*self._avail_channels, *self.channels)])
        finally:
            super().close_connection(connection)
            while self._idle:
                self._wake(None)

    def _collect(self, connection: Transport | None) -> None:
        # Without it, kombu's Connection.collect changes the socket timeout of the whole process.
        self.close_connection(connection)

    def offer(self, channel: _Channel, queue: str | None) -> bool:
        """Have `channel` looked at; return whether that woke a drainer, who then owes `queue` a look."""
        self._ready[channel] = None
        return bool(self._idle) and self._wake(queue)

    def _wake(self, queue: str | None) -> bool:
        drainer, _ = self._idle.popitem(last=False)
        drainer.owed = queue
        drainer.event.set()
        return True

    def _pass_on(self, drainer: _Drainer) -> None:
        """Have somebody else look, if there is something to look at and somebody who sleeps."""
        owed, drainer.owed = drainer.owed, None
        if self._ready and self._idle:
            self._wake(owed)
        elif owed is not None and queues.has_message(owed):
            queues.wake_for(owed)

    def _next(
        self,
        connection: Transport | None,
        drainer: _Drainer,
        deadline: Deadline,
        stop: StopSignal | None,
    ) -> tuple[Subscription, virtual.Message]:
        while True:
            if stop is not None:
                stop.check()
            if self._closed or connection is None:
                raise RecoverableConnectionError("the connection is closed")
            taken = self._take()
            if taken is not None:
                return taken
            self._pass_on(drainer)  # somebody was faster, or the channel may not take it
            if self._ready:
                continue  # it came back, for another channel of this connection
            if deadline.expired:
                raise socket.timeout("timed out")
            self._sleep(drainer, deadline, stop)

    def _take(self) -> tuple[Subscription, virtual.Message] | None:
        while self._ready:
            channel, _ = self._ready.popitem(last=False)
            taken: tuple[Subscription, virtual.Message] | None = channel.take()
            if taken is not None:
                return taken
        return None

    def _sleep(self, drainer: _Drainer, deadline: Deadline, stop: StopSignal | None) -> None:
        drainer.event.clear()
        self._idle[drainer] = None
        try:
            with kept_waiting():
                wait(drainer.event, deadline, stop)
        finally:
            self._idle.pop(drainer, None)
            self._last_turn = monotonic()

    def _breathe(self) -> None:
        """Give the hub a turn if this connection has been drained for long without one."""
        if monotonic() - self._last_turn > MAX_TURN:
            gevent.sleep(0)
            self._last_turn = monotonic()


@dataclass(eq=False, slots=True)
class _Drainer:
    """A greenlet in `drain_events`; `owed` is the queue that it was woken for."""

    event: Event = field(default_factory=Event)
    owed: str | None = None
