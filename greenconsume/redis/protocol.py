"""Owns the bytes of Redis's protocol, RESP2 and RESP3: commands out, replies in.

Does no I/O and knows no command. Errors are returned as values, as they belong to the one who asked. Called
by `link`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

#: What one argument of a command may be.
Argument = bytes | str | int | float

_ERRORS: dict[str, type[Exception]] = {
    "LOADING": BusyLoadingError,
    "MASTERDOWN": MasterDownError,
    "NOAUTH": AuthenticationError,
    "NOPERM": NoPermissionError,
    "NOSCRIPT": NoScriptError,
    "OOM": OutOfMemoryError,
    "READONLY": ReadOnlyError,
    "WRONGPASS": AuthenticationError,
}
_ARRAYS = b"*~"
_BULKS = b"$="


class ProtocolError(ResponseError):
    """The server sent what is no reply."""


class Push(list[Any]):
    """A word of the server that nobody asked for: an invalidation, a published message."""


class _Incomplete(Exception):
    """The bytes that have come do not hold a whole reply yet."""


def encode(arguments: Iterable[Argument]) -> bytes:
    """Return a command as the bytes to send."""
    parts = [each if type(each) is bytes else _to_bytes(each) for each in arguments]
    chunks = [b"*%d\r\n" % len(parts)]
    chunks += [b"$%d\r\n%b\r\n" % (len(part), part) for part in parts]
    return b"".join(chunks)


def encode_for_each(
    commands: Sequence[Sequence[Argument]], texts: Sequence[str]
) -> Iterator[bytes]:
    """Yield several commands that end in the same arguments, which are encoded once."""
    parts = [text.encode() for text in texts]
    ending = b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in parts])
    for command in commands:
        begin = encode(command).partition(b"\r\n")[2]
        yield b"*%d\r\n%b%b" % (len(command) + len(texts), begin, ending)


def _to_bytes(value: Argument) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def error_of(text: str) -> Exception:
    """Return the exception, one of redis-py's, for an error reply."""
    return _ERRORS.get(text.partition(" ")[0], ResponseError)(text)


class Parser:
    """Makes replies of bytes, however these are cut."""

    __slots__ = ("_at", "_chunks", "_data", "_size", "_wanted")

    def __init__(self) -> None:
        self._chunks: list[bytes] = []  # what has come, joined when there may be enough of it
        self._size = 0
        self._wanted = 0  # fewer bytes than these complete nothing
        self._data = b""
        self._at = 0

    def feed(self, data: bytes) -> Iterator[Any]:
        """Take bytes, and yield every reply that they complete.

        Raises:
            ProtocolError: These bytes make no sense.
        """
        self._chunks.append(data)
        self._size += len(data)
        if self._size < self._wanted:
            return
        self._data, self._wanted = b"".join(self._chunks), 0
        done = 0
        try:
            while done < len(self._data):
                self._at = done
                reply = self._reply()
                done = self._at
                yield reply
        except _Incomplete:
            self._wanted = max(0, self._wanted - done)
        rest, self._data = self._data[done:], b""
        self._chunks, self._size = [rest] if rest else [], len(rest)

    def _reply(self) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind in _BULKS:
            return self._bulk(kind, int(rest))
        if kind == b":" or kind == b"(":
            return int(rest)
        if kind in _ARRAYS:
            return None if rest == b"-1" else self._array(int(rest))
        if kind == b"+":
            return rest
        if kind == b"-":
            return error_of(rest.decode("utf-8", "replace"))
        return self._resp3(kind, rest)

    def _array(self, count: int) -> list[Any]:
        """Return so many replies; most are texts that are there as a whole, and cost no call each."""
        items: list[Any] = []
        data, size = self._data, len(self._data)
        while len(items) < count:
            at = self._at
            line_end = data.find(b"\r\n", at) if data[at : at + 1] == b"$" else -1
            start = line_end + 2
            end = start + int(data[at + 1 : line_end]) if line_end > 0 else 0
            if start <= end <= size - 2 and line_end > 0:
                self._at = end + 2
                items.append(data[start:end])
            else:
                items.append(self._reply())
        return items

    def _resp3(self, kind: bytes, rest: bytes) -> Any:
        if kind == b">":
            return Push(self._reply() for _ in range(int(rest)))
        if kind == b"_":
            return None
        if kind == b"%":
            return {self._reply(): self._reply() for _ in range(int(rest))}
        if kind == b"#":
            return rest == b"t"
        if kind == b",":
            return float(rest)
        if kind == b"!":
            return error_of(self._bulk(kind, int(rest)).decode("utf-8", "replace"))
        raise ProtocolError(f"not a reply: {(kind + rest)[:40]!r}")

    def _line(self) -> bytes:
        end = self._data.find(b"\r\n", self._at)
        if end < 0:
            raise _Incomplete
        line = self._data[self._at : end]
        if not line:
            raise ProtocolError("an empty line is no reply")
        self._at = end + 2
        return line

    def _bulk(self, kind: bytes, size: int) -> Any:
        if size < 0:
            return None
        start, end = self._at, self._at + size
        if len(self._data) < end + 2:
            self._wanted = end + 2
            raise _Incomplete
        self._at = end + 2
        return self._data[start + 4 if kind == b"=" else start : end]
