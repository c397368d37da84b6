"""Owns what was delivered to one session and waits to be handed out, and which consumers are paused for it.

The reader puts in, through the channels, and never waits; whoever drains the session takes out. A consumer
that nothing else bounds is paused when too much waits here, so that it cannot fill the memory, nor hold up
its neighbours on the link. Does no I/O: a channel says how its consumer goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from gevent.event import Event

from greenconsume.amqp.frames import Delivery
from greenconsume.stopping import Deadline, StopSignal, wait

#: A consumer without a limit of its own is paused when this many deliveries wait in its session, and
#: goes on when RESUME_AT are left.
PAUSE_AT = 1000
RESUME_AT = 250

#: A delivery, the tag of a consumer that the broker cancelled, or an error of a channel.
Item = Delivery | str | BaseException
_Item = TypeVar("_Item", bound=Item)
#: Stands for all inboxes into which nothing was put yet: an empty deque takes 760 bytes.
_NOTHING: deque[Any] = deque(maxlen=0)


class Inbox:
    """The items of one session, in the order they came, each with what takes it.

    Attributes:
        entries: The owner of each item, the item, and the callback that takes it; to be read only.
        paused: The owner and tag of each paused consumer, and what resumes it.
        given_back_count: How many deliveries went back to their queue because no callback took them.
        screen: Sees what is delivered again before it is queued, and returns whether it takes it over; it
            must not switch. None: nobody does.
    """

    __slots__ = ("_arrival", "entries", "given_back_count", "paused", "screen")

    def __init__(self) -> None:
        self.entries: deque[tuple[object, Item, Callable[..., object]]] = _NOTHING
        self.paused: dict[tuple[object, str], Callable[[], object]] = {}
        self.given_back_count = 0
        self.screen: Callable[[Delivery], bool] | None = None
        self._arrival = Event()

    def put(self, owner: object, item: _Item, callback: Callable[[_Item], object]) -> None:
        """Queue one item; whoever drains next calls `callback(item)`. Never switches."""
        entries = self.entries
        if entries is _NOTHING:
            entries = self.entries = deque()
        entries.append((owner, item, callback))
        if not self._arrival.is_set():
            self._arrival.set()

    def have_screened(self, screen: Callable[[Delivery], bool] | None) -> None:
        """Have `screen` see what is delivered again before it is queued. Never switches."""
        self.screen = screen

    def hand_out(self) -> bool:
        """Give the oldest item to its callback, in this greenlet; return False if nothing waits.

        Switches: as the callback does.
        """
        if not self.entries:
            return False
        _, item, callback = self.entries.popleft()
        if self.paused:
            self.resume()
        callback(item)
        return True

    def wait(self, deadline: Deadline, stop: StopSignal | None) -> None:
        """Wait until something was put, or the deadline, the stop signal or `wake`. Switches: yes."""
        self._arrival.clear()
        wait(self._arrival, deadline, stop)

    @contextmanager
    def announced_to(self, wake: Callable[[], object]) -> Iterator[None]:
        """Have `wake` called when something is put meanwhile, or there is other news. Never switches."""

        def announce(_arrival: Event) -> None:
            wake()

        self._arrival.clear()
        self._arrival.rawlink(announce)
        try:
            yield
        finally:
            self._arrival.unlink(announce)

    def wake(self) -> None:
        """Have everybody who waits look again."""
        self._arrival.set()

    def take_back(self, owner: object, wanted: Callable[[Delivery], bool]) -> list[Delivery]:
        """Remove and return the deliveries of one owner that are `wanted`. Never switches."""
        kept, taken = [], []
        for entry in self.entries:
            item = entry[1]
            if entry[0] is owner and isinstance(item, tuple) and wanted(item):
                taken.append(item)
            else:
                kept.append(entry)
        if taken:
            self.entries.clear()
            self.entries.extend(kept)
        return taken

    def count_given_back(self) -> None:
        """Count a delivery that went back to its queue."""
        self.given_back_count += 1

    @property
    def is_crowded(self) -> bool:
        """True if a consumer that nothing else bounds is to be paused."""
        return len(self.entries) > PAUSE_AT

    def pause(self, owner: object, consumer_tag: str, resume: Callable[[], object]) -> None:
        """Remember a consumer that was paused, and what makes it go on. Never switches."""
        self.paused[owner, consumer_tag] = resume

    def resume(self) -> None:
        """Have every paused consumer go on, if not more than RESUME_AT items wait. Never switches."""
        if len(self.entries) <= RESUME_AT:
            paused, self.paused = self.paused, {}
            for resume in paused.values():
                resume()

    def forget_paused(self, owner: object, consumer_tag: str | None = None) -> None:
        """Do not resume this consumer, or any of its owner. Never switches."""
        for each in list(self.paused):
            if each[0] is owner and consumer_tag in (None, each[1]):
                del self.paused[each]

    def clear(self) -> None:
        """Forget everything: the session is over."""
        self.entries.clear()
        self.paused.clear()
        self._arrival.set()
