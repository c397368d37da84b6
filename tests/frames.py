"""Owns AMQP 0-9-1 frames as bytes: those that a scripted peer sends, and those that it was sent.

Written from the specification, on py-amqp's argument coding alone, so that it can contradict the
code under test.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from amqp.serialization import dumps, loads

PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
FRAME_END = b"\xce"
OVERHEAD = 8
BASIC = 60


class Method(NamedTuple):
    """A method's numbers, and its arguments in py-amqp's letters."""

    class_id: int
    method_id: int
    format: str


# s and S: short and long string, B l L: 16, 32 and 64 bits, o: octet, b: bit, F: table.
METHODS = {
    "connection.start": Method(10, 10, "ooFSS"),
    "connection.start-ok": Method(10, 11, "FsSs"),
    "connection.tune": Method(10, 30, "BlB"),
    "connection.tune-ok": Method(10, 31, "BlB"),
    "connection.open": Method(10, 40, "ssb"),
    "connection.open-ok": Method(10, 41, "s"),
    "connection.close": Method(10, 50, "BsBB"),
    "connection.close-ok": Method(10, 51, ""),
    "connection.blocked": Method(10, 60, "s"),
    "connection.unblocked": Method(10, 61, ""),
    "connection.update-secret": Method(10, 70, "Ss"),
    "connection.update-secret-ok": Method(10, 71, ""),
    "channel.open": Method(20, 10, "s"),
    "channel.open-ok": Method(20, 11, "S"),
    "channel.flow": Method(20, 20, "b"),
    "channel.flow-ok": Method(20, 21, "b"),
    "channel.close": Method(20, 40, "BsBB"),
    "channel.close-ok": Method(20, 41, ""),
    "exchange.declare": Method(40, 10, "BssbbbbbF"),
    "exchange.declare-ok": Method(40, 11, ""),
    "exchange.delete": Method(40, 20, "Bsbb"),
    "exchange.delete-ok": Method(40, 21, ""),
    "exchange.bind": Method(40, 30, "BsssbF"),
    "exchange.bind-ok": Method(40, 31, ""),
    "exchange.unbind": Method(40, 40, "BsssbF"),
    "exchange.unbind-ok": Method(40, 51, ""),
    "queue.declare": Method(50, 10, "BsbbbbbF"),
    "queue.declare-ok": Method(50, 11, "sll"),
    "queue.bind": Method(50, 20, "BsssbF"),
    "queue.bind-ok": Method(50, 21, ""),
    "queue.purge": Method(50, 30, "Bsb"),
    "queue.purge-ok": Method(50, 31, "l"),
    "queue.delete": Method(50, 40, "Bsbbb"),
    "queue.delete-ok": Method(50, 41, "l"),
    "queue.unbind": Method(50, 50, "BsssF"),
    "queue.unbind-ok": Method(50, 51, ""),
    "basic.qos": Method(60, 10, "lBb"),
    "basic.qos-ok": Method(60, 11, ""),
    "basic.consume": Method(60, 20, "BssbbbbF"),
    "basic.consume-ok": Method(60, 21, "s"),
    "basic.cancel": Method(60, 30, "sb"),
    "basic.cancel-ok": Method(60, 31, "s"),
    "basic.publish": Method(60, 40, "Bssbb"),
    "basic.return": Method(60, 50, "Bsss"),
    "basic.deliver": Method(60, 60, "sLbss"),
    "basic.get": Method(60, 70, "Bsb"),
    "basic.get-ok": Method(60, 71, "Lbssl"),
    "basic.get-empty": Method(60, 72, "s"),
    "basic.ack": Method(60, 80, "Lb"),
    "basic.reject": Method(60, 90, "Lb"),
    "basic.recover": Method(60, 110, "b"),
    "basic.recover-ok": Method(60, 111, ""),
    "basic.nack": Method(60, 120, "Lbb"),
    "confirm.select": Method(85, 10, "b"),
    "confirm.select-ok": Method(85, 11, ""),
    "tx.select": Method(90, 10, ""),
    "tx.select-ok": Method(90, 11, ""),
    "tx.commit": Method(90, 20, ""),
    "tx.commit-ok": Method(90, 21, ""),
    "tx.rollback": Method(90, 30, ""),
    "tx.rollback-ok": Method(90, 31, ""),
}
NAMES = {(method.class_id, method.method_id): name for name, method in METHODS.items()}

# In the order of their flags, from the highest bit.
PROPERTIES = {
    "content_type": "s",
    "content_encoding": "s",
    "headers": "F",
    "delivery_mode": "o",
    "priority": "o",
    "correlation_id": "s",
    "reply_to": "s",
    "expiration": "s",
    "message_id": "s",
    "timestamp": "L",
    "type": "s",
    "user_id": "s",
    "app_id": "s",
    "cluster_id": "s",
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it came off the wire."""

    type: int
    channel: int
    payload: bytes

    @property
    def method(self) -> tuple[int, int] | None:
        """Class and method number, of a method frame."""
        return struct.unpack_from(">HH", self.payload) if self.type == METHOD else None

    @property
    def name(self) -> str:
        """``basic.ack`` and the like; ``header``, ``body`` or ``heartbeat`` for other frames."""
        if self.method is not None:
            return NAMES[self.method]
        return {HEADER: "header", BODY: "body", HEARTBEAT: "heartbeat"}[self.type]

    @property
    def args(self) -> list[Any]:
        """A method's arguments, reserved ones included, in the order of the specification."""
        return list(loads(METHODS[self.name].format, self.payload, 4)[0])


@dataclass(frozen=True, slots=True)
class Published:
    """A message that a client published, put together from its frames."""

    channel: int
    exchange: str
    routing_key: str
    mandatory: bool
    properties: dict[str, Any]
    body: bytes


def raw_frame(type_: int, channel: int, payload: bytes) -> bytes:
    """Any frame at all."""
    return struct.pack(">BHI", type_, channel, len(payload)) + payload + FRAME_END


def method_frame(channel: int, name: str, *args: Any) -> bytes:
    """A method by its name in the specification, with all of its arguments."""
    method = METHODS[name]
    assert len(args) == len(method.format), f"{name} takes {method.format}, not {args}"
    ids = struct.pack(">HH", method.class_id, method.method_id)
    return raw_frame(METHOD, channel, ids + dumps(method.format, args))


def heartbeat() -> bytes:
    """A heartbeat."""
    return raw_frame(HEARTBEAT, 0, b"")


def header_frame(channel: int, body_size: int, **properties: Any) -> bytes:
    """A content header. `properties` are those of `PROPERTIES`; a timestamp is in seconds."""
    flags, format_, values = 0, "", []
    for bit, (name, letter) in enumerate(PROPERTIES.items()):
        if name in properties:
            flags |= 1 << (15 - bit)
            format_ += letter
            values.append(properties.pop(name))
    assert not properties, f"no such properties: {properties}"
    start = struct.pack(">HHQH", BASIC, 0, body_size, flags)
    return raw_frame(HEADER, channel, start + dumps(format_, values))


def content(channel: int, body: bytes, frame_max: int = 131072, **properties: Any) -> bytes:
    """A content header and as many body frames as `frame_max` asks for; none for an empty body."""
    size = frame_max - OVERHEAD
    parts = (body[start : start + size] for start in range(0, len(body), size))
    return header_frame(channel, len(body), **properties) + b"".join(
        raw_frame(BODY, channel, part) for part in parts
    )


def deliver(
    channel: int,
    consumer_tag: str,
    delivery_tag: int,
    body: bytes = b"{}",
    *,
    redelivered: bool = False,
    exchange: str = "",
    routing_key: str = "",
    frame_max: int = 131072,
    **properties: Any,
) -> bytes:
    """A whole Basic.Deliver: method, header and body frames; JSON unless the properties say else."""
    properties = {"content_type": "application/json", "content_encoding": "utf-8", **properties}
    args = (consumer_tag, delivery_tag, redelivered, exchange, routing_key)
    return method_frame(channel, "basic.deliver", *args) + content(
        channel, body, frame_max, **properties
    )


def basic_return(
    channel: int,
    body: bytes = b"{}",
    code: int = 312,
    text: str = "NO_ROUTE",
    exchange: str = "",
    routing_key: str = "",
    **properties: Any,
) -> bytes:
    """A whole Basic.Return: method, header and body frames."""
    start = method_frame(channel, "basic.return", code, text, exchange, routing_key)
    return start + content(channel, body, **properties)


def basic_ack(channel: int, delivery_tag: int, multiple: bool = False) -> bytes:
    """A publisher's confirm."""
    return method_frame(channel, "basic.ack", delivery_tag, multiple)


def basic_nack(channel: int, delivery_tag: int, multiple: bool = False) -> bytes:
    """A publisher's negative confirm."""
    return method_frame(channel, "basic.nack", delivery_tag, multiple, False)


def basic_cancel(channel: int, consumer_tag: str) -> bytes:
    """The server's cancel, as when a queue is deleted under its consumer."""
    return method_frame(channel, "basic.cancel", consumer_tag, True)


def channel_close(channel: int, code: int, text: str, method: str = "basic.ack") -> bytes:
    """A channel error that `method` caused."""
    ids = METHODS[method][:2]
    return method_frame(channel, "channel.close", code, text, *ids)


def connection_close(code: int, text: str, method: tuple[int, int] = (0, 0)) -> bytes:
    """A connection error, which the method of these ids caused, or none."""
    return method_frame(0, "connection.close", code, text, *method)


def blocked(reason: str = "low on memory") -> bytes:
    """The broker blocks this connection's publishing."""
    return method_frame(0, "connection.blocked", reason)


def unblocked() -> bytes:
    """The broker lets this connection publish again."""
    return method_frame(0, "connection.unblocked")


def parse(buffer: bytearray) -> list[Frame]:
    """Take every complete frame off the front of `buffer`."""
    frames = []
    while len(buffer) >= 7:
        type_, channel, size = struct.unpack_from(">BHI", buffer)
        if len(buffer) < size + OVERHEAD:
            break
        assert buffer[size + 7 : size + 8] == FRAME_END, f"no frame end: {bytes(buffer[:80])!r}"
        frames.append(Frame(type_, channel, bytes(buffer[7 : size + 7])))
        del buffer[: size + OVERHEAD]
    return frames


def parse_properties(payload: bytes) -> dict[str, Any]:
    """The properties of a content header's payload."""
    (flags,) = struct.unpack_from(">H", payload, 12)
    there = {n: f for bit, (n, f) in enumerate(PROPERTIES.items()) if flags & (1 << (15 - bit))}
    values, _ = loads("".join(there.values()), payload, 14)
    return dict(zip(there, values, strict=True))


def published(frames: Iterable[Frame]) -> list[Published]:
    """Put published messages together; one that is not complete yet is left out."""
    done: list[Published] = []
    open_: dict[int, list[Frame]] = {}
    for frame in frames:
        if frame.name == "basic.publish":
            open_[frame.channel] = []
        if frame.channel in open_ and frame.name in ("basic.publish", "header", "body"):
            open_[frame.channel].append(frame)
            _complete(open_, frame.channel, done)
    return done


def _complete(open_: dict[int, list[Frame]], channel: int, done: list[Published]) -> None:
    method, *rest = open_[channel]
    if not rest:
        return
    (size,) = struct.unpack_from(">Q", rest[0].payload, 4)
    body = b"".join(part.payload for part in rest[1:])
    if len(body) == size:
        _, exchange, routing_key, mandatory, _ = method.args
        properties = parse_properties(rest[0].payload)
        done.append(Published(channel, exchange, routing_key, mandatory, properties, body))
        del open_[channel]
