"""RabbitMQ is killed or restarted under load; links are lost a thousand times."""

from __future__ import annotations

import logging
from collections import Counter
from time import monotonic
from typing import Any

import gevent
import psutil
import pytest

from greenconsume import Runtime
from greenconsume.amqp.link import Link
from greenconsume.amqp.session import Session
from greenconsume.events import LinkDown, LinkUp, subscribe
from tests.fault.consumers import (
    Collector,
    ConfirmedPublisher,
    Unlimited,
    alive,
    connection_to,
    duplicates,
    observing,
    running,
    socket_count,
)
from tests.messages import declare, publish, queue_depth
from tests.waiting import wait_until

CONSUMER_COUNT = 1000
QUEUE_COUNT = 20
PREFETCH = 5
LINK_COUNT = 2


def all_consume(runtime: Runtime, within: float = 90.0) -> float:
    """Wait until every consumer of a runtime consumes; returns the seconds that it took."""
    began = monotonic()
    children = runtime.children
    wait_until(lambda: all(child.greenlet.ready.is_set() for child in children), within, "all back")
    return monotonic() - began


def collectors(runtime: Runtime, queues: list[str]) -> Counter[Any]:
    """Spawn the consumers, an equal share for each queue; returns what they handle."""
    handled: Counter[Any] = Counter()
    for number in range(CONSUMER_COUNT):
        queue = queues[number % len(queues)]
        runtime.spawn(lambda c, queue=queue: Collector(c, queue, handled, PREFETCH))
    return handled


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_thousand_consumers_survive_the_loss_of_their_broker_under_load(
    rabbitmq_fault, amqp_url, queue_name, caplog, fault
):
    """HAZARDS rows 3, 13, 22 and 28: killed -9, or shut down in order, and started again."""
    caplog.set_level(logging.INFO, logger="greenconsume")
    queues = [f"{queue_name}-{number}" for number in range(QUEUE_COUNT)]
    for queue in queues:
        declare(amqp_url, queue)
    runtime = Runtime(connection_to(amqp_url), links=LINK_COUNT)
    handled = collectors(runtime, queues)
    publishing = ConfirmedPublisher(amqp_url, queues)
    with observing(LinkDown) as lost, publishing as publisher, runtime:
        publisher.start(20)
        wait_until(lambda: len(handled) > 1000)
        before = socket_count(), alive(gevent.Greenlet)
        getattr(rabbitmq_fault, fault)()
        wait_until(lambda: not any(child.greenlet.ready.is_set() for child in runtime.children))
        rabbitmq_fault.start()
        seconds = all_consume(runtime)
        goal = len(handled) + 1000
        wait_until(lambda: len(handled) > goal)
        assert (socket_count(), alive(gevent.Greenlet)) <= before
        publisher.stop()
        wait_until(lambda: publisher.confirmed <= handled.keys())
    print(
        f"\n{fault}: {CONSUMER_COUNT} consumers back {seconds:.2f} s after the broker, "
        f"{len(publisher.confirmed)} messages confirmed, {duplicates(handled)} duplicates"
    )
    assert seconds < 60.0  # 10 s is the target, where nothing else runs
    assert duplicates(handled) <= CONSUMER_COUNT * PREFETCH
    assert all(queue_depth(amqp_url, queue) == 0 for queue in queues)
    each_loss_is_told_once(lost, caplog.records)


def each_loss_is_told_once(lost: list[LinkDown], records: list[logging.LogRecord]) -> None:
    """One event and one line for each link; and little else, for a thousand consumers."""
    consuming = [event.consumers for event in lost if event.consumers > 1]
    assert len(consuming) == LINK_COUNT
    # A broker that shuts down cancels first: some have a new session beside the one that closes.
    assert sum(consuming) >= CONSUMER_COUNT
    lines = [record for record in records if "is lost" in record.getMessage()]
    assert {record.name for record in lines} == {"greenconsume.links"}
    assert len(lines) == len(lost)
    assert len(records) < 60


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("every_link_has_lived")
def test_a_thousand_reconnects_leave_nothing_behind(make_peer, queue_name):
    """HAZARDS row 22: sockets leak on reconnects."""
    peer = make_peer()
    process = psutil.Process()
    kinds = (gevent.Greenlet, Link, Session)
    consumer = Collector(connection_to(peer.url), queue_name)
    consumer.restart_limit = Unlimited()

    def reconnect(times: int) -> tuple[int, ...]:
        for _ in range(times):
            peer.received.clear()
            peer.hang_up(reset=True)
            peer.wait_for("basic.consume")
        wait_until(lambda: peer.open_count == 1)
        return (socket_count(), *(alive(kind) for kind in kinds))

    with running(consumer):
        before, memory = reconnect(100), process.memory_info().rss
        began = monotonic()
        after = reconnect(1000)
        grown = process.memory_info().rss - memory
    print(f"\n1,000 reconnects: {monotonic() - began:.1f} s, {grown / 1024:.0f} KB")
    assert peer.connection_count == 1101
    assert after == before
    assert grown < 4 << 20


@pytest.mark.usefixtures("every_link_has_lived")
def test_a_hundred_reconnects_of_a_shared_link_leave_nothing_behind(
    proxy, rabbitmq, amqp_url, queue_name
):
    """HAZARDS rows 22 and 28: ten consumers, a hundred losses: an event for each, no growth."""
    handled: Counter[Any] = Counter()

    def make(connection: Any) -> Collector:
        consumer = Collector(connection, queue_name, handled, prefetch=2)
        consumer.restart_limit = Unlimited()
        return consumer

    def reconnect(times: int) -> tuple[int, ...]:
        for number in range(times):
            up = len(links)
            if number % 5 == 0:
                publish(amqp_url, queue_name, range(len(sent), len(sent) + 20))
                sent.extend(range(20))
            proxy.cut()
            wait_until(lambda up=up: len(links) > up)
            all_consume(runtime)
        return socket_count(), alive(gevent.Greenlet), alive(Link), alive(Session)

    # Not the events: a LinkDown has its error, and that by its traceback the link.
    lost: list[str] = []
    unsubscribe = subscribe(lambda e: lost.append(e.uri) if isinstance(e, LinkDown) else None)
    sent: list[int] = []
    with observing(LinkUp) as links:
        with Runtime(connection_to(proxy.url)) as runtime:
            runtime.spawn(make, replicas=10)
            all_consume(runtime)
            before, memory = reconnect(10), psutil.Process().memory_info().rss
            after = reconnect(100)
            grown = psutil.Process().memory_info().rss - memory
            wait_until(lambda: set(range(len(sent))) <= handled.keys())
            wait_until(lambda: rabbitmq.connection_count(amqp_url) == 1)
    unsubscribe()
    print(
        f"\n100 reconnects of 10 consumers: {grown / 1024:.0f} KB, {duplicates(handled)} duplicates"
    )
    assert after == before
    assert grown < 4 << 20
    assert len(lost) == 110
