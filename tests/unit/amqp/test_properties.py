"""Encoding properties and addresses: py-amqp's bytes, and its errors, for whatever is given."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

import amqp
import pytest
from amqp.exceptions import FrameSyntaxError
from amqp.serialization import dumps
from hypothesis import given, settings
from hypothesis import strategies as st

from greenconsume.amqp import properties
from greenconsume.amqp.properties import encode_address, encode_properties

texts = st.text(max_size=260) | st.text("\ud800a☃", max_size=90)
times = st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1))
decimals = st.builds(Decimal, st.integers(-999, 999))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.binary()
    | times
    | decimals
)
tables = st.dictionaries(texts, st.recursive(scalars, st.lists), max_size=4)
# What is usual for a property, and what is not: other types, and numbers that do not fit.
KINDS = {
    "s": texts | st.binary(max_size=260) | st.none(),
    "o": st.integers(-2, 300) | st.booleans(),
}
values = {
    name: KINDS.get(kind, tables if kind == "F" else st.integers(-2, 2**65) | texts) | st.none()
    for name, kind in amqp.Message.PROPERTIES
}
anything = {name: usual | scalars for name, usual in values.items()}


def outcome(function, *args):
    """Return what a function returns, or what it raises: type and words."""
    try:
        return function(*args)
    except Exception as exc:  # compared with what py-amqp raises
        return type(exc), str(exc)


def theirs(message):
    return outcome(message._serialize_properties)


@settings(max_examples=200)
@given(st.fixed_dictionaries({}, optional=values) | st.fixed_dictionaries({}, optional=anything))
def test_properties_are_byte_for_byte_what_py_amqp_writes(given_properties):
    message = amqp.Message(b"", **given_properties)
    ours, expected = outcome(encode_properties, message), theirs(message)
    if "the header" in str(ours):  # refused by both; only here it is said which header it is
        assert ours[0] is FrameSyntaxError
        assert issubclass(expected[0], Exception)
    else:
        assert ours == expected


@pytest.mark.parametrize(
    "given_properties",
    [
        {},
        {"content_type": "application/json", "priority": 0, "application_headers": {}},
        {"content_type": "", "message_id": "", "priority": 255},
        {"timestamp": 2**64 - 1, "delivery_mode": True},
        {"correlation_id": "c" * 256},
        {"priority": 256},
        {"reply_to": b"bytes"},
        {"expiration": 1000},
        {"no_such": 1},
    ],
)
def test_the_edges_are_as_py_amqp_has_them(given_properties):
    message = amqp.Message(b"", **given_properties)
    assert outcome(encode_properties, message) == theirs(message)


@settings(max_examples=200)
@given(
    texts | st.none() | st.binary(max_size=260) | st.integers(), texts, st.booleans(), st.booleans()
)
def test_addresses_are_byte_for_byte_what_py_amqp_writes(
    exchange, routing_key, mandatory, immediate
):
    address = (exchange, routing_key, mandatory, immediate)
    assert outcome(encode_address, *address) == outcome(dumps, "Bssbb", (0, *address))


def test_texts_that_are_seldom_the_same_twice_are_not_remembered():
    properties._known_texts.clear()
    encode_properties(amqp.Message(b"", content_type="a/b", message_id="m", correlation_id="c"))
    assert list(properties._known_texts) == ["a/b"]


def test_what_is_remembered_is_bounded():
    for number in range(properties._KNOWN_LIMIT * 2 + 10):
        encode_address("", f"reply.{number}", False, False)
    assert len(properties._known_texts) <= properties._KNOWN_LIMIT
