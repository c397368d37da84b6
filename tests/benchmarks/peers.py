"""One measurement of a peer in a process of its own: that of `worker`, with other libraries.

    python -m tests.benchmarks.peers '{"who": "pika", "url": ..., "queue": ..., ...}'

`handlers` asks for that many at once, which sleep for `seconds`; without it messages are acked as they
come, `prefetch` at a time. Each peer is written as its documentation shows. Prints one JSON object with
the figures, as its last line, and ends without tidying up: that is not measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

from tests.benchmarks.meter import Meter

Options = dict[str, Any]


class Peer(NamedTuple):
    """The needs of a peer's run: packages that must be there, gevent's patching, its own messages."""

    needs: tuple[str, ...]
    run: Callable[[Options, Meter], object]
    patched: bool = False
    kind: str = "plain"

    @property
    def installed(self) -> bool:
        return all(find_spec(package) for package in self.needs)


def run_pika(options: Options, meter: Meter) -> None:
    import pika

    connection = pika.BlockingConnection(pika.URLParameters(options["url"]))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=options["prefetch"])

    def finish(tag: int) -> None:
        channel.basic_ack(tag)
        meter.leave()

    def on_message(_channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        meter.enter()
        json.loads(body)
        finish(method.delivery_tag)

    in_threads = pooled(
        options, meter, lambda tag: connection.add_callback_threadsafe(lambda: finish(tag))
    )
    channel.basic_consume(options["queue"], in_threads if options["handlers"] else on_message)
    channel.start_consuming()


def pooled(options: Options, meter: Meter, finish: Callable[[int], object]) -> Callable[..., None]:
    """Return pika's callback for handlers in threads, in which `finish` is called."""
    from concurrent.futures import ThreadPoolExecutor
    from time import sleep

    pool = ThreadPoolExecutor(options["handlers"] or 1)

    def handle(tag: int, body: bytes) -> None:
        json.loads(body)
        sleep(options["seconds"])
        finish(tag)

    def on_message(_channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        meter.enter()
        pool.submit(handle, method.delivery_tag, body)

    return on_message


def run_aio_pika(options: Options, meter: Meter) -> None:
    import asyncio

    asyncio.run(consume_aio_pika(options, meter))


def run_aio_pika_on_uvloop(options: Options, meter: Meter) -> None:
    import uvloop

    uvloop.run(consume_aio_pika(options, meter))


async def consume_aio_pika(options: Options, meter: Meter) -> None:
    import asyncio

    import aio_pika

    connection = await aio_pika.connect_robust(options["url"])
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=options["prefetch"])
    queue = await channel.get_queue(options["queue"])

    async def on_message(message: Any) -> None:
        meter.enter()
        json.loads(message.body)
        if options["handlers"]:
            await asyncio.sleep(options["seconds"])
        await message.ack()
        meter.leave()

    await queue.consume(on_message)
    await asyncio.Event().wait()


def run_celery(options: Options, meter: Meter) -> None:
    from time import sleep

    from celery import Celery
    from kombu import Exchange, Queue

    app = Celery(broker=options["url"])
    name = options["queue"]
    app.conf.task_queues = [Queue(name, Exchange(""), name, durable=False)]
    app.conf.task_ignore_result = True
    if not options["handlers"]:
        app.conf.worker_prefetch_multiplier = 1

    @app.task(name="bench")
    def bench(data: Any) -> None:
        meter.enter()
        if options["handlers"]:
            sleep(options["seconds"])
        meter.leave()

    greenlets = options["handlers"] or options["prefetch"]
    command = ["--quiet", "worker", "--pool", "gevent", "--concurrency", str(greenlets)]
    # With its events 5.7 waits 0.1 s for them after each message: 10 messages a second.
    app.worker_main([*command, "--without-gossip", "--without-heartbeat"])


def run_dramatiq(options: Options, meter: Meter) -> None:
    if not options["handlers"]:
        os.environ["dramatiq_queue_prefetch"] = str(options["prefetch"])  # noqa: SIM112  # its name
    from threading import Event
    from time import sleep

    import dramatiq

    if options["url"].startswith("redis:"):
        from dramatiq.brokers.redis import RedisBroker as Broker
    else:
        from dramatiq.brokers.rabbitmq import RabbitmqBroker as Broker

    broker = Broker(url=options["url"])
    dramatiq.set_broker(broker)

    @dramatiq.actor(actor_name="bench", queue_name=options["queue"])
    def bench(data: Any) -> None:
        meter.enter()
        if options["handlers"]:
            sleep(options["seconds"])
        meter.leave()

    # 8 is what its command line takes by default.
    dramatiq.Worker(broker, worker_threads=options["handlers"] or 8).start()
    Event().wait()


def run_nameko(options: Options, meter: Meter) -> None:
    import eventlet

    eventlet.monkey_patch()

    from kombu import Queue
    from nameko.containers import ServiceContainer
    from nameko.messaging import consume

    class Service:
        name = "bench"

        @consume(Queue(options["queue"], durable=False))
        def bench(self, body: Any) -> None:
            meter.enter()
            if options["handlers"]:
                eventlet.sleep(options["seconds"])
            meter.leave()

    workers = options["handlers"] or options["prefetch"]
    config = {"AMQP_URI": options["url"], "max_workers": workers}
    container = ServiceContainer(Service, config)
    container.start()
    container.wait()


PEERS = {
    "aio-pika": Peer(("aio_pika",), run_aio_pika),
    "aio-pika, uvloop": Peer(("aio_pika", "uvloop"), run_aio_pika_on_uvloop),
    "celery -P gevent": Peer(("celery",), run_celery, patched=True, kind="celery"),
    "dramatiq-gevent": Peer(("dramatiq", "pika"), run_dramatiq, patched=True, kind="dramatiq"),
    "nameko": Peer(("nameko",), run_nameko),
    "pika": Peer(("pika",), run_pika),
}


def main() -> None:
    options = json.loads(sys.argv[1])

    def done() -> None:
        # Not to `sys.stdout`, which celery makes a log.
        print(f"\n{json.dumps(meter.figures())}", file=sys.__stdout__, flush=True)
        os._exit(0)

    meter = Meter(options["messages"], done)
    PEERS[options["who"]].run(options, meter)


if __name__ == "__main__":
    main()
