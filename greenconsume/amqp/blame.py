"""Owns who is told to have lost a link for all that share it, when the broker closes the connection (law 10).

A broker says by which method it was offended, and not on which channel: the culprit is found by what was
pending. Where that cannot be told, those who may have done it are suspects. It must never accuse anybody of a
link that merely broke. Does no I/O. Called by `link`; `culprit` finds the one publish.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Protocol, TypeVar

import amqp
from amqp import spec

#: More suspects than these are not given a link each.
MAX_SUSPECTS = 20
_NO_METHOD = (0, 0)
#: A broker that is stopped, or whose operator closes the connection, accuses nobody.
_NOBODYS = (amqp.ConnectionForced, amqp.RecoverableConnectionError)


class LinkLostError(amqp.RecoverableConnectionError):  # type: ignore[misc]  # amqp is untyped
    """The link that was used is gone; `__cause__` says why. Its deliveries went back to the broker.

    Attributes:
        is_suspect: The broker closed it, and who is told this may have done what it did so for.
    """

    is_suspect = False


class Verdict(enum.Enum):
    """The part of a session in the loss of its link."""

    INNOCENT = "it lost the link through others, or the link just broke"
    SUSPECT = "it is one of those who may have done it"
    GUILTY = "the broker closed the connection because of what it did"


class Suspect(Protocol):
    """A session, as it is looked at when its link was lost."""

    @property
    def has_published(self) -> bool:
        """True if anything was published over it."""

    def awaits(self, method: tuple[int, int]) -> bool:
        """Return whether a call by this method has no answer yet."""


_S = TypeVar("_S", bound=Suspect)


def is_accusation(error: BaseException) -> bool:
    """Return whether a broker closed a connection for what one of its users did. Never switches."""
    if not isinstance(error, amqp.AMQPError) or isinstance(error, _NOBODYS):
        return False
    return getattr(error, "method_sig", None) is not None


def verdicts(error: BaseException, sessions: Iterable[_S]) -> dict[_S, Verdict]:
    """Return the verdict on each session that is not innocent of the loss of a link. Never switches."""
    if not is_accusation(error):
        return {}
    method = getattr(error, "method_sig", _NO_METHOD)
    possible = _possible(method, list(sessions))
    if len(possible) == 1:
        return {possible[0]: Verdict.GUILTY}
    if len(possible) > MAX_SUSPECTS:
        return {}
    return dict.fromkeys(possible, Verdict.SUSPECT)


def _possible(method: tuple[int, int], sessions: list[_S]) -> list[_S]:
    if method == spec.Basic.Publish:
        return [each for each in sessions if each.has_published]
    calling = [] if method == _NO_METHOD else [each for each in sessions if each.awaits(method)]
    return calling or sessions
