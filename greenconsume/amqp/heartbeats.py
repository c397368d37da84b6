"""Owns the heartbeats of a link: sends one when nothing else was sent, and judges the broker's silence.

One greenlet for each link runs `beat`; it never reads. Called by `link`.
"""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from amqp.exceptions import ConnectionForced
from gevent.event import Event

from greenconsume.amqp.frames import HEARTBEAT_FRAME

#: A hub that was busy is given this long to read what had arrived before silence is judged.
GRACE = 0.05


class Beating(Protocol):
    """A link, as its heartbeats see it."""

    heartbeat: float
    last_read: float

    @property
    def last_write(self) -> float:
        """The time at which the writer last wrote something."""
        ...

    @property
    def has_unsent(self) -> bool:
        """True if the writer has something to send, which says as much as a heartbeat."""
        ...

    def write(self, frames: list[bytes]) -> None:
        """Queue frames."""
        ...

    def fail(self, error: BaseException) -> None:
        """End the link."""
        ...


def beat(link: Beating, over: Event) -> None:
    """Send heartbeats, and end the link when the broker sends none, until `over` is set."""
    interval = link.heartbeat / 2
    while not over.wait(interval):
        if monotonic() - link.last_write >= interval * 0.9 and not link.has_unsent:
            link.write([HEARTBEAT_FRAME])
        if _is_silent(link) and not over.wait(GRACE) and _is_silent(link):
            seconds = round(monotonic() - link.last_read, 1)
            link.fail(ConnectionForced(f"no heartbeat from the broker for {seconds} s"))


def _is_silent(link: Beating) -> bool:
    return monotonic() - link.last_read > 2 * link.heartbeat
