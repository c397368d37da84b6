"""Owns the names of the queues beside a queue: where its messages wait for a retry, and where they are kept.

A name always fits: AMQP allows 255 bytes, and RabbitMQ keeps names that begin with `amq.` to itself. Does
no I/O. Called by whatever declares such a queue or publishes to it.
"""

from __future__ import annotations

from hashlib import sha256

#: The dead-letter queue of a queue, unless told otherwise.
DEAD_LETTER = "{queue}.dead"
MAX_BYTES = 255
_RESERVED, _OURS = "amq.", "greenconsume."
#: As long as the longest that follows a name: ".retry." and the milliseconds of fifty days.
_RETRY = ".retry."
_RETRY_BYTES = len(_RETRY) + 10


def retry_prefix(queue: str) -> str:
    """Return what the names of the queues begin with in which a queue's messages wait."""
    return _fitted(queue, MAX_BYTES - _RETRY_BYTES) + _RETRY


def dead_letter_queue(pattern: str, queue: str) -> str:
    """Return the name of a queue's dead-letter queue: the pattern, where `{queue}` stands for its own."""
    rest = len(pattern.replace("{queue}", "").encode())
    return pattern.replace("{queue}", _fitted(queue, MAX_BYTES - rest))


def check_dead_letter(pattern: object, whose: str) -> None:
    """Refuse what can be no name of a dead-letter queue.

    Raises:
        ValueError: It is empty, the queue's own, or too long.
    """
    if not isinstance(pattern, str) or pattern in ("", "{queue}"):
        raise ValueError(f"{whose}(dead_letter) must name another queue, not {pattern!r}")
    if len(pattern.replace("{queue}", "").encode()) > MAX_BYTES - 64:
        raise ValueError(f"{whose}(dead_letter) is too long for the name of a queue: {pattern!r}")


def _fitted(queue: str, limit: int) -> str:
    if queue.startswith(_RESERVED):
        queue = _OURS + queue
    encoded = queue.encode()
    if len(encoded) <= limit:
        return queue
    digest = "-" + sha256(encoded).hexdigest()[:12]  # two long names may begin alike
    return encoded[: limit - len(digest)].decode(errors="ignore") + digest
