"""Owns what it means that a broker refuses what a consumer asks for: the remedy, and when it asks again.

A refusal is told in one line, with the remedy; the same again is told at longer and longer intervals, for the
consumer asks at longer and longer intervals. It must never connect, nor end a consumer. Called by `engine`.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from time import monotonic

import amqp

from greenconsume.events import ConsumerRefused, ConsumerState, emit
from greenconsume.lifecycle import Lifecycle

#: Seconds of the first wait; each further one in a row is twice as long, up to MAX_DELAY; who stands by looks
#: more often, so that he soon takes over.
FIRST_DELAY = 1.0
MAX_DELAY = 30.0
MAX_STANDBY_DELAY = 4.0
#: A consumer that has consumed for so many seconds was not refused in a row.
CONSUMED_WELL = 10.0


#: What to do about what RabbitMQ closes a whole connection for, by its words.
_REMEDIES = {
    "unknown exchange type": "correct the exchange's type, or enable the broker's plugin for it",
    "immediate=true": "publish without immediate=True, which RabbitMQ does not have",
    "reuse consumer tag": "give each consumer of a channel a tag of its own, or none",
    "global_qos": "call qos with apply_global=False",
    "global qos": "call qos with apply_global=False",
    "stream queues": "acknowledge a stream's messages; a stream takes none back",
    "frame_too_large": "publish smaller messages",
    "transient_nonexcl_queues": "declare the queue with durable=True, or exclusive=True",
}


class Prospect(enum.Enum):
    """The ways in which a refusal may come to its end."""

    TAKE_OVER = "another consumer has what this one wants, and it takes over when that is gone"
    HELP = "somebody may declare, permit or delete something"
    NONE = "nothing but another program, or an operator's hand, mends it"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A broker's error, as it concerns the consumer that met it.

    Attributes:
        prospect: How it may end.
        remedy: What to do about it; may be empty.
    """

    prospect: Prospect
    remedy: str


#: What a channel's errors mean, by their class and RabbitMQ's words; the first that fits counts.
_REFUSALS = (
    (
        amqp.ResourceLocked,
        "",
        Prospect.TAKE_OVER,
        "the queue is exclusive to another connection: it stands by; leave out exclusive=True for "
        "replicas that share a queue",
    ),
    (
        amqp.AccessRefused,
        "in exclusive use",
        Prospect.TAKE_OVER,
        "another consumer has the queue for itself: it stands by",
    ),
    (
        amqp.AccessRefused,
        "reserved prefix",
        Prospect.NONE,
        "names that begin with amq. are the broker's: give it another",
    ),
    (
        amqp.AccessRefused,
        "default exchange",
        Prospect.NONE,
        "every queue is bound to the default exchange by its name: bind it to another, or leave it",
    ),
    (amqp.AccessRefused, "", Prospect.HELP, "grant the user the permission that it lacks"),
    (amqp.NotFound, "", Prospect.HELP, "declare it, or have the consumer declare it"),
    (
        amqp.PreconditionFailed,
        "inequivalent arg",
        Prospect.NONE,
        "it exists with other properties: declare it with these, or delete it once it is empty",
    ),
    (
        amqp.PreconditionFailed,
        "invalid arg",
        Prospect.NONE,
        "correct the argument, or enable at the broker what it asks for",
    ),
    (
        amqp.PreconditionFailed,
        "exchange type",
        Prospect.NONE,
        "correct the exchange's type, or enable the broker's plugin for it",
    ),
    (
        amqp.PreconditionFailed,
        "prefetch count is not set",
        Prospect.HELP,
        "it is a stream, which is read with a prefetch from now on",
    ),
    (
        amqp.PreconditionFailed,
        "timed out",
        Prospect.HELP,
        "settle sooner, or raise the broker's consumer_timeout",
    ),
    (
        amqp.PreconditionFailed,
        "unknown delivery tag",
        Prospect.HELP,
        "a message was settled twice, or on another channel than its own",
    ),
)


def refusal_of(error: BaseException) -> Refusal:
    """Return what a channel's error means for its consumer."""
    text = str(error)
    for kind, words, prospect, remedy in _REFUSALS:
        if isinstance(error, kind) and words in text:
            return Refusal(prospect, remedy)
    return Refusal(Prospect.HELP, remedy_of(error))


def remedy_of(error: BaseException) -> str:
    """Return what to do about that for which the broker closed a whole connection; may be empty."""
    text = str(error)
    return next((remedy for words, remedy in _REMEDIES.items() if words in text), "")


class Refusals:
    """The refusals that one consumer met in a row."""

    __slots__ = ("_consumed_from", "_count", "_life", "_text")

    def __init__(self, life: Lifecycle) -> None:
        self._life = life
        self._count = 0
        self._text = ""
        self._consumed_from: float | None = None

    @property
    def reason(self) -> str:
        """The words of the last refusal, until the consumer consumes again."""
        return self._text if self._consumed_from is None else ""

    def consumes(self) -> None:
        """Note that the consumer consumes."""
        self._consumed_from = monotonic()

    def tell(self, error: BaseException) -> float:
        """Tell of a refusal, and enter the state that it means; return for how many seconds to wait.

        Switches: never.
        """
        was_consuming, refusal = self._note(error), refusal_of(error)
        stands_by = refusal.prospect is Prospect.TAKE_OVER
        longest = MAX_STANDBY_DELAY if stands_by else MAX_DELAY
        delay = min(longest, FIRST_DELAY * 2.0 ** min(self._count - 1, 60))
        delay *= random.uniform(0.75, 1.25)
        raised = (
            refusal.prospect is Prospect.NONE
            and not was_consuming
            and self._life.refuse(error, refusal.remedy)
        )
        repeated, self._text = str(error) == self._text, str(error)
        self._life.enter(ConsumerState.STANDBY if stands_by else ConsumerState.CONNECTING)
        emit(
            ConsumerRefused(
                self._life.name,
                error,
                refusal.remedy,
                self._count,
                delay,
                stands_by,
                raised or (stands_by and repeated),
            )
        )
        return delay

    def _note(self, error: BaseException) -> bool:
        """Count an error; return whether it came while the consumer consumed."""
        since, self._consumed_from = self._consumed_from, None
        if since is not None and monotonic() - since >= CONSUMED_WELL:
            self._count = 0
        self._count += 1
        return since is not None
