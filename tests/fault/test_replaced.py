"""A kombu connection that one greenlet drains, and that another has replaced once its link was lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
import pytest
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
