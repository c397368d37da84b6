"""Owns what is known of a queue that counts: how often it gives a message back before it drops it.

A quorum queue counts each way back of a message, tells the count in a header, and drops the message (or
dead-letters it) when the count is above its limit. With a limit of 3 it delivers a message four times, with
the counts 0 to 3 (RabbitMQ 3.10 and 4.0, measured; until 4.2 every way back counts: a reject, a nack, a
closed channel, a lost connection; from 4.3 on only a reject). Does no I/O. Called by `recoverer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from kombu import Consumer, Queue

#: The header in which a quorum queue tells how often the message went back.
DELIVERY_COUNT = "x-delivery-count"
#: The limit of a quorum queue that says none, from RabbitMQ 4.0 on.
DEFAULT_LIMIT = 20


def limit_of(queue: Queue, server: Mapping[str, object]) -> int | None:
    """Return how often a queue gives a message back before it drops it; None if it never drops one.

    Where the queue has a dead-letter exchange nothing is dropped, and its broker's way is left to work.

    Args:
        queue: The queue, with its arguments. What a policy of the broker says cannot be known here.
        server: The properties that the broker gave of itself.
    """
    arguments = queue.queue_arguments or {}
    if "x-dead-letter-exchange" in arguments:
        return None
    has_default = version_of(server) >= (4,)
    limit = arguments.get("x-delivery-limit", DEFAULT_LIMIT if has_default else None)
    if not isinstance(limit, int):
        return None
    if limit >= 0:
        return limit
    return None if has_default else 0  # before RabbitMQ 4 a queue takes -1 at its word


def counts_returns(queue: Queue) -> bool:
    """Return whether a queue is known to count the ways back of its messages, by its arguments."""
    return bool((queue.queue_arguments or {}).get("x-queue-type") == "quorum")


def any_low(consumers: Iterable[object], server: Mapping[str, object]) -> bool:
    """Return whether a queue of these consumers has so low a limit that the first failure is the last."""
    queues = [queue for each in consumers if isinstance(each, Consumer) for queue in each.queues]
    limits = [limit_of(queue, server) for queue in queues if counts_returns(queue)]
    return any(limit is not None and last_count(limit) == 1 for limit in limits)


def last_count(limit: int) -> int:
    """Return the count from which on a message is not handled any more, as its ways back are used up.

    A quarter of them is left, for processes that are killed while they see to it.
    """
    return max(1, limit - max(1, limit // 4))


def version_of(server: Mapping[str, object]) -> tuple[int, ...]:
    """Return RabbitMQ's version; empty for another broker."""
    if server.get("product") != "RabbitMQ":
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", str(server.get("version", "")))[:2])


def count_of(headers: Mapping[str, object], queue: Queue | None) -> int | None:
    """Return how often a message went back to its queue; None for one that does not count, or is unknown.

    A message that comes for the first time has no header that tells it.
    """
    count = count_in(headers)
    return 0 if count is None and queue is not None and counts_returns(queue) else count


def count_in(headers: Mapping[str, object]) -> int | None:
    """Return how often a message went back to its queue; None for a queue that does not count."""
    count = headers.get(DELIVERY_COUNT)
    return count if isinstance(count, int) and count is not True and count >= 0 else None
