"""Owns the list of what consumes in this process, and the ban on consuming in one that forks workers.

A runtime that gunicorn's arbiter started would go on beside those of its workers, and nobody would watch over
it. This must never touch what runs in a child: after a fork, copies end by themselves. Called by `runtime`
and `greenlet`, which enter what they start, and by `greenconsume.gunicorn`.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

from greenconsume.errors import ArbiterError, GreenconsumeError
from greenconsume.stopping import Deadline


class Consuming(Protocol):
    """Whatever consumes: a runtime, or a consumer's greenlet."""

    def stop(self, reason: str) -> object:
        """Have it drain; only signals."""

    def join(self, timeout: float | None) -> bool:
        """Wait until it has ended; return whether it has."""

    def kill(self) -> object:
        """End it as it is."""


_consuming: WeakSet[Consuming] = WeakSet()
_forbidden_in: int | None = None


def enter(consuming: Consuming) -> None:
    """Take note of what starts to consume. Never switches.

    Raises:
        ArbiterError: Nothing may in this process.
    """
    if os.getpid() == _forbidden_in:
        raise ArbiterError
    _consuming.add(consuming)


def forbid(within: float) -> int:
    """End what consumes in this process, and let nothing start to from now on.

    Args:
        within: Seconds for its drain; then it is killed.

    Returns:
        How many runtimes and consumers there were.

    Switches: yes, if something consumes.
    """
    global _forbidden_in
    _forbidden_in = os.getpid()
    found, deadline = list(_consuming), Deadline(within)
    _consuming.clear()
    running = [each for each in found if not _has_ended(each, 0.0)]
    for each in running:
        each.stop("it was started in an arbiter")
    for each in running:
        if not _has_ended(each, deadline.remaining):
            each.kill()
    return len(running)


def _has_ended(consuming: Consuming, timeout: float | None) -> bool:
    try:
        return consuming.join(timeout)
    except GreenconsumeError:  # how it ended is told in the log
        return True
