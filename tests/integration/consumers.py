"""Owns the consumers that integration tests run, and what the tests watch while they run."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Queue
from kombu import mixins as kombu_mixins
from kombu.utils.limits import TokenBucket

from greenconsume import ConsumerGreenlet, ConsumerMixin, ConsumerProducerMixin, spawn
from greenconsume import events as happenings
from greenconsume.transports import registry
from tests.brokers import RabbitMQ, vhost_of
from tests.waiting import wait_until

T = TypeVar("T", bound=happenings.Event)

#: Seconds that anything which should happen at once is given on a busy machine.
SOON = 30.0


class Recorder(ConsumerMixin):
    """Consumes one queue, and keeps the bodies that it handled in their order; is back at once.

    Args:
        broker: A URL, or a kombu connection.
        queue: The name of a durable queue, or a `kombu.Queue`.
        handle: Called with body and message before the message is acked.
        **options: As those of `kombu.Consumer`.
    """

    restart_limit = TokenBucket(1000)  # not one a second

    def __init__(
        self,
        broker: str | Connection,
        queue: str | Queue,
        handle: Callable[[Any, Any], object] | None = None,
        **options: Any,
    ) -> None:
        self.connection = broker if isinstance(broker, Connection) else green_connection(broker)
        self.queue = queue if isinstance(queue, Queue) else Queue(queue)
        self.handle = handle
        self.consumer_options = {"prefetch_count": 10, **options}
        self.bodies: list[Any] = []
        self.redelivered: list[bool] = []
        self.ready_count = 0

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([self.queue], callbacks=[self.on_task], **self.consumer_options)]

    def on_consume_ready(self, *args: Any, **kwargs: Any) -> None:
        self.ready_count += 1

    def on_task(self, body: Any, message: Any) -> None:
        self.redelivered.append(bool(message.delivery_info.get("redelivered")))
        if self.handle is not None:
            self.handle(body, message)
        self.bodies.append(body)
        if not message.acknowledged and not self.consumer_options.get("no_ack"):
            message.ack()

    def wait_for(self, count: int, within: float = SOON) -> list[Any]:
        """Wait until `count` messages were handled, and return all bodies."""
        wait_until(lambda: len(self.bodies) >= count, within, f"{count} messages are handled")
        return self.bodies


class Answerer(ConsumerProducerMixin):
    """Answers each message of a queue to its `reply_to`, by way of `self.producer`."""

    def __init__(self, broker: str | Connection, queue: str) -> None:
        self.connection = broker if isinstance(broker, Connection) else green_connection(broker)
        self.queue = Queue(queue)
        self.answered_count = 0

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([self.queue], callbacks=[self.on_request], prefetch_count=10)]

    def on_request(self, body: Any, message: Any) -> None:
        self.answer(body, message)
        message.ack()

    def answer(self, body: Any, message: Any) -> None:
        properties = message.properties
        self.producer.publish(
            {"answer": body},
            exchange="",
            routing_key=properties["reply_to"],
            correlation_id=properties.get("correlation_id"),
        )
        self.answered_count += 1


class Plain(kombu_mixins.ConsumerMixin):
    """A consumer as written for kombu."""

    def __init__(self, connection: Any, queue: str) -> None:
        self.connection = connection
        self.queue = queue
        self.bodies: list[Any] = []

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([Queue(self.queue)], callbacks=[self.on_task], accept=["json"])]

    def on_task(self, body: Any, message: Any) -> None:
        self.bodies.append(body)
        message.ack()


class Inbox:
    """A callback that keeps what it is given."""

    def __init__(self, connection: Connection, ack: bool = True) -> None:
        self.connection = connection
        self.bodies: list[Any] = []
        self.messages: list[Any] = []
        self._ack = ack

    def __call__(self, body: Any, message: Any) -> None:
        self.bodies.append(body)
        self.messages.append(message)
        if self._ack:
            message.ack()

    def drain(self, count: int) -> list[Any]:
        while len(self.bodies) < count:
            self.connection.drain_events(timeout=SOON)
        return self.bodies

    def is_quiet(self) -> bool:
        with pytest.raises(socket.timeout):
            self.connection.drain_events(timeout=0.05)
        return True


def green_connection(url: str, **options: Any) -> Connection:
    """A kombu connection over the green transport, not connected."""
    registry.register()
    return Connection(url, **options)


@contextmanager
def consuming(*consumers: Any) -> Iterator[list[ConsumerGreenlet]]:
    """Spawn consumers, each over a link of its own; afterwards, stop them and see them end in order."""
    greenlets = [spawn(consumer) for consumer in consumers]
    try:
        for greenlet in greenlets:
            assert greenlet.ready.wait(SOON), f"{greenlet.name} is {greenlet.state}"
        yield greenlets
    finally:
        for greenlet in greenlets:
            greenlet.stop()
        gevent.joinall(greenlets, timeout=SOON)
        ended = [greenlet.ready() for greenlet in greenlets]
        gevent.killall([greenlet for greenlet in greenlets if not greenlet.ready()])
    assert all(ended)


@contextmanager
def observed(kind: type[T]) -> Iterator[list[T]]:
    """Collect the events of a kind."""
    seen: list[T] = []

    def observe(event: happenings.Event, /) -> None:
        if isinstance(event, kind):
            seen.append(event)

    with ExitStack() as stack:
        stack.callback(happenings.subscribe(observe))
        yield seen


def pause_for(seconds: float) -> None:
    """Wait cooperatively, as a handler does that waits for something else than its broker."""
    Event().wait(seconds)


def channel_count(broker: RabbitMQ, url: str) -> int:
    """Return how many channels the clients of a virtual host have open."""
    answer = broker.eval(
        "length([C || C <- rabbit_channel:list_local(),"
        f' (catch rabbit_channel:info(C, [vhost])) =:= [{{vhost, <<"{vhost_of(url)}">>}}]])'
    )
    return int(answer)
