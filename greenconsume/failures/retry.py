"""Owns `Retry`: a failed message is tried again after a delay, a few times, and then set aside.

On RabbitMQ the delay passes in the broker. A consumer of `orders` declares at its start::

    orders.retry.1000 ──┐ a durable queue for each delay, whose messages expire after so many milliseconds
    orders.retry.5000 ──┤ and are then dead-lettered to
    orders         <────┘
    orders.dead           where what has failed too often is kept

The copy is confirmed before the original is acked, so a message is at times there twice, and never lost.
Transports that cannot delay get the copy, counted, back into the queue at once; it says when it is due, and
the consumer holds it, unsettled, until then. Called by `handlers` and `mixins`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import time
from typing import Any

from kombu import Connection, Queue

from greenconsume.amqp.transport import Transport
from greenconsume.errors import GreenconsumeError
from greenconsume.failures import message_copy
from greenconsume.failures.message_copy import Copy
from greenconsume.failures.policies import FailurePolicy, each_policy
from greenconsume.failures.republisher import Republisher, republisher_of
from greenconsume.failures.requeues import DelayedRequeues, is_live, is_settleable
from greenconsume.failures.retry_queues import declare_queues, delay_queue, delay_queues, lasts
from greenconsume.lifecycle import Lifecycle
from greenconsume.links.pool import LinkPool

#: The longest delay that RabbitMQ takes, in seconds: 2**32 - 1 ms, not quite 50 days.
MAX_DELAY = 4294967.0


@dataclass(frozen=True, slots=True)
class Retry:
    """Try a failed message again after a delay; after `max_retries`, put it into a dead-letter queue.

    Messages keep their properties, headers and body, byte for byte, but become persistent. An `expiration`
    is put aside after the first failure: a message that is retried does not expire. The header
    `greenconsume-retries` counts, and handlers see the exchange and routing key that it was first published
    with. In the dead-letter queue further headers tell why, where and when: `greenconsume-error-type`,
    `-error`, `-stack`, `-host`, `-time`, `-queue`, `-exchange`, `-routing-key`.

    Args:
        max_retries: How often a message is tried again; by default once for each of `delays`, or 5 times.
        delays: Seconds before the first, second, … retry; the last one goes for all that follow.
        initial: Without `delays`: seconds before the first retry,
        factor: each further one waits so many times as long,
        max_delay: but no longer than so many seconds.
        retry_on: What is tried again; any other error goes to the dead-letter queue at once.
        give_up_on: What is not tried again, though it is of `retry_on`.
        dead_letter: The name of the dead-letter queue; `{queue}` stands for the queue's own.

    Raises:
        ValueError: A number is out of its range, or the name is that of the queue itself.
        TypeError: `retry_on` or `give_up_on` is no exception class, nor a tuple of them.
    """

    max_retries: int | None = None
    delays: Sequence[float] = ()
    initial: float = field(default=1.0, kw_only=True)
    factor: float = field(default=2.0, kw_only=True)
    max_delay: float = field(default=60.0, kw_only=True)
    retry_on: type[BaseException] | tuple[type[BaseException], ...] = field(
        default=BaseException, kw_only=True
    )
    give_up_on: type[BaseException] | tuple[type[BaseException], ...] = field(
        default=(), kw_only=True
    )
    dead_letter: str = field(default="{queue}.dead", kw_only=True)

    def __post_init__(self) -> None:
        count = (len(self.delays) or 5) if self.max_retries is None else self.max_retries
        if type(count) is not int or count < 0:
            raise ValueError(f"Retry(max_retries) must be a whole number, 0 or more, not {count!r}")
        if not (self.initial >= 0 and self.factor >= 1 and self.max_delay >= 0):
            raise ValueError(
                "Retry wants initial and max_delay of 0 seconds or more and a factor of 1 or more, "
                f"not {self.initial!r}, {self.max_delay!r} and {self.factor!r}"
            )
        for name in ("retry_on", "give_up_on"):
            _require_exceptions(name, getattr(self, name))
        if not self.dead_letter or self.dead_letter == "{queue}":
            raise ValueError(
                f"Retry(dead_letter) must name another queue, not {self.dead_letter!r}"
            )
        object.__setattr__(self, "max_retries", count)
        object.__setattr__(self, "delays", tuple(self.delays) or self._backoff(count))
        for delay in self.delays:
            if not 0 <= delay <= MAX_DELAY:
                raise ValueError(f"Retry(delays): {delay!r} is not between 0 and {MAX_DELAY:g} s")

    def _backoff(self, count: int) -> tuple[float, ...]:
        delays: list[float] = []
        delay = self.initial
        while len(delays) < count and (not delays or delays[-1] < self.max_delay):
            delays.append(min(delay, self.max_delay))
            delay *= self.factor
            if self.factor == 1:
                break
        return tuple(delays)

    def delay_after(self, retries: int, error: BaseException) -> float | None:
        """Return the seconds before a message is tried again that was `retries` times; None: give it up."""
        assert self.max_retries is not None
        wanted = isinstance(error, self.retry_on) and not isinstance(error, self.give_up_on)
        if not wanted or retries >= self.max_retries:
            return None
        return self.delays[min(retries, len(self.delays) - 1)]

    def dead_letter_of(self, queue: str) -> str:
        """Return the name of the dead-letter queue for a queue."""
        return self.dead_letter.replace("{queue}", queue)

    def apply(self, message: Any, error: BaseException, requeues: DelayedRequeues) -> str:
        """See `FailurePolicy.apply`. Switches: yes, until the copy is confirmed.

        Raises:
            GreenconsumeError: The message was not consumed by a consumer that has this policy.
        """
        retrier = getattr(message, "retrier", None)
        if not isinstance(retrier, Retrier):
            raise GreenconsumeError(
                "Retry needs to be the on_error of the consumer, or a part of it"
            )
        return retrier.apply(self, message, error)


class Retrier:
    """What the `Retry` policies of one consumer need to know of it: its queues, and its way out.

    Args:
        policies: The policies.
        life: The consumer's lifecycle.
        requeues: Where a message waits that is not due.
    """

    def __init__(
        self, policies: Sequence[Retry], life: Lifecycle, requeues: DelayedRequeues
    ) -> None:
        self._policies = policies
        self._life = life
        self._requeues = requeues
        self._longest = max(delay for policy in policies for delay in (*policy.delays, 0))
        self._consumers: list[Any] = []
        self._by_tag: dict[str, Queue] = {}
        self._republisher: Republisher | None = None  # for AMQP

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
        self._republisher = None
        if isinstance(connection.transport, Transport):
            if self._life.links is None:
                self._life.links = LinkPool()
            self._republisher = republisher_of(self._life.links, connection)
        queues = [queue for consumer in consumers for queue in getattr(consumer, "queues", ())]
        self._declare(connection, queues)
        try:
            yield
        finally:
            if self._republisher is not None:
                self._republisher.leave(self)

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

    def apply(self, policy: Retry, message: Any, error: BaseException) -> str:
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
        return outcome

    # -- where a copy goes ------------------------------------------------------------------------

    def _delay(self, copy: Copy, queue: Queue, retries: int, delay: float) -> str:
        copy.headers[message_copy.RETRIES] = retries + 1
        if self._republisher is not None and lasts(queue):
            return delay_queue(queue.name, delay)
        copy.headers[message_copy.NOT_BEFORE] = time() + delay
        return str(queue.name)

    def _publish(self, message: Any, copy: Copy, target: str, queue: Queue) -> None:
        republisher = self._republisher
        if republisher is None:
            copy.put_aside(None)
            channel = message.channel
            channel.basic_publish(copy.to_virtual(channel), exchange="", routing_key=target)
        elif not republisher.publish(self, copy, target, self._life.stop):
            # Somebody deleted it, or the consumer took on the queue after its start.
            republisher.declare(lambda connection: self._declare(connection, [queue], anew=True))
            if not republisher.publish(self, copy, target, self._life.stop):
                raise GreenconsumeError(f"there is no queue {target!r}")

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

    def _declare(self, connection: Connection, queues: list[Queue], anew: bool = False) -> None:
        wanted: dict[str, dict[str, Any] | None] = {}
        for policy in self._policies:
            for queue in queues:
                wanted[policy.dead_letter_of(queue.name)] = None
                if self._republisher is not None and lasts(queue):
                    wanted |= delay_queues(queue, policy.delays[: policy.max_retries])
        declare_queues(connection, wanted, anew)


@contextmanager
def prepared(handling: Any, connection: Any, consumers: list[Any]) -> Iterator[None]:
    """See `Retrier.prepared`; of handlers that need none, nothing."""
    if handling.retrier is None:
        yield
    else:
        with handling.retrier.prepared(connection, consumers):
            yield


def retrier_of(policy: FailurePolicy, life: Lifecycle, requeues: DelayedRequeues) -> Retrier | None:
    """Return what the `Retry` policies in a consumer's policy need; None if there are none."""
    policies = [each for each in each_policy(policy) if isinstance(each, Retry)]
    return Retrier(policies, life, requeues) if policies else None


# -- the message --------------------------------------------------------------------------------------


def _require_exceptions(name: str, value: Any) -> None:
    for kind in value if isinstance(value, tuple) else (value,):
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError(
                f"Retry({name}) must be an exception class or a tuple of them, not {kind!r}"
            )
