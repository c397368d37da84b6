"""Tests the rate of a consumer: what words say it, how many messages begin, and what is taken ahead."""

from __future__ import annotations

from time import monotonic

import gevent
import pytest
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Runtime
from greenconsume.errors import InvalidOptionsError
from greenconsume.handling.pace import Pace, Rate, rate_of
from greenconsume.stopping import StopSignal
from tests.waiting import AT_ONCE, wait_until


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("100/s", Rate(100.0, 100)),
        ("90/m", Rate(1.5, 1)),
        ("3600/h burst 5", Rate(1.0, 5)),
        ("0.5/s", Rate(0.5, 1)),
        ("100/s burst 20", Rate(100.0, 20)),
    ],
)
def test_a_rate_is_said_in_words(words, rate):
    assert rate_of(words) == rate
    ConsumerOptions(rate=words)


@pytest.mark.parametrize("words", ["", "100", "0/s", "-1/s", "100/d", "100 / s", "x/s", 100])
def test_what_is_no_rate_is_refused(words):
    with pytest.raises(InvalidOptionsError, match="100/s burst 20"):
        ConsumerOptions(rate=words)


def test_no_more_than_a_second_s_messages_are_taken_ahead():
    assert Rate(100.0, 5).most_unsettled == 100
    assert Rate(0.1, 5).most_unsettled == 1


def test_after_a_burst_messages_come_at_the_rate():
    pace, leave = Pace(Rate(100.0, 5)), StopSignal()
    began = monotonic()
    assert all(pace.wait(leave) for _ in range(15))
    assert monotonic() - began >= 0.09


def test_a_stop_ends_the_wait():
    pace, leave = Pace(Rate(0.01, 1)), StopSignal()
    assert pace.wait(leave)
    waiting = gevent.spawn(pace.wait, leave)
    gevent.sleep(0)
    leave.set()
    assert waiting.get(timeout=30) is False


@pytest.mark.parametrize("concurrency", [None, 10])
def test_a_consumer_begins_with_messages_at_its_rate_and_stops_at_once(queue_name, concurrency):
    begun = []

    class Orders(ConsumerMixin):
        options = ConsumerOptions(rate="100/s burst 1", concurrency=concurrency)

        def __init__(self, connection):
            self.connection = connection

        def get_consumers(self, Consumer, channel):
            return [Consumer([Queue(queue_name)], callbacks=[self.on_order])]

        def on_order(self, body, message):
            begun.append(monotonic())
            message.ack()

    with Connection("memory://") as connection:
        queue = connection.SimpleQueue(queue_name)
        for number in range(2000):
            queue.put(number)
    runtime = Runtime()
    runtime.spawn(Orders)
    runtime.start()
    wait_until(lambda: len(begun) >= 20)
    since = monotonic()
    runtime.stop()
    runtime.join()
    assert monotonic() - since < AT_ONCE
    assert (len(begun) - 1) / (begun[-1] - begun[0]) < 120
    with Connection("memory://") as connection:
        assert connection.SimpleQueue(queue_name).qsize() == 2000 - len(begun)


def test_the_consumers_of_a_runtime_share_its_rate_in_turn():
    begun = []

    def consumer_of(name):
        class Orders(ConsumerMixin):
            def __init__(self, connection):
                self.connection = connection

            def get_consumers(self, Consumer, channel):
                return [Consumer([Queue(name)], callbacks=[self.on_order])]

            def on_order(self, body, message):
                begun.append((name, monotonic()))
                message.ack()

        return Orders

    names = [f"shared-{number}" for number in range(4)]
    with Connection("memory://") as connection:
        for name in names:
            queue = connection.SimpleQueue(name)
            for number in range(1000):
                queue.put(number)
    runtime = Runtime(rate="200/s burst 1")
    for name in names:
        runtime.spawn(consumer_of(name))
    runtime.start()
    wait_until(lambda: len(begun) >= 80)
    since = monotonic()
    runtime.stop()
    runtime.join()
    assert monotonic() - since < AT_ONCE
    assert (len(begun) - 1) / (begun[-1][1] - begun[0][1]) < 240
    counts = [sum(each == name for each, _ in begun) for name in names]
    assert max(counts) - min(counts) <= 2
    with Connection("memory://") as connection:
        left = sum(connection.SimpleQueue(name).qsize() for name in names)
    assert left == 4000 - len(begun)


def test_a_runtime_refuses_what_is_no_rate():
    with pytest.raises(InvalidOptionsError, match="100/s burst 20"):
        Runtime(rate="fast")
    with pytest.raises(ValueError, match="max_hub_lag must be more than 0 seconds"):
        Runtime(max_hub_lag=0)
