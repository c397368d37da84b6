"""Tests consumers that are sent less while their callbacks compute, on brokers that go by the prefetch."""

from __future__ import annotations

from time import monotonic

import gevent
import pytest
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Runtime
from greenconsume.admin import lag
from greenconsume.consuming.engine import ensure_engine
from greenconsume.events import IntakeChanged
from greenconsume.handling import intake
from tests.integration.consumers import observed
from tests.waiting import wait_until


@pytest.mark.parametrize("concurrency", [None, 4])
@pytest.mark.parametrize("broker", ["amqp_url", "redis_url"])
def test_consumers_whose_callbacks_compute_are_sent_less_and_then_all_again(
    request, broker, queue_name, concurrency, monkeypatch
):
    # Sooner than every 4 and 16 quarters of a second; a machine that is busy has calm moments, too.
    monkeypatch.setattr(lag, "INTERVAL", 0.05)
    monkeypatch.setattr(intake, "_MEASURES_DOWN", 1)
    monkeypatch.setattr(intake, "_MEASURES_UP", 4)
    url, count = request.getfixturevalue(broker), 300
    handled, done = [], []

    class Orders(ConsumerMixin):
        options = ConsumerOptions(concurrency=concurrency)

        def __init__(self, connection):
            self.connection = connection

        def get_consumers(self, Consumer, channel):
            return [Consumer([Queue(queue_name)], callbacks=[self.on_order], prefetch_count=16)]

        def on_order(self, body, message):
            until = monotonic() + 0.4
            while monotonic() < until and not done:
                pass  # without a turn for the hub
            gevent.sleep(0.002)
            handled.append(body)
            message.ack()

    with Connection(url) as connection:
        queue = connection.SimpleQueue(queue_name)
        for number in range(count):
            queue.put(number)
        queue.close()
    runtime = Runtime(url, max_hub_lag=0.3)
    [child] = runtime.spawn(Orders)

    def prefetch():
        held = ensure_engine(child.consumer).holding
        return held.prefetch_count if held is not None else None

    with observed(IntakeChanged) as changes:
        runtime.start()
        wait_until(lambda: prefetch() == 16)
        wait_until(lambda: (prefetch() or 16) < 8)
        assert runtime.control.status().intake < 0.5
        done.append(True)
        wait_until(lambda: runtime.control.status().intake == 1.0, within=90)
        with Connection(url) as connection, connection.SimpleQueue(queue_name) as queue:
            queue.put(count)  # the next message takes note of it
        wait_until(lambda: len(handled) == count + 1)
        wait_until(lambda: prefetch() == 16)
        runtime.stop()
        assert runtime.join(30)
    assert sorted(handled) == list(range(count + 1))
    assert {change.share for change in changes} >= {0.5, 0.25, 1.0}
