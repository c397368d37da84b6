"""Many consumers, one connection: greenconsume run examples.02_a_hundred_consumers:runtime."""

import time
from itertools import count

from kombu import Queue

from greenconsume import ConsumerMixin, Runtime

runtime = Runtime()  # on memory://, unless --broker or GREENCONSUME_BROKER names another
began, ready, shipped = time.monotonic(), count(1), count(1)


class Orders(ConsumerMixin):
    """Ships an order in 0.1 s, in which its ninety-nine neighbours go on."""

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        queue = Queue("orders", auto_delete=True)
        return [Consumer([queue], callbacks=[self.on_order], prefetch_count=1)]

    def on_consume_ready(self, connection, channel, consumers, **kwargs):
        if next(ready) == 100:  # all are: the last one publishes what there is to do
            with self.connection.clone() as own, own.Producer() as producer:
                for order in range(3000):
                    producer.publish(order, routing_key="orders")

    def on_order(self, body, message):
        time.sleep(0.1)
        message.ack()
        if next(shipped) == 3000:
            print(f"3000 orders of 0.1 s each, shipped in {time.monotonic() - began:.1f} s")
            runtime.stop("all orders are shipped")


runtime.spawn(Orders, replicas=100)
