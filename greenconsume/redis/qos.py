"""Owns what a channel has handed out and has yet to see settled: each message is settled once.

Called by `channel` and by kombu. Never switches.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from itertools import count
from typing import Any, Protocol

from greenconsume.events import StaleSettle, emit
from greenconsume.redis.ledger import Ledger
from greenconsume.redis.link import Link
from greenconsume.redis.message import HeldMessage
from greenconsume.virtual import Unsettled


class CountedChannel(Protocol):
    """A channel, as the count of its messages sees it."""

    ledger: Ledger
    link: Link

    def offer(self) -> None:
        """Have more taken if less waits than there is room for."""

    def repeat(self, message: HeldMessage) -> None:
        """Have it wait once more: no server has it."""


class QoS(Unsettled):
    """The prefetch of a channel, and what it counts; by delivery tag, which is what the message is held as.

    A tag that is not there is settled already: that is counted, and does nothing.
    """

    channel: CountedChannel
    _delivered: OrderedDict[str, HeldMessage | None]

    def __init__(self, channel: CountedChannel, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self.returning_count = 0  # put back, and not there yet: what comes after them has to wait
        self._stale = count(1)

    def ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Settle a message; with `multiple`, all that came before it too."""
        channel = self.channel
        for tag in self.up_to(delivery_tag) if multiple else (delivery_tag,):
            if self._delivered.pop(tag, self) is not self:
                channel.ledger.ack(tag)
            else:
                emit(StaleSettle(tag, next(self._stale)))
        channel.offer()

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Drop a message, or put it back into its queue, counted as not handled."""
        message = self._delivered.get(delivery_tag)
        if not self._drop(delivery_tag):
            return
        if not requeue:
            self.channel.ledger.ack(delivery_tag)
        elif self.channel.ledger.fail(delivery_tag, self._returned):
            self.returning_count += 1
        elif message is not None:
            self.channel.repeat(message)  # of a fanout exchange, and so in no queue of the server
        self.channel.offer()

    def _returned(self) -> None:
        self.returning_count -= 1
        self.channel.offer()

    def give_back(self, delivery_tag: str, multiple: bool = False) -> None:
        """Put a message back as if it had never been taken."""
        tags = self.up_to(delivery_tag) if multiple else [delivery_tag]
        self.channel.ledger.give_back([tag for tag in tags if self._drop(tag)])
        self.channel.offer()

    def forget(self, delivery_tag: str) -> None:
        """Note that a message was settled in another way."""
        if self._delivered.pop(delivery_tag, self) is not self:
            self.channel.ledger.forget([delivery_tag])
            self.channel.offer()

    def restore_unacked(self) -> list[Any]:
        """Put everything back, in its order; return kombu's list of failures, which is empty."""
        if self.channel.link.failure is not None:
            self.leave_to_handlers()
            return []
        tags = list(self._delivered)
        self._delivered.clear()
        self.channel.ledger.give_back(tags)
        self.channel.offer()
        return []

    restore_unacked_once = restore_unacked  # kombu's name for it when a channel closes

    def leave_to_handlers(self) -> None:
        """Keep each message for whoever has it, and put it back when nobody has it any more.

        The server does not know that the link was lost. So a handler that runs can settle its message,
        over the next link; what the consumer has forgotten meanwhile goes back.
        """
        for tag, message in self._delivered.items():
            if message is not None:
                gone = weakref.finalize(message, self.channel.ledger.give_back, [tag])
                gone.atexit = False
                self._delivered[tag] = None

    def _drop(self, tag: str) -> bool:
        if self._delivered.pop(tag, self) is not self:
            return True
        emit(StaleSettle(tag, next(self._stale)))
        return False
