"""Kills and gevent.Timeouts at every moment: the last resort must be prompt, and harm nobody else."""

from __future__ import annotations

import json
import random
from collections import Counter
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event
from gevent.pool import Group
from kombu import Producer

from greenconsume import ConsumerProducerMixin, Runtime, spawn
from greenconsume.consuming.engine import ensure_engine, ensure_lifecycle
from greenconsume.events import ConsumerRestarting, HandlerFailed, LinkDown, LinkUp
from greenconsume.links.pool import LinkPool
from greenconsume.runtime.greenlet import ConsumerGreenlet
from tests.fault.consumers import (
    Collector,
    connection_to,
    consuming,
    everything,
    freeze,
    observing,
    patient_connection_to,
    running,
)
from tests.messages import channel, declare, publish, queue_depth
from tests.options import say
from tests.rounds import rounds
from tests.waiting import AT_ONCE, NEVER, wait_until

OWN_GREENLET = pytest.mark.parametrize("start", [spawn, lambda c: gevent.spawn(c.run)])


def kill(greenlet: gevent.Greenlet, **options: Any) -> float:
    """Kill and wait; returns the seconds that it took to die."""
    began = monotonic()
    greenlet.kill(timeout=30.0, **options)
    assert greenlet.dead, f"{greenlet} survived"
    return monotonic() - began


def ready(consumer: Collector) -> None:
    assert ensure_lifecycle(consumer).ready.wait(30)


@OWN_GREENLET
def test_a_kill_of_an_idle_consumer_closes_its_link(rabbitmq, amqp_url, queue_name, start):
    """HAZARDS row 1: a kill on a draining greenlet wedges the connection."""
    greenlet = start(consumer := Collector(connection_to(amqp_url), queue_name))
    ready(consumer)
    assert kill(greenlet) < AT_ONCE
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


@OWN_GREENLET
def test_a_kill_of_a_consumer_whose_broker_is_frozen_is_bounded(
    rabbitmq_fault, amqp_url, queue_name, start
):
    """HAZARDS rows 1 and 17."""
    greenlet = start(consumer := Collector(connection_to(amqp_url), queue_name))
    ready(consumer)
    freeze(rabbitmq_fault)
    assert kill(greenlet) < AT_ONCE


@pytest.mark.parametrize("concurrency", [None, 3])
@OWN_GREENLET
def test_a_kill_within_a_handler_gives_its_message_back(
    rabbitmq, amqp_url, queue_name, start, concurrency
):
    """HAZARDS rows 1 and 11: a kill is nobody's handler's failure, and nothing is lost."""
    publish(amqp_url, queue_name, 1)
    begun = Event()

    def work(_body: Any) -> None:
        begun.set()
        gevent.sleep(60.0)

    with observing(HandlerFailed) as failures:
        consumer = Collector(connection_to(amqp_url), queue_name, work=work)
        say(consumer, concurrency=concurrency)
        greenlet = start(consumer)
        assert begun.wait(30)
        assert kill(greenlet) < AT_ONCE
    assert failures == []
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
    assert rabbitmq.queue_counts(amqp_url, queue_name) == (1, 0, 0)


@OWN_GREENLET
def test_a_kill_while_connecting_leaves_no_socket(black_hole_url, queue_name, start):
    """HAZARDS row 1; the leak check looks for the socket."""
    greenlet = start(Collector(patient_connection_to(black_hole_url), queue_name))
    gevent.sleep(0.05)
    assert kill(greenlet) < AT_ONCE


@pytest.mark.parametrize("handling", [True, False])
@OWN_GREENLET
def test_a_kill_closes_the_producers_connection_too(
    rabbitmq, amqp_url, queue_name, start, handling
):
    """HAZARDS row 22: `on_consume_end`, which closes it, is not called after a kill."""

    class Relay(ConsumerProducerMixin, Collector):
        def relay(self, body: Any) -> None:
            self.producer.publish(body, routing_key=f"{queue_name}-out")
            if handling:
                gevent.sleep(60.0)

    publish(amqp_url, queue_name, 1)
    relay = Relay(connection_to(amqp_url), queue_name)
    relay.work = relay.relay
    greenlet = start(relay)
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 2)
    gevent.sleep(0.05)
    assert kill(greenlet) < AT_ONCE
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


@pytest.mark.usefixtures("long_backoff")
def test_a_kill_between_two_attempts_to_connect_ends_the_dialer(peer, queue_name):
    greenlet = spawn(Collector(patient_connection_to(peer.url), queue_name))
    consuming([greenlet])
    peer.close()
    wait_until(lambda: not greenlet.ready.is_set())
    gevent.sleep(0.1)
    assert kill(greenlet) < AT_ONCE


@pytest.mark.parametrize("silent", ["channel.open", "queue.declare", "basic.qos", "basic.consume"])
def test_a_kill_within_a_call_is_bounded(make_peer, queue_name, silent):
    """HAZARDS row 1: a call that was killed leaves nothing behind that takes the next one's reply."""
    peer = make_peer(silent={silent})
    greenlet = spawn(Collector(connection_to(peer.url), queue_name))
    peer.wait_for(silent)
    assert kill(greenlet) < AT_ONCE
    wait_until(lambda: peer.open_count == 0)


@pytest.mark.parametrize("concurrency", [None, 3])
def test_kills_at_random_moments_under_load_disturb_no_neighbour(
    rabbitmq, amqp_url, queue_name, concurrency
):
    """HAZARDS row 1: 92 of 300 random kills wedged the connection. Here the link is shared."""
    rng = random.Random(1)
    declare(amqp_url, queue_name)
    handled: Counter[Any] = Counter()
    pool = LinkPool(links=1)

    def sharing() -> Collector:
        consumer = Collector(connection_to(amqp_url), queue_name, handled, prefetch=5)
        consumer.work = lambda body: gevent.sleep(0) if body % 3 else None
        say(consumer, concurrency=concurrency)
        ensure_engine(consumer).links = pool
        return consumer

    sent, seconds = 0, []
    with observing(LinkUp, LinkDown) as links, running(*(sharing() for _ in range(5))) as others:
        for _ in range(rounds(50)):
            gevent.spawn(publish, amqp_url, queue_name, range(sent, sent + 20))
            sent += 20
            victims = [ConsumerGreenlet(sharing()) for _ in range(2)]
            for victim in victims:
                victim.start()
            gevent.sleep(rng.uniform(0, 0.02))
            seconds += [kill(victim) for victim in victims]
        assert all(other.ready.is_set() for other in others)
        wait_until(everything(handled, sent))
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (0, 0, 5))
        assert [type(each) for each in links] == [LinkUp]
    print(f"\n{len(seconds)} kills, the slowest took {max(seconds) * 1000:.0f} ms")
    assert max(seconds) < AT_ONCE
    assert sum(handled.values()) - sent <= 5 * len(seconds)


def test_a_timeout_around_consume_ends_it_and_leaves_nothing(rabbitmq, amqp_url, queue_name):
    """HAZARDS row 1: gevent.Timeout on a draining greenlet; what is consumed next is whole again."""
    handled: Counter[Any] = Counter()
    declare(amqp_url, queue_name)
    consumer = Collector(connection_to(amqp_url), queue_name, handled)
    rng = random.Random(2)
    for number in range(40):
        publish(amqp_url, queue_name, [number])
        began = monotonic()
        with gevent.Timeout(rng.uniform(0.001, 0.04), False):
            for _ in consumer.consume():
                pass
            raise AssertionError("nothing else ends it")
        assert monotonic() - began < AT_ONCE
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
    with running(consumer):
        wait_until(everything(handled, 40))
    assert queue_depth(amqp_url, queue_name) == 0


def test_a_timeout_of_the_handlers_caller_is_not_swallowed(amqp_url, queue_name):
    """HAZARDS row 11: a gevent.Timeout that was set around `consume` passes through the handler."""
    publish(amqp_url, queue_name, 1)
    consumer = Collector(connection_to(amqp_url), queue_name, work=lambda _body: gevent.sleep(9))
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.3):
        next(consumer.consume())
    assert consumer.handled[0] == 1
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 1)


def test_a_timeout_around_a_call_drops_its_late_reply(proxy, queue_name):
    """HAZARDS row 1: the next call on the same channel gets its own reply, not that one."""
    with connection_to(proxy.url) as connection:
        chan = connection.default_channel
        proxy.stall()
        for number in range(5):
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.02):
                chan.queue_declare(f"{queue_name}-late-{number}")
        proxy.resume()
        assert chan.queue_declare(queue_name, auto_delete=False).queue == queue_name
        assert connection.connected


def test_a_timeout_around_connecting_leaves_no_socket(black_hole_url):
    """HAZARDS row 1; the leak check is the judge."""
    connection = connection_to(black_hole_url)
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
        connection.connect()
    assert not connection.connected


def test_timeouts_around_publishing_leave_the_connection_whole(amqp_url, queue_name):
    """HAZARDS rows 1 and 18: a frame is never cut in two, and confirms find their own publish."""
    declare(amqp_url, queue_name)
    rng = random.Random(3)
    confirmed, bodies = [], iter(range(10**6))
    body = "x" * 300_000  # several frames, more than a socket takes at once
    with connection_to(amqp_url, confirm_publish=True) as connection:
        producer = Producer(connection.default_channel)

        def work() -> None:
            for _ in range(30):
                number = next(bodies)
                with gevent.Timeout(rng.uniform(0, 0.02), False):
                    producer.publish([number, body], routing_key=queue_name)
                    confirmed.append(number)

        gevent.joinall([gevent.spawn(work) for _ in range(10)], raise_error=True)
        last = next(bodies)
        producer.publish([last, body], routing_key=queue_name, timeout=30.0)
        confirmed.append(last)
        assert connection.connected
    arrived = set()
    with channel(amqp_url) as chan:
        while message := chan.basic_get(queue_name, no_ack=True):
            number, whole = json.loads(message.body)
            assert whole == body
            arrived.add(number)
    print(f"\n{len(confirmed)} of 301 confirmed, {len(arrived)} arrived")
    assert set(confirmed) <= arrived


def test_kills_of_publishing_greenlets_leave_the_connection_whole(amqp_url, queue_name):
    """HAZARDS row 1: a kill in mid-write cuts a frame in two."""
    declare(amqp_url, queue_name)
    with connection_to(amqp_url, confirm_publish=True) as connection:
        producer = Producer(connection.default_channel)
        for number in range(100):
            publisher = gevent.spawn(
                producer.publish, {"n": number, "body": "x" * 200_000}, routing_key=queue_name
            )
            gevent.sleep(0 if number % 2 else 0.001)
            publisher.kill()
        producer.publish("last", routing_key=queue_name, timeout=30.0)
        assert connection.connected
    assert 1 <= queue_depth(amqp_url, queue_name) <= 101


def test_killall_and_joinall_end_many_consumers_together(rabbitmq, proxy, amqp_url, queue_name):
    """HAZARDS row 17: 50 links closed at once, not one after the other, which takes 15 s here."""
    connections = [connection_to(proxy.url, close_timeout=NEVER) for _ in range(50)]
    consumers = [Collector(connection, queue_name) for connection in connections]
    greenlets = [spawn(consumer) for consumer in consumers]
    consuming(greenlets)
    proxy.latency(0.05)
    began = monotonic()
    gevent.killall(greenlets, timeout=30.0)
    assert monotonic() - began < AT_ONCE
    assert len(gevent.joinall(greenlets, timeout=30)) == 50
    assert all(greenlet.successful() for greenlet in greenlets)
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


def test_a_group_kills_its_consumers(amqp_url, queue_name):
    group = Group()
    greenlets = [ConsumerGreenlet(Collector(connection_to(amqp_url), queue_name)) for _ in range(5)]
    for greenlet in greenlets:
        group.start(greenlet)
    consuming(greenlets)
    group.kill(timeout=30.0)
    assert len(group) == 0
    assert [str(greenlet.state) for greenlet in greenlets] == ["stopped"] * 5


def test_a_kill_that_comes_twice_does_not_hang(make_peer, queue_name):
    """A second kill cuts the orderly close of the first one short."""
    peer = make_peer(silent={"basic.cancel", "channel.close", "connection.close"})
    greenlet = spawn(Collector(connection_to(peer.url, close_timeout=NEVER), queue_name))
    consuming([greenlet])
    greenlet.kill(block=False)
    gevent.sleep(0.05)
    assert not greenlet.dead
    began = monotonic()
    for _ in range(5):  # cancel, channel, connection, …
        greenlet.kill(block=False)
        gevent.sleep(0.01)
    assert greenlet.join(30)
    assert monotonic() - began < AT_ONCE
    wait_until(lambda: peer.open_count == 0)


def test_a_kill_before_the_greenlet_began_ends_it(amqp_url, queue_name):
    greenlet = spawn(Collector(connection_to(amqp_url), queue_name))
    assert kill(greenlet) < AT_ONCE
    wait_until(lambda: str(greenlet.state) == "stopped")
    again = spawn(greenlet.consumer)
    consuming([again])
    assert kill(again) < AT_ONCE


def test_an_error_thrown_into_an_idle_consumer_fails_it(rabbitmq, amqp_url, queue_name):
    greenlet = spawn(Collector(connection_to(amqp_url), queue_name))
    consuming([greenlet])
    assert kill(greenlet, exception=ValueError("thrown")) < AT_ONCE
    assert isinstance(greenlet.exception, ValueError)
    assert str(greenlet.state) == "failed"
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


def test_a_killed_consumer_of_a_runtime_leaves_the_others_alone(amqp_url, queue_name):
    """A kill is no failure: it is not restarted, nor is the runtime told of one."""
    with observing(ConsumerRestarting, LinkDown) as events:
        with Runtime(connection_to(amqp_url)) as runtime:
            runtime.spawn(lambda c: Collector(c, queue_name), replicas=10)
            wait_until(lambda: all(child.started for child in runtime.children))
            victim, *others = runtime.children
            assert kill(victim.greenlet) < AT_ONCE
            publish(amqp_url, queue_name, 50)
            wait_until(lambda: queue_depth(amqp_url, queue_name) == 0)
            assert all(other.greenlet.ready.is_set() for other in others)
    assert events == []
