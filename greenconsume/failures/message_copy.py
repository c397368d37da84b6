"""Owns the copies that failed messages are published as: what they keep, and which headers they gain.

A copy has the original's properties, headers and body as they came over the wire; nothing is decoded and
encoded anew. What a broker would act on when it is published again (`expiration`, `CC`, `user_id`) waits
in a header. No header begins with `x-`: RabbitMQ 4 ignores those of clients. Called by `recoverer`
and `dead_letters`.
"""

from __future__ import annotations

import os
import socket
import traceback
from datetime import datetime, timezone
from typing import Any

import amqp
from kombu import Message
from kombu.transport import virtual

from greenconsume.amqp.channel import Channel
from greenconsume.amqp.properties import decode_properties, encode_properties
from greenconsume.errors import GreenconsumeError
from greenconsume.failures.queue_names import retry_prefix

PREFIX = "greenconsume-"
#: How often the message was retried.
RETRIES = PREFIX + "retries"
#: Seconds since the epoch before which it is not to be handled, where the broker cannot delay.
NOT_BEFORE = PREFIX + "not-before"
#: Where it came from: the queue that it was consumed from, and what it was first published to.
QUEUE, EXCHANGE, ROUTING_KEY = PREFIX + "queue", PREFIX + "exchange", PREFIX + "routing-key"
#: How often it was written to its own queue again, because its ways back were used up.
RENEWALS = PREFIX + "renewals"
#: Why, where and when it was given up.
ERROR_TYPE, ERROR, STACK = PREFIX + "error-type", PREFIX + "error", PREFIX + "stack"
HOST, TIME = PREFIX + "host", PREFIX + "time"

#: What a replay takes off again.
FAILURE = (RETRIES, RENEWALS, NOT_BEFORE, QUEUE, ERROR_TYPE, ERROR, STACK, HOST, TIME)

_EXPIRATION, _USER, _CC_ASIDE = PREFIX + "expiration", PREFIX + "user-id", PREFIX + "cc"
_CC = "CC"
#: What quorum queues and streams add to what they deliver.
_COUNTS = ("x-delivery-count", "x-acquired-count", "x-stream-offset")
#: What of a message belongs to its passage through one of kombu's virtual transports.
_PASSAGE = ("body_encoding", "delivery_info", "delivery_tag")
#: The octets of a header frame around its properties.
_FRAMING = 8 + 12
_CUT = "…".encode()
_STACK_SIZE, _ERROR_SIZE = 16384, 2048


class Copy:
    """A message that is to be published again.

    Attributes:
        body: As it came, or `str` where the transport has text.
        headers: The original's, and ours.
        properties: The others, by their AMQP names.
    """

    __slots__ = ("body", "headers", "properties")

    def __init__(self, body: Any, headers: dict[str, Any], properties: dict[str, Any]) -> None:
        self.body = body
        self.headers = headers
        self.properties = properties

    def put_aside(self, user: str | None) -> None:
        """Keep from the broker what it would act on; `user` may publish messages of its own name."""
        if self.properties.get("user_id") not in (None, user):
            self.headers[_USER] = self.properties.pop("user_id")
        if _CC in self.headers:
            self.headers[_CC_ASIDE] = self.headers.pop(_CC)

    def put_expiration_aside(self) -> None:
        """Have it not expire where it waits, or is kept."""
        if "expiration" in self.properties:
            self.headers[_EXPIRATION] = self.properties.pop("expiration")

    def put_expiration_back(self) -> None:
        """Have it expire again, in its own queue."""
        if _EXPIRATION in self.headers:
            self.properties["expiration"] = self.headers.pop(_EXPIRATION)

    def forget_passage(self, queue: str) -> None:
        """Drop what brokers noted about its way through the retry queues of `queue`."""
        for name in _COUNTS:
            self.headers.pop(name, None)
        ours = retry_prefix(queue)
        for which in ("first", "last"):
            if str(self.headers.get(f"x-{which}-death-queue", "")).startswith(ours):
                for what in ("queue", "exchange", "reason"):
                    self.headers.pop(f"x-{which}-death-{what}", None)
        deaths = self.headers.get("x-death")
        if isinstance(deaths, list):
            left = [death for death in deaths if not str(death.get("queue")).startswith(ours)]
            self.headers["x-death"] = left
            if not left:
                del self.headers["x-death"]

    def shorten_to(self, size: int) -> None:
        """Cut our own words so that headers and properties fit into a frame of `size` bytes.

        Raises:
            GreenconsumeError: What is not ours is too large already.
        """
        for name in (STACK, ERROR):
            excess = len(self._encoded()) + _FRAMING - size
            if excess > 0 and name in self.headers:
                text = self.headers[name]
                self.headers[name] = tail_of(text, len(text.encode()) - excess - len(_CUT))
        if len(self._encoded()) + _FRAMING > size:
            raise GreenconsumeError(f"the headers do not fit into a frame of {size} bytes")

    def _encoded(self) -> bytes:
        return encode_properties(self.to_amqp())

    def to_amqp(self) -> amqp.Message:
        """Return it as py-amqp publishes it: persistent."""
        properties = {name: _wired(value) for name, value in self.properties.items()}
        properties |= {"application_headers": _wired(self.headers), "delivery_mode": 2}
        return amqp.Message(self.body, **properties)

    def to_virtual(self, channel: virtual.Channel) -> Any:
        """Return it as one of kombu's virtual channels publishes it."""
        properties = {"delivery_mode": 2, **self.properties}
        kinds = {name: properties.pop(name, None) for name in ("content_type", "content_encoding")}
        return channel.prepare_message(
            self.body, headers=self.headers, properties=properties, **kinds
        )


def keep_wire_form(message: Message, raw: object) -> None:
    """Have `copy_of` see a delivery as it came, whatever its handler does to the message."""
    if type(raw) is tuple:
        properties = raw[5]
        if type(properties) is not bytes:
            headers = properties.get("application_headers")
            properties = {**properties, "application_headers": dict(headers or {})}
        message.wire_form = (properties, raw[6])


def copy_of(message: Message) -> Copy:
    """Return a copy of a kombu message, or of what a green channel's `basic_get` returns."""
    if isinstance(message, virtual.Message):
        return _copy_of_virtual(message)
    form = getattr(message, "wire_form", None)
    # What `basic_get` returns has its properties decoded, but for those that cannot be.
    properties, body = form or (getattr(message, "encoded", message.properties), message.body)
    if type(properties) is bytes:
        properties = decode_properties(properties, exact=True)
    if not body and "content_encoding" not in properties:
        body = b""  # as a text, it would be given an encoding
    properties = dict(properties)
    headers = dict(properties.pop("application_headers", None) or {})
    return Copy(body, headers, properties)


def _copy_of_virtual(message: Message) -> Copy:
    raw = message._raw
    known = raw["properties"]
    properties = {name: value for name, value in known.items() if name not in _PASSAGE}
    properties["content_type"] = raw.get("content-type")
    properties["content_encoding"] = raw.get("content-encoding")
    body = raw.get("body")
    if body:
        body = message.channel.decode_body(body, known.get("body_encoding"))
    return Copy(body, dict(raw.get("headers") or {}), properties)


def note_origin(copy: Copy, message: Message, queue: str) -> None:
    """Write into the headers where a message came from; the first time counts, but for the queue."""
    info = message.delivery_info
    copy.headers.setdefault(EXCHANGE, info.get("exchange") or "")
    copy.headers.setdefault(ROUTING_KEY, info.get("routing_key") or "")
    copy.headers[QUEUE] = queue


def note_failure(copy: Copy, error: BaseException) -> None:
    """Write into the headers why, where and when a message was given up."""
    kind = type(error)
    stack = "".join(traceback.format_exception(kind, error, error.__traceback__))
    copy.headers |= {
        ERROR_TYPE: f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."),
        ERROR: tail_of(_words(error), _ERROR_SIZE),
        STACK: tail_of(stack, _STACK_SIZE),
        HOST: f"{socket.gethostname()}:{os.getpid()}",
        TIME: datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
    }


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as exc:  # the user's __str__
        return f"<its text cannot be had: {type(exc).__name__}>"


def restore_origin(message: Message) -> None:
    """Show a handler the exchange, routing key and CC that the message was first published with."""
    headers = message.headers
    if _CC_ASIDE in headers:
        headers[_CC] = headers[_CC_ASIDE]
    channel = message.channel
    if isinstance(channel, Channel) or _keeps_origin(channel):
        origin = {"exchange": _text(headers[EXCHANGE]), "routing_key": _text(headers[ROUTING_KEY])}
        message.delivery_info = {**message.delivery_info, **origin}


def _keeps_origin(channel: object) -> bool:
    """Return whether a virtual channel puts messages back by its own notes, not by `delivery_info`."""
    return getattr(type(channel), "_restore", None) not in (None, virtual.Channel._restore)


def retries_of(headers: dict[str, Any]) -> int:
    """Return how often a message was retried; 0 for a count that is none."""
    return _count_in(headers, RETRIES)


def renewals_of(headers: dict[str, Any]) -> int:
    """Return how often a message was renewed; 0 for a count that is none."""
    return _count_in(headers, RENEWALS)


def _count_in(headers: dict[str, Any], name: str) -> int:
    count = headers.get(name)
    return count if isinstance(count, int) and count is not True and count > 0 else 0


def tail_of(text: str, limit: int) -> str:
    """Return the last `limit` bytes of a text, marked where it was cut; and only what is UTF-8."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return (_CUT + encoded[len(encoded) - max(0, limit) :]).decode("utf-8", "ignore")


def _wired(value: object) -> Any:
    """Return bytes for a text that was no UTF-8 on the wire, as it was there."""
    if isinstance(value, dict):
        return {_wired(key): _wired(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_wired(item) for item in value]
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-8", "surrogateescape")
    return value


def _text(value: object) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
