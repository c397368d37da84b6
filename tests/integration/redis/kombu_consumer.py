"""Owns a plain kombu consumer, unpatched and over kombu's own transport, in a process of its own.

    python tests/integration/redis/kombu_consumer.py URL QUEUE FILE

It notes the body of each message in the file, then acks it, until it is killed.
"""

from __future__ import annotations

import sys
from typing import Any

from kombu import Connection, Queue
from kombu.mixins import ConsumerMixin


class Noting(ConsumerMixin):
    """Takes one message at a time."""

    def __init__(self, connection: Any, queue: str, notes: str) -> None:
        self.connection = connection
        self.queue = queue
        self.notes = notes

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([Queue(self.queue)], callbacks=[self.on_task], prefetch_count=1)]

    def on_task(self, body: Any, message: Any) -> None:
        number = body if isinstance(body, int) else body[0][0]  # what Celery sends
        with open(self.notes, "a") as file:
            file.write(f"{number}\n")
        message.ack()


if __name__ == "__main__":
    url, queue, notes = sys.argv[1:]
    with Connection(url) as connection:
        Noting(connection, queue, notes).run()
