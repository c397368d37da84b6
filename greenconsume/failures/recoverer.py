"""Owns what the failure policies of one consumer need of it: which queue a message is from, and its copies.

A copy is published to a retry queue, to a dead-letter queue, or to the message's own queue. It must never
ack a message whose copy is not confirmed. Called by the policies, and where handlers run for each message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import time
from typing import Any, Protocol

from kombu import Connection, Consumer, Message, Queue

from greenconsume.amqp.transport import Session, Transport
from greenconsume.errors import GreenconsumeError, InvalidConsumerError
from greenconsume.failures import delivery_limits, message_copy
from greenconsume.failures.copy_publisher import CopyPublisher, ensure_copy_publisher
from greenconsume.failures.message_copy import Copy
from greenconsume.failures.queue_names import DEAD_LETTER, dead_letter_queue
from greenconsume.failures.renewals import Renewals, Source
from greenconsume.failures.requeues import DelayedRequeues, is_live, is_settleable
from greenconsume.failures.retry_queues import (
    declare_queues,
    delay_queue,
    delay_queues,
    is_quorum,
    lasts,
)
from greenconsume.failures.streams import is_stream
from greenconsume.lifecycle import Lifecycle
from greenconsume.links.pool import LinkPool
from greenconsume.virtual import publish_as_is

#: The part of the settle deadline that a copy is waited for: then the broker has the message back.
_PATIENCE = 0.8
#: Seconds that a copy is waited for where there is no settle deadline.
_LONGEST_PATIENCE = 86400.0
#: Seconds that what is being renewed may take when its consumer has ended.
_LAST_SECONDS = 5.0
#: Queues with their arguments; None for a queue that may have any.
Wanted = Mapping[str, dict[str, Any] | None]


class RetryPlan(Protocol):
    """A plan of when a message is tried again, how often, and where it ends; `Retry` is one."""

    @property
    def max_retries(self) -> int | None:
        """The number of times that a message is tried again."""

    @property
    def delays(self) -> Sequence[float]:
        """The seconds before each retry."""

    @property
    def dead_letter(self) -> str:
        """The name of the dead-letter queue, with `{queue}` for the queue's own."""

    def delay_after(self, retries: int, error: BaseException) -> float | None:
        """Return the seconds before the next retry, or None if there is none."""


class Recoverer:
    """The queues of one consumer and its way out, for its failure policies.

    Args:
        plans: Its `Retry` policies.
        life: The consumer's lifecycle.
        links: Returns the links that copies are published over.
        requeues: Where a message waits that is not due.
        settle_deadline: Seconds after which the broker has a message back; None: never.
    """

    __slots__ = (
        "_connection",
        "_consumers",
        "_dead_letter",
        "_life",
        "_links",
        "_longest",
        "_patience",
        "_plans",
        "_publisher",
        "_requeues",
        "_sees_first",
        "_sources",
    )

    def __init__(
        self,
        plans: Sequence[RetryPlan],
        life: Lifecycle,
        links: Callable[[], LinkPool],
        requeues: DelayedRequeues,
        settle_deadline: float | None,
    ) -> None:
        self._plans = plans
        self._sees_first = bool(plans)  # else nothing is made of a first failure
        self._life, self._links = life, links
        self._requeues = requeues
        self._patience = settle_deadline * _PATIENCE if settle_deadline else _LONGEST_PATIENCE
        self._dead_letter = next((plan.dead_letter for plan in plans), DEAD_LETTER)
        self._longest = max((delay for plan in plans for delay in plan.delays), default=0.0)
        self._consumers: list[Any] = []
        self._sources: dict[str, Source] = {}  # by consumer tag
        self._connection: Connection | None = None  # over AMQP, while it consumes
        self._publisher: CopyPublisher | None = None  # once something was published

    # -- what the consumer calls ------------------------------------------------------------------

    def prepared(self, connection: Connection, consumers: list[Any]) -> Prepared:
        """Return a block to consume in: within it there are the queues that `consumers` need.

        Raises:
            InvalidConsumerError: The broker does not let them be declared, or has others of that name.

        Switches: yes, as it is entered, to declare them.
        """
        return Prepared(self, connection, consumers)

    def begin(self, connection: Connection, consumers: list[Any]) -> Renewals | None:
        """Declare what is needed, and serve these consumers; return what renews their messages."""
        self._consumers = consumers
        self._sources.clear()
        self._publisher = self._connection = None
        source, renewals = connection, None
        if isinstance(connection.transport, Transport):
            self._connection, source = connection, connection.connection
            renewals = Renewals(self._life.name, source, self)
            source.inbox.have_screened(renewals.screen)
            self._sees_first |= delivery_limits.any_low(consumers, source.link.server_properties)
        if self._plans:
            queues = [queue for consumer in consumers for queue in getattr(consumer, "queues", ())]
            _refuse_streams(queues)
            declare_queues(source, self._queues_for(queues, source))
        return renewals

    def end(self, renewals: Renewals | None) -> None:
        """Serve no longer. Switches: yes, while messages are being renewed."""
        if renewals is not None:
            renewals.join(_LAST_SECONDS)
        self._connection = None
        if self._publisher is not None:
            self._publisher.leave(self)

    def accept(self, consumer: Consumer, message: Message, raw: object) -> bool:
        """See a message before its handler does; return False if it is not due and is held instead."""
        redelivered = raw[2] if type(raw) is tuple else message.delivery_info.get("redelivered")
        if self._sees_first or redelivered:
            self.take_on(consumer, message)
            message_copy.keep_wire_form(message, raw)
        headers = message.headers
        if not headers:
            return True
        if message_copy.EXCHANGE not in headers or message_copy.ROUTING_KEY not in headers:
            return True
        message_copy.restore_origin(message)
        due = headers.get(message_copy.NOT_BEFORE)
        if isinstance(due, (int, float)) and is_settleable(message):
            remaining = due - time()
            if 0 < remaining <= self._longest:
                self._requeues.add(message, remaining, failed=False)
                return False
        return True

    def take_on(self, consumer: Consumer, message: Message) -> None:
        """Let the policies of a message find this: it may need more than to be put back. Never switches."""
        message.recoverer, message.consumer = self, consumer

    # -- what the policies call -------------------------------------------------------------------

    def retry(self, plan: RetryPlan, message: Message, error: BaseException) -> str:
        """Publish a copy of `message` as `plan` says, and ack it; return in words what was done."""
        if not is_live(message):
            return "left to the broker, which has it back"
        queue = self._queue_of(message)
        copy = self._copy_of(message, queue)
        retries = message_copy.retries_of(copy.headers)
        delay = plan.delay_after(retries, error)
        if delay is None or is_stream(queue):  # to which nothing goes back
            target = dead_letter_queue(plan.dead_letter, queue.name)
            copy.headers[message_copy.RETRIES] = retries
            self._bury(message, copy, target, error)
            return f"put into {target} after {retries} retries"
        if hasattr(message.channel, "delay"):
            if not self._delay_there(message, copy, retries, delay):
                return "left to the broker, which has it back"
        else:
            target = self._delay(copy, queue, retries, delay)
            self._publish(message, copy, target, lambda source: self._queues_for([queue], source))
            message.ack()
        self._life.tally.count_copy(retry=True)
        return f"retry {retries + 1} of {plan.max_retries} in {delay:g} s"

    def park(
        self, message: Message, error: BaseException, max_deliveries: int | None, dead_letter: str
    ) -> str | None:
        """Put a failed message into a dead-letter queue, if its queue would soon drop it; ack it then.

        Args:
            message: The message, which has failed.
            error: Why.
            max_deliveries: How often it may be delivered; None: as often as its queue lets it.
            dead_letter: The name of the dead-letter queue, with `{queue}` for the queue's own.

        Returns:
            What was done, in words; None if the message is to be put back.
        """
        source = self.source_of(message.delivery_info.get("consumer_tag"))
        count = delivery_limits.count_of(message.headers, source and source.queue)
        if count is None or not is_live(message):
            return None
        queue = self._queue_of(message)
        limit = self._limit_of(queue, message)
        if max_deliveries is None:
            max_deliveries = None if limit is None else delivery_limits.last_count(limit)
        if max_deliveries is None or count + 1 < max_deliveries:
            return None
        target = dead_letter_queue(dead_letter, queue.name)
        self._bury(message, self._copy_of(message, queue), target, error)
        why = "" if limit is None else f", before its queue drops it (delivery limit {limit})"
        return f"put into {target} after {count + 1} deliveries{why}"

    def set_aside(self, message: Message, error: BaseException, dead_letter: str) -> str | None:
        """Put a message that must not come again into its queue's dead letters; ack it then.

        Args:
            message: The message, which has failed.
            error: Why.
            dead_letter: The name of the dead-letter queue, where the queue's arguments have no exchange for
                them.

        Returns:
            What was done, in words; None if the message is to be put back.
        """
        if not is_live(message):
            return None
        queue = self._queue_of(message)
        if "x-dead-letter-exchange" in (queue.queue_arguments or {}) and not is_stream(queue):
            message.reject()
            return "rejected, to the dead letters of its queue"
        if "compression" in message.headers and not hasattr(message, "wire_form"):
            return None  # kombu has changed its body: when it comes again, it is kept as it came
        target = dead_letter_queue(dead_letter, queue.name)
        self._bury(message, self._copy_of(message, queue), target, error)
        return f"put into {target}"

    def is_of_stream(self, message: Message) -> bool:
        """Return whether a message was consumed from a stream, which takes none back."""
        source = self.source_of(message.delivery_info.get("consumer_tag"))
        return source is not None and is_stream(source.queue)

    # -- what renewals call -----------------------------------------------------------------------

    def source_of(self, consumer_tag: str) -> Source | None:
        """Return where what is delivered to a consumer comes from; None if that is not known."""
        if consumer_tag not in self._sources:
            self._note_sources()
        return self._sources.get(consumer_tag)

    def renew(self, message: Message, queue: Queue, count: int) -> None:
        """Write a message to its queue again, confirmed, with our own count, and ack it. Switches: yes."""
        copy = message_copy.copy_of(message)
        message_copy.note_origin(copy, message, queue.name)
        copy.forget_passage(queue.name)
        copy.headers[message_copy.RENEWALS] = count
        self._publish(message, copy, queue.name, lambda _source: {})
        message.ack()

    def bury(self, message: Message, queue: Queue, error: BaseException) -> str:
        """Write a message to the dead-letter queue, confirmed, and return its name. Switches: yes."""
        target = dead_letter_queue(self._dead_letter, queue.name)
        self._bury(message, self._copy_of(message, queue), target, error)
        return target

    # -- where a copy goes ------------------------------------------------------------------------

    def _copy_of(self, message: Message, queue: Queue) -> Copy:
        copy = message_copy.copy_of(message)
        message_copy.note_origin(copy, message, queue.name)
        copy.forget_passage(queue.name)
        copy.put_expiration_aside()
        return copy

    def _bury(self, message: Message, copy: Copy, target: str, error: BaseException) -> None:
        copy.headers.pop(message_copy.NOT_BEFORE, None)
        message_copy.note_failure(copy, error)
        self._publish(message, copy, target, lambda _source: {target: None})
        message.ack()
        self._life.tally.count_copy(retry=False)

    def _limit_of(self, queue: Queue, message: Message) -> int | None:
        if self._connection is None:  # a transport of kombu's kind, which may count by itself
            limit: int | None = getattr(message.channel, "delivery_limit", None)
            return limit
        session: Session = message.channel.connection
        return delivery_limits.limit_of(queue, session.link.server_properties)

    def _delay_there(self, message: Message, copy: Copy, retries: int, delay: float) -> bool:
        """Have the copy take the message's place later, where the transport can do both at once."""
        copy.headers[message_copy.RETRIES] = retries + 1
        copy.put_aside(None)
        moved: bool = message.channel.delay(message, copy.to_virtual(message.channel), delay)
        return moved

    def _delay(self, copy: Copy, queue: Queue, retries: int, delay: float) -> str:
        copy.headers[message_copy.RETRIES] = retries + 1
        if self._connection is not None and lasts(queue):
            return delay_queue(queue.name, delay)
        copy.headers[message_copy.NOT_BEFORE] = time() + delay
        return str(queue.name)

    def _publish(
        self,
        message: Message,
        copy: Copy,
        target: str,
        wanted: Callable[[Session], Wanted],
    ) -> None:
        """Publish a copy; where its queue is not there, `wanted` says what is to be declared first."""
        if self._connection is None:
            copy.put_aside(None)
            channel = message.channel
            publish_as_is(channel, copy.to_virtual(channel), exchange="", routing_key=target)
            return
        session: Session = message.channel.connection
        copy.shorten_to(session.link.frame_max or 131072)
        if not self._publish_confirmed(message, copy, target):
            # It was never needed before, or somebody deleted it.
            declare_queues(session, wanted(session), anew=True)
            if not self._publish_confirmed(message, copy, target):
                raise GreenconsumeError(f"there is no queue {target!r}")

    def _publish_confirmed(self, message: Message, copy: Copy, target: str) -> bool:
        if self._publisher is None:
            self._publisher = ensure_copy_publisher(self._links(), self._connection)
        return self._publisher.publish(
            self, copy, target, self._life.stop, self._patience, is_wanted=lambda: is_live(message)
        )

    def _queue_of(self, message: Message) -> Queue:
        """Return the queue that a message was consumed from; its routing key need not say."""
        source = self.source_of(message.delivery_info.get("consumer_tag"))
        if source is not None:
            return source.queue
        queues = [source.queue for source in self._sources.values()]
        if len(queues) > 1:  # kombu's virtual transports do not tell; but they can look it up
            info = message.delivery_info
            names = message.channel._lookup(info.get("exchange"), info.get("routing_key"))
            own = {queue.name for queue in getattr(message.consumer, "queues", ())}
            queues = [queue for queue in queues if queue.name in (own.intersection(names) or names)]
        if not queues:
            raise GreenconsumeError("the queue that the message came from is not known")
        return queues[0]

    def _note_sources(self) -> None:
        for consumer in self._consumers:
            for name, tag in getattr(consumer, "_active_tags", {}).items():
                queue = consumer._queues.get(name) or Queue(name)
                self._sources[tag] = Source(consumer, queue)

    def _queues_for(self, queues: Sequence[Queue], source: Session | Connection) -> Wanted:
        """Return the queues that retries of messages from `queues` need."""
        wanted: dict[str, dict[str, Any] | None] = {}
        for plan in self._plans:
            for queue in queues:
                wanted[dead_letter_queue(plan.dead_letter, queue.name)] = None
                if isinstance(source, Session) and lasts(queue):
                    delays = plan.delays[: plan.max_retries]
                    wanted |= delay_queues(queue, delays, is_quorum(queue, source))
        return wanted


class Prepared:
    """A block within which a recoverer serves; a class, for thousands of consumers are in theirs."""

    __slots__ = ("_connection", "_consumers", "_recoverer", "_renewals")

    def __init__(self, recoverer: Recoverer, connection: Connection, consumers: list[Any]) -> None:
        self._recoverer, self._connection, self._consumers = recoverer, connection, consumers
        self._renewals: Renewals | None = None

    def __enter__(self) -> None:
        if isinstance(self._connection, Connection):  # else a test's mock
            self._renewals = self._recoverer.begin(self._connection, self._consumers)

    def __exit__(self, *_error: object) -> None:
        if isinstance(self._connection, Connection):
            self._recoverer.end(self._renewals)


def _refuse_streams(queues: Sequence[Queue]) -> None:
    """Refuse to retry what comes from a stream: RabbitMQ drops what is dead-lettered into one."""
    streams = [queue.name for queue in queues if is_stream(queue)]
    if streams:
        raise InvalidConsumerError(
            f"{streams[0]!r} is a stream, to which a message cannot go back: Retry would lose it. Use "
            "Requeue(), which keeps what fails in a dead-letter queue, and retry in the handler"
        )
