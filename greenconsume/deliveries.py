"""Owns what becomes of a message that its handler did not settle: given back now, or after a delay.

Called by `handlers`. Nothing here raises for what the broker does: a message whose channel is gone is
the broker's again.
"""

from __future__ import annotations

from typing import Any

import gevent


def is_settleable(message: Any) -> bool:
    """Whether the message still waits for its settlement: nobody settled it, and the broker wants one."""
    if message.acknowledged or message.channel is None:
        return False
    auto_acked = getattr(message.channel, "no_ack_consumers", None) or ()
    if message.delivery_info.get("consumer_tag") in auto_acked:
        return False
    qos = getattr(
        message.channel, "_qos", None
    )  # kombu's virtual transports keep what is unsettled
    return qos is None or message.delivery_tag in qos._delivered


def is_live(message: Any) -> bool:
    """Whether the channel that the message came from can still settle it."""
    channel = message.channel
    holds = getattr(channel, "holds", None)
    if holds is not None and hasattr(message, "epoch"):
        return bool(holds(message.epoch))
    return not getattr(channel, "closed", False)


class DelayedRequeues:
    """The failed messages of one consumer that wait before they go back to their queue.

    They stay unsettled meanwhile, so they count towards the prefetch and a crash loses none. When the
    consumer's channel closes the broker takes them back at once: `cancel` then forgets them here.
    """

    __slots__ = ("_timers",)

    def __init__(self) -> None:
        self._timers: set[gevent.Greenlet[..., None]] = set()

    def add(self, message: Any, delay: float) -> None:
        """Requeue `message` in `delay` seconds, unless it is settled by then."""
        timer = gevent.spawn_later(delay, self._requeue, message)
        self._timers.add(timer)
        timer.rawlink(self._timers.discard)

    @staticmethod
    def _requeue(message: Any) -> None:
        if is_settleable(message):
            message.requeue()

    def cancel(self) -> None:
        """Forget them all: their channel is about to close. Never switches."""
        gevent.killall(list(self._timers), block=False)
        self._timers.clear()

    def __len__(self) -> int:
        return len(self._timers)
