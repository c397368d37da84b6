"""Owns the taking of messages: when a script runs for all who consume the same queues, and who gets what.

Channels of one link that consume the same queues in the same order share a feed. It takes as many messages
as they have room for and deals them out in turn; where there were fewer, the server says when one of the
queues changes (client tracking), and until then nothing is asked. It must never have two takes under way,
nor hold a message. Called by `channel`, and by its link's reader::

    RESTING  nobody has room           ── somebody has ──>  TAKING
    TAKING   the script is under way   ── it took all there was ──>  WAITING; there is more ──>  RESTING
    WAITING  the queues were empty     ── one changed ──>  TAKING, or PAUSING where others were faster
    PAUSING  for a moment              ── it is over ──>  TAKING
"""

from __future__ import annotations

import enum
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic
from typing import Any, Protocol

import gevent
from kombu.utils.scheduling import cycle_by_name

from greenconsume.redis.ledger import Ledger
from greenconsume.redis.link import Link
from greenconsume.redis.protocol import Push
from greenconsume.redis.take import Delivery, Take

#: One take moves so many messages at the most.
MAX_COUNT = 500
#: Who found nothing because others were faster waits up to so long, doubling, before the next time; and a
#: quarter less after it found something. More spares the server, less is sooner there: with 20 that wait, one
#: of them looks each other ms.
FIRST_PAUSE, MAX_PAUSE = 0.0005, 0.1
#: Seconds between two looks where the server does not say when a queue changes.
POLLING_INTERVAL = 1.0


class Taker(Protocol):
    """One that is dealt messages: a channel."""

    @property
    def room(self) -> int:
        """The number of messages that it wants."""

    @property
    def is_hungry(self) -> bool:
        """True once it has less at hand than it wants: it is time to take more."""

    def deliver(self, queue: str, deliveries: list[Delivery]) -> None:
        """Take messages of a queue. Never switches."""

    def on_feed_failed(self, error: BaseException) -> None:
        """Learn that nothing can be taken. Never switches."""


class FeedState(enum.Enum):
    """The states of a feed; see the module."""

    RESTING = enum.auto()
    TAKING = enum.auto()
    WAITING = enum.auto()
    PAUSING = enum.auto()


class Feed:
    """The takes for all that consume the same queues over one link.

    Args:
        feeds: Those of the link.
        queues: The names, in the order of the consumer.
        expires: The milliseconds after which a queue that nobody uses is gone, where it has any.
        strategy: kombu's `queue_order_strategy`.
    """

    def __init__(
        self, feeds: Feeds, queues: Sequence[str], expires: dict[str, int], strategy: object
    ) -> None:
        self.state = FeedState.RESTING
        self.takers: deque[Taker] = deque()
        self._feeds = feeds
        self._cycle = cycle_by_name(strategy)()
        self._cycle.update(queues)
        self._size = len(queues)
        self._expires = expires
        self._pause = self._waits_since = 0.0
        self._timer: Any = None
        self._leaving: dict[Taker, Callable[[], object]] = {}

    def want(self) -> None:
        """Learn that a taker has room. Never switches."""
        if self.state is FeedState.RESTING:
            self._take(after_call=False)

    def touch(self) -> None:
        """Learn that one of the queues changed. Never switches."""
        # While a take is under way nothing is new: what came before it in the socket it has seen.
        if self.state is FeedState.WAITING:
            # Whoever has waited for so long had nobody in its way.
            self._pause = max(0.0, self._pause - (monotonic() - self._waits_since))
            self._rest(random.uniform(0, self._pause))

    def awaits(self, taker: Taker, action: Callable[[], object]) -> bool:
        """Have a taker do something once it got what is under way; return False if nothing is.

        Never switches. It is not done if the taker has left meanwhile.
        """
        if self.state is FeedState.TAKING:
            self._leaving[taker] = action
        return self.state is FeedState.TAKING

    def _end_take(self) -> None:
        self.state = FeedState.RESTING
        leaving, self._leaving = self._leaving, {}
        for taker, action in leaving.items():
            if taker in self.takers:
                action()

    def _rest(self, seconds: float) -> None:
        if seconds <= 0:
            self._take(after_call=True)
            return
        self.state = FeedState.PAUSING
        self._timer = gevent.get_hub().loop.timer(seconds)
        self._timer.start(self._rested)

    def _rested(self) -> None:
        self.cancel_timer()
        if self.state is FeedState.PAUSING:
            self._take(after_call=True)

    def cancel_timer(self) -> None:
        """End a pause. Never switches."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()
            timer.close()

    # -- one take -----------------------------------------------------------------------------------

    def _take(self, after_call: bool) -> None:
        wanted = min(sum(taker.room for taker in self.takers), MAX_COUNT)
        link, ledger = self._feeds.link, self._feeds.ledger
        if wanted <= 0 or not link.connected or link.is_closing:
            self.state = FeedState.RESTING
            return
        self.state = FeedState.TAKING
        ledger.flush()  # what goes back is in its place before more is taken
        queues = self._cycle.consume(self._size)
        self._feeds.take(queues, self._expires, wanted, partial(self._answered, after_call))

    def _answered(self, after_call: bool, take: Take, reply: Any) -> None:
        if isinstance(reply, BaseException):
            self._failed(take, reply)
        else:
            self._took(take, reply, after_call)

    def _took(self, take: Take, reply: list[Any], after_call: bool) -> None:
        touched = []
        for key, queue, deliveries in take.held(reply):
            touched.append(key)
            self._deal(queue, deque(deliveries))
            self._cycle.rotate(queue)
        if touched:
            self._pause *= 0.75
        elif after_call:
            self._pause = min(max(self._pause * 2, FIRST_PAUSE), MAX_PAUSE)
        self._end_take()
        if not reply[0]:
            # What was popped is not watched any more, and there is more of it.
            self._feeds.touch(touched, but=self)
            if any(taker.is_hungry for taker in self.takers):
                self._take(after_call=False)
        elif self._feeds.link.greeting.tracks:
            self.state, self._waits_since = FeedState.WAITING, monotonic()
        elif self.takers and not self._feeds.link.is_closing:
            self._rest(self._feeds.polling_interval)

    def _deal(self, queue: str, left: deque[Delivery]) -> None:
        for taker, share in self._shares(left):
            taker.deliver(queue, share)
        if left:  # they stopped meanwhile
            self._feeds.ledger.give_back([field for field, _ in left])

    def _shares(self, left: deque[Delivery]) -> list[tuple[Taker, list[Delivery]]]:
        """Take from `left` what each taker has room for, in turn, one after the other."""
        if len(self.takers) == 1:
            taker = self.takers[0]
            count = min(max(0, taker.room), len(left))
            return [(taker, [left.popleft() for _ in range(count)])]
        shares: dict[Taker, list[Delivery]] = {}
        full_count = 0
        while left and full_count < len(self.takers):
            taker = self.takers[0]
            self.takers.rotate(-1)
            share = shares.setdefault(taker, [])
            if taker.room > len(share):
                share.append(left.popleft())
                full_count = 0
            else:
                full_count += 1
        return list(shares.items())

    def _failed(self, take: Take, error: BaseException) -> None:
        self.state = FeedState.RESTING
        take.doubt()  # what it moved before it failed goes back
        if self._feeds.link.failure is not None:
            return  # all who consume are told by their link
        for taker in list(self.takers):
            taker.on_feed_failed(error)
        self._end_take()


class Feeds:
    """All feeds of one link.

    Args:
        link: The link.
        ledger: Where is noted what was taken.
        polling_interval: Seconds between two looks, for a server that cannot wake us.
    """

    def __init__(
        self, link: Link, ledger: Ledger, polling_interval: float = POLLING_INTERVAL
    ) -> None:
        self.link = link
        self.ledger = ledger
        self.polling_interval = polling_interval
        self._feeds: dict[Any, Feed] = {}
        self._by_key: dict[bytes, list[Feed]] = {}
        self._under_way: set[Take] = set()
        link.on_push.append(self._on_push)
        link.on_end.append(self._close)
        ledger.on_returned.append(self.touch)

    def join(
        self, taker: Taker, queues: Sequence[str], expires: dict[str, int], strategy: object
    ) -> Feed:
        """Have a taker be dealt messages of these queues from now on. Never switches."""
        ident = (tuple(queues), tuple(sorted(expires.items())), strategy)
        feed = self._feeds.get(ident)
        if feed is None:
            feed = self._feeds[ident] = Feed(self, queues, expires, strategy)
            for key, _ in self.ledger.keyspace.keys_in_order(queues):
                self._by_key.setdefault(key.encode(), []).append(feed)
        feed.takers.append(taker)
        feed.want()  # one that waits already has seen the queues empty, and is told of the next message
        return feed

    def leave(self, taker: Taker, feed: Feed) -> None:
        """Deal it nothing any more. Never switches."""
        if taker in feed.takers:
            feed.takers.remove(taker)
        if not feed.takers:
            feed.cancel_timer()
            self._feeds = {ident: each for ident, each in self._feeds.items() if each is not feed}
            for key, feeds in list(self._by_key.items()):
                if feed in feeds:
                    feeds.remove(feed)
                    if not feeds:
                        del self._by_key[key]

    def take(
        self,
        queues: Sequence[str],
        expires: dict[str, int],
        count: int,
        on_reply: Callable[[Take, Any], object],
    ) -> None:
        """Begin a take; see `Take`. Never switches."""

        def answered(take: Take, reply: Any) -> None:
            self._under_way.discard(take)
            on_reply(take, reply)

        self._under_way.add(Take(self.link, self.ledger, queues, expires, count, answered))

    def recall(self) -> None:
        """Have what takes are under way put back, as the link closes without them. Never switches."""
        for take in self._under_way:
            take.recall()

    def touch(self, keys: Iterable[str], but: Feed | None = None) -> None:
        """Learn that we have changed these keys ourselves, of which the server tells others only."""
        for key in keys:
            for feed in self._by_key.get(key.encode(), ()):
                if feed is not but:
                    feed.touch()

    def _on_push(self, push: Push) -> None:
        if push[0] != b"invalidate":
            return
        keys = self._by_key if push[1] is None else push[1]  # None: the database was emptied
        for key in list(keys):
            for feed in list(self._by_key.get(key, ())):
                feed.touch()

    def _close(self) -> None:
        for feed in self._feeds.values():
            feed.cancel_timer()
        self._feeds.clear()
        self._by_key.clear()
        self.ledger.on_returned.remove(self.touch)


_feeds: weakref.WeakKeyDictionary[Link, Feeds] = weakref.WeakKeyDictionary()


def ensure_feeds(link: Link, ledger: Ledger, polling_interval: float = POLLING_INTERVAL) -> Feeds:
    """Return the feeds of a link, made when they are first asked for. Never switches."""
    found = _feeds.get(link)
    if found is None:
        found = _feeds[link] = Feeds(link, ledger, polling_interval)
    return found
