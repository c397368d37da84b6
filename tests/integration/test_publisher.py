"""Confirmed publishing to a real broker: whose answer is whose, what survives, and who waits for whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from time import monotonic
from typing import Any

import gevent
import pytest
from amqp.exceptions import AMQPNotImplementedError, ChannelError, MessageNacked
from gevent.event import Event
from kombu import Connection, Exchange, Producer, Queue

from greenconsume import Publisher
from greenconsume.consuming.engine import ensure_engine
from greenconsume.errors import (
    BlockedError,
    NackedError,
    PublishTimeoutError,
    RefusedError,
    ReturnedError,
    UnconfirmedError,
)
from greenconsume.events import LinkBlocked, LinkDown, LinkUp
from greenconsume.links.pool import LinkPool
from tests.brokers import client_tls
from tests.integration.consumers import (
    SOON,
    Recorder,
    channel_count,
    consuming,
    green_connection,
    observed,
)
from tests.messages import channel, declare, queue_depth
from tests.waiting import AT_ONCE, wait_until


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> gevent.Greenlet[..., Any]:
    """Start a greenlet that returns what it raises: gevent prints what is not caught."""

    def outcome() -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as exc:  # looked at by the test
            return exc

    return gevent.spawn(outcome)


def outcomes(calls: list[Any], within: float = 30.0) -> list[Any]:
    gevent.joinall(calls, timeout=within)
    return [each.get(block=False) for each in calls]


def kinds(results: list[Any]) -> list[Any]:
    return [result and type(result) for result in results]


def connection_to(url: str) -> Connection:
    return green_connection(url, transport_options={"close_timeout": 0.5})


@pytest.fixture
def publisher(amqp_url: str) -> Iterator[Publisher]:
    with Publisher(amqp_url) as publisher:
        yield publisher


def take(url: str, queue: str) -> Iterator[Any]:
    """Take what a queue holds, over py-amqp alone."""
    with channel(url) as chan:
        yield from iter(lambda: chan.basic_get(queue, no_ack=True), None)


def declare_narrow(url: str, queue: str) -> None:
    """A queue that takes one message, and has the broker nack every further one."""
    declare(url, queue, x_max_length=1, x_overflow="reject-publish")


# -- whose confirm is whose -------------------------------------------------------------------------


@contextmanager
def one_producer(url: str) -> Iterator[Callable[..., Any]]:
    with green_connection(url, transport_options={"confirm_publish": True}) as connection:
        yield Producer(connection.channel()).publish


@contextmanager
def one_publisher(url: str) -> Iterator[Callable[..., Any]]:
    with Publisher(url) as publisher:
        yield publisher.publish


SENDERS = pytest.mark.parametrize(
    ("sender", "nacked"), [(one_producer, MessageNacked), (one_publisher, NackedError)]
)


@SENDERS
def test_each_of_many_greenlets_is_told_of_its_own_message(amqp_url, queue_name, sender, nacked):
    """HAZARDS row 18: on one channel, 50 greenlets' confirms and nacks are mixed, and each gets its own."""
    wide, narrow = f"{queue_name}-wide", f"{queue_name}-narrow"
    declare(amqp_url, wide)
    declare_narrow(amqp_url, narrow)
    with sender(amqp_url) as publish:
        publish(0, routing_key=narrow)

        def work(n: int) -> list[Any]:
            queue = narrow if n % 3 == 0 else wide
            return [call(publish, n, routing_key=queue).get() for _ in range(20)]

        greenlets = [gevent.spawn(work, n) for n in range(50)]
        gevent.joinall(greenlets, raise_error=True)
        for n, greenlet in enumerate(greenlets):
            assert set(kinds(greenlet.value)) == ({nacked} if n % 3 == 0 else {None})
    assert queue_depth(amqp_url, wide) == 33 * 20
    assert queue_depth(amqp_url, narrow) == 1


@SENDERS
def test_each_of_many_greenlets_is_told_that_its_own_message_came_back(
    amqp_url, queue_name, sender, nacked
):
    """HAZARDS row 18: unroutable and routable ones at once, to the same exchange and of the same body."""
    declare(amqp_url, queue_name)
    with sender(amqp_url) as publish:

        def work(n: int) -> Any:
            key = queue_name if n % 2 else "nowhere"
            return call(publish, "same", routing_key=key, mandatory=n % 4 < 2).get()

        greenlets = [gevent.spawn(work, n) for n in range(200)]
        gevent.joinall(greenlets, raise_error=True)
        came_back = [greenlet.value is not None for greenlet in greenlets]
    assert came_back == [n % 4 == 0 for n in range(200)]
    errors = [greenlet.value for greenlet in greenlets if greenlet.value is not None]
    assert all(isinstance(error, (ReturnedError, ChannelError)) for error in errors)
    assert {error.reply_code for error in errors} == {312}


def test_a_hundred_greenlets_share_one_channel(rabbitmq, amqp_url, queue_name, publisher):
    declare(amqp_url, queue_name)
    calls = [call(publisher.publish, n, queue_name) for n in range(100) for _ in range(10)]
    assert outcomes(calls) == [None] * 1000
    assert (rabbitmq.connection_count(amqp_url), channel_count(rabbitmq, amqp_url)) == (1, 1)
    assert queue_depth(amqp_url, queue_name) == 1000


def test_messages_of_one_greenlet_arrive_in_its_order(amqp_url, queue_name, publisher):
    declare(amqp_url, queue_name)
    for n in range(500):
        publisher.publish_nowait(n, queue_name)
    publisher.flush()
    assert [int(message.body) for message in take(amqp_url, queue_name)] == list(range(500))


def test_what_is_published_reaches_a_consumer_as_kombu_sends_it(amqp_url, queue_name):
    orders = Exchange(f"{queue_name}-x", "topic", durable=False)
    queue = Queue(queue_name, orders, routing_key="new.#")
    seen: list[Any] = []

    def note(body: Any, message: Any) -> None:
        seen.append((body, message.headers, message.properties["message_id"]))

    with Publisher(amqp_url, exchange=orders, serializer="pickle", compression="zlib") as publisher:
        publisher.publish(
            {"ü": [1, None]}, "new.x", headers={"a": 1}, message_id="m", declare=[queue]
        )
        with consuming(Recorder(amqp_url, queue, note, accept=["pickle"])) as [greenlet]:
            wait_until(lambda: seen, SOON)
            assert greenlet.ready.is_set()
    ((body, headers, message_id),) = seen
    assert (body, headers["a"], message_id) == ({"ü": [1, None]}, 1, "m")


# -- what the broker refuses --------------------------------------------------------------------------


def test_a_missing_exchange_fails_its_own_messages_and_no_others(amqp_url, queue_name, publisher):
    declare(amqp_url, queue_name)
    calls = []
    for n in range(200):
        missing = {"exchange": f"{queue_name}-missing"} if n % 50 == 25 else {}
        calls.append(call(publisher.publish, n, queue_name, **missing))
    results = outcomes(calls)
    refused = [n for n, result in enumerate(results) if result is not None]
    assert refused == [25, 75, 125, 175]
    assert {(type(results[n]), results[n].reply_code) for n in refused} == {(RefusedError, 404)}
    arrived = Counter(int(message.body) for message in take(amqp_url, queue_name))
    assert set(arrived) == set(range(200)) - set(refused)


def test_a_message_that_breaks_a_rule_fails_alone(amqp_url, queue_name, publisher):
    """The broker names nobody: whose user id it is has to be found out."""
    declare(amqp_url, queue_name)
    publisher.publish("first", queue_name)
    calls = []
    for n in range(30):
        wrong = {"user_id": "somebody-else"} if n in (7, 20) else {}
        calls.append(call(publisher.publish, n, queue_name, **wrong))
    results = outcomes(calls)
    assert [n for n, result in enumerate(results) if result is not None] == [7, 20]
    assert (type(results[7]), results[7].reply_code) == (RefusedError, 406)
    arrived = Counter(message.body for message in take(amqp_url, queue_name))
    assert len(arrived) == 29
    assert max(arrived.values()) <= 3


def test_a_message_that_kills_the_connection_fails_alone(amqp_url, queue_name, publisher):
    declare(amqp_url, queue_name)
    publisher.publish("first", queue_name)
    calls = []
    for n in range(130):
        poison = {"immediate": True} if n == 60 else {}
        calls.append(call(publisher.publish, n, queue_name, **poison))
    results = outcomes(calls)
    assert [n for n, result in enumerate(results) if result is not None] == [60]
    assert (type(results[60]), results[60].reply_code) == (RefusedError, 540)
    arrived = Counter(message.body for message in take(amqp_url, queue_name))
    assert len(arrived) == 130
    assert max(arrived.values()) <= 2


def test_kombus_own_retries_end_at_an_error_that_no_waiting_mends(amqp_url, queue_name):
    """As over py-amqp; they went on for ever, losing the link a dozen times a second."""
    connection = green_connection(amqp_url, transport_options={"confirm_publish": True})
    with connection, observed(LinkDown) as lost:
        producer = Producer(connection)
        with pytest.raises(AMQPNotImplementedError, match="immediate=true"):
            producer.publish("x", routing_key=queue_name, immediate=True, retry=True)
    assert len(lost) == 1


# -- what survives ------------------------------------------------------------------------------------


def test_a_link_cut_at_any_byte_loses_no_message(proxy, amqp_url, queue_name):
    """What was not confirmed is written again, with its message id; every `publish` returns in the end."""
    declare(amqp_url, queue_name)
    chance = Random(7)
    with observed(LinkDown) as lost, Publisher(connection_to(proxy.url)) as publisher:
        publisher.publish("before", "nowhere")
        for first in range(0, 200, 20):
            proxy.truncate_at(chance.randrange(1, 42))  # in the first or the second confirm
            calls = [
                call(publisher.publish, n, queue_name, message_id=str(n))
                for n in range(first, first + 20)
            ]
            assert outcomes(calls) == [None] * 20
        assert len(lost) >= 3
    arrived = Counter(
        (message.properties["message_id"], message.body) for message in take(amqp_url, queue_name)
    )
    assert set(arrived) == {(str(n), str(n)) for n in range(200)}
    assert sum(arrived.values()) <= 200 + 20 * len(lost)


def test_a_link_that_goes_half_open_loses_no_message(proxy, amqp_url, queue_name):
    """HAZARDS row 5: what went into a dead socket is written again once its heartbeat is missed."""
    declare(amqp_url, queue_name)
    connection = green_connection(
        proxy.url, transport_options={"close_timeout": 0.5, "heartbeat": 1}
    )
    with Publisher(connection) as publisher:
        publisher.publish("before", queue_name)
        proxy.half_open()
        publisher.publish("after", queue_name)
    assert [message.body for message in take(amqp_url, queue_name)] == ["before", "after"]


def test_a_publisher_whose_broker_closed_its_connection_goes_on(
    rabbitmq, amqp_url, queue_name, publisher
):
    declare(amqp_url, queue_name)
    publisher.publish(1, queue_name)
    rabbitmq.close_connections(amqp_url)
    publisher.publish(2, queue_name)
    assert queue_depth(amqp_url, queue_name) == 2


@pytest.mark.slow
def test_a_broker_that_restarts_loses_nothing_that_was_confirmed(
    rabbitmq_fault, amqp_url, queue_name
):
    declare(amqp_url, queue_name)
    confirmed: list[int] = []
    stop = Event()

    def work(worker: int) -> None:
        for n in range(worker, 10**6, 10):
            if stop.is_set():
                return
            publisher.publish(n, queue_name)
            confirmed.append(n)

    with Publisher(connection_to(amqp_url), timeout=60.0) as publisher:
        greenlets = [gevent.spawn(work, worker) for worker in range(10)]
        wait_until(lambda: len(confirmed) > 100, SOON)
        rabbitmq_fault.restart()
        before = len(confirmed)
        wait_until(lambda: len(confirmed) > before + 100, 30.0)
        stop.set()
        gevent.joinall(greenlets, raise_error=True)
    arrived = {int(message.body) for message in take(amqp_url, queue_name)}
    assert set(confirmed) <= arrived


# -- who waits for whom -------------------------------------------------------------------------------


def test_publishing_waits_while_the_broker_blocks(rabbitmq_fault, amqp_url, queue_name, publisher):
    """HAZARDS row 14."""
    declare(amqp_url, queue_name)
    publisher.publish(0, queue_name)
    with observed(LinkBlocked) as blocks:
        rabbitmq_fault.block()
        publisher.publish_nowait(1, queue_name)  # the broker blocks who publishes, not who might
        wait_until(lambda: blocks, SOON)
        began = monotonic()
        with pytest.raises(BlockedError):
            publisher.publish("late", queue_name, timeout=0.2)
        assert 0.2 <= monotonic() - began < AT_ONCE
        waiting = [call(publisher.publish, n, queue_name) for n in range(2, 22)]
        gevent.joinall(waiting, timeout=0.05)
        assert not any(each.ready() for each in waiting)
        rabbitmq_fault.unblock()
        assert outcomes(waiting) == [None] * 20
    assert queue_depth(amqp_url, queue_name) == 22


def test_not_more_is_outstanding_than_was_said(proxy, amqp_url, queue_name):
    declare(amqp_url, queue_name)
    with Publisher(connection_to(proxy.url), max_unconfirmed=10) as publisher:
        publisher.publish(0, queue_name)
        proxy.stall("to_client")  # the confirms
        calls = [call(publisher.publish, n, queue_name) for n in range(1, 31)]
        wait_until(lambda: queue_depth(amqp_url, queue_name) == 11, SOON)
        with pytest.raises(PublishTimeoutError, match="10 others are unconfirmed"):
            publisher.publish(31, queue_name, timeout=0.05)
        assert queue_depth(amqp_url, queue_name) == 11
        proxy.resume()
        assert outcomes(calls) == [None] * 30
    assert queue_depth(amqp_url, queue_name) == 31


def test_large_bodies_of_many_greenlets_do_not_mix(amqp_url, queue_name, publisher):
    declare(amqp_url, queue_name)
    bodies = [bytes([n]) * (1_000_000 + 300_000 * n) for n in range(8)]
    options = {"serializer": "raw", "content_type": "application/octet-stream"}
    calls = [call(publisher.publish, body, queue_name, **options) for body in bodies]
    assert outcomes(calls) == [None] * 8
    assert [bytes(message.body) for message in take(amqp_url, queue_name)] == bodies


def test_a_large_body_does_not_hold_up_the_links_other_channels(proxy, amqp_url, queue_name):
    """The proxy is slow: the large one takes seconds, and what is small goes in between."""
    declare(amqp_url, queue_name)
    links = LinkPool()
    with Publisher(connection_to(proxy.url), links=links) as large:
        with Publisher(connection_to(proxy.url), links=links) as small:
            large.publish(0, queue_name)
            small.publish(0, queue_name)
            proxy.latency(0.0125)  # for each 64 KB
            big = large.publish_nowait(bytes(16_000_000), queue_name, serializer="raw")
            small.publish(1, queue_name)
            assert not big.ready
            big.wait()
        assert links.open_count == 1
    assert queue_depth(amqp_url, queue_name) == 4


def test_a_consumers_handler_publishes_over_the_pools_other_link(rabbitmq, amqp_url, queue_name):
    """Law 6: consumers and publisher share a pool, and no link of it both consumes and publishes."""
    answers, pool = f"{queue_name}-answers", LinkPool()
    declare(amqp_url, answers)
    with Publisher(amqp_url, links=pool) as publisher, observed(LinkUp) as links:
        publish = partial(publisher.publish, routing_key=answers)
        recorders = [
            Recorder(amqp_url, f"{queue_name}-{n}", lambda body, _: publish(body)) for n in (0, 1)
        ]
        for recorder in recorders:
            ensure_engine(recorder).links = pool
        with consuming(*recorders):
            for n in range(40):
                publisher.publish(n, f"{queue_name}-{n % 2}")
            wait_until(lambda: queue_depth(amqp_url, answers) == 40, SOON)
            wait_until(lambda: rabbitmq.connection_count(amqp_url) == 2)
    assert len(links) == 2


def test_closing_flushes_and_leaves_nothing_behind(rabbitmq, amqp_url, queue_name):
    declare(amqp_url, queue_name)
    with Publisher(amqp_url) as publisher:
        for n in range(2000):
            publisher.publish_nowait(n, queue_name)
    assert queue_depth(amqp_url, queue_name) == 2000
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


def test_stopping_ends_at_once_what_waits_for_a_broker_that_froze(
    rabbitmq_fault, amqp_url, queue_name
):
    declare(amqp_url, queue_name)
    publisher = Publisher(connection_to(amqp_url), timeout=None)
    publisher.publish(0, queue_name)
    rabbitmq_fault.pause()
    waiting = [call(publisher.publish, n, queue_name) for n in range(10)]
    gevent.joinall(waiting, timeout=0.05)
    began = monotonic()
    publisher.stop()
    assert kinds(outcomes(waiting)) == [UnconfirmedError] * 10
    publisher.close()
    assert monotonic() - began < AT_ONCE


def test_over_tls_it_is_the_same(amqps_url, amqp_url, queue_name, rabbitmq):
    declare(amqp_url, queue_name)
    connection = green_connection(amqps_url, ssl=client_tls(rabbitmq))
    with Publisher(connection) as publisher:
        calls = [call(publisher.publish, "x" * 100_000, queue_name) for _ in range(50)]
        assert outcomes(calls) == [None] * 50
    assert queue_depth(amqp_url, queue_name) == 50
