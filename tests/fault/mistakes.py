"""Owns the ways to make a broker close a connection that the neighbours' tests and their table go through.

Each is called with the channel of a consumer, and the name of its queue, while it sets up its consumers. What
greenconsume refuses at the call is written past it, as a library of somebody else's might.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import amqp
from kombu import Exchange

Mistake = Callable[[Any, str], object]


def unknown_exchange_type(channel: Any, queue: str) -> None:
    """503; RabbitMQ 4 answers 406, which closes the channel alone."""
    Exchange("e", type="no-such-type", channel=channel).declare()


def tag_in_use(channel: Any, queue: str) -> None:
    """530."""
    for _ in range(2):
        channel.basic_consume(queue, "the-same", callback=print)


def global_qos(channel: Any, queue: str) -> None:
    """540, on a quorum queue."""
    name = f"{queue}-quorum"
    channel.queue_declare(
        name, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"}
    )
    channel.basic_qos(0, 10, True)
    channel.basic_consume(name, callback=print)


def recover_without_requeue(channel: Any, queue: str) -> None:
    """540."""
    channel.send_method((60, 110), "b", (False,), wait=(60, 111))


def flow_off(channel: Any, queue: str) -> None:
    """540."""
    channel.send_method((20, 20), "b", (False,), wait=(20, 21))


def opened_twice(channel: Any, queue: str) -> None:
    """504."""
    channel.send_method((20, 10), "s", ("",), wait=(20, 11))


def immediate(channel: Any, queue: str) -> None:
    """540."""
    channel.basic_publish(amqp.Message("x"), routing_key=queue, immediate=True)
    channel.queue_declare(queue, passive=True)


def stream_rejected(channel: Any, queue: str) -> None:
    """540: a stream's message is rejected; greenconsume itself acknowledges it instead."""
    name = f"{queue}-stream"

    def reject(message: Any) -> None:
        _write(channel, (1, struct.pack(">HHQB", 60, 90, message.delivery_tag, 1)))

    channel.queue_declare(
        name, durable=True, auto_delete=False, arguments={"x-queue-type": "stream"}
    )
    channel.basic_qos(0, 10, False)
    channel.basic_consume(name, callback=reject, arguments={"x-stream-offset": "first"})
    channel.basic_publish(amqp.Message("x"), routing_key=name)


def nan_header(channel: Any, queue: str) -> None:
    """541."""
    number = b"\x05sharef" + struct.pack(">f", float("nan"))
    table = struct.pack(">I", len(number)) + number
    properties = struct.pack(">HHQH", 60, 0, 1, 0x2000) + table
    _write(channel, _publish(queue), (2, properties), (3, b"x"))
    channel.queue_declare(queue, passive=True)


def frame_too_large(channel: Any, queue: str) -> None:
    """501."""
    _write(
        channel, _publish(queue), (2, struct.pack(">HHQH", 60, 0, 200_000, 0)), (3, bytes(200_000))
    )
    channel.queue_declare(queue, passive=True)


def unexpected_frame(channel: Any, queue: str) -> None:
    """505: what is published has no header."""
    _write(channel, _publish(queue))
    channel.queue_declare(queue, passive=True)


def transient_queue(channel: Any, queue: str) -> None:
    """541, from RabbitMQ 4.3 on."""
    channel.queue_declare(f"{queue}-transient", durable=False, auto_delete=False)


def any_global_qos(channel: Any, queue: str) -> None:
    """540, from RabbitMQ 4.3 on."""
    channel.basic_qos(0, 10, True)


MISTAKES: list[Mistake] = [
    unknown_exchange_type,
    tag_in_use,
    global_qos,
    recover_without_requeue,
    flow_off,
    opened_twice,
    immediate,
    stream_rejected,
    nan_header,
    frame_too_large,
    unexpected_frame,
]
#: These are made against the scripted peer, which says what RabbitMQ 4.3 says.
OF_4_3: list[Mistake] = [transient_queue, any_global_qos]


def _publish(queue: str) -> tuple[int, bytes]:
    key = queue.encode()
    return 1, struct.pack(">HHHBB", 60, 40, 0, 0, len(key)) + key + b"\0"


def _write(channel: Any, *frames: tuple[int, bytes]) -> None:
    channel.connection.link.write(
        [
            struct.pack(">BHI", kind, channel.channel_id, len(payload)) + payload + b"\xce"
            for kind, payload in frames
        ]
    )
