"""Owns what becomes of a message whose handler failed: `Requeue` and `Reject`, and what they share.

A policy settles the message, and says in words what it did. Called by `handlers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from greenconsume.deliveries import DelayedRequeues


class FailurePolicy(Protocol):
    """What becomes of a message whose handler failed."""

    def apply(self, message: Any, error: BaseException, requeues: DelayedRequeues) -> str:
        """Settle `message`, which is not settled yet, and return in words what was done.

        Raises:
            Exception: It could not; the message is then requeued after a second.
        """


@dataclass(frozen=True, slots=True)
class Requeue:
    """Put the message back into its queue after `delay` seconds; the default: nothing is lost.

    The delay keeps a poison message from spinning. The message stays unsettled meanwhile.

    Args:
        delay: Seconds; 0 requeues at once.

    Raises:
        ValueError: `delay` is negative.
    """

    delay: float = 1.0

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ValueError(f"Requeue(delay) must not be negative, not {self.delay!r}")

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
