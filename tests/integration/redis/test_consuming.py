"""Consuming from Redis and Valkey with kombu's own names: taking, settling, giving back."""

from __future__ import annotations

import json
import socket
from statistics import median
from time import monotonic

import gevent
import pytest
from kombu import Consumer, Exchange, Producer, Queue

from greenconsume import Runtime
from greenconsume.redis import link as redis_link
from tests.integration.consumers import Inbox, Recorder, consuming, green_connection
from tests.integration.redis.payloads import bodies_in, held_count, payload, put
from tests.waiting import wait_until

pytestmark = pytest.mark.every_redis


def test_what_is_published_is_consumed_and_leaves_nothing(connection, server, queue_name):
    with connection.channel() as channel:
        producer = Producer(channel)
        for n in range(20):
            producer.publish({"n": n}, routing_key=queue_name, declare=[Queue(queue_name)])
        inbox = Inbox(connection)
        with Consumer(channel, [Queue(queue_name)], callbacks=[inbox], prefetch_count=7):
            assert [body["n"] for body in inbox.drain(20)] == list(range(20))
            wait_until(lambda: held_count(server) == 0)
            assert inbox.is_quiet()
    assert server.exists(queue_name) == 0


def test_a_message_is_never_in_the_process_alone(connection, server, queue_name):
    """HAZARDS row 2: between the pop and the bookkeeping kombu has it nowhere else."""
    put(server, queue_name, *range(10))
    inbox = Inbox(connection, ack=False)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox], prefetch_count=4):
        inbox.drain(4)
        assert held_count(server) == 4
        assert server.llen(queue_name) == 6
        entries = [json.loads(entry) for entry in server.hvals("unacked")]
        assert {tuple(entry[1:]) for entry in entries} == {("", queue_name)}


def test_a_waiting_consumer_is_woken_at_once(connection, server, queue_name):
    inbox = Inbox(connection)
    times = []
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox]):
        for n in range(20):
            with pytest.raises(socket.timeout):
                connection.drain_events(timeout=0.002)
            put(server, queue_name, n)
            began = monotonic()
            inbox.drain(n + 1)
            times.append(monotonic() - began)
    assert median(times) < 0.25  # who polls once a second needs 0.5


def test_the_prefetch_bounds_what_is_held(connection, server, queue_name):
    put(server, queue_name, *range(10))
    inbox = Inbox(connection, ack=False)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox], prefetch_count=3):
        inbox.drain(3)
        assert inbox.is_quiet()
        assert held_count(server) == 3
        inbox.messages[1].ack()
        assert inbox.drain(4) == [0, 1, 2, 3]
        assert inbox.is_quiet()


def test_what_was_not_started_goes_back_unaltered_and_in_order(connection, server, queue_name):
    before = put(server, queue_name, *range(10))
    inbox = Inbox(connection, ack=False)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox], prefetch_count=8):
        inbox.drain(2)
        wait_until(lambda: held_count(server) == 8)
    wait_until(lambda: server.llen(queue_name) == 8)
    assert bodies_in(server, queue_name) == list(range(2, 10))
    assert list(reversed(server.lrange(queue_name, 0, -1))) == before[2:]
    connection.close()
    wait_until(lambda: held_count(server) == 0)
    assert list(reversed(server.lrange(queue_name, 0, -1))) == before


def test_a_rejected_message_is_dropped(connection, server, queue_name):
    put(server, queue_name, "x")
    inbox = Inbox(connection, ack=False)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox]):
        inbox.drain(1)
        inbox.messages[0].reject()
        wait_until(lambda: held_count(server) == 0)
    assert server.llen(queue_name) == 0


def test_a_requeued_message_is_next_and_says_so(connection, server, queue_name):
    put(server, queue_name, "first", "second")
    inbox = Inbox(connection, ack=False)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox], prefetch_count=1):
        inbox.drain(1)
        inbox.messages[0].requeue()
        assert inbox.drain(2) == ["first", "first"]
        assert inbox.messages[1].delivery_info["redelivered"]
        assert inbox.messages[1].headers["x-delivery-count"] == 1


def test_a_message_in_two_queues_is_settled_in_each(connection, server, queue_name):
    """kombu has one delivery tag for a publication: the first ack removes the other's record."""
    exchange = Exchange(queue_name, type="topic")
    queues = [Queue(f"{queue_name}-{n}", exchange, routing_key="a.#") for n in range(2)]
    inbox = Inbox(connection, ack=False)
    with Consumer(connection, queues, callbacks=[inbox]):
        Producer(connection).publish("x", exchange=exchange, routing_key="a.b")
        inbox.drain(2)
        inbox.messages[0].ack()
        wait_until(lambda: held_count(server) == 1)
        inbox.messages[1].requeue()
        inbox.drain(3)
        assert inbox.messages[2].queue == inbox.messages[1].queue


def test_priorities_are_taken_in_their_order(connection, queue_name):
    producer = Producer(connection)
    for priority in (9, 0, 6, 3):
        producer.publish(priority, routing_key=queue_name, priority=priority)
    inbox = Inbox(connection)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox], prefetch_count=1):
        assert inbox.drain(4) == [0, 3, 6, 9]


def test_two_consumers_of_one_queue_share_it(connection, server, queue_name):
    """With kombu the first of them gets nothing."""
    first, second = Inbox(connection), Inbox(connection)
    with connection.channel() as channel:
        with Consumer(channel, [Queue(queue_name)], callbacks=[first]):
            with Consumer(channel, [Queue(queue_name)], callbacks=[second]):
                put(server, queue_name, *range(10))
                while len(first.bodies) + len(second.bodies) < 10:
                    connection.drain_events(timeout=30)
    assert len(first.bodies) == len(second.bodies) == 5


def test_a_message_that_needs_no_ack_is_gone_once_it_is_handed_out(connection, server, queue_name):
    put(server, queue_name, *range(3))
    inbox = Inbox(connection, ack=False)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox], no_ack=True):
        inbox.drain(3)
        wait_until(lambda: held_count(server) == 0)


def test_a_single_message_can_be_asked_for(connection, server, queue_name):
    put(server, queue_name, "x")
    with connection.channel() as channel:
        message = channel.basic_get(queue_name)
        assert message.decode() == "x"
        assert held_count(server) == 1
        assert channel.basic_get(queue_name) is None
        message.ack()
        wait_until(lambda: held_count(server) == 0)


def test_what_was_requeued_is_there_for_who_asks_next(connection, server, queue_name):
    put(server, queue_name, "x")
    with connection.channel() as channel:
        channel.basic_get(queue_name).requeue()
        message = channel.basic_get(queue_name)
        assert message is not None
        assert message.headers["x-delivery-count"] == 1
        message.ack()


def test_a_simple_queue_puts_and_gets(connection, queue_name):
    with connection.SimpleQueue(queue_name) as queue:
        queue.put({"a": 1})
        assert queue.qsize() == 1
        message = queue.get(timeout=30)
        assert message.payload == {"a": 1}
        message.ack()
        with pytest.raises(queue.Empty):
            queue.get_nowait()


def test_a_fanout_exchange_reaches_everybody(redis_url, connection, queue_name):
    exchange = Exchange(queue_name, type="fanout")
    with green_connection(redis_url) as other:
        inboxes = [Inbox(connection), Inbox(other)]
        with Consumer(connection, [Queue(f"{queue_name}-1", exchange)], callbacks=[inboxes[0]]):
            with Consumer(other, [Queue(f"{queue_name}-2", exchange)], callbacks=[inboxes[1]]):
                Producer(connection).publish("all", exchange=exchange)
                assert [inbox.drain(1) for inbox in inboxes] == [["all"], ["all"]]


def test_what_is_no_message_of_kombus_meets_on_decode_error(connection, server, queue_name):
    server.lpush(queue_name, b"\xffnot json")
    seen = []

    def on_decode_error(message, exc):
        seen.append(message.body)
        message.ack()

    with Consumer(
        connection, [Queue(queue_name)], callbacks=[print], on_decode_error=on_decode_error
    ):
        connection.drain_events(timeout=30)
    assert seen == [b"\xffnot json"]


def test_a_prefix_comes_before_every_key(redis_url, server, queue_name):
    options = {"global_keyprefix": "app:"}
    with green_connection(redis_url, transport_options=options) as prefixed:
        exchange = Exchange(queue_name, type="topic")
        inbox = Inbox(prefixed, ack=False)
        queue = Queue(queue_name, exchange, routing_key="a")
        with Consumer(prefixed, [queue], callbacks=[inbox]):
            Producer(prefixed).publish("x", exchange=exchange, routing_key="a")
            inbox.drain(1)
            names = server.scan_iter()
            assert [name for name in names if not name.startswith(b"app:")] == []
            assert server.hlen("app:unacked") == 1


def test_500_handlers_ack_at_once(redis_url, server, queue_name):
    """HAZARDS row 14: with kombu's pool of ten connections most of these fail."""
    gate = gevent.event.Event()
    consumer = Recorder(
        redis_url, queue_name, lambda _body, _message: gate.wait(), prefetch_count=1000
    )
    from tests.options import say

    say(consumer, concurrency=500)
    put(server, queue_name, *range(500))
    with consuming(consumer):
        wait_until(lambda: held_count(server) == 500)
        gate.set()
        consumer.wait_for(500)
        wait_until(lambda: held_count(server) == 0)


def test_a_hundred_consumers_of_ten_queues_share_a_socket_and_ask_for_nothing(
    redis_url, server, queue_name
):
    """HAZARDS row 28: kombu has two sockets for each, and asks once a second."""
    queues = [f"{queue_name}.{number % 10}" for number in range(100)]
    waiting = iter(queues)
    with Runtime(redis_url) as runtime:
        runtime.spawn(lambda connection: Recorder(connection, next(waiting)), replicas=100)
        wait_until(lambda: all(child.started for child in runtime.children))
        consumers = [child.consumer for child in runtime.children]
        assert len([link for link in redis_link.all_links if link.connected]) == 1
        for number, queue in enumerate(queues):
            put(server, queue, number)
        wait_until(lambda: sum(len(each.bodies) for each in consumers) == 100)


def test_a_consumer_stops_at_once_and_leaves_its_server(redis_url, server, queue_name):
    put(server, queue_name, *range(5))
    consumer = Recorder(redis_url, queue_name)
    with consuming(consumer) as [greenlet]:
        consumer.wait_for(5)
        began = monotonic()
        greenlet.stop()
        assert greenlet.join(30)
        print(f"\nstopped in {(monotonic() - began) * 1000:.1f} ms")
    assert held_count(server) == 0
    assert server.hlen("_greenconsume.owners") == 0


def test_a_payload_of_another_publisher_keeps_what_is_unknown(connection, server, queue_name):
    raw = payload("x", priority=0, trace=["a", 1])
    server.lpush(queue_name, raw)
    inbox = Inbox(connection, ack=False)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox]):
        inbox.drain(1)
        assert inbox.messages[0].headers["trace"] == ["a", 1]
        inbox.messages[0].requeue()
        inbox.drain(2)
        again = inbox.messages[1]
        assert again.headers["trace"] == ["a", 1]
        assert again._raw["unknown"] == []
