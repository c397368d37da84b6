"""Tests what the broker takes amiss on a channel: one consumer loses its channel, its neighbours nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any

import amqp
import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Consumer, Exchange, Producer, Queue, binding
from kombu.utils.limits import TokenBucket

from greenconsume import ConsumerOptions, RestartPolicy, Runtime, spawn
from greenconsume.errors import ConsumerRefusedError, LinkClosedError
from greenconsume.events import ConsumerState, HandlerClosedChannel, HandlerFailed, LinkDown
from tests.integration.consumers import (
    SOON,
    Recorder,
    channel_count,
    consuming,
    green_connection,
    observed,
    pause_for,
)
from tests.messages import declare, delete_queue, publish, queue_depth
from tests.waiting import AT_ONCE, NEVER, wait_until


class Neighbour(Recorder):
    """Handles a trickle of messages, and knows the longest time that it got none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times: list[float] = []

    def on_task(self, body: Any, message: Any) -> None:
        self.times.append(monotonic())
        super().on_task(body, message)

    def longest_gap(self) -> float:
        return max(
            later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)
        )


@contextmanager
def beside_a_neighbour(
    rabbitmq: Any, url: str, make: Callable[[Connection], Recorder], queue: str
) -> Iterator[Recorder]:
    """Run a consumer beside one that is busy, over the same link; the neighbour must not notice."""
    runtime = Runtime(url)
    [neighbour] = runtime.spawn(partial(Neighbour, queue=f"{queue}-neighbour"))
    [child] = runtime.spawn(make)
    over = Event()
    with observed(LinkDown) as lost, runtime, green_connection(url) as connection:
        trickling = gevent.spawn(trickle, connection, f"{queue}-neighbour", over)
        neighbour.consumer.wait_for(20)
        connections = rabbitmq.connection_count(url)
        yield child.consumer
        seen = len(neighbour.consumer.bodies)
        neighbour.consumer.wait_for(seen + 20)
        over.set()
        neighbour.consumer.wait_for(trickling.get(timeout=SOON))
        assert rabbitmq.connection_count(url) == connections
    assert lost == []
    assert neighbour.consumer.ready_count == 1
    assert neighbour.consumer.bodies == list(range(len(neighbour.consumer.bodies)))
    assert neighbour.consumer.longest_gap() < 0.5
    assert (child.restart_count, child.error) == (0, None)


def trickle(connection: Connection, queue: str, over: Event) -> int:
    producer = Producer(connection.channel())
    count = 0
    while not over.wait(0.005):
        producer.publish(count, routing_key=queue)
        count += 1
    return count


def ask_for_a_missing_queue(_body: Any, message: Any) -> None:
    message.channel.queue_declare("there-is-no-such-queue", passive=True)


def ack_twice(_body: Any, message: Any) -> None:
    message.channel.basic_ack(message.delivery_tag)
    message.channel.basic_ack(message.delivery_tag)


def declare_otherwise(_body: Any, message: Any) -> None:
    queue = message.delivery_info["routing_key"]
    message.channel.queue_declare(queue, durable=False, auto_delete=True)


@pytest.mark.parametrize("offend", [ask_for_a_missing_queue, ack_twice, declare_otherwise])
def test_a_channel_error_in_a_handler_restarts_that_consumer_alone(
    rabbitmq, amqp_url, queue_name, offend
):
    offended: list[Any] = []

    def handle(body: Any, message: Any) -> None:
        if not offended:
            offended.append(body)
            offend(body, message)

    make = partial(Recorder, queue=queue_name, handle=handle)
    with beside_a_neighbour(rabbitmq, amqp_url, make, queue_name) as consumer:
        publish(amqp_url, queue_name, 5)
        wait_until(lambda: consumer.ready_count == 2, SOON)
        publish(amqp_url, queue_name, ["later"])
        wait_until(lambda: "later" in consumer.bodies)
        assert {1, 2, 3, 4, "later"} <= set(consumer.bodies)
        assert (0 in consumer.bodies) or offend is ack_twice
        wait_until(lambda: channel_count(rabbitmq, amqp_url) == 3)
    assert queue_depth(amqp_url, queue_name) == 0


def handle_five_and_close(
    url: str, queue: str, concurrency: int | None, close: Callable[[Any], object]
) -> None:
    """Have a consumer handle five messages, the first of which closes something that it consumes over."""
    closed: list[Any] = []

    def handle(body: Any, message: Any) -> None:
        if not closed:
            closed.append(body)
            close(message)

    consumer = Recorder(url, queue, handle)
    consumer.options = ConsumerOptions(concurrency=concurrency)
    with consuming(consumer):
        publish(url, queue, 5)
        wait_until(lambda: consumer.ready_count == 2, SOON)
        wait_until(lambda: set(consumer.bodies) == set(range(5)), SOON)
        wait_until(lambda: queue_depth(url, queue) == 0, SOON)


def close_channel(message: Any) -> None:
    message.channel.close()


@pytest.mark.parametrize("concurrency", [None, 5])
def test_a_handler_that_closes_its_messages_channel_restarts_its_consumer(
    amqp_url, queue_name, caplog, concurrency
):
    """HAZARDS row 38: the consumer lived, and consumed nothing, for ever and without a word."""
    handle_five_and_close(amqp_url, queue_name, concurrency, close_channel)
    assert "closed the channel that its consumer consumes on" in caplog.text
    assert "Traceback" not in caplog.text


def close_session(message: Any) -> None:
    message.channel.connection.close()


def release_connection(message: Any) -> None:
    message.channel.connection.client.release()


@pytest.mark.parametrize("concurrency", [None, 5])
@pytest.mark.parametrize("close", [close_session, release_connection])
def test_a_handler_that_closes_its_messages_connection_is_told_of(
    amqp_url, queue_name, caplog, close, concurrency
):
    """Without a word, a handler that does so for each message would connect anew for each."""
    with observed(LinkDown) as lost:
        handle_five_and_close(amqp_url, queue_name, concurrency, close)
    assert "a handler, or a library that it uses, closed the c" in caplog.text
    assert "Traceback" not in caplog.text
    assert lost == []


def test_a_consumer_that_cancels_itself_is_seen_to_be_idle(amqp_url, queue_name, caplog):
    """It is its own wish, and it may consume again: from another greenlet, here."""

    class Pausing(Recorder):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            [self.consumer] = super().get_consumers(Consumer, channel)
            return [self.consumer]

        def on_task(self, body: Any, message: Any) -> None:
            super().on_task(body, message)
            if body == 0:
                self.consumer.cancel()

    consumer = Pausing(amqp_url, queue_name)
    with caplog.at_level("INFO"), consuming(consumer) as [greenlet]:
        publish(amqp_url, queue_name, 3)
        wait_until(lambda: greenlet.state is ConsumerState.IDLE, SOON)
        assert not greenlet.ready.is_set()
        assert "gets nothing until it consumes again" in caplog.text
        consumer.consumer.consume()
        wait_until(lambda: greenlet.state is ConsumerState.CONSUMING, SOON)
        assert consumer.wait_for(3) == [0, 1, 2]


def test_a_handler_that_has_the_broker_close_its_channel_is_named(amqp_url, queue_name, caplog):
    """HAZARDS row 38: with what to do instead."""
    offended: list[Any] = []

    def handle(body: Any, message: Any) -> None:
        if body == 3 and not offended:
            offended.append(body)
            ask_for_a_missing_queue(body, message)

    consumer = Recorder(amqp_url, queue_name, handle)
    with observed(HandlerClosedChannel) as found, consuming(consumer):
        publish(amqp_url, queue_name, 5)
        wait_until(lambda: set(consumer.bodies) == set(range(5)), SOON)
    [event] = found
    assert (event.routing_key, type(event.error)) == (queue_name, amqp.NotFound)
    assert "message.channel.connection.client.channel()" in caplog.text
    assert consumer.bodies[:3] == [0, 1, 2]  # their acks had gone out before
    assert not any(consumer.redelivered[:3])
    assert Counter(consumer.bodies)[0] == 1


def test_a_queue_that_is_deleted_under_its_consumer_is_declared_and_consumed_again(
    rabbitmq, amqp_url, queue_name
):
    make = partial(Recorder, queue=queue_name)
    with beside_a_neighbour(rabbitmq, amqp_url, make, queue_name) as consumer:
        publish(amqp_url, queue_name, ["before"])
        consumer.wait_for(1)
        delete_queue(amqp_url, queue_name)
        wait_until(lambda: consumer.ready_count == 2, SOON)
        publish(amqp_url, queue_name, ["after"])
        assert consumer.wait_for(2) == ["before", "after"]


def test_a_consumer_that_declares_nothing_waits_for_its_deleted_queue(amqp_url, queue_name):
    """It tries again and again, each try on a fresh channel, and consumes once there is a queue."""
    declare(amqp_url, queue_name)
    consumer = Recorder(amqp_url, Queue(queue_name, no_declare=True))
    with consuming(consumer) as [greenlet]:
        delete_queue(amqp_url, queue_name)
        wait_until(lambda: greenlet.state is ConsumerState.CONNECTING, SOON)
        declare(amqp_url, queue_name)
        wait_until(lambda: greenlet.state is ConsumerState.CONSUMING, SOON)
        publish(amqp_url, queue_name, ["after"])
        assert consumer.wait_for(1) == ["after"]


def test_a_consumer_that_waits_for_a_restart_token_stops_at_once(amqp_url, queue_name, caplog):
    class Rarely(Recorder):
        restart_limit = TokenBucket(1 / NEVER)

    greenlet = spawn(Rarely(amqp_url, Queue(queue_name, no_declare=True)))
    wait_until(lambda: "NOT_FOUND" in caplog.text)
    assert not greenlet.join(0.1)
    greenlet.stop()
    began = monotonic()
    assert greenlet.join(SOON)
    assert monotonic() - began < AT_ONCE


def test_one_deleted_queue_of_two_brings_the_whole_consumer_back(amqp_url, queue_name):
    other = f"{queue_name}-other"

    class Two(Recorder):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            queues = [self.queue, Queue(other)]
            return [Consumer([queue], callbacks=[self.on_task]) for queue in queues]

    consumer = Two(amqp_url, queue_name)
    with consuming(consumer):
        delete_queue(amqp_url, other)
        wait_until(lambda: consumer.ready_count == 2, SOON)
        publish(amqp_url, queue_name, ["one"])
        publish(amqp_url, other, ["other"])
        assert set(consumer.wait_for(2)) == {"one", "other"}


def test_a_refused_exclusive_consumer_takes_over_once_the_first_is_gone(amqp_url, queue_name):
    class Exclusive(Recorder):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            channel.basic_consume = partial(channel.basic_consume, exclusive=True)
            return super().get_consumers(Consumer, channel)

    runtime = Runtime(amqp_url)
    [bystander] = runtime.spawn(partial(Recorder, queue=f"{queue_name}-bystander"))
    with observed(LinkDown) as lost, runtime:
        [first] = runtime.spawn(partial(Exclusive, queue=queue_name))
        assert first.greenlet.ready.wait(SOON)
        [second] = runtime.spawn(partial(Exclusive, queue=queue_name))
        wait_until(lambda: second.state is ConsumerState.STANDBY, SOON)
        assert not second.greenlet.ready.wait(0.2)
        first.consumer.should_stop = True
        assert second.greenlet.ready.wait(SOON)
        publish(amqp_url, queue_name, ["for the second"])
        second.consumer.wait_for(1)
        assert bystander.consumer.ready_count == 1
    assert lost == []


class LockedOut(Recorder):
    """Declares an exclusive queue, as each of its replicas does over another link."""

    def __init__(self, broker: Any, queue: str) -> None:
        super().__init__(broker, Queue(queue, exclusive=True))


def test_a_start_returns_though_replicas_stand_by_for_an_exclusive_queue(
    amqp_url, queue_name, caplog
):
    """One replica consumes, the others are known to stand by; one takes over, and the log stays short."""
    runtime = Runtime(amqp_url, links=3)
    children = runtime.spawn(partial(LockedOut, queue=queue_name), replicas=3)
    with caplog.at_level("INFO", "greenconsume.consuming"), runtime:
        states = Counter(child.state for child in children)
        assert states == {ConsumerState.CONSUMING: 1, ConsumerState.STANDBY: 2}
        [first] = [child for child in children if child.state is ConsumerState.CONSUMING]
        pause_for(3.0)
        first.consumer.should_stop = True
        rest = [child for child in children if child is not first]
        wait_until(lambda: any(child.state is ConsumerState.CONSUMING for child in rest), SOON)
    lines = [record for record in caplog.records if record.name == "greenconsume.consuming"]
    assert len(lines) == 2
    assert all("leave out exclusive=True" in line.getMessage() for line in lines)
    assert not any(line.exc_info for line in lines)


def test_a_start_is_failed_by_a_queue_that_was_declared_otherwise(amqp_url, queue_name, caplog):
    declare(amqp_url, queue_name)
    runtime = Runtime(amqp_url)
    [sibling] = runtime.spawn(partial(Recorder, queue=f"{queue_name}-other"))
    runtime.spawn(partial(Recorder, queue=Queue(queue_name, durable=False)))
    with pytest.raises(ConsumerRefusedError, match=r"PRECONDITION_FAILED.*delete it"):
        runtime.start()
    assert not sibling.running
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("queue", "words"),
    [
        (Queue("amq.mine"), "reserved prefix.*give it another"),
        (
            Queue("q", queue_arguments={"x-message-ttl": "soon"}),
            "invalid arg.*correct the argument",
        ),
        (Queue("q", queue_arguments={"x-queue-type": "nope"}), "invalid arg.*correct the argument"),
        (Queue("q", bindings=[binding(Exchange(""), "key")]), "default exchange.*by its name"),
    ],
    ids=["reserved name", "bad argument", "unknown queue type", "default exchange"],
)
def test_a_start_is_failed_by_what_no_broker_takes(amqp_url, queue, words, caplog):
    runtime = Runtime(amqp_url)
    runtime.spawn(partial(Recorder, queue=queue))
    with pytest.raises(ConsumerRefusedError, match=words):
        runtime.start()
    assert "Traceback" not in caplog.text


@pytest.mark.by_broker
def test_a_start_is_failed_by_an_unknown_type_of_exchange(rabbitmq, amqp_url, queue_name):
    """RabbitMQ 4 closes the channel for it, and 3.10 the connection: that counts as a restart."""
    queue = Queue(queue_name, Exchange(queue_name, type="no-such-type"))
    runtime = Runtime(amqp_url, restart=RestartPolicy(max_restarts=1, backoff=0.1))
    runtime.spawn(partial(Recorder, queue=queue))
    refused = ConsumerRefusedError if rabbitmq.version >= (4,) else LinkClosedError
    with pytest.raises(refused, match=r"unknown exchange type.*correct the exchange's type"):
        runtime.start()


def test_a_queue_that_was_declared_otherwise_is_told_and_tried_again(amqp_url, queue_name, caplog):
    declare(amqp_url, queue_name)
    consumer = Recorder(amqp_url, Queue(queue_name, durable=False))
    greenlet = spawn(consumer)
    wait_until(lambda: "PRECONDITION_FAILED" in caplog.text, SOON)
    delete_queue(amqp_url, queue_name)
    assert greenlet.ready.wait(SOON)
    greenlet.stop()
    assert greenlet.join(SOON)
    assert "delete it once it is empty" in caplog.text
    assert "Traceback" not in caplog.text


def test_an_error_on_a_further_channel_does_not_end_the_consumer(amqp_url, queue_name):
    """It is raised where that channel is used, which opens itself again."""
    found: list[bool] = []

    class Looking(Recorder):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            self.aside = channel.connection.client.channel()
            return super().get_consumers(Consumer, channel)

        def on_task(self, body: Any, message: Any) -> None:
            try:
                self.aside.queue_declare(body, passive=True)
            except amqp.NotFound:
                found.append(False)
            else:
                found.append(True)
            super().on_task(body, message)

    consumer = Looking(amqp_url, queue_name)
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish(amqp_url, queue_name, ["missing", queue_name, "missing", queue_name])
        consumer.wait_for(4)
    assert found == [False, True, False, True]
    assert failures == []
    assert consumer.ready_count == 1


def test_the_brokers_delivery_timeout_costs_one_channel(rabbitmq, amqp_url, queue_name):
    """HAZARDS row 19: the broker closes the channel of a consumer that keeps a message for too long."""
    rabbitmq.eval("application:set_env(rabbit, consumer_timeout, 300)")
    rabbitmq.eval("application:set_env(rabbit, channel_tick_interval, 100)")
    try:
        timed_out = Event()

        def keep(_body: Any, message: Any) -> None:
            if not timed_out.is_set():
                wait_until(lambda: not message.channel.is_open, SOON)
                timed_out.set()

        make = partial(Recorder, queue=queue_name, handle=keep)
        with beside_a_neighbour(rabbitmq, amqp_url, make, queue_name) as consumer:
            publish(amqp_url, queue_name, ["slow"])
            consumer.wait_for(2)
            assert consumer.redelivered == [False, True]
            assert consumer.ready_count == 2
    finally:
        rabbitmq.eval("application:set_env(rabbit, consumer_timeout, 1800000)")
        rabbitmq.eval("application:set_env(rabbit, channel_tick_interval, 60000)")
    assert queue_depth(amqp_url, queue_name) == 0


def test_a_plain_kombu_consumer_is_told_that_its_queue_was_deleted(amqp_url, queue_name):
    with green_connection(amqp_url) as connection, connection.channel() as channel:
        with Consumer(channel, [Queue(queue_name)], callbacks=[print]):
            delete_queue(amqp_url, queue_name)
            with pytest.raises(amqp.ConsumerCancelled):
                connection.drain_events(timeout=SOON)
        assert connection.connected


def test_a_plain_channel_tells_its_error_once_and_opens_itself_again(amqp_url, queue_name):
    with green_connection(amqp_url) as connection, connection.channel() as channel:
        with pytest.raises(amqp.NotFound):
            channel.queue_declare(queue_name, passive=True)
        assert channel.queue_declare(queue_name).queue == queue_name
        channel.basic_ack(99)
        with pytest.raises(amqp.PreconditionFailed):
            wait_until(lambda: channel.basic_publish(amqp.Message("x"), routing_key=queue_name))
        assert channel.queue_declare(queue_name, passive=True).queue == queue_name
        assert connection.connected
