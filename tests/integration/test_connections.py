"""A `kombu.Connection` over a green link: its life, its pools, and many greenlets that use it at once."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from time import process_time
from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Consumer, Producer, Queue, pools
from kombu.exceptions import ConnectionLimitExceeded, OperationalError

from greenconsume.events import StaleSettle
from tests import frames
from tests.integration.consumers import (
    SOON,
    channel_count,
    green_connection,
    observed,
    pause_for,
)
from tests.messages import declare, publish, queue_depth
from tests.waiting import wait_until


@pytest.fixture
def pooled() -> Iterator[None]:
    """kombu's pools, which it keeps for the process, emptied afterwards."""
    yield
    pools.reset()


# -- the life of a connection ---------------------------------------------------------------------


def test_a_connection_connects_when_it_is_used_and_closes_for_good(rabbitmq, amqp_url):
    connection = green_connection(amqp_url)
    assert not connection.connected
    connection.connect()
    assert connection.connected
    assert rabbitmq.connection_count(amqp_url) == 1
    connection.close()
    assert not connection.connected
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
    connection.release()


@pytest.mark.parametrize("end", ["release", "collect", "close"])
def test_a_connection_may_be_used_again_after_its_end(rabbitmq, amqp_url, queue_name, end):
    """HAZARDS row 21: `collect` leaves the process's default timeout for sockets alone."""
    connection = green_connection(amqp_url)
    for _ in range(3):
        connection.connect()
        connection.default_channel.queue_declare(queue_name)
        assert rabbitmq.connection_count(amqp_url) == 1
        getattr(connection, end)()
        wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
        connection = connection.clone()
    assert socket.getdefaulttimeout() is None


def test_channels_have_ids_of_their_own_and_give_them_back(rabbitmq, amqp_url, connection):
    channels = [connection.channel() for _ in range(50)]
    assert len({channel.channel_id for channel in channels}) == 50
    assert channel_count(rabbitmq, amqp_url) == 50
    for channel in channels:
        channel.close()
        channel.close()
    assert channel_count(rabbitmq, amqp_url) == 0
    again = [connection.channel() for _ in range(50)]
    assert max(channel.channel_id for channel in again) <= 50


def test_a_clone_has_a_link_of_its_own(rabbitmq, amqp_url, connection):
    connection.connect()
    with connection.clone() as other:
        other.connect()
        assert rabbitmq.connection_count(amqp_url) == 2
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 1)
    assert connection.connected


def test_draining_a_closed_connection_is_an_error_at_once(connection):
    connection.connect()
    transport, session = connection.transport, connection.connection
    connection.release()
    with pytest.raises(connection.recoverable_connection_errors):
        transport.drain_events(session, timeout=SOON)


def test_closing_a_connection_wakes_who_waits_for_its_messages(connection, queue_name):
    channel = connection.channel()
    Consumer(channel, [Queue(queue_name)]).consume()
    waiting = gevent.spawn(error_of, connection.transport, connection.connection)
    gevent.sleep(0)
    connection.release()
    assert isinstance(waiting.get(timeout=30), connection.recoverable_connection_errors)


def error_of(transport: Any, session: Any) -> Exception | None:
    try:
        transport.drain_events(session, timeout=SOON)
    except Exception as exc:  # whatever it is, the test looks at it
        return exc
    return None


def test_what_was_cut_off_is_ensured(proxy, queue_name):
    declare(proxy.url, queue_name)
    with green_connection(proxy.url) as connection:
        producer = Producer(connection.channel())
        safely = connection.ensure(producer, producer.publish, max_retries=3, interval_start=0.01)
        safely("before", routing_key=queue_name)
        wait_until(lambda: queue_depth(proxy.url, queue_name) == 1)
        session = connection.connection
        proxy.cut()
        wait_until(lambda: not session.connected)
        safely("after", routing_key=queue_name)
        wait_until(lambda: queue_depth(proxy.url, queue_name) == 2)


def test_what_was_cut_off_is_retried_on_a_new_channel(proxy, queue_name):
    seen: list[Any] = []

    def ask(name: str, channel: Any) -> Any:
        seen.append(channel)
        if len(seen) == 1:
            session = connection.connection
            proxy.cut()
            wait_until(lambda: not session.connected)
        return channel.queue_declare(name).queue

    with green_connection(proxy.url) as connection:
        retrying = connection.autoretry(ask, max_retries=3)
        assert retrying(queue_name) == (queue_name, seen[-1])
    assert len(seen) == 2


def test_retry_gives_up_after_its_retries(proxy, queue_name):
    with green_connection(proxy.url) as connection:
        producer = Producer(connection.channel())
        session = connection.connection
        proxy.refuse()
        proxy.cut()
        wait_until(lambda: not session.connected)
        policy = {"max_retries": 1, "interval_start": 0.01}
        with pytest.raises(OperationalError):
            producer.publish("x", routing_key=queue_name, retry=True, retry_policy=policy)


# -- pools ----------------------------------------------------------------------------------------


def test_a_connection_pool_lends_a_few_connections_to_many(rabbitmq, amqp_url, queue_name):
    declare(amqp_url, queue_name)
    pool = green_connection(amqp_url).Pool(limit=3)

    def work() -> None:
        with pool.acquire(block=True) as connection:
            Producer(connection).publish("x", routing_key=queue_name)
            gevent.sleep(0)

    gevent.joinall([gevent.spawn(work) for _ in range(50)], raise_error=True)
    assert rabbitmq.connection_count(amqp_url) <= 3
    lent = [pool.acquire() for _ in range(3)]
    with pytest.raises(ConnectionLimitExceeded):
        pool.acquire()
    for connection in lent:
        connection.release()
    pool.force_close_all()
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
    assert queue_depth(amqp_url, queue_name) == 50


def test_a_channel_pool_lends_a_few_channels_to_many(rabbitmq, amqp_url, connection, queue_name):
    pool = connection.ChannelPool(limit=3)

    def work() -> None:
        channel = pool.acquire(block=True)
        try:
            channel.queue_declare(queue_name)
        finally:
            channel.release()

    gevent.joinall([gevent.spawn(work) for _ in range(50)], raise_error=True)
    assert channel_count(rabbitmq, amqp_url) <= 3


@pytest.mark.usefixtures("pooled")
def test_kombus_pools_serve_fifty_greenlets(rabbitmq, amqp_url, connection, queue_name):
    declare(amqp_url, queue_name)

    def work(number: int) -> None:
        with pools.producers[connection].acquire(block=True) as producer:
            producer.publish(number, routing_key=queue_name)
        with pools.connections[connection].acquire(block=True) as lent:
            lent.default_channel.queue_declare(queue_name, passive=True)

    gevent.joinall([gevent.spawn(work, number) for number in range(50)], raise_error=True)
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 50)
    assert rabbitmq.connection_count(amqp_url) <= 10


@pytest.mark.usefixtures("pooled")
def test_kombus_pools_serve_again_after_a_cut(proxy, queue_name):
    declare(proxy.url, queue_name)
    policy = {"max_retries": 5, "interval_start": 0.01}
    connection = green_connection(proxy.url, transport_options={"confirm_publish": True})

    def work(number: int) -> None:
        with pools.producers[connection].acquire(block=True) as producer:
            producer.publish(
                number, routing_key=queue_name, retry=True, retry_policy=policy, serializer="json"
            )

    for count in (20, 40, 60):
        gevent.joinall([gevent.spawn(work, number) for number in range(20)], raise_error=True)
        wait_until(lambda count=count: queue_depth(proxy.url, queue_name) >= count)
        assert proxy.open_count >= 1
        proxy.cut()


# -- many greenlets -------------------------------------------------------------------------------


def test_greenlets_that_use_an_unconnected_connection_get_one_socket(rabbitmq, amqp_url):
    with green_connection(amqp_url) as connection:
        greenlets = [gevent.spawn(connection.channel) for _ in range(20)]
        gevent.joinall(greenlets, raise_error=True)
        assert rabbitmq.connection_count(amqp_url) == 1
        assert channel_count(rabbitmq, amqp_url) == 20


def test_two_greenlets_drain_one_connection(connection, amqp_url, queue_name):
    """HAZARDS row 6: py-amqp has them read one socket, which gevent forbids."""
    publish(amqp_url, queue_name, 500)
    by: dict[int, list[int]] = {}
    channel = connection.channel()
    channel.basic_qos(0, 20, False)

    def note(body: int, message: Any) -> None:
        by.setdefault(id(gevent.getcurrent()), []).append(body)
        gevent.sleep(0)
        message.ack()

    def drain() -> None:
        while sum(map(len, by.values())) < 500:
            with suppress(socket.timeout):
                connection.drain_events(timeout=0.1)

    with Consumer(channel, [Queue(queue_name)], callbacks=[note]):
        gevent.joinall([gevent.spawn(drain) for _ in range(2)], raise_error=True)
    assert sorted(chain.from_iterable(by.values())) == list(range(500))
    assert len(by) == 2


def test_any_greenlet_calls_while_another_drains(connection, queue_name):
    """HAZARDS row 6."""
    channel = connection.channel()
    done = Event()

    def drain() -> None:
        while not done.is_set():
            with suppress(socket.timeout):
                connection.drain_events(timeout=0.05)

    def call(number: int) -> str:
        name = f"{queue_name}-{number % 10}"
        channel.queue_declare(name)
        return str(channel.queue_declare(name, passive=True).queue)

    with Consumer(channel, [Queue(queue_name)]):
        draining = gevent.spawn(drain)
        calls = [gevent.spawn(call, number) for number in range(100)]
        gevent.joinall(calls, raise_error=True)
        done.set()
        draining.get(timeout=SOON)
    assert [each.value for each in calls] == [f"{queue_name}-{n % 10}" for n in range(100)]


def test_fifty_greenlets_ack_on_one_channel(rabbitmq, connection, amqp_url, queue_name):
    """HAZARDS rows 6 and 14: in whatever order, and each its own."""
    publish(amqp_url, queue_name, 500)
    messages: list[Any] = []
    with Consumer(connection.channel(), [Queue(queue_name)]) as consumer:
        consumer.register_callback(lambda _body, message: messages.append(message))
        while len(messages) < 500:
            connection.drain_events(timeout=SOON)
        random.shuffle(messages)
        kept = messages[450:]

        def settle(some: list[Any]) -> None:
            for message in some:
                message.ack()
                gevent.sleep(0)

        batches = [messages[start : start + 9] for start in range(0, 450, 9)]
        gevent.joinall([gevent.spawn(settle, batch) for batch in batches], raise_error=True)
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name).unacked == 50)
    connection.release()
    left = sorted(message.payload for message in kept)
    with green_connection(amqp_url) as other, other.channel() as channel:
        got = [channel.basic_get(queue_name, no_ack=True).body for _ in range(50)]
        assert channel.basic_get(queue_name) is None
    assert sorted(map(int, got)) == left


# -- interrupted greenlets ------------------------------------------------------------------------


@pytest.mark.parametrize("interrupt", ["timeout", "kill"])
def test_draining_greenlets_that_are_interrupted_harm_no_connection(
    amqp_url, connection, queue_name, interrupt
):
    """HAZARDS row 1: 92 of 300 random kills wedged py-amqp's connection, in the middle of a frame."""
    total = publish(amqp_url, queue_name, [[n, "x" * 20_000] for n in range(1500)])
    got: list[int] = []
    channel = connection.channel()
    channel.basic_qos(0, 10, False)

    def note(body: Any, message: Any) -> None:
        got.append(body[0])
        message.ack()

    def drain() -> None:
        while len(got) < total:
            connection.drain_events(timeout=SOON)

    def drain_for(seconds: float) -> None:
        if interrupt == "timeout":
            with gevent.Timeout(seconds, False):
                drain()
        else:
            greenlet = gevent.spawn(drain)
            greenlet.join(seconds)
            greenlet.kill()

    with Consumer(channel, [Queue(queue_name)], callbacks=[note]):
        interruptions = 0
        while len(got) < total:
            drain_for(random.uniform(0, 0.002))
            interruptions += 1
    assert got == list(range(total))
    assert interruptions > 20
    assert connection.connected


def test_calls_that_are_interrupted_do_not_take_each_others_replies(connection, queue_name):
    """HAZARDS row 1: a reply that comes late is nobody's."""
    names = [f"{queue_name}-{number}" for number in range(10)]
    channel = connection.channel()
    for _ in range(30):
        for name in names:
            with gevent.Timeout(random.uniform(0, 0.002), False):
                channel.queue_declare(name)
        assert channel.queue_declare(queue_name).queue == queue_name
    assert [channel.queue_declare(name).queue for name in names] == names


# -- late settling --------------------------------------------------------------------------------


def test_settling_after_the_link_was_lost_does_nothing_but_count(proxy, queue_name):
    """HAZARDS row 13: the tag is nobody's, or by then somebody else's."""
    publish(proxy.url, queue_name, 3)
    messages: list[Any] = []
    with green_connection(proxy.url) as connection:
        consumer = connection.Consumer(
            [Queue(queue_name)], callbacks=[lambda _, m: messages.append(m)]
        )
        consumer.consume()
        while len(messages) < 3:
            connection.drain_events(timeout=SOON)
        transport, session = connection.transport, connection.connection
        proxy.cut()
        with pytest.raises(connection.connection_errors):
            transport.drain_events(session, timeout=SOON)
        with observed(StaleSettle) as stale:
            messages[0].ack()
            messages[1].reject()
            messages[2].requeue()
        assert [event.delivery_tag for event in stale] == [1, 2, 3]
        assert [event.count for event in stale] == [1, 2, 3]
        assert all(message.acknowledged for message in messages)
    wait_until(lambda: queue_depth(proxy.url, queue_name) == 3)


def test_settling_after_the_channel_was_closed_does_nothing_but_count(
    rabbitmq, amqp_url, connection, queue_name
):
    """HAZARDS row 13: of the new channel, with the same number, it acknowledges nothing."""
    publish(amqp_url, queue_name, 1)
    first, second = [], []
    for kept in (first, second):
        channel = connection.channel()
        consumer = Consumer(channel, [Queue(queue_name)])
        consumer.register_callback(lambda _, message, kept=kept: kept.append(message))
        consumer.consume()
        while not kept:
            connection.drain_events(timeout=SOON)
        if kept is first:
            channel.close()
    assert first[0].delivery_tag == second[0].delivery_tag
    with observed(StaleSettle) as stale:
        first[0].ack()
    assert len(stale) == 1
    assert rabbitmq.queue_counts(amqp_url, queue_name) == (0, 1, 1)
    second[0].ack()
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (0, 0, 1))


# -- a peer that sends half a frame ---------------------------------------------------------------


def test_publishing_beside_half_a_frame_does_not_freeze_the_hub(peer):
    """HAZARDS row 7: py-amqp's `drain_events(timeout=0)` spins until the other half has come."""
    gaps: list[float] = []

    def tick() -> None:
        while True:
            before = process_time()  # not what the machine spends on others
            pause_for(0.001)
            gaps.append(process_time() - before)

    with green_connection(peer.url) as connection:
        channel = connection.channel()
        got: list[Any] = []
        orders = Queue("orders")(channel)
        orders.consume("orders-consumer", lambda message: got.append(message.body))
        channel_id = peer.wait_for("basic.consume").channel
        whole = frames.deliver(channel_id, "orders-consumer", 1, b'"late"')
        peer.send(whole[:-5])
        ticking = gevent.spawn(tick)
        producer = Producer(channel)
        for number in range(200):
            producer.publish(number, routing_key="orders")
            gevent.sleep(0)
        wait_until(lambda: len(peer.published) == 200)
        with pytest.raises(socket.timeout):
            connection.drain_events(timeout=0.05)
        peer.send(whole[-5:])
        connection.drain_events(timeout=SOON)
        ticking.kill()
    assert got == ['"late"']
    assert max(gaps) < 0.2
