"""Readings are handled a hundred at a time: python examples/08_batches.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import os

from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, spawn


class Readings(ConsumerMixin):
    """Given up to 100 readings at once, or what has come in the second after the first."""

    options = ConsumerOptions(batch_size=100, batch_timeout=1.0)

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("readings", auto_delete=True)], callbacks=[self.on_batch])]

    def on_batch(self, batch):
        print(f"{len(batch)} readings, on average {sum(r for r, _ in batch) / len(batch)}")
        batch.ack()  # or, had it raised, all hundred would be requeued
        self.should_stop = len(batch) < 100


if __name__ == "__main__":
    with Connection(os.environ.get("GREENCONSUME_BROKER", "memory://")) as connection:
        (readings := spawn(Readings(connection))).ready.wait()
        for reading in range(250):
            connection.Producer().publish(reading, routing_key="readings")
        readings.join()
