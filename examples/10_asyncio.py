"""Handlers that run at once call asyncio code, each in a thread: python examples/10_asyncio.py."""

if __name__ == "__main__":
    from greenconsume import patch_all

    patch_all()

import asyncio
import os

import gevent
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, spawn


class Doubles(ConsumerMixin):
    options = ConsumerOptions(concurrency=5, auto_settle=True)
    done = ()

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("doubles", auto_delete=True)], callbacks=[self.on_number])]

    def on_number(self, number, message):
        # Not asyncio.run alone: a thread runs one event loop at a time, and all greenlets are in one thread.
        threads = gevent.get_hub().threadpool
        double = threads.apply(asyncio.run, (asyncio.sleep(0.1, result=2 * number),))
        self.done = (*self.done, double)
        self.should_stop = len(self.done) == 5


if __name__ == "__main__":
    doubles = Doubles()
    with Connection(os.environ.get("GREENCONSUME_BROKER", "memory://")) as doubles.connection:
        (greenlet := spawn(doubles)).ready.wait()
        for number in range(5):
            doubles.connection.Producer().publish(number, routing_key="doubles")
        greenlet.join()
        print(sorted(doubles.done))
