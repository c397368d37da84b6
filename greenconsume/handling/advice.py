"""Owns what is said of a handler's error besides its traceback, where the cause is known and has a remedy.

It must never change what becomes of the message. Called by `boundary`.
"""

from __future__ import annotations

from amqp.exceptions import ChannelError
from gevent.exceptions import ConcurrentObjectUseError
from kombu import Message

from greenconsume.events import BlockingConnectionShared, HandlerClosedChannel, emit

_told_of_sharing = False


def advise(consumer: str, message: Message, error: BaseException) -> None:
    """Tell of a call that closed the consuming channel, and, once, of a connection that is not green.

    Switches: never.
    """
    channel = getattr(message, "channel", None)
    if isinstance(error, ChannelError) and not getattr(channel, "is_open", True):
        routing_key = str(message.delivery_info.get("routing_key", ""))
        emit(HandlerClosedChannel(consumer, message.delivery_tag, routing_key, error))
    elif _comes_of_sharing(error):
        _tell_of_sharing(consumer)


def _comes_of_sharing(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConcurrentObjectUseError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _tell_of_sharing(consumer: str) -> None:
    global _told_of_sharing
    if not _told_of_sharing:
        _told_of_sharing = True
        emit(BlockingConnectionShared(consumer))
