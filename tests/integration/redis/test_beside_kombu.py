"""What plain kombu does with the same keys at the same time, and in which order."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from gevent.event import Event
from kombu import Connection, Consumer, Exchange, Producer, Queue

from greenconsume.redis.keyspace import SEP
from tests.integration.consumers import Inbox, Recorder, consuming, green_connection
from tests.integration.redis.payloads import held_count, payload, put, refreshed_at
from tests.options import say
from tests.waiting import wait_until

pytestmark = pytest.mark.every_redis


def plain(url: str, **options: Any) -> Connection:
    """A connection over kombu's own transport."""
    return Connection(url, transport="kombu.transport.redis:Transport", transport_options=options)


def green(url: str, **options: Any) -> Connection:
    return green_connection(url, transport_options=options)


@pytest.mark.parametrize(("theirs", "ours"), [(plain, green), (green, plain)])
@pytest.mark.parametrize("routing_key", ["", "news.de"])
def test_a_fanout_exchange_with_a_prefix_reaches_both_kinds(
    redis_url, queue_name, theirs, ours, routing_key
):
    exchange = Exchange(queue_name, type="fanout")
    options = {"global_keyprefix": "app:"}
    with theirs(redis_url, **options) as sender, ours(redis_url, **options) as receiver:
        inbox = Inbox(receiver)
        queue = Queue(f"{queue_name}.inbox", exchange, routing_key=routing_key)
        with Consumer(receiver, [queue], callbacks=[inbox]):

            def heard() -> bool:  # plain kombu subscribes when it first waits
                Producer(sender, exchange).publish("x", routing_key=routing_key)
                with suppress(TimeoutError):
                    receiver.drain_events(timeout=0.5)
                return bool(inbox.bodies)

            wait_until(heard)
        assert inbox.bodies[0] == "x"


def test_plain_kombu_leaves_what_our_handlers_are_at(redis_url, server, queue_name, quick):
    """It restores what nobody has refreshed, and knows nothing of us but the index."""
    put(server, queue_name, "long")
    done = Event()
    connection = green(redis_url, visibility_timeout=2.0)
    consumer = Recorder(connection, queue_name, lambda _b, _m: done.wait())
    say(consumer, concurrency=1)
    with plain(redis_url, visibility_timeout=60) as theirs, consuming(consumer):
        wait_until(lambda: held_count(server) == 1)
        taken_at = refreshed_at(server)

        def restored_twice_the_timeout() -> bool:
            theirs.default_channel.qos.restore_visible(interval=1)
            return refreshed_at(server) > taken_at + 4.0

        wait_until(restored_twice_the_timeout)
        assert held_count(server) == 1
        assert server.llen(queue_name) == 0
        done.set()
        wait_until(lambda: held_count(server) == 0)
    assert consumer.bodies == ["long"]


@pytest.mark.parametrize("strategy", ["round_robin", "priority", "sorted"])
def test_queues_are_taken_from_in_the_order_of_kombu(redis_url, server, queue_name, strategy):
    """By steps of priority first, then by queues as the strategy has it."""
    names = [f"{queue_name}.{name}" for name in "bca"]
    orders = []
    for make in (plain, green):
        with make(redis_url, queue_order_strategy=strategy) as connection:
            inbox = Inbox(connection)
            queues = [Queue(name) for name in names]
            with Consumer(connection, queues, callbacks=[inbox], prefetch_count=1):
                for n in range(2):  # either may ask for this queue alone until it had one
                    put(server, names[0], "first")
                    inbox.drain(n + 1)
                fill(server, names)
                orders.append(inbox.drain(20))
    assert orders[1] == orders[0]


def fill(server: Any, names: list[str]) -> None:
    """Put messages of two priorities into queues, all at once."""
    with server.pipeline() as at_once:
        for n in range(3):
            for name in names:
                for priority, key in ((0, name), (6, f"{name}{SEP}6")):
                    at_once.lpush(key, payload(f"{name[-1]}{priority}.{n}", priority))
        at_once.execute()


def test_a_consumer_of_several_queues_begins_with_the_first_message_of_each(
    redis_url, server, queue_name
):
    """It took one for each queue that it was to consume, and the last of these came first."""
    names = [f"{queue_name}.{name}" for name in "bca"]
    fill(server, names)
    with green(redis_url) as connection:
        inbox = Inbox(connection)
        with Consumer(connection, list(map(Queue, names)), callbacks=[inbox], prefetch_count=1):
            inbox.drain(18)
    for name in "bca":
        for priority in (0, 6):
            ours = [body for body in inbox.bodies if body.startswith(f"{name}{priority}")]
            assert ours == [f"{name}{priority}.{n}" for n in range(3)]
