"""A cluster's nodes in one URL, and a queue on all of them: python examples/14_cluster.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import os

from kombu import Queue

from greenconsume import ConsumerMixin, Publisher, Runtime

# Of "amqp://one;amqp://two;amqp://three" the next is tried at once where one does not answer.
NODES = os.environ.get("GREENCONSUME_BROKER", "memory://")


class Ledger(ConsumerMixin):
    # A quorum queue is kept by most of the nodes, and goes on when one of them is lost.
    queue = Queue("entries", queue_arguments={"x-queue-type": "quorum"})

    def get_consumers(self, Consumer, channel):
        return [Consumer([self.queue], callbacks=[self.on_entry])]

    def on_entry(self, body, message):
        print(f"booked {body}")
        message.ack()
        self.should_stop = body == 3


if __name__ == "__main__":
    runtime = Runtime(NODES)
    runtime.spawn(Ledger())
    with runtime, Publisher(NODES) as publisher:
        for entry in (1, 2, 3):
            publisher.publish(entry, routing_key="entries")  # most of the nodes have it now
        runtime.children[0].greenlet.join(30)
