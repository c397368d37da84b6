"""One measurement in a process of its own: patched, and fed one JSON object that says which.

    python tests/patched.py tests.benchmarks.worker '{"measure": "consume", "mixin": "kombu", ...}'

Prints one JSON object with the figures. The same classes run on both mixins.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median, quantiles
from time import monotonic, process_time
from typing import Any

import gevent
import psutil
import redis
from gevent.event import Event
from gevent.pool import Pool
from kombu import Connection, Exchange, Producer, Queue
from kombu.pools import producers

from tests.benchmarks.meter import Meter

Options = dict[str, Any]
Make = Callable[[Connection, int], Any]


def mixin_of(options: Options) -> Any:
    if options["mixin"] == "kombu":
        from kombu.mixins import ConsumerMixin
    else:
        from greenconsume import ConsumerMixin
    return ConsumerMixin


def class_of(
    options: Options, callback: Callable[..., None], ready: Callable[[], object] = int
) -> Any:
    """Return a consumer class as users write it; `ready` is called when one of its consumers is."""

    class Bench(mixin_of(options)):  # type: ignore[misc]  # chosen at run time
        def __init__(self, connection: Connection, number: int) -> None:
            self.connection = connection
            number %= options.get("queues", number + 1)
            self.queue = Queue(f"{options['queue']}.{number}", durable=False)

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            prefetch = options.get("prefetch")  # without it, the mixin's own
            return [Consumer([self.queue], callbacks=[callback], prefetch_count=prefetch)]

        def on_consume_ready(self, *_args: Any, **_kwargs: Any) -> None:
            ready()

    if options.get("concurrency"):
        from greenconsume import ConsumerOptions

        Bench.options = ConsumerOptions(concurrency=options["concurrency"])
    return Bench


def fleet_of(options: Options, make: Make) -> Any:
    kind = KombuFleet if options["mixin"] == "kombu" else GreenFleet
    fleet = kind(options["url"], make, options.get("consumers", 1), options.get("links", 1))
    if options.get("watched"):
        fleet.runtime.control.watch()
    return fleet


class KombuFleet:
    """Kombu's mixins as a gevent program runs them: a greenlet and a connection each."""

    def __init__(self, url: str, make: Make, count: int, links: int) -> None:
        # On Redis its pool of 10 does not block: of 500 handlers most would fail to ack.
        options = {"max_connections": 1000} if url.startswith("redis:") else {}
        connection = Connection(url, transport_options=options)
        self.consumers = [make(connection, number) for number in range(count)]

    def start(self) -> None:
        self.greenlets = [gevent.spawn(consumer.run) for consumer in self.consumers]

    def stop(self) -> None:
        for consumer in self.consumers:
            consumer.should_stop = True
        gevent.joinall(self.greenlets)


class GreenFleet:
    """The same in a Runtime."""

    def __init__(self, url: str, make: Make, count: int, links: int) -> None:
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


def run(options: Options, make: Make, done: Event) -> None:
    """Consume until `done`."""
    fleet = fleet_of(options, make)
    fleet.start()
    done.wait()
    fleet.stop()


def consume(options: Options) -> dict[str, float]:
    """Callbacks that only ack; the messages wait in `consumers` queues."""
    done = Event()
    meter = Meter(options["messages"], done.set)

    def on_task(body: Any, message: Any) -> None:
        message.ack()
        meter.tick()

    # With many consumers the clock starts when the last of them is ready: their start is not measured.
    consumers = options.get("consumers", 1)
    starting = Meter(consumers, meter.start if consumers > 1 else int)
    run(options, class_of(options, on_task, starting.tick), done)
    return meter.figures()


def pool(options: Options) -> dict[str, float]:
    """Up to `handlers` callbacks that sleep for `seconds`, in a greenlet pool as users write it."""
    done = Event()
    meter = Meter(options["messages"], done.set)
    handlers = Pool(options["handlers"])

    def on_task(body: Any, message: Any) -> None:
        handlers.spawn(handle, message)

    def handle(message: Any) -> None:
        meter.enter()
        gevent.sleep(options["seconds"])
        message.ack()
        meter.leave()

    run(options, class_of(options, on_task), done)
    return {**meter.figures(), "in_flight": meter.peak}


def handlers(options: Options) -> dict[str, float]:
    """The same by the mixin's own `concurrency`."""
    done = Event()
    meter = Meter(options["messages"], done.set)

    def on_task(body: Any, message: Any) -> None:
        meter.enter()
        gevent.sleep(options["seconds"])
        message.ack()
        meter.leave()

    run(options, class_of(options, on_task), done)
    return {**meter.figures(), "in_flight": meter.peak}


def bound(options: Options) -> dict[str, float]:
    """Measure what gevent does of it without any broker: the same sleeps in the same pool."""
    done = Event()
    meter = Meter(options["messages"], done.set)
    sleepers = Pool(options["handlers"])

    def handle() -> None:
        meter.enter()
        gevent.sleep(options["seconds"])
        meter.leave()

    for _ in range(options["messages"]):
        sleepers.spawn(handle)
    done.wait()
    return {**meter.figures(), "in_flight": meter.peak}


def latency(options: Options) -> dict[str, float]:
    """From publish to handler, of messages that another process stamps; in milliseconds."""
    delays: list[float] = []
    done = Event()

    def on_task(body: Any, message: Any) -> None:
        delays.append(monotonic() - body["at"])
        message.ack()
        if len(delays) == options["messages"]:
            done.set()

    run(options, class_of(options, on_task, say_ready), done)
    return {"p50_ms": median(delays) * 1000, "p99_ms": quantiles(delays, n=100)[98] * 1000}


def wait(options: Options) -> None:
    """Consume until it is killed: one of many that wait for a queue."""

    def on_task(body: Any, message: Any) -> None:
        message.ack()

    run(options, class_of(options, on_task, say_ready), Event())


def acks(options: Options) -> list[tuple[float, int]]:
    """Return when, and with which tag, the callback acked the last message of each burst."""
    acked: list[tuple[float, int]] = []
    done = Event()
    meter = Meter(options["messages"], done.set)

    def on_task(body: Any, message: Any) -> None:
        at = monotonic()
        message.ack()
        if body["last"]:
            acked.append((at, message.delivery_tag))
        meter.tick()

    run(options, class_of(options, on_task, say_ready), done)
    return acked


def say_ready() -> None:
    print("ready", flush=True)


def publish(options: Options) -> dict[str, float]:
    """Confirmed publishing from 100 greenlets; `SENDERS` says by what."""
    meter = Meter(options["messages"], int)
    queue = f"{options['queue']}.0"
    with SENDERS[options["sender"]](options["url"]) as send:
        send({"warm": "up"}, routing_key=queue, delivery_mode=1)

        def work() -> None:
            for _ in range(options["messages"] // 100):
                send({"data": "x" * 80}, routing_key=queue, delivery_mode=1)
                meter.tick()

        gevent.joinall([gevent.spawn(work) for _ in range(100)], raise_error=True)
    return meter.figures()


@contextmanager
def pooled(url: str) -> Iterator[Callable[..., object]]:
    """Kombu's producer pool of 10, over kombu's own transport."""
    lend = producers[Connection(url, transport_options={"confirm_publish": True})]

    def send(*args: Any, **options: Any) -> None:
        with lend.acquire(block=True) as producer:
            producer.publish(*args, **options)

    yield send


@contextmanager
def one_producer(url: str) -> Iterator[Callable[..., object]]:
    """One plain `kombu.Producer` for all, on one channel of a green link."""
    from greenconsume.transports import registry

    registry.register()
    with Connection(url, transport_options={"confirm_publish": True}) as connection:
        yield Producer(connection.default_channel).publish


@contextmanager
def one_publisher(url: str) -> Iterator[Callable[..., object]]:
    """One `Publisher` for all."""
    from greenconsume import Publisher

    with Publisher(url) as publisher:
        yield publisher.publish


SENDERS = {"kombu_pool": pooled, "shared_producer": one_producer, "publisher": one_publisher}


def idle(options: Options) -> dict[str, float]:
    """Measure what `consumers` that wait cost: memory, CPU, sockets; how long they take to start and stop."""
    ready, delivered = Event(), Event()
    process = psutil.Process()
    starting = Meter(options["consumers"], ready.set)
    received = Meter(options["consumers"], delivered.set)

    def on_task(body: Any, message: Any) -> None:
        message.ack()
        received.tick()

    memory, began = process.memory_info().rss, monotonic()
    fleet = fleet_of(options, class_of({**options, "prefetch": 10}, on_task, starting.tick))
    fleet.start()
    ready.wait()
    figures = {"start_s": monotonic() - began}
    memory, commands = process.memory_info().rss - memory, command_count(options)
    cpu = process_time()
    gevent.sleep(options["seconds"])
    figures["idle_cpu_percent"] = (process_time() - cpu) / options["seconds"] * 100
    if options["url"].startswith("redis:"):
        # One is the question.
        spent = command_count(options) - commands - 1
        figures["commands_per_s"] = spent / options["seconds"]
    figures["kb_each"] = memory / options["consumers"] / 1024
    figures["sockets"] = sum(c.status == "ESTABLISHED" for c in process.net_connections("tcp"))
    if options.get("deliver"):
        figures["one_each_s"] = one_each(options, delivered)
    began = monotonic()
    fleet.stop()
    figures["stop_s"] = monotonic() - began
    return figures


def command_count(options: Options) -> int:
    """Return how many commands a Redis has executed; 0 for another broker."""
    if not options["url"].startswith("redis:"):
        return 0
    with redis.Redis.from_url(options["url"], protocol=2) as server:
        return sum(each["calls"] for each in server.info("commandstats").values())


def one_each(options: Options, delivered: Event) -> float:
    began = monotonic()
    with Connection(options["url"]) as connection:
        producer = Producer(connection, exchange=Exchange(""))
        for number in range(options["consumers"]):
            producer.publish({}, routing_key=f"{options['queue']}.{number}", delivery_mode=1)
        delivered.wait()
    return monotonic() - began


MEASURES: dict[str, Callable[[Options], object]] = {
    measure.__name__: measure
    for measure in (consume, pool, handlers, bound, latency, wait, acks, publish, idle)
}

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(MEASURES[given["measure"]](given)))
