"""Owns the consumers and the watching of events that the fault tests share."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event
from kombu import Connection, Producer, Queue
from kombu.exceptions import OperationalError

from greenconsume import ConsumerMixin, events
from greenconsume.runtime.greenlet import ConsumerGreenlet
from tests.brokers import RabbitMQ
from tests.options import say
from tests.waiting import NEVER, wait_until

#: A close may take this long in tests that measure how fast a stop is.
CLOSE_TIMEOUT = 0.2


class Collector(ConsumerMixin):
    """Consumes one durable queue; counts the bodies it handled, then acknowledges them.

    Attributes:
        handled: How often each body was handled, in order of first arrival; may be shared.
    """

    def __init__(
        self,
        connection: Any,
        queue: str,
        handled: Counter[Any] | None = None,
        prefetch: int = 10,
        work: Callable[[Any], object] | None = None,
        concurrency: int | None = None,
    ) -> None:
        self.connection = connection
        self.queue = Queue(queue, durable=True)
        self.handled: Counter[Any] = Counter() if handled is None else handled
        self.prefetch = prefetch
        self.work = work
        say(self, concurrency=concurrency)

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        queues = [self.queue]
        return [Consumer(queues, callbacks=[self.on_task], prefetch_count=self.prefetch)]

    def on_task(self, body: Any, message: Any) -> None:
        self.handled[body] += 1
        if self.work is not None:
            self.work(body)
        message.ack()


def connection_to(url: str, **options: Any) -> Connection:
    """A connection whose close is bounded by `CLOSE_TIMEOUT`; `options` are transport options."""
    return Connection(url, transport_options={"close_timeout": CLOSE_TIMEOUT, **options})


def patient_connection_to(url: str, close_timeout: float = NEVER, **options: Any) -> Connection:
    """A connection whose deadlines no test lives to see: what ends at once does not end by one of them."""
    options = {"close_timeout": close_timeout, **options}
    return Connection(url, connect_timeout=NEVER, transport_options=options)


def everything(handled: Counter[Any], count: int) -> Callable[[], bool]:
    """A predicate: the bodies 0 … count - 1 were all handled."""
    return lambda: len(handled) >= count and all(body in handled for body in range(count))


def duplicates(handled: Counter[Any]) -> int:
    """Return how many messages were handled more often than once, each time counted."""
    return sum(times - 1 for times in handled.values())


def consuming(greenlets: list[ConsumerGreenlet], within: float = 30.0) -> None:
    """Wait until all consume."""
    wait_until(lambda: all(each.ready.is_set() for each in greenlets), within, "all consume")


def freeze(broker: RabbitMQ) -> None:
    """Stop a broker's process (SIGSTOP), and wait until none of its threads runs any more."""
    broker.pause()
    stats = list(Path(f"/proc/{broker.pid}/task").glob("*/stat"))

    def frozen() -> bool:
        return all(stat.read_text().rpartition(") ")[2].startswith("T") for stat in stats)

    wait_until(frozen)


def stop_and_join(greenlet: ConsumerGreenlet, within: float = 30.0) -> float:
    """Assign `should_stop` and join; returns the seconds that it took."""
    began = monotonic()
    greenlet.consumer.should_stop = True
    assert greenlet.join(within), f"{greenlet.name} still runs after {within:g} s"
    return monotonic() - began


@contextmanager
def observing(*kinds: type[events.Event]) -> Iterator[list[Any]]:
    """Collect the events of these types."""
    seen: list[Any] = []

    def observe(event: events.Event, /) -> None:
        if isinstance(event, kinds):
            seen.append(event)

    unsubscribe = events.subscribe(observe)
    try:
        yield seen
    finally:
        unsubscribe()


@contextmanager
def running(*consumers: ConsumerMixin, within: float = 30.0) -> Iterator[list[ConsumerGreenlet]]:
    """Run consumers in greenlets of their own until the block ends; it begins when all consume."""
    greenlets = [ConsumerGreenlet(consumer) for consumer in consumers]
    for greenlet in greenlets:
        greenlet.start()
    try:
        consuming(greenlets, within)
        yield greenlets
    finally:
        for greenlet in greenlets:
            greenlet.stop()
        gevent.joinall(greenlets, timeout=30)
        gevent.killall(greenlets, timeout=1.0)


class ConfirmedPublisher:
    """Publishes persistent messages, each until the broker has confirmed it, whatever happens.

    A context, at whose end nothing of it is left.

    Attributes:
        confirmed: The bodies that the broker has confirmed.
    """

    def __init__(self, url: str, queues: list[str], **options: Any) -> None:
        self.confirmed: set[int] = set()
        self._queues = queues
        self._connection = connection_to(url, confirm_publish=True, **options)
        self._errors = self._connection.connection_errors + self._connection.channel_errors
        self._stop = Event()
        self._greenlets: list[gevent.Greenlet] = []
        self._bodies = count()

    def start(self, greenlet_count: int) -> None:
        """Publish from this many greenlets on one channel."""
        self._greenlets += [gevent.spawn(self._run) for _ in range(greenlet_count)]

    def stop(self) -> None:
        """Let what is being published be confirmed, then end."""
        self._stop.set()
        gevent.joinall(self._greenlets, timeout=30, raise_error=True)
        assert all(greenlet.ready() for greenlet in self._greenlets)

    def __enter__(self) -> ConfirmedPublisher:
        return self

    def __exit__(self, *_error: object) -> None:
        gevent.killall(self._greenlets)
        self._connection.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            body = next(self._bodies)
            while not self._published(body):
                gevent.sleep(0.1)
            self.confirmed.add(body)
            gevent.sleep(0)

    def _published(self, body: int) -> bool:
        try:
            producer = Producer(self._connection.default_channel)
            queue = self._queues[body % len(self._queues)]
            producer.publish(body, routing_key=queue, delivery_mode=2, timeout=10.0)
        except (OperationalError, *self._errors):
            return False
        return True


class Unlimited:
    """A `restart_limit` that never runs out, for consumers that lose their links in a row."""

    def can_consume(self, tokens: int) -> bool:
        return True


def alive(kind: type[Any]) -> int:
    """Return how many objects of a type the collector cannot collect."""
    gc.collect()
    return sum(isinstance(each, kind) for each in gc.get_objects())


def socket_count() -> int:
    """Return how many sockets this process has."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith("socket:") for link in links if os.path.islink(link))
