"""Owns the process that the Redis tests kill: it consumes one queue, and notes every message that it handled.

    python tests/fault/redis_worker.py URL QUEUE PREFETCH FILE [SECONDS] [CONCURRENCY]

The note is in the file before the message is acked, so what is in neither the file nor the server is lost.
"""

# ruff: noqa: E402  # nothing may be imported before the patching

from gevent import monkey

monkey.patch_all()

import os
import sys
from typing import Any

import gevent
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Runtime


class Noting(ConsumerMixin):
    """Writes the number of each message into a file, in one write, and acks it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([Queue(QUEUE)], callbacks=[self.on_task], prefetch_count=PREFETCH)]

    def on_task(self, body: int, message: Any) -> None:
        if SECONDS:
            gevent.sleep(SECONDS)
        os.write(NOTES, b"%d\n" % body)
        message.ack()


URL, QUEUE, PREFETCH = sys.argv[1], sys.argv[2], int(sys.argv[3])
NOTES = os.open(sys.argv[4], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
SECONDS = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
CONCURRENCY = int(sys.argv[6]) if len(sys.argv) > 6 else None

if __name__ == "__main__":
    runtime = Runtime(URL, options=ConsumerOptions(concurrency=CONCURRENCY))
    runtime.spawn(Noting)
    sys.exit(0 if runtime.run() else 1)
