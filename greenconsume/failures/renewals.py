"""Owns messages whose ways back are used up: written to their own queue again before they can be dropped.

A quorum queue counts each way back of a message, also where nobody failed on it: until RabbitMQ 4.2 a
drain, a lost link and a killed process count as a failure does, and twenty deployments end a backlog that no
handler ever saw. So a message is looked at when the reader brings it, not when its turn comes: a process
that is killed meanwhile gets no other chance. One whose count is at its limit is written to its queue anew,
where its count begins again, and is acked once that is confirmed; it is then the last in its queue. Our own
count of that ends in the dead-letter queue. It must never lose a message: what cannot be written is handled.
Called by the reader and by `recoverer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import gevent
from kombu import Message, Queue

from greenconsume.amqp.frames import Delivery
from greenconsume.amqp.properties import decode_properties
from greenconsume.amqp.transport import Session
from greenconsume.errors import GreenconsumeError
from greenconsume.events import MessageRenewed, emit
from greenconsume.failures.delivery_limits import DELIVERY_COUNT, count_in, last_count, limit_of
from greenconsume.failures.message_copy import keep_wire_form, renewals_of

#: How often a message is written to its queue again before it is put into the dead-letter queue.
MAX_RENEWALS = 10

_MARK = DELIVERY_COUNT.encode()


class Source(NamedTuple):
    """The origin of deliveries: the consumer that takes them, and its queue."""

    consumer: Any
    queue: Queue


class Rewriter(Protocol):
    """A writer of messages to another place: confirmed, and only then acked."""

    def source_of(self, consumer_tag: str) -> Source | None:
        """Return where what is delivered to a consumer comes from."""

    def renew(self, message: Message, queue: Queue, count: int) -> None:
        """Write a message to its queue again."""

    def bury(self, message: Message, queue: Queue, error: BaseException) -> str:
        """Write a message to the dead-letter queue, and return its name."""


class Renewals:
    """Looks at what a session is delivered again, and renews what its queue would soon drop.

    Args:
        name: The consumer's.
        session: What is delivered to it.
        rewriter: What writes.
    """

    __slots__ = ("_greenlets", "_name", "_rewriter", "_session")

    def __init__(self, name: str, session: Session, rewriter: Rewriter) -> None:
        self._name = name
        self._session = session
        self._rewriter = rewriter
        self._greenlets: dict[gevent.Greenlet[..., None], None] = {}  # an empty set takes 216 bytes

    def screen(self, delivery: Delivery) -> bool:
        """Take over a delivery whose ways back are used up; return whether it was. Never switches."""
        count = _count_of(delivery[5])
        source = self._rewriter.source_of(delivery[0]) if count else None
        if count is None or source is None:
            return False
        limit = limit_of(source.queue, self._session.link.server_properties)
        if limit is None or count < last_count(limit):
            return False
        greenlet = gevent.spawn(self._renew, delivery, source, limit)
        self._greenlets[greenlet] = None
        greenlet.rawlink(self._greenlets.pop)
        return True

    def _renew(self, delivery: Delivery, source: Source, limit: int) -> None:
        channel = source.consumer.channel
        try:
            message = channel.message_to_python(delivery)
            message.consumer = source.consumer
            keep_wire_form(message, delivery)
            count = renewals_of(message.headers) + 1
            if count > MAX_RENEWALS:
                self._bury(message, source.queue, limit)
            else:
                self._rewriter.renew(message, source.queue, count)
                emit(MessageRenewed(self._name, source.queue.name, count, ""))
        except Exception:  # it may not have arrived: there is one more chance to handle it
            take = source.consumer._receive_callback
            self._session.inbox.put(channel.deliveries, delivery, take)

    def _bury(self, message: Message, queue: Queue, limit: int) -> None:
        error = GreenconsumeError(
            f"it came back {MAX_RENEWALS} times {limit} times and was never settled: each time its consumer "
            "was stopped, lost its link or was killed"
        )
        target = self._rewriter.bury(message, queue, error)
        emit(MessageRenewed(self._name, queue.name, MAX_RENEWALS, target))

    def join(self, timeout: float) -> None:
        """Wait for those that are being written. Switches: yes, if there are any."""
        if self._greenlets:
            gevent.joinall(list(self._greenlets), timeout=timeout)


def _count_of(properties: bytes | Mapping[str, Any]) -> int | None:
    if isinstance(properties, bytes):
        if _MARK not in properties:
            return None
        try:
            properties = decode_properties(properties)
        except Exception:  # its publisher's fault, which is told where it is handled
            return None
    return count_in(properties.get("application_headers") or {})
