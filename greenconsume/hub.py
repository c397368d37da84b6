"""Owns what is common to all who use gevent's hub: what keeps it waiting, and how long one may keep it.

gevent ends a loop that has nothing to watch (`LoopExit`); it cannot know of the thread or the signal handler
that would have stopped the sleepers. Called by what sleeps without a socket or a timer.
"""

from __future__ import annotations

import weakref
from typing import Any

import gevent
import gevent.hub

#: Seconds for which callbacks that never wait may run before the hub gets a turn.
MAX_TURN = 0.002


class _KeepAlive:
    """Keeps one hub's loop going while anybody is in its block, with one watcher that never fires."""

    def __init__(self, hub: gevent.hub.Hub) -> None:
        self._watcher = hub.loop.async_()
        self._sleepers = 0

    def __enter__(self) -> None:
        if not self._sleepers:
            self._watcher.start(_do_nothing)
        self._sleepers += 1

    def __exit__(self, *exc_info: object) -> None:
        self._sleepers -= 1
        if not self._sleepers:
            self._watcher.stop()


def _do_nothing() -> None:
    """Be what the watcher would call; nothing ever sends it."""


_by_hub: weakref.WeakKeyDictionary[Any, _KeepAlive] = weakref.WeakKeyDictionary()


def kept_waiting() -> _KeepAlive:
    """Return a block, to be entered any number of times, within which this thread's hub does not give up.

    Switches: no. From any greenlet.
    """
    hub = gevent.get_hub()
    return _by_hub.get(hub) or _by_hub.setdefault(hub, _KeepAlive(hub))
