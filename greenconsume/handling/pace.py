"""Owns the rate of a consumer or a runtime: how many messages handlers begin with, and the wait for the next.

The consumer itself waits, so that no message is taken from the broker that is not to be begun within a second
or so. Called by `boundary`, before a message is handled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil
from time import monotonic

from greenconsume.stopping import StopSignal

_WORDS = re.compile(r"(\d+(?:\.\d+)?)/(s|m|h)(?: burst (\d+))?")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Rate:
    """So many messages a second, and how many may come at once after a quiet time.

    Attributes:
        a_second: Messages a second.
        burst: Messages at once.
    """

    a_second: float
    burst: int

    @property
    def most_unsettled(self) -> int:
        """The number of messages of a second, which is all that is taken ahead."""
        return max(1, ceil(self.a_second))


def rate_of(words: str) -> Rate | None:
    """Return the rate that words say, such as `100/s`, `90/m` or `100/s burst 20`; None if they say none."""
    found = _WORDS.fullmatch(words)
    if found is None or float(found[1]) <= 0:
        return None
    a_second = float(found[1]) / _SECONDS[found[2]]
    return Rate(a_second, int(found[3] or 0) or max(1, int(a_second)))


class Pace:
    """Lets messages through at a rate, in the order in which they ask.

    Each is given the time at which it may begin, so those that wait wake once. One that stops waiting before
    its time does not give that time to another.

    Args:
        rate: The rate.

    Attributes:
        rate: As given.
    """

    __slots__ = ("_ahead", "_due", "_interval", "rate")

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._interval = 1.0 / rate.a_second
        self._ahead = (rate.burst - 1) * self._interval  # what a quiet time saves up
        self._due = 0.0

    def wait(self, leave: StopSignal) -> bool:
        """Wait until the next message may begin; return False if `stop` is set by then.

        Switches: only if it is too early.
        """
        if leave.is_set():
            return False
        now = monotonic()
        due = max(self._due, now - self._ahead)
        self._due = due + self._interval
        return due <= now or not leave.wait(due - now)
