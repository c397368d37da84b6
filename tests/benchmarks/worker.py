"""One measurement in a process of its own: patched, and fed one JSON object that says which.

    python tests/patched.py tests.benchmarks.worker '{"measure": "consume", "mixin": "kombu", ...}'

Prints one JSON object with the figures. The same classes run on both mixins.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from statistics import median, quantiles
from time import monotonic, process_time, time
from typing import Any

import gevent
import psutil
from gevent.event import Event
from gevent.pool import Pool
from kombu import Connection, Exchange, Producer, Queue
from kombu.pools import producers


def mixin_of(name: str) -> Any:
    if name == "kombu":
        from kombu.mixins import ConsumerMixin
    else:
        from greenconsume import ConsumerMixin
    return ConsumerMixin


def fleet_of(name: str, url: str, make: Callable[[Connection, int], Any], count: int, links: int) -> Any:
    return (KombuFleet if name == "kombu" else GreenFleet)(url, make, count, links)


class KombuFleet:
    """Kombu's mixins as a gevent program runs them: a greenlet and a connection each."""

    def __init__(
        self, url: str, make: Callable[[Connection, int], Any], count: int, links: int
    ) -> None:
        connection = Connection(url)
        self.consumers = [make(connection, number) for number in range(count)]

    def start(self) -> None:
        self.greenlets = [gevent.spawn(consumer.run) for consumer in self.consumers]

    def stop(self) -> None:
        for consumer in self.consumers:
            consumer.should_stop = True
        gevent.joinall(self.greenlets)


class GreenFleet:
    """The same in a Runtime."""

    def __init__(
        self, url: str, make: Callable[[Connection, int], Any], count: int, links: int
    ) -> None:
        from greenconsume import Runtime

        self.runtime = Runtime(url, links=links)
        numbers = iter(range(count))
        self.runtime.spawn(lambda connection: make(connection, next(numbers)), replicas=count)

    def start(self) -> None:
        self.starting = gevent.spawn(self.runtime.start)

    def stop(self) -> None:
        self.starting.join()
        self.runtime.stop()
        self.runtime.join()


class Meter:
    """Counts messages and wakes when all have come; times from the first to the last."""

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.done = Event()

    def tick(self) -> None:
        if not self.count:
            self.began, self.cpu = monotonic(), process_time()
        self.count += 1
        if self.count == self.total:
            self.seconds, self.cpu = monotonic() - self.began, process_time() - self.cpu
            self.done.set()

    def figures(self) -> dict[str, float]:
        return {"rate": self.total / self.seconds, "cpu_per_10k": self.cpu / self.total * 10_000}


def consume(options: dict[str, Any]) -> dict[str, float]:
    """W1: callbacks that only ack; the messages wait in `consumers` queues."""
    meter = Meter(options["messages"])
    mixin = mixin_of(options["mixin"])

    class Acks(mixin):  # type: ignore[misc,valid-type]  # chosen at run time
        def __init__(self, connection: Connection, number: int) -> None:
            self.connection = connection
            self.queue = Queue(f"{options['queue']}.{number}", durable=False)

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            prefetch = options["prefetch"]
            return [Consumer([self.queue], callbacks=[self.on_task], prefetch_count=prefetch)]

        def on_task(self, body: Any, message: Any) -> None:
            message.ack()
            meter.tick()

    fleet = fleet_of(
        options["mixin"], options["url"], Acks, options.get("consumers", 1), options.get("links", 1)
    )
    fleet.start()
    meter.done.wait()
    fleet.stop()
    return meter.figures()


def pool(options: dict[str, Any]) -> dict[str, float]:
    """W2: `in_flight` handlers that sleep 50 ms, in a greenlet pool as users write it."""
    meter = Meter(options["messages"])
    handlers = Pool(options["in_flight"])
    mixin = mixin_of(options["mixin"])

    class Spawns(mixin):  # type: ignore[misc,valid-type]  # chosen at run time
        def __init__(self, connection: Connection, number: int) -> None:
            self.connection = connection
            self.queue = Queue(f"{options['queue']}.0", durable=False)

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            prefetch = options["in_flight"]
            return [Consumer([self.queue], callbacks=[self.on_task], prefetch_count=prefetch)]

        def on_task(self, body: Any, message: Any) -> None:
            handlers.spawn(self.handle, message)

        def handle(self, message: Any) -> None:
            gevent.sleep(0.05)
            message.ack()
            meter.tick()

    fleet = fleet_of(options["mixin"], options["url"], Spawns, 1, 1)
    fleet.start()
    meter.done.wait()
    fleet.stop()
    return meter.figures()


def latency(options: dict[str, Any]) -> dict[str, float]:
    """W4: from publish to handler, of messages that another process stamps; in milliseconds."""
    delays: list[float] = []
    done = Event()
    mixin = mixin_of(options["mixin"])

    class Clocks(mixin):  # type: ignore[misc,valid-type]  # chosen at run time
        def __init__(self, connection: Connection, number: int) -> None:
            self.connection = connection
            self.queue = Queue(f"{options['queue']}.0", durable=False)

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return [Consumer([self.queue], callbacks=[self.on_task], prefetch_count=100)]

        def on_consume_ready(self, *_args: Any, **_kwargs: Any) -> None:
            print("ready", flush=True)

        def on_task(self, body: Any, message: Any) -> None:
            delays.append(time() - body["at"])
            message.ack()
            if len(delays) == options["messages"]:
                done.set()

    fleet = fleet_of(options["mixin"], options["url"], Clocks, 1, 1)
    fleet.start()
    done.wait()
    fleet.stop()
    return {"p50": median(delays) * 1000, "p99": quantiles(delays, n=100)[98] * 1000}


def publish(options: dict[str, Any]) -> dict[str, float]:
    """Confirmed publishing from 100 greenlets: kombu over its pool of 10, greenconsume over one link."""
    body = {"data": "x" * 80}
    connection = Connection(options["url"], transport_options={"confirm_publish": True})
    meter = Meter(options["messages"])
    if options["mixin"] == "kombu":
        lend = producers[connection]

        def send() -> None:
            with lend.acquire(block=True) as producer:
                producer.publish(body, routing_key=options["queue"], delivery_mode=1)
    else:
        from greenconsume import transports

        transports.register()
        connection = connection.clone()
        connection.connect()
        producer = Producer(connection.default_channel)

        def send() -> None:
            producer.publish(body, routing_key=options["queue"], delivery_mode=1)

    def work() -> None:
        for _ in range(options["messages"] // 100):
            send()
            meter.tick()

    gevent.joinall([gevent.spawn(work) for _ in range(100)], raise_error=True)
    return meter.figures()


def idle(options: dict[str, Any]) -> dict[str, float]:
    """What `consumers` that wait cost: memory, CPU, sockets; how long they take to start and stop."""
    ready = Event()
    mixin = mixin_of(options["mixin"])
    count = {"ready": 0}
    process = psutil.Process()

    class Waits(mixin):  # type: ignore[misc,valid-type]  # chosen at run time
        def __init__(self, connection: Connection, number: int) -> None:
            self.connection = connection
            self.queue = Queue(f"{options['queue']}.{number}", durable=False)

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return [Consumer([self.queue], callbacks=[self.on_task], prefetch_count=10)]

        def on_consume_ready(self, *_args: Any, **_kwargs: Any) -> None:
            count["ready"] += 1
            if count["ready"] == options["consumers"]:
                ready.set()

        def on_task(self, body: Any, message: Any) -> None:
            message.ack()
            received.tick()

    received = Meter(options["consumers"])
    memory = process.memory_info().rss
    began = monotonic()
    fleet = fleet_of(
        options["mixin"], options["url"], Waits, options["consumers"], options.get("links", 1)
    )
    fleet.start()
    ready.wait()
    figures = {"start_s": monotonic() - began}
    memory = process.memory_info().rss - memory
    cpu = process_time()
    gevent.sleep(options["seconds"])
    figures["idle_cpu_percent"] = (process_time() - cpu) / options["seconds"] * 100
    figures["kb_each"] = memory / options["consumers"] / 1024
    figures["sockets"] = sum(c.status == "ESTABLISHED" for c in process.net_connections("tcp"))
    if options.get("deliver"):
        figures["one_each_s"] = one_each(options, received)
    began = monotonic()
    fleet.stop()
    figures["stop_s"] = monotonic() - began
    return figures


def one_each(options: dict[str, Any], received: Meter) -> float:
    began = monotonic()
    with Connection(options["url"]) as connection:
        producer = Producer(connection, exchange=Exchange(""))
        for number in range(options["consumers"]):
            producer.publish({}, routing_key=f"{options['queue']}.{number}", delivery_mode=1)
        received.done.wait()
    return monotonic() - began


MEASURES = {
    measure.__name__: measure for measure in (consume, pool, latency, publish, idle)
}

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(MEASURES[given["measure"]](given)))
