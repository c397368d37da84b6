"""AMQP framing: bytes to frames and back, held against py-amqp's own frame handler and writer."""

from __future__ import annotations

import struct
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from time import process_time
from types import SimpleNamespace

import amqp
import pytest
from amqp.exceptions import FrameSyntaxError, UnexpectedFrame
from amqp.method_framing import frame_handler, frame_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from greenconsume.amqp.frames import (
    BODY,
    DELIVERY,
    HEADER,
    HEARTBEAT,
    HEARTBEAT_FRAME,
    METHOD,
    FrameParser,
    decode_content,
    encode_content,
    encode_method,
)
from tests import frames

PUBLISH = amqp.spec.Basic.Publish
RETURN = amqp.spec.Basic.Return  # content that py-amqp's decoder takes, too
FRAME_MAX = 4096

ALL_PROPERTIES = {
    "content_type": "application/json",
    "content_encoding": "utf-8",
    "application_headers": {
        "text": "ünïcode",
        "bytes": b"\xff\x00",
        "int": -7,
        "long": 2**40,
        "float": 0.5,
        "true": True,
        "none": None,
        "decimal": Decimal("1.25"),
        "time": datetime(2024, 5, 6, 7, 8, 9),
        "table": {"nested": {"deep": [1, "two", {"three": 3}]}},
        "list": [1, 2.5, "x", None],
    },
    "delivery_mode": 2,
    "priority": 9,
    "correlation_id": "c-1",
    "reply_to": "replies",
    "expiration": "60000",
    "message_id": "m-1",
    "timestamp": 1_700_000_000,
    "type": "event",
    "user_id": "guest",
    "app_id": "app",
    "cluster_id": "cl",
}

any_frame = st.tuples(
    st.sampled_from([METHOD, HEADER, BODY, HEARTBEAT]),
    st.integers(0, 65535),
    st.binary(max_size=200),
)


def parse(parser, *pieces):
    return [frame for piece in pieces for frame in parser.feed(piece)]


def cut(stream, places):
    edges = [0, *sorted(places), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


def decoded(stream):
    """Return what py-amqp makes of a stream that our parser cut into frames."""
    got = []
    connection = SimpleNamespace(bytes_recv=0)
    handle = frame_handler(connection, lambda *args: got.append(args))
    for frame in FrameParser(0).feed(stream):
        handle(frame)
    return got


def round_trip(body, max_size=FRAME_MAX, **properties):
    """Encode a message, and return the message that py-amqp decodes, and the frames."""
    message = amqp.Message(body, **properties)
    encoded = b"".join(encode_content(3, RETURN, b"args", message, max_size))
    ((channel, sig, _, content),) = decoded(encoded)
    assert (channel, sig) == (3, RETURN)
    return content, list(FrameParser(max_size).feed(encoded))


def deliveries(*pieces, max_size=FRAME_MAX):
    """The deliveries of a stream, those that come as frames put together by py-amqp."""
    parser, got = FrameParser(max_size), []

    def on_method(channel, sig, args, content):
        assert sig == amqp.spec.Basic.Deliver
        arguments, _ = amqp.serialization.loads("sLbss", args, 4)
        got.append((channel, *arguments, content.properties, content.body or b""))

    handle = frame_handler(SimpleNamespace(bytes_recv=0), on_method)
    for frame in parse(parser, *pieces):
        if frame[0] == DELIVERY:
            *arguments, encoded, body = frame[2]
            properties, _ = decode_content(encoded, body)
            got.append((frame[1], *arguments, properties, body))
        else:
            handle(frame)
    return got


# -- parsing ----------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.lists(any_frame, max_size=8), st.data())
def test_any_cut_of_a_stream_gives_the_same_frames(sent, data):
    stream = b"".join(frames.raw_frame(*frame) for frame in sent)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    assert parse(FrameParser(FRAME_MAX), *cut(stream, places)) == sent


@settings(max_examples=50)
@given(st.lists(any_frame, max_size=4))
def test_single_bytes_give_the_same_frames(sent):
    stream = b"".join(frames.raw_frame(*frame) for frame in sent)
    pieces = [stream[n : n + 1] for n in range(len(stream))]
    assert parse(FrameParser(FRAME_MAX), *pieces) == sent


def test_a_frame_comes_as_soon_as_its_last_byte_is_there():
    parser = FrameParser(FRAME_MAX)
    frame = frames.raw_frame(METHOD, 1, b"payload")
    assert parse(parser, frame[:-1]) == []
    assert parse(parser, frame[-1:]) == [(METHOD, 1, b"payload")]


def test_an_empty_read_changes_nothing():
    parser = FrameParser(FRAME_MAX)
    frame = frames.heartbeat()
    assert parse(parser, b"", frame[:4], b"", frame[4:], b"") == [(HEARTBEAT, 0, b"")]


def test_a_frame_of_the_agreed_size_passes_and_one_byte_more_does_not():
    largest = frames.raw_frame(BODY, 1, bytes(FRAME_MAX - frames.OVERHEAD))
    assert len(largest) == FRAME_MAX
    assert len(parse(FrameParser(FRAME_MAX), largest)) == 1
    with pytest.raises(FrameSyntaxError, match=r"4097 bytes \(type 3, channel 1\).*4096"):
        parse(
            FrameParser(FRAME_MAX),
            frames.raw_frame(BODY, 1, bytes(FRAME_MAX - frames.OVERHEAD + 1)),
        )


def test_too_large_a_frame_is_refused_by_its_header_alone():
    header = frames.raw_frame(BODY, 1, bytes(FRAME_MAX))[:8]
    with pytest.raises(FrameSyntaxError):
        parse(FrameParser(FRAME_MAX), header)


def test_any_size_passes_where_none_was_agreed():
    frame = frames.raw_frame(BODY, 1, bytes(1_000_000))
    assert parse(FrameParser(0), frame) == [(BODY, 1, bytes(1_000_000))]


def test_frames_before_a_bad_one_still_count():
    bad = frames.raw_frame(METHOD, 1, b"x")[:-1] + b"\x00"
    found = FrameParser(FRAME_MAX).feed(frames.heartbeat() + bad)
    assert next(found) == (HEARTBEAT, 0, b"")
    with pytest.raises(UnexpectedFrame):
        next(found)


def test_a_wrong_end_octet_is_an_unexpected_frame():
    bad = frames.raw_frame(METHOD, 1, b"payload")[:-1] + b"\xcf"
    with pytest.raises(UnexpectedFrame, match="no AMQP 0-9-1 frame"):
        parse(FrameParser(FRAME_MAX), bad)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        b"AMQP\x00\x00\x09\x01",
        b"AMQP\x03\x01\x00\x00",
        b"-ERR unknown command 'AMQP'\r\n",
        b"\x15\x03\x01\x00\x02\x02\x16garbage",
        b"220 mail.example.com ESMTP ready\r\n",
        b"\x00" * 16,
    ],
)
def test_what_is_not_amqp_is_named_so(answer):
    with pytest.raises(UnexpectedFrame, match="is this really an AMQP port") as caught:
        parse(FrameParser(FRAME_MAX), answer)
    assert repr(answer[:4])[2:-1] in str(caught.value)


def test_a_slow_stream_of_single_bytes_stays_linear():
    frame = frames.raw_frame(BODY, 1, bytes(300_000))
    pieces = [frame[n : n + 1] for n in range(len(frame))]
    begun = process_time()
    assert len(parse(FrameParser(0), *pieces)) == 1
    assert process_time() - begun < 3  # a fifth of a second; joining at each byte copies 45 GB


# -- deliveries -------------------------------------------------------------------------------------


def test_a_delivery_cut_anywhere_is_the_same_delivery():
    properties = {"headers": {"n": [1, "two"]}, "priority": 4, "message_id": "m"}
    stream = frames.deliver(
        7, "tag", 2**40, b"body", exchange="e", routing_key="k", redelivered=True, **properties
    ) + frames.deliver(7, "tag", 2**40 + 1, b"")
    whole = deliveries(stream)
    first, second = whole
    assert first[:6] == (7, "tag", 2**40, True, "e", "k")
    assert (first[6]["application_headers"], first[7]) == ({"n": [1, "two"]}, b"body")
    assert (second[2], second[7]) == (2**40 + 1, b"")
    for place in range(len(stream) + 1):
        assert deliveries(stream[:place], stream[place:]) == whole


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.binary(max_size=3 * 100)), max_size=6),
    st.integers(0, 2**64 - 1),
    st.data(),
)
def test_any_cut_of_deliveries_and_what_is_between_gives_the_same(sent, tag, data):
    small = 100 + frames.OVERHEAD
    stream = b"".join(
        frames.deliver(channel, "t", tag, body, frame_max=small, content_encoding="binary")
        + data.draw(st.sampled_from([b"", frames.heartbeat()]))
        for channel, body in sent
    )
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    got = deliveries(*cut(stream, places))
    assert [(entry[0], entry[2], entry[7]) for entry in got] == [
        (channel, tag, body) for channel, body in sent
    ]


def test_all_properties_of_a_delivery_arrive():
    sent = {**ALL_PROPERTIES, "headers": ALL_PROPERTIES["application_headers"]}
    del sent["application_headers"]
    ((*_, properties, body),) = deliveries(frames.deliver(1, "t", 1, b"{}", **sent))
    assert (properties, body) == (ALL_PROPERTIES, b"{}")


def test_a_delivery_without_properties_has_none():
    bare = frames.method_frame(1, "basic.deliver", "t", 1, False, "", "") + frames.content(1, b"x")
    assert deliveries(bare) == [(1, "t", 1, False, "", "", {}, b"x")]


def test_what_one_handler_does_to_properties_no_other_message_sees():
    ((*_, encoded, body),) = [
        frame[2] for frame in parse(FrameParser(0), frames.deliver(1, "t", 1, b"{}"))
    ]
    first, _ = decode_content(encoded, body)
    first["content_type"] = "changed"
    first["more"] = 1
    assert decode_content(encoded, body)[0] == {
        "content_type": "application/json",
        "content_encoding": "utf-8",
    }


def test_deliveries_of_two_channels_that_interleave_come_apart():
    one = frames.deliver(1, "t", 1, b"a" * 250, frame_max=108, content_encoding="binary")
    two = frames.deliver(2, "t", 1, b"b" * 250, frame_max=108, content_encoding="binary")
    pieces = [frames.parse(bytearray(data)) for data in (one, two)]
    mixed = b"".join(
        frames.raw_frame(frame.type, frame.channel, frame.payload)
        for pair in zip(*pieces, strict=True)
        for frame in pair
    )
    assert [(entry[0], entry[7]) for entry in deliveries(mixed)] == [
        (1, b"a" * 250),
        (2, b"b" * 250),
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8"])
def test_a_body_is_text_where_its_encoding_is_named_and_right(encoding):
    properties, body = decode_content(_properties(encoding), "naïve".encode(encoding))
    assert (properties["content_encoding"], body) == (encoding, "naïve")


@pytest.mark.parametrize(
    "encoding", ["binary", "utf-8", "no-such", "base64", "gzip", "nul\0", "\ud800"]
)
def test_a_body_is_bytes_where_its_encoding_is_wrong(encoding):
    assert decode_content(_properties(encoding), b"\xff\xfe\xfd")[1] == b"\xff\xfe\xfd"


def _properties(encoding):
    header = frames.parse(bytearray(frames.header_frame(1, 3, content_encoding=encoding)))[0]
    return header.payload[12:]


# -- encoding ---------------------------------------------------------------------------------------


def test_a_heartbeat_is_what_the_specification_says():
    assert frames.heartbeat() == HEARTBEAT_FRAME


def test_a_method_is_what_the_specification_says():
    arguments = amqp.serialization.dumps("Lb", (7, True))
    assert encode_method(5, (60, 80), arguments, 4096) == frames.basic_ack(5, 7, True)


@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        FRAME_MAX - 9,
        FRAME_MAX - 8,
        FRAME_MAX - 7,
        FRAME_MAX,
        2 * (FRAME_MAX - 8) - 1,
        2 * (FRAME_MAX - 8),
        2 * (FRAME_MAX - 8) + 1,
        50_000,
    ],
)
def test_bodies_of_every_size_round_trip(size):
    body = bytes(n % 251 for n in range(size))
    content, sent = round_trip(body)
    assert (content.body or b"") == body
    bodies = [payload for kind, _, payload in sent if kind == BODY]
    assert len(bodies) == -(-size // (FRAME_MAX - 8))  # none for an empty body
    assert {len(part) for part in bodies[:-1]} <= {FRAME_MAX - 8}


def test_all_properties_round_trip():
    content, _ = round_trip(b"x", **ALL_PROPERTIES)
    assert content.properties == ALL_PROPERTIES


def test_a_text_body_is_encoded_as_it_says():
    content, _ = round_trip("naïve ☃", content_encoding="utf-16")
    assert content.body.decode("utf-16") == "naïve ☃"
    assert content.properties["content_encoding"] == "utf-16"


def test_a_text_body_that_says_nothing_is_utf_8():
    content, _ = round_trip("naïve ☃")
    assert (content.body.decode(), content.properties["content_encoding"]) == ("naïve ☃", "utf-8")


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_bodies_that_are_not_bytes_round_trip(kind):
    content, _ = round_trip(kind(b"abc" * 2000))
    assert content.body == b"abc" * 2000


def test_without_an_agreed_size_bodies_are_cut_at_the_default():
    content, sent = round_trip(bytes(300_000), max_size=0)
    assert len(content.body) == 300_000
    assert max(len(payload) for _, _, payload in sent) == 131072 - 8


@settings(max_examples=60)
@given(st.binary(max_size=3 * FRAME_MAX), st.integers(1, 65535))
def test_content_is_byte_for_byte_what_py_amqp_writes(body, channel):
    written = []
    transport = SimpleNamespace(write=lambda data: written.append(bytes(data)))
    theirs = frame_writer(SimpleNamespace(frame_max=FRAME_MAX, bytes_sent=0), transport)
    theirs(1, channel, PUBLISH, b"args", amqp.Message(body, priority=3))
    ours = encode_content(channel, PUBLISH, b"args", amqp.Message(body, priority=3), FRAME_MAX)
    assert b"".join(ours) == b"".join(written)


texts = st.text(max_size=8) | st.sampled_from(["application/json", "utf-8", "x" * 255, "x" * 256])
odd = st.none() | st.booleans() | st.integers(-1, 2**64) | st.binary(max_size=4) | texts
tables = st.dictionaries(st.text(max_size=4), odd | st.lists(odd, max_size=2), max_size=3)


@settings(max_examples=200)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: texts if kind == "s" else st.integers(0, 255) if kind == "o" else tables
            for name, kind in amqp.Message.PROPERTIES
            if kind in "soF"
        },
    ),
    st.dictionaries(
        st.sampled_from([name for name, _ in amqp.Message.PROPERTIES]), odd, max_size=2
    ),
)
def test_properties_are_encoded_or_refused_as_py_amqp_does(usual, unusual):
    properties = {**usual, **unusual}

    def theirs():
        return amqp.Message(b"x", **properties)._serialize_properties()

    def ours():
        encoded = encode_content(1, PUBLISH, b"args", amqp.Message(b"x", **properties), 0)
        return frames.parse(bytearray(b"".join(encoded)))[1].payload[12:]

    assert outcome_of(ours) == outcome_of(theirs)


def outcome_of(function):
    try:
        return function()
    except struct.error:  # ours names the header instead
        return amqp.FrameSyntaxError
    except Exception as exc:  # compared by the test
        return type(exc)


def test_what_was_encoded_is_parsed_again_however_it_is_cut():
    message = amqp.Message(b"body" * 3000, **ALL_PROPERTIES)
    stream = b"".join(encode_content(1, PUBLISH, b"args", message, FRAME_MAX))
    whole = parse(FrameParser(FRAME_MAX), stream)
    for place in range(0, len(stream), 97):
        assert parse(FrameParser(FRAME_MAX), stream[:place], stream[place:]) == whole
