"""Owns messages as they are in a Redis database, as kombu writes them, and what is seen of them there."""

from __future__ import annotations

import base64
import json
from time import time
from typing import Any

from greenconsume.redis.keyspace import Keyspace


def payload(body: Any, priority: int = 0, **headers: Any) -> bytes:
    """A message with white space and an order of names that no encoder of ours would choose."""
    encoded = base64.b64encode(json.dumps(body).encode()).decode()
    message = {
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"routing_key": "elsewhere", "exchange": "other"},
            "delivery_tag": f"tag-{body}",
            "priority": priority,
        },
        "headers": headers,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "body": encoded,
        "unknown": [],
    }
    return json.dumps(message, separators=(" ,", " : ")).encode()


def put(server: Any, queue: str, *bodies: Any) -> list[bytes]:
    """Put messages into a queue, as any publisher does, and return their bytes."""
    made = [payload(body) for body in bodies]
    for each in made:
        server.lpush(queue, each)
    return made


def bodies_in(server: Any, key: str) -> list[Any]:
    """The bodies in a list, the next one first."""
    return [body_of(raw) for raw in reversed(server.lrange(key, 0, -1))]


def body_of(raw: bytes) -> Any:
    return json.loads(base64.b64decode(json.loads(raw)["body"]))


def held_count(server: Any) -> int:
    """Return how many messages are unacknowledged, in the hash or still in its index."""
    return max(int(server.hlen("unacked")), int(server.zcard("unacked_index")))


def abandon(
    server: Any, queue: str, *bodies: Any, age: float = 7200.0, owner: str = "gone."
) -> None:
    """Leave messages unacknowledged, as a process does that was killed."""
    for number, body in enumerate(bodies, 1):
        field = f"{owner}{number}"
        server.hset("unacked", field, b"[" + payload(body) + Keyspace.tail_of(queue))
        server.zadd("unacked_index", {field: time() - age})


def refreshed_at(server: Any) -> float:
    """Return when somebody last said that the oldest of what is held is at work."""
    [(_, at)] = server.zrange("unacked_index", 0, 0, withscores=True)
    return at
