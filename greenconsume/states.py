"""Owns the two values that events, parts and every surface share: a consumer's state, and a drain's outcome.

It imports nothing. Users find both in `events`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ConsumerState(str, enum.Enum):
    """The states of a consumer, in the order of its life."""

    STARTING = "starting"
    CONNECTING = "connecting"
    STANDBY = "standby"
    CONSUMING = "consuming"
    IDLE = "idle"
    PAUSED = "paused"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Outcome:
    """The numbers of a drain: what became of the messages in hand.

    Attributes:
        finished: Handlers that ended by themselves.
        given_back: Messages that went back before a handler had started.
        cancelled: Handlers that ended when `Shutdown` was raised in them; their messages went back.
        killed: Handlers that were killed; their messages were left to the broker.
    """

    finished: int = 0
    given_back: int = 0
    cancelled: int = 0
    killed: int = 0

    @property
    def abandoned(self) -> int:
        """The number of handlers that could not do their work."""
        return self.cancelled + self.killed

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.finished + other.finished,
            self.given_back + other.given_back,
            self.cancelled + other.cancelled,
            self.killed + other.killed,
        )

    def __bool__(self) -> bool:
        return bool(self.finished or self.given_back or self.abandoned)
