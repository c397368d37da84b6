"""Owns how a message is read from its bytes, and how it is written anew where it comes back.

What was published by kombu or Celery is JSON; what is none is a message with an error, which meets the
consumer's `on_decode_error`. Does no I/O. Called by `channel` and `restore`.
"""

from __future__ import annotations

import json
import sys
from binascii import a2b_base64
from json.scanner import make_scanner
from typing import Any, Protocol

from kombu.transport import virtual
from kombu.utils import json as kombu_json

#: How often a message came back unsettled; RabbitMQ's name for it.
DELIVERY_COUNT = "x-delivery-count"


#: What `json.loads` calls in the end; without white space around, nothing else is left of it.
_scan: Any = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]  # typeshed is mistaken


class MessageChannel(Protocol):
    """A channel, as the making of its messages sees it."""

    Message: type[Any]


class HeldMessage(virtual.Message):  # type: ignore[misc]  # kombu is untyped
    """A message that was taken; it can be settled for as long as it is held, whatever becomes of its channel.

    Attributes:
        epoch: The field that it is held as.
        queue: The name of the queue that it was taken from.
    """

    __slots__ = ("_raw", "epoch", "errors", "queue")
    _state: Any

    def ack(self, multiple: bool = False) -> None:
        """Acknowledge, as `kombu.Message.ack`. Never switches."""
        channel = self.channel
        if multiple or self._state != "RECEIVED" or channel is None or channel.no_ack_consumers:
            super().ack(multiple=multiple)
        else:
            channel.basic_ack(self.delivery_tag)
            self._state = "ACK"

    def give_back(self) -> None:
        """Requeue it as a message that nobody has failed on: its bytes are unchanged. Never switches."""
        self.channel.qos.give_back(self.delivery_tag)
        self._state = "REQUEUED"


def message_of(
    channel: MessageChannel, raw: bytes, field: str, queue: str, tag: str
) -> HeldMessage:
    """Return the message of some bytes.

    Args:
        channel: Where it was taken.
        raw: The bytes, as they were in the queue.
        field: What it is held as, and so its delivery tag.
        queue: The name of the queue.
        tag: The tag of the consumer that it is for; empty for none.
    """
    errors: list[Any] = []
    try:
        payload = loaded(raw)
        properties, body = payload["properties"], payload.get("body")
        if body and properties.get("body_encoding") == "base64":
            body = a2b_base64(body)
        info = properties["delivery_info"]
        info["redelivered"] = bool(info.get("redelivered"))
    except Exception:  # what somebody else has put there
        body, info, errors = raw, {}, [sys.exc_info()]
        properties = {"delivery_info": info}
        payload = {"body": raw, "properties": properties, "headers": {}}
    properties["delivery_tag"] = info["delivery_tag"] = field
    if tag:
        info["consumer_tag"] = tag
    message = _built(channel, payload, body, errors)
    message.epoch, message.queue = field, queue
    return message


def _built(
    channel: MessageChannel, payload: dict[str, Any], body: object, errors: list[Any]
) -> HeldMessage:
    """Do what `Message.__init__` does, for the plain case."""
    headers, properties = payload.get("headers") or {}, payload["properties"]
    message: HeldMessage
    if "compression" in headers or channel.Message is not HeldMessage:
        message = channel.Message(payload, channel=channel)
        return message
    message = HeldMessage.__new__(HeldMessage)
    message._raw = payload
    message.channel = channel
    message.delivery_tag = properties["delivery_tag"]
    message.content_type = payload.get("content-type")
    message.content_encoding = payload.get("content-encoding")
    message.delivery_info = properties["delivery_info"]
    message.headers = headers
    message.properties = properties
    message.body = body.encode() if isinstance(body, str) else body
    message.accept = message._decoded_cache = None
    message._state = "RECEIVED"
    message.errors = errors
    return message


def loaded(raw: bytes) -> Any:
    """Return what JSON says, as kombu's decoder does, sooner where kombu has marked nothing."""
    if b"__type__" in raw:
        return kombu_json.loads(raw)
    text = raw.decode()
    try:
        payload, end = _scan(text, 0)
    except StopIteration:
        return json.loads(text)  # which says what is wrong with it
    return payload if end == len(text) else json.loads(text)  # there is white space around it


def recounted(raw: bytes) -> tuple[bytes, int]:
    """Return a message as it is put back after it was not settled, and how often that was so now."""
    payload = json.loads(raw)
    headers = payload.setdefault("headers", {})
    count = headers.get(DELIVERY_COUNT)
    count = (count if type(count) is int and count >= 0 else 0) + 1
    headers[DELIVERY_COUNT], headers["redelivered"] = count, True
    payload.get("properties", {}).get("delivery_info", {})["redelivered"] = True
    return json.dumps(payload).encode(), count


def buried(raw: bytes, queue: str, reason: str) -> bytes:
    """Return a message as it is set aside, saying why and where it comes from."""
    payload = json.loads(raw)
    info = payload.get("properties", {}).get("delivery_info", {})
    headers = payload.setdefault("headers", {})
    headers.setdefault("greenconsume-exchange", info.get("exchange") or "")
    headers.setdefault("greenconsume-routing-key", info.get("routing_key") or "")
    headers |= {"greenconsume-queue": queue, "greenconsume-error-type": reason}
    return json.dumps(payload).encode()
