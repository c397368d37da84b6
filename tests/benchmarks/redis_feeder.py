"""The publishing side of a measurement on Redis, in a process of its own; as `feeder` is for RabbitMQ.

    python redis_feeder.py '{"url": ..., "queue": ..., "queues": 1, "messages": 1000, "kind": "plain"}'

Without a rate it fills the queues; with one it publishes stamped messages, `burst` at a time, at that many
bursts per second, and prints the rate that it kept.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable
from time import monotonic, sleep, time
from typing import Any

import redis

PAYLOAD = {"data": "x" * 88}
AT_ONCE = 1000


def main() -> None:
    options = json.loads(sys.argv[1])
    server = redis.Redis.from_url(options["url"])
    queues = [f"{options['queue']}.{number}" for number in range(options.get("queues", 1))]
    if options.get("rate"):
        rate = stamp(server, queues[0], options["messages"], options["burst"], options["rate"])
        print(json.dumps({"fed": rate}))
    elif options.get("kind") == "dramatiq":
        fill_dramatiq(server, queues[0], options["messages"])
    else:
        kind = celery if options.get("kind") == "celery" else plain
        for queue in queues:
            numbers = range(options["messages"] // len(queues))
            push(server, queue, [kind(queue, number) for number in numbers])


def push(server: Any, queue: str, messages: list[str]) -> None:
    for start in range(0, len(messages), AT_ONCE):
        server.lpush(queue, *messages[start : start + AT_ONCE])


def stamp(server: Any, queue: str, messages: int, burst: int, rate: float) -> float:
    began = monotonic()
    for number in range(0, messages, burst):
        sleep(max(0.0, began + number // burst / rate - monotonic()))
        body = {"at": monotonic(), "last": False, "data": "x" * 50}
        server.lpush(queue, *[text(queue, number + n, body, {}) for n in range(burst)])
    return (messages // burst - 1) / (monotonic() - began)


def plain(queue: str, number: int) -> str:
    return text(queue, number, PAYLOAD, {})


def celery(queue: str, number: int) -> str:
    """Celery's message protocol, version 2."""
    key = ident(number)
    headers = {"lang": "py", "task": "bench", "id": key, "root_id": key, "retries": 0}
    nothing = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return text(queue, number, [[PAYLOAD], {}, nothing], headers)


def text(queue: str, number: int, body: object, headers: dict[str, Any]) -> str:
    """Return a message as kombu puts it into a list."""
    properties = {
        "correlation_id": ident(number),
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": ident(number),
    }
    return json.dumps(
        {
            "body": base64.b64encode(json.dumps(body).encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": properties,
        }
    )


def fill_dramatiq(server: Any, queue: str, messages: int) -> None:
    """Put messages where dramatiq's own Redis broker looks for them."""
    for numbers in chunks(range(messages), AT_ONCE):
        keys = [ident(number) for number in numbers]
        server.hset(f"dramatiq:{queue}.msgs", mapping={key: dramatiq(queue, key) for key in keys})
        server.rpush(f"dramatiq:{queue}", *keys)


def dramatiq(queue: str, key: str) -> str:
    return json.dumps(
        {
            "queue_name": queue,
            "actor_name": "bench",
            "args": [PAYLOAD],
            "kwargs": {},
            "options": {"redis_message_id": key},
            "message_id": key,
            "message_timestamp": int(time() * 1000),
        }
    )


def chunks(numbers: range, size: int) -> Iterable[range]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def ident(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012d}"


if __name__ == "__main__":
    main()
