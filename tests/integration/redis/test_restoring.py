"""Tests what is held and not settled: refreshed, restored, counted, set aside; beside plain kombu and
across lost links.
"""

from __future__ import annotations

import json
from itertools import count
from time import time
from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Consumer, Producer, Queue

from greenconsume.amqp.link import LinkLostError
from greenconsume.redis.keyspace import Keyspace
from tests.integration.consumers import Inbox, Recorder, consuming, green_connection
from tests.integration.redis.payloads import (
    abandon,
    bodies_in,
    body_of,
    held_count,
    put,
    refreshed_at,
)
from tests.options import say
from tests.waiting import wait_until

pytestmark = pytest.mark.every_redis


def plain(url: str, **options: Any) -> Connection:
    """A connection over kombu's own transport."""
    return Connection(url, transport="kombu.transport.redis:Transport", transport_options=options)


def green(url: str, **options: Any) -> Connection:
    return green_connection(url, transport_options=options)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_what_nobody_settled_in_time_comes_back_whatever_the_consumers_do(
    redis_url, server, queue_name, quick, busy
):
    """Plain kombu restores after an empty poll only: at 20 messages a second not in 25 s."""
    abandon(server, queue_name, "a", "b", "c")
    consumer = Recorder(redis_url, queue_name)
    feeding = [busy]

    def feed() -> None:
        for fed in count(1):
            if not feeding[0]:
                return
            put(server, queue_name, "more")
            wait_until(lambda fed=fed: consumer.bodies.count("more") == fed)

    with consuming(consumer):
        feeder = gevent.spawn(feed)
        wait_until(lambda: {"a", "b", "c"} <= set(consumer.bodies))
        feeding[0] = False
        feeder.join()
        wait_until(lambda: held_count(server) == 0)
    assert [body for body in consumer.bodies if body != "more"] == ["a", "b", "c"]
    assert consumer.redelivered.count(True) == 3


def test_what_is_handled_for_long_is_not_done_twice(redis_url, server, queue_name, quick):
    """With kombu a handler that outlasts the visibility timeout is started again elsewhere."""
    put(server, queue_name, "long")
    connections = [green(redis_url, visibility_timeout=2.0) for _ in range(2)]
    done = Event()
    consumers = [Recorder(each, queue_name, lambda _b, _m: done.wait()) for each in connections]
    for consumer in consumers:
        say(consumer, concurrency=1)
    with consuming(*consumers):
        wait_until(lambda: held_count(server) == 1)
        taken_at = refreshed_at(server)
        wait_until(lambda: refreshed_at(server) > taken_at + 4.0, within=30)  # twice the timeout
        assert held_count(server) == 1
        done.set()
        wait_until(lambda: held_count(server) == 0)
    assert sum(len(consumer.bodies) for consumer in consumers) == 1


def test_a_process_that_is_gone_is_inherited_long_before_the_timeout(
    redis_url, server, queue_name, quick
):
    abandon(server, queue_name, 1, 2, 3, age=1.0, owner="greenconsume.dead.")
    server.hset("_greenconsume.owners", "greenconsume.dead.", f"{time() - 60} 999999")
    with consuming(consumer := Recorder(redis_url, queue_name)):
        consumer.wait_for(3)
        wait_until(lambda: held_count(server) == 0)
        wait_until(lambda: not server.hexists("_greenconsume.owners", "greenconsume.dead."))
    assert consumer.bodies == [1, 2, 3]


def test_a_late_ack_leaves_the_next_holder_its_message(redis_url, server, queue_name):
    """kombu's tag is that of the publication: the ack of who lost it removes the record of who has it."""
    [raw] = put(server, queue_name, "x")
    with green(redis_url) as first, green(redis_url) as second:
        late, inbox = Inbox(first, ack=False), Inbox(second, ack=False)
        with Consumer(first, [Queue(queue_name)], callbacks=[late], prefetch_count=1):
            late.drain(1)
            server.delete("unacked", "unacked_index")  # it was restored meanwhile
            server.rpush(queue_name, raw)
            with Consumer(second, [Queue(queue_name)], callbacks=[inbox], prefetch_count=1):
                inbox.drain(1)
                held, before = server.hkeys("unacked"), hdel_count(server)
                late.messages[0].ack()
                wait_until(lambda: hdel_count(server) > before)
                assert server.hkeys("unacked") == held
                assert len(held) == server.zcard("unacked_index") == 1


def hdel_count(server: Any) -> int:
    return server.info("commandstats").get("cmdstat_hdel", {}).get("calls", 0)


def test_what_is_no_message_comes_back_as_it_was(redis_url, server, queue_name, quick):
    """It is for `on_decode_error` to say what becomes of it."""
    for number, raw in enumerate((b"no json", b"7", b'{"a": ","","', b"[]"), 1):
        server.hset("unacked", f"gone.{number}", b"[" + raw + Keyspace.tail_of(queue_name))
        server.zadd("unacked_index", {f"gone.{number}": 1})
    found: list[Any] = []

    def on_decode_error(message: Any, _error: object) -> None:
        found.append(message.body)
        message.ack()

    with consuming(Recorder(redis_url, queue_name, on_decode_error=on_decode_error)):
        wait_until(lambda: len(found) == 4)
        wait_until(lambda: held_count(server) == 0)
    assert found == [b"no json", b"7", b'{"a": ","","', b"[]"]


def test_a_process_that_only_is_silent_keeps_its_messages(redis_url, server, queue_name, quick):
    """One whose hub is blocked beats no more, but the server still has its connection."""
    abandon(server, queue_name, "x", age=1.0, owner="greenconsume.slow.")
    number = server.client_id()
    server.hset("_greenconsume.owners", "greenconsume.slow.", f"{time() - 60} {number}")
    with consuming(consumer := Recorder(redis_url, queue_name)):
        for gone in ("one", "another"):  # what was looked for twice was looked for once in whole
            owner = f"greenconsume.{gone}."
            abandon(server, queue_name, gone, age=1.0, owner=owner)
            server.hset("_greenconsume.owners", owner, f"{time() - 60} 999999")
            wait_until(lambda gone=gone: gone in consumer.bodies)
        wait_until(lambda: held_count(server) == 1)
    assert consumer.bodies == ["one", "another"]
    assert held_count(server) == 1


def test_what_always_fails_is_set_aside_with_its_count(redis_url, server, queue_name):
    put(server, queue_name, "poison", "good")
    connection = green(redis_url, delivery_limit=3)
    bodies: list[Any] = []

    def handle(body: Any, message: Any) -> None:
        bodies.append(body)
        if body == "poison":
            message.requeue()

    with consuming(consumer := Recorder(connection, queue_name, handle, prefetch_count=1)):
        wait_until(lambda: "good" in consumer.bodies)
    assert bodies == [*["poison"] * 4, "good"]
    [dead] = server.lrange(f"{queue_name}.dead", 0, -1)
    headers = json.loads(dead)["headers"]
    assert body_of(dead) == "poison"
    assert headers["x-delivery-count"] == 4
    assert headers["greenconsume-queue"] == queue_name
    assert headers["greenconsume-error-type"] == "delivery_limit"


def test_a_requeue_keeps_the_order_of_a_queue(connection, server, queue_name):
    put(server, queue_name, *range(6))
    inbox = Inbox(connection, ack=False)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox], prefetch_count=4):
        inbox.drain(4)
        for message in (inbox.messages[2], inbox.messages[0], inbox.messages[3]):
            message.requeue()
        connection.default_channel.basic_qos(0, 1, False)
        wait_until(lambda: server.llen(queue_name) == 5)
    assert bodies_in(server, queue_name) == [0, 2, 3, 4, 5]


def test_plain_kombu_restores_what_we_held_to_its_queue(redis_url, server, queue_name):
    """The entry names the queue, so that a restore by routing goes nowhere else."""
    before = put(server, queue_name, "x")
    with green(redis_url) as ours:
        inbox = Inbox(ours, ack=False)
        with Consumer(ours, [Queue(queue_name)], callbacks=[inbox], prefetch_count=1):
            inbox.drain(1)
            [field] = server.hkeys("unacked")
            server.zadd("unacked_index", {field: 1})
            with plain(redis_url, visibility_timeout=1) as theirs:
                theirs.default_channel.qos.restore_visible(interval=1)
            assert held_count(server) == 0
            assert bodies_in(server, queue_name) == ["x"]
            inbox.messages[0].ack()  # too late, and no harm to who holds it next
            assert json.loads(server.lindex(queue_name, 0))["body"] == json.loads(before[0])["body"]


def test_what_plain_kombu_held_is_restored_by_us(redis_url, server, queue_name, quick):
    with plain(redis_url) as theirs:
        Producer(theirs).publish("x", routing_key=queue_name, declare=[Queue(queue_name)])
        channel = theirs.channel()
        assert channel.basic_get(queue_name) is not None
        [field] = server.hkeys("unacked")
        server.zadd("unacked_index", {field: 1})
        channel.qos._delivered.clear()
        channel.qos._dirty.clear()
    with consuming(consumer := Recorder(redis_url, queue_name)):
        assert consumer.wait_for(1) == ["x"]
        wait_until(lambda: held_count(server) == 0)


def test_publishers_and_consumers_of_both_kinds_share_a_queue(redis_url, server, queue_name):
    ours, theirs = green(redis_url), plain(redis_url)
    bodies: list[int] = []
    with theirs, consuming(consumer := Recorder(ours, queue_name)):
        producer = Producer(theirs)
        with Consumer(
            theirs.channel(),
            [Queue(queue_name)],
            callbacks=[lambda body, message: (bodies.append(body), message.ack())],
            prefetch_count=1,
        ):
            for n in range(100):
                producer.publish(n, routing_key=queue_name, priority=n % 10)
            while len(bodies) + len(consumer.bodies) < 100:
                with pytest.MonkeyPatch.context():
                    try:
                        theirs.drain_events(timeout=0.1)
                    except TimeoutError:
                        pass
    assert sorted([*bodies, *consumer.bodies]) == list(range(100))
    assert held_count(server) == 0


# -- lost links ----------------------------------------------------------------------------------


@pytest.fixture
def proxied(make_proxy, redis_url) -> Any:
    return make_proxy(redis_url)


def test_a_handler_that_runs_keeps_its_message_when_the_link_is_lost(proxied, server, queue_name):
    put(server, queue_name, *range(5))
    gate = Event()
    consumer = Recorder(proxied.url, queue_name, lambda _b, _m: gate.wait(), prefetch_count=2)
    say(consumer, concurrency=2)
    with consuming(consumer):
        wait_until(lambda: held_count(server) == 2)
        proxied.cut()
        wait_until(lambda: consumer.ready_count == 2)
        gate.set()
        consumer.wait_for(5)
        wait_until(lambda: held_count(server) == 0)
    assert sorted(consumer.bodies) == list(range(5))


def test_a_link_lost_between_two_drains_is_told_before_kombu_opens_another(proxied, queue_name):
    """Else the next one would wait on a connection that consumes nothing, for ever."""
    connection = green(proxied.url)
    with Consumer(connection, [Queue(queue_name)], callbacks=[print]):
        session = connection.connection
        proxied.cut()
        wait_until(lambda: not session.connected)
        with pytest.raises(LinkLostError):
            connection.drain_events(timeout=30)
        assert not connection.connected
    inbox = Inbox(connection)
    with Consumer(connection, [Queue(queue_name)], callbacks=[inbox]):
        Producer(connection).publish("x", routing_key=queue_name)
        inbox.drain(1)
    assert inbox.bodies == ["x"]
    connection.close()


def test_acks_that_were_not_confirmed_are_said_again(proxied, server, queue_name):
    put(server, queue_name, *range(100))
    with consuming(consumer := Recorder(proxied.url, queue_name, prefetch_count=50)):
        for cut in range(5):
            consumer.wait_for(10 + cut * 15)
            proxied.cut()
        consumer.wait_for(100)
        wait_until(lambda: held_count(server) == 0)
    assert sorted(consumer.bodies) == list(range(100))


def test_closing_goes_on_where_one_channel_raises(redis_url, server, queue_name):
    put(server, queue_name, "x")
    connection = green(redis_url)
    channels = [connection.channel() for _ in range(3)]
    inbox = Inbox(connection, ack=False)
    Consumer(channels[2], [Queue(queue_name)], callbacks=[inbox]).consume()
    inbox.drain(1)

    def fail(*_args: object) -> None:
        raise ValueError("this channel's own")

    channels[1].announce_stop = fail
    with pytest.raises(ValueError, match="own"):
        connection.transport.close_connection(connection.connection)
    wait_until(lambda: held_count(server) == 0)
    assert server.llen(queue_name) == 1
    assert all(channel.closed for channel in channels)
