"""Owns what a link calls on those who use it: its channels, and its sessions. It knows neither class.

All of it is called in the reader's or the writer's greenlet, runs no user code and never switches.
"""

from __future__ import annotations

from typing import Any, Protocol

from greenconsume.amqp.frames import Delivery, Sig


class TakesDeliveries(Protocol):
    """What the link hands a channel's deliveries to, and asks for its settles."""

    def take(self, delivery: Delivery) -> None:
        """Take a delivery from the reader."""
        ...

    def flush(self) -> None:
        """Write the settles that were made since the last time."""
        ...


class LinkChannel(Protocol):
    """What the link knows of a channel."""

    @property
    def deliveries(self) -> TakesDeliveries:
        """What takes its deliveries."""
        ...

    def dispatch_method(self, method_sig: Sig, payload: bytes, content: Any) -> None:
        """Take any other method from the reader, with its content if it has one."""
        ...


class LinkUser(Protocol):
    """What the link knows of a session."""

    def on_link_lost(self) -> None:
        """The link is gone."""
        ...
