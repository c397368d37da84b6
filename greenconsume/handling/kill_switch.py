"""Owns `KillSwitch`: a consumer most of whose messages fail stops consuming, and tries one now and then.

What its handlers need is away, so trying every message would only fill the dead-letter queue; the backlog
stays in its own queue instead. A switch is *closed* (the consumer consumes), *open* (it waits, connected to
nothing) or *half open* (it consumes one message). Called by `consuming` and, for each message, `boundary`.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from time import monotonic

from kombu import Consumer

from greenconsume.checks import is_count, is_number, is_seconds
from greenconsume.events import KillSwitchReset, KillSwitchTripped, emit
from greenconsume.lifecycle import Lifecycle
from greenconsume.stopping import StopCheck, StopSignal

#: The share of a pause by which it is longer by chance, so that a fleet does not try in step.
_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class KillSwitch:
    """The rule by which a consumer stops consuming for a while, because its messages fail.

    A message fails when its callback raises, whatever its policy then does with it.

    Args:
        threshold: It trips when more than this share, 0 to 1, of the last messages failed.
        window: How many last messages these are; before that many were handled it does not trip.
        pause: Seconds that it then waits before it tries one message. If that one is handled it resumes, if
            that fails, too, it waits again.

    Raises:
        ValueError: A number is out of its range.
    """

    threshold: float = 0.5
    window: int = 20
    pause: float = 30.0

    def __post_init__(self) -> None:
        if not (is_number(self.threshold) and self.threshold < 1):
            raise ValueError(
                f"KillSwitch(threshold) must be 0 or more and less than 1, not {self.threshold!r}"
            )
        if not is_count(self.window):
            raise ValueError(
                f"KillSwitch(window) must be a whole number, 1 or more, not {self.window!r}"
            )
        if not is_seconds(self.pause):
            raise ValueError(f"KillSwitch(pause) must be 0 seconds or more, not {self.pause!r}")


class Switch:
    """The kill switch of one consumer, while it runs.

    Args:
        settings: When it trips, and for how long.
        life: The consumer's lifecycle.

    Attributes:
        consume_stop: Ends consuming: set by a stop, and when the switch trips.
        half_open: Only one message is to be consumed.
    """

    __slots__ = (
        "_failed",
        "_last",
        "_life",
        "_limit",
        "_outcome",
        "_settings",
        "_since",
        "consume_stop",
        "half_open",
    )

    def __init__(self, settings: KillSwitch, life: Lifecycle) -> None:
        self.consume_stop = StopSignal()
        self.half_open = False
        self._settings = settings
        self._life = life
        self._limit = settings.threshold * settings.window
        self._last: deque[bool] = deque(maxlen=settings.window)
        self._failed = 0
        self._outcome: bool | None = None
        self._since = 0.0
        life.stop.link(self.consume_stop.set)
        life.consume_until(self.consume_stop)

    def close(self) -> None:
        """Let go of the consumer, which has ended. Never switches."""
        self._life.stop.unlink(self.consume_stop.set)
        self._life.consume_until(None)

    def note(self, failed: bool) -> None:
        """Take note of how a message fared. Never switches."""
        if self.half_open:
            self._outcome = failed
            return
        last = self._last
        if len(last) == last.maxlen:
            self._failed -= last[0]
        last.append(failed)
        self._failed += failed
        if failed and self._failed > self._limit and len(last) == last.maxlen:
            self._trip()

    def _trip(self) -> None:
        if self.consume_stop.is_set():
            return
        self._since = monotonic()
        self.consume_stop.set("the kill switch has tripped")
        self._tell(self._failed, len(self._last))

    def pause(self) -> float | None:
        """Return the seconds that the consumer, which has left its loop, is to wait; None: it goes on."""
        if self.half_open and not self._outcome:
            if self._outcome is False:
                self._reset()
            return None  # if it is None, there was no message to judge by
        if self.half_open:
            self._tell(1, 1)
        elif not self.consume_stop.is_set():
            return None
        self.half_open, self._outcome = True, None
        return self._settings.pause * random.uniform(1, 1 + _JITTER)

    def resume(self) -> None:
        """Have the consumer come back after its wait. Never switches."""
        if not self._life.stop.is_set():
            self.consume_stop.clear()

    @property
    def tripped(self) -> bool:
        """True from when it trips until the consumer consumes as ever."""
        return self.half_open or (self.consume_stop.is_set() and not self._life.stop.is_set())

    @property
    def limit(self) -> int | None:
        """The number of messages that are to be consumed now; None: all."""
        return 1 if self.half_open else None

    def wait_out(self, stopping: StopCheck) -> None:
        """Wait, if the switch has tripped, until the consumer is to come back to its loop.

        Args:
            stopping: Tells whether the consumer stops; asked now and then where no signal says it.

        Switches: yes, if the switch has tripped.
        """
        stopping.wait(self.pause(), self._life.stop)
        self.resume()

    def _reset(self) -> None:
        self.half_open = False
        self._last.clear()
        self._failed = 0
        emit(KillSwitchReset(self._life.name, monotonic() - self._since))

    def _tell(self, failed: int, of: int) -> None:
        emit(KillSwitchTripped(self._life.name, failed, of, self._settings.pause))


class NoSwitch:
    """The kill switch of a consumer that has none."""

    limit = None

    def wait_out(self, stopping: StopCheck) -> None:
        """Do nothing."""


def fit_switch(consumer: Consumer, switch: Switch | None) -> None:
    """Have the broker send a `kombu.Consumer` one message, if it is to consume no more."""
    if switch is not None and switch.half_open:
        consumer.qos(prefetch_count=1)
