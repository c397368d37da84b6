"""Tests that a consumer with a rate keeps it, and holds no more than a second's messages, on a broker."""

from __future__ import annotations

from time import monotonic

from kombu import Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Runtime
from tests.messages import publish, queue_depth
from tests.waiting import wait_until


def test_a_rate_holds_and_no_more_than_a_second_s_messages_are_unsettled(amqp_url, queue_name):
    begun, unsettled = [], []

    class Orders(ConsumerMixin):
        options = ConsumerOptions(rate="50/s burst 1", concurrency=100)

        def __init__(self, connection):
            self.connection = connection

        def get_consumers(self, Consumer, channel):
            return [Consumer([Queue(queue_name)], callbacks=[self.on_order], prefetch_count=400)]

        def on_order(self, body, message):
            begun.append(monotonic())
            unsettled.append(runtime.control.status().consumers[0].unsettled)
            message.ack()

    runtime = Runtime(amqp_url)
    runtime.spawn(Orders)
    with runtime:
        publish(amqp_url, queue_name, 500)
        wait_until(lambda: len(begun) >= 60)
    assert (len(begun) - 1) / (begun[-1] - begun[0]) < 60
    assert max(unsettled) <= 50
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 500 - len(begun))
