"""Owns which calls of one channel wait for which replies, in the order of the calls.

Does no I/O and knows no channel, so that a model can be held against it. The channel says what it called,
and what came; nothing here switches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amqp import spec
from gevent.event import Event

from greenconsume.amqp.frames import Sig

#: Methods that answer a call; everything else has a listener.
REPLIES: frozenset[Sig] = frozenset(
    (
        spec.Channel.OpenOk,
        spec.Channel.FlowOk,
        spec.Exchange.DeclareOk,
        spec.Exchange.DeleteOk,
        spec.Exchange.BindOk,
        spec.Exchange.UnbindOk,
        spec.Queue.BindOk,
        spec.Queue.UnbindOk,
        spec.Queue.DeclareOk,
        spec.Queue.DeleteOk,
        spec.Queue.PurgeOk,
        spec.Basic.CancelOk,
        spec.Basic.ConsumeOk,
        spec.Basic.GetEmpty,
        spec.Basic.GetOk,
        spec.Basic.QosOk,
        spec.Basic.RecoverOk,
        spec.Tx.CommitOk,
        spec.Tx.RollbackOk,
        spec.Tx.SelectOk,
        spec.Confirm.SelectOk,
    )
)


class Reply:
    """The reply that one call waits for; it keeps its place when the caller gives up, so no other gets it.

    Attributes:
        methods: The methods that may answer it.
        on_reply: Called with the method and its arguments as soon as they come; must not switch.
        event: Set when it is over; None where nobody waits, or does any more.
        sig: The method that came.
        args: Its arguments.
        error: Why none will come.
    """

    __slots__ = ("args", "error", "event", "methods", "on_reply", "sig")

    def __init__(
        self,
        methods: tuple[Sig, ...],
        on_reply: Callable[..., object] | None = None,
        event: Event | None = None,
    ) -> None:
        self.methods = methods
        self.on_reply = on_reply
        self.event = event
        self.sig: Sig | None = None
        self.args: list[Any] = []
        self.error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """True if the reply came, or never will."""
        return self.sig is not None or self.error is not None

    def give_up(self, undo: Callable[..., object] | None) -> None:
        """Note that the caller waits no more; `undo` is called with the reply, if it still comes."""
        self.on_reply, self.event = undo, None
        if undo is not None and self.sig is not None:
            undo(self.sig, *self.args)

    def answer(self, sig: Sig, args: list[Any]) -> None:
        """Take the reply, and wake the caller."""
        self.sig, self.args = sig, args
        if self.on_reply is not None:
            self.on_reply(sig, *args)
        if self.event is not None:
            self.event.set()

    def fail(self, error: BaseException) -> None:
        """Wake the caller, who raises `error`."""
        self.error = error
        if self.event is not None:
            self.event.set()


class Replies:
    """The calls of one channel that are not answered yet, the oldest first."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[Reply] = []  # few at a time; an empty deque takes 700 bytes

    def expect(self, reply: Reply) -> Reply:
        """Put a call behind those that were made before it."""
        self._waiting.append(reply)
        return reply

    def answer(self, sig: Sig, args: list[Any]) -> None:
        """Hand a reply to the call that it answers; one that nobody asked for is dropped.

        A broker answers the calls of a channel in their order, so the first that fits is the one.
        """
        for reply in self._waiting:
            if sig in reply.methods:
                self._waiting.remove(reply)
                reply.answer(sig, args)
                return

    def awaits(self, method: Sig) -> bool:
        """Return whether a call by this method waits: AMQP numbers an answer one above what it answers."""
        answer = (method[0], method[1] + 1)
        return any(answer in reply.methods for reply in self._waiting)

    def fail(self, error: Callable[[], BaseException]) -> bool:
        """Fail every call, each with an error of its own; return whether a caller waited."""
        waiting, self._waiting = self._waiting, []
        told = any(reply.event is not None for reply in waiting)
        for reply in waiting:
            reply.fail(error())
        return told

    def __len__(self) -> int:
        return len(self._waiting)
