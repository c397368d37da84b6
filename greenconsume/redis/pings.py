"""Owns the judgement that a server is gone though its connection stands: it was asked, and did not answer.

Called by `link`, which it watches in a greenlet.
"""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from redis import exceptions

#: Parts of the interval: after so much silence a server is asked, and after so much more it is left. One that
#: goes right after its answer is asked when the time for that is over, so within twice the second.
_SILENCE, _PATIENCE = 0.4, 0.45
#: Seconds to read what had arrived before silence is judged.
_GRACE = 0.05
#: Who wakes so many seconds late was held up, by a busy hub or machine, and could hear no answer.
_LATE = 0.25


class Watched(Protocol):
    """A link, as it is watched here."""

    @property
    def last_read(self) -> float:
        """The monotonic time at which the server last said something."""

    def wait_for_end(self, seconds: float) -> bool:
        """Wait until it has failed, for so many seconds; return whether it has. Switches: yes."""

    def ping(self) -> None:
        """Have the server asked whether it lives. Never switches."""

    def fail(self, error: BaseException) -> None:
        """End the link now. Never switches."""


def watch(link: Watched, interval: float) -> None:
    """Ask a silent server whether it lives, and fail the link if it is gone for `interval` seconds.

    Switches: yes; returns once the link has failed.
    """
    asked: float | None = None
    due = link.last_read + interval * _SILENCE
    while not link.wait_for_end(max(0.0, due - monotonic())):
        late = monotonic() - due
        if asked is not None and link.last_read < asked:
            link.wait_for_end(_GRACE)
        if asked is None or link.last_read >= asked:
            asked, due = None, link.last_read + interval * _SILENCE
            if monotonic() >= due:
                asked = monotonic()
                due = asked + interval * _PATIENCE
                link.ping()
        elif late > _LATE:
            due = monotonic() + interval * _PATIENCE
        else:
            seconds = round(monotonic() - link.last_read, 1)
            link.fail(exceptions.TimeoutError(f"no answer from the server for {seconds} s"))
