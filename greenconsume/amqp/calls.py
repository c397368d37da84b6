"""Owns the life of one channel of a green link: what it can be used for, its calls, its errors, its end.

A call parks its greenlet until the reader brings the reply. A channel that the broker closed raises that
error where it is waited for, and opens itself again at its next use. Called by `channel_core`, which forwards
what the reader brings; nothing here runs user code.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import amqp
from amqp import spec
from amqp.exceptions import RecoverableConnectionError
from amqp.serialization import dumps
from gevent.event import Event

from greenconsume.amqp.frames import Sig
from greenconsume.amqp.link import Link
from greenconsume.amqp.replies import Replies, Reply
from greenconsume.amqp.waits import Waits
from greenconsume.stopping import Deadline, wait


class Life(Enum):
    """The uses that a channel is good for."""

    OPENING = "opening"  # `Open` was sent, or is about to be
    OPEN = "open"
    BROKEN = "broken"  # closed by the broker, or lost with its link; the next use opens it again
    CLOSING = "closing"  # `Close` was sent, or need not be
    CLOSED = "closed"  # its session has forgotten it


_CLOSE_METHODS = (spec.Channel.Close, spec.Channel.CloseOk)
#: A broker may send on after its `Close`; that is of the life that ended, whatever was opened since.
_HEEDED: dict[Life, tuple[Sig, ...]] = {
    Life.OPENING: (*_CLOSE_METHODS, spec.Channel.OpenOk),
    Life.BROKEN: _CLOSE_METHODS,
    Life.CLOSING: _CLOSE_METHODS,
    Life.CLOSED: _CLOSE_METHODS,
}


class Calls:
    """The calls of one channel, from its opening to its end.

    Attributes:
        life: What it can be used for.
        lives: How many of its lives have ended.
        link: The link that it is a channel of.
        channel_id: Its number on the link.
        untold: An error that the next use raises.
    """

    __slots__ = ("_closed", "_replies", "_waits", "channel_id", "life", "link", "lives", "untold")

    def __init__(self, link: Link, channel_id: int, waits: Waits) -> None:
        self.life = Life.OPENING
        self.link = link
        self.channel_id = channel_id
        self._waits = waits
        self._replies = Replies()
        self.lives = 0
        self.untold: BaseException | None = None
        self._closed: Event | None = None

    @property
    def is_closing(self) -> bool:
        """True if it was closed from here."""
        return self.life is Life.CLOSING or self.life is Life.CLOSED

    @property
    def is_over(self) -> bool:
        """True if it was closed from here, or its link is lost: nothing is left to be stopped."""
        return self.is_closing or self.link.failure is not None

    @property
    def is_lost(self) -> bool:
        """True if it cannot be used any more; one that the broker closed opens itself again."""
        return self.life is Life.CLOSED or self.link.failure is not None

    # -- calling --------------------------------------------------------------------------------------

    def write(self, sig: Sig, args: bytes = b"", content: amqp.Message | None = None) -> None:
        """Send one method, whatever the channel's life. Never switches."""
        self.link.write_method(self.channel_id, sig, args, content)

    def open(self) -> None:
        """Send `Open`; nobody needs to wait: what follows it is served after it. Never switches."""
        self.life = Life.OPENING
        self._replies.expect(Reply((spec.Channel.OpenOk,)))
        self.write(spec.Channel.Open, b"\0")

    def begin(self) -> None:
        """Raise what is yet to be told; open again what the broker closed. Never switches."""
        if self.untold is not None:
            error, self.untold = self.untold, None
            raise error
        if self.life is Life.OPEN:
            return
        if self.is_closing:
            raise RecoverableConnectionError("connection already closed")
        if self.life is Life.BROKEN and self.link.failure is None:
            self.open()

    def expect(self, method: Sig, on_reply: Callable[..., object]) -> None:
        """Have `on_reply` called with the reply to what was just sent; nobody waits. Never switches."""
        self._replies.expect(Reply((method,), on_reply))

    def wait(
        self,
        methods: tuple[Sig, ...],
        on_reply: Callable[..., object] | None,
        timeout: float | None,
        undo: Callable[..., object] | None,
    ) -> Reply:
        """Park until the reader brings one of the replies `methods`; see `Channel.wait`."""
        event, lives = Event(), self.lives
        reply = self._replies.expect(Reply(methods, on_reply, event))
        try:
            self._waits.wait_alone(event, timeout)
            if not reply.is_over:
                if self._waits.stop is not None:
                    self._waits.stop.check()
                raise self.no_reply()
        except BaseException:  # a kill and a gevent.Timeout too
            reply.give_up(undo if lives == self.lives else None)
            raise
        if reply.error is not None:
            raise reply.error
        return reply

    def no_reply(self) -> BaseException:
        """Return a new error that says that an answer did not come in time."""
        return TimeoutError(f"no reply from {self.link.uri} in time")

    # -- what the reader brings -------------------------------------------------------------------------

    def heeds(self, method: Sig) -> bool:
        """Return whether a method that comes now is of this life of the channel."""
        return self.life is Life.OPEN or method in _HEEDED[self.life]

    def answer(self, method: Sig, args: list[object]) -> None:
        """Hand a reply to the call that it answers."""
        self._replies.answer(method, args)

    def opened(self) -> None:
        """Take `OpenOk`."""
        self.life = Life.OPEN

    def awaits(self, method: Sig) -> bool:
        """Return whether a call by this method has no answer yet."""
        return self._replies.awaits(method)

    def tell_next_user(self, error: BaseException) -> None:
        """Have the next use raise `error`."""
        self.untold = error

    # -- the end --------------------------------------------------------------------------------------

    def end(self, life: Life, error: Callable[[], BaseException]) -> bool:
        """End this life: fail every call, and return whether anybody waited for one. Never switches."""
        self.life = life
        self.lives += 1
        return self._replies.fail(error)

    def say_close(self) -> None:
        """Send `Close`; `await_closed` waits for its answer. Never switches."""
        self._closed = Event()
        self.write(spec.Channel.Close, dumps("BsBB", (0, "", 0, 0)))

    def closed(self) -> None:
        """Note that the broker has closed it, too, or its link is lost. Never switches."""
        if self._closed is not None:
            self._closed.set()

    def await_closed(self, deadline: Deadline) -> None:
        """Wait for `CloseOk` up to `deadline`. Switches: yes, if `Close` was sent."""
        if self._closed is not None:
            wait(self._closed, deadline)

    @property
    def close_deadline(self) -> Deadline:
        """The deadline of a close that begins now."""
        return self._waits.close_deadline
