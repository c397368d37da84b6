"""Tests what drains, lost links and kills cost on a queue that counts: no message, handled or not."""

from __future__ import annotations

from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Queue

from greenconsume import DeadLetters, Requeue
from greenconsume.events import LinkDown, MessageRenewed
from greenconsume.failures import message_copy, renewals
from tests.integration.consumers import SOON, Recorder, consuming, observed
from tests.messages import publish, queue_depth
from tests.options import say
from tests.waiting import wait_until

COUNT = 40
LIMIT = 4
QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": LIMIT}


class Busy(Recorder):
    """Waits in its first message until it is told to go on; then handles everything."""

    def __init__(self, broker: Any, queue: str) -> None:
        super().__init__(
            broker, Queue(queue, queue_arguments=QUORUM), self.work, prefetch_count=100
        )
        say(self, drain_timeout=0.0, cancel_timeout=1.0)
        self.going = Event()
        self.addresses: set[tuple[str, str]] = set()

    def work(self, body: Any, message: Any) -> None:
        info = message.delivery_info
        self.addresses.add((info["exchange"], info["routing_key"]))
        self.going.wait()


def all_taken(rabbitmq: Any, url: str, queue: str) -> None:
    """Wait until a consumer has every message of a queue; one whose copy was cut off may be there twice."""

    def taken() -> bool:
        counts = rabbitmq.queue_counts(url, queue)
        return counts.ready == 0 and counts.unacked >= COUNT

    wait_until(taken, SOON, "all are taken")


def handled_all(url: str, queue: str) -> Busy:
    consumer = Busy(url, queue)
    consumer.going.set()
    with consuming(consumer):
        consumer.wait_for(COUNT)
        wait_until(lambda: queue_depth(url, queue) == 0, SOON)
    assert sorted(consumer.bodies) == list(range(COUNT))
    return consumer


def test_drains_of_a_prefetched_backlog_lose_no_message(rabbitmq, amqp_url, queue_name):
    with consuming(Busy(amqp_url, queue_name)):
        publish(amqp_url, queue_name, COUNT)
        all_taken(rabbitmq, amqp_url, queue_name)
    with observed(MessageRenewed) as renewed:
        for _ in range(3 * LIMIT):
            with consuming(Busy(amqp_url, queue_name)):
                all_taken(rabbitmq, amqp_url, queue_name)
    assert len(renewed) >= 2 * COUNT
    consumer = handled_all(amqp_url, queue_name)
    assert consumer.addresses == {("", queue_name)}


def test_lost_links_lose_no_message(rabbitmq, amqp_url, queue_name):
    """A killed process is the same to the broker."""
    consumer = Busy(amqp_url, queue_name)
    with (
        consuming(consumer) as (greenlet,),
        observed(LinkDown) as lost,
        observed(MessageRenewed) as renewed,
    ):
        publish(amqp_url, queue_name, COUNT)
        for cycle in range(3 * LIMIT):
            all_taken(rabbitmq, amqp_url, queue_name)
            wait_until(lambda: len(renewed) >= COUNT * (cycle // (LIMIT - 1)), SOON)  # noqa: B023  # here
            ready, downs = consumer.ready_count, len(lost)
            rabbitmq.close_connections(amqp_url)
            wait_until(lambda: len(lost) > downs, SOON)  # noqa: B023  # called here
            consumer.going.set()
            consumer.going = Event()
            wait_until(lambda: consumer.ready_count > ready, SOON)  # noqa: B023  # called here
        consumer.going.set()
        wait_until(lambda: set(consumer.bodies) == set(range(COUNT)), SOON)
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name)[:2] == (0, 0), SOON)
        assert not greenlet.ready()


def test_a_killed_consumer_costs_no_message(rabbitmq, amqp_url, queue_name):
    publishing = Busy(amqp_url, queue_name)
    with consuming(publishing):
        publish(amqp_url, queue_name, COUNT)
        all_taken(rabbitmq, amqp_url, queue_name)
    for _ in range(2 * LIMIT):
        with consuming(Busy(amqp_url, queue_name)) as (greenlet,):
            all_taken(rabbitmq, amqp_url, queue_name)
            greenlet.kill()
    handled_all(amqp_url, queue_name)


def test_what_goes_round_too_often_ends_in_the_dead_letter_queue(
    rabbitmq, amqp_url, queue_name, monkeypatch
):
    monkeypatch.setattr(renewals, "MAX_RENEWALS", 2)
    dead = f"{queue_name}.dead"
    with consuming(Busy(amqp_url, queue_name)):
        publish(amqp_url, queue_name, 1)
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name)[:2] == (0, 1), SOON)
    with observed(MessageRenewed) as events:
        while not any(event.buried_in for event in events):
            with consuming(Busy(amqp_url, queue_name)):
                wait_until(
                    lambda: (
                        rabbitmq.queue_counts(amqp_url, queue_name)[:2] == (0, 1)
                        or any(event.buried_in for event in events)
                    ),
                    SOON,
                )
                gevent.sleep(0)
    assert [(event.count, event.buried_in) for event in events] == [(1, ""), (2, ""), (2, dead)]
    with DeadLetters(amqp_url, dead) as letters:
        (letter,) = letters
        assert "never settled" in letter.error
        assert letter.queue == queue_name
        letters.replay(letter)
    assert queue_depth(amqp_url, queue_name) == 1
    assert message_copy.RENEWALS not in letter.revived().headers


@pytest.mark.parametrize("policy", [Requeue(delay=0.0)])
def test_a_message_that_fails_is_still_parked_where_drains_have_used_up_its_ways_back(
    rabbitmq, amqp_url, queue_name, policy
):
    with consuming(Busy(amqp_url, queue_name)):
        publish(amqp_url, queue_name, COUNT)
        all_taken(rabbitmq, amqp_url, queue_name)
    for _ in range(LIMIT - 3):
        with consuming(Busy(amqp_url, queue_name)):
            all_taken(rabbitmq, amqp_url, queue_name)

    class Failing(Busy):
        def work(self, body: Any, message: Any) -> None:
            if body % 2:
                raise LookupError("no such hat")

    consumer = Failing(amqp_url, queue_name)
    say(consumer, on_error=policy)
    with consuming(consumer):
        wait_until(lambda: set(consumer.bodies) == set(range(0, COUNT, 2)), SOON)
        wait_until(lambda: queue_depth(amqp_url, f"{queue_name}.dead") == COUNT // 2, SOON)
    assert queue_depth(amqp_url, queue_name) == 0


@pytest.mark.parametrize(
    ("arguments", "concurrency", "prefetch"),
    [
        (QUORUM, None, 10),
        (QUORUM, 4, 5),
        (QUORUM, 100, 110),
        ({}, 4, 8),
        ({}, None, 0),
    ],
)
def test_no_more_is_taken_than_is_soon_begun_where_a_queue_counts(
    amqp_url, queue_name, arguments, concurrency, prefetch
):
    class Looking(Recorder):
        def on_consume_ready(self, connection: Any, channel: Any, *_: Any, **__: Any) -> None:
            self.prefetch = channel.prefetch_count

    queue = Queue(queue_name, queue_arguments=arguments)
    consumer = Looking(amqp_url, queue, prefetch_count=None)
    if concurrency:
        say(consumer, concurrency=concurrency)
    with consuming(consumer):
        assert consumer.prefetch == prefetch
