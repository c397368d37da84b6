"""Each customer's orders in their order, all customers at once: python examples/07_partitioned_order.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import os
from random import random
from time import sleep

from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, spawn


class Orders(ConsumerMixin):
    # partition_by: a header; or "routing_key", or a function of the message.
    options = ConsumerOptions(concurrency=10, partition_by="customer", auto_settle=True)

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("orders", auto_delete=True)], callbacks=[self.on_order])]

    def on_order(self, body, message):
        sleep(random() / 50)
        seen[message.headers["customer"]].append(body)
        self.should_stop = sum(map(len, seen)) == 100


if __name__ == "__main__":
    orders, seen = Orders(), [[] for _ in range(10)]
    with Connection(os.environ.get("GREENCONSUME_BROKER", "memory://")) as orders.connection:
        (greenlet := spawn(orders)).ready.wait()
        publish = orders.connection.Producer().publish
        for n in range(100):
            publish(n, routing_key="orders", headers={"customer": n % 10})
        greenlet.join()
        print(f"10 customers, each in order: {all(each == sorted(each) for each in seen)}")
