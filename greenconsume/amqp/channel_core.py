"""Owns one channel as its link sees it: what the reader brings for it, and how each of its lives ends.

It puts together what a channel consists of: its calls, its deliveries, its publisher. The reader calls
`dispatch_method`, which runs no user code and never switches; kombu's interface to it is `channel`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from struct import Struct
from typing import Any, Protocol

import amqp
import gevent
from amqp import spec
from amqp.exceptions import (
    AMQPNotImplementedError,
    ChannelError,
    ConsumerCancelled,
    RecoverableChannelError,
    RecoverableConnectionError,
    error_for_code,
)
from amqp.serialization import dumps

from greenconsume.amqp.calls import Calls, Life
from greenconsume.amqp.channel_publisher import ChannelPublisher
from greenconsume.amqp.confirms import Confirms
from greenconsume.amqp.deliveries import Deliveries
from greenconsume.amqp.frames import Sig, decode_args, decode_message
from greenconsume.amqp.inbox import Inbox
from greenconsume.amqp.link import Link
from greenconsume.amqp.replies import REPLIES
from greenconsume.amqp.waits import Waits
from greenconsume.stopping import Deadline

Handlers = defaultdict[str, set[Callable[..., object]]]

_ack = Struct(">4xQB")
_CLOSED_FROM_HERE = (
    "a handler, or a library that it uses, closed the channel that its consumer consumes on: use a "
    "channel of its own there, message.channel.connection.client.channel()"
)
#: The listener to each method, by name; the methods that answer a call have none.
_LISTENERS: dict[Sig, str] = {
    spec.Channel.Close: "_on_close",
    spec.Channel.CloseOk: "_on_close_ok",
    spec.Channel.Flow: "_on_flow",
    spec.Channel.OpenOk: "_on_open_ok",
    spec.Basic.Cancel: "_on_cancel",
    spec.Basic.Deliver: "_on_deliver",
    spec.Basic.Return: "_on_return",
    spec.Basic.Ack: "_on_ack",
    spec.Basic.Nack: "_on_nack",
}


class ChannelOwner(Protocol):
    """A session, as its channels see it."""

    link: Link
    inbox: Inbox
    waits: Waits
    channels: Any  # the session's channels by id: what it closes

    def allocate(self, channel_id: int | None) -> int:
        """Return a free channel id, or this one if it is free."""
        ...

    def channel(self) -> Any:
        """Open another channel."""
        ...

    def note_consumer(self) -> None:
        """Note that this greenlet begins to consume."""
        ...


class ChannelCore:
    """One channel of a link, without kombu's interface.

    Attributes:
        calls: Its life, and its calls.
        deliveries: What it consumes, and settles.
        auto_decode: True if bodies that name an encoding are decoded, as py-amqp does.
        is_active: True if the broker lets it publish, by AMQP's flow control.
    """

    __slots__ = (
        "_events",
        "_publisher",
        "_waits",
        "_when_open",
        "auto_decode",
        "calls",
        "deliveries",
        "is_active",
    )

    def __init__(self, owner: ChannelOwner, channel_id: int, auto_decode: bool) -> None:
        self.calls = Calls(owner.link, channel_id, owner.waits)
        self.deliveries = Deliveries(self.calls, owner.inbox)
        self.auto_decode = auto_decode
        self.is_active = True
        self._waits = owner.waits
        self._publisher: ChannelPublisher | None = None
        self._events: Handlers | None = None
        self._when_open: Callable[[], object] | None = None
        owner.link.channels[channel_id] = self

    @property
    def publisher(self) -> ChannelPublisher:
        """The part that publishes."""
        if self._publisher is None:
            self._publisher = ChannelPublisher(self.calls, self.deliveries, self._waits)
        return self._publisher

    @property
    def unconfirmed(self) -> Confirms | None:
        """The publishes that are not confirmed; None if nobody awaits a confirm."""
        return self._publisher.confirms if self._publisher is not None else None

    @property
    def events(self) -> Handlers:
        """The callables that are told of `basic_return`, `basic_ack` and `basic_nack`."""
        if self._events is None:
            self._events = defaultdict(set)
        return self._events

    @property
    def has_handlers(self) -> bool:
        """True if anybody wants to be called for a return, or for a confirm."""
        return bool(self._events)

    def call_when_open(self, callback: Callable[[], object]) -> None:
        """Have `callback` called when the broker has opened the channel; at once if it has."""
        if self.calls.life is Life.OPEN:
            callback()
        else:
            self._when_open = callback

    # -- what the reader brings -------------------------------------------------------------------------

    def dispatch_method(
        self, method_sig: Sig, payload: bytes, content: amqp.Message | None
    ) -> None:
        """Take one method from the reader: to its listener, and to the call that waits for it."""
        if not self.calls.heeds(method_sig):
            return
        if method_sig == spec.Basic.Ack and len(payload) == _ack.size:
            delivery_tag, bits = _ack.unpack(payload)  # one for each message that is published
            self._on_ack(delivery_tag, bool(bits & 1))
            return
        method = amqp.Channel._METHODS.get(method_sig)
        if method is None:
            raise AMQPNotImplementedError(f"Unknown AMQP method {method_sig!r}")
        args = decode_args(method.args, payload) if method.args else []
        if method.content:
            if method_sig != spec.Basic.Deliver:
                decode_message(content, self.auto_decode)
            args.append(content)
        listener = _LISTENERS.get(method_sig)
        if listener is not None:
            getattr(self, listener)(*args)
        if method_sig in REPLIES:
            self.calls.answer(method_sig, args)

    def _on_open_ok(self) -> None:
        self.calls.opened()
        self.is_active = True
        callback, self._when_open = self._when_open, None
        if callback is not None:
            callback()

    def _on_flow(self, is_active: bool) -> None:
        self.is_active = is_active
        self.calls.write(spec.Channel.FlowOk, dumps("b", (is_active,)))

    def _on_close(self, reply_code: int, reply_text: str, class_id: int, method_id: int) -> None:
        self.calls.write(spec.Channel.CloseOk)
        if self.calls.is_closing:
            return
        method = (class_id, method_id)
        error = partial(error_for_code, reply_code, reply_text, method, ChannelError)
        is_consuming = self.deliveries.consumers.has_running
        was_told = self._end_life(Life.BROKEN, error)
        if is_consuming or not was_told:
            self._tell(error(), is_consuming)

    def _on_close_ok(self) -> None:
        self.calls.link.forget(self.calls.channel_id)
        self.calls.closed()

    def _on_deliver(self, *args: Any) -> None:
        *fields, message = args
        self.deliveries.take((*fields, message.encoded, message.body or b""))

    def _on_cancel(self, consumer_tag: str) -> None:
        is_consuming = self.deliveries.consumers.has_running
        if not self.deliveries.cancelled(consumer_tag):
            text = f"the broker cancelled consumer {consumer_tag!r}: its queue was deleted or moved"
            self._tell(ConsumerCancelled(text, spec.Basic.Cancel), is_consuming)

    def _on_ack(self, delivery_tag: int, multiple: bool) -> None:
        if self._publisher is not None:
            self._publisher.acked(delivery_tag, multiple)
        if self._events:
            self._notify("basic_ack", delivery_tag, multiple)

    def _on_nack(self, delivery_tag: int, multiple: bool) -> None:
        if self._publisher is not None:
            self._publisher.nacked(delivery_tag, multiple)
        self._notify("basic_nack", delivery_tag, multiple)

    def _on_return(
        self, code: int, text: str, exchange: str, routing_key: str, message: amqp.Message
    ) -> None:
        error = error_for_code(code, text, spec.Basic.Return, ChannelError)
        confirm = None
        if self._publisher is not None:
            confirm = self._publisher.find_returned(exchange, routing_key, message)
        if self._notify("basic_return", error, exchange, routing_key, message):
            return
        if confirm is not None:
            confirm.note_return(error)
        else:
            self._tell(error, self.deliveries.consumers.has_running)

    def _notify(self, event: str, *args: object) -> bool:
        # User code: in a greenlet of its own, because this is the reader's.
        handlers = tuple(self._events.get(event, ())) if self._events is not None else ()
        for handler in handlers:
            gevent.spawn(handler, *args)
        return bool(handlers)

    def _tell(self, error: BaseException, is_consuming: bool) -> None:
        """Have `error` raised where the channel is drained, or else at its next use."""
        if is_consuming:
            self.deliveries.put_error(error)
        else:
            self.calls.tell_next_user(error)

    # -- the end of a life --------------------------------------------------------------------------------

    @property
    def has_published(self) -> bool:
        """True if anything was published on it."""
        return self._publisher is not None

    @property
    def is_broken(self) -> bool:
        """True if the broker closed it, or its link is gone; its next use opens it again."""
        return self.calls.life is Life.BROKEN

    def on_link_lost(
        self, lost: Callable[[], BaseException], own: BaseException | None = None
    ) -> None:
        """End with the link. Never switches.

        Args:
            lost: Makes the error that says that the link is gone.
            own: What the broker closed the connection with, if its session is to blame: its calls raise it,
                as no waiting mends that.
        """
        life = self.calls.life if self.calls.is_closing else Life.BROKEN
        if own is not None:
            self.calls.end(life, lambda: own)
        self._end_life(life, lost)
        self.calls.closed()

    def close_from_here(self) -> None:
        """Close as a user of the channel asks for it. Never switches.

        A consumer that consumes on it gets an error where it is drained; otherwise it would wait for ever.
        """
        is_consuming = self._waits.attend is not None and self.deliveries.consumers.has_running
        self.ask_to_close()
        if is_consuming:
            self.deliveries.put_error(RecoverableChannelError(_CLOSED_FROM_HERE))

    def ask_to_close(self) -> None:
        """Send `Close` if there is something to close. Never switches."""
        calls = self.calls
        if calls.is_closing:
            return
        is_live, was_broken = calls.link.failure is None, calls.life is Life.BROKEN
        if is_live and not was_broken:
            self.deliveries.flush()
        self._end_life(Life.CLOSING, _closed)
        if is_live and was_broken:
            calls.link.forget(calls.channel_id)
        elif is_live:
            calls.say_close()

    def await_closed(self, deadline: Deadline) -> None:
        """Wait for `CloseOk` up to `deadline`. Switches: yes, if `Close` was sent."""
        self.calls.await_closed(deadline)

    def collect(self) -> None:
        """Be of no further use. Never switches."""
        self.calls.end(Life.CLOSED, _closed)
        self._events = None

    def _end_life(self, life: Life, error: Callable[[], BaseException]) -> bool:
        """End this life of all parts; return whether somebody waited, and was told."""
        had_unconfirmed = self._publisher is not None and self._publisher.end(error)
        had_calls = self.calls.end(life, error)
        self.deliveries.end()
        return had_unconfirmed or had_calls


def _closed() -> BaseException:
    error: BaseException = RecoverableConnectionError("the channel was closed")
    return error
