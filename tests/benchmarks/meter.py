"""Owns the clock of a measurement; shared by all that are measured, so it imports nothing of theirs."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, process_time


class Meter:
    """Counts messages, in one thread; times from the first to the last.

    The clock starts with the first `tick`, `enter` or `start`.

    Args:
        total: How many messages there are.
        done: Called with the last one.

    Attributes:
        peak: The most handlers that were at work at once, where `enter` counts them.
    """

    def __init__(self, total: int, done: Callable[[], object]) -> None:
        self.total, self.count = total, 0
        self.running = self.peak = 0
        self._done = done
        self._before: int | None = None

    def start(self) -> None:
        """Start the clock now; what was counted before does not count."""
        self._before = self.count
        self._began, self._cpu = monotonic(), process_time()

    def enter(self) -> None:
        """Count a handler that begins."""
        if self._before is None:
            self.start()
        self.running += 1
        self.peak = max(self.peak, self.running)

    def leave(self) -> None:
        """Count a handler that has ended, and its message."""
        self.running -= 1
        self.tick()

    def tick(self) -> None:
        """Count a message."""
        if self._before is None:
            self.start()
        self.count += 1
        if self.count == self.total:
            self._seconds, self._cpu = monotonic() - self._began, process_time() - self._cpu
            self._done()

    def figures(self) -> dict[str, float]:
        """Return messages per second, and the process's CPU seconds per 10,000, all threads together."""
        messages = self.total - (self._before or 0)
        return {"rate": messages / self._seconds, "cpu_per_10k": self._cpu / messages * 10_000}
