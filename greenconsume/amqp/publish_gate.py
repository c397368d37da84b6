"""Owns when a link takes what is published: not while the broker blocks it, nor while too much is unsent.

The link says what it queued, sent and was told; publishers wait here. Does no I/O.
"""

from __future__ import annotations

from amqp.exceptions import RecoverableConnectionError
from gevent.event import Event

from greenconsume.amqp.send_queue import Outgoing
from greenconsume.stopping import Deadline, StopSignal, wait_open

#: Publishers wait while more bytes than this are unsent, and those of a channel while a large body of it is.
HIGH_WATER = 1 << 20


class PublishGate:
    """The two gates that publishers wait at; an end of the link opens both."""

    __slots__ = ("_is_lost", "_outgoing", "_sending", "_unblocked", "_writable")

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._sending = 0
        self._is_lost = False
        self._writable, self._unblocked = Event(), Event()
        self._writable.set()
        self._unblocked.set()

    @property
    def is_blocked(self) -> bool:
        """True if the broker blocks this link's publishers."""
        return not self._unblocked.is_set()

    @property
    def has_unsent(self) -> bool:
        """True if something is still to be sent."""
        return bool(self._sending or self._outgoing)

    def block(self) -> None:
        """Have publishers wait: the broker said so."""
        self._unblocked.clear()

    def unblock(self) -> None:
        """Let publishers go on, as far as the broker is concerned."""
        self._unblocked.set()

    def note_sending(self, size: int) -> None:
        """Note how many bytes were handed to the socket, which has not taken them yet."""
        self._sending = size

    def note_sent(self) -> None:
        """Note that the socket took what was being sent, and let publishers go on that waited for it."""
        outgoing = self._outgoing
        relieved = outgoing.take_relief() or self._sending + outgoing.size > HIGH_WATER
        self._sending = 0
        if relieved and outgoing.size <= HIGH_WATER:
            self._writable.set()

    def note_lost(self) -> None:
        """Let everybody go: the link is lost."""
        self._is_lost = True
        self._writable.set()
        self._unblocked.set()

    def is_open(self, channel: int) -> bool:
        """Return whether `wait` would return at once. Never switches."""
        return bool(self._unblocked.is_set()) and not self._is_full(channel)

    def wait(self, deadline: Deadline, stop: StopSignal | None, channel: int | None) -> None:
        """Wait until both gates are open, or the link is lost; see `Link.wait_publishable`."""
        while not self._is_lost:
            if self.is_blocked:
                gate, why = self._unblocked, "the broker blocks publishers"
            elif self._is_full(channel):
                gate, why = self._writable, "the broker takes no more bytes"
                gate.clear()
            else:
                return
            if stop is not None:
                stop.check()
            if deadline.expired:
                raise RecoverableConnectionError(f"basic_publish: timed out: {why}")
            wait_open(gate, deadline, stop)

    def _is_full(self, channel: int | None) -> bool:
        unsent = self._sending + self._outgoing.size
        return unsent > HIGH_WATER or self._outgoing.holds_large(channel)
