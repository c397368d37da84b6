"""Owns the rate of a consumer: how many messages its handlers begin with, and the wait for the next.

The consumer itself waits, so that no message is taken from the broker that is not to be begun within a second
or so. Called by `boundary`, before a message is handled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil
from typing import Any

from kombu.utils.limits import TokenBucket

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
    """Lets messages through at a rate.

    Args:
        rate: The rate.
    """

    __slots__ = ("_bucket",)

    def __init__(self, rate: Rate) -> None:
        self._bucket: Any = TokenBucket(rate.a_second, capacity=rate.burst)

    def wait(self, leave: StopSignal) -> bool:
        """Wait until the next message may begin; return False if `leave` is set by then.

        Switches: only if it is too early.
        """
        while not leave.is_set():
            if self._bucket.can_consume(1):
                return True
            leave.wait(self._bucket.expected_time(1))
        return False
