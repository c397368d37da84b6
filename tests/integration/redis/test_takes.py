"""Tests how much the server is asked for messages."""

from __future__ import annotations

from typing import Any

import gevent
import pytest
from kombu import Consumer, Message, Producer, Queue
from redis import ResponseError

from greenconsume.redis.keyspace import SEP
from tests.integration.consumers import SOON, Inbox
from tests.integration.redis.payloads import bodies_in, held_count, put
from tests.waiting import wait_until

pytestmark = pytest.mark.every_redis


def test_a_busy_consumer_takes_half_its_prefetch_at_a_time(connection, server, queue_name):
    put(server, queue_name, *range(1000))
    before = scripts_run(server)
    handled = []

    def handle(body: int, message: Message) -> None:
        handled.append(body)
        message.ack()
        gevent.sleep(0.0005)  # the server answers meanwhile

    with Consumer(connection, [Queue(queue_name)], callbacks=[handle], prefetch_count=100):
        while len(handled) < 1000:
            connection.drain_events(timeout=30)
    assert handled == list(range(1000))
    assert scripts_run(server) - before < 1000 / 50 + 8  # and a few that are no takes


def test_two_consumers_of_one_connection_are_dealt_messages_in_turn(connection, server, queue_name):
    put(server, queue_name, *range(10))
    heard: dict[str, list[Any]] = {"one": [], "other": []}
    channels = [connection.channel(), connection.channel()]
    for name, channel in zip(heard, channels, strict=True):
        consumer = Consumer(channel, [Queue(queue_name)], prefetch_count=10, no_ack=True)
        consumer.register_callback(lambda body, _message, name=name: heard[name].append(body))
        consumer.consume()
    put(server, queue_name, *range(10, 110))
    while sum(map(len, heard.values())) < 110:
        connection.drain_events(timeout=30)
    assert sorted(heard["one"] + heard["other"]) == list(range(110))
    assert min(map(len, heard.values())) >= 40
    assert all(bodies == sorted(bodies) for bodies in heard.values())


def scripts_run(server: Any) -> int:
    stats = server.info("commandstats")
    names = ("cmdstat_evalsha", "cmdstat_eval")
    return sum(stats.get(name, {}).get("calls", 0) for name in names)


def test_a_take_that_the_server_refuses_half_way_leaves_nothing_behind(
    connection, server, queue_name
):
    queues = [Queue(queue_name), Queue(f"{queue_name}.other")]
    with Consumer(connection, queues, callbacks=[print], prefetch_count=10):
        with server.pipeline() as at_once:
            put(at_once, queue_name, "x")
            at_once.set(f"{queue_name}.other", "no list")
            at_once.execute()
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            connection.drain_events(timeout=SOON)
        wait_until(lambda: held_count(server) == 0)
        assert bodies_in(server, queue_name) == ["x"]


def test_who_took_the_last_message_is_told_of_the_next_without_another_look(
    connection, server, queue_name
):
    """Of many who wait for single messages each would else look twice."""
    inbox = Inbox(connection)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox], prefetch_count=1):
        put(server, queue_name, "warm")
        inbox.drain(1)
        wait_until(lambda: held_count(server) == 0)
        before = scripts_run(server)
        for n in range(2, 22):
            put(server, queue_name, n)
            inbox.drain(n)
            wait_until(lambda: held_count(server) == 0)
        assert scripts_run(server) - before < 20 + 8  # and a few that are no takes


def test_who_waits_is_told_of_a_message_whose_publisher_was_killed(connection, server, queue_name):
    """The server tells nobody of his own changes: consumers on the publisher's link heard of nothing more."""
    inbox = Inbox(connection)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox], prefetch_count=10):
        put(server, queue_name, "warm")
        inbox.drain(1)
        publisher = gevent.spawn(Producer(connection).publish, "x", routing_key=queue_name)
        gevent.sleep(0)
        publisher.kill()
        put(server, queue_name, "y")
        assert set(inbox.drain(3)) == {"warm", "x", "y"}


def test_a_single_message_that_the_server_refuses_half_way_goes_back(
    connection, server, queue_name
):
    """It was held until the visibility timeout, as long as this process lived."""
    with server.pipeline() as at_once:
        put(at_once, queue_name, "x")
        at_once.set(f"{queue_name}{SEP}9", "no list")
        at_once.execute()
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        connection.default_channel.basic_get(queue_name)
    wait_until(lambda: held_count(server) == 0)
    assert bodies_in(server, queue_name) == ["x"]
