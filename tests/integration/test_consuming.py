"""Consuming from a real broker as the mixins do it: limits, timeouts, order, channels, back-pressure."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from time import monotonic
from typing import Any

import kombu
import pytest
from gevent.event import Event
from kombu import Exchange, Producer, Queue

from greenconsume import Runtime
from greenconsume.events import ConsumerState
from tests.brokers import vhost_of
from tests.integration.consumers import (
    SOON,
    Plain,
    Recorder,
    channel_count,
    consuming,
    green_connection,
    pause_for,
)
from tests.messages import delete_queue, publish, queue_depth
from tests.waiting import wait_until

# -- limits and timeouts --------------------------------------------------------------------------


def test_on_iteration_is_called_every_safety_interval_while_idle(amqp_url, queue_name):
    consumer = Recorder(amqp_url, queue_name)
    ticks: list[float] = []
    consumer.on_iteration = lambda: ticks.append(monotonic())
    with pytest.raises(socket.timeout):
        list(consumer.consume(timeout=0.55, safety_interval=0.1))
    assert 4 <= len(ticks) <= 7


# -- a generator that is left early ---------------------------------------------------------------


def leave_by_close(messages: Any) -> None:
    next(messages)
    messages.close()


def leave_by_break(messages: Any) -> None:
    for _ in messages:
        break
    del messages  # the last reference, but for the caller's


def leave_by_error(messages: Any) -> None:
    next(messages)
    with pytest.raises(LookupError):
        messages.throw(LookupError)


@pytest.mark.parametrize("leave", [leave_by_close, leave_by_break, leave_by_error])
def test_consume_left_early_closes_its_connection(rabbitmq, amqp_url, queue_name, leave):
    publish(amqp_url, queue_name, 20)
    consumer = Recorder(amqp_url, queue_name)
    leave(consumer.consume())
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


def test_a_stop_leaves_the_contexts_in_kombus_order(amqp_url, queue_name):
    """An orderly end, not an error that passes through them."""
    calls: list[str] = []

    class Telling(Recorder):
        @contextmanager
        def extra_context(self, connection: Any, channel: Any) -> Iterator[None]:
            calls.append("entered")
            yield
            calls.append("left")

        def on_consume_end(self, *args: Any) -> None:
            calls.append("end")

    with consuming(Telling(amqp_url, queue_name)):
        assert calls == ["entered"]
    assert calls == ["entered", "left", "end"]


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
    """Its backlog stays bounded, it gets all of its messages, and its neighbour does not notice.

    What the broker had sent before it heard of the pause comes on top of the bound, a few megabytes of 24.
    """
    count, padding = 6000, "x" * 4000
    publish(amqp_url, queue_name, [[number, padding] for number in range(count)])
    backlogs: list[int] = []

    class Slow(Recorder):
        def on_consume_ready(self, connection: Any, *args: Any, **kwargs: Any) -> None:
            self.session = connection.connection

        def on_task(self, body: Any, message: Any) -> None:
            super().on_task(body, message)
            backlogs.append(self.session.backlog)
            if body[0] % 10 == 0:
                pause_for(0.001)

    queue = Queue(queue_name)
    neighbour = f"{queue_name}-neighbour"
    runtime = Runtime(amqp_url)
    [slow] = runtime.spawn(partial(Slow, queue=queue, **options))
    [other] = runtime.spawn(partial(Recorder, queue=neighbour))
    with runtime:
        publish(amqp_url, neighbour, 500)
        began = monotonic()
        other.consumer.wait_for(500, within=60)
        took = monotonic() - began
        assert len(slow.consumer.bodies) < count
        slow.consumer.wait_for(count, within=90)
    assert [number for number, _ in slow.consumer.bodies] == list(range(count))
    print(f"{options}: a backlog of {max(backlogs)} at the most")
    assert max(backlogs) < 4500
    assert took < 30.0


def test_a_paused_consumers_queue_does_not_expire(rabbitmq, amqp_url, queue_name):
    """HAZARDS row 39: where a policy has queues without consumers expire, nobody here can know of it."""
    count, padding = 6000, "x" * 500
    publish(amqp_url, queue_name, [[number, padding] for number in range(count)])
    go_on = Event()
    consumer = Recorder(amqp_url, queue_name, lambda *_: go_on.wait(SOON), prefetch_count=None)
    with consuming(consumer):
        wait_until(lambda: 0 < queue_depth(amqp_url, queue_name) < count - 500, SOON)
        rabbitmq.eval(
            f'rabbit_policy:parse_set(<<"{vhost_of(amqp_url)}">>, <<"expire">>, <<"^{queue_name}$">>, '
            '<<"{\\"expires\\": 500}">>, <<"0">>, <<"queues">>, <<"test">>)'
        )
        pause_for(1.5)  # its time is up
        go_on.set()
        consumer.wait_for(count, within=60)
        assert [number for number, _ in consumer.bodies] == list(range(count))
        assert consumer.ready_count == 1


def test_the_single_active_consumer_of_a_queue_is_not_paused(amqp_url, queue_name):
    """Another one would take over, and handle messages before those that this one has."""
    arguments = {"x-single-active-consumer": True}
    queue = Queue(queue_name, durable=False, queue_arguments=arguments)
    go_on = Event()
    active = Recorder(amqp_url, queue, lambda *_: go_on.wait(SOON), prefetch_count=None)
    with consuming(active), green_connection(amqp_url) as connection:
        other = Recorder(amqp_url, queue)
        with consuming(other):
            producer = Producer(connection.channel())
            for number in range(3000):
                producer.publish(number, routing_key=queue_name)
            wait_until(lambda: queue_depth(amqp_url, queue_name) == 0, SOON)
            go_on.set()
            active.wait_for(3000)
    assert (active.bodies, other.bodies) == (list(range(3000)), [])


def test_a_paused_consumer_whose_queue_is_deleted_comes_back(amqp_url, queue_name):
    publish(amqp_url, queue_name, 5000)
    go_on = Event()
    consumer = Recorder(amqp_url, queue_name, lambda *_: go_on.wait(SOON), no_ack=True)
    with consuming(consumer):
        wait_until(lambda: queue_depth(amqp_url, queue_name) < 4000)
        delete_queue(amqp_url, queue_name)
        go_on.set()
        wait_until(lambda: consumer.ready_count == 2, SOON)
        publish(amqp_url, queue_name, ["after"])
        wait_until(lambda: "after" in consumer.bodies)


# -- channels -------------------------------------------------------------------------------------


class OwnConsumers(Recorder):
    """Makes kombu consumers itself, on channels that it opens, with a prefetch each."""

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        client = channel.connection.client
        return [
            kombu.Consumer(
                client.channel(), [self.queue], callbacks=[self.on_task], prefetch_count=n
            )
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


def test_a_kombu_mixin_is_spawned_and_stops_at_once(amqp_url, queue_name):
    """kombu looks once a second."""
    times = []
    for _ in range(10):
        consumer = Plain(green_connection(amqp_url), queue_name)
        publish(amqp_url, queue_name, 3)
        with consuming(consumer) as [greenlet]:
            wait_until(lambda consumer=consumer: consumer.bodies == [0, 1, 2])
            began = monotonic()
            consumer.should_stop = True
            assert greenlet.join(SOON)
            times.append(monotonic() - began)
        assert isinstance(consumer, Plain)
    assert median(times) < 0.25


def test_kombu_mixins_share_the_links_of_a_runtime(rabbitmq, amqp_url, queue_name):
    runtime = Runtime(amqp_url)
    children = runtime.spawn(partial(Plain, queue=queue_name), replicas=20)
    with runtime:
        publish(amqp_url, queue_name, 200)
        wait_until(lambda: sum(len(c.consumer.bodies) for c in children) == 200)
        assert rabbitmq.connection_count(amqp_url) == 1
    assert all(child.state is ConsumerState.STOPPED for child in children)


# -- queues and links -----------------------------------------------------------------------------


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


def test_a_queue_that_the_broker_names_is_consumed_and_named_anew(proxy, queue_name):
    class Named(Recorder):
        def on_consume_ready(
            self, _connection: Any, _channel: Any, consumers: Any, **_: Any
        ) -> None:
            self.ready_count += 1
            [self.name] = [queue.name for queue in consumers[0].queues]

    consumer = Named(proxy.url, Queue("", exclusive=True))
    names = []
    with consuming(consumer), green_connection(proxy.url) as connection:
        for times in (1, 2):
            wait_until(lambda times=times: consumer.ready_count == times, SOON)
            names.append(consumer.name)
            Producer(connection).publish(times, routing_key=consumer.name, retry=True)
            consumer.wait_for(times)
            proxy.cut()
    assert consumer.bodies == [1, 2]
    assert names[0] != names[1]


def test_a_handler_cancels_its_own_consumer_and_consumes_again(amqp_url, queue_name):
    """What was prefetched goes back, and comes again."""

    class Pausing(Recorder):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            [self.consumer] = super().get_consumers(Consumer, channel)
            return [self.consumer]

        def on_task(self, body: Any, message: Any) -> None:
            if body % 10 == 0:
                self.consumer.cancel()
                self.consumer.consume()
            super().on_task(body, message)

    publish(amqp_url, queue_name, 50)
    consumer = Pausing(amqp_url, queue_name)
    with consuming(consumer):
        consumer.wait_for(50)
    assert sorted(consumer.bodies) == list(range(50))
    assert queue_depth(amqp_url, queue_name) == 0


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
