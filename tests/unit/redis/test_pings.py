"""Tests when a silent server is asked whether it lives, and when it is left, by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from greenconsume.redis import pings

INTERVAL = 5.0


class Clock:
    """A link, and the time that passes while it is watched.

    Args:
        answers: Given the time of a ping, returns that of its answer; None: there is none.
        ends_at: The time at which the watching ends at the latest.
        held_up: What the hub does not see before: by the time from which on it is held up, for how long.
    """

    def __init__(
        self,
        answers: Callable[[float], float | None],
        ends_at: float = 60.0,
        held_up: dict[float, float] | None = None,
    ) -> None:
        self.now = self.last_read = 0.0
        self.pings: list[float] = []
        self.failed_at: float | None = None
        self._answers, self._ends_at = answers, ends_at
        self._held_up = dict(held_up or {})
        self._arrivals: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wait_for_end(self, seconds: float) -> bool:
        end = self.now + seconds
        for begin, length in list(self._held_up.items()):
            if self.now <= begin <= end:
                del self._held_up[begin]
                end = max(end, begin + length)
                self.now = end
                return self.failed_at is not None  # its reader has had no turn yet
        self.now = end
        for arrival in [each for each in self._arrivals if each <= end]:
            self._arrivals.remove(arrival)
            self.last_read = max(arrival, self.last_read)
        return self.failed_at is not None or self.now >= self._ends_at

    def ping(self) -> None:
        self.pings.append(self.now)
        answer = self._answers(self.now)
        if answer is not None:
            self._arrivals.append(answer)

    def fail(self, error: BaseException) -> None:
        self.failed_at = self.now


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], Clock]:
    def watch(clock: Clock) -> Clock:
        monkeypatch.setattr(pings, "monotonic", clock.monotonic)
        pings.watch(clock, INTERVAL)
        return clock

    return watch


def test_a_server_that_answers_is_kept_and_asked_after_two_seconds_of_silence(watched):
    clock = watched(Clock(lambda now: now + 0.001))
    assert clock.failed_at is None
    assert 20 <= len(clock.pings) <= 30


def test_a_server_that_is_gone_is_left_within_the_interval(watched):
    clock = watched(Clock(lambda now: None))
    assert clock.pings == [2.0]
    assert clock.failed_at is not None
    assert clock.failed_at < INTERVAL


def test_a_server_that_goes_right_after_an_answer_is_left_within_the_interval_of_it(watched):
    clock = watched(Clock(lambda now: now + 0.001 if now < 10.0 else None))
    assert clock.failed_at is not None
    assert 4.0 < clock.failed_at - clock.last_read < INTERVAL


def test_a_server_that_is_slow_to_answer_is_kept(watched):
    clock = watched(Clock(lambda now: now + 2.2))
    assert clock.failed_at is None


def test_an_answer_that_had_come_while_the_hub_was_held_up_is_read_first(watched):
    clock = watched(Clock(lambda now: now + 0.001, held_up={2.0: 30.0}))
    assert clock.failed_at is None


def test_a_machine_that_stood_still_leaves_the_server_its_time(watched):
    """Both stood still: the answer comes a moment after both go on."""
    clock = watched(Clock(lambda now: max(now, 12.0) + 1.0, held_up={2.0: 10.0}))
    assert clock.failed_at is None


def test_a_server_that_is_gone_is_left_also_after_the_hub_was_held_up(watched):
    clock = watched(Clock(lambda now: None, held_up={2.0: 10.0}))
    assert clock.failed_at is not None
    assert clock.failed_at < 12.0 + INTERVAL
