"""Owns what is known of a stream (`x-queue-type: stream`): which queues are one.

A stream keeps its messages: it knows acks only, and an ack asks for more. Does no I/O. Called by `recoverer`,
`handling` and `consuming`.
"""

from __future__ import annotations

from kombu import Queue

#: Where a consumer begins, in its arguments; and where a message stands, in its headers.
OFFSET = "x-stream-offset"


def is_stream(queue: Queue) -> bool:
    """Return whether a queue is a stream, by its arguments or by those that it is consumed with."""
    declared = getattr(queue, "queue_arguments", None) or {}
    consumed = getattr(queue, "consumer_arguments", None) or {}
    return declared.get("x-queue-type") == "stream" or OFFSET in consumed
