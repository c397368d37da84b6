"""Owns the calls that handlers make on channels whose transport does its I/O in the calling greenlet.

On a green link a handler's ack or publish is a note for the writer greenlet, and whatever interrupts the
handler cannot cut it in two. On the transports that are polled (Redis, SQS, a file system, …) it is
a socket's `send` and `recv`: here they run one at a time on each channel, and an interrupt waits for their
end (law 2). A settle that comes after its channel was closed is counted, and does nothing (law 4).
Called by `connecting` for each connection that it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

from gevent.lock import RLock
from kombu import Connection
from kombu.transport.base import StdChannel

from greenconsume.events import StaleSettle, emit
from greenconsume.handling.jobs import shielded

_SETTLES = ("basic_ack", "basic_reject")
_CALLS = (
    *_SETTLES,
    "basic_recover",
    "basic_publish",
    "basic_get",
    "exchange_declare",
    "exchange_delete",
    "exchange_bind",
    "exchange_unbind",
    "queue_declare",
    "queue_bind",
    "queue_unbind",
    "queue_purge",
    "queue_delete",
)


def shield_channels(connection: Connection) -> None:
    """Guard the channels that a connected `kombu.Connection` makes from now on. Never switches."""
    transport = connection.transport
    if getattr(transport, "wakes", False):
        return
    create = transport.create_channel

    def create_channel(conn: object) -> Any:
        channel = create(conn)
        _shield(channel)
        return channel

    transport.create_channel = create_channel


def _shield(channel: StdChannel) -> None:
    if _SETTLES[0] in vars(channel):
        return  # one that its transport hands out again
    lock, stale = RLock(), count(1)
    for name in _CALLS:
        call = getattr(channel, name, None)
        if call is not None:
            guarded = _one_at_a_time(call, lock)
            if name in _SETTLES:
                guarded = _unless_closed(channel, guarded, stale)
            setattr(channel, name, guarded)


def _one_at_a_time(
    call: Callable[..., Any], lock: AbstractContextManager[object]
) -> Callable[..., Any]:
    def called(*args: object, **kwargs: object) -> Any:
        with lock, shielded():
            return call(*args, **kwargs)

    return called


def _unless_closed(
    channel: StdChannel, call: Callable[..., Any], stale: Iterator[int]
) -> Callable[..., Any]:
    def settle(delivery_tag: object, *args: object, **kwargs: object) -> Any:
        if getattr(channel, "closed", False):
            emit(StaleSettle(delivery_tag, next(stale)))
            return None
        return call(delivery_tag, *args, **kwargs)

    return settle
