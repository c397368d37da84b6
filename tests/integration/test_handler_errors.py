"""Tests what a user's code raises, and what becomes of the message, on a real broker and on the others."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from typing import Any

import amqp
import gevent
import pytest
from gevent import GreenletExit
from kombu import Producer, Queue

from greenconsume import Reject, Requeue, Runtime
from greenconsume.events import ConnectFailed, HandlerFailed, LinkDown, LinkUp, StaleSettle
from greenconsume.handling.options import ConsumerOptions
from tests.integration.consumers import (
    SOON,
    Recorder,
    consuming,
    green_connection,
    observed,
    pause_for,
)
from tests.messages import channel, declare, publish, queue_depth
from tests.options import say
from tests.waiting import wait_until

ERRORS = [
    OSError,
    TimeoutError,
    ConnectionResetError,
    KeyError,
    ValueError,
    GreenletExit,
    SystemExit,
]


class FailsOnce:
    """A handler that raises for the first message it gets, and for no other."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind
        self.calls: list[tuple[float, Any]] = []

    def __call__(self, body: Any, _message: Any) -> None:
        self.calls.append((monotonic(), body))
        if len(self.calls) > 1:
            return
        if self.kind is SystemExit:
            sys.exit("the handler's own")
        raise self.kind("the handler's own")


class Failing(Recorder):
    """Fails once, and has its message again soon."""

    options = ConsumerOptions(on_error=Requeue(delay=0.1))


def put(url: str, queue: str, *bodies: Any) -> None:
    """Publish over whatever transport a URL names."""
    with green_connection(url) as connection, connection.channel() as chan:
        producer = Producer(chan)
        for body in bodies:
            producer.publish(body, routing_key=queue, declare=[Queue(queue)])


@pytest.fixture(params=["amqp", "memory", "redis"])
def broker_url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.mark.leaks_ok("kombu's redis transport leaves sockets to the garbage collector")
@pytest.mark.parametrize("kind", ERRORS)
def test_a_handlers_error_costs_its_message_a_delay_and_nothing_else(
    broker_url, queue_name, caplog, kind
):
    """HAZARDS row 11."""
    caplog.set_level(logging.INFO)
    handle = FailsOnce(kind)
    runtime = Runtime(broker_url)
    [failing] = runtime.spawn(partial(Failing, queue=queue_name, handle=handle))
    [neighbour] = runtime.spawn(partial(Recorder, queue=f"{queue_name}-neighbour"))
    with observed(HandlerFailed) as failures, observed(LinkUp) as links, runtime:
        before = len(links)
        put(broker_url, queue_name, "poison")
        put(broker_url, f"{queue_name}-neighbour", *range(20))
        failing.consumer.wait_for(1)
        neighbour.consumer.wait_for(20)
        opened = links[before:]
    assert [body for _, body in handle.calls] == ["poison", "poison"]
    assert handle.calls[1][0] - handle.calls[0][0] > 0.09
    assert [(type(f.error), f.outcome) for f in failures] == [(kind, "requeued in 0.1 s")]
    assert (failing.consumer.ready_count, neighbour.consumer.ready_count) == (1, 1)
    assert (failing.restart_count, failing.error) == (0, None)
    assert len(opened) == 2 * broker_url.startswith(("amqp", "redis"))  # those of put()
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    told = [record for record in told if "polled" not in record.getMessage()]
    assert [record.name for record in told] == ["greenconsume.handling"]
    assert told[0].exc_info[1] is failures[0].error
    assert "poison" not in caplog.text


@pytest.mark.parametrize("kind", [OSError, KeyError, GreenletExit])
def test_an_error_in_on_message_meets_the_same_policy(amqp_url, queue_name, kind):
    class Low(Failing):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return [Consumer([self.queue], on_message=self.on_message)]

        def on_message(self, message: Any) -> None:
            self.on_task(message.payload, message)

    consumer = Low(amqp_url, queue_name, FailsOnce(kind))
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish(amqp_url, queue_name, ["again"])
        assert consumer.wait_for(1) == ["again"]
    assert [type(failure.error) for failure in failures] == [kind]


# -- bodies that cannot be decoded ----------------------------------------------------------------


def publish_garbage(url: str, queue: str, content_type: str = "application/json") -> None:
    declare(url, queue)
    with channel(url) as chan:
        message = amqp.Message(b"{no json", content_type=content_type, content_encoding="utf-8")
        chan.basic_publish(message, routing_key=queue)


@pytest.mark.parametrize("kind", [OSError, TimeoutError, ValueError, GreenletExit])
def test_an_error_in_on_decode_error_meets_the_policy(amqp_url, queue_name, kind):
    seen: list[Exception] = []

    class Undecided(Failing):
        def on_decode_error(self, message: Any, exc: Exception) -> None:
            seen.append(exc)
            if len(seen) == 1:
                raise kind
            message.ack()

    consumer = Undecided(amqp_url, queue_name)
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish_garbage(amqp_url, queue_name)
        publish(amqp_url, queue_name, ["good"])
        wait_until(lambda: len(seen) == 2)
        assert consumer.wait_for(1) == ["good"]
    assert [type(failure.error) for failure in failures] == [kind]
    assert consumer.ready_count == 1
    assert queue_depth(amqp_url, queue_name) == 0


@pytest.mark.parametrize("content_type", ["application/json", "application/x-python-serialize"])
def test_a_body_that_cannot_be_read_is_logged_and_acked(amqp_url, queue_name, caplog, content_type):
    consumer = Recorder(amqp_url, queue_name)
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish_garbage(amqp_url, queue_name, content_type)
        publish(amqp_url, queue_name, ["good"])
        assert consumer.wait_for(1) == ["good"]
    assert failures == []
    assert caplog.text.count("Can't decode message body") == 1
    assert queue_depth(amqp_url, queue_name) == 0


# -- policies -------------------------------------------------------------------------------------


def failing(kind: type[BaseException] = LookupError) -> Callable[[Any, Any], None]:
    def handle(_body: Any, _message: Any) -> None:
        raise kind

    return handle


def test_a_rejected_message_goes_to_the_dead_letter_exchange(amqp_url, queue_name):
    dead = f"{queue_name}-dead"
    declare(amqp_url, dead)
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
    queue = Queue(queue_name, queue_arguments=arguments)

    class Rejecting(Recorder):
        options = ConsumerOptions(on_error=Reject())

    with observed(HandlerFailed) as failures, consuming(Rejecting(amqp_url, queue, failing())):
        publish(amqp_url, queue_name, 3)
        wait_until(lambda: queue_depth(amqp_url, dead) == 3)
    assert {failure.outcome for failure in failures} == {"rejected"}
    assert queue_depth(amqp_url, queue_name) == 0


def test_without_a_delay_the_message_is_back_at_once(amqp_url, queue_name):
    class AtOnce(Recorder):
        options = ConsumerOptions(on_error=Requeue(delay=0))

    consumer = AtOnce(amqp_url, queue_name, FailsOnce(OSError))
    with consuming(consumer):
        publish(amqp_url, queue_name, ["again"])
        assert consumer.wait_for(1) == ["again"]
    assert consumer.redelivered == [False, True]


def test_others_are_handled_while_a_failed_message_waits(amqp_url, queue_name):
    handle = FailsOnce(OSError)
    consumer = Recorder(amqp_url, queue_name, handle)
    say(consumer, on_error=Requeue(delay=0.3))
    with consuming(consumer):
        publish(amqp_url, queue_name, 5)
        consumer.wait_for(5)
    assert consumer.bodies == [1, 2, 3, 4, 0]
    assert handle.calls[-1][0] - handle.calls[0][0] > 0.29


def test_a_stop_gives_a_waiting_message_back_at_once(rabbitmq, amqp_url, queue_name):
    consumer = Recorder(amqp_url, queue_name, failing())
    say(consumer, on_error=Requeue(delay=60))
    with observed(HandlerFailed) as failures, consuming(consumer) as [greenlet]:
        publish(amqp_url, queue_name, 1)
        wait_until(lambda: failures)
        assert rabbitmq.queue_counts(amqp_url, queue_name) == (0, 1, 1)
        greenlet.stop()
        assert greenlet.join(30)
    assert rabbitmq.queue_counts(amqp_url, queue_name) == (1, 0, 0)


def test_a_message_whose_link_is_lost_while_it_waits_is_left_to_the_broker(proxy, queue_name):
    handle = FailsOnce(OSError)
    consumer = Recorder(proxy.url, queue_name, handle)
    say(consumer, on_error=Requeue(delay=0.5))
    with observed(StaleSettle) as stale, consuming(consumer):
        publish(proxy.url, queue_name, ["again"])
        wait_until(lambda: handle.calls)
        proxy.cut()
        consumer.wait_for(1)
        wait_until(lambda: monotonic() - handle.calls[0][0] > 0.6)
    assert len(handle.calls) == 2
    assert stale == []


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue"])
def test_a_message_that_its_handler_settled_is_left_alone(amqp_url, queue_name, settle):
    calls: list[bool] = []

    def handle(_body: Any, message: Any) -> None:
        calls.append(message.delivery_info["redelivered"])
        if len(calls) == 1:
            getattr(message, settle)()
            raise OSError

    consumer = Recorder(amqp_url, queue_name, handle)
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish(amqp_url, queue_name, ["settled"])
        wait_until(lambda: failures)
        publish(amqp_url, queue_name, ["next"])
        wait_until(lambda: "next" in consumer.bodies)
    assert [failure.outcome for failure in failures] == ["left as the handler settled it"]
    assert calls == ([False, True, False] if settle == "requeue" else [False, False])


def test_acking_twice_is_the_handlers_error_and_no_channels(amqp_url, queue_name):
    def handle(_body: Any, message: Any) -> None:
        message.ack()
        message.ack()

    consumer = Recorder(amqp_url, queue_name, handle)
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish(amqp_url, queue_name, 3)
        wait_until(lambda: len(failures) == 3)
    assert consumer.ready_count == 1
    assert queue_depth(amqp_url, queue_name) == 0


def test_a_failed_message_that_nobody_acks_is_told_to_be_lost(amqp_url, queue_name):
    consumer = Recorder(amqp_url, queue_name, FailsOnce(OSError), no_ack=True)
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish(amqp_url, queue_name, 3)
        assert consumer.wait_for(2) == [1, 2]
    assert [f.outcome for f in failures] == [
        "lost: its consumer takes messages without acknowledging them"
    ]


def test_a_message_that_is_not_settled_by_a_handler_that_returns_stays_so(
    rabbitmq, amqp_url, queue_name
):
    """As in kombu: the handler may settle it later, from another greenlet."""
    held: list[Any] = []

    class Holding(Recorder):
        def on_task(self, body: Any, message: Any) -> None:
            held.append(message)

    with consuming(Holding(amqp_url, queue_name)):
        publish(amqp_url, queue_name, 3)
        wait_until(lambda: len(held) == 3)
        assert rabbitmq.queue_counts(amqp_url, queue_name) == (0, 3, 1)
        gevent.joinall([gevent.spawn(message.ack) for message in held], raise_error=True)
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (0, 0, 1))


def test_a_poison_message_does_not_spin(amqp_url, queue_name):
    consumer = Recorder(amqp_url, queue_name, failing(ConnectionResetError))
    say(consumer, on_error=Requeue(delay=0.1))
    with observed(HandlerFailed) as failures, consuming(consumer):
        publish(amqp_url, queue_name, 1)
        began = monotonic()
        wait_until(lambda: len(failures) == 4)
        assert monotonic() - began > 0.27
    assert consumer.ready_count == 1


# -- a greenlet of somebody else's ----------------------------------------------------------------


def run_to_its_end(messages: Iterator[None]) -> None:
    for _ in messages:
        pass


def test_a_timeout_around_consume_is_not_the_handlers(rabbitmq, amqp_url, queue_name):
    """HAZARDS row 1: it ends the consumer, whose connection is closed in order."""
    consumer = Recorder(amqp_url, queue_name, lambda *_: pause_for(SOON))
    publish(amqp_url, queue_name, 3)
    with observed(HandlerFailed) as failures, pytest.raises(gevent.Timeout):
        with gevent.Timeout(0.2):
            run_to_its_end(consumer.consume())
    assert failures == []
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (3, 0, 0))
    assert rabbitmq.connection_count(amqp_url) == 0


def test_a_kill_of_a_foreign_greenlet_is_not_the_handlers(rabbitmq, amqp_url, queue_name):
    begun: list[Any] = []

    def handle(body: Any, _message: Any) -> None:
        begun.append(body)
        pause_for(SOON)

    publish(amqp_url, queue_name, 3)
    greenlet = gevent.spawn(Recorder(amqp_url, queue_name, handle).run)
    wait_until(lambda: begun)
    with observed(HandlerFailed) as failures:
        greenlet.kill(timeout=SOON)
    assert greenlet.ready()
    assert failures == []
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (3, 0, 0))


def test_no_error_of_a_handler_is_an_error_of_the_link(amqp_url, queue_name):
    handle = FailsOnce(ConnectionResetError)
    consumer = Failing(amqp_url, queue_name, handle)
    with observed(LinkDown) as lost, observed(ConnectFailed) as failed, consuming(consumer):
        publish(amqp_url, queue_name, 10)
        assert sorted(consumer.wait_for(10)) == list(range(10))
    assert (lost, failed) == ([], [])
