"""Owns publishing on a channel of a green link: confirms by delivery tag, returned messages, back-pressure.

Any number of greenlets publish on one channel at once; each waits for the confirm of its own message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any

import amqp
import gevent
from amqp import spec
from amqp.exceptions import (
    ChannelError,
    MessageNacked,
    RecoverableConnectionError,
    error_for_code,
)
from gevent.event import Event

from greenconsume.amqp.frames import encode_publish
from greenconsume.amqp.replies import CallingChannel
from greenconsume.stopping import Deadline, StopSignal

_ack = Struct(">4xQB")

#: Where a message went, and its id: what the broker repeats when it returns one.
_Key = tuple[str, str, Any]


class Confirm:
    """A published message, until the broker has answered for it: confirmed, nacked or returned it.

    Any number of greenlets may wait for it, at any time.

    Attributes:
        message: The `amqp.Message`, and where it went: `exchange`, `routing_key`, `mandatory`, `immediate`.
        ready: Whether there is an answer.
        error: The answer, if the message was not confirmed.
        returned: Why the broker returned it; its confirm still follows.
    """

    __slots__ = (
        "_event",
        "error",
        "exchange",
        "immediate",
        "mandatory",
        "message",
        "ready",
        "returned",
        "routing_key",
    )

    def __init__(
        self,
        message: amqp.Message,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
    ) -> None:
        self.message = message
        self.exchange = exchange
        self.routing_key = routing_key
        self.mandatory = mandatory
        self.immediate = immediate
        self.ready = False
        self.error: BaseException | None = None
        self.returned: BaseException | None = None
        self._event: Event | None = None

    @property
    def event(self) -> Event:
        """Set when there is an answer."""
        if self._event is None:  # made for those who wait alone: most are confirmed in flight
            self._event = Event()
            if self.ready:
                self._event.set()
        return self._event

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the broker's answer.

        Raises:
            MessageNacked: The broker could not take it.
            amqp.exceptions.ChannelError: It was mandatory and came back, or its channel was closed.
            LinkLostError: The link is gone: it may or may not have arrived.
            TimeoutError: No answer within `timeout` seconds; it may still come.

        Switches: yes, unless there is an answer.
        """
        if not self.ready and not self.event.wait(timeout):
            raise TimeoutError(f"the broker has not confirmed a message within {timeout} s")
        if self.error is not None:
            raise self.error

    def answer(self, error: BaseException | None) -> None:
        """Take the answer, from the channel; called once, by the reader. Never switches."""
        self.ready = True
        self.error = error
        if self._event is not None:
            self._event.set()


class PublishingChannel(CallingChannel):
    """A channel that publishes, for any number of greenlets at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._confirms: dict[int, Confirm] = {}
        self._published = 0  # the last delivery tag
        self._answered = 0  # the tag up to which every one has its answer
        self._mandatory: dict[_Key, list[Confirm]] = {}
        super().__init__(*args, **kwargs)

    def _fail_waiters(self, error: Callable[[], BaseException]) -> bool:
        confirms = list(self._confirms.values())
        self._confirms.clear()
        self._mandatory.clear()
        for confirm in confirms:
            confirm.answer(error())
        return super()._fail_waiters(error) or bool(confirms)

    def _end_epoch(self) -> None:
        super()._end_epoch()
        self._confirm_selected = False
        self._published = self._answered = 0

    # -- publishing -------------------------------------------------------------------------------------

    def _basic_publish(
        self,
        msg: amqp.Message,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
    ) -> None:
        """As py-amqp's `basic_publish`; waits only while the broker blocks, or `HIGH_WATER` is unsent."""
        if self.connection is None:
            raise RecoverableConnectionError("basic_publish: connection closed")
        self._wait_publishable(timeout)
        self._write_publish(msg, exchange, routing_key, mandatory, immediate)

    basic_publish = _basic_publish

    def _wait_publishable(self, timeout: float | None) -> None:
        self.wait_publishable(Deadline(timeout), self._session.waits.publishing)

    def basic_publish_confirm(
        self, msg: amqp.Message, exchange: str = "", routing_key: str = "", **kwargs: Any
    ) -> None:
        """Publish, and wait for the confirm of this very message, by its delivery tag.

        Raises:
            MessageNacked: The broker could not take it.
            amqp.exceptions.ChannelError: It was mandatory and came back, and nobody listens for returns.
            TimeoutError: No confirm in time: it may or may not have arrived.

        Switches: yes. Any number of greenlets at once.
        """
        confirm_timeout = kwargs.pop("confirm_timeout", None) or kwargs.get("timeout")
        confirm = self.publish_nowait(msg, exchange, routing_key, **kwargs)
        tag = self._published  # nothing switched since it was written
        try:
            self._await_confirm(confirm, confirm_timeout)
        finally:
            # A mandatory one stays until its answer, so that its return meets nobody else.
            if self._confirms.get(tag) is confirm and not (confirm.mandatory or confirm.immediate):
                self._forget(tag)
        if confirm.error is not None:
            raise confirm.error

    def publish_nowait(
        self,
        msg: amqp.Message,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
    ) -> Confirm:
        """Publish, and return what the confirm of this very message may be waited for with.

        Raises:
            RecoverableConnectionError: It could not be written within `timeout` seconds, or never can.
            amqp.exceptions.ChannelError: The broker had closed the channel.

        Switches: only while the broker blocks publishers, or too much is unsent.
        """
        confirm = Confirm(msg, exchange, routing_key, mandatory, immediate)
        if self.connection is None:
            raise RecoverableConnectionError("basic_publish: connection closed")
        self._wait_publishable(timeout)
        self.publish_confirm(confirm)
        return confirm

    def publish_confirm(self, confirm: Confirm) -> None:
        """Write the message of `confirm` now, and have it answered. Never switches.

        Raises:
            LinkLostError: The link is gone.
            amqp.exceptions.ChannelError: The broker had closed the channel.
        """
        if not self._confirm_selected:
            self.confirm_select(nowait=True)  # what is published after it is confirmed
        message, exchange, routing_key = confirm.message, confirm.exchange, confirm.routing_key
        self._write_publish(message, exchange, routing_key, confirm.mandatory, confirm.immediate)
        confirm.returned = None  # whatever became of it when it was written before
        self._confirms[self._published] = confirm
        if confirm.mandatory or confirm.immediate:
            self._mandatory.setdefault(_key_of(confirm), []).append(confirm)

    @property
    def publishable(self) -> bool:
        """Whether `wait_publishable` would return at once."""
        return bool(self._link.is_publishable(self.channel_id))

    @property
    def blocked(self) -> bool:
        """Whether the broker blocks publishers on this channel's link."""
        return self._link.blocked

    @property
    def lost(self) -> bool:
        """Whether the channel cannot be used any more; one that the broker closed opens itself again."""
        return self.connection is None or self._link.failure is not None

    def wait_publishable(self, deadline: Deadline, stop: StopSignal | None = None) -> None:
        """Wait while the broker blocks publishers, or too much is unsent; see `Link.wait_publishable`."""
        self._link.wait_publishable(deadline, stop, self.channel_id)

    def _write_publish(self, message: amqp.Message, *address: Any) -> None:
        self._open_again()
        self.flush()
        link = self._link
        link.write(encode_publish(self.channel_id, address, message, link.frame_max))
        self._published += 1

    def _await_confirm(self, confirm: Confirm, timeout: float | None) -> None:
        if not self._session.waits.wait_for_confirm(confirm.event, timeout):
            raise TimeoutError(f"no reply from {self._link.uri} in time")

    def confirm_select(self, nowait: bool = False) -> Any:
        """Put the channel into confirm mode; its publishes are counted from here."""
        self._open_again()  # raises what is yet to be told, before the mode counts as asked for
        if not self._confirm_selected:  # asked again, the broker goes on counting
            self._confirm_selected = True
            self._published = self._answered = 0
        return super().confirm_select(nowait)

    # -- what the broker answers ------------------------------------------------------------------------

    def dispatch_method(self, method_sig: tuple[int, int], payload: bytes, content: Any) -> None:
        """As `CallingChannel`'s, without detours for what there is one of for each message."""
        if method_sig == spec.Basic.Ack and self.is_open and len(payload) == _ack.size:
            delivery_tag, bits = _ack.unpack(payload)
            self._on_basic_ack(delivery_tag, bool(bits & 1))
        else:
            super().dispatch_method(method_sig, payload, content)

    def _on_basic_ack(self, delivery_tag: int, multiple: bool) -> None:
        self._answer_up_to(delivery_tag, multiple, None)
        if self.events:
            self._notify("basic_ack", delivery_tag, multiple)

    def _on_basic_nack(self, delivery_tag: int, multiple: bool) -> None:
        self._answer_up_to(delivery_tag, multiple, MessageNacked)
        self._notify("basic_nack", delivery_tag, multiple)

    def _answer_up_to(
        self, delivery_tag: int, multiple: bool, error: type[BaseException] | None
    ) -> None:
        tags = range(delivery_tag, delivery_tag + 1)
        if multiple:
            # Each tag is looked at once in its life, however many are open and in whatever order they come.
            last = min(delivery_tag or self._published, self._published)
            tags = range(self._answered + 1, last + 1)
            self._answered = max(self._answered, last)
        for tag in tags:
            confirm = self._forget(tag)
            if confirm is not None:
                confirm.answer(confirm.returned or (error() if error else None))

    def _forget(self, tag: int) -> Confirm | None:
        confirm = self._confirms.pop(tag, None)
        if confirm is not None and (confirm.mandatory or confirm.immediate):
            self._drop_mandatory(_key_of(confirm), confirm)
        return confirm

    def _drop_mandatory(self, key: _Key, confirm: Confirm) -> None:
        waiting = self._mandatory.get(key, [])
        if confirm in waiting:
            waiting.remove(confirm)
        if not waiting:
            self._mandatory.pop(key, None)

    def _on_basic_return(
        self, reply_code: int, reply_text: str, exchange: str, routing_key: str, message: Any
    ) -> None:
        error = error_for_code(reply_code, reply_text, spec.Basic.Return, ChannelError)
        key = (exchange, routing_key, message.properties.get("message_id"))
        confirm = _sent_as(message, self._mandatory.get(key, ()))
        if confirm is not None:
            self._drop_mandatory(key, confirm)
        if self._notify("basic_return", error, exchange, routing_key, message):
            return
        if confirm is None:
            self._tell(error)
        else:
            confirm.returned = error

    def _notify(self, event: str, *args: Any) -> bool:
        # User code: in a greenlet of its own, because this is the reader's.
        handlers = tuple(self.events.get(event, ()))
        for handler in handlers:
            gevent.spawn(handler, *args)
        return bool(handlers)


def _key_of(confirm: Confirm) -> _Key:
    message_id = confirm.message.properties.get("message_id")
    return confirm.exchange, confirm.routing_key, message_id


def _sent_as(returned: amqp.Message, candidates: Sequence[Confirm]) -> Confirm | None:
    """Return which of the messages to one address came back: the first with its body, else the first."""
    body = _body_of(returned)
    same = (confirm for confirm in candidates if _body_of(confirm.message) == body)
    return next(same, next(iter(candidates), None))


def _body_of(message: amqp.Message) -> Any:
    if not isinstance(message.body, str):
        return message.body
    return message.body.encode(message.properties.get("content_encoding") or "utf-8", "replace")
