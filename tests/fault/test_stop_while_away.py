"""A stop while the broker is down, unreachable, frozen or silent, and while waiting for a restart."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Queue
from kombu.mixins import ConsumerMixin as KombuMixin
from kombu.utils.limits import TokenBucket

from greenconsume import ConsumerMixin, ConsumerProducerMixin, Runtime, spawn
from greenconsume.events import ConnectFailed, HandlerFailed, LinkDown, LinkUp, subscribe
from greenconsume.links import backoff, dialer
from greenconsume.runtime.greenlet import ConsumerGreenlet
from tests.fault.consumers import (
    CLOSE_TIMEOUT,
    Collector,
    connection_to,
    consuming,
    freeze,
    observing,
    patient_connection_to,
    running,
    stop_and_join,
)
from tests.messages import declare, publish, queue_depth
from tests.servers import HOST, free_port
from tests.waiting import AT_ONCE, NEVER, wait_until


@pytest.fixture
def refused_url() -> str:
    """An address that nobody listens at."""
    return f"amqp://guest:guest@{HOST}:{free_port()}//"


@pytest.fixture
def mute_url() -> Iterator[str]:
    """An address that takes connections and never says a word; without a scheme."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(16)
        yield f"guest:guest@{HOST}:{listener.getsockname()[1]}//"


def connecting(url: str, queue: str) -> ConsumerGreenlet:
    """A consumer that has been trying to connect for a moment."""
    greenlet = spawn(Collector(patient_connection_to(url), queue))
    gevent.sleep(0.1)
    assert str(greenlet.state) == "connecting"
    return greenlet


@pytest.mark.usefixtures("long_backoff")
def test_a_stop_ends_the_backoff_of_a_refused_connection_at_once(refused_url, queue_name):
    """HAZARDS row 3: should_stop is ignored while the broker is down."""
    with observing(ConnectFailed) as failures:
        greenlet = connecting(refused_url, queue_name)
        wait_until(lambda: failures)
        assert stop_and_join(greenlet) < AT_ONCE
    assert greenlet.successful()


@pytest.mark.usefixtures("long_backoff")
def test_a_stop_from_a_foreign_thread_ends_the_backoff_at_once(refused_url, queue_name):
    """HAZARDS row 3: should_stop is ignored while the broker is down."""
    greenlet = connecting(refused_url, queue_name)
    began = monotonic()
    gevent.get_hub().threadpool.apply(setattr, (greenlet.consumer, "should_stop", True))
    assert greenlet.join(30)
    assert monotonic() - began < AT_ONCE


def test_a_stop_ends_a_connect_to_a_black_hole_at_once(black_hole_url, queue_name):
    """HAZARDS row 3: should_stop is ignored while the broker is unreachable."""
    assert stop_and_join(connecting(black_hole_url, queue_name)) < AT_ONCE


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
def test_a_stop_ends_the_handshake_with_a_mute_server_at_once(mute_url, queue_name, scheme):
    """HAZARDS row 3: in the AMQP handshake, and in that of TLS."""
    assert stop_and_join(connecting(f"{scheme}://{mute_url}", queue_name)) < AT_ONCE


@pytest.mark.parametrize("step", ["connection.start-ok", "connection.tune-ok", "connection.open"])
def test_a_stop_ends_a_handshake_that_halts_half_way_at_once(make_peer, queue_name, step):
    """HAZARDS row 3: the broker falls silent in the handshake."""
    peer = make_peer(silent={step})
    close_timeout = CLOSE_TIMEOUT if step == "connection.tune-ok" else NEVER
    greenlet = spawn(Collector(patient_connection_to(peer.url, close_timeout), queue_name))
    if step != "connection.tune-ok":  # which nobody answers anyway
        peer.wait_for(step)
        gevent.sleep(0.02)
    assert stop_and_join(greenlet) < AT_ONCE
    wait_until(lambda: peer.open_count == 0)


def test_a_stop_ends_the_handshake_with_a_frozen_broker_at_once(
    rabbitmq_fault, amqp_url, queue_name
):
    """HAZARDS row 3: the broker is stopped (SIGSTOP): connects succeed, nothing is answered."""
    freeze(rabbitmq_fault)
    assert stop_and_join(connecting(amqp_url, queue_name)) < AT_ONCE


def test_a_stop_of_an_idle_consumer_of_a_frozen_broker_is_bounded(
    rabbitmq_fault, amqp_url, queue_name
):
    """HAZARDS row 17: close hangs on a broker that does not answer."""
    greenlet = spawn(Collector(connection_to(amqp_url), queue_name))
    consuming([greenlet])
    freeze(rabbitmq_fault)
    assert stop_and_join(greenlet) < AT_ONCE


@pytest.mark.parametrize(
    "step", ["channel.open", "queue.declare", "basic.qos", "basic.consume", "basic.cancel"]
)
def test_a_stop_ends_a_call_that_is_never_answered(make_peer, queue_name, step):
    """HAZARDS row 17: no call of a consumer's set-up and end has a wait that a stop does not end."""
    peer = make_peer(silent={step})
    greenlet = spawn(Collector(connection_to(peer.url), queue_name))
    if step == "basic.cancel":
        consuming([greenlet])
    else:
        peer.wait_for(step)
    assert stop_and_join(greenlet) < AT_ONCE
    assert greenlet.successful()
    wait_until(lambda: peer.open_count == 0)


def test_a_stop_while_nothing_at_all_is_answered_any_more_is_bounded(make_peer, queue_name):
    """HAZARDS row 17: cancel, channel close and connection close share one deadline."""
    silent = {"basic.cancel", "channel.close", "connection.close"}
    peer = make_peer(silent=silent)
    close_timeout = 3.0
    greenlet = spawn(Collector(connection_to(peer.url, close_timeout=close_timeout), queue_name))
    consuming([greenlet])
    assert stop_and_join(greenlet) < 2 * close_timeout
    wait_until(lambda: peer.open_count == 0)


def test_a_stop_ends_what_get_consumers_declares_with_a_frozen_broker(
    rabbitmq_fault, amqp_url, queue_name
):
    """HAZARDS row 3: the broker freezes between the connection and the queue_declare."""

    class Declaring(Collector):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            freeze(rabbitmq_fault)
            Queue(queue_name, channel=channel, durable=True).declare()
            raise AssertionError("a frozen broker has answered")

    greenlet = spawn(Declaring(connection_to(amqp_url), queue_name))
    wait_until(lambda: rabbitmq_fault._paused)
    gevent.sleep(0.05)
    assert stop_and_join(greenlet) < AT_ONCE
    assert greenlet.successful()


@pytest.mark.usefixtures("long_backoff")
def test_a_stop_ends_the_backoff_after_a_lost_link_at_once(proxy, queue_name):
    """HAZARDS row 3: the broker goes away under a consumer that was consuming."""
    with observing(ConnectFailed) as failures:
        greenlet = spawn(Collector(patient_connection_to(proxy.url), queue_name))
        consuming([greenlet])
        proxy.refuse()
        proxy.cut()
        wait_until(lambda: failures)
        assert stop_and_join(greenlet) < AT_ONCE


def test_a_stop_ends_the_wait_for_a_restart_token_at_once(proxy, queue_name):
    """HAZARDS row 3: kombu sleeps until the token is there."""

    class Patient(Collector):
        restart_limit = TokenBucket(0.01)

    with observing(LinkDown, LinkUp) as links:
        greenlet = spawn(Patient(patient_connection_to(proxy.url), queue_name))
        consuming([greenlet])
        proxy.cut()
        wait_until(lambda: len(links) == 2)
        gevent.sleep(0.05)
        assert stop_and_join(greenlet) < AT_ONCE
    assert [type(link) for link in links] == [LinkUp, LinkDown]


@pytest.mark.usefixtures("long_backoff")
def test_a_stop_ends_the_wait_of_kombus_own_mixin_at_once(refused_url, queue_name):
    """HAZARDS row 3: for a class that was written for kombu.mixins and knows nothing of this."""

    class Plain(KombuMixin):
        def __init__(self, connection: Any) -> None:
            self.connection = connection

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return [Consumer([Queue(queue_name)])]

    greenlet = spawn(Plain(patient_connection_to(refused_url)))
    gevent.sleep(0.1)
    assert stop_and_join(greenlet) < AT_ONCE


def test_a_stop_within_on_connection_error_ends_the_consumer(refused_url, queue_name):
    class Resigning(Collector):
        def on_connection_error(self, exc: BaseException, interval: float) -> None:
            errors.append((exc, interval))
            self.should_stop = True

    errors: list[Any] = []
    greenlet = spawn(Resigning(connection_to(refused_url), queue_name))
    assert greenlet.join(30)
    assert [type(exc) for exc, _ in errors] == [ConnectionRefusedError]


def test_a_stop_ends_the_wait_for_a_producers_connection(amqp_url, black_hole_url, queue_name):
    """HAZARDS row 3: `producer` connects when it is first used, be it in a handler."""

    class Relay(ConsumerProducerMixin, Collector):
        def create_producer(self, body: Any) -> None:
            self.connection = patient_connection_to(black_hole_url, CLOSE_TIMEOUT)
            asked.append(body)
            self.producer.publish("never", routing_key=queue_name)

    asked: list[Any] = []
    relay = Relay(connection_to(amqp_url), queue_name)
    relay.work = relay.create_producer
    publish(amqp_url, queue_name, 1)
    with running(relay) as (greenlet,):
        wait_until(lambda: asked)
        gevent.sleep(0.1)
        assert stop_and_join(greenlet) < AT_ONCE
        assert greenlet.successful()


def test_a_thousand_consumers_of_a_broker_that_is_down_stop_at_once(
    refused_url, queue_name, monkeypatch
):
    """HAZARDS row 28: one dialer for all; row 3: all of them hear the stop. The target is a second."""
    monkeypatch.setattr(backoff, "delays", lambda *_: iter([0.1, NEVER]))
    with observing(ConnectFailed) as failures:
        runtime = Runtime(connection_to(refused_url))
        runtime.spawn(lambda connection: Collector(connection, queue_name), replicas=1000)
        starting = gevent.spawn(runtime.start)
        wait_until(lambda: len(failures) == 2)
        began = monotonic()
        runtime.stop()
        assert runtime.join(30)
        assert monotonic() - began < AT_ONCE
        starting.get(timeout=30)
    assert len(failures) == 2


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_stop_at_the_very_moment_the_link_comes_up_leaves_no_link(peer, queue_name, how):
    """HAZARDS row 22: nobody is left who would use it."""
    greenlet = ConsumerGreenlet(Collector(connection_to(peer.url), queue_name))

    def end(event: Event) -> None:
        if isinstance(event, LinkUp):
            greenlet.stop() if how == "stop" else greenlet.kill(block=False)

    unsubscribe = subscribe(end)
    greenlet.start()
    assert greenlet.join(30)
    unsubscribe()
    assert greenlet.successful()
    wait_until(lambda: peer.open_count == 0)


def test_a_stop_while_consumers_come_back_ends_them_all(proxy, queue_name, monkeypatch):
    """HAZARDS rows 3 and 28: some have a channel again, some wait for their turn."""
    monkeypatch.setattr(dialer, "SPREAD", NEVER)
    monkeypatch.setattr(dialer, "MAX_SPREAD", 2 * NEVER)
    runtime = Runtime(connection_to(proxy.url))
    runtime.spawn(lambda connection: Collector(connection, queue_name), replicas=300)
    runtime.start()
    with observing(LinkUp) as ups:
        proxy.cut()
        wait_until(lambda: ups)
        wait_until(lambda: any(child.greenlet.ready.is_set() for child in runtime.children))
        began = monotonic()
        runtime.stop()
        assert runtime.join(30)
        assert monotonic() - began < AT_ONCE
    assert [child.error for child in runtime.children] == [None] * 300


@pytest.mark.usefixtures("long_backoff")
@pytest.mark.parametrize("concurrency", [None, 2])
def test_a_link_lost_in_the_drain_does_not_hold_it_up(proxy, amqp_url, queue_name, concurrency):
    """HAZARDS row 13: the handler that a stop waits for finds its channel gone."""
    publish(amqp_url, queue_name, 1)
    begun, go_on = Event(), Event()

    def work(_body: Any) -> None:
        begun.set()
        go_on.wait()

    connection = patient_connection_to(proxy.url)
    consumer = Collector(connection, queue_name, work=work, concurrency=concurrency)
    with running(consumer) as (greenlet,), observing(HandlerFailed) as failures:
        assert begun.wait(30)
        greenlet.stop()
        gevent.sleep(0.05)
        proxy.refuse()
        proxy.cut()
        gevent.sleep(0.05)
        assert not greenlet.dead
        go_on.set()
        began = monotonic()
        assert greenlet.join(30)
        assert monotonic() - began < AT_ONCE
    assert failures == []
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 1)


@pytest.mark.parametrize("at", [0.0, 0.001, 0.003, 0.01, 0.03, 0.1])
def test_a_stop_at_any_moment_of_starting_leaves_nothing_behind(rabbitmq, amqp_url, queue_name, at):
    """The fixture that looks for leaks is the judge."""
    declare(amqp_url, queue_name)
    greenlet = spawn(Collector(patient_connection_to(amqp_url, CLOSE_TIMEOUT), queue_name))
    gevent.sleep(at)
    assert stop_and_join(greenlet) < AT_ONCE
    assert greenlet.successful()
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


@pytest.mark.usefixtures("long_backoff")
def test_a_wrong_password_is_waited_out_until_the_stop(amqp_url, queue_name):
    with observing(ConnectFailed) as failures:
        url = amqp_url.replace("guest:guest", "guest:wrong")
        greenlet = spawn(Collector(patient_connection_to(url), queue_name))
        wait_until(lambda: failures)
        assert failures[0].refused
        assert "wrong" not in failures[0].uri
        assert stop_and_join(greenlet) < AT_ONCE


@pytest.mark.usefixtures("long_backoff")
def test_a_mixin_run_by_hand_stops_at_once_too(refused_url, queue_name):
    """HAZARDS row 3, without `spawn`: `run()` in a greenlet of the user's own."""
    consumer = Collector(patient_connection_to(refused_url), queue_name)
    greenlet = gevent.spawn(consumer.run)
    gevent.sleep(0.1)
    began = monotonic()
    consumer.should_stop = True
    greenlet.join(30)
    assert greenlet.successful()
    assert monotonic() - began < AT_ONCE


def test_a_stop_after_connecting_was_given_up_changes_nothing(refused_url, queue_name):
    class Impatient(Collector):
        connect_max_retries = 0

    greenlet = spawn(Impatient(connection_to(refused_url), queue_name))
    gevent.sleep(0.2)
    assert isinstance(greenlet.consumer, ConsumerMixin)
    stop_and_join(greenlet)
