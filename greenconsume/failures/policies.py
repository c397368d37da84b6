"""Owns what becomes of a message whose handler failed: `Requeue`, `Reject`, and one policy for each error.

A policy settles the message, and says in words what it did. Called where handlers run, in `handling`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from kombu import Message

from greenconsume.checks import is_count, is_seconds
from greenconsume.errors import HandlerHung, PoisonMessageError
from greenconsume.failures.queue_names import DEAD_LETTER, check_dead_letter
from greenconsume.failures.recoverer import Recoverer
from greenconsume.failures.requeues import DelayedRequeues


class FailurePolicy(Protocol):
    """A rule for what becomes of a message whose handler failed.

    Called in the handler's greenlet after it has ended; no timeout or shutdown interrupts it any more.
    """

    def apply(self, message: Message, error: BaseException, requeues: DelayedRequeues) -> str:
        """Settle `message`, which is not settled yet, and return in words what was done.

        Args:
            message: The `kombu.Message`.
            error: What the handler raised; `HandlerTimeout` where it took too long.
            requeues: Where a message waits that goes back after a delay.

        Raises:
            Exception: It could not; the message is then requeued after a second.

        Switches: may; no longer than the drain allows.
        """


#: After so many times a message that closes its consumer's connection is not put back any more.
MAX_CLOSES = 3

#: What users may give: a policy, or a mapping from exception classes to policies.
OnError = FailurePolicy | Mapping[type[BaseException], FailurePolicy]


@dataclass(frozen=True, slots=True)
class Requeue:
    """Put the message back into its queue after `delay` seconds; the default: nothing is lost.

    The delay keeps a poison message from spinning. The message stays unsettled meanwhile, and so counts
    towards the prefetch.

    A quorum queue counts each return, and drops a message above its delivery limit (20 from RabbitMQ 4 on,
    where it says none). Before that the message is put into a dead-letter queue, confirmed and with its
    error, and said in the log; `greenconsume dead-letters` brings it back. Where the queue's arguments have
    a dead-letter exchange its broker's way is left to work. A lower limit that a policy of the broker sets,
    or that others declared the queue with, cannot be seen from here: say `max_deliveries` then. What hung a
    whole process (`HandlerHung`) is put there at once, for it would hang the next one; and what comes from a
    stream, which takes nothing back. What had the broker close its consumer's connection
    (`PoisonMessageError`) is put there when it has done so `max_deliveries` times, or three times, on any
    queue.

    Args:
        delay: Seconds; 0 requeues at once.
        max_deliveries: How often a message of a queue that counts is handled; None: as often as the queue's
            limit allows. Of other queues nothing is known: use `Retry`.
        dead_letter: The name of the dead-letter queue, declared when it is first needed; `{queue}` stands
            for the queue's own.

    Raises:
        ValueError: A number is out of its range, or the name is that of the queue itself.
    """

    delay: float = 1.0
    max_deliveries: int | None = None
    dead_letter: str = DEAD_LETTER

    def __post_init__(self) -> None:
        if not is_seconds(self.delay):
            raise ValueError(f"Requeue(delay) must be 0 seconds or more, not {self.delay!r}")
        count = self.max_deliveries
        if count is not None and not is_count(count, 2):
            raise ValueError(f"Requeue(max_deliveries) must be 2 or more, or None, not {count!r}")
        check_dead_letter(self.dead_letter, "Requeue")

    def apply(self, message: Message, error: BaseException, requeues: DelayedRequeues) -> str:
        """See `FailurePolicy.apply`. Switches: where it is put into a dead-letter queue."""
        recoverer = getattr(message, "recoverer", None)
        if isinstance(recoverer, Recoverer):
            if self._is_last(error) or recoverer.is_of_stream(message):
                parked = recoverer.set_aside(message, error, self.dead_letter)
            else:
                parked = recoverer.park(message, error, self.max_deliveries, self.dead_letter)
            if parked is not None:
                return parked
        if self.delay:
            requeues.add(message, self.delay)
            return f"requeued in {self.delay:g} s"
        message.requeue()
        return "requeued"

    def _is_last(self, error: BaseException) -> bool:
        """Return whether a message that failed with this must not be handled again."""
        if isinstance(error, PoisonMessageError):
            return error.count >= (self.max_deliveries or MAX_CLOSES)
        return isinstance(error, HandlerHung)


@dataclass(frozen=True, slots=True)
class Reject:
    """Reject the message: to its queue's dead-letter exchange, or dropped where the queue has none.

    It is AMQP's `basic.reject` without `requeue`, which RabbitMQ counts as a failed delivery.
    """

    def apply(self, message: Message, error: BaseException, requeues: DelayedRequeues) -> str:
        """See `FailurePolicy.apply`. Switches: over a polled transport alone."""
        message.reject()
        return "rejected"


@dataclass(frozen=True, slots=True)
class ByError:
    """One policy for each class of errors, and one for the rest; what a mapping in `on_error` becomes.

    Args:
        policies: Of the classes of an error the most specific one counts, as for `except`.
        default: For errors of no class in `policies`.
    """

    policies: Mapping[type[BaseException], FailurePolicy]
    default: FailurePolicy

    def apply(self, message: Message, error: BaseException, requeues: DelayedRequeues) -> str:
        """See `FailurePolicy.apply`. Switches: as the policy that the error meets."""
        return self.policy_for(error).apply(message, error, requeues)

    def policy_for(self, error: BaseException) -> FailurePolicy:
        """Return the policy that `error` meets."""
        for kind in type(error).__mro__:
            if kind in self.policies:
                return self.policies[kind]
        return self.default


def each_policy(policy: FailurePolicy) -> Iterator[FailurePolicy]:
    """Yield `policy`, or what it is made of."""
    if isinstance(policy, ByError):
        for part in (*policy.policies.values(), policy.default):
            yield from each_policy(part)
    else:
        yield policy
