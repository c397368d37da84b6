"""Owns the warning that a message stays unsettled until the broker loses patience.

RabbitMQ closes the channel of a delivery that is unsettled for its `consumer_timeout`, 30 minutes unless it
is told otherwise, and delivers everything on that channel again. At four fifths of that the oldest
delivery of a channel is told of, once. One greenlet looks at all consumers of a hub, a few times per
deadline. Called by `drain`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event

from greenconsume.events import UnsettledTooLong, emit
from greenconsume.links.session import GreenSession, SessionChannel

#: The share of the deadline at which it is told.
SHARE = 0.8
#: How often it is looked, within a deadline.
LOOKS = 20


@dataclass(slots=True)
class _Entry:
    name: str
    deadline: float
    told: dict[SessionChannel, tuple[int, float]] = field(default_factory=dict)

    def look(self, session: GreenSession) -> None:
        """Tell of each channel's oldest delivery that is overdue, once."""
        now = monotonic()
        for channel in list(session.channels.values()):
            oldest = channel.oldest_unsettled
            if oldest is None or now - oldest[1] < SHARE * self.deadline:
                continue
            tag, since = oldest
            if self.told.get(channel) != oldest:  # the same tag of its next life came later
                self.told[channel] = oldest
                emit(UnsettledTooLong(self.name, tag, now - since, self.deadline))


class _Watch:
    """Looks at the sessions of one hub, while there are any."""

    def __init__(self) -> None:
        self._entries: dict[GreenSession, _Entry] = {}
        self._changed = Event()
        self._interval = 0.0
        self._running = False

    def add(self, session: GreenSession, name: str, deadline: float) -> None:
        self._entries[session] = _Entry(name, deadline)
        if not self._running:
            self._running = True
            gevent.spawn(self._run).name = "greenconsume overdue"
        elif deadline / LOOKS < self._interval:
            self._changed.set()

    def remove(self, session: GreenSession) -> None:
        self._entries.pop(session, None)
        if not self._entries:
            self._changed.set()

    def _run(self) -> None:
        while self._entries:
            self._changed.clear()
            self._interval = min(each.deadline for each in self._entries.values()) / LOOKS
            self._changed.wait(self._interval)
            for session, entry in list(self._entries.items()):
                entry.look(session)
        self._running = False


_watches: weakref.WeakKeyDictionary[Any, _Watch] = weakref.WeakKeyDictionary()


def watch(session: GreenSession, name: str, deadline: float) -> None:
    """Look after a session's channels from now on. Never switches.

    Args:
        session: A consumer's share of a link.
        name: The consumer's.
        deadline: The seconds after which its broker closes a channel.
    """
    _watches.setdefault(gevent.get_hub(), _Watch()).add(session, name, deadline)


def unwatch(session: GreenSession) -> None:
    """Look no more; harmless if it never did. Never switches."""
    found = _watches.get(gevent.get_hub())
    if found is not None:
        found.remove(session)
