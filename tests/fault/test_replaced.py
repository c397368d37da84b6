"""A kombu connection that one greenlet drains, and that another has replaced once its link was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import AsyncResult
from gevent.queue import Queue as Steps
from kombu import Connection, Consumer, Producer, Queue

from greenconsume.amqp.link import LinkLostError
from tests.integration.consumers import SOON, green_connection
from tests.proxy import Proxy
from tests.waiting import wait_until


@pytest.fixture(params=["amqp", "redis"])
def proxied(request: pytest.FixtureRequest, make_proxy: Callable[[str], Proxy]) -> Proxy:
    return make_proxy(request.getfixturevalue(f"{request.param}_url"))


def lose_unnoticed(connection: Connection, proxy: Proxy) -> None:
    """Cut the link of a connection while nobody drains it."""
    session = connection.connection
    proxy.cut()
    wait_until(lambda: not session.connected, SOON)


def publish_elsewhere(connection: Connection, queue: str, body: Any) -> None:
    """Publish with kombu's `retry`, in a greenlet of its own, on what others drain."""

    def publish() -> None:
        Producer(connection.channel()).publish(body, routing_key=queue, retry=True)

    def publish_on_default() -> None:
        Producer(connection).publish(body, routing_key=queue, retry=True)

    try:
        gevent.spawn(publish).get()
    except LinkLostError:
        gevent.spawn(publish_on_default).get()


def consumed(connection: Connection, queue: str, got: list[Any]) -> Consumer:
    def take(body: Any, message: Any) -> None:
        got.append(body)
        message.ack()

    return Consumer(connection, [Queue(queue)], callbacks=[take])


def test_who_drains_is_told_though_a_publisher_has_connected_anew(proxied, queue_name):
    """Else he waits for ever on a connection that consumes nothing."""
    got: list[Any] = []
    with green_connection(proxied.url) as connection:
        consumed(connection, queue_name, got).consume()
        for number in range(3):
            lose_unnoticed(connection, proxied)
            producer = Producer(connection)
            gevent.spawn(producer.publish, number, routing_key=queue_name, retry=True).get()
            with pytest.raises(LinkLostError, match="is gone"):
                connection.drain_events(timeout=SOON)
            consumed(connection, queue_name, got).consume()
            while number not in got:  # what was acked as the link was lost may come again
                connection.drain_events(timeout=SOON)


def test_who_drains_is_told_though_another_was_told_first(proxied, queue_name):
    got: list[Any] = []
    with green_connection(proxied.url) as connection:
        consumed(connection, queue_name, got).consume()
        lose_unnoticed(connection, proxied)
        publish_elsewhere(connection, queue_name, "x")
        with pytest.raises(LinkLostError, match="is gone"):
            connection.drain_events(timeout=SOON)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0)


def test_who_waits_in_a_drain_is_told_once(proxied, queue_name):
    with green_connection(proxied.url) as connection:
        consumed(connection, queue_name, []).consume()
        drainer = gevent.spawn(connection.drain_events, timeout=SOON)
        gevent.idle()
        lose_unnoticed(connection, proxied)
        Producer(connection).publish("x", routing_key=queue_name, retry=True)
        with pytest.raises(LinkLostError):
            drainer.get()
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0)


def test_who_consumes_anew_before_he_drains_is_told_of_no_loss(proxied, queue_name):
    got: list[Any] = []
    with green_connection(proxied.url) as connection:
        consumed(connection, queue_name, got).consume()
        lose_unnoticed(connection, proxied)
        Producer(connection).publish("x", routing_key=queue_name, retry=True)
        consumed(connection, queue_name, got).consume()
        connection.drain_events(timeout=SOON)
    assert got == ["x"]


def test_who_closes_the_connection_himself_is_told_of_no_loss(proxied, queue_name):
    connection = green_connection(proxied.url)
    consumed(connection, queue_name, []).consume()
    lose_unnoticed(connection, proxied)
    connection.release()
    connection.connect()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    connection.release()


def test_what_a_lost_link_may_have_taken_goes_back_though_nobody_consumes_any_more(
    make_proxy, redis_url, queue_name
):
    """Else it is nobody's for as long as this process lives, and each close waits for it in vain."""
    proxy = make_proxy(redis_url)
    connection = green_connection(proxy.url)
    consumed(connection, queue_name, []).consume()
    lose_unnoticed(connection, proxy)
    connection.release()
    connection.connect()
    ledger = connection.connection.ledger
    wait_until(lambda: not ledger.doubtful)
    connection.release()


class Drainer:
    """A greenlet that drains a connection that others drain as well, one step after the other."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._steps: Steps = Steps()
        self._greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        for step, outcome in self._steps:
            outcome.set(self._outcome_of(step))

    def _outcome_of(self, step: Callable[[], object]) -> object:
        try:
            return step()
        except (LinkLostError, TimeoutError) as exc:
            return type(exc)

    def do(self, step: Callable[[], object]) -> object:
        """Have a step done, and return what it returned, or the class of what it raised."""
        outcome: AsyncResult = AsyncResult()
        self._steps.put((step, outcome))
        return outcome.get(timeout=SOON)

    def drain(self) -> object:
        return self.do(lambda: self._connection.drain_events(timeout=0))

    def end(self) -> None:
        self._steps.put(StopIteration)
        self._greenlet.get(timeout=SOON)


@pytest.fixture
def drained(proxied: Proxy) -> Iterator[tuple[Connection, Drainer, Drainer]]:
    """A connection, and two greenlets that drain it."""
    with green_connection(proxied.url) as connection:
        first, second = Drainer(connection), Drainer(connection)
        yield connection, first, second
        first.end()
        second.end()


@pytest.mark.parametrize("replaced_by", ["publisher", "first drainer"])
def test_each_who_drains_is_told_once(proxied, queue_name, drained, replaced_by):
    """The second would wait for ever for what came to the consumers that it had."""
    connection, first, second = drained
    for each in drained[1:]:
        each.do(consumed(connection, f"{queue_name}-{each is first}", []).consume)
        assert each.drain() is TimeoutError
    lose_unnoticed(connection, proxied)
    if replaced_by == "publisher":
        publish_elsewhere(connection, f"{queue_name}-x", "x")
    assert first.drain() is LinkLostError
    got: list[Any] = []
    first.do(consumed(connection, f"{queue_name}-True", got).consume)
    assert first.drain() is TimeoutError
    assert second.drain() is LinkLostError
    second.do(consumed(connection, f"{queue_name}-False", got).consume)
    assert second.drain() is TimeoutError
    Producer(connection).publish("body", routing_key=f"{queue_name}-False")
    second.do(lambda: connection.drain_events(timeout=SOON))
    assert got == ["body"]


def test_who_has_begun_anew_is_told_of_no_loss_though_he_drained_before(
    proxied, queue_name, drained
):
    connection, first, second = drained
    for each in drained[1:]:
        each.do(consumed(connection, queue_name, []).consume)
        assert each.drain() is TimeoutError
    lose_unnoticed(connection, proxied)
    publish_elsewhere(connection, f"{queue_name}-x", "x")
    assert first.drain() is LinkLostError
    second.do(consumed(connection, queue_name, []).consume)
    assert second.drain() is TimeoutError


def test_who_drains_is_told_though_another_closed_the_lost_connection(proxied, queue_name, drained):
    """As whoever was told may do, before he connects again."""
    connection, first, second = drained
    first.do(consumed(connection, queue_name, []).consume)
    assert [first.drain(), second.drain()] == [TimeoutError, TimeoutError]
    lose_unnoticed(connection, proxied)
    assert first.drain() is LinkLostError
    first.do(connection.release)
    first.do(connection.connect)
    assert first.drain() is TimeoutError
    assert [second.drain(), second.drain()] == [LinkLostError, TimeoutError]


def test_who_was_not_told_of_two_losses_is_told_of_one(proxied, queue_name, drained):
    connection, first, second = drained
    assert second.drain() is TimeoutError
    for _ in range(2):
        first.do(consumed(connection, queue_name, []).consume)
        assert first.drain() is TimeoutError
        lose_unnoticed(connection, proxied)
        assert first.drain() is LinkLostError
        connection.connect()
    assert [second.drain(), second.drain()] == [LinkLostError, TimeoutError]
