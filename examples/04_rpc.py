"""A server that answers, with `ConsumerProducerMixin`, and its client: python examples/04_rpc.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import os

from kombu import Connection, Queue, uuid

from greenconsume import ConsumerProducerMixin, spawn


class Squares(ConsumerProducerMixin):
    """Sends the square of each number to whoever asked, on a connection of its own."""

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("squares", auto_delete=True)], callbacks=[self.on_number])]

    def on_number(self, body, message):
        self.producer.publish(body**2, routing_key=message.properties["reply_to"])
        message.ack()


if __name__ == "__main__":
    with Connection(os.environ.get("GREENCONSUME_BROKER", "memory://")) as connection:
        server = spawn(Squares(connection))
        server.ready.wait()
        answers = connection.SimpleQueue(Queue(uuid(), exclusive=True), no_ack=True)
        producer = connection.Producer()
        for number in range(1, 6):
            producer.publish(number, routing_key="squares", reply_to=answers.queue.name)
            print(f"{number} squared is {answers.get(timeout=5).payload}")
        server.stop()
        server.join()
