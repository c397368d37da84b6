"""Consumers that publish: over links of their own, and however their handlers meet a stop."""

from __future__ import annotations

from functools import partial
from typing import Any

import gevent
from gevent.event import Event
from kombu import Producer, Queue
from kombu import mixins as kombu_mixins

from greenconsume import Runtime, spawn
from greenconsume.events import HandlerFailed, LinkUp
from tests.integration.consumers import (
    SOON,
    Answerer,
    Recorder,
    consuming,
    green_connection,
    observed,
)
from tests.messages import declare, queue_depth
from tests.waiting import wait_until


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


def test_a_kombu_producer_mixin_publishes_over_a_link_of_its_own(rabbitmq, amqp_url, queue_name):
    answers = f"{queue_name}-answers"
    declare(amqp_url, answers)
    with consuming(PlainAnswerer(green_connection(amqp_url), queue_name)):
        ask(amqp_url, queue_name, answers, range(10))
        wait_until(lambda: queue_depth(amqp_url, answers) == 10)
        wait_until(lambda: rabbitmq.connection_count(amqp_url) == 2)
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


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


class Late(Answerer):
    """Publishes for the first time when it is let, which is after a stop."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begun, self.go_on = Event(), Event()

    def on_request(self, body: Any, message: Any) -> None:
        self.begun.set()
        assert self.go_on.wait(SOON)
        super().on_request(body, message)


def test_a_handler_that_finishes_after_a_stop_still_publishes(amqp_url, queue_name):
    """HAZARDS row 12: else its work is done again."""
    answers = f"{queue_name}-answers"
    declare(amqp_url, answers)
    consumer = Late(amqp_url, queue_name)
    with observed(HandlerFailed) as failures, consuming(consumer) as [greenlet]:
        ask(amqp_url, queue_name, answers, [1])
        assert consumer.begun.wait(SOON)
        consumer.should_stop = True
        consumer.go_on.set()
        assert greenlet.join(SOON)
    assert failures == []
    assert (queue_depth(amqp_url, queue_name), queue_depth(amqp_url, answers)) == (0, 1)


def test_greenlets_of_one_consumer_share_its_producers_link(rabbitmq, amqp_url, queue_name):
    answers = f"{queue_name}-answers"
    declare(amqp_url, answers)

    class Scattering(Answerer):
        def answer(self, body: Any, message: Any) -> None:
            answer = super().answer
            greenlets = [gevent.spawn(answer, n, message) for n in range(20)]
            gevent.joinall(greenlets, raise_error=True)

    with consuming(Scattering(amqp_url, queue_name)):
        ask(amqp_url, queue_name, answers, [1])
        wait_until(lambda: queue_depth(amqp_url, answers) == 20)
        wait_until(lambda: rabbitmq.connection_count(amqp_url) == 2)


def test_a_stop_reaches_a_handler_that_waits_for_its_lost_producer(proxy, queue_name):
    """HAZARDS row 3: kombu would try again until the broker is back."""
    declare(proxy.url, f"{queue_name}-answers")

    class CutOff(Answerer):
        def answer(self, body: Any, message: Any) -> None:
            super().answer(body, message)
            connection = self.producer_connection
            proxy.refuse()
            proxy.cut()
            wait_until(lambda: not connection.connected)
            super().answer(body, message)

    consumer = CutOff(proxy.url, queue_name)
    with consuming(consumer) as [greenlet]:
        ask(proxy.url, queue_name, f"{queue_name}-answers", [1])
        wait_until(lambda: consumer.answered_count == 1 and proxy.open_count == 0)
        consumer.should_stop = True
        assert greenlet.join(30)
