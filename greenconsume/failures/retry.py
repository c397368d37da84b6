"""Owns `Retry`: a failed message is tried again after a delay, a few times, and then set aside.

On RabbitMQ the delay passes in the broker. A consumer of `orders` declares at its start::

    orders.retry.1000 ──┐ a durable queue for each delay, whose messages expire after so many milliseconds
    orders.retry.5000 ──┤ and are then dead-lettered to
    orders         <────┘
    orders.dead           where what has failed too often is kept

The copy is confirmed before the original is acked, so a message is at times there twice, and never lost.
Transports that cannot delay get the copy, counted, back into the queue at once; it says when it is due, and
the consumer holds it, unsettled, until then. `recoverer` publishes the copies. Called where handlers run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kombu import Message

from greenconsume.checks import is_count, is_number, is_seconds
from greenconsume.errors import GreenconsumeError
from greenconsume.failures.policies import FailurePolicy, each_policy
from greenconsume.failures.queue_names import DEAD_LETTER, check_dead_letter
from greenconsume.failures.recoverer import Recoverer
from greenconsume.failures.requeues import DelayedRequeues
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
    dead_letter: str = field(default=DEAD_LETTER, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.delays, Sequence):
            raise ValueError(f"Retry(delays) must be a list of seconds, not {self.delays!r}")
        count = (len(self.delays) or 5) if self.max_retries is None else self.max_retries
        if not is_count(count, 0):
            raise ValueError(f"Retry(max_retries) must be a whole number, 0 or more, not {count!r}")
        waits = (self.initial, self.max_delay)
        if not (all(map(is_seconds, waits)) and is_number(self.factor, 1)):
            raise ValueError(
                "Retry wants initial and max_delay of 0 seconds or more and a factor of 1 or more, "
                f"not {self.initial!r}, {self.max_delay!r} and {self.factor!r}"
            )
        for name in ("retry_on", "give_up_on"):
            _require_exceptions(name, getattr(self, name))
        check_dead_letter(self.dead_letter, "Retry")
        object.__setattr__(self, "max_retries", count)
        object.__setattr__(self, "delays", tuple(self.delays) or self._backoff(count))
        for delay in self.delays:
            if not (is_seconds(delay) and delay <= MAX_DELAY):
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
        """Return the seconds before a message is tried again that was `retries` times; None: give it up.

        Switches: never.
        """
        assert self.max_retries is not None
        wanted = isinstance(error, self.retry_on) and not isinstance(error, self.give_up_on)
        if not wanted or retries >= self.max_retries:
            return None
        return self.delays[min(retries, len(self.delays) - 1)]

    def apply(self, message: Message, error: BaseException, requeues: DelayedRequeues) -> str:
        """See `FailurePolicy.apply`. Switches: yes, until the copy is confirmed.

        Raises:
            GreenconsumeError: The message was not consumed by a consumer that has this policy.
        """
        recoverer = getattr(message, "recoverer", None)
        if not isinstance(recoverer, Recoverer):
            raise GreenconsumeError(
                "Retry needs to be the on_error of the consumer, or a part of it"
            )
        return recoverer.retry(self, message, error)


def make_recoverer(
    policy: FailurePolicy,
    life: Lifecycle,
    links: Callable[[], LinkPool],
    requeues: DelayedRequeues,
    settle_deadline: float | None,
) -> Recoverer:
    """Return what the policies of a consumer need to publish the copies of failed messages."""
    plans = [each for each in each_policy(policy) if isinstance(each, Retry)]
    return Recoverer(plans, life, links, requeues, settle_deadline)


def _require_exceptions(name: str, value: object) -> None:
    for kind in value if isinstance(value, tuple) else (value,):
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError(
                f"Retry({name}) must be an exception class or a tuple of them, not {kind!r}"
            )
