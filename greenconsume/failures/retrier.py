"""Owns what the `Retry` policies of one consumer need of it: which queue a message is from, and its copies.

It declares the queues that retries wait in, and publishes there. It must never ack a message whose copy is
not confirmed. Called by `retry` for the policy, and where handlers run for each message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import time
from typing import Any, Protocol

from kombu import Connection, Queue

from greenconsume.amqp.transport import Session, Transport
from greenconsume.errors import GreenconsumeError
from greenconsume.failures import message_copy
from greenconsume.failures.copy_publisher import CopyPublisher, copy_publisher_of
from greenconsume.failures.message_copy import Copy
from greenconsume.failures.requeues import DelayedRequeues, is_live, is_settleable
from greenconsume.failures.retry_queues import declare_queues, delay_queue, delay_queues, lasts
from greenconsume.lifecycle import Lifecycle
from greenconsume.links.pool import LinkPool

#: Seconds that the copy of a message is waited for: four fifths of RabbitMQ's `consumer_timeout`, after which
#: it has the message back.
PATIENCE = 1440.0


class RetryPlan(Protocol):
    """When a message is tried again, how often, and where it ends; `Retry` is one."""

    @property
    def max_retries(self) -> int | None:
        """How often a message is tried again."""

    @property
    def delays(self) -> Sequence[float]:
        """Seconds before each retry."""

    def delay_after(self, retries: int, error: BaseException) -> float | None:
        """Return the seconds before the next retry, or None if there is none."""

    def dead_letter_of(self, queue: str) -> str:
        """Return the name of the dead-letter queue for a queue."""


class Retrier:
    """What the `Retry` policies of one consumer need to know of it: its queues, and its way out.

    Args:
        policies: The policies.
        life: The consumer's lifecycle.
        requeues: Where a message waits that is not due.
    """

    def __init__(
        self, policies: Sequence[RetryPlan], life: Lifecycle, requeues: DelayedRequeues
    ) -> None:
        self._policies = policies
        self._life = life
        self._requeues = requeues
        self._longest = max(delay for policy in policies for delay in (*policy.delays, 0))
        self._consumers: list[Any] = []
        self._by_tag: dict[str, Queue] = {}
        self._publisher: CopyPublisher | None = None  # for AMQP

    # -- what the consumer calls ------------------------------------------------------------------

    @contextmanager
    def prepared(self, connection: Any, consumers: list[Any]) -> Iterator[None]:
        """Have the queues that `consumers` need while they consume from `connection`.

        Raises:
            InvalidConsumerError: The broker does not let them be declared, or has others of that name.

        Switches: yes, to declare them.
        """
        if not isinstance(connection, Connection):  # a test's mock
            yield
            return
        self._consumers = consumers
        self._by_tag.clear()
        self._publisher = None
        if isinstance(connection.transport, Transport):
            if self._life.links is None:
                self._life.links = LinkPool()
            self._publisher = copy_publisher_of(self._life.links, connection)
        queues = [queue for consumer in consumers for queue in getattr(consumer, "queues", ())]
        on_amqp = self._publisher is not None
        self._declare(connection.connection if on_amqp else connection, queues)
        try:
            yield
        finally:
            if self._publisher is not None:
                self._publisher.leave(self)

    def accept(self, consumer: Any, message: Any, raw: Any) -> bool:
        """See a message before its handler does; return False if it is not due and is held instead."""
        if not self._by_tag:
            self._note_queues()
        message.retrier, message.consumer = self, consumer
        message_copy.keep_wire_form(message, raw)
        headers = message.headers
        if not {message_copy.EXCHANGE, message_copy.ROUTING_KEY} <= headers.keys():
            return True
        message_copy.restore_origin(message)
        due = headers.get(message_copy.NOT_BEFORE)
        if isinstance(due, (int, float)) and is_settleable(message):
            remaining = due - time()
            if 0 < remaining <= self._longest:
                self._requeues.add(message, remaining)
                return False
        return True

    def apply(self, policy: RetryPlan, message: Any, error: BaseException) -> str:
        """Publish a copy of `message` as `policy` says, and ack it; return in words what was done."""
        if not is_live(message):
            return "left to the broker, which has it back"
        queue = self._queue_of(message)
        copy = message_copy.copy_of(message)
        message_copy.note_origin(copy, message, queue.name)
        copy.forget_passage(queue.name)
        copy.put_expiration_aside()
        retries = message_copy.retries_of(copy.headers)
        delay = policy.delay_after(retries, error)
        if delay is None:
            target = policy.dead_letter_of(queue.name)
            copy.headers.pop(message_copy.NOT_BEFORE, None)
            copy.headers[message_copy.RETRIES] = retries
            message_copy.note_failure(copy, error)
            outcome = f"put into {target} after {retries} retries"
        else:
            target = self._delay(copy, queue, retries, delay)
            outcome = f"retry {retries + 1} of {policy.max_retries} in {delay:g} s"
        self._publish(message, copy, target, queue)
        message.ack()
        self._life.tally.count_copy(retry=delay is not None)
        return outcome

    # -- where a copy goes ------------------------------------------------------------------------

    def _delay(self, copy: Copy, queue: Queue, retries: int, delay: float) -> str:
        copy.headers[message_copy.RETRIES] = retries + 1
        if self._publisher is not None and lasts(queue):
            return delay_queue(queue.name, delay)
        copy.headers[message_copy.NOT_BEFORE] = time() + delay
        return str(queue.name)

    def _publish(self, message: Any, copy: Copy, target: str, queue: Queue) -> None:
        if self._publisher is None:
            copy.put_aside(None)
            channel = message.channel
            channel.basic_publish(copy.to_virtual(channel), exchange="", routing_key=target)
            return
        session: Session = message.channel.connection
        copy.shorten_to(session.link.frame_max or 131072)
        if not self._publish_confirmed(message, copy, target):
            # Somebody deleted it, or the consumer took on the queue after its start.
            self._declare(session, [queue], anew=True)
            if not self._publish_confirmed(message, copy, target):
                raise GreenconsumeError(f"there is no queue {target!r}")

    def _publish_confirmed(self, message: Any, copy: Copy, target: str) -> bool:
        assert self._publisher is not None
        return self._publisher.publish(
            self, copy, target, self._life.stop, PATIENCE, is_wanted=lambda: is_live(message)
        )

    def _queue_of(self, message: Any) -> Queue:
        """Return the queue that a message was consumed from; its routing key need not say."""
        tag = message.delivery_info.get("consumer_tag")
        if tag not in self._by_tag:
            self._note_queues()
        if tag in self._by_tag:
            return self._by_tag[tag]
        queues = list(self._by_tag.values())
        if len(queues) > 1:  # kombu's virtual transports do not tell; but they can look it up
            info = message.delivery_info
            names = message.channel._lookup(info.get("exchange"), info.get("routing_key"))
            own = {queue.name for queue in getattr(message.consumer, "queues", ())}
            queues = [queue for queue in queues if queue.name in (own.intersection(names) or names)]
        if not queues:
            raise GreenconsumeError("the queue that the message came from is not known")
        return queues[0]

    def _note_queues(self) -> None:
        for consumer in self._consumers:
            for name, tag in getattr(consumer, "_active_tags", {}).items():
                self._by_tag[tag] = consumer._queues.get(name) or Queue(name)

    def _declare(
        self, source: Session | Connection, queues: list[Queue], anew: bool = False
    ) -> None:
        wanted: dict[str, dict[str, Any] | None] = {}
        for policy in self._policies:
            for queue in queues:
                wanted[policy.dead_letter_of(queue.name)] = None
                if self._publisher is not None and lasts(queue):
                    wanted |= delay_queues(queue, policy.delays[: policy.max_retries])
        declare_queues(source, wanted, anew)
