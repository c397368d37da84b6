"""A waiting consumer is stopped at once: python examples/03_stop_from_another_greenlet.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import os
import time

import gevent
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, spawn


class Patient(ConsumerMixin):
    """Waits for messages, and nobody sends any."""

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("nothing", auto_delete=True)], callbacks=[print])]


def stop(consumer):
    """Have it wait a little first. From a thread it works the same."""
    time.sleep(0.5)
    consumer.should_stop = True
    return time.monotonic()


if __name__ == "__main__":
    patient = spawn(Patient(Connection(os.environ.get("GREENCONSUME_BROKER", "memory://"))))
    patient.ready.wait()
    stopper = gevent.spawn(stop, patient.consumer)
    patient.join()
    print(f"{patient.state} {1000 * (time.monotonic() - stopper.get()):.1f} ms after it was told")
