"""Owns AMQP 0-9-1 framing: bytes to frames and methods to bytes. Does no I/O and knows no connection.

Called by `link`: the reader feeds what it received, the channels have their methods encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Any

from amqp.exceptions import FrameSyntaxError, UnexpectedFrame

#: type, channel, payload
Frame = tuple[int, int, bytes]

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
HEARTBEAT_FRAME = b"\x08\x00\x00\x00\x00\x00\x00\xce"

_END = 0xCE
_OVERHEAD = 8  # seven octets of header and the end octet
_header = Struct(">BHI")
_method = Struct(">BHIHH")
_content = Struct(">BHIHHQ")


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
            yield kind, channel, buffer[offset + 7 : end - 1]
            offset = end
        rest = buffer[offset:]
        self._chunks, self._buffered = ([rest], len(rest)) if rest else ([], 0)

    def _end_of_frame(self, buffer: bytes, offset: int) -> int | None:
        available = len(buffer) - offset
        self._wanted = _OVERHEAD
        if available < _OVERHEAD:
            return None
        kind, channel, size = _header.unpack_from(buffer, offset)
        self._wanted = size + _OVERHEAD
        if self.max_size and self._wanted > self.max_size:
            raise FrameSyntaxError(
                f"the broker sent a frame of {self._wanted} bytes (type {kind}, channel {channel}) "
                f"where at most {self.max_size} were agreed"
            )
        if available < self._wanted:
            return None
        if buffer[offset + self._wanted - 1] != _END:
            raise UnexpectedFrame(
                f"the broker sent no AMQP 0-9-1 frame: {buffer[offset : offset + 8]!r} "
                "(is this really an AMQP port?)"
            )
        return offset + self._wanted


def encode_method(channel: int, sig: tuple[int, int], args: bytes) -> bytes:
    """Return the frame of one method."""
    return b"%b%b\xce" % (_method.pack(METHOD, channel, 4 + len(args), *sig), args)


def encode_content(
    channel: int, sig: tuple[int, int], args: bytes, message: Any, max_size: int
) -> list[bytes]:
    """Return the frames of one method with content, to be written with nothing in between.

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
    properties = message._serialize_properties()
    header = _content.pack(HEADER, channel, 12 + len(properties), sig[0], 0, len(body))
    frames = [encode_method(channel, sig, args), header, properties, b"\xce"]
    size = (max_size or 131072) - _OVERHEAD
    for start in range(0, len(body), size):
        part = body[start : start + size]
        frames += (_header.pack(BODY, channel, len(part)), part, b"\xce")
    return frames
