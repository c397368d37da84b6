"""Owns the numbers of one consumer: what it received, what became of it, and how long handlers took.

The one home of each of them (law 13): who does something counts it here, and the log, the metrics, the admin
page and the commands read it here. A `Tally` lives as long as its consumer's name, through all restarts. It
must never take a lock, nor cost more than an addition for each message while nobody looks: times are kept
only from `watch` on. Called by whatever handles messages; read by `runtime`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import sub
from time import monotonic

_STEPS = (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8)
#: Upper bounds of the buckets in seconds: ten a decade, from 0.1 ms to 1,000 s.
BOUNDS: tuple[float, ...] = (
    *(float(f"{step}e{power}") for power in range(-4, 3) for step in _STEPS),
    1000.0,
)
_SHORTEST = BOUNDS[0]
#: Seconds that rates and quantiles look back.
WINDOW = 60.0
#: Seconds of the steps in which the window moves.
_STEP = 10.0
#: How many classes of errors are told apart; further ones are counted as this.
MAX_ERRORS, OTHER_ERRORS = 100, "other"


class Timings:
    """Counts durations in buckets, since it was made and for the last minute.

    Attributes:
        total: The sum of all durations, in seconds.
        messages: How many messages they were for.
        began: When it was made (`time.monotonic`).
    """

    __slots__ = ("_counts", "_next", "_past", "began", "messages", "total")

    def __init__(self, now: float | None = None) -> None:
        self.began = monotonic() if now is None else now
        self.total = 0.0
        self.messages = 0
        self._counts = [0] * (len(BOUNDS) + 1)
        self._next = self.began + _STEP
        # (when, what had been counted by then, for how many messages), for each step in which something was.
        self._past: deque[tuple[float, list[int], int]] = deque(maxlen=int(WINDOW / _STEP) + 2)
        self._past.append((self.began, self._counts[:], 0))

    def note(self, now: float, seconds: float, messages: int = 1) -> None:
        """Count a duration that ended `now`, and was for one message or a batch of them. Never switches."""
        if now >= self._next:
            self._turn(now)
        # Those whose messages cost least are over in no time: they need not be looked up.
        self._counts[bisect_left(BOUNDS, seconds) if seconds > _SHORTEST else 0] += 1
        self.total += seconds
        self.messages += messages

    def _turn(self, now: float) -> None:
        # No timer moves the window: what was counted until the end of the last step holds until now.
        self._past.append((self._next, self._counts[:], self.messages))
        self._next = now - (now - self.began) % _STEP + _STEP

    @property
    def count(self) -> int:
        """The number of durations."""
        return sum(self._counts)

    def cumulative(self, places: Sequence[int]) -> list[int]:
        """Return how many durations were no longer than each of the `BOUNDS` at these places, and of all."""
        sums = list(accumulate(self._counts))
        return [*map(sums.__getitem__, places), sums[-1]]

    def last_minute(self, now: float | None = None) -> LastMinute:
        """Return what was counted in the last minute, or since it began."""
        now = monotonic() if now is None else now
        since, before, messages = self._past[0]
        for at, counts, by_then in self._past:
            if at <= now - WINDOW:
                since, before, messages = max(at, now - WINDOW - _STEP), counts, by_then
        # What was counted until the end of the last step holds from there on.
        if self._next <= now - WINDOW or self.messages == messages:
            return LastMinute((), 0, 1.0)
        new = map(sub, self._counts, before)
        return LastMinute(new, self.messages - messages, max(now - since, 1e-9))


class LastMinute:
    """The durations of the last minute.

    Attributes:
        count: How many.
        messages: How many messages they were for.
    """

    __slots__ = ("_seconds", "_sums", "count", "messages")

    def __init__(self, counts: Iterable[int], messages: int, seconds: float) -> None:
        self._sums, self._seconds = list(accumulate(counts)), seconds
        self.count, self.messages = self._sums[-1] if self._sums else 0, messages

    @property
    def rate(self) -> float:
        """The number of messages a second."""
        return self.messages / self._seconds

    def quantile(self, share: float) -> float | None:
        """Return the duration that `share` of all did not exceed, to a quarter; None if there are none."""
        if not self.count:
            return None
        rank = share * self.count
        place = min(bisect_left(self._sums, rank), len(self._sums) - 1)
        before = self._sums[place - 1] if place else 0
        return _inside(place, (rank - before) / (self._sums[place] - before))


def _inside(index: int, share: float) -> float:
    lower = BOUNDS[index - 1] if index else 0.0
    upper = BOUNDS[index] if index < len(BOUNDS) else BOUNDS[-1]
    return lower + (upper - lower) * share


class Tally:
    """Counts what becomes of one consumer's messages. A batch counts as its messages, but as one duration.

    Attributes:
        received: Messages that reached the consumer's boundary.
        ok: Messages whose handler returned.
        failed: Messages whose handler raised.
        timed_out: Messages whose handler was ended by `handler_timeout`.
        cancelled: Messages whose handler a drain ended by `Shutdown`.
        killed: Messages whose handler was killed.
        given_back: Messages that went back before a handler had started.
        stale_settles: Messages that were settled after their channel was gone.
        retries: Messages that are tried again later.
        dead_letters: Messages that were put where failed ones are kept.
        errors: Failed messages by the name of the exception's class.
        timings: How long handlers took; None while nobody watches.
    """

    __slots__ = (
        "cancelled",
        "dead_letters",
        "errors",
        "failed",
        "given_back",
        "killed",
        "ok",
        "received",
        "retries",
        "stale_settles",
        "timed_out",
        "timings",
    )

    def __init__(self) -> None:
        self.received = self.ok = self.failed = self.timed_out = self.cancelled = self.killed = 0
        self.given_back = self.stale_settles = self.retries = self.dead_letters = 0
        self.errors: dict[str, int] = {}
        self.timings: Timings | None = None

    def watch(self) -> None:
        """Keep times, from now on. Idempotent."""
        if self.timings is None:
            self.timings = Timings()

    def count_failure(self, error: BaseException, timed_out: bool, count: int = 1) -> None:
        """Count a message whose handler failed, or so many of a batch, by the class of the error."""
        if timed_out:
            self.timed_out += count
        else:
            self.failed += count
        name = type(error).__name__
        if name not in self.errors and len(self.errors) >= MAX_ERRORS:
            name = OTHER_ERRORS
        self.errors[name] = self.errors.get(name, 0) + count

    def count_copy(self, retry: bool) -> None:
        """Count a failed message that was put away: to be tried again, or for good."""
        if retry:
            self.retries += 1
        else:
            self.dead_letters += 1

    @property
    def outcomes(self) -> dict[str, int]:
        """The number of messages whose handlers ended in each way."""
        return {
            "ok": self.ok,
            "failed": self.failed,
            "timed_out": self.timed_out,
            "cancelled": self.cancelled,
            "killed": self.killed,
        }


class PublishTally:
    """Counts what became of messages that were published to one broker.

    Attributes:
        uri: The broker's address, without its password.
        outcomes: How many messages ended in which way: `confirmed`, or the name of the error's class.
        timings: How long confirms took; None while nobody watches.
    """

    __slots__ = ("outcomes", "timings", "uri")

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.outcomes: dict[str, int] = {}
        self.timings: Timings | None = None

    def watch(self) -> None:
        """Keep times, from now on. Idempotent."""
        if self.timings is None:
            self.timings = Timings()

    def note(self, began: float, error: str | None) -> None:
        """Count a message that was confirmed, or has failed with an error of this name. Never switches.

        Args:
            began: When it was taken (`time.monotonic`); 0 if nobody watched then.
            error: The name of the error's class; None: it was confirmed.
        """
        outcome = error or "confirmed"
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if began and self.timings is not None:
            now = monotonic()
            self.timings.note(now, now - began)

    def shown(self) -> dict[str, object]:
        """Return what is shown of it."""
        return {"uri": self.uri, "outcomes": dict(self.outcomes)}


_published: dict[str, PublishTally] = {}


def published_to(uri: str) -> PublishTally:
    """Return the tally of what this process publishes to a broker; its publishers share it."""
    found = _published.get(uri)
    if found is None:
        found = _published[uri] = PublishTally(uri)
    return found


def all_published() -> tuple[PublishTally, ...]:
    """Return the tallies of all brokers that this process has published to."""
    return tuple(_published.values())
