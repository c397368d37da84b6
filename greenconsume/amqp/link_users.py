"""Owns what a link calls on those who use it: its channels, and its sessions. It knows neither class.

All of it is called in the reader's or the writer's greenlet, runs no user code and never switches.
"""

from __future__ import annotations

from typing import Any, Protocol

from greenconsume.amqp.blame import Part
from greenconsume.amqp.frames import Delivery, Sig


class TakesDeliveries(Protocol):
    """The deliveries of a channel, as its link sees them."""

    def take(self, delivery: Delivery) -> None:
        """Take a delivery from the reader."""
        ...

    def flush(self) -> None:
        """Write the settles that were made since the last time."""
        ...


class LinkChannel(Protocol):
    """A channel, as its link sees it."""

    @property
    def deliveries(self) -> TakesDeliveries:
        """The part that takes its deliveries."""
        ...

    def dispatch_method(self, method_sig: Sig, payload: bytes, content: Any) -> None:
        """Take any other method from the reader, with its content if it has one."""
        ...


class LinkUser(Protocol):
    """A session, as its link sees it."""

    def on_link_lost(self, part: Part) -> None:
        """Let go of what went over the link, which is gone."""
        ...

    @property
    def has_published(self) -> bool:
        """True if anything was published over it."""
        ...

    def awaits(self, method: Sig) -> bool:
        """Return whether a call by this method has no answer yet."""
        ...
