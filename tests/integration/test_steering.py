"""Tests pause, resume and scale under load, on a real broker: nothing lost, nothing doubled, all run ends."""

from __future__ import annotations

from collections import Counter
from statistics import median
from time import monotonic

import gevent
import pytest
from kombu import Queue
from kombu.utils.limits import TokenBucket

from greenconsume import ConsumerMixin, ConsumerOptions, Publisher, Runtime
from tests.waiting import AT_ONCE, wait_until

COUNT = 3000


@pytest.fixture
def load(amqp_url, queue_name):
    """A runtime of one consumer with COUNT messages to handle, and what it has handled and begun."""
    handled: Counter[int] = Counter()
    begun: list[float] = []

    class Orders(ConsumerMixin):
        options = ConsumerOptions(concurrency=20)

        def __init__(self, connection):
            self.connection = connection
            self.restart_limit = TokenBucket(1 / 60)  # what a resumption must not wait for

        def get_consumers(self, Consumer, channel):
            return [Consumer([Queue(queue_name)], callbacks=[self.on_order])]

        def on_order(self, body, message):
            begun.append(monotonic())
            gevent.sleep(0.01)
            handled[body] += 1
            message.ack()

    runtime = Runtime(amqp_url)
    runtime.spawn(Orders)
    with runtime:
        with Publisher(amqp_url, routing_key=queue_name) as publisher:
            for number in range(COUNT):
                publisher.publish_nowait(number)
        yield runtime, handled, begun


def consuming(runtime):
    return [each.name for each in runtime.children if each.state.value == "consuming"]


def assert_each_once(handled):
    wait_until(lambda: len(handled) == COUNT, within=60)
    assert set(handled.values()) == {1}


def test_pausing_under_load_loses_and_doubles_nothing(load):
    runtime, handled, begun = load
    for _ in range(10):
        before = len(handled)
        wait_until(lambda before=before: len(handled) > before + 20)
        runtime.control.pause("Orders-1")
        wait_until(lambda: runtime.children[0].state.value == "paused")
        assert len(begun) == sum(handled.values())  # what ran has finished
        resting = len(begun)
        gevent.sleep(0)
        assert len(begun) == resting
        runtime.control.resume("Orders-1")
    assert_each_once(handled)
    tally = runtime.children[0].tally
    assert (tally.cancelled, tally.killed) == (0, 0)
    assert tally.given_back > 0


def test_a_resumed_consumer_handles_messages_at_once(load):
    """The target is a tenth of a second; with one start a minute, kombu's is one a second, each takes one."""
    runtime, _, begun = load
    latencies = []
    for _ in range(5):
        wait_until(lambda: begun)
        runtime.control.pause("Orders-1")
        wait_until(lambda: runtime.children[0].state.value == "paused")
        begun.clear()
        since = monotonic()
        runtime.control.resume("Orders-1")
        wait_until(lambda: begun)
        latencies.append(begun[0] - since)
    print(f"\nresumed after {median(latencies) * 1000:.0f} ms, the median of {len(latencies)}")
    assert median(latencies) < AT_ONCE


def test_scaling_up_and_down_under_load_loses_and_doubles_nothing(load):
    runtime, handled, _ = load
    for replicas in (20, 1, 5, 2, 1):
        runtime.control.scale("Orders", replicas)
        wait_until(lambda replicas=replicas: len(consuming(runtime)) == replicas)
    assert_each_once(handled)
    runtime.control.status()
    assert len(runtime.children) == 1


def test_a_restart_under_load_loses_and_doubles_nothing(load):
    runtime, handled, _ = load
    for number in range(1, 4):
        runtime.control.restart_consumer("Orders-1")
        wait_until(lambda number=number: runtime.children[0].restart_count == number)
        wait_until(lambda: consuming(runtime))
    assert_each_once(handled)
