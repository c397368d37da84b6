"""Owns what one consumer of one queue is to its channel, and to whatever brings it messages. Does no I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from greenconsume.redis.message import HeldMessage


class NotesConsumers(Protocol):
    """A session, as far as it is told who consumes over it."""

    def note_consumer(self) -> None:
        """Note that this greenlet begins to consume."""


@dataclass(eq=False, slots=True)
class Subscription:
    """One consumer of one queue."""

    queue: str
    tag: str
    no_ack: bool
    callback: Callable[[HeldMessage], object]
