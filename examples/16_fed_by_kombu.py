"""A consumer that plain kombu feeds, on RabbitMQ or Redis: python examples/16_fed_by_kombu.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import os

from kombu import Connection, Queue

from greenconsume import ConsumerMixin, spawn

ORDERS = Queue("orders-from-kombu")


class Shop(ConsumerMixin):
    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([ORDERS], callbacks=[self.on_order], prefetch_count=1)]

    def on_order(self, body, message):
        print(f"shipped {body['item']}")
        message.ack()
        self.should_stop = body["is_last"]


if __name__ == "__main__":
    broker = os.environ.get("GREENCONSUME_BROKER", "memory://")
    with Connection(broker) as connection:
        producer = (
            connection.Producer()
        )  # kombu's own: as well in another program, without greenconsume
        for item, is_last in [("a hat", False), ("a coat", False), ("a scarf", True)]:
            order = {"item": item, "is_last": is_last}
            producer.publish(order, routing_key=ORDERS.name, declare=[ORDERS])
        spawn(Shop(connection)).join()
