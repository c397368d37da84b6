"""Owns what a `memory://` channel has delivered and has yet to see settled.

It must never take a message from a queue. Called by `memory` and, as a channel's `qos`, by kombu.
"""

from __future__ import annotations

from typing import Any, Protocol

from kombu.transport import virtual

from greenconsume.virtual import Unsettled


class Restoring(Protocol):
    """A channel, as its unsettled messages see it."""

    def restore(self, message: virtual.Message) -> None:
        """Put a message back at the head of its queue."""

    def offer(self) -> bool:
        """Have what is ready looked at, if the prefetch allows."""


class UnsettledMessages(Unsettled):
    """Keeps a channel's unsettled messages by delivery tag.

    A tag that is not there (settled already, or its channel is closed) is settled without effect.
    """

    channel: Restoring

    def ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """Forget a message; with `multiple`, all that came before it too. With tag 0 that is all."""
        for tag in self.up_to(delivery_tag) if multiple else (delivery_tag,):
            self._delivered.pop(tag, None)
        self.channel.offer()

    def reject(self, delivery_tag: int, requeue: bool = False) -> None:
        """Forget a message, or put it back into its queue."""
        message = self._delivered.pop(delivery_tag, None)
        if requeue and message is not None:
            self.channel.restore(message)
        self.channel.offer()

    def restore_unacked(self) -> list[Any]:
        """Put everything back, in its order; return kombu's list of failures, which is empty."""
        while self._delivered:
            _, message = self._delivered.popitem()  # the latest first: each goes before the others
            self.channel.restore(message)
        self.channel.offer()
        return []

    restore_unacked_once = restore_unacked  # kombu's name for it when a channel closes
