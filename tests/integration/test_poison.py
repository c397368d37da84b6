"""Messages that always fail, on queues that count and drop: parked before that, and brought back."""

from __future__ import annotations

from typing import Any

import amqp
import gevent
import pytest
from gevent.event import Event
from kombu import Queue

from greenconsume import DeadLetters, Reject, Requeue, Retry
from greenconsume.events import HandlerFailed, LinkBlocked
from tests.brokers import NEWER, chosen_release
from tests.integration.consumers import SOON, Recorder, consuming, observed
from tests.messages import channel, declare, publish, queue_depth
from tests.options import say
from tests.waiting import wait_until

QUORUM = {"x-queue-type": "quorum"}


class Failing(Recorder):
    """Fails on what is `bad`; remembers how often each message came."""

    def __init__(self, broker: Any, queue: Any, policy: Any, **options: Any) -> None:
        super().__init__(broker, queue, self.fail, **options)
        say(self, on_error=policy)
        self.came: list[Any] = []

    def on_consume_ready(self, connection: Any, channel: Any, consumers: Any, **_: Any) -> None:
        self.queue_names = [queue.name for consumer in consumers for queue in consumer.queues]

    def fail(self, body: Any, message: Any) -> None:
        self.came.append(body)
        if body == "bad":
            raise LookupError("no such hat")


def quorum(name: str, **arguments: Any) -> Queue:
    return Queue(name, queue_arguments={**QUORUM, **arguments})


def depth(url: str, queue: str) -> int:
    """Return how many messages are ready in a queue, none if there is no such queue."""
    try:
        return queue_depth(url, queue)
    except amqp.NotFound:
        return 0


def test_a_message_that_always_fails_is_parked_before_its_queue_drops_it(amqp_url, queue_name):
    """HAZARDS row 34."""
    dead = f"{queue_name}.dead"
    queue = quorum(queue_name, **{"x-delivery-limit": 5})
    consumer = Failing(amqp_url, queue, Requeue(delay=0.0))
    with consuming(consumer), observed(HandlerFailed) as failures:
        publish(amqp_url, queue_name, ["bad", "good"])
        wait_until(lambda: depth(amqp_url, dead) == 1, SOON)
        assert consumer.came.count("good") == 1
        wait_until(lambda: len(failures) == 4, SOON)
    assert consumer.came.count("bad") == 4
    last = f"put into {dead} after 4 deliveries, before its queue drops it (delivery limit 5)"
    assert [failure.outcome for failure in failures] == ["requeued"] * 3 + [last]
    with DeadLetters(amqp_url, dead) as letters:
        (letter,) = letters
        assert (letter.error_type, letter.error) == ("LookupError", "no such hat")
        assert (letter.queue, letter.body) == (queue_name, b'"bad"')
        letters.replay(letter)
    assert queue_depth(amqp_url, queue_name) == 1


@pytest.mark.by_broker
@pytest.mark.parametrize("limit", [0, 1, 2, -1])
def test_a_message_is_parked_though_its_queue_drops_it_at_one_of_its_first_returns(
    rabbitmq, amqp_url, queue_name, limit
):
    """What comes for the first time has no count in its headers. RabbitMQ 4 takes -1 for no limit."""
    consumer = Failing(
        amqp_url, quorum(queue_name, **{"x-delivery-limit": limit}), Requeue(delay=0.0)
    )
    with consuming(consumer):
        publish(amqp_url, queue_name, ["bad"])
        if limit == -1 and rabbitmq.version >= (4,):
            wait_until(lambda: consumer.came.count("bad") > 30, SOON)
        else:
            wait_until(lambda: depth(amqp_url, f"{queue_name}.dead") == 1, SOON)
            assert consumer.came == ["bad"]


def test_what_is_replayed_has_all_its_deliveries_before_it(amqp_url, queue_name):
    dead = f"{queue_name}.dead"
    queue = quorum(queue_name, **{"x-delivery-limit": 3})
    consumer = Failing(amqp_url, queue, Requeue(delay=0.0))
    with consuming(consumer):
        publish(amqp_url, queue_name, ["bad"])
        wait_until(lambda: depth(amqp_url, dead) == 1, SOON)
        before = len(consumer.came)
        with DeadLetters(amqp_url, dead) as letters:
            letters.replay(next(iter(letters)))
        wait_until(lambda: depth(amqp_url, dead) == 1, SOON)
    assert len(consumer.came) == 2 * before


def test_a_number_of_deliveries_of_ones_own_counts(amqp_url, queue_name):
    policy = Requeue(delay=0.0, max_deliveries=3, dead_letter="{queue}.poison")
    consumer = Failing(amqp_url, quorum(queue_name), policy)
    with consuming(consumer):
        publish(amqp_url, queue_name, ["bad"])
        wait_until(lambda: depth(amqp_url, f"{queue_name}.poison") == 1, SOON)
    assert consumer.came == ["bad"] * 3


def test_what_was_compressed_is_parked_as_it_came(amqp_url, queue_name):
    declare(amqp_url, queue_name, x_queue_type="quorum", x_delivery_limit=3)
    consumer = Failing(amqp_url, quorum(queue_name, **{"x-delivery-limit": 3}), Requeue(delay=0.0))
    with consuming(consumer):
        with consumer.connection.Producer() as producer:
            producer.publish("bad", routing_key=queue_name, compression="zlib", serializer="json")
        wait_until(lambda: depth(amqp_url, f"{queue_name}.dead") == 1, SOON)
        consumer.connection.release()
    with DeadLetters(amqp_url, f"{queue_name}.dead") as letters:
        (letter,) = letters
        assert letter.headers["compression"] == "application/x-gzip"
        assert letter.body != b'"bad"'
        letters.remove(letter)


def test_where_the_queue_has_a_dead_letter_exchange_the_broker_is_left_to_it(amqp_url, queue_name):
    declare(amqp_url, f"{queue_name}.theirs")
    queue = quorum(
        queue_name,
        **{
            "x-delivery-limit": 3,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": f"{queue_name}.theirs",
        },
    )
    consumer = Failing(amqp_url, queue, Requeue(delay=0.0))
    with consuming(consumer):
        publish(amqp_url, queue_name, ["bad"])
        wait_until(lambda: depth(amqp_url, f"{queue_name}.theirs") == 1, SOON)
    assert consumer.came == ["bad"] * 4
    assert depth(amqp_url, f"{queue_name}.dead") == 0


def test_a_queue_that_does_not_count_requeues_for_ever(amqp_url, queue_name):
    consumer = Failing(amqp_url, queue_name, Requeue(delay=0.0))
    with consuming(consumer):
        publish(amqp_url, queue_name, ["bad"])
        wait_until(lambda: len(consumer.came) > 60, SOON)
    assert depth(amqp_url, f"{queue_name}.dead") == 0


def test_names_that_amqp_does_not_take_are_made_to_fit(amqp_url, queue_name):
    """A queue's name may have 255 bytes, and with ours behind it there would be more."""
    name = queue_name + "ü" * ((255 - len(queue_name)) // 2)
    consumer = Failing(amqp_url, name, Retry(delays=[0.01]))
    with consuming(consumer), observed(HandlerFailed) as failures:
        publish(amqp_url, name, ["bad"])
        wait_until(lambda: len(failures) == 2, SOON)
    assert consumer.came == ["bad", "bad"]
    target = failures[1].outcome.removeprefix("put into ").partition(" after ")[0]
    assert target.endswith(".dead")
    assert queue_depth(amqp_url, target) == 1


def test_messages_of_a_queue_that_the_broker_named_are_retried_and_kept(amqp_url):
    consumer = Failing(amqp_url, Queue("", exclusive=True), Retry(delays=[0.01]))
    with consuming(consumer), observed(HandlerFailed) as failures:
        (name,) = consumer.queue_names
        with channel(amqp_url) as chan:
            chan.basic_publish(
                amqp.Message('"bad"', content_type="application/json", content_encoding="utf-8"),
                routing_key=name,
            )
        wait_until(lambda: len(failures) == 2, SOON)
    assert failures[1].outcome == f"put into greenconsume.{name}.dead after 1 retries"
    assert queue_depth(amqp_url, f"greenconsume.{name}.dead") == 1


@pytest.mark.parametrize("policy", [Requeue(delay=0.0), Reject()])
def test_a_message_that_succeeds_in_the_end_is_no_poison(amqp_url, queue_name, policy):
    consumer = Failing(amqp_url, quorum(queue_name, **{"x-delivery-limit": 5}), policy)
    with consuming(consumer):
        publish(amqp_url, queue_name, ["good"] * 20)
        wait_until(lambda: len(consumer.came) == 20, SOON)
    assert depth(amqp_url, f"{queue_name}.dead") == 0


def test_of_a_thousand_messages_none_is_lost_and_those_that_always_fail_are_kept(
    amqp_url, queue_name
):
    """With the queue's default limit, where the broker has one."""
    arguments = {} if chosen_release() == NEWER else {"x-delivery-limit": 20}
    bodies = ["bad" if n % 20 == 0 else n for n in range(1000)]
    consumer = Failing(amqp_url, quorum(queue_name, **arguments), Requeue(delay=0.0))
    say(consumer, concurrency=20)
    with consuming(consumer):
        publish(amqp_url, queue_name, bodies)
        wait_until(lambda: depth(amqp_url, f"{queue_name}.dead") == 50, SOON)
        wait_until(lambda: set(consumer.bodies) == set(bodies) - {"bad"}, SOON)
    assert queue_depth(amqp_url, queue_name) == 0
    assert consumer.came.count("bad") == 50 * 15


@pytest.mark.parametrize("policy", [Retry(0), Requeue(delay=0.0, max_deliveries=2)])
def test_while_the_broker_blocks_publishers_a_dead_letter_is_written_once(
    rabbitmq_fault, amqp_url, queue_name, policy
):
    gate, dead = Event(), f"{queue_name}.dead"

    class Held(Failing):
        def fail(self, body: Any, message: Any) -> None:
            if message.delivery_info["redelivered"] or isinstance(policy, Retry):
                gate.wait(SOON)
            super().fail(body, message)

    consumer = Held(amqp_url, quorum(queue_name), policy)
    say(consumer, concurrency=5)
    with consuming(consumer), observed(LinkBlocked) as blocks:
        publish(amqp_url, queue_name, ["bad"] * 5)
        wait_until(lambda: len(consumer.came) >= (0 if isinstance(policy, Retry) else 5), SOON)
        rabbitmq_fault.block()
        gate.set()
        wait_until(lambda: blocks, SOON)
        wait_until(lambda: rabbitmq_fault.queue_counts(amqp_url, queue_name).unacked == 5, SOON)
        rabbitmq_fault.unblock()
        wait_until(lambda: depth(amqp_url, dead) == 5, SOON)
    assert (queue_depth(amqp_url, queue_name), queue_depth(amqp_url, dead)) == (0, 5)


def test_a_replay_while_the_broker_blocks_publishers_waits_and_doubles_nothing(
    rabbitmq_fault, amqp_url, queue_name
):
    dead = f"{queue_name}.dead"
    with consuming(Failing(amqp_url, queue_name, Retry(0))):
        publish(amqp_url, queue_name, ["bad"] * 3)
        wait_until(lambda: depth(amqp_url, dead) == 3, SOON)

    def replay() -> None:
        with DeadLetters(amqp_url, dead) as letters:
            for letter in letters:
                letters.replay(letter)

    with observed(LinkBlocked) as blocks:
        rabbitmq_fault.block()
        replaying = gevent.spawn(replay)
        wait_until(lambda: blocks, SOON)
        assert not replaying.ready()
        rabbitmq_fault.unblock()
        replaying.get(timeout=SOON)
    assert (queue_depth(amqp_url, queue_name), queue_depth(amqp_url, dead)) == (3, 0)
