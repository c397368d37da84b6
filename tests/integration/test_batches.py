"""Batches on a real broker: when they come, what becomes of them, and that none of them loses a message."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Queue

from greenconsume import Batch, ConsumerMixin, HandlerTimeout, Reject, Requeue, Runtime, Shutdown
from greenconsume.consuming.engine import ensure_engine
from greenconsume.events import ConsumerDrained, HandlerFailed, LinkDown, StaleSettle
from greenconsume.failures.retry import Retry
from greenconsume.handling.options import ConsumerOptions
from tests.brokers import RabbitMQ
from tests.integration.consumers import SOON, consuming, green_connection, observed, pause_for
from tests.messages import declare, publish, queue_depth
from tests.options import say
from tests.waiting import AT_ONCE, NEVER, wait_until


class Gatherer(ConsumerMixin):
    """Consumes one queue in batches, keeps their bodies, and acks them.

    Args:
        broker: A URL.
        queue: The name of a durable queue, or a `kombu.Queue`.
        handle: Called with each batch before it is acked.
        **options: Of the consumer.
    """

    options = ConsumerOptions(batch_size=10, batch_timeout=NEVER)

    def __init__(
        self,
        broker: str | Connection,
        queue: str | Queue,
        handle: Callable[[Batch], object] | None = None,
        **options: Any,
    ) -> None:
        self.connection = broker if isinstance(broker, Connection) else green_connection(broker)
        self.queue = queue if isinstance(queue, Queue) else Queue(queue)
        self.handle = handle
        self.batches: list[list[Any]] = []
        say(self, **options)

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([self.queue], callbacks=[self.on_batch])]

    def on_batch(self, batch: Batch) -> None:
        self.batches.append([body for body, _ in batch])
        if self.handle is not None:
            self.handle(batch)
        batch.ack()

    @property
    def bodies(self) -> list[Any]:
        return [body for batch in self.batches for body in batch]

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]

    def wait_for(self, count: int) -> list[Any]:
        """Wait until batches with `count` messages have begun, and return all bodies."""
        wait_until(lambda: len(self.bodies) >= count, SOON, f"{count} messages are handled")
        return self.bodies


@pytest.fixture(params=["amqp", "memory"])
def broker_url(request: pytest.FixtureRequest) -> str:
    return "memory://" if request.param == "memory" else str(request.getfixturevalue("amqp_url"))


def put(url: str, queue: str, count: int) -> None:
    """Publish over whatever transport a URL names."""
    with green_connection(url) as connection:
        producer = connection.Producer()
        for body in range(count):
            producer.publish(body, routing_key=queue, declare=[Queue(queue)])


def gathered(consumer: Gatherer) -> int:
    """Return how many messages wait in batches that have not started."""
    return int(ensure_engine(consumer).handling.gathered)


def settled(broker: RabbitMQ, url: str, queue: str) -> Callable[[], bool]:
    """Return what tells whether nothing is left of a queue's messages, ready or unsettled."""
    return lambda: broker.queue_counts(url, queue)[:2] == (0, 0)


# -- sizes and time -----------------------------------------------------------------------------------


def test_a_backlog_comes_in_full_batches_and_its_rest_when_time_is_up(broker_url, queue_name):
    put(broker_url, queue_name, 34)
    consumer = Gatherer(broker_url, queue_name, batch_timeout=0.2)
    with consuming(consumer):
        assert consumer.wait_for(34) == list(range(34))
    assert consumer.sizes == [10, 10, 10, 4]


def test_a_batch_is_as_late_as_its_timeout(amqp_url, queue_name):
    consumer = Gatherer(amqp_url, queue_name, batch_timeout=0.3)
    with consuming(consumer):
        began = monotonic()
        publish(amqp_url, queue_name, 3)
        consumer.wait_for(3)
        assert 0.3 < monotonic() - began < AT_ONCE
    assert consumer.sizes == [3]


def test_what_the_broker_sends_ahead_fills_the_next_batch(rabbitmq, amqp_url, queue_name):
    go = Event()
    consumer = Gatherer(amqp_url, queue_name, lambda batch: go.wait(), concurrency=2)
    publish(amqp_url, queue_name, 100)
    with consuming(consumer):
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (70, 30, 1))
        wait_until(lambda: consumer.sizes == [10, 10])
        go.set()
        assert sorted(consumer.wait_for(100)) == list(range(100))
        wait_until(settled(rabbitmq, amqp_url, queue_name))


def test_thousands_of_messages_in_large_batches_are_all_settled(rabbitmq, amqp_url, queue_name):
    publish(amqp_url, queue_name, 4000)
    consumer = Gatherer(amqp_url, queue_name, batch_size=1000)
    with consuming(consumer):
        assert consumer.wait_for(4000) == list(range(4000))
        wait_until(settled(rabbitmq, amqp_url, queue_name))
    assert consumer.sizes == [1000] * 4


def test_a_runtime_counts_batches_as_handlers(amqp_url, queue_name):
    publish(amqp_url, queue_name, 60)
    inside, most = 0, 0

    def handle(_batch: Batch) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        pause_for(0.05)
        inside -= 1

    runtime = Runtime(amqp_url)
    [child] = runtime.spawn(
        lambda connection: Gatherer(connection, queue_name, handle, concurrency=3)
    )
    with runtime:
        child.consumer.wait_for(60)
    assert most == 3
    assert queue_depth(amqp_url, queue_name) == 0


def test_a_batch_takes_one_of_a_runtimes_places(rabbitmq, amqp_url, queue_name):
    inside: set[str] = set()
    most: list[int] = []

    class Counted(Gatherer):
        options = replace(Gatherer.options, batch_timeout=0.02)

        def on_batch(self, batch: Batch) -> None:
            inside.add(self.queue.name)
            most.append(len(inside))
            pause_for(0.01)
            inside.discard(self.queue.name)
            super().on_batch(batch)

    runtime = Runtime(amqp_url, max_handlers=1)
    names = [f"{queue_name}-{n}" for n in range(3)]
    children = [
        runtime.spawn(lambda connection, name=name: Counted(connection, name))[0] for name in names
    ]
    for name in names:
        publish(amqp_url, name, 33)
    with runtime:
        for child in children:
            assert child.consumer.wait_for(33) == list(range(33))
    assert set(most) == {1}
    for name in names:
        wait_until(settled(rabbitmq, amqp_url, name))


# -- failures -----------------------------------------------------------------------------------------


def dead_lettering(url: str, queue: str) -> tuple[Queue, str]:
    """A queue whose rejected messages go to another, and the other's name."""
    dead = f"{queue}-dead"
    declare(url, dead)
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    return Queue(queue, queue_arguments=arguments), dead


def test_a_batch_fails_as_one(amqp_url, queue_name):
    queue, dead = dead_lettering(amqp_url, queue_name)

    def handle(batch: Batch) -> None:
        if any(body == 13 for body, _ in batch):
            raise ValueError("unlucky")

    consumer = Gatherer(amqp_url, queue, handle, on_error=Reject())
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish(amqp_url, queue_name, 30)
        wait_until(lambda: queue_depth(amqp_url, dead) == 10)
        consumer.wait_for(30)
    assert [(f.message_count, f.outcome) for f in failures] == [(10, "10 rejected")]
    assert queue_depth(amqp_url, queue_name) == 0


def test_a_batch_fails_message_by_message(amqp_url, queue_name):
    queue, dead = dead_lettering(amqp_url, queue_name)

    def handle(batch: Batch) -> None:
        for body, message in batch:
            if body == 13:
                message.reject()

    consumer = Gatherer(amqp_url, queue, handle)
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish(amqp_url, queue_name, 30)
        wait_until(lambda: queue_depth(amqp_url, dead) == 1)
        consumer.wait_for(30)
    assert failures == []
    assert queue_depth(amqp_url, queue_name) == 0


def test_what_a_failed_batch_had_settled_is_not_seen_again(rabbitmq, amqp_url, queue_name):
    def handle(batch: Batch) -> None:
        if len(consumer.batches) == 1:
            for body, message in batch:
                if body >= 6:
                    raise LookupError
                message.ack()

    consumer = Gatherer(amqp_url, queue_name, handle, on_error=Requeue(0.1), batch_timeout=0.2)
    with consuming(consumer):
        publish(amqp_url, queue_name, 10)
        consumer.wait_for(14)
        wait_until(settled(rabbitmq, amqp_url, queue_name))
    assert sorted(consumer.batches[1]) == [6, 7, 8, 9]


def test_a_batch_that_takes_too_long_is_tried_again(rabbitmq, amqp_url, queue_name):
    def handle(_batch: Batch) -> None:
        if len(consumer.batches) == 1:
            pause_for(SOON)

    consumer = Gatherer(
        amqp_url, queue_name, handle, handler_timeout=0.2, on_error=Requeue(0), batch_timeout=0.2
    )
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish(amqp_url, queue_name, 10)
        consumer.wait_for(20)
        wait_until(settled(rabbitmq, amqp_url, queue_name))
    assert [type(f.error) for f in failures] == [HandlerTimeout]
    assert Counter(consumer.bodies) == dict.fromkeys(range(10), 2)


def test_each_message_of_a_failed_batch_is_retried_and_then_dead_lettered(
    rabbitmq, amqp_url, queue_name
):
    def handle(batch: Batch) -> None:
        for body, message in batch:
            if body % 2:
                raise ValueError("odd")
            message.ack()

    consumer = Gatherer(amqp_url, queue_name, handle, batch_size=4, batch_timeout=0.1)
    say(consumer, on_error=Retry(delays=[0.2]))
    dead = f"{queue_name}.dead"
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish(amqp_url, queue_name, [0, 1, 3, 5])
        wait_until(lambda: queue_depth(amqp_url, dead) == 3)
        wait_until(settled(rabbitmq, amqp_url, queue_name))
    assert consumer.sizes == [4, 3]
    assert [failure.outcome for failure in failures] == [
        "1 left as the handler settled it, 3 retry 1 of 1 in 0.2 s",
        f"3 put into {dead} after 1 retries",
    ]


# -- stopping -----------------------------------------------------------------------------------------


def test_a_stop_gives_an_incomplete_batch_back_at_once(rabbitmq, amqp_url, queue_name):
    consumer = Gatherer(amqp_url, queue_name)
    publish(amqp_url, queue_name, 7)
    with observed(ConsumerDrained) as drained, consuming(consumer) as [greenlet]:
        wait_until(lambda: gathered(consumer) == 7)
        began = monotonic()
        greenlet.stop()
        assert greenlet.join(SOON)
        assert monotonic() - began < AT_ONCE
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (7, 0, 0))
    assert consumer.batches == []
    assert [event.given_back for event in drained] == [7]


def test_what_was_gathered_goes_back_while_another_batch_runs(rabbitmq, amqp_url, queue_name):
    go = Event()
    consumer = Gatherer(amqp_url, queue_name, lambda batch: go.wait())
    publish(amqp_url, queue_name, 17)
    with consuming(consumer) as [greenlet]:
        wait_until(lambda: consumer.sizes == [10])
        wait_until(lambda: gathered(consumer) == 7)
        greenlet.stop()
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (7, 10, 0))
        go.set()
        assert greenlet.join(SOON)
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (7, 0, 0))


def test_stops_at_any_moment_lose_and_double_nothing(rabbitmq, amqp_url, queue_name):
    dice, count = random.Random(4), 4000
    publish(amqp_url, queue_name, count)
    seen: Counter[int] = Counter()

    def handle(batch: Batch) -> None:
        pause_for(dice.uniform(0, 0.02))
        for _, message in list(batch)[: dice.randrange(len(batch) + 1)]:
            message.ack()
        pause_for(dice.uniform(0, 0.01))

    for turn in range(25):
        consumer = Gatherer(
            amqp_url, queue_name, handle, concurrency=1 + turn % 4, batch_timeout=0.005
        )
        with consuming(consumer) as [greenlet]:
            gevent.sleep(dice.uniform(0, 0.06))
            greenlet.stop()
            assert greenlet.join(SOON)
        seen.update(consumer.bodies)
        left = count - sum(seen.values())
        wait_until(lambda left=left: rabbitmq.queue_counts(amqp_url, queue_name)[:2] == (left, 0))
    consumer = Gatherer(amqp_url, queue_name, batch_timeout=0.1)
    with consuming(consumer):
        consumer.wait_for(count - sum(seen.values()))
    seen.update(consumer.bodies)
    assert seen == dict.fromkeys(range(count), 1)
    wait_until(settled(rabbitmq, amqp_url, queue_name))


def test_a_batch_that_outlasts_the_drain_is_delivered_again(rabbitmq, amqp_url, queue_name):
    ended: list[BaseException] = []

    def handle(batch: Batch) -> None:
        for _, message in batch[:4]:
            message.ack()
        try:
            pause_for(SOON)
        except BaseException as exc:
            ended.append(exc)
            raise

    consumer = Gatherer(amqp_url, queue_name, handle, drain_timeout=0.2)
    publish(amqp_url, queue_name, 10)
    with observed(HandlerFailed) as failures, consuming(consumer) as [greenlet]:
        consumer.wait_for(10)
        greenlet.stop()
        assert greenlet.join(SOON)
    assert [type(exc) for exc in ended] == [Shutdown]
    assert failures == []
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (6, 0, 0))


# -- a lost link --------------------------------------------------------------------------------------


def test_a_lost_link_costs_no_message_and_mixes_none_into_the_next_batch(
    rabbitmq, proxy, amqp_url, queue_name
):
    consumer = Gatherer(proxy.url, queue_name, batch_timeout=NEVER)
    publish(amqp_url, queue_name, 7)
    with observed(StaleSettle) as stale, consuming(consumer):
        wait_until(lambda: gathered(consumer) == 7)
        proxy.cut()
        publish(amqp_url, queue_name, [7, 8, 9])
        assert sorted(consumer.wait_for(10)) == list(range(10))
        wait_until(settled(rabbitmq, amqp_url, queue_name))
    assert consumer.sizes == [10]
    assert stale == []


def test_a_batch_that_runs_while_the_link_is_lost_settles_nothing_of_the_next(
    rabbitmq, proxy, amqp_url, queue_name
):
    go = Event()
    consumer = Gatherer(proxy.url, queue_name, lambda batch: go.wait(), batch_timeout=0.2)
    publish(amqp_url, queue_name, 10)
    with observed(StaleSettle) as stale, observed(LinkDown) as lost, consuming(consumer):
        consumer.wait_for(10)
        proxy.cut()
        wait_until(lambda: lost)
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (0, 10, 1), SOON)
        go.set()
        assert Counter(consumer.wait_for(20)) == dict.fromkeys(range(10), 2)
        wait_until(settled(rabbitmq, amqp_url, queue_name))
    assert len(stale) == 10


def test_cut_links_under_load_lose_nothing(rabbitmq, proxy, amqp_url, queue_name):
    count = 2000
    publish(amqp_url, queue_name, count)
    seen: Counter[int] = Counter()

    def handle(batch: Batch) -> None:
        pause_for(0.005)
        seen.update(body for body, _ in batch)

    consumer = Gatherer(proxy.url, queue_name, handle, concurrency=2, batch_timeout=0.05)
    with consuming(consumer) as [greenlet]:
        for at in (200, 600, 1000):
            wait_until(lambda at=at: len(seen) > at, SOON)
            proxy.cut()
            greenlet.ready.wait(SOON)
        wait_until(lambda: len(seen) == count, SOON)
        wait_until(settled(rabbitmq, amqp_url, queue_name))
    assert sum(seen.values()) - count <= 3 * 30  # what was in hand, three times
