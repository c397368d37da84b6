"""The publishing side of a measurement, in a process of its own: never the one that is measured.

    python feeder.py '{"url": ..., "queue": ..., "queues": 1, "messages": 1000, "kind": "plain"}'

Without a rate it fills the queues and returns when the broker has it all. With one it publishes stamped
messages, `burst` at a time, at that many bursts per second, and prints the rate that it kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from time import monotonic, sleep, time
from typing import Any

import amqp
from kombu.utils.url import parse_url

PAYLOAD = {"data": "x" * 88}


def main() -> None:
    options = json.loads(sys.argv[1])
    parts = parse_url(options["url"])
    with amqp.Connection(
        host=f"{parts['hostname']}:{parts['port']}",
        userid=parts["userid"],
        password=parts["password"],
        virtual_host=parts["virtual_host"],
    ) as connection:
        channel = connection.channel()
        queues = [f"{options['queue']}.{number}" for number in range(options.get("queues", 1))]
        for queue in queues:
            channel.queue_declare(
                queue, auto_delete=False, **DECLARED[options.get("kind", "plain")]
            )
        if options.get("rate"):
            rate = stamp(channel, queues[0], options["messages"], options["burst"], options["rate"])
            print(json.dumps({"fed": rate}))
        elif len(queues) > 1:
            fan_out(channel, queues, options["messages"])
        else:
            fill(channel, queues[0], options["messages"], KINDS[options.get("kind", "plain")])


def fill(
    channel: amqp.Channel, queue: str, messages: int, kind: Callable[[str, int], amqp.Message]
) -> None:
    for number in range(messages):
        channel.basic_publish(kind(queue, number), routing_key=queue)
    # The broker serves a channel in order: once it answers, all of them are in their queue.
    channel.queue_declare(queue, passive=True)


def fan_out(channel: amqp.Channel, queues: list[str], messages: int) -> None:
    """Fill many queues alike: the broker copies."""
    exchange = f"{queues[0]}.all"
    channel.exchange_declare(exchange, "fanout", auto_delete=False)
    for queue in queues:
        channel.queue_bind(queue, exchange, nowait=True)
    for number in range(messages // len(queues)):
        channel.basic_publish(plain("", number), exchange)
    for queue in queues:
        channel.queue_declare(queue, passive=True)


def stamp(channel: amqp.Channel, queue: str, messages: int, burst: int, rate: float) -> float:
    began = monotonic()
    for number in range(messages):
        if number % burst == 0:
            sleep(max(0.0, began + number // burst / rate - monotonic()))
        body = {"at": monotonic(), "last": number % burst == burst - 1, "data": "x" * 50}
        channel.basic_publish(text(body), routing_key=queue)
    return (messages // burst - 1) / (monotonic() - began)


def plain(queue: str, number: int) -> amqp.Message:
    return text(PAYLOAD)


def celery(queue: str, number: int) -> amqp.Message:
    """Celery's message protocol, version 2."""
    key = f"00000000-0000-0000-0000-{number:012d}"
    headers = {"lang": "py", "task": "bench", "id": key, "root_id": key, "retries": 0}
    nothing = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    message = text([[PAYLOAD], {}, nothing])
    message.properties.update(application_headers=headers, correlation_id=key)
    return message


def dramatiq(queue: str, number: int) -> amqp.Message:
    return text(
        {
            "queue_name": queue,
            "actor_name": "bench",
            "args": [PAYLOAD],
            "kwargs": {},
            "options": {},
            "message_id": f"00000000-0000-0000-0000-{number:012d}",
            "message_timestamp": int(time() * 1000),
        }
    )


def text(body: object) -> amqp.Message:
    return amqp.Message(
        json.dumps(body),
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=1,
    )


KINDS = {"plain": plain, "celery": celery, "dramatiq": dramatiq}

#: How each kind's consumer declares its queue: who comes second must say the same.
DECLARED: dict[str, dict[str, Any]] = {
    "plain": {"durable": False},
    "celery": {"durable": False},
    "dramatiq": {
        "durable": True,
        "arguments": {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "bench.0.XQ"},
    },
}


if __name__ == "__main__":
    main()
