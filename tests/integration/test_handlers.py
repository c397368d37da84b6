"""Handlers in a pool on real brokers: thousands at once, in order by key, failing, late, not growing."""

from __future__ import annotations

import gc
import logging
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import psutil
import pytest
from gevent.event import Event
from kombu import Connection, Queue

from greenconsume import HandlerTimeout, Reject, Requeue, Runtime
from greenconsume.events import (
    HandlerFailed,
    LinkDown,
    StaleSettle,
    UnsettledTooLong,
    subscribe,
)
from greenconsume.handling.options import ConsumerOptions
from tests.brokers import RabbitMQ
from tests.integration.consumers import SOON, Recorder, consuming, observed, pause_for
from tests.messages import channel, declare, publish, queue_depth
from tests.options import say
from tests.waiting import wait_until

ERRORS = [OSError, TimeoutError, ConnectionResetError, KeyError, ValueError]


class Pooled(Recorder):
    """Handles messages in a pool; its prefetch follows from that."""

    options = ConsumerOptions(concurrency=100)

    def __init__(
        self, broker: str | Connection, queue: str | Queue, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(broker, queue, *args, **kwargs)
        del self.consumer_options["prefetch_count"]


class Crowd:
    """A handler that takes its time, and counts how many are in it."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self.seconds = seconds
        self.inside = self.peak = 0

    def __call__(self, _body: Any, _message: Any) -> None:
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        try:
            gevent.sleep(self.seconds())
        finally:
            self.inside -= 1


def greenlet_count() -> int:
    """Return how many greenlets live."""
    return sum(isinstance(each, gevent.Greenlet) and not each.dead for each in gc.get_objects())


# -- how many at once -----------------------------------------------------------------------------------


def test_five_thousand_handlers_are_in_flight_at_once(amqp_url: str, queue_name: str):
    """None ends before all have begun."""
    count = 5000
    publish(amqp_url, queue_name, count)
    all_begun = Event()

    def until_all_have_begun() -> float:
        if crowd.inside == count:
            all_begun.set()
        return 0.0 if all_begun.wait(60) else 1.0

    crowd = Crowd(until_all_have_begun)
    consumer = Pooled(amqp_url, queue_name, crowd)
    say(consumer, concurrency=count)
    with consuming(consumer):
        wait_until(lambda: len(consumer.bodies) == count, within=90)
    assert crowd.peak == count
    assert sorted(consumer.bodies) == list(range(count))
    assert queue_depth(amqp_url, queue_name) == 0


def test_greenlets_and_messages_in_hand_are_bounded(
    rabbitmq: RabbitMQ, amqp_url: str, queue_name: str
):
    """HAZARDS.md row 20: the prefetch follows the concurrency, whatever the backlog."""
    publish(amqp_url, queue_name, 1000)
    consumer, before = Pooled(amqp_url, queue_name, Crowd(lambda: 0.01)), greenlet_count()
    seen: list[tuple[int, int]] = []
    with consuming(consumer):
        while len(consumer.bodies) < 1000:
            unacked = rabbitmq.queue_counts(amqp_url, queue_name).unacked
            seen.append((greenlet_count() - before, unacked))
    assert max(greenlets for greenlets, _ in seen) <= consumer.options.concurrency + 10
    assert max(unacked for _, unacked in seen) <= 2 * consumer.options.concurrency
    assert max(unacked for _, unacked in seen) > consumer.options.concurrency


def test_max_handlers_bounds_many_consumers(amqp_url: str, queue_name: str):
    """Fifty consumers of ten handlers each share forty places, and none is left out."""
    publish(amqp_url, queue_name, 2000)
    crowd = Crowd(lambda: 0.005)
    runtime = Runtime(amqp_url, options=ConsumerOptions(concurrency=10), max_handlers=40)
    consumers = [Recorder(amqp_url, queue_name, crowd) for _ in range(50)]
    for consumer in consumers:
        runtime.spawn(consumer)
    with runtime:
        wait_until(lambda: sum(len(each.bodies) for each in consumers) == 2000, within=SOON)
    assert crowd.peak == 40
    assert all(each.bodies for each in consumers)


# -- in order, by key -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_keys_stay_in_order_and_keep_the_pool_busy(amqp_url: str, queue_name: str):
    """Order within each key, whatever it takes; 90 % of the pool at work is the target."""
    count, keys, size = 6000, 1000, 100
    rng = random.Random(7)
    bodies = [[rng.randrange(keys), number] for number in range(count)]
    publish(amqp_url, queue_name, bodies)
    crowd = Crowd(lambda: rng.uniform(0.0, 0.2))
    handled: defaultdict[int, list[int]] = defaultdict(list)

    def handle(body: Any, message: Any) -> None:
        crowd(body, message)
        handled[body[0]].append(body[1])

    consumer = Pooled(amqp_url, queue_name, handle)
    say(consumer, concurrency=size)
    say(consumer, partition_by=lambda message: message.decode()[0])
    samples: list[int] = []
    with consuming(consumer):
        wait_until(lambda: crowd.peak == size)
        while len(consumer.bodies) < count - 2 * size:
            samples.append(crowd.inside)
            gevent.sleep(0.01)
        wait_until(lambda: len(consumer.bodies) == count)
    for key in range(keys):
        assert handled[key] == [number for each, number in bodies if each == key]
    share = sum(samples) / len(samples) / size
    print(f"{share:.1%} of {size} places at work")
    assert share > 0.9


# -- failing ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["amqp_url", "redis_url"])
def broker(request: pytest.FixtureRequest) -> str:
    """RabbitMQ, and Redis over kombu's own transport."""
    return str(request.getfixturevalue(request.param))


@pytest.mark.leaks_ok("kombu's redis transport leaves sockets to the garbage collector")
@pytest.mark.parametrize("kind", ERRORS)
def test_what_a_handler_raises_is_its_own(broker: str, queue_name: str, kind: type[Exception]):
    """HAZARDS.md row 11: in a pool, too, no error is taken for the broker's, and each is settled once."""
    failed: list[Any] = []

    def handle(body: Any, _message: Any) -> None:
        if body % 2 and body not in failed:
            failed.append(body)
            raise kind("the handler's own")

    consumer = Pooled(broker, queue_name, handle)
    say(consumer, concurrency=5, on_error=Requeue(0.05))
    with observed(HandlerFailed) as events, observed(LinkDown) as lost, consuming(consumer):
        put(broker, queue_name, range(20))
        wait_until(lambda: sorted(consumer.bodies) == list(range(20)), within=SOON)
    assert sorted(failed) == list(range(1, 20, 2))
    assert len(events) == 10
    assert (lost, consumer.ready_count) == ([], 1)


@pytest.mark.leaks_ok("kombu's redis transport leaves sockets to the garbage collector")
def test_many_handlers_that_ack_at_once_go_through_one_place(redis_url: str, queue_name: str):
    """HAZARDS.md row 14: with kombu alone 12 of 50 fail, for want of a connection of its pool."""
    ready = gevent.event.Event()
    consumer = Pooled(redis_url, queue_name, lambda body, message: ready.wait(30))
    say(consumer, concurrency=50)
    with observed(HandlerFailed) as failed, consuming(consumer):
        put(redis_url, queue_name, range(50))
        pool = gevent.spawn_later(0.5, ready.set)
        wait_until(lambda: len(consumer.bodies) == 50, within=SOON)
        pool.join()
    assert failed == []
    with Connection(redis_url) as connection:
        assert connection.channel()._size(queue_name) == 0


def put(broker: str, queue: str, bodies: Any) -> None:
    with Connection(broker) as connection, connection.channel() as channel:
        bound = Queue(queue)(channel)
        bound.declare()
        for body in bodies:
            connection.Producer(channel).publish(body, routing_key=queue, exchange="")


def test_a_timeout_in_a_handler_that_publishes_leaves_its_link_whole(
    amqp_url: str, queue_name: str
):
    """HAZARDS.md row 1: half of the handlers are interrupted while they publish with confirms."""
    count = 300

    def handle(body: Any, _message: Any) -> None:
        for _ in range(1 + 400 * (body % 2)):
            consumer.publish(body)

    class Relay(Pooled):
        def publish(self, body: Any) -> None:
            producer.publish(body, exchange="", routing_key=answers)

    answers = f"{queue_name}-2"
    declare(amqp_url, answers)
    publish(amqp_url, queue_name, count)
    options = {"confirm_publish": True}
    with Connection(amqp_url, transport_options=options) as connection:
        producer = connection.Producer()
        consumer = Relay(amqp_url, queue_name, handle)
        say(consumer, concurrency=20, handler_timeout=0.05)
        say(consumer, on_error={HandlerTimeout: Reject()})
        with observed(HandlerFailed) as failed, observed(LinkDown) as lost, consuming(consumer):
            wait_until(lambda: len(failed) + len(consumer.bodies) >= count, within=60)
            consumer.publish("still whole")
    assert lost == []
    assert failed
    assert all(isinstance(each.error, HandlerTimeout) for each in failed)
    assert queue_depth(amqp_url, answers) > count / 2
    assert queue_depth(amqp_url, queue_name) == 0


# -- late settles -----------------------------------------------------------------------------------------


def test_handlers_that_settle_after_a_reconnect_ack_nobody_elses_message(
    rabbitmq: RabbitMQ, amqp_url: str, queue_name: str
):
    """HAZARDS.md row 13: with kombu an unknown delivery tag closes the channel, or acks the wrong one."""
    publish(amqp_url, queue_name, 200)
    consumer = Pooled(amqp_url, queue_name, lambda body, message: pause_for(0.3))
    say(consumer, concurrency=50)
    with observed(StaleSettle) as stale, consuming(consumer):
        for _ in range(2):
            wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name).unacked >= 50)
            rabbitmq.close_connections(amqp_url)
            gevent.sleep(0.05)
        wait_until(lambda: set(consumer.bodies) == set(range(200)))
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name).unacked == 0)
        assert rabbitmq.queue_counts(amqp_url, queue_name).ready == 0
    counts = Counter(consumer.bodies)
    duplicates = sum(counts.values()) - 200
    assert 0 < len(stale) <= duplicates <= 2 * consumer.options.concurrency


@pytest.fixture
def impatient_broker(rabbitmq_fault: RabbitMQ) -> Iterator[RabbitMQ]:
    """A RabbitMQ that closes a channel with a delivery that is unsettled for 2 s."""
    broker = rabbitmq_fault
    broker.eval("application:set_env(rabbit, consumer_timeout, 2000)")
    broker.eval("application:set_env(rabbit, channel_tick_interval, 500)")
    yield broker
    broker.eval("application:set_env(rabbit, consumer_timeout, 1800000)")
    broker.eval("application:set_env(rabbit, channel_tick_interval, 60000)")


def test_a_message_unsettled_for_too_long_is_told_of_and_costs_its_own_channel_alone(
    impatient_broker: RabbitMQ, amqp_url: str, queue_name: str
):
    """HAZARDS.md row 19: a warning first, then only this consumer's channel is rebuilt."""
    other_queue = f"{queue_name}-2"
    publish(amqp_url, queue_name, 1)
    publish(amqp_url, other_queue, 1)
    release = gevent.event.Event()
    late = Pooled(amqp_url, queue_name, lambda body, message: release.wait(30))
    other = Pooled(amqp_url, other_queue, lambda body, message: pause_for(1.0))
    say(late, concurrency=5)
    say(other, concurrency=5)
    say(late, settle_deadline=2.0)
    say(other, settle_deadline=2.0)
    runtime = Runtime(amqp_url)
    for consumer in (late, other):
        runtime.spawn(consumer)
    with observed(UnsettledTooLong) as told, observed(LinkDown) as lost, runtime:
        wait_until(lambda: told)
        assert late.ready_count == 1
        wait_until(lambda: late.ready_count == 2)
        release.set()
        wait_until(lambda: late.bodies.count(0) == 2)
        wait_until(lambda: impatient_broker.queue_counts(amqp_url, queue_name) == (0, 0, 1))
        assert (other.ready_count, other.bodies) == (1, [0])
    assert {event.consumer for event in told} == {"Pooled-1"}
    assert told[0].seconds < told[0].deadline == 2.0
    assert lost == []


# -- growth -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow(amqp_url: str, queue_name: str, caplog: pytest.LogCaptureFixture):
    """40,000 messages, of which a tenth fail and a hundredth take too long."""
    caplog.set_level(logging.CRITICAL, "greenconsume")  # pytest keeps every record
    count, step = 40_000, 10_000
    seen: Counter[int] = Counter()
    process, sizes = psutil.Process(), deque[int]()

    def handle(body: Any, _message: Any) -> None:
        seen["all"] += 1
        if body % 10 == 1:
            seen["failed"] += 1
            raise ValueError("no such thing")
        gevent.sleep(10 if body % 100 == 2 else 0)

    class Forgetful(Pooled):
        def on_task(self, body: Any, message: Any) -> None:
            handle(body, message)
            message.ack()

    consumer = Forgetful(amqp_url, queue_name)
    say(consumer, on_error=Reject(), handler_timeout=0.1)
    quiet = gevent.spawn(feed, amqp_url, queue_name, count, lambda: seen["all"])
    with consuming(consumer), counted(HandlerFailed) as failures:
        for done in range(step, count + 1, step):
            wait_until(lambda done=done: seen["all"] >= done, within=60)
            gc.collect()
            sizes.append(process.memory_info().rss)
        wait_until(lambda: queue_depth(amqp_url, queue_name) == 0)
    quiet.join()
    growth = [later - sizes[0] for later in sizes]
    print(f"{failures[0]} failures; growth of resident memory: {[g // 1024 for g in growth]} KiB")
    assert failures[0] >= count * 0.1
    # Less than 40 bytes a message; whatever is kept of a message, failed or not, is more than that.
    assert growth[-1] < 40 * (count - step)


def feed(url: str, queue: str, count: int, done: Callable[[], int]) -> None:
    """Keep some thousand messages in a queue."""
    for first in range(0, count, 2000):
        wait_until(lambda first=first: done() > first - 4000, within=60)
        publish(url, queue, list(range(first, first + 2000)))


@contextmanager
def counted(kind: type[Any]) -> Iterator[list[int]]:
    """As `observed`, but it keeps only how many."""
    count = [0]

    def observe(event: Any, /) -> None:
        count[0] += isinstance(event, kind)

    unsubscribe = subscribe(observe)
    try:
        yield count
    finally:
        unsubscribe()


def test_a_handler_runs_on_where_another_queue_of_its_consumer_is_deleted(
    amqp_url: str, queue_name: str
):
    """The link and its channel are well, so it settles its message, which does not come again."""
    gone = Queue(f"{queue_name}-gone")

    class Two(Pooled):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            more = Consumer([gone], callbacks=[self.on_task])
            return [*super().get_consumers(Consumer, channel), more]

    begun, go_on = gevent.event.Event(), gevent.event.Event()

    def handle(_body: Any, _message: Any) -> None:
        begun.set()
        go_on.wait()

    consumer = Two(amqp_url, queue_name, handle)
    publish(amqp_url, queue_name, 1)
    with consuming(consumer):
        assert begun.wait(SOON)
        with channel(amqp_url) as chan:
            chan.queue_delete(gone.name)
        pause_for(0.2)
        go_on.set()
        wait_until(lambda: consumer.ready_count == 2)
        publish(amqp_url, queue_name, [1])
        wait_until(lambda: 1 in consumer.bodies)
    assert consumer.bodies == [0, 1]
