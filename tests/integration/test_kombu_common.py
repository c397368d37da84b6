"""Tests what kombu builds on its interface, over a green link: simple queues, helpers, transactions."""

from __future__ import annotations

from itertools import islice
from queue import Empty
from typing import Any

import gevent
import pytest
from kombu import Consumer, Exchange, Producer, Queue
from kombu import common as kombu_common

from tests.integration.consumers import SOON, Inbox, green_connection
from tests.messages import declare, queue_depth
from tests.waiting import wait_until

# -- simple queues --------------------------------------------------------------------------------


def test_a_simple_queue_puts_gets_and_is_empty(connection, queue_name):
    with connection.SimpleQueue(queue_name) as simple:
        assert len(simple) == 0
        for body in ({"a": 1}, ["two"]):
            simple.put(body, serializer="json", compression="zlib")
        wait_until(lambda: simple.qsize() == 2)
        assert len(simple) == 2
        message = simple.get(timeout=SOON)
        assert message.payload == {"a": 1}
        message.ack()
        assert simple.get(timeout=SOON).payload == ["two"]
        assert simple.clear() == 0
        with pytest.raises(Empty):
            simple.get_nowait()
        with pytest.raises(simple.Empty):
            simple.get(block=True, timeout=0.02)


def test_a_simple_buffer_holds_what_nobody_acks(connection, queue_name):
    with connection.SimpleBuffer(queue_name) as buffer:
        buffer.put("x")
        assert buffer.get(timeout=SOON).payload == "x"
        with pytest.raises(Empty):
            buffer.get(timeout=0.02)


def test_a_simple_queue_serves_many_greenlets_of_one_connection(connection, queue_name):
    got: list[int] = []

    def work(simple: Any) -> None:
        while len(got) < 200:
            try:
                message = simple.get(timeout=0.05)
            except Empty:
                continue
            got.append(message.payload)
            message.ack()

    with connection.SimpleQueue(queue_name) as simple:
        greenlets = [gevent.spawn(work, simple) for _ in range(5)]
        gevent.joinall([gevent.spawn(simple.put, number) for number in range(200)])
        gevent.joinall(greenlets, raise_error=True)
    assert sorted(got) == list(range(200))


# -- kombu.common ---------------------------------------------------------------------------------


def test_itermessages_and_drain_consumer_yield_what_comes(connection, channel, queue, queue_name):
    channel.basic_qos(0, 1, False)
    for number in range(5):
        Producer(channel).publish(number, routing_key=queue_name)
    got: list[int] = []
    for body, message in kombu_common.itermessages(connection, channel, queue, 3, timeout=SOON):
        message.ack()
        got.append(body)
    consumer = Consumer(channel, [queue])
    for body, message in kombu_common.drain_consumer(consumer, limit=2, timeout=SOON):
        message.ack()
        got.append(body)
    assert got == [0, 1, 2, 3, 4]


def test_eventloop_ends_with_its_limit_and_skips_timeouts(connection, channel, queue, queue_name):
    inbox = Inbox(connection)
    with Consumer(channel, [queue], callbacks=[inbox]):
        gevent.spawn_later(0.05, Producer(channel).publish, "x", routing_key=queue_name)
        loop = kombu_common.eventloop(connection, timeout=0.01, ignore_timeouts=True)
        for _ in islice(loop, 50):
            if inbox.bodies:
                break
        loop.close()
    assert inbox.bodies == ["x"]


def test_replies_are_collected(amqp_url, connection, channel, queue, queue_name):
    replies = Queue(f"{queue_name}-replies", exclusive=True, auto_delete=True)
    exchange = Exchange("", "direct")

    def serve() -> None:
        with green_connection(amqp_url) as other, other.channel() as chan:
            for _, request in kombu_common.itermessages(
                other, chan, Queue(queue_name, durable=False), limit=3, timeout=SOON
            ):
                kombu_common.send_reply(exchange, request, {"ok": request.payload}, Producer(chan))
                request.ack()

    replies(channel).declare()
    server = gevent.spawn(serve)
    for number in range(3):
        Producer(channel).publish(number, routing_key=queue_name, reply_to=replies.name)
    got = kombu_common.collect_replies(connection, channel, replies, limit=3, timeout=SOON)
    assert list(got) == [{"ok": 0}, {"ok": 1}, {"ok": 2}]
    server.get(timeout=SOON)


def test_maybe_declare_declares_once(channel, queue_name):
    queue = Queue(queue_name, durable=False)
    assert kombu_common.maybe_declare(queue, channel)
    assert not kombu_common.maybe_declare(queue, channel)
    assert kombu_common.maybe_declare(queue, channel, retry=True) is False


# -- transactions ---------------------------------------------------------------------------------


def test_a_transaction_is_committed_or_rolled_back(amqp_url, connection, queue_name):
    declare(amqp_url, queue_name)
    with connection.channel() as channel:
        channel.tx_select()
        producer = Producer(channel)
        producer.publish("rolled back", routing_key=queue_name)
        channel.tx_rollback()
        producer.publish("committed", routing_key=queue_name)
        assert queue_depth(amqp_url, queue_name) == 0
        channel.tx_commit()
        assert queue_depth(amqp_url, queue_name) == 1
        message = channel.basic_get(queue_name)
        message.channel.basic_ack(message.delivery_tag)
        channel.tx_rollback()
        channel.basic_recover(requeue=True)
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 1)
