"""Owns what a received message is: kombu's, settled once and on the channel that it came from (law 4).

Made of a `Delivery` when it is handed to a callback. Sends nothing itself: its channel does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import amqp
from kombu import Consumer
from kombu.transport import pyamqp

from greenconsume.amqp.frames import Delivery, decode_content
from greenconsume.amqp.ledger import ACK, GIVE_BACK


class Settles(Protocol):
    """The deliveries of a channel, as a message sees them that is to be settled."""

    epoch: int

    def settle(self, delivery_tag: int, how: int) -> bool:
        """Note a settle; return False if it must go the long way."""
        ...

    def holds(self, epoch: int) -> bool:
        """Return whether messages of this life of the channel can still be settled."""
        ...

    def count_stale(self, delivery_tag: int) -> None:
        """Count a settle that came too late."""
        ...


class MessageChannel(Protocol):
    """A channel, as a message sees it that came from it."""

    deliveries: Settles


class Message(pyamqp.Message):  # type: ignore[misc]  # kombu is untyped
    """A received message, settled once and only on the channel that it came from.

    Settling it after that channel was closed or its link lost does nothing but count: the broker has
    requeued it already, and its delivery tag now means another message, or none.
    """

    __slots__ = ("epoch", "errors")
    _state: Any

    def __init__(self, msg: amqp.Message, channel: MessageChannel, **kwargs: object) -> None:
        undecodable = getattr(msg, "undecodable", None)
        self.errors: list[Any] = [undecodable] if undecodable else []
        super().__init__(msg, channel=channel, **kwargs)
        self.epoch = channel.deliveries.epoch

    def ack(self, multiple: bool = False) -> None:
        """Acknowledge, as `kombu.Message.ack`. Never switches."""
        channel: MessageChannel | None = self.channel
        if channel is not None and not multiple and self._state == "RECEIVED":
            # As `_settled_at_once`, without a call for each message.
            deliveries = channel.deliveries
            if self.epoch == deliveries.epoch and deliveries.settle(self.delivery_tag, ACK):
                self._state = "ACK"
                return
        if not self._settled_stale("ACK"):
            super().ack(multiple=multiple)

    def reject(self, requeue: bool = False) -> None:
        """Reject, as `kombu.Message.reject`. Never switches."""
        if not self._settled_stale("REJECTED"):
            super().reject(requeue=requeue)

    def requeue(self) -> None:
        """Requeue, as `kombu.Message.requeue`. Never switches."""
        if not self._settled_stale("REQUEUED"):
            super().requeue()

    def give_back(self) -> None:
        """Requeue it as a message that has not failed: a queue may count failures. Never switches."""
        if self._state == "RECEIVED" and self._settled_at_once(GIVE_BACK):
            self._state = "REQUEUED"
        else:
            self.requeue()

    def _settled_at_once(self, how: int) -> bool:
        channel: MessageChannel | None = self.channel
        if channel is None:
            return False
        deliveries = channel.deliveries
        return self.epoch == deliveries.epoch and deliveries.settle(self.delivery_tag, how)

    def _settled_stale(self, state: str) -> bool:
        channel: MessageChannel | None = self.channel
        if channel is None or self.acknowledged:
            return False
        deliveries = channel.deliveries
        if deliveries.holds(self.epoch):
            return False
        self._state = state
        deliveries.count_stale(self.delivery_tag)
        return True


def message_of(channel: MessageChannel, delivery: Delivery, cls: type[Message]) -> Message:
    """Return the delivery as kombu's message; what `Message.__init__` does, for the plain case."""
    consumer_tag, delivery_tag, redelivered, exchange, routing_key, properties, body = delivery
    errors: list[Any] = []
    if type(properties) is bytes:
        try:
            properties, body = decode_content(properties, body)
        except (
            Exception
        ):  # a publisher's fault, such as a date in the year 55000: told as kombu does
            properties, errors = {}, [sys.exc_info()]
    headers = properties.get("application_headers") or {}
    if "compression" in headers or cls is not Message:
        return cls(raw_message(channel, (*delivery[:5], properties, body)), channel=channel)
    message = Message.__new__(Message)
    message.epoch = channel.deliveries.epoch
    message.errors = errors
    message.channel = channel
    message.delivery_tag = delivery_tag
    message.content_type = properties.get("content_type")
    message.content_encoding = properties.get("content_encoding")
    message.delivery_info = {
        "consumer_tag": consumer_tag,
        "delivery_tag": delivery_tag,
        "redelivered": redelivered,
        "exchange": exchange,
        "routing_key": routing_key,
    }
    message.headers = headers
    message.properties = properties
    message.body = body
    message.accept = message._decoded_cache = None
    message._state = "RECEIVED"
    return message


def taker_of(channel: MessageChannel, callback: Any) -> Callable[[Delivery], object]:
    """Return a callable that takes a `Delivery`: a consumer's own method, or what calls a user's callback."""
    takes: bool = getattr(callback, "takes_deliveries", False)
    if takes or getattr(callback, "__func__", None) is Consumer._receive_callback:
        taker: Callable[[Delivery], object] = callback
        return taker
    return lambda delivery: callback(raw_message(channel, delivery))


def raw_message(channel: object, delivery: Delivery) -> amqp.Message:
    """Return the delivery as py-amqp hands it to the callbacks of its own `basic_consume`."""
    consumer_tag, delivery_tag, redelivered, exchange, routing_key, properties, body = delivery
    if type(properties) is bytes:
        properties, body = decode_content(properties, body)
    message = amqp.Message(body, channel=channel)
    message.properties = properties
    message.delivery_info = {
        "consumer_tag": consumer_tag,
        "delivery_tag": delivery_tag,
        "redelivered": redelivered,
        "exchange": exchange,
        "routing_key": routing_key,
    }
    return message
