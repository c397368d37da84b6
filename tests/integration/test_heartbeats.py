"""Heartbeats: kept up whatever the handlers do, on links that consume and on links that publish."""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import Any

import amqp
import gevent
import pytest
from gevent.event import Event
from kombu import Producer

from greenconsume import Runtime
from greenconsume.events import LinkDown
from tests.integration.consumers import SOON, Recorder, green_connection, observed
from tests.messages import publish, stock_connection
from tests.waiting import wait_until

#: With heartbeat=1 the broker closes a connection that is silent for two to three seconds.
TOO_LONG = 4.0


def broker_closes_a_silent_connection(url: str) -> None:
    """The control: a connection without a heart is closed in the time that the test takes."""
    connection = stock_connection(url, heartbeat=1)
    connection.connect()
    with pytest.raises((OSError, amqp.ConnectionError)):
        connection.drain_events(timeout=TOO_LONG)
    connection.collect()


@pytest.mark.slow
def test_a_handler_that_waits_for_long_costs_no_heartbeat(rabbitmq, amqp_url, queue_name):
    """HAZARDS row 5. The others of its link are served meanwhile."""
    begun, go_on = Event(), Event()

    def wait(_body: Any, _message: Any) -> None:
        begun.set()
        assert go_on.wait(SOON)

    runtime = Runtime(green_connection(amqp_url, heartbeat=1))
    [waiting] = runtime.spawn(partial(Recorder, queue=queue_name, handle=wait))
    [neighbour] = runtime.spawn(partial(Recorder, queue=f"{queue_name}-neighbour"))
    with observed(LinkDown) as lost, runtime:
        publish(amqp_url, queue_name, 1)
        assert begun.wait(SOON)
        control = gevent.spawn(broker_closes_a_silent_connection, amqp_url)
        began = monotonic()
        for count in range(1, 6):
            assert not go_on.wait(TOO_LONG / 5)
            publish(amqp_url, f"{queue_name}-neighbour", [count])
            neighbour.consumer.wait_for(count)
        assert monotonic() - began >= TOO_LONG
        control.get(timeout=SOON)
        assert waiting.consumer.bodies == []
        go_on.set()
        waiting.consumer.wait_for(1)
        assert rabbitmq.connection_count(amqp_url) == 1
    assert lost == []
    assert waiting.consumer.redelivered == [False]
    assert rabbitmq.queue_counts(amqp_url, queue_name) == (0, 0, 0)


@pytest.mark.slow
def test_a_busy_consumer_and_an_idle_producer_keep_theirs(rabbitmq, amqp_url, queue_name):
    """HAZARDS row 5: kombu ticks only when draining times out, which a trickle prevents."""
    consumer = Recorder("memory://", queue_name)
    consumer.connection = green_connection(amqp_url, heartbeat=1)
    runtime = Runtime(amqp_url)
    runtime.spawn(consumer)
    over = Event()

    def trickle(connection: Any) -> None:
        producer = Producer(connection.channel())
        while not over.wait(0.02):
            producer.publish({}, routing_key=queue_name)

    with observed(LinkDown) as lost, runtime:
        with green_connection(amqp_url, heartbeat=1) as idle, green_connection(amqp_url) as busy:
            producer = Producer(idle.channel())
            trickling = gevent.spawn(trickle, busy)
            broker_closes_a_silent_connection(amqp_url)
            assert not over.wait(max(0.0, TOO_LONG - 3.0))
            producer.publish({"from": "the idle one"}, routing_key=queue_name)
            wait_until(lambda: {"from": "the idle one"} in consumer.bodies)
            over.set()
            trickling.get(timeout=SOON)
            assert rabbitmq.connection_count(amqp_url) == 3
    assert lost == []
    assert (consumer.ready_count, any(consumer.redelivered)) == (1, False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 30),
        ({"heartbeat": 7}, 7),
        ({"transport_options": {"heartbeat": 9}}, 9),
        ({"transport_options": {"heartbeat": 0}}, 0),
    ],
)
def test_heartbeats_are_on_unless_they_are_turned_off(rabbitmq, amqp_url, options, expected):
    with green_connection(amqp_url, **options) as connection:
        connection.connect()
        assert connection.connection.heartbeat == expected
        connection.heartbeat_check()
        timeouts = rabbitmq.eval(
            "[{T} || P <- rabbit_networking:connections(),"
            " {timeout, T} <- rabbit_networking:connection_info(P, [timeout])]"
        )
        assert timeouts == f"[{{{expected}}}]"


def test_heartbeat_check_tells_that_the_link_is_gone(proxy):
    connection = green_connection(proxy.url)
    connection.connect()
    connection.heartbeat_check()
    session = connection.connection
    proxy.cut()
    wait_until(lambda: not session.connected)
    with pytest.raises(connection.connection_errors):
        connection.transport.heartbeat_check(session)
    connection.release()
