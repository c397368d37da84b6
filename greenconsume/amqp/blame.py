"""Owns finding out which session made the broker close a connection that others share (law 10).

The broker names the method that it refused, and not the channel: the culprit is found by what had no answer
yet. Where several sessions may have done it, all of them are suspects. It must never accuse anybody of a link
that merely broke. If a single publish was the cause, it is answered with the broker's own error; all other
users are told that the link is lost, and connect again. Does no I/O. Called by `link` as it ends.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Protocol, TypeVar

import amqp
from amqp import spec

#: More suspects than these are not given a link each: they are divided among so many, and whoever of them
#: does it again is one of few.
MAX_SUSPECTS = 20
_losses = count(1)
_NO_METHOD = (0, 0)
#: What RabbitMQ says of `immediate`, and of nothing else that is published.
_NOT_IMPLEMENTED = 540
_NO_ACCUSATIONS = (amqp.ConnectionForced, amqp.ConsumerCancelled)


class LinkLostError(amqp.RecoverableConnectionError, ConnectionError):  # type: ignore[misc]  # amqp is untyped
    """The link that was used is gone; `__cause__` says why. Its deliveries went back to the broker.

    It is an `OSError`, too, as what py-amqp raises of a dead socket: many programs catch nothing else.

    Attributes:
        is_suspect: The broker closed it, and who is told this may have done what it did so for.
        group: The suspects with whom it is kept apart; empty: it is kept apart from all.
    """

    is_suspect = False
    group = ""


class Verdict(enum.Enum):
    """The part of a session in the loss of its link."""

    INNOCENT = "it lost the link through others, or the link just broke"
    SUSPECT = "it is one of those who may have done it"
    GUILTY = "the broker closed the connection because of what it did"


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a session in the loss of its link, and the suspects with whom it is kept apart."""

    verdict: Verdict = Verdict.INNOCENT
    group: str = ""


class Suspect(Protocol):
    """A session, as it is looked at when its link was lost."""

    @property
    def has_published(self) -> bool:
        """True if anything was published over it."""

    def awaits(self, method: tuple[int, int]) -> bool:
        """Return whether a call by this method has no answer yet."""


class Unconfirmed(Protocol):
    """The messages of one channel that are not confirmed, as they are looked at when its link was lost."""

    @property
    def holds_immediate(self) -> bool:
        """True if any of it was published with `immediate`."""

    def fail(self, error: Callable[[], BaseException]) -> bool:
        """Have all of it fail."""

    def __len__(self) -> int: ...


_S = TypeVar("_S", bound=Suspect)


def is_accusation(error: BaseException) -> bool:
    """Return whether a broker closed a connection for what one of its users did. Never switches."""
    # A broker that is stopped, or whose operator closes the connection, accuses nobody; nor does one that
    # cancels a consumer, as its queue was deleted: the connection lives.
    if not isinstance(error, amqp.AMQPError) or isinstance(error, _NO_ACCUSATIONS):
        return False
    # What is raised here, and not by the broker, names no method.
    return getattr(error, "method_sig", None) is not None


def verdicts(error: BaseException, sessions: Iterable[_S]) -> dict[_S, Part]:
    """Return the part of each session that is not innocent of the loss of a link. Never switches."""
    if not is_accusation(error):
        return {}
    method = getattr(error, "method_sig", _NO_METHOD)
    possible = _possible(method, list(sessions))
    if len(possible) == 1:
        return {possible[0]: Part(Verdict.GUILTY)}
    if len(possible) <= MAX_SUSPECTS:
        return dict.fromkeys(possible, Part(Verdict.SUSPECT))
    loss = next(_losses)
    groups = [Part(Verdict.SUSPECT, f"suspects {loss}.{each}") for each in range(MAX_SUSPECTS)]
    return {session: groups[place % MAX_SUSPECTS] for place, session in enumerate(possible)}


def tell_culprit(error: BaseException, channels: Mapping[int, object]) -> None:
    """Answer the publish that the broker closed the link for with the broker's error. Never switches.

    Only where it is the only one whose confirm is awaited on the link: of several nothing can be told.
    """
    if getattr(error, "method_sig", None) != spec.Basic.Publish:
        return
    found = (getattr(channel, "unconfirmed", None) for channel in channels.values())
    waiting: list[Unconfirmed] = [each for each in found if each is not None and len(each)]
    if len(waiting) != 1 or len(waiting[0]) != 1:
        return
    if getattr(error, "reply_code", None) == _NOT_IMPLEMENTED and not waiting[0].holds_immediate:
        return  # somebody else's, who awaits no confirm
    waiting[0].fail(lambda: error)


def _possible(method: tuple[int, int], sessions: list[_S]) -> list[_S]:
    if method == spec.Basic.Publish:
        return [each for each in sessions if each.has_published] or sessions
    calling = [] if method == _NO_METHOD else [each for each in sessions if each.awaits(method)]
    return calling or sessions
