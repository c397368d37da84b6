"""Owns what becomes of a message that its handler did not settle: given back now, or after a delay.

Called where handlers run. Nothing here raises for what the broker does: a message whose channel is gone is
the broker's again.
"""

from __future__ import annotations

import gevent
from kombu import Message

#: Seconds until another try to give back what could not be given back.
_AGAIN = 1.0


def is_settleable(message: Message) -> bool:
    """Return whether the message is still to be settled: nobody has, and the broker wants it."""
    if message.acknowledged or message.channel is None:
        return False
    auto_acked = getattr(message.channel, "no_ack_consumers", None) or ()
    if message.delivery_info.get("consumer_tag") in auto_acked:
        return False
    # kombu's virtual transports keep what is unsettled, and for a while what was settled since.
    qos = getattr(message.channel, "_qos", None)
    delivered = getattr(qos, "_delivered", None)
    if delivered is None:
        return True
    tag = message.delivery_tag
    return tag in delivered and tag not in getattr(qos, "_dirty", ())


def is_live(message: Message) -> bool:
    """Return whether the channel that the message came from can still settle it."""
    channel = message.channel
    holds = getattr(channel, "holds", None)
    if holds is not None and hasattr(message, "epoch"):
        return bool(holds(message.epoch))
    return not getattr(channel, "closed", False)


def give_back(message: Message) -> None:
    """Return a message to its queue as one that has not failed, where the transport knows the difference."""
    given_back = getattr(message, "give_back", message.requeue)
    given_back()


class DelayedRequeues:
    """The failed messages of one consumer that wait before they go back to their queue.

    They stay unsettled meanwhile, so they count towards the prefetch and a crash loses none. When the
    consumer's channel closes the broker takes them back at once: `cancel` then forgets them here.
    """

    __slots__ = ("_timers",)

    def __init__(self) -> None:
        self._timers: set[gevent.Greenlet[..., None]] | None = None  # an empty set takes 216 bytes

    def add(self, message: Message, delay: float, failed: bool = True) -> None:
        """Requeue `message` in `delay` seconds, unless it is settled by then. Never switches.

        Args:
            message: A message.
            delay: Seconds.
            failed: Its handler has failed; else it only waits for its time.
        """
        # One that the broker has back already is only counted.
        wait = delay if is_live(message) else 0
        timer = gevent.spawn_later(wait, self._requeue, message, failed)
        if self._timers is None:
            self._timers = set()
        self._timers.add(timer)
        timer.rawlink(self._timers.discard)

    def _requeue(self, message: Message, failed: bool) -> None:
        # From here on it is not killed: on some transports this is a write to the broker.
        if self._timers is not None:
            self._timers.discard(gevent.getcurrent())
        if not is_settleable(message):
            return
        try:
            if failed:
                message.requeue()
            else:
                give_back(message)
        except Exception:  # the broker's: if it was not its end, another try may succeed
            if is_live(message):
                self.add(message, _AGAIN, failed)

    def cancel(self) -> None:
        """Forget them all: their channel is about to close. Never switches."""
        if self._timers:
            gevent.killall(list(self._timers), block=False)
            self._timers.clear()

    def __len__(self) -> int:
        return len(self._timers or ())
