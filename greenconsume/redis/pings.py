"""Owns the judgement that a server is gone though its connection stands: it was asked, and did not answer.

Called by `link`, which it watches in a greenlet.
"""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from redis import exceptions

#: A hub that was busy is given this long to read what had arrived before silence is judged.
_GRACE = 0.05


class Watched(Protocol):
    """A link, as it is watched here."""

    @property
    def last_read(self) -> float:
        """The monotonic time at which the server last said something."""

    @property
    def is_owed(self) -> bool:
        """True while the server has yet to answer."""

    def wait_for_end(self, seconds: float) -> bool:
        """Wait until it has failed, for so many seconds; return whether it has. Switches: yes."""

    def ping(self) -> None:
        """Have the server asked whether it lives. Never switches."""

    def fail(self, error: BaseException) -> None:
        """End the link now. Never switches."""


def watch(link: Watched, interval: float) -> None:
    """Ask a silent server every `interval` seconds, and fail the link after as many without an answer.

    Switches: yes; returns once the link has failed.
    """
    asked: float | None = None  # when something was sent that wants an answer
    while not link.wait_for_end(interval):
        if _is_silent_since(link, asked):
            link.wait_for_end(_GRACE)
        if _is_silent_since(link, asked):
            seconds = round(monotonic() - link.last_read, 1)
            link.fail(exceptions.TimeoutError(f"no answer from the server for {seconds} s"))
            return
        asked = None
        if monotonic() - link.last_read >= interval * 0.9 or link.is_owed:
            asked = monotonic()
            link.ping()


def _is_silent_since(link: Watched, asked: float | None) -> bool:
    return asked is not None and link.last_read < asked
