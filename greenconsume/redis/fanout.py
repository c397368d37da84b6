"""Owns what listens to fanout exchanges: one more connection for all who share a link, if one of them does.

A publication reaches who listens at that moment, and is in no queue. So nothing here can be given back, and
what a slow consumer lets pile up beyond a bound is dropped, with a line in the log. Called by `channel`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol

from gevent.event import Event
from gevent.lock import BoundedSemaphore

from greenconsume.redis.link import Link
from greenconsume.redis.protocol import Push
from greenconsume.redis.subscription import Subscription
from greenconsume.stopping import Deadline, StopSignal, wait_open

logger = logging.getLogger("greenconsume.redis")

#: How much may wait for one channel.
MAX_WAITING = 10000
_CALL_TIMEOUT = 10.0
#: What the names of such deliveries begin with.
PREFIX = "fanout."
_numbers = count(1)


class Listener(Protocol):
    """A channel, as what it listens by sees it."""

    waiting: int

    def hear(self, subscription: Subscription, field: str, raw: bytes) -> None:
        """Have what was published wait for `drain_events`."""


class Fanout:
    """The listeners, by topic.

    Args:
        main: The link whose users these are; it is lost if this one's connection is.
        dialler: Makes a redis-py connection to the same server.
    """

    def __init__(self, main: Link, dialler: Callable[[int], Any]) -> None:
        self._main = weakref.ref(main)
        self._dialler = dialler
        self._link: Link | None = None
        self._opening = BoundedSemaphore(1)
        self._listeners: dict[str, list[tuple[Listener, Subscription]]] = {}
        self._confirmed: dict[str, Event] = {}
        main.on_end.append(self._close)

    def listen(
        self, topic: str, channel: Listener, subscription: Subscription, stop: StopSignal | None
    ) -> None:
        """Deliver what is published to a topic from now on. Switches: yes, for a new topic.

        Raises:
            redis.exceptions.RedisError: The server cannot be reached, or does not let us.
        """
        listeners = self._listeners.setdefault(topic, [])
        listeners.append((channel, subscription))
        if topic in self._confirmed and self._confirmed[topic].is_set():
            return
        confirmed = self._confirmed.setdefault(topic, Event())
        try:
            link = self._open()
            link.say(("PSUBSCRIBE", topic))
            wait_open(confirmed, Deadline(_CALL_TIMEOUT), stop)
            if stop is not None:
                stop.check()
        except BaseException:  # a kill too: nobody listens then
            self.leave(topic, subscription)
            raise

    def leave(self, topic: str, subscription: Subscription) -> None:
        """Deliver nothing more to a consumer. Never switches."""
        left = [each for each in self._listeners.get(topic, ()) if each[1] is not subscription]
        if left:
            self._listeners[topic] = left
        elif self._listeners.pop(topic, None) is not None:
            self._confirmed.pop(topic, None)
            if self._link is not None and self._link.connected:
                self._link.say(("PUNSUBSCRIBE", topic))

    def _open(self) -> Link:
        with self._opening:
            main = self._main()
            if self._link is None and main is not None:
                if main.failure is not None:
                    raise main.lost()
                protocol = main.greeting.protocol
                link = Link(
                    main.uri, self._dialler, main.heartbeat, subscribes=True, protocol=protocol
                )
                link.connect()
                link.on_push.append(self._on_push)
                link.on_end.append(self._lost)
                self._link = link
                if main.failure is not None:
                    self._close()
                    raise main.lost()
            assert self._link is not None
            return self._link

    def _on_push(self, push: Push) -> None:
        kind = push[0]
        if kind == b"pmessage":
            for channel, subscription in self._listeners.get(push[1].decode(), ()):
                if channel.waiting < MAX_WAITING:
                    channel.hear(subscription, f"{PREFIX}{next(_numbers)}", push[3])
                elif channel.waiting == MAX_WAITING:
                    logger.error(
                        "more than %d publications wait for a consumer of %r: others are dropped",
                        MAX_WAITING,
                        subscription.queue,
                    )
        elif kind == b"psubscribe":
            confirmed = self._confirmed.get(push[1].decode())
            if confirmed is not None:
                confirmed.set()

    def _lost(self) -> None:
        main, link = self._main(), self._link
        if main is not None and link is not None and link.failure is not None:
            main.fail(link.failure)

    def _close(self) -> None:
        if self._link is not None:
            self._link.close(deadline=Deadline(0))
        for confirmed in self._confirmed.values():
            confirmed.set()


_fanouts: weakref.WeakKeyDictionary[Link, Fanout] = weakref.WeakKeyDictionary()


def ensure_fanout(link: Link, dialler: Callable[[int], Any]) -> Fanout:
    """Return what listens for those who share a link. Never switches."""
    found = _fanouts.get(link)
    if found is None:
        found = _fanouts[link] = Fanout(link, dialler)
    return found
