"""AMQP field tables: every type and its extremes, as they are delivered and as they go back."""

from __future__ import annotations

import pickle
import struct
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import amqp
import pytest
from amqp.exceptions import FrameSyntaxError
from amqp.serialization import dumps, loads
from hypothesis import given
from hypothesis import strategies as st

from greenconsume.amqp.fields import WireBytes, WireFloat, WireInt, read_table, write_table
from greenconsume.amqp.frames import decode_content
from greenconsume.amqp.properties import decode_properties, encode_properties


def item(letter, format, *values):
    return letter.encode() + struct.pack(f">{format}", *values)


def text(letter, content):
    return item(letter, "I", len(content)) + content


def table_of(*fields):
    joined = b"".join(b"\x01" + bytes([97 + n]) + field for n, field in enumerate(fields))
    return struct.pack(">I", len(joined)) + joined


# Each type of RabbitMQ's with its extremes; and what it is delivered as.
FIELDS = [
    *((item("b", "b", value), value) for value in (-128, 127)),
    *((item("B", "B", value), value) for value in (0, 255)),
    *((item("s", "h", value), value) for value in (-(2**15), 2**15 - 1)),
    *((item("u", "H", value), value) for value in (0, 2**16 - 1)),
    *((item("I", "i", value), value) for value in (-(2**31), 0, 2**31 - 1)),
    *((item("i", "I", value), value) for value in (0, 2**32 - 1)),
    *((item("l", "q", value), value) for value in (-(2**63), -1, 2**63 - 1)),
    *((item("L", "q", value), value) for value in (-(2**63), 2**63 - 1)),
    *((item("f", "f", value), value) for value in (0.5, -(2.0**127), 2.0**-149)),
    *((item("d", "d", value), value) for value in (0.1, 1.7976931348623157e308, 5e-324)),
    (item("D", "Bi", 0, -(2**31)), Decimal(-(2**31))),
    (item("D", "Bi", 255, 2**31 - 1), Decimal((0, tuple(map(int, str(2**31 - 1))), -255))),
    (item("D", "Bi", 2, 1000), Decimal("10.00")),
    (item("T", "Q", 0), datetime(1970, 1, 1)),
    (item("T", "Q", 253402300799), datetime(9999, 12, 31, 23, 59, 59)),
    (item("T", "Q", 253402300800), 253402300800),
    (item("T", "Q", 1_700_000_000_000), 1_700_000_000_000),
    (item("T", "q", -1), -1),
    (item("T", "q", -(2**63)), -(2**63)),
    (item("T", "Q", 2**63 - 1), 2**63 - 1),
    (b"t\x01", True),
    (b"t\x00", False),
    (b"V", None),
    (text("S", b""), ""),
    (text("S", "☃".encode()), "☃"),
    (text("S", b"\xff\xfe"), b"\xff\xfe"),
    (text("x", b""), b""),
    (text("x", b"plain"), b"plain"),
    (text("x", bytes(range(256))), bytes(range(256))),
    (b"F" + table_of(item("l", "q", 5)), {"a": 5}),
    (b"F" + table_of(), {}),
    (b"A" + text("", item("T", "q", -7) + text("x", b"y")), [-7, b"y"]),
    (b"A\x00\x00\x00\x00", []),
]


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_every_field_is_delivered_as_its_value(field, value):
    encoded = table_of(field)
    table, end = read_table(encoded, 0)
    assert (table, end) == ({"a": value}, len(encoded))
    assert isinstance(table["a"], type(value))


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_every_field_goes_back_byte_for_byte(field, value):
    encoded = table_of(field, field)
    assert write_table(read_table(encoded, 0, exact=True)[0]) == encoded


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_what_a_handler_publishes_again_has_the_same_value(field, value):
    table, _ = read_table(table_of(field), 0)
    again, _ = read_table(write_table(table), 0)
    assert again == table
    assert type(again["a"]) is type(table["a"])


@pytest.mark.parametrize("value", [-1, 253402300800, 1_700_000_000_000, 2**63 - 1, -(2**63)])
def test_a_timestamp_that_no_datetime_holds_is_published_as_a_timestamp(value):
    table, _ = read_table(table_of(item("T", "q", value)), 0)
    assert write_table({"a": table["a"]}) == table_of(item("T", "q", value))


def test_a_time_before_1970_is_published():
    assert write_table({"a": datetime(1969, 12, 31, 23, 59, 59)}) == table_of(item("T", "q", -1))


@pytest.mark.parametrize("hours", [-5, 0, 14])
def test_a_time_with_a_zone_is_published_in_utc(hours):
    zone = timezone(timedelta(hours=hours))
    for moment in (datetime(1969, 12, 31, 23, tzinfo=zone), datetime(2024, 2, 29, tzinfo=zone)):
        field = item("T", "q", int(moment.timestamp()))
        assert write_table({"a": moment}) == table_of(field)


def test_numbers_and_bytes_that_remember_their_type_are_what_they_are():
    wired = {"a": WireInt(5, ord("T")), "b": WireFloat(0.5), "c": WireBytes(b"x")}
    assert wired == {"a": 5, "b": 0.5, "c": b"x"}
    assert write_table(pickle.loads(pickle.dumps(wired))) == write_table(wired)
    # py-amqp takes them, too.
    assert loads("F", dumps("F", [wired]), 0)[0] == [{"a": 5, "b": 0.5, "c": "x"}]


texts = st.text(max_size=20)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1)).map(
        lambda time: time.replace(microsecond=0)
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(texts, plain, max_size=4))
def test_plain_values_are_read_and_written_as_by_py_amqp(table):
    encoded = dumps("F", [table])
    assert write_table(table) == encoded
    assert read_table(encoded, 0) == (loads("F", encoded, 0)[0][0], len(encoded))
    assert write_table(read_table(encoded, 0, exact=True)[0]) == encoded


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\x00\x00\x00\x05\x01aI",
        b"\x00\x00\x00\x03\x01a?",
        b"\x00\x00\x00\x07\x01aS\x00\x00\x00\x09",
        b"\x00\x00\x00\x03\x01aI\x00\x00\x00\x01",
        table_of(b"A\x00\x00\x00\x02I\x00\x00\x00\x01"),
        table_of(b"A\x00\x00\xff\xff" * 5000),
    ],
)
def test_a_table_that_is_none_is_a_syntax_error(broken):
    with pytest.raises(FrameSyntaxError):
        read_table(broken, 0)


@given(st.binary(max_size=60))
def test_whatever_the_bytes_it_is_a_table_or_a_syntax_error(garbage):
    try:
        read_table(struct.pack(">I", len(garbage)) + garbage, 0)
    except FrameSyntaxError:
        pass


def test_properties_go_back_byte_for_byte_whatever_else_they_hold():
    table = table_of(item("T", "Q", 1_700_000_000_000), text("x", b"plain"), item("l", "q", 5))
    encoded = b"\xf8\x40\x03a/b\x05utf-8" + table + b"\x02\x09" + struct.pack(">Q", 2**64 - 1)
    decoded = decode_properties(encoded, exact=True)
    assert decoded["timestamp"] == 2**64 - 1
    assert encode_properties(amqp.Message(b"", **decoded)) == encoded
    # A value that py-amqp converts does not make it write the headers.
    decoded["priority"] = True
    assert table in encode_properties(amqp.Message(b"", **decoded))


@pytest.mark.parametrize("encoded", [b"\x00\x00", b"\x40\x00\x06binary", b"\x40\x00\x05utf-8"])
def test_an_empty_body_is_an_empty_text(encoded):
    """As with kombu on py-amqp."""
    assert decode_content(encoded, b"")[1] == ""
    assert type(decode_content(encoded, b"")[1]) is str


@pytest.mark.parametrize("number", [float("nan"), WireFloat("nan"), WireFloat("inf")])
def test_what_is_no_number_is_refused_by_the_name_of_its_header(number):
    with pytest.raises(FrameSyntaxError, match="the header 'share' cannot be sent"):
        write_table({"good": 1, "share": number})
