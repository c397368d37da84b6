"""Owns how much of their prefetch the consumers of a runtime take while its hub lags behind.

A process that computes too much is sent less, step by step, so that it keeps its heartbeats and other
processes get the messages. A broker sends what it sends by the prefetch that a consumer began with: to change
it, a consumer is cancelled, which gives back what no handler has begun, and begun anew at once. `runtime`
tells how late the hub is, `boundary` asks before each message. It must never start a greenlet.
"""

from __future__ import annotations

from collections.abc import Callable

from kombu import Consumer

from greenconsume.events import IntakeChanged
from greenconsume.failures.streams import is_stream

#: What a consumer without a prefetch is taken to have.
_UNBOUNDED = 1000
#: A prefetch is halved so often at most: then none is above 1.
_MAX_HALVINGS = 16
#: Measures between two steps down, and measures in a row that are well within the limit before a step up.
_MEASURES_DOWN, _MEASURES_UP = 4, 16


class Intake:
    """The share of their prefetch that all consumers of a runtime take.

    Args:
        max_hub_lag: Seconds that the hub may be late before they take less.

    Attributes:
        halvings: How often their prefetch is halved now.
    """

    __slots__ = ("_calm", "_since", "halvings", "max_hub_lag")

    def __init__(self, max_hub_lag: float) -> None:
        self.max_hub_lag = max_hub_lag
        self.halvings = 0
        self._since = _MEASURES_DOWN  # measures since the last step
        self._calm = 0  # measures in a row at less than half of the limit

    @property
    def share(self) -> float:
        """The part of its prefetch that a consumer takes, such as 0.25."""
        return 1.0 / (1 << self.halvings)

    def note(self, lag: float) -> IntakeChanged | None:
        """Take note how many seconds late the hub was; return what is to be told, if that changes the share.

        Switches: never.
        """
        self._since += 1
        self._calm = self._calm + 1 if lag < self.max_hub_lag / 2 else 0
        if lag > self.max_hub_lag and self.halvings < _MAX_HALVINGS:
            if self._since < _MEASURES_DOWN:
                return None
            self.halvings += 1
        elif self._calm >= _MEASURES_UP and self.halvings:
            self.halvings -= 1
            self._calm = 0
        else:
            return None
        self._since = 0
        return IntakeChanged(self.share, lag)

    def prefetch(self, full: int | None) -> int:
        """Return the prefetch of a consumer whose own is `full`; 0: no bound."""
        if not self.halvings:
            return full or 0
        return max(1, (full or _UNBOUNDED) >> self.halvings)


def can_be_fitted(consumer: object) -> bool:
    """Return whether a consumer can be cancelled and begun anew without a loss.

    A stream would begin at its first offset again, an `auto_delete` queue would be gone, and the place at an
    exclusive one be taken by another.
    """
    return isinstance(consumer, Consumer) and not (
        consumer.no_ack
        or any(
            is_stream(queue) or queue.exclusive or queue.auto_delete for queue in consumer.queues
        )
    )


class Fitted:
    """One consumer's prefetch, which follows the intake.

    Args:
        consumer: It has not begun to consume.
        full: Its prefetch while all is taken; None or 0: no bound.
        intake: What it follows.
    """

    __slots__ = ("_consumer", "_full", "_halvings", "_intake", "_prefetch")

    def __init__(self, consumer: Consumer, full: int | None, intake: Intake) -> None:
        self._consumer, self._full, self._intake = consumer, full, intake
        self._halvings = intake.halvings
        self._prefetch = intake.prefetch(full)
        if self._halvings:
            consumer.qos(prefetch_count=self._prefetch)

    def handler(self, handle: Callable[[Consumer, object], None]) -> Callable[..., None]:
        """Return `handle`, after which the prefetch follows the intake."""

        def handle_and_fit(consumer: Consumer, message: object) -> None:
            handle(consumer, message)
            if self._halvings != self._intake.halvings:
                self._fit()

        return handle_and_fit

    def _fit(self) -> None:
        """Begin to consume anew, with another prefetch. Switches: yes."""
        self._halvings = self._intake.halvings
        before, self._prefetch = self._prefetch, self._intake.prefetch(self._full)
        consumer = self._consumer
        if self._prefetch != before and consumer._active_tags:  # else it has cancelled itself
            consumer.cancel()
            consumer.qos(prefetch_count=self._prefetch)
            consumer.consume()
