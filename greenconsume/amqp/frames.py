"""Owns AMQP 0-9-1 framing: bytes to frames and methods to bytes. Does no I/O and knows no connection.

Called by `link`: the reader feeds what it received, the channels have their methods encoded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from struct import Struct
from struct import error as struct_error
from typing import Any

import amqp
from amqp.exceptions import FrameSyntaxError, UnexpectedFrame
from amqp.serialization import loads

from greenconsume.amqp.properties import decode_properties, encode_address, encode_properties

#: A delivery as it came: consumer tag, delivery tag, redelivered, exchange, routing key, its properties
#: (still encoded, or the dict that py-amqp made of them) and its body (`str` where py-amqp decoded it).
Delivery = tuple[str, int, bool, str, str, Any, Any]

#: A method: its class and method id.
Sig = tuple[int, int]

#: Where a message is published: the exchange, the routing key, whether it is mandatory, and immediate.
Address = tuple[str, str, bool, bool]

#: type, channel, and a payload; or a whole delivery
Frame = tuple[int, int, Any]

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
_KINDS = frozenset((METHOD, HEADER, BODY, HEARTBEAT))
#: The type of what is no frame but a `Delivery`, put together from its three.
DELIVERY = 0
HEARTBEAT_FRAME = b"\x08\x00\x00\x00\x00\x00\x00\xce"

_END = 0xCE
_OVERHEAD = 8  # seven octets of header and the end octet
_HAS_HEADERS = 0x20
#: Most publishers send the same few properties with every message.
_known_properties: dict[bytes, dict[str, Any]] = {}
_KNOWN_LIMIT = 1000
_header = Struct(">BHI")
_method = Struct(">BHIHH")
_content = Struct(">BHIHHQ")
_tag = Struct(">Q?")
_DELIVER = b"\x00\x3c\x00\x3c"
_PUBLISH = (60, 40)


class FrameParser:
    """Cuts a stream of bytes into frames, however it was cut in transit.

    Args:
        max_size: The largest frame, overhead included, that the peer may send; 0 for any.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._wanted = _OVERHEAD

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield every frame that `data` completes; keep the rest for the next call.

        Raises:
            UnexpectedFrame: The bytes are no AMQP frame.
            FrameSyntaxError: A frame is larger than was agreed.
        """
        self._chunks.append(data)
        self._buffered += len(data)
        if self._buffered < self._wanted:  # joining only when it pays keeps slow peers linear
            return
        buffer = data if len(self._chunks) == 1 else b"".join(self._chunks)
        offset = 0
        while (end := self._end_of_frame(buffer, offset)) is not None:
            kind, channel, _ = _header.unpack_from(buffer, offset)
            if kind == METHOD and buffer.startswith(_DELIVER, offset + 7):
                delivery = self._delivery(buffer, offset, end, channel)
                if delivery is not None:
                    yield DELIVERY, channel, delivery[0]
                    offset = delivery[1]
                    continue
            yield kind, channel, buffer[offset + 7 : end - 1]
            offset = end
        rest = buffer[offset:]
        self._chunks, self._buffered = ([rest], len(rest)) if rest else ([], 0)

    def _delivery(
        self, buffer: bytes, start: int, end: int, channel: int
    ) -> tuple[Delivery, int] | None:
        """Return the delivery that starts here and where it ends, if header and one body frame follow.

        Anything else (a body over several frames, one that is not all here or not well-formed) is left to
        `_end_of_frame`, which says what is wrong, and to py-amqp's decoder.
        """
        limit = len(buffer)
        if limit - end < _content.size:
            return None
        kind, on, size, _, _, body_size = _content.unpack_from(buffer, end)
        body_at = end + size + _OVERHEAD
        if kind != HEADER or on != channel or body_at > limit or buffer[body_at - 1] != _END:
            return None
        if not body_size:
            return (
                *_deliver_args(buffer, start + 11, end - 1),
                buffer[end + 19 : body_at - 1],
                b"",
            ), body_at
        if limit - body_at < _OVERHEAD or (self.max_size and body_size + _OVERHEAD > self.max_size):
            return None
        kind, on, size = _header.unpack_from(buffer, body_at)
        stop = body_at + size + _OVERHEAD
        if kind != BODY or on != channel or size != body_size:
            return None
        if stop > limit or buffer[stop - 1] != _END:
            return None
        args = _deliver_args(buffer, start + 11, end - 1)
        return (*args, buffer[end + 19 : body_at - 1], buffer[body_at + 7 : stop - 1]), stop

    def _end_of_frame(self, buffer: bytes, offset: int) -> int | None:
        available = len(buffer) - offset
        self._wanted = _OVERHEAD
        if available < _OVERHEAD:
            return None
        kind, channel, size = _header.unpack_from(buffer, offset)
        if kind not in _KINDS:
            raise _no_frame(buffer, offset)
        self._wanted = size + _OVERHEAD
        if self.max_size and self._wanted > self.max_size:
            raise FrameSyntaxError(
                f"the broker sent a frame of {self._wanted} bytes (type {kind}, channel {channel}) "
                f"where at most {self.max_size} were agreed"
            )
        if available < self._wanted:
            return None
        if buffer[offset + self._wanted - 1] != _END:
            raise _no_frame(buffer, offset)
        return offset + self._wanted


def _no_frame(buffer: bytes, offset: int) -> BaseException:
    error: BaseException = UnexpectedFrame(
        f"the broker sent no AMQP 0-9-1 frame: {buffer[offset : offset + 8]!r} "
        "(is this really an AMQP port?)"
    )
    return error


def _deliver_args(buffer: bytes, at: int, end: int) -> tuple[str, int, bool, str, str]:
    try:
        tag_end = at + 1 + buffer[at]
        delivery_tag, redelivered = _tag.unpack_from(buffer, tag_end)
        exchange_end = tag_end + 10 + buffer[tag_end + 9]
        if exchange_end + 1 + buffer[exchange_end] != end:
            raise FrameSyntaxError("the broker sent a basic.deliver whose arguments do not fill it")
        return (
            buffer[at + 1 : tag_end].decode("utf-8", "surrogateescape"),
            delivery_tag,
            redelivered,
            buffer[tag_end + 10 : exchange_end].decode("utf-8", "surrogateescape"),
            buffer[exchange_end + 1 : end].decode("utf-8", "surrogateescape"),
        )
    except (IndexError, struct_error) as exc:
        raise FrameSyntaxError(f"the broker sent a malformed basic.deliver: {exc}") from exc


def decode_content(encoded: bytes, body: bytes) -> tuple[dict[str, Any], Any]:
    """Return properties, and the body: decoded where they name an encoding, as py-amqp does."""
    known = _known_properties.get(encoded)
    if known is not None:
        properties = known.copy()
    else:
        properties = decode_properties(encoded)
        if not encoded[0] & _HAS_HEADERS:  # headers are mutable, and seldom the same twice
            if len(_known_properties) >= _KNOWN_LIMIT:
                _known_properties.clear()
            _known_properties[encoded] = properties.copy()
    if body and properties.get("content_encoding") == "utf-8":  # nearly always
        try:
            return properties, body.decode()
        except UnicodeDecodeError:
            return properties, body
    return properties, decode_body(properties, body)


def decode_message(message: amqp.Message, auto_decode: bool) -> None:
    """Decode a message's properties in place, and its body where that is asked for."""
    try:
        message.properties = decode_properties(message.encoded)
    except Exception:  # its publisher's fault, such as a date in the year 55000, not the link's
        message.properties, message.undecodable = {}, sys.exc_info()
    if auto_decode:
        message.body = decode_body(message.properties, message.body)


def decode_args(format: str, payload: bytes) -> list[Any]:
    """Return a method's arguments. RabbitMQ takes any bytes as a routing key: surrogates stand for them."""
    try:
        args: list[Any] = loads(format, payload, 4)[0]
    except UnicodeDecodeError:
        args = loads(format, _Lenient(payload), 4)[0]
    return args


class _Lenient(bytes):
    """Bytes of which any part is decoded without an error."""

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return _Lenient(part) if isinstance(part, bytes) else part

    def decode(self, *_args: object) -> str:
        return super().decode("utf-8", "surrogateescape")


def decode_body(properties: dict[str, Any], body: Any) -> Any:
    """Return the body as text where its encoding is named, known and right, or where it is empty."""
    if not body:
        return ""
    encoding = properties.get("content_encoding")
    if encoding:
        try:
            return body.decode(encoding)
        except Exception:  # what a codec may raise: it is binary, or not what it says
            pass  # the serializer decides
    return body


def encode_method(channel: int, sig: Sig, args: bytes, max_size: int) -> bytes:
    """Return the frame of one method.

    Args:
        channel: The channel's id.
        sig: Class and method id.
        args: The encoded arguments.
        max_size: The largest frame that was agreed; 0 for any.

    Raises:
        ValueError: It would be larger; sent, it would end the link of everybody who shares it.
    """
    size = 4 + len(args) + _OVERHEAD
    if max_size and size > max_size:
        raise ValueError(
            f"a call cannot be sent: its arguments take {len(args)} bytes, more than fit into a frame "
            f"of {max_size}: shorten them, or raise frame_max at the broker"
        )
    return b"%b%b\xce" % (_method.pack(METHOD, channel, 4 + len(args), *sig), args)


def encode_publish(
    channel: int, address: Address, message: amqp.Message, max_size: int
) -> list[bytes]:
    """Return the frames of `Basic.Publish`, byte for byte those of py-amqp; see `encode_content`.

    Args:
        channel: The channel's id.
        address: Where it is published.
        message: An `amqp.Message`.
        max_size: The largest frame that was agreed; 0 for any.
    """
    return encode_content(channel, _PUBLISH, encode_address(*address), message, max_size)


def encode_content(
    channel: int, sig: Sig, args: bytes, message: amqp.Message, max_size: int
) -> list[bytes]:
    """Return the frames of one method with content, to be written with none of its channel in between.

    Each of the bytes returned is a whole frame, or several.

    Args:
        channel: The channel's id.
        sig: Class and method id.
        args: The encoded arguments.
        message: An `amqp.Message`; a `str` body is encoded as its `content_encoding` says.
        max_size: The largest frame that was agreed; 0 for any.
    """
    body = message.body
    if isinstance(body, str):
        body = body.encode(message.properties.setdefault("content_encoding", "utf-8"))
    properties, length = encode_properties(message), len(body)
    method = _method.pack(METHOD, channel, 4 + len(args), *sig)
    header = _content.pack(HEADER, channel, 12 + len(properties), sig[0], 0, length)
    size = (max_size or 131072) - _OVERHEAD
    if 12 + len(properties) > size:  # sent, it would end the link of everybody who shares it
        raise FrameSyntaxError(
            f"a message's properties and headers take {len(properties)} bytes, more than fit into a "
            f"frame of {size + _OVERHEAD}: put them into its body, or raise frame_max at the broker"
        )
    if 0 < length <= size:
        start = _header.pack(BODY, channel, length)
        return [b"%b%b\xce%b%b\xce%b%b\xce" % (method, args, header, properties, start, body)]
    frames = [b"%b%b\xce%b%b\xce" % (method, args, header, properties)]
    view = memoryview(body)  # a slice of bytes would be one copy more
    for at in range(0, length, size):
        part = view[at : at + size]
        frames.append(b"".join((_header.pack(BODY, channel, len(part)), part, b"\xce")))
    return frames
