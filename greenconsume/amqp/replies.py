"""Owns the life of a channel of a green link: its calls and their replies, its errors, its end.

Built on kombu's py-amqp `Channel`: what is declared, bound or consumed is encoded there. Here is what
waits: a call parks its greenlet until the reader brings the reply, in the order of the calls. The reader
calls `dispatch_method`, which runs no user code and never switches. `publishing` and `channel` build on it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqp import spec
from amqp.exceptions import (
    AMQPNotImplementedError,
    ChannelError,
    RecoverableConnectionError,
    error_for_code,
)
from amqp.serialization import dumps
from gevent.event import Event
from kombu.transport import pyamqp

from greenconsume.amqp.frames import decode_args, decode_body
from greenconsume.amqp.properties import decode_properties
from greenconsume.stopping import Deadline, wait

if TYPE_CHECKING:
    from greenconsume.amqp.session import Session

_CLOSING = (spec.Channel.Close, spec.Channel.CloseOk)
_OPENING = (*_CLOSING, spec.Channel.OpenOk)
#: Methods that answer a call; everything else has a listener.
_REPLIES = frozenset(
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
    """What one call waits for; kept in line after its caller gave up, so that its reply meets nobody."""

    __slots__ = ("args", "error", "event", "has_caller", "methods", "on_reply", "sig")

    def __init__(
        self,
        methods: tuple[tuple[int, int], ...],
        on_reply: Callable[..., object] | None = None,
    ) -> None:
        self.methods = methods
        self.on_reply = on_reply
        self.event = Event()
        self.sig: tuple[int, int] | None = None
        self.args: list[Any] = []
        self.error: BaseException | None = None
        self.has_caller = False


class CallingChannel(pyamqp.Channel):  # type: ignore[misc]  # kombu is untyped
    """A channel that any number of greenlets may call at once.

    A channel that the broker closed raises that error where it is waited for, and opens itself again
    at its next use, as py-amqp's does; its consumers do not come back by themselves.

    Attributes:
        epoch: Counts the lives of the channel; a message belongs to one of them.
    """

    is_closing: bool

    def __init__(
        self,
        connection: Session,
        channel_id: int | None = None,
        auto_decode: bool = True,
        on_open: Callable[[Any], object] | None = None,
    ) -> None:
        self._session = connection
        self._link = connection.link
        self.epoch = 0
        self._replies: deque[Reply] = deque()
        self._error: BaseException | None = None
        self._broken = False
        self._done: Event | None = None
        super().__init__(connection, channel_id, auto_decode=auto_decode, on_open=on_open)
        self.returned_messages = None  # nothing reads it, and a thread-safe queue is dear
        self._link.channels[self.channel_id] = self

    # -- calls --------------------------------------------------------------------------------------

    def send_method(
        self,
        sig: tuple[int, int],
        format: str | None = None,
        args: tuple[Any, ...] | None = None,
        content: Any = None,
        wait: Any = None,
        callback: Callable[[], object] | None = None,
        returns_tuple: bool = False,
    ) -> Any:
        """Send one method; with `wait`, park until its reply. Switches only with `wait`.

        Raises:
            LinkLostError: The link is gone.
            RecoverableConnectionError: The channel was closed.
            amqp.exceptions.ChannelError: The broker closed the channel.
        """
        self._open_again()
        self.flush()
        self._link._write_frames(
            1, self.channel_id, sig, dumps(format, args) if format else b"", content
        )
        if callback is not None:
            callback()
        return self.wait(wait, returns_tuple=returns_tuple) if wait else None

    def _open_again(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self.connection is None or self.is_closing:
            raise RecoverableConnectionError("connection already closed")
        if self._broken and self._link.failure is None:
            # Nobody needs to wait: what follows the Open is served after it.
            self._broken = False
            self._replies.append(Reply((spec.Channel.OpenOk,)))
            self._link._write_method(self.channel_id, spec.Channel.Open, b"\0")

    def flush(self) -> None:
        """Queue what waits to be merged, before something that must come after it. Never switches."""

    def wait(
        self,
        method: Any,
        callback: Callable[..., object] | None = None,
        timeout: float | None = None,
        returns_tuple: bool = False,
        undo: Callable[..., object] | None = None,
    ) -> Any:
        """Park until the reader brings one of the replies `method`; see `send_method`.

        Args:
            method: A method, or a list of them.
            callback: Called by the reader with the reply; it must not switch.
            timeout: Seconds; by default the link's `call_timeout`.
            returns_tuple: Return all arguments of the reply, not the first.
            undo: Called, in the place of `callback`, with a reply whose caller gave up.

        Raises:
            TimeoutError: No reply in time. One that comes later is dropped.
            StoppedError: The session's stop signal was set while it was set up.
        """
        methods = tuple(method) if isinstance(method, list) else (method,)
        reply, epoch = Reply(methods, callback), self.epoch
        reply.has_caller = True
        self._replies.append(reply)
        try:
            self._park(reply.event, timeout)
        except BaseException:  # a kill and a gevent.Timeout too
            reply.on_reply, reply.has_caller = undo, False
            if undo is not None and reply.sig is not None and epoch == self.epoch:
                undo(reply.sig, *reply.args)
            raise
        if reply.error is not None:
            raise reply.error
        if returns_tuple:
            return reply.args
        return reply.args[0] if reply.args else None

    def _park(self, event: Event, timeout: float | None) -> None:
        if not self._session.waits.wait_for_reply(event, timeout):
            raise TimeoutError(f"no reply from {self._link.uri} in time")

    # -- what the reader calls ------------------------------------------------------------------------

    def dispatch_method(self, method_sig: tuple[int, int], payload: bytes, content: Any) -> None:
        """Take one method from the reader: to its listener, or to the call that waits for it.

        A broker may send on after its `Close`; that is of the life that ended, whatever was opened since.
        """
        if not self.is_open and method_sig not in (_CLOSING if self.is_closing else _OPENING):
            return
        method = self._METHODS.get(method_sig)
        if method is None:
            raise AMQPNotImplementedError(f"Unknown AMQP method {method_sig!r}")
        args = decode_args(method.args, payload) if method.args else []
        if method.content:
            if method_sig != spec.Basic.Deliver:
                self._decode(content)
            args.append(content)
        listener = self._callbacks.get(method_sig)
        if listener is not None:
            listener(*args)
        if method_sig in _REPLIES:
            self._answer(method_sig, args)

    def _decode(self, content: Any) -> None:
        try:
            content.properties = decode_properties(content.encoded)
        except Exception:  # its publisher's fault, such as a date in the year 55000, not the link's
            content.properties, content.undecodable = {}, sys.exc_info()
        if self.auto_decode:
            content.body = decode_body(content.properties, content.body)

    def _answer(self, method_sig: tuple[int, int], args: list[Any]) -> None:
        # The broker answers a channel's calls in their order, so the first that fits is the one.
        for reply in self._replies:
            if method_sig in reply.methods:
                self._replies.remove(reply)
                reply.sig, reply.args = method_sig, args
                if reply.on_reply is not None:
                    reply.on_reply(method_sig, *args)
                reply.event.set()
                return

    def _on_close(self, reply_code: int, reply_text: str, class_id: int, method_id: int) -> None:
        self._link._write_method(self.channel_id, spec.Channel.CloseOk)
        if not self.is_closing:
            method = (class_id, method_id)
            self._broken = True
            self._break(lambda: error_for_code(reply_code, reply_text, method, ChannelError))

    def _break(self, error: Callable[[], BaseException]) -> None:
        """End this life of the channel: tell whoever waits for it, or else whoever uses it next."""
        consuming, waiting = self._is_consuming, self._fail_waiters(error)
        self._end_epoch()
        if consuming:
            self._session.inbox.put(self, error(), _raise)
        elif not waiting:
            self._error = error()

    def _tell(self, error: BaseException) -> None:
        """Have `error` raised where the channel is drained, or else at its next use."""
        if self._is_consuming:
            self._session.inbox.put(self, error, _raise)
        else:
            self._error = error

    def _fail_waiters(self, error: Callable[[], BaseException]) -> bool:
        replies = list(self._replies)
        self._replies.clear()
        for reply in replies:
            reply.error = error()
            reply.event.set()
        return any(reply.has_caller for reply in replies)

    @property
    def _is_consuming(self) -> bool:
        return False

    def _end_epoch(self) -> None:
        self.epoch += 1
        self.is_open = False

    def on_link_lost(self) -> None:
        """The link is gone, and this channel with it. Never switches."""
        self._fail_waiters(self._link.lost)
        self._end_epoch()
        if self._done is not None:
            self._done.set()

    # -- the end --------------------------------------------------------------------------------------

    def close(self, *args: Any, **kwargs: Any) -> None:
        """Close the channel; what it has not settled goes back to its queues. Idempotent.

        Switches: yes, for `close_timeout` at the most. Never raises for what the broker does.
        """
        if self.connection is None:
            return
        self.ask_to_close()
        self.await_closed(self._session.waits.close_deadline)

    def ask_to_close(self) -> None:
        """Send `Close` if there is something to close. Never switches."""
        if self.connection is None or self.is_closing:
            return
        was_open = not self._broken and self._link.failure is None
        if was_open:
            self.flush()
        self.is_closing = True
        self._fail_waiters(_closed)
        channel_id = self.channel_id
        self._end_epoch()
        if was_open:
            self._done = Event()
            args = dumps("BsBB", (0, "", 0, 0))
            self._link._write_method(channel_id, spec.Channel.Close, args)
        elif self._link.failure is None:
            self._link.forget(channel_id)

    def await_closed(self, deadline: Deadline) -> None:
        """Wait for `CloseOk` up to `deadline`; its id stays taken until the broker has answered."""
        if self._done is not None:
            wait(self._done, deadline)
        self.collect()

    def _on_close_ok(self) -> None:
        if self.channel_id is not None:
            self._link.forget(self.channel_id)
        if self._done is not None:
            self._done.set()

    def collect(self) -> None:
        """Leave the session. Never switches."""
        self.is_open = False
        if self._session.channels.get(self.channel_id) is self:  # else its id has another owner
            del self._session.channels[self.channel_id]
        self.connection = None
        self.events.clear()


def _raise(error: BaseException) -> None:
    raise error


def _closed() -> BaseException:
    error: BaseException = RecoverableConnectionError("the channel was closed")
    return error
