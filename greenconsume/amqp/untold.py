"""Owns who is still to be told of a lost link: who drains a kombu connection that another has replaced.

A greenlet that publishes with `retry=True`, or one of several that drain, has kombu open a new connection,
without the consumers of the old one; who drains it would wait for ever, with everything that used to come. It
keeps words and weak references, never a link or an error: these hold the connection that they would be kept
for. Called by the sessions, AMQP's and Redis's.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

from gevent import getcurrent
from kombu import Connection

from greenconsume.amqp.blame import LinkLostError


class _Debt:
    """The loss of a link, and who is to be told of it.

    Attributes:
        words: What is said.
        to_first: It is to be told to whoever drains first, if nothing consumes by then.
        drainers: The greenlets that drained the lost link's session, and have neither been told nor consumed
            anew; each is told.
    """

    __slots__ = ("drainers", "to_first", "words")

    def __init__(self, words: str, drainers: WeakSet[object]) -> None:
        self.words = words
        self.to_first = True
        self.drainers = drainers

    @property
    def is_paid(self) -> bool:
        """True if nobody is to be told any more."""
        return not (self.to_first or self.drainers)

    def pay(self, has_consumers: bool) -> bool:
        """Note that this greenlet drains; return whether it is to be told."""
        me = getcurrent()
        is_owed = me in self.drainers or (self.to_first and not has_consumers)
        self.to_first = False
        self.drainers.discard(me)
        return is_owed


_untold: WeakKeyDictionary[Connection, _Debt] = WeakKeyDictionary()


class Inheritance:
    """Keeps who drains a session, and what of an earlier one of its connection they are still to be told.

    Attributes:
        drainer: The greenlet that has drained it last: the session looks, at each message, if it is noted.
    """

    __slots__ = ("_client", "_debt", "_others", "drainer")

    def __init__(self, client: Connection) -> None:
        self._client = client
        self._debt = _untold.get(client)
        self.drainer: object = None
        self._others: WeakSet[object] | None = None

    @property
    def is_owed(self) -> bool:
        """True until whoever is to be told of an earlier loss has been told, or has begun anew."""
        return self._debt is not None

    @property
    def pending(self) -> bool:
        """True if whoever drains next may be told."""
        return self._debt is not None and self._debt.to_first

    def note_drainer(self) -> None:
        """Note that this greenlet drains the session."""
        if self.drainer is not None:
            if self._others is None:
                self._others = WeakSet()
            self._others.add(self.drainer)
        self.drainer = getcurrent()

    def note_consumer(self) -> None:
        """Note that this greenlet consumes over the session: it has begun anew."""
        if self._debt is not None:
            self._debt.drainers.discard(getcurrent())

    def bequeath(self, loss: BaseException) -> None:
        """Note that the session's link was lost, over which consumers ran."""
        earlier = _untold.get(self._client)
        drainers: WeakSet[object] = WeakSet(earlier.drainers if earlier is not None else ())
        drainers.update(self._others or ())
        if self.drainer is not None:
            drainers.add(self.drainer)
        _untold[self._client] = _Debt(str(loss), drainers)

    def settle(self, has_consumers: bool, is_lost: bool) -> None:
        """Raise what this greenlet is owed, once, unless the session is lost itself.

        Raises:
            LinkLostError: The link was lost, and another greenlet has replaced it.
        """
        debt = self._debt = _untold.get(self._client)
        if debt is None:
            return
        is_owed = debt.pay(has_consumers)
        if debt.is_paid:
            self._debt = None
            del _untold[self._client]
        if is_owed and not is_lost:
            raise LinkLostError(debt.words)


def note_closed(client: Connection) -> None:
    """Note that this greenlet closed a session itself: it is to be told of no loss."""
    debt = _untold.get(client)
    if debt is not None:
        debt.pay(has_consumers=True)
        if debt.is_paid:
            del _untold[client]
