"""A broker that closes connections on purpose, and one that blocks its publishers."""

from __future__ import annotations

from collections import Counter
from time import monotonic
from typing import Any

import amqp
import gevent
import pytest
from kombu import Producer
from kombu.exceptions import OperationalError

from greenconsume import ConsumerProducerMixin, Requeue, Runtime, spawn
from greenconsume.events import HandlerFailed, LinkBlocked, LinkDown
from tests.fault.consumers import (
    Collector,
    Unlimited,
    connection_to,
    consuming,
    duplicates,
    everything,
    freeze,
    observing,
    patient_connection_to,
    running,
    stop_and_join,
)
from tests.messages import channel, declare, publish, queue_depth
from tests.options import say
from tests.waiting import AT_ONCE, wait_until


class Relay(ConsumerProducerMixin, Collector):
    """Sends each body on to another queue before it acknowledges it."""

    def __init__(self, connection: Any, queue: str, to: str, **options: Any) -> None:
        super().__init__(connection, queue, **options)
        self.work = lambda body: self.producer.publish(body, routing_key=to, delivery_mode=2)


@pytest.fixture
def two_queues(amqp_url, queue_name) -> tuple[str, str]:
    declare(amqp_url, queue_name)
    declare(amqp_url, f"{queue_name}-out")
    return queue_name, f"{queue_name}-out"


def test_connections_that_the_broker_closes_come_back(rabbitmq, amqp_url, queue_name):
    """A Connection.Close (320) from an operator is a lost link like any other, told once."""
    handled: Counter[Any] = Counter()
    with observing(LinkDown) as lost, Runtime(connection_to(amqp_url), links=2) as runtime:
        runtime.spawn(lambda c: Collector(c, queue_name, handled), replicas=50)
        wait_until(lambda: all(child.started for child in runtime.children))
        publish(amqp_url, queue_name, 500)
        rabbitmq.close_connections(amqp_url)
        wait_until(lambda: len(lost) == 2)
        wait_until(lambda: all(child.started for child in runtime.children))
        publish(amqp_url, queue_name, range(500, 600))
        wait_until(everything(handled, 600))
        assert rabbitmq.connection_count(amqp_url) == 2
    assert [event.consumers for event in lost] == [25, 25]
    assert {type(event.error) for event in lost} == {amqp.ConnectionForced}
    assert "closed by a test" in str(lost[0].error)


def test_consumers_go_on_while_publishers_are_blocked(rabbitmq_fault, amqp_url, two_queues):
    """HAZARDS row 7: a consuming link publishes nothing, so that it is never blocked."""
    source, sink = two_queues
    publish(amqp_url, source, 20)
    publish(amqp_url, f"{source}-other", 100)
    rabbitmq_fault.block()
    relay = Relay(connection_to(amqp_url), source, sink)
    other = Collector(connection_to(amqp_url), f"{source}-other")
    with observing(LinkBlocked) as blocked, Runtime(connection_to(amqp_url)) as runtime:
        runtime.spawn(relay)
        wait_until(lambda: blocked)
        assert len(relay.handled) < 20
        runtime.spawn(other)  # on the same link as the relay
        wait_until(everything(other.handled, 100))
        assert rabbitmq_fault.connection_count(amqp_url) == 2
        rabbitmq_fault.unblock()
        wait_until(everything(relay.handled, 20))
        wait_until(lambda: queue_depth(amqp_url, sink) == 20)
    assert [event.blocked for event in blocked] == [True, False]


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_stop_ends_a_handler_that_publishes_to_a_blocked_broker(
    rabbitmq_fault, amqp_url, two_queues, confirmed
):
    """HAZARDS row 17: close hangs on a blocked broker. The message goes back to its queue."""
    source, sink = two_queues
    publish(amqp_url, source, 20)
    rabbitmq_fault.block()
    with observing(LinkBlocked) as blocked, observing(HandlerFailed):
        connection = connection_to(amqp_url, confirm_publish=confirmed)
        greenlet = spawn(Relay(connection, source, sink))
        wait_until(lambda: blocked)
        gevent.sleep(0.05)
        # The confirm is given the time of a close, then come two connections.
        assert stop_and_join(greenlet) < AT_ONCE
        assert greenlet.successful()
    rabbitmq_fault.unblock()
    again = Relay(connection_to(amqp_url), source, sink)
    with running(again):
        wait_until(lambda: rabbitmq_fault.queue_counts(amqp_url, source)[:2] == (0, 0))
    # Without confirms, what was published to a broker that blocks is lost with the connection.
    missing = 20 - queue_depth(amqp_url, sink)
    assert missing <= (0 if confirmed else 15)


def test_blocked_publishers_go_on_when_the_broker_lets_them(rabbitmq_fault, amqp_url, two_queues):
    """HAZARDS row 18: every greenlet gets its own confirm, late as it may be."""
    queue, _ = two_queues
    with connection_to(amqp_url, confirm_publish=True) as connection:
        producer = Producer(connection.default_channel)
        producer.publish("warm", routing_key=queue)
        rabbitmq_fault.block()
        greenlets = [
            gevent.spawn(producer.publish, body, routing_key=queue, delivery_mode=2)
            for body in range(100)
        ]
        gevent.sleep(0.3)
        rabbitmq_fault.unblock()
        gevent.joinall(greenlets, timeout=30, raise_error=True)
        assert all(greenlet.successful() for greenlet in greenlets)
    assert queue_depth(amqp_url, queue) == 101


def test_a_publish_with_a_timeout_gives_up_on_a_blocked_broker(
    rabbitmq_fault, amqp_url, two_queues
):
    queue, _ = two_queues
    connection = connection_to(amqp_url)
    with connection:
        producer = Producer(connection.default_channel)
        rabbitmq_fault.block()
        with observing(LinkBlocked) as blocked:
            producer.publish("the first is taken", routing_key=queue)
            wait_until(lambda: blocked)
        began = monotonic()
        with pytest.raises((OperationalError, *connection.recoverable_connection_errors)):
            producer.publish("the second is not", routing_key=queue, timeout=0.2)
        assert 0.15 < monotonic() - began < AT_ONCE
        began = monotonic()
    # The channel first, then the connection.
    assert monotonic() - began < AT_ONCE


def test_a_broker_that_froze_has_its_consumers_back_when_it_thaws(
    rabbitmq_fault, amqp_url, queue_name
):
    """HAZARDS rows 3 and 5: the heartbeat gives the link up, a new handshake waits for the broker."""
    publish(amqp_url, queue_name, 100)
    consumer = Collector(connection_to(amqp_url, heartbeat=1), queue_name)
    consumer.work = lambda _body: gevent.sleep(0.005)
    with observing(LinkDown) as lost, running(consumer):
        wait_until(lambda: len(consumer.handled) > 10)
        freeze(rabbitmq_fault)
        wait_until(lambda: lost)
        gevent.sleep(0.5)
        rabbitmq_fault.resume()
        began = monotonic()
        wait_until(everything(consumer.handled, 100))
        print(f"\nall handled {monotonic() - began:.2f} s after the broker thawed")
    assert "no heartbeat" in str(lost[0].error)
    assert duplicates(consumer.handled) <= 10


@pytest.mark.usefixtures("every_link_has_lived")
def test_a_relay_that_loses_its_links_loses_no_message(rabbitmq, proxy, amqp_url, two_queues):
    """HAZARDS row 13: what is not confirmed downstream is not acknowledged upstream."""
    source, sink = two_queues
    publish(amqp_url, source, 300)
    relay = Relay(connection_to(proxy.url, confirm_publish=True), source, sink)
    relay.restart_limit = Unlimited()
    say(relay, on_error=Requeue(delay=0.05))
    with running(relay):
        for _ in range(8):
            handled = len(relay.handled)
            wait_until(lambda n=handled: len(relay.handled) > min(n + 10, 299))
            proxy.cut()
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, source)[:2] == (0, 0))
    with channel(amqp_url) as chan:
        arrived = Counter(
            message.body for message in iter(lambda: chan.basic_get(sink, no_ack=True), None)
        )
    assert arrived.keys() == {str(body) for body in range(300)}
    print(f"\n{duplicates(arrived)} duplicates after 8 cuts")
    assert duplicates(arrived) <= 8 * relay.prefetch


def test_an_idle_consumer_of_a_blocked_broker_stops_at_once(rabbitmq_fault, amqp_url, queue_name):
    """HAZARDS row 17: only those that publish are blocked."""
    greenlet = spawn(Collector(patient_connection_to(amqp_url), queue_name))
    consuming([greenlet])
    rabbitmq_fault.block()
    assert stop_and_join(greenlet) < AT_ONCE
