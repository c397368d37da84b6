"""Headers of others: every AMQP field type and its extremes, through every path that a message takes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import amqp
import pytest
from kombu import Producer, Queue

from greenconsume import Publisher, Reject, Requeue, Retry
from greenconsume.amqp.fields import read_table
from greenconsume.amqp.properties import decode_properties
from greenconsume.failures import message_copy
from greenconsume.failures.dead_letters import DeadLetters
from tests.integration.consumers import SOON, Recorder, consuming, green_connection
from tests.messages import declare, queue_depth
from tests.options import say
from tests.waiting import wait_until

NUMBERS = {
    "b": ("b", -128, 127),
    "B": ("B", 0, 255),
    "s": ("h", -(2**15), 2**15 - 1),
    "u": ("H", 0, 2**16 - 1),
    "I": ("i", -(2**31), 2**31 - 1),
    "i": ("I", 0, 2**32 - 1),
    "l": ("q", -(2**63), 5, 2**63 - 1),
    "f": ("f", 0.5, -(2.0**127)),
    "d": ("d", 0.1, 1.7976931348623157e308),
    # Seconds, milliseconds, negative, beyond the year 9999, and as large as can be.
    "T": ("Q", 1_700_000_000, 1_700_000_000_000, 2**64 - 86_400, 253_402_300_800, 2**64 - 1),
}


def text(letter: bytes, content: bytes) -> bytes:
    return letter + struct.pack(">I", len(content)) + content


def every_field() -> Iterator[bytes]:
    """Each type that RabbitMQ takes in a header, with its extremes."""
    for letter, (format, *values) in NUMBERS.items():
        for value in values:
            yield letter.encode() + struct.pack(f">{format}", value)
    for scale, digits in [(0, 0), (2, 1000), (255, 2**31 - 1), (30, -(2**31))]:
        yield b"D" + struct.pack(">Bi", scale, digits)
    yield from (b"t\x00", b"t\x01", b"V")
    for content in (b"", "☃".encode(), b"\xff\xfe", b"plain"):
        yield from (text(b"S", content), text(b"x", content))
    nested = table({"l": b"l" + struct.pack(">q", 5), "T": b"T" + struct.pack(">q", -1)})
    yield from (b"F" + nested, text(b"A", b"F" + nested + text(b"x", b"y")))


def table(fields: dict[str, bytes]) -> bytes:
    return text(b"", b"".join(bytes([len(k)]) + k.encode() + v for k, v in fields.items()))


FIELDS = {f"f{number}": field for number, field in enumerate(every_field())}
BODY = b"\xa4body"


class Failing(Recorder):
    """Fails on the first delivery, and keeps the headers of each."""

    def __init__(self, broker: Any, queue: Any, on_error: Any, fail: bool = True) -> None:
        super().__init__(broker, queue, self.look)
        say(self, on_error=on_error)
        self.accept = None
        self.seen: list[dict[str, Any]] = []
        self.fail = fail

    def look(self, _body: Any, message: Any) -> None:
        self.seen.append(message.headers)
        if self.fail and len(self.seen) == 1:
            raise LookupError


def publish_all_fields(url: str, queue: str) -> None:
    headers, _ = read_table(table(FIELDS), 0, exact=True)
    with green_connection(url) as connection:
        message = amqp.Message(
            BODY,
            application_headers=headers,
            timestamp=2**64 - 1,
            content_type="application/data",
            content_encoding="binary",
        )
        connection.channel().basic_publish_confirm(message, "", queue)


def encoded_fields(encoded: bytes) -> dict[str, bytes]:
    """Return what the fields of a message's headers look like on the wire, ours and the broker's apart."""
    headers = decode_properties(encoded, exact=True)["application_headers"]
    return {
        name: message_copy.encode_properties(amqp.Message(application_headers={name: value}))
        for name, value in headers.items()
        if name in FIELDS
    }


def taken(url: str, queue: str) -> amqp.Message:
    with green_connection(url) as connection:
        chan = connection.channel()
        message = wait_until(lambda: chan.basic_get(queue), SOON, f"a message in {queue}")
        chan.basic_ack(message.delivery_tag)
        return message


SENT = encoded_fields(b"\x20\x00" + table(FIELDS))


@pytest.fixture(params=["classic", "quorum"])
def queue(request, amqp_url, queue_name) -> Queue:
    arguments = {"x-queue-type": request.param}
    declare(amqp_url, queue_name, x_queue_type=request.param)
    return Queue(queue_name, queue_arguments=arguments)


def test_the_broker_hands_every_field_on_as_it_came(amqp_url, queue):
    publish_all_fields(amqp_url, queue.name)
    assert encoded_fields(taken(amqp_url, queue.name).encoded) == SENT


@pytest.mark.parametrize("on_error", [Requeue(), Retry(delays=[0.05])])
def test_every_field_reaches_a_handler_and_comes_again(amqp_url, queue, on_error):
    """HAZARDS row 33: a timestamp that no `datetime` holds, for one."""
    consumer = Failing(amqp_url, queue, on_error)
    with consuming(consumer):
        publish_all_fields(amqp_url, queue.name)
        wait_until(lambda: len(consumer.seen) == 2, SOON)
    expected, _ = read_table(table(FIELDS), 0)
    for headers in consumer.seen:
        assert {name: headers[name] for name in FIELDS} == expected


def test_every_field_is_in_the_dead_letter_and_in_what_is_replayed(amqp_url, queue):
    dead = f"{queue.name}.dead"
    with consuming(Failing(amqp_url, queue, Retry(0))):
        publish_all_fields(amqp_url, queue.name)
        wait_until(lambda: queue_depth(amqp_url, dead) == 1, SOON)
    with DeadLetters(amqp_url, dead) as letters:
        [letter] = letters
        assert {name: letter.headers[name] for name in FIELDS} == read_table(table(FIELDS), 0)[0]
        letters.replay(letter)
    back = taken(amqp_url, queue.name)
    assert encoded_fields(back.encoded) == SENT
    assert (back.body, back.properties["timestamp"]) == (BODY, 2**64 - 1)


def test_every_field_waits_for_its_retry_as_it_came(amqp_url, queue):
    with consuming(Failing(amqp_url, queue, Retry(delays=[60]))):
        publish_all_fields(amqp_url, queue.name)
        waiting = taken(amqp_url, f"{queue.name}.retry.60000")
    assert encoded_fields(waiting.encoded) == SENT
    assert waiting.properties["timestamp"] == 2**64 - 1


@pytest.mark.parametrize("way", ["producer", "publisher"])
def test_what_a_handler_publishes_on_has_the_same_values(amqp_url, queue, queue_name, way):
    declare(amqp_url, f"{queue_name}-on")
    consumer = Failing(amqp_url, queue, Reject(), fail=False)
    with consuming(consumer):
        publish_all_fields(amqp_url, queue.name)
        wait_until(lambda: consumer.seen, SOON)
    headers = {name: consumer.seen[0][name] for name in FIELDS}
    options = {"headers": headers, "serializer": "json"}
    if way == "publisher":
        with Publisher(amqp_url) as publisher:
            publisher.publish({}, f"{queue_name}-on", **options)
    else:
        with green_connection(amqp_url) as connection:
            Producer(connection).publish({}, routing_key=f"{queue_name}-on", **options)
    message = taken(amqp_url, f"{queue_name}-on")
    assert {name: message.headers[name] for name in FIELDS} == headers
    sent = encoded_fields(message.encoded)
    typed = [name for name, field in FIELDS.items() if field[:1] in b"Tx"]
    assert [sent[name] for name in typed] == [SENT[name] for name in typed]


def test_an_empty_body_is_an_empty_text_and_stays_empty(amqp_url, queue_name):
    declare(amqp_url, queue_name)
    bodies: list[Any] = []
    consumer = Recorder(amqp_url, Queue(queue_name), lambda body, _: bodies.append(body))
    with consuming(consumer):
        with green_connection(amqp_url) as connection:
            connection.channel().basic_publish_confirm(amqp.Message(b""), "", queue_name)
        wait_until(lambda: bodies, SOON)
    assert [(type(body), body) for body in bodies] == [(str, "")]
