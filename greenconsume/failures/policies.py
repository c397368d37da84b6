"""Owns what becomes of a message whose handler failed: `Requeue`, `Reject`, and one policy for each error.

A policy settles the message, and says in words what it did. Called by `handlers`; `settings` checks
what a user gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from greenconsume.failures.requeues import DelayedRequeues


class FailurePolicy(Protocol):
    """What becomes of a message whose handler failed.

    Called in the handler's greenlet after it has ended; no timeout or shutdown interrupts it any more.
    """

    def apply(self, message: Any, error: BaseException, requeues: DelayedRequeues) -> str:
        """Settle `message`, which is not settled yet, and return in words what was done.

        Args:
            message: The `kombu.Message`.
            error: What the handler raised; `HandlerTimeout` where it took too long.
            requeues: Where a message waits that goes back after a delay.

        Raises:
            Exception: It could not; the message is then requeued after a second.
        """


#: What users may give: a policy, or a mapping from exception classes to policies.
OnError = FailurePolicy | Mapping[type[BaseException], FailurePolicy]


@dataclass(frozen=True, slots=True)
class Requeue:
    """Put the message back into its queue after `delay` seconds; the default: nothing is lost.

    The delay keeps a poison message from spinning. The message stays unsettled meanwhile, and so counts
    towards the prefetch. A quorum queue counts each return, and drops or dead-letters a message at its
    delivery limit, if it has one.

    Args:
        delay: Seconds; 0 requeues at once.

    Raises:
        ValueError: `delay` is negative.
    """

    delay: float = 1.0

    def __post_init__(self) -> None:
        if not self.delay >= 0:
            raise ValueError(f"Requeue(delay) must be 0 seconds or more, not {self.delay!r}")

    def apply(self, message: Any, error: BaseException, requeues: DelayedRequeues) -> str:
        """See `FailurePolicy.apply`."""
        if self.delay:
            requeues.add(message, self.delay)
            return f"requeued in {self.delay:g} s"
        message.requeue()
        return "requeued"


@dataclass(frozen=True, slots=True)
class Reject:
    """Reject the message: to its queue's dead-letter exchange, or dropped where the queue has none."""

    def apply(self, message: Any, error: BaseException, requeues: DelayedRequeues) -> str:
        """See `FailurePolicy.apply`."""
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

    def apply(self, message: Any, error: BaseException, requeues: DelayedRequeues) -> str:
        """See `FailurePolicy.apply`."""
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
