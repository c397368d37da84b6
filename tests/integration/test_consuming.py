"""Consuming from a real broker as the mixins do it: limits, timeouts, order, channels, back-pressure."""

from __future__ import annotations

import socket
from functools import partial
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Exchange, Producer, Queue
from kombu import mixins as kombu_mixins

from greenconsume import Runtime, spawn
from greenconsume.events import ConsumerState, LinkUp
from tests.integration.consumers import (
    SOON,
    Answerer,
    Recorder,
    channel_count,
    consuming,
    green_connection,
    observed,
)
from tests.messages import declare, publish, queue_depth
from tests.waiting import wait_until

# -- limits and timeouts --------------------------------------------------------------------------


def test_limit_counts_messages_and_not_idle_ticks(amqp_url, queue_name):
    """HAZARDS row 25."""
    consumer = Recorder(amqp_url, queue_name)
    ticks: list[None] = []
    consumer.on_iteration = lambda: ticks.append(None)

    def consume() -> list[None]:
        return list(consumer.consume(limit=3, safety_interval=0.01))

    greenlet = gevent.spawn(consume)
    wait_until(lambda: len(ticks) > 5)
    publish(amqp_url, queue_name, 5)
    assert len(greenlet.get(timeout=SOON)) == 3
    assert consumer.bodies == [0, 1, 2]
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 2)


def test_timeout_is_idle_time_that_is_not_rounded_up(amqp_url, queue_name):
    """HAZARDS row 25."""
    consumer = Recorder(amqp_url, queue_name)
    publish(amqp_url, queue_name, 2)
    began = monotonic()
    with pytest.raises(socket.timeout):
        for _ in consumer.consume(timeout=0.3):
            began = monotonic()
    assert 0.3 <= monotonic() - began < 0.6
    assert consumer.bodies == [0, 1]


def test_heartbeats_do_not_put_a_timeout_off(amqp_url, queue_name):
    """HAZARDS row 4: with heartbeat=1 the broker sends two in the time of the wait."""
    consumer = Recorder(green_connection(amqp_url, heartbeat=1), queue_name)
    began = monotonic()
    with pytest.raises(socket.timeout):
        for _ in consumer.consume(timeout=1.3, safety_interval=60):
            pass
    assert 1.3 <= monotonic() - began < 1.8


def test_messages_that_keep_coming_put_a_timeout_off(amqp_url, queue_name):
    consumer = Recorder(amqp_url, queue_name)
    publish(amqp_url, queue_name, 1)
    with green_connection(amqp_url) as connection:
        producer = Producer(connection.channel())
        with pytest.raises(socket.timeout):
            for count, _ in enumerate(consumer.consume(timeout=0.2), 2):
                if count <= 6:
                    gevent.spawn_later(0.1, producer.publish, count, routing_key=queue_name)
    assert consumer.bodies == [0, 2, 3, 4, 5, 6]


def test_on_iteration_is_called_every_safety_interval_while_idle(amqp_url, queue_name):
    consumer = Recorder(amqp_url, queue_name)
    ticks: list[float] = []
    consumer.on_iteration = lambda: ticks.append(monotonic())
    with pytest.raises(socket.timeout):
        list(consumer.consume(timeout=0.55, safety_interval=0.1))
    assert 4 <= len(ticks) <= 7


# -- a generator that is left early ---------------------------------------------------------------


def unacknowledged(url: str, queue: str) -> Recorder:
    return Recorder(url, queue, lambda _, message: setattr(message, "_state", "ACK"))


@pytest.mark.parametrize("leave", ["break", "close", "raise"])
def test_consume_left_early_closes_its_connection(rabbitmq, amqp_url, queue_name, leave):
    publish(amqp_url, queue_name, 20)
    consumer = Recorder(amqp_url, queue_name)
    messages = consumer.consume()
    try:
        for _ in messages:
            if leave == "raise":
                raise LookupError
            break
    except LookupError:
        messages = messages.throw(LookupError) if leave == "never" else messages
    assert rabbitmq.connection_count(amqp_url) == 1
    messages.close()
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
    assert rabbitmq.queue_counts(amqp_url, queue_name) == (19, 0, 0)
    assert consumer.bodies == [0]


# -- what a message meets -------------------------------------------------------------------------


def test_one_consumer_handles_a_queue_in_its_order(amqp_url, queue_name):
    publish(amqp_url, queue_name, 3000)
    consumer = Recorder(amqp_url, queue_name, prefetch_count=50)
    with consuming(consumer):
        assert consumer.wait_for(3000) == list(range(3000))
    assert not any(consumer.redelivered)


def test_several_queues_and_consumers_of_one_mixin_are_all_served(amqp_url, queue_name):
    names = [f"{queue_name}-{n}" for n in range(6)]
    seen: list[tuple[str, Any]] = []

    class Many(Recorder):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return [
                Consumer([Queue(one), Queue(other)], callbacks=[partial(self.note, one)])
                for one, other in zip(names[::2], names[1::2], strict=True)
            ]

        def note(self, name: str, body: Any, message: Any) -> None:
            seen.append((name, body))
            message.ack()

    for name in names:
        publish(amqp_url, name, [name])
    with consuming(Many(amqp_url, queue_name)):
        wait_until(lambda: len(seen) == 6)
    assert {body for _, body in seen} == set(names)
    assert {name for name, _ in seen} == set(names[::2])


def test_the_hooks_are_called_in_kombus_order(amqp_url, queue_name):
    calls: list[str] = []

    class Telling(Recorder):
        def on_connection_revived(self) -> None:
            calls.append("revived")

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            calls.append("get_consumers")
            return super().get_consumers(Consumer, channel)

        def on_consume_ready(self, *args: Any, **kwargs: Any) -> None:
            calls.append(f"ready {kwargs}")

        def on_task(self, body: Any, message: Any) -> None:
            calls.append("message")
            message.ack()

        def on_consume_end(self, *args: Any) -> None:
            calls.append("end")

    publish(amqp_url, queue_name, 1)
    for _ in Telling(amqp_url, queue_name).consume(limit=1, colour="green"):
        calls.append("yield")
    ready = "ready {'colour': 'green'}"
    assert calls == ["revived", "get_consumers", ready, "message", "yield", "end"]


def test_a_message_that_arrives_with_its_consume_ok_is_handled(amqp_url, queue_name):
    """py-amqp rejects it for good; a queue that is full already makes that likely."""
    publish(amqp_url, queue_name, 200)
    handled: list[int] = []
    for _ in range(20):
        consumer = Recorder(amqp_url, queue_name, prefetch_count=1)
        list(consumer.consume(limit=5))
        handled += consumer.bodies
    assert handled == list(range(100))
    assert queue_depth(amqp_url, queue_name) == 100


# -- consumers that nothing bounds ----------------------------------------------------------------


@pytest.mark.parametrize("options", [{"no_ack": True}, {"prefetch_count": None}])
def test_an_unbounded_consumer_that_falls_behind_is_paused(amqp_url, queue_name, options):
    """Its backlog stays bounded, it gets all of its messages, and its neighbour does not notice."""
    declare(amqp_url, queue_name)
    publish(amqp_url, queue_name, 20_000)
    backlogs: list[int] = []

    class Slow(Recorder):
        def on_consume_ready(self, connection: Any, *args: Any, **kwargs: Any) -> None:
            self.session = connection.connection

        def on_task(self, body: Any, message: Any) -> None:
            super().on_task(body, message)
            backlogs.append(self.session.backlog)
            if body % 20 == 0:
                gevent.sleep(0.001)

    queue = Queue(queue_name)
    neighbour = f"{queue_name}-neighbour"
    runtime = Runtime(amqp_url)
    [slow] = runtime.spawn(partial(Slow, queue=queue, **options))
    [other] = runtime.spawn(partial(Recorder, queue=neighbour))
    with runtime:
        publish(amqp_url, neighbour, 500)
        began = monotonic()
        other.consumer.wait_for(500)
        took = monotonic() - began
        assert len(slow.consumer.bodies) < 20_000
        slow.consumer.wait_for(20_000, within=60)
    assert slow.consumer.bodies == list(range(20_000))
    assert max(backlogs) < 5000
    assert took < 5.0


# -- channels -------------------------------------------------------------------------------------


class Channelled(Recorder):
    """Consumes on three channels: its own, and two that it opens."""

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        client = channel.connection.client
        others = [client.channel(), client.channel()]
        return [
            Consumer([self.queue], callbacks=[self.on_task], prefetch_count=1),
            *(Consumer([self.queue], callbacks=[self.on_task], channel=one) for one in others),
        ]


class OwnConsumers(Recorder):
    """Makes kombu consumers itself, on channels that it opens, with a prefetch each."""

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        from kombu import Consumer as KombuConsumer

        client = channel.connection.client
        return [
            KombuConsumer(client.channel(), [self.queue], callbacks=[self.on_task], prefetch_count=n)
            for n in (1, 5, 20)
        ]


def test_further_channels_live_and_die_with_the_consumer(rabbitmq, amqp_url, queue_name):
    runtime = Runtime(amqp_url)
    [staying] = runtime.spawn(partial(Recorder, queue=f"{queue_name}-staying"))
    [leaving] = runtime.spawn(partial(OwnConsumers, queue=queue_name))
    with runtime:
        wait_until(lambda: channel_count(rabbitmq, amqp_url) == 5)
        publish(amqp_url, queue_name, 300)
        assert sorted(leaving.consumer.wait_for(300)) == list(range(300))
        leaving.consumer.should_stop = True
        assert leaving.greenlet.join(SOON)
        assert channel_count(rabbitmq, amqp_url) == 1
        assert rabbitmq.connection_count(amqp_url) == 1
        assert staying.state is ConsumerState.CONSUMING
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


# -- consumers that were written for kombu --------------------------------------------------------


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


class PlainAnswerer(kombu_mixins.ConsumerProducerMixin):
    """A consumer that publishes, as written for kombu."""

    def __init__(self, connection: Any, queue: str) -> None:
        self.connection = connection
        self.queue = queue

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([Queue(self.queue)], on_message=self.on_message, prefetch_count=5)]

    def on_message(self, message: Any) -> None:
        reply_to = message.properties["reply_to"]
        self.producer.publish(message.payload, exchange="", routing_key=reply_to)
        message.ack()


def test_a_kombu_mixin_is_spawned_and_stops_at_once(amqp_url, queue_name):
    consumer = Plain(green_connection(amqp_url), queue_name)
    publish(amqp_url, queue_name, 3)
    with consuming(consumer) as [greenlet]:
        wait_until(lambda: consumer.bodies == [0, 1, 2])
        consumer.should_stop = True
        assert greenlet.join(0.5)
    assert isinstance(consumer, Plain)


def test_kombu_mixins_share_the_links_of_a_runtime(rabbitmq, amqp_url, queue_name):
    runtime = Runtime(amqp_url)
    children = runtime.spawn(partial(Plain, queue=queue_name), replicas=20)
    with runtime:
        publish(amqp_url, queue_name, 200)
        wait_until(lambda: sum(len(c.consumer.bodies) for c in children) == 200)
        assert rabbitmq.connection_count(amqp_url) == 1
    assert all(child.state is ConsumerState.STOPPED for child in children)


def test_a_kombu_producer_mixin_publishes_over_a_link_of_its_own(rabbitmq, amqp_url, queue_name):
    answers = f"{queue_name}-answers"
    declare(amqp_url, answers)
    with consuming(PlainAnswerer(green_connection(amqp_url), queue_name)):
        ask(amqp_url, queue_name, answers, range(10))
        wait_until(lambda: queue_depth(amqp_url, answers) == 10)
        wait_until(lambda: rabbitmq.connection_count(amqp_url) == 2)
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


# -- consumers that publish -----------------------------------------------------------------------


def ask(url: str, queue: str, answers: str, questions: Any) -> None:
    with green_connection(url) as connection:
        producer = Producer(connection)
        for n in questions:
            producer.publish(n, routing_key=queue, reply_to=answers, correlation_id=str(n))


def test_a_question_is_answered_and_correlated(amqp_url, queue_name):
    answers = f"{queue_name}-answers"
    seen: dict[str, Any] = {}

    def note(body: Any, message: Any) -> None:
        seen[message.properties["correlation_id"]] = body["answer"]

    with consuming(Answerer(amqp_url, queue_name), Recorder(amqp_url, answers, note)):
        ask(amqp_url, queue_name, answers, range(100))
        wait_until(lambda: len(seen) == 100)
    assert seen == {str(n): n for n in range(100)}


def test_a_hundred_producing_consumers_share_one_publishing_link(rabbitmq, amqp_url, queue_name):
    """Law 6: no link both consumes and publishes."""
    answers = f"{queue_name}-answers"
    declare(amqp_url, answers)
    runtime = Runtime(amqp_url)
    children = runtime.spawn(partial(Answerer, queue=queue_name), replicas=100)
    with observed(LinkUp) as links, runtime:
        ask(amqp_url, queue_name, answers, range(2000))
        wait_until(lambda: queue_depth(amqp_url, answers) == 2000, SOON)
        assert sum(child.consumer.answered_count > 0 for child in children) > 50
        wait_until(lambda: rabbitmq.connection_count(amqp_url) == 2)
    assert len(links) == 3  # consuming, publishing, and the one that asked
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


def test_a_producing_consumer_that_fails_for_good_leaves_no_link(rabbitmq, amqp_url, queue_name):
    class Failing(Answerer):
        def on_iteration(self) -> None:
            if self.answered_count:
                raise LookupError("not the broker's error")

    answers = f"{queue_name}-answers"
    declare(amqp_url, answers)
    greenlet = spawn(Failing(amqp_url, queue_name))
    assert greenlet.ready.wait(SOON)
    ask(amqp_url, queue_name, answers, [1])
    assert greenlet.join(SOON)
    assert isinstance(greenlet.exception, LookupError)
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


def test_consumers_declare_what_they_consume(amqp_url, queue_name):
    exchange = Exchange(f"{queue_name}-x", "topic", durable=False)
    queue = Queue(queue_name, exchange, "orders.#", durable=False)
    consumer = Recorder(amqp_url, queue)
    with consuming(consumer), green_connection(amqp_url) as connection:
        producer = Producer(connection, exchange)
        for key in ("orders.new", "stock.new", "orders.old.again"):
            producer.publish(key, routing_key=key)
        consumer.wait_for(2)
    assert consumer.bodies == ["orders.new", "orders.old.again"]


def test_a_handler_may_wait_for_another_message_of_its_consumers_link(amqp_url, queue_name):
    """Two consumers of one link, of which one waits for what the other does."""
    done = Event()
    first = partial(Recorder, queue=f"{queue_name}-1", handle=lambda *_: done.wait(SOON))
    second = partial(Recorder, queue=f"{queue_name}-2", handle=lambda *_: done.set())
    runtime = Runtime(amqp_url)
    [waiting], [_acting] = runtime.spawn(first), runtime.spawn(second)
    with runtime:
        publish(amqp_url, f"{queue_name}-1", 1)
        publish(amqp_url, f"{queue_name}-2", 1)
        waiting.consumer.wait_for(1)
