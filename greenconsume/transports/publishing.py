"""Owns publishing on a channel of a green link: confirms by delivery tag, returned messages, back-pressure.

Any number of greenlets publish on one channel at once; each waits for the confirm of its own message.
"""

from __future__ import annotations

from collections.abc import Callable
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

from greenconsume.stopping import Deadline
from greenconsume.transports.calls import CallingChannel


class _Confirm:
    """A published message that the broker has not yet confirmed."""

    __slots__ = ("error", "event", "key", "message")

    def __init__(self, key: tuple[str, str], message: amqp.Message) -> None:
        self.key = key
        self.message = message
        self.event = Event()
        self.error: BaseException | None = None


class PublishingChannel(CallingChannel):
    """A channel that publishes, for any number of greenlets at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._confirms: dict[int, _Confirm] = {}
        self._published = 0
        super().__init__(*args, **kwargs)

    def _fail_waiters(self, error: Callable[[], BaseException]) -> bool:
        confirms = list(self._confirms.values())
        self._confirms.clear()
        for confirm in confirms:
            confirm.error = error()
            confirm.event.set()
        return super()._fail_waiters(error) or bool(confirms)

    def _end_epoch(self) -> None:
        super()._end_epoch()
        self._confirm_selected = False
        self._published = 0

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
        argsig: str = "Bssbb",
    ) -> None:
        """As py-amqp's `basic_publish`; waits only while the broker blocks, or `HIGH_WATER` is unsent."""
        if self.connection is None:
            raise RecoverableConnectionError("basic_publish: connection closed")
        stop = self._session.stop or self._session.publish_stop
        self._link.wait_publishable(Deadline(timeout), stop)
        args = (0, exchange, routing_key, mandatory, immediate)
        self.send_method(spec.Basic.Publish, argsig, args, msg)
        self._published += 1

    basic_publish = _basic_publish

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
        if not self._confirm_selected:
            self.confirm_select(nowait=True)  # what is published after it is confirmed
        self._basic_publish(msg, exchange, routing_key, **kwargs)
        tag = self._published  # nothing switched since it was written
        confirm = self._confirms[tag] = _Confirm((exchange, routing_key), msg)
        try:
            self._park(confirm.event, confirm_timeout)
        finally:
            self._confirms.pop(tag, None)
        if confirm.error is not None:
            raise confirm.error

    def confirm_select(self, nowait: bool = False) -> Any:
        """Put the channel into confirm mode; its publishes are counted from here."""
        self._confirm_selected = True
        self._published = 0
        return super().confirm_select(nowait)

    def _on_basic_ack(self, delivery_tag: int, multiple: bool) -> None:
        self._confirm(delivery_tag, multiple, None)
        self._notify("basic_ack", delivery_tag, multiple)

    def _on_basic_nack(self, delivery_tag: int, multiple: bool) -> None:
        self._confirm(delivery_tag, multiple, MessageNacked)
        self._notify("basic_nack", delivery_tag, multiple)

    def _confirm(
        self, delivery_tag: int, multiple: bool, error: type[BaseException] | None
    ) -> None:
        tags = (
            [tag for tag in self._confirms if tag <= delivery_tag] if multiple else [delivery_tag]
        )
        for tag in tags:
            confirm = self._confirms.pop(tag, None)
            if confirm is not None:
                confirm.error = confirm.error or (error() if error else None)
                confirm.event.set()

    def _on_basic_return(
        self, reply_code: int, reply_text: str, exchange: str, routing_key: str, message: Any
    ) -> None:
        error = error_for_code(reply_code, reply_text, spec.Basic.Return, ChannelError)
        if self._notify("basic_return", error, exchange, routing_key, message):
            return
        for confirm in self._confirms.values():
            if confirm.error is None and confirm.key == (exchange, routing_key):
                confirm.error = error
                return
        self._error = error

    def _notify(self, event: str, *args: Any) -> bool:
        # User code: in a greenlet of its own, because this is the reader's.
        handlers = tuple(self.events.get(event, ()))
        for handler in handlers:
            gevent.spawn(handler, *args)
        return bool(handlers)
