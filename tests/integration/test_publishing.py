"""Publishing over a green link: confirms, returned messages, order, and many greenlets on one channel."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from typing import Any

import amqp
import gevent
import pytest
from kombu import Connection, Exchange, Producer, Queue

from greenconsume import Runtime
from tests.integration.consumers import SOON, Recorder, consuming, green_connection
from tests.messages import declare, publish, queue_depth
from tests.waiting import AT_ONCE, wait_until

CONFIRMS = {"transport_options": {"confirm_publish": True}}


@pytest.fixture
def confirming(amqp_url) -> Iterator[Connection]:
    """A connection whose publishes wait for their confirms."""
    with green_connection(amqp_url, **CONFIRMS) as lent:
        yield lent


def outcome_of(action: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """Run it, and return the name of what it raised."""
    try:
        action(*args, **kwargs)
    except Exception as exc:  # whatever it is, the test looks at it
        return type(exc).__name__
    return "published"


# -- confirms -------------------------------------------------------------------------------------


def test_a_confirmed_publish_is_in_the_queue_when_it_returns(amqp_url, confirming, queue_name):
    declare(amqp_url, queue_name)
    producer = Producer(confirming)
    for count in range(1, 11):
        producer.publish(count, routing_key=queue_name)
        assert queue_depth(amqp_url, queue_name) == count


def test_fifty_greenlets_each_get_the_confirm_of_their_own(amqp_url, confirming, queue_name):
    """HAZARDS row 18: one of two queues takes nothing, and the broker says so message by message."""
    declare(amqp_url, queue_name)
    full = f"{queue_name}-full"
    declare(amqp_url, full, x_max_length=0, x_overflow="reject-publish")
    producer = Producer(confirming.channel())

    def work(number: int) -> list[str]:
        outcomes = []
        for turn in range(10):
            key = (queue_name, full, "nowhere")[(number + turn) % 3]
            mandatory = key == "nowhere"
            outcomes.append(
                (key, outcome_of(producer.publish, 1, routing_key=key, mandatory=mandatory))
            )
        return outcomes

    greenlets = [gevent.spawn(work, number) for number in range(50)]
    gevent.joinall(greenlets, raise_error=True)
    outcomes = {outcome for greenlet in greenlets for outcome in greenlet.value}
    assert outcomes == {
        (queue_name, "published"),
        (full, "MessageNacked"),
        ("nowhere", "ChannelError"),
    }


def test_a_confirm_that_does_not_come_times_out_and_harms_nobody(make_peer):
    answered = make_peer()
    with green_connection(answered.url, **CONFIRMS) as connection:
        producer = Producer(connection.channel())
        outcome = outcome_of(producer.publish, "x", routing_key="orders", confirm_timeout=0.05)
        assert outcome in ("TimeoutError", "timeout")
        assert len(answered.published) == 1


def test_publishing_to_a_missing_exchange_is_the_error_of_its_channel(connection, queue_name):
    missing = Producer(connection.channel(), Exchange(f"{queue_name}-missing", no_declare=True))
    other = Producer(connection.channel())
    missing.publish("x", routing_key="any")
    with pytest.raises(amqp.NotFound):
        wait_until(lambda: missing.publish("x", routing_key="any"))
    other.publish("x", routing_key=queue_name)
    assert other.channel.queue_declare(queue_name).queue == queue_name


def test_a_confirmed_publish_to_a_missing_exchange_raises(confirming, queue_name):
    producer = Producer(confirming.channel(), Exchange(f"{queue_name}-missing", no_declare=True))
    for _ in range(2):
        with pytest.raises(amqp.NotFound):
            producer.publish("x", routing_key="any")


# -- returned messages ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CONFIRMS])
def test_on_return_gets_what_nobody_takes(amqp_url, queue_name, options):
    declare(amqp_url, queue_name)
    returned: list[tuple[str, bytes]] = []

    def on_return(exc: Any, exchange: str, routing_key: str, message: Any) -> None:
        returned.append((exc.reply_code, routing_key, message.body))

    with green_connection(amqp_url, **options) as connection:
        producer = Producer(connection, on_return=on_return)
        for key in ("nowhere", queue_name, "nobody"):
            producer.publish([key], routing_key=key, mandatory=True)
        wait_until(lambda: len(returned) == 2)
    assert sorted(returned) == [(312, "nobody", '["nobody"]'), (312, "nowhere", '["nowhere"]')]
    assert queue_depth(amqp_url, queue_name) == 1


def test_on_return_may_publish_by_itself(amqp_url, connection, queue_name):
    """It runs in a greenlet of its own, not in the reader's."""
    declare(amqp_url, queue_name)

    def on_return(exc: Any, exchange: str, routing_key: str, message: Any) -> None:
        other = connection.channel()
        other.queue_declare(f"{queue_name}-found")
        Producer(other).publish("found", routing_key=f"{queue_name}-found")

    producer = Producer(connection, on_return=on_return)
    producer.publish("lost", routing_key="nowhere", mandatory=True)
    wait_until(lambda: outcome_of(queue_depth, amqp_url, f"{queue_name}-found") != "NotFound")
    wait_until(lambda: queue_depth(amqp_url, f"{queue_name}-found") == 1)


def test_what_comes_back_with_nobody_to_tell_is_raised_at_the_next_call(connection, queue_name):
    producer = Producer(connection.channel())
    producer.publish("x", routing_key="nowhere", mandatory=True)
    with pytest.raises(amqp.ChannelError, match="NO_ROUTE"):
        wait_until(lambda: producer.channel.queue_declare(queue_name) and None)
    assert producer.channel.queue_declare(queue_name).queue == queue_name


# -- order and size -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CONFIRMS])
def test_greenlets_on_one_channel_do_not_mix_their_frames(amqp_url, queue_name, options):
    """Each message's method, header and body stay together, and each greenlet's messages in order."""
    expected = {n: [(n, turn) for turn in range(10)] for n in range(20)}
    seen: dict[int, list[tuple[int, int]]] = {}

    def note(body: Any, _message: Any) -> None:
        number, turn, filling = body
        assert filling == "x" * len(filling)
        seen.setdefault(number, []).append((number, turn))

    def send(producer: Producer, number: int) -> None:
        for turn in range(10):
            size = random.choice((0, 10, 1000, 200_000))
            producer.publish([number, turn, "x" * size], routing_key=queue_name)
            gevent.sleep(0)

    consumer = Recorder(amqp_url, queue_name, note, prefetch_count=50)
    with consuming(consumer), green_connection(amqp_url, **options) as connection:
        producer = Producer(connection.channel())
        gevent.joinall([gevent.spawn(send, producer, n) for n in range(20)], raise_error=True)
        consumer.wait_for(200)
    assert seen == expected


def test_publishers_wait_while_the_broker_takes_no_more(proxy, queue_name):
    """What is unsent stays bounded, and nothing of it is lost."""
    declare(proxy.url, queue_name)
    published: list[int] = []

    def send(producer: Producer) -> None:
        for number in range(100):
            producer.publish(b"x" * 200_000, routing_key=queue_name)
            published.append(number)

    with green_connection(proxy.url) as connection:
        producer = Producer(connection.channel())
        proxy.stall("to_server")
        sending = gevent.spawn(send, producer)
        sending.join(0.3)
        assert not sending.ready()
        assert len(published) < 90
        proxy.resume()
        sending.get(timeout=SOON)
        wait_until(lambda: queue_depth(proxy.url, queue_name) == 100, SOON)


def test_sixteen_megabytes_published_at_once_do_not_keep_the_hub(amqp_url, queue_name):
    publish(amqp_url, queue_name, 1)
    runtime = Runtime(amqp_url)
    [child] = runtime.spawn(partial(Recorder, queue=queue_name))
    with runtime, green_connection(amqp_url) as connection:
        producer = Producer(connection.channel())
        queue = Queue(f"{queue_name}-large", durable=False)(producer.channel)
        queue.declare()
        sending = gevent.spawn(producer.publish, b"x" * 16_000_000, routing_key=queue.name)
        began = monotonic()
        publish(amqp_url, queue_name, 20)
        child.consumer.wait_for(21)
        assert monotonic() - began < AT_ONCE
        sending.get(timeout=SOON)
        assert len(wait_until(lambda: queue.get(no_ack=True), SOON).body) == 16_000_000


def test_a_producer_declares_what_it_publishes_to(amqp_url, connection, queue_name):
    exchange = Exchange(f"{queue_name}-x", "topic", durable=False)
    queue = Queue(queue_name, exchange, "orders.*", durable=False)
    producer = Producer(connection, exchange, routing_key="orders.new", auto_declare=True)
    producer.publish("x", declare=[queue])
    producer.publish("x", declare=[queue], retry=True)
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 2)


def test_a_producer_is_revived_on_another_channel(amqp_url, connection, queue_name):
    declare(amqp_url, queue_name)
    producer = Producer(connection.channel())
    producer.channel.close()
    assert outcome_of(producer.publish, "x", routing_key=queue_name) == "RecoverableConnectionError"
    producer.revive(connection.channel())
    producer.publish("x", routing_key=queue_name)
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 1)


PUBLISHES_AND_ENDS = """
from gevent import monkey
monkey.patch_all()
import sys
from kombu import Connection, Producer
from greenconsume.transports import registry
registry.register()
producer = Producer(Connection(sys.argv[1]))
for size in sys.argv[3:]:
    producer.publish("x" * int(size), routing_key=sys.argv[2])
"""


def test_a_program_that_ends_without_a_close_has_published(amqp_url, queue_name):
    """As with py-amqp, which has sent what it was given when `publish` returns."""
    declare(amqp_url, queue_name)
    sizes = ("10", "16000000")
    command = [sys.executable, "-c", PUBLISHES_AND_ENDS, amqp_url, queue_name, *sizes]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert queue_depth(amqp_url, queue_name) == 2
