"""Owns AMQP field tables (headers): bytes to Python values and back, so that nothing is altered on the way.

Plain values are written byte for byte as py-amqp writes them. What py-amqp cannot read, or would write as
something else, comes as a number or as bytes that remember their type on the wire. Does no I/O. Called by
`frames` and `properties`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from math import isfinite
from struct import Struct
from struct import error as struct_error
from typing import Any

from amqp.exceptions import FrameSyntaxError
from amqp.serialization import dumps

_EPOCH = datetime(1970, 1, 1)
#: The last second that a `datetime` holds.
_LAST_SECOND = 253402300799
_long = Struct(">I")
_decimal = Struct(">Bi")
_int, _signed = Struct(">i"), Struct(">q")
_octets = [bytes((value,)) for value in range(256)]
_LONG_MIN, _LONG_MAX = -(2**63), 2**63 - 1
#: Numbers by the letter of their type: the letters of RabbitMQ, and those that only other brokers write.
_NUMBERS = {
    letter: Struct(f">{code}") for letter, code in zip(b"bBsUuIilLfdT", "bBhhHiIqqfdq", strict=True)
}
_UNPACKERS = {letter: number.unpack_from for letter, number in _NUMBERS.items()}
_INT_MIN, _INT_MAX = -2147483647, 2147483647
_SMALL, _BIG, _DOUBLE, _TIME, _TEXT = b"ILdTS"


class WireInt(int):
    """An integer that remembers its type on the wire, and is published as it came.

    A timestamp that no `datetime` holds is delivered as one: in milliseconds, negative, or beyond 9999.

    Attributes:
        letter: The letter of its type, as an integer.
    """

    letter: int

    def __new__(cls, value: int, letter: int) -> WireInt:
        """Make one of a value that fits its type."""
        self = super().__new__(cls, value)
        self.letter = letter
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return WireInt, (int(self), self.letter)


class WireFloat(float):
    """A number of single precision, which is published as one."""

    letter = ord("f")


class WireBytes(bytes):
    """A byte array, which is published as one; py-amqp would make it a text."""


def read_table(buffer: bytes, at: int, exact: bool = False) -> tuple[dict[Any, Any], int]:
    """Return the table that starts here, with its length, and where it ends.

    Args:
        buffer: Bytes that hold all of it.
        at: Where it starts.
        exact: Give every number that would be written with another type as a `WireInt` or `WireFloat`,
            not only timestamps that need it.

    Raises:
        FrameSyntaxError: It is no table.
    """
    try:
        return _read_table(buffer, at, exact)
    except (IndexError, struct_error, RecursionError) as exc:
        raise FrameSyntaxError(f"a table that cannot be decoded: {exc!r}") from exc


def _read_table(buffer: bytes, at: int, exact: bool) -> tuple[dict[Any, Any], int]:
    at, end = _span(buffer, at)
    table = {}
    while at < end:
        start = at + 1
        at = start + buffer[at]
        encoded = buffer[start:at]
        try:
            key: Any = encoded.decode()
        except UnicodeDecodeError:
            key = encoded
        table[key], at = _read_item(buffer, at, exact)
    _require_end(at, end)
    return table, at


def _read_array(buffer: bytes, at: int, exact: bool) -> tuple[list[Any], int]:
    at, end = _span(buffer, at)
    items = []
    while at < end:
        item, at = _read_item(buffer, at, exact)
        items.append(item)
    _require_end(at, end)
    return items, at


def _span(buffer: bytes, at: int) -> tuple[int, int]:
    """Return where what has its length before it starts and ends."""
    start = at + 4
    end = start + _long.unpack_from(buffer, at)[0]
    if end > len(buffer):
        raise FrameSyntaxError(
            f"a value of {end - start} bytes where {len(buffer) - start} are left"
        )
    return start, end


def _require_end(at: int, end: int) -> None:
    if at != end:
        raise FrameSyntaxError(f"a table's or array's last value ends {at - end} bytes after it")


def _read_item(buffer: bytes, at: int, exact: bool) -> tuple[Any, int]:
    letter = buffer[at]
    at += 1
    if letter == _TEXT:
        at, end = _span(buffer, at)
        encoded = buffer[at:end]
        try:
            return encoded.decode(), end
        except UnicodeDecodeError:
            return encoded, end
    unpack = _UNPACKERS.get(letter)
    if unpack is not None:
        value = unpack(buffer, at)[0]
        if exact or letter == _TIME:
            value = _number(value, letter)
        return value, at + _NUMBERS[letter].size
    reader = _READERS.get(letter)
    if reader is None:
        raise FrameSyntaxError(f"a table has a value of the unknown type {chr(letter)!r}")
    return reader(buffer, at, exact)


def _number(value: Any, letter: int) -> Any:
    if letter == _TIME:
        fits = 0 <= value <= _LAST_SECOND
        return _EPOCH + timedelta(seconds=value) if fits else WireInt(value, letter)
    if letter == _DOUBLE:
        return value
    if letter == WireFloat.letter:
        return WireFloat(value)
    return value if letter == _letter_of(value) else WireInt(value, letter)


def _letter_of(value: int) -> int:
    return _SMALL if _INT_MIN <= value <= _INT_MAX else _BIG


def _read_bytes(buffer: bytes, at: int, _exact: bool) -> tuple[Any, int]:
    start, end = _span(buffer, at)
    return WireBytes(buffer[start:end]), end


def _read_bool(buffer: bytes, at: int, _exact: bool) -> tuple[Any, int]:
    return bool(buffer[at]), at + 1


def _read_void(_buffer: bytes, at: int, _exact: bool) -> tuple[Any, int]:
    return None, at


def _read_decimal(buffer: bytes, at: int, _exact: bool) -> tuple[Any, int]:
    scale, digits = _decimal.unpack_from(buffer, at)
    sign = 1 if digits < 0 else 0
    # Not by dividing, which forgets zeros at the end, and is rounded as the user's context says.
    return Decimal((sign, tuple(map(int, str(abs(digits)))), -scale)), at + 5


_READERS: dict[int, Callable[[bytes, int, bool], tuple[Any, int]]] = {
    ord("x"): _read_bytes,
    ord("t"): _read_bool,
    ord("V"): _read_void,
    ord("D"): _read_decimal,
    ord("F"): _read_table,
    ord("A"): _read_array,
}


def write_arguments(format: str, values: tuple[object, ...]) -> bytes:
    """Return the arguments of a method as bytes; `format` and `values` as for py-amqp's `dumps`.

    Raises:
        ValueError: AMQP cannot hold one, or brokers do not take it; the message names it.
    """
    try:
        if not format.endswith("F"):
            encoded: bytes = dumps(format, values)
            return encoded
        table: Any = values[-1]
        return bytes(dumps(format[:-1], values[:-1])) + write_table(table or {}, "argument")
    except FrameSyntaxError as exc:
        raise ValueError(str(exc)) from exc
    except struct_error as exc:
        long = [value for value in values if isinstance(value, str) and len(value.encode()) > 255]
        what = f"{long[0]!r} is longer" if long else f"{values!r} holds a larger number"
        raise ValueError(f"a call cannot be sent: {what} than AMQP allows") from exc


def write_table(table: dict[Any, Any], what: str = "header") -> bytes:
    """Return a table as bytes, with its length.

    Args:
        table: The table.
        what: Its items, in the words of an error.

    Raises:
        FrameSyntaxError: AMQP cannot hold a value, or brokers do not take it; the message names the header.
    """
    parts = [b""]
    for key, value in table.items():
        try:
            name = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
            item = _write_item(value) if type(name) is bytes and len(name) < 256 else None
            if item is None:
                parts.append(_left_to_py_amqp("F", {key: value}, value))
            else:
                parts += (_octets[len(name)], name, item)
        except Exception as exc:  # whatever py-amqp or a value's own code raises
            raise FrameSyntaxError(f"the {what} {key!r} cannot be sent: {exc}") from exc
    return _with_length(b"".join(parts))


def _write_array(items: Any) -> bytes:
    parts = []
    for value in items:
        item = _write_item(value)
        parts.append(_left_to_py_amqp("A", [value], value) if item is None else item)
    return _with_length(b"".join(parts))


def _left_to_py_amqp(format: str, whole: object, value: object) -> bytes:
    if isinstance(value, float) and not isfinite(value):
        # RabbitMQ closes the connection of everybody who shares it (541).
        raise ValueError(f"{value!r} is no number that a broker takes")
    encoded: bytes = dumps(format, (whole,))
    return encoded[4:]


def _with_length(encoded: bytes) -> bytes:
    return _long.pack(len(encoded)) + encoded


def _write_item(value: Any) -> bytes | None:
    """Return a value with its type, or None where it is left to py-amqp, which may refuse it."""
    of = type(value)
    if of is str:
        encoded: bytes = value.encode("utf-8", "surrogatepass")
        return b"S" + _long.pack(len(encoded)) + encoded
    if of is int:
        if _INT_MIN <= value <= _INT_MAX:
            return b"I" + _int.pack(value)
        return b"L" + _signed.pack(value) if _LONG_MIN <= value <= _LONG_MAX else None
    if value is None:
        return b"V"
    if of is bool:
        return b"t\x01" if value else b"t\x00"
    if isinstance(value, dict):
        return b"F" + write_table(value)
    if isinstance(value, (list, tuple)):
        return b"A" + _write_array(value)
    return _write_wired(value)


def _write_wired(value: object) -> bytes | None:
    """Do as `_write_item`, for what py-amqp would write as another type, or not at all."""
    if isinstance(value, WireInt):
        return b"%c%b" % (value.letter, _NUMBERS[value.letter].pack(value))
    if isinstance(value, WireFloat) and isfinite(value):
        return b"f" + _NUMBERS[WireFloat.letter].pack(value)
    if isinstance(value, WireBytes):
        return b"x" + _with_length(value)
    if isinstance(value, datetime):
        return b"T" + _signed.pack((_in_utc(value) - _EPOCH) // timedelta(seconds=1))
    return None


def _in_utc(value: datetime) -> datetime:
    """Return a time in UTC, without a zone; one that has none is taken for UTC, as by py-amqp."""
    return value.replace(tzinfo=None) - (value.utcoffset() or timedelta())
