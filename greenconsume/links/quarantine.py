"""Owns which consumers are kept apart, because the broker closed the link that they shared (law 10).

A consumer is kept apart until it has consumed well for a while; then it shares links again when it connects
next. The messages that were found to close a link are remembered here, as they outlive it. It dials
nothing. Called by `pool`, by the engine of a consumer, and where messages are tried alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic

#: Seconds of consuming without another such loss after which a consumer shares links again.
LONG_ENOUGH = 60.0
#: So many messages are remembered at the most; the oldest is forgotten first.
MAX_POISONS = 1000


@dataclass(slots=True)
class _Held:
    group: str
    seconds: float = 0.0
    since: float | None = None  # consuming, since then

    @property
    def consumed(self) -> float:
        return self.seconds + (0.0 if self.since is None else monotonic() - self.since)


@dataclass(slots=True)
class _Poison:
    error: BaseException
    count: int
    is_due: bool


class Quarantine:
    """The consumers of one pool that are kept apart from the others, by name, and their poison."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._poisons: OrderedDict[str, _Poison] = OrderedDict()

    # -- consumers ------------------------------------------------------------------------------

    def put(self, name: str, group: str = "") -> None:
        """Keep a consumer apart from now on, with those of its group. Never switches.

        Args:
            name: The consumer.
            group: Those who share a link all the same, being too many for one each; by default it is alone.
        """
        self._held[name] = _Held(group or name)

    def note_consuming(self, name: str, consumes: bool) -> None:
        """Note that a consumer consumes, or does no more: only while it does its time counts."""
        held = self._held.get(name)
        if held is not None:
            held.seconds, held.since = held.consumed, monotonic() if consumes else None

    def holds(self, name: str) -> bool:
        """Return whether a consumer is kept apart: until it has consumed well. Never switches."""
        held = self._held.get(name)
        if held is None:
            return False
        if held.consumed < LONG_ENOUGH:
            return True
        del self._held[name]
        return False

    def group_of(self, name: str) -> str:
        """Return whose link a consumer that connects now shares; empty if it is not kept apart."""
        return self._held[name].group if self.holds(name) else ""

    @property
    def groups(self) -> set[str]:
        """The groups that are kept apart."""
        return {held.group for held in self._held.values()}

    # -- messages -------------------------------------------------------------------------------

    @property
    def has_poison(self) -> bool:
        """True if any message is known to have closed a link."""
        return bool(self._poisons)

    def convict(self, key: str, error: BaseException) -> None:
        """Note that a message was handled alone, and that the broker closed the link for it."""
        count = self._poisons[key].count if key in self._poisons else 0
        self._poisons[key] = _Poison(error, count + 1, is_due=True)
        self._poisons.move_to_end(key)
        while len(self._poisons) > MAX_POISONS:
            self._poisons.popitem(last=False)

    def sentence(self, key: str) -> tuple[BaseException, int] | None:
        """Return why a message that came again has failed, and how often so far; None if it has not.

        It is told once for each time: the message may be tried again after it has met its policy.
        """
        poison = self._poisons.get(key)
        if poison is None or not poison.is_due:
            return None
        poison.is_due = False
        return poison.error, poison.count
