"""Stops, restarts and network faults in random order under load: what was confirmed is handled, always."""

from __future__ import annotations

import random
from collections import Counter
from time import monotonic
from typing import Any

import gevent
import pytest

from greenconsume import Requeue, RestartPolicy, Runtime
from greenconsume.consuming.engine import ensure_engine
from greenconsume.events import ConsumerRestarting
from greenconsume.handling.options import ConsumerOptions
from greenconsume.links.pool import LinkPool
from greenconsume.runtime.greenlet import ConsumerGreenlet
from tests.fault.consumers import (
    Collector,
    ConfirmedPublisher,
    Unlimited,
    connection_to,
    duplicates,
    everything,
    observing,
    running,
    stop_and_join,
)
from tests.messages import declare, publish
from tests.options import say
from tests.rounds import rounds
from tests.waiting import AT_ONCE, wait_until


@pytest.mark.parametrize("concurrency", [None, 4])
def test_orderly_stops_at_random_moments_under_load_lose_and_repeat_nothing(
    rabbitmq, amqp_url, queue_name, concurrency
):
    """HAZARDS rows 12 and 17: many stops, and every message is handled once."""
    rng = random.Random(4)
    declare(amqp_url, queue_name)
    handled: Counter[Any] = Counter()
    pool, sent, seconds = LinkPool(links=1), 0, []
    for _ in range(rounds(40)):
        gevent.spawn(publish, amqp_url, queue_name, range(sent, sent + 30))
        sent += 30
        consumer = Collector(connection_to(amqp_url), queue_name, handled, prefetch=8)
        consumer.work = lambda body: gevent.sleep(0.001) if body % 5 == 0 else None
        say(consumer, concurrency=concurrency)
        ensure_engine(consumer).links = pool
        greenlet = ConsumerGreenlet(consumer)
        greenlet.start()
        gevent.sleep(rng.uniform(0, 0.03))
        seconds.append(stop_and_join(greenlet))
        assert greenlet.successful()
    print(f"\nthe slowest of {len(seconds)} stops under load took {max(seconds) * 1000:.0f} ms")
    with running(Collector(connection_to(amqp_url), queue_name, handled)):
        wait_until(everything(handled, sent))
    assert duplicates(handled) == 0
    assert max(seconds) < AT_ONCE
    assert rabbitmq.queue_counts(amqp_url, queue_name) == (0, 0, 0)


class Fragile(Collector):
    """Fails at times: in the handler, of the channel, or as a whole."""

    restart_limit = Unlimited()
    options = ConsumerOptions(on_error=Requeue(delay=0.05))

    def on_task(self, body: Any, message: Any) -> None:
        luck = self.luck.random()
        if luck < 0.01:
            raise LookupError("of the handler")
        if luck < 0.013:
            message.channel.queue_declare("no-such-queue", passive=True)
        gevent.sleep(0.002 * luck)
        super().on_task(body, message)

    def on_consume_ready(self, *args: Any, **kwargs: Any) -> None:
        if self.luck.random() < 0.02:
            raise LookupError("of the consumer")

    luck = random.Random(5)


class Faults:
    """Does something to a network every now and then."""

    def __init__(self, proxy: Any, runtime: Runtime) -> None:
        self.done: Counter[str] = Counter()
        self._proxy = proxy
        self._runtime = runtime
        self._rng = random.Random(6)

    def run(self, seconds: float) -> None:
        until = monotonic() + seconds
        while monotonic() < until:
            gevent.sleep(self._rng.uniform(0.1, 0.5))
            fault = self._rng.choice(["cut", "half_open", "stall", "truncate", "late", "kill"])
            self.done[fault] += 1
            getattr(self, fault)()
        self._proxy.latency(0)
        self._proxy.resume()

    def cut(self) -> None:
        self._proxy.cut()

    def half_open(self) -> None:
        self._proxy.half_open()

    def stall(self) -> None:
        self._proxy.stall()
        gevent.sleep(self._rng.uniform(0.0, 1.0))
        self._proxy.resume()

    def truncate(self) -> None:
        self._proxy.truncate_at(self._rng.randrange(5000))

    def late(self) -> None:
        self._proxy.latency(0.02)
        gevent.sleep(0.3)
        self._proxy.latency(0)

    def kill(self) -> None:
        victim = self._rng.choice(self._runtime.children).greenlet
        if victim is not None:
            victim.kill(exception=LookupError("killed"), block=False)


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [None, 4])
def test_whatever_happens_every_confirmed_message_is_handled(
    proxy, rabbitmq, amqp_url, queue_name, concurrency
):
    """HAZARDS rows 1, 3, 11, 13, 17 and 22, all at once."""
    declare(amqp_url, queue_name)
    handled: Counter[Any] = Counter()

    def make(connection: Any) -> Fragile:
        return Fragile(connection, queue_name, handled, prefetch=8, concurrency=concurrency)

    restart = RestartPolicy(max_restarts=10**6, backoff=0.05, max_backoff=0.2)
    runtime = Runtime(connection_to(proxy.url, heartbeat=1), links=2, restart=restart)

    runtime.spawn(make, replicas=20)
    faults = Faults(proxy, runtime)
    with observing(ConsumerRestarting) as restarts, runtime:
        with ConfirmedPublisher(proxy.url, [queue_name], heartbeat=1) as publisher:
            publisher.start(5)
            faults.run(seconds=6.0)
            wait_until(lambda: len(publisher.confirmed) > 1000)
            publisher.stop()
        wait_until(lambda: publisher.confirmed <= handled.keys())
        wait_until(lambda: all(child.started for child in runtime.children))
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (0, 0, 20))
    print(
        f"\n{dict(faults.done)}: {len(publisher.confirmed)} messages confirmed, "
        f"{duplicates(handled)} duplicates, {len(restarts)} restarts"
    )
    assert len(publisher.confirmed) > 1000
