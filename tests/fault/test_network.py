"""Tests networks that cut, cut in mid-frame, stall, are half-open or slow: nothing is lost."""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Producer

from greenconsume import Runtime
from greenconsume.events import LinkDown, LinkUp
from tests.brokers import client_tls
from tests.fault.consumers import (
    CLOSE_TIMEOUT,
    Collector,
    Unlimited,
    connection_to,
    duplicates,
    everything,
    observing,
    patient_connection_to,
    running,
    stop_and_join,
)
from tests.messages import declare, publish
from tests.options import say
from tests.proxy import DIRECTIONS, Proxy
from tests.waiting import AT_ONCE, wait_until

PREFETCH = 10


@pytest.fixture
def settled(rabbitmq, amqp_url, queue_name) -> Callable[[], None]:
    """Wait until the queue is empty, also of what was delivered and not acknowledged."""

    def wait() -> None:
        counts = partial(rabbitmq.queue_counts, amqp_url, queue_name)
        wait_until(lambda: counts()[:2] == (0, 0))

    return wait


class Way:
    """A proxy to the broker, and connections that lead through it."""

    def __init__(self, proxy: Proxy, **options: Any) -> None:
        self.proxy = proxy
        self._options = options

    def connection(self, **transport_options: Any) -> Connection:
        options = {"close_timeout": CLOSE_TIMEOUT, **transport_options}
        return Connection(self.proxy.url, transport_options=options, **self._options)


@pytest.fixture(params=["amqp", "amqps"])
def way(request, rabbitmq, make_proxy, amqp_url) -> Way:
    """Plain and over TLS."""
    if request.param == "amqp":
        return Way(make_proxy(amqp_url))
    return Way(make_proxy(request.getfixturevalue("amqps_url")), ssl=client_tls(rabbitmq))


@pytest.mark.parametrize("concurrency", [None, 3])
def test_a_link_lost_while_a_handler_runs_brings_its_consumer_back(
    way, amqp_url, queue_name, concurrency, settled
):
    """HAZARDS row 13: the late ack is a counted no-op, and the consumer does not sit there silent."""
    publish(amqp_url, queue_name, 1)
    begun, go_on = Event(), Event()

    def work(_body: Any) -> None:
        begun.set()
        go_on.wait()

    consumer = Collector(way.connection(), queue_name, work=work, concurrency=concurrency)
    with observing(LinkDown) as lost, running(consumer):
        assert begun.wait(30)
        way.proxy.cut()
        wait_until(lambda: lost)
        gevent.sleep(0.1)
        go_on.set()
        wait_until(lambda: consumer.handled[0] == 2)
        publish(amqp_url, queue_name, [1])
        wait_until(lambda: consumer.handled[1] == 1)
    settled()


@pytest.mark.usefixtures("every_link_has_lived")
@pytest.mark.parametrize("concurrency", [None, 3])
def test_a_cut_at_any_byte_loses_nothing(way, amqp_url, queue_name, concurrency, settled):
    """HAZARDS rows 1 and 13: a link that was cut in a frame is closed, never used again."""
    count = 100 if way.proxy.url.startswith("amqps") else 300  # a handshake of TLS is cut, too
    handled: Counter[Any] = Counter()
    consumer = Collector(way.connection(), queue_name, handled, PREFETCH)
    say(consumer, concurrency=concurrency)
    consumer.restart_limit = Unlimited()
    with running(consumer) as (greenlet,):
        for first in range(0, count, 10):
            links = way.proxy.connection_count
            way.proxy.truncate_at(random.Random(first).randrange(1, 900))
            publish(amqp_url, queue_name, range(first, first + 10))
            wait_until(lambda links=links: way.proxy.connection_count > links)
            wait_until(greenlet.ready.is_set)
        wait_until(everything(handled, count))
        stop_and_join(greenlet)
    assert duplicates(handled) <= PREFETCH * way.proxy.connection_count
    settled()


def test_a_cut_at_any_byte_of_the_handshake_and_set_up_is_tried_again(
    make_proxy, amqp_url, queue_name
):
    """HAZARDS row 22: the sockets of attempts that failed are closed; the leak check looks."""
    byte_counts = [*range(1, 12), *range(20, 621, 20)]
    proxies = [make_proxy(amqp_url) for _ in byte_counts]
    for proxy, byte_count in zip(proxies, byte_counts, strict=True):
        proxy.truncate_at(byte_count)
    with running(
        *(Collector(connection_to(each.url), queue_name) for each in proxies)
    ) as greenlets:
        assert [each.connection_count for each in proxies] == [2] * len(proxies)
        assert [each.open_count for each in proxies] == [1] * len(proxies)
        for greenlet in greenlets:
            greenlet.stop()
    assert all(greenlet.successful() for greenlet in greenlets)


def test_a_half_open_link_is_noticed_by_its_heartbeat(way, amqp_url, queue_name):
    """HAZARDS row 5: a peer that vanished without a word is noticed within three intervals of a second.

    Not before one of them, and not by the default of 30 s.
    """
    consumer = Collector(way.connection(heartbeat=1), queue_name, prefetch=PREFETCH)
    with observing(LinkDown) as lost, running(consumer):
        way.proxy.half_open()
        began = monotonic()
        publish(amqp_url, queue_name, 20)
        wait_until(lambda: lost)
        assert 1.0 < monotonic() - began < AT_ONCE
        wait_until(everything(consumer.handled, 20))
    assert duplicates(consumer.handled) == 0


@pytest.mark.parametrize("direction", [None, *DIRECTIONS])
def test_a_stall_within_the_heartbeat_loses_nothing_and_keeps_the_link(
    way, amqp_url, queue_name, direction, settled
):
    """HAZARDS rows 5 and 8: neither a write nor the link times out for a pause."""
    consumer = Collector(way.connection(heartbeat=4), queue_name, prefetch=PREFETCH)
    with observing(LinkDown) as lost, running(consumer):
        way.proxy.stall(direction)
        publish(amqp_url, queue_name, 100)
        gevent.sleep(1.0)
        assert not everything(consumer.handled, 100)()
        way.proxy.resume()
        wait_until(everything(consumer.handled, 100))
        settled()
        assert lost == []
    assert duplicates(consumer.handled) == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_stop_during_a_stall_is_bounded_and_loses_nothing(
    way, amqp_url, queue_name, direction, settled
):
    """HAZARDS row 17: closing does not wait for a network that is gone."""
    publish(amqp_url, queue_name, 100)
    consumer = Collector(way.connection(), queue_name, prefetch=PREFETCH)
    with running(consumer) as (greenlet,):
        way.proxy.stall(direction)
        gevent.sleep(0.05)
        assert stop_and_join(greenlet) < AT_ONCE
    handled_before = set(consumer.handled)
    way.proxy.resume()
    wait_until(lambda: way.proxy.open_count == 0)
    rest = Collector(connection_to(amqp_url), queue_name, consumer.handled, PREFETCH)
    with running(rest):
        wait_until(everything(consumer.handled, 100))
        settled()
    assert duplicates(consumer.handled) <= len(handled_before)


def test_many_acks_into_a_stalled_socket_are_all_sent_once_it_flows_again(
    way, amqp_url, queue_name, settled
):
    """HAZARDS row 8: an ack's write times out half sent, because the reader's settimeout applies to it."""
    count = 8_000
    publish(amqp_url, queue_name, count)
    consumer = Collector(way.connection(heartbeat=10), queue_name, prefetch=0)
    way.proxy.stall("to_server")
    way.proxy.resume()
    with observing(LinkDown) as lost, running(consumer):
        wait_until(lambda: len(consumer.handled) > 50)
        way.proxy.stall("to_server")
        gevent.sleep(1.5)
        way.proxy.resume()
        wait_until(everything(consumer.handled, count))
        settled()
        assert lost == []
    assert duplicates(consumer.handled) == 0


def test_collecting_a_connection_leaves_the_process_wide_timeout_alone(
    proxy, amqp_url, queue_name, monkeypatch
):
    """HAZARDS row 21: Connection.collect changes the socket timeout of everybody while others run."""
    calls: list[Any] = []
    monkeypatch.setattr(socket, "setdefaulttimeout", calls.append)
    declare(amqp_url, queue_name)
    with running(Collector(connection_to(amqp_url), queue_name)) as (greenlet,):
        connection = patient_connection_to(proxy.url, confirm_publish=True)
        producer = Producer(connection.default_channel)
        proxy.stall()
        began = monotonic()
        connection.collect()
        assert monotonic() - began < AT_ONCE
        proxy.resume()
        wait_until(lambda: proxy.open_count == 0)
        producer = Producer(connection.default_channel)
        proxy.cut()
        # kombu's own retries collect the connection before they connect again.
        producer.publish(1, routing_key=queue_name, retry=True, retry_policy={"max_retries": 3})
        wait_until(lambda: greenlet.consumer.handled[1])
        connection.close()
        wait_until(lambda: proxy.open_count == 0)
    assert calls == []


def test_latency_slows_down_and_breaks_nothing(proxy, amqp_url, queue_name, settled):
    proxy.latency(0.05)
    consumer = Collector(connection_to(proxy.url), queue_name, prefetch=PREFETCH)
    with running(consumer) as (greenlet,):
        publish(amqp_url, queue_name, 50)
        wait_until(everything(consumer.handled, 50))
        settled()
        assert stop_and_join(greenlet) < AT_ONCE
    assert duplicates(consumer.handled) == 0


def test_a_hundred_consumers_of_one_link_come_back_from_every_fault(
    proxy, amqp_url, queue_name, settled
):
    """HAZARDS row 28: one link, one dialer; duplicates are bounded by what was prefetched."""
    handled: Counter[Any] = Counter()
    with observing(LinkUp, LinkDown) as links, Runtime(connection_to(proxy.url)) as runtime:
        runtime.spawn(lambda c: Collector(c, queue_name, handled, prefetch=1), replicas=100)
        wait_until(lambda: all(child.started for child in runtime.children))
        for fault in range(3):
            publish(amqp_url, queue_name, range(fault * 500, fault * 500 + 500))
            proxy.cut()
            wait_until(lambda n=2 * fault + 3: len(links) == n)
            wait_until(lambda: all(c.greenlet.ready.is_set() for c in runtime.children))
        wait_until(everything(handled, 1500))
        settled()
        assert proxy.open_count == 1
    assert [type(each) for each in links] == [LinkUp, LinkDown] * 3 + [LinkUp]
    assert duplicates(handled) <= 3 * 100
