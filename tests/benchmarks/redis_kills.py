"""Kills consumers of a Redis queue with -9 under load, ours and those of kombu in turn, and counts the lost.

    python tests/patched.py tests.benchmarks.redis_kills ROUNDS [PREFETCH]

What is in no note of a handler, in no queue and not unacknowledged is lost. `tests/fault/test_redis_kill.py`
holds the same of greenconsume.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import gevent
import redis
from kombu import Connection, Queue

from greenconsume import Runtime
from tests.benchmarks.worker import mixin_of
from tests.integration.redis.payloads import body_of, payload
from tests.redis_server import RedisServer
from tests.waiting import wait_until

QUEUE = "kills"
WAITING = 5_000
WHO = ("greenconsume", "kombu")


def main(rounds: int, prefetch: int) -> None:
    with tempfile.TemporaryDirectory() as name, closing(RedisServer(Path(name))) as broker:
        for number, who in enumerate(WHO):
            field = Field(broker.url(number), Path(name) / who)
            for _ in range(rounds):
                field.kill_one(who, prefetch)
            print(f"{who}: {rounds} kills, {field.lost_count} lost, {field.most_unacked} unacked")


class Field:
    """A queue under load, and what its consumers noted.

    Attributes:
        lost_count: How many messages are nowhere.
        most_unacked: The most that were handled and not acknowledged at one kill.
    """

    def __init__(self, url: str, notes: Path) -> None:
        self.server: Any = redis.Redis.from_url(url)
        self.lost_count = self.most_unacked = 0
        self._url, self._notes = url, notes
        self._published = 0
        self._known: set[int] = set()  # handled, or lost
        notes.touch()

    def kill_one(self, who: str, prefetch: int) -> None:
        """Start a consumer, kill it when it has begun, and see what became of each message."""
        missing = WAITING - self.server.llen(QUEUE)
        numbers = range(self._published, self._published + missing)
        self.server.lpush(QUEUE, *(payload(number) for number in numbers))
        self._published += missing
        size = self._notes.stat().st_size
        given = {"mixin": who, "url": self._url, "prefetch": prefetch, "notes": str(self._notes)}
        command = [sys.executable, "tests/patched.py", "tests.benchmarks.redis_kills"]
        process = subprocess.Popen([*command, json.dumps(given)])
        wait_until(lambda: self._notes.stat().st_size > size)
        gevent.sleep(random.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: len(self.server.client_list()) == 1)
        self._count()

    def _count(self) -> None:
        handled = {int(line) for line in self._notes.read_text().split()}
        queued = {body_of(raw) for raw in self.server.lrange(QUEUE, 0, -1)}
        raws = [_raw_of(entry) for entry in self.server.hvals("unacked")]
        held = {body_of(raw): raw for raw in raws}
        lost = set(range(self._published)) - handled - queued - held.keys() - self._known
        self.lost_count += len(lost)
        self._known |= lost
        self.most_unacked = max(self.most_unacked, len(handled & held.keys()))
        for number, raw in held.items():  # as what restores does, without the wait
            if number not in handled:
                self.server.rpush(QUEUE, raw)
        self.server.delete("unacked", "unacked_index", "_greenconsume.owners")


def _raw_of(entry: bytes) -> bytes:
    return json.dumps(json.loads(entry)[0]).encode()


def consume(given: dict[str, Any]) -> None:
    """Note the number of each message in a file, in one write, and ack it; until this is killed."""
    notes = os.open(given["notes"], os.O_WRONLY | os.O_APPEND)

    class Noting(mixin_of(given)):  # type: ignore[misc]  # chosen at run time
        def __init__(self, connection: Connection) -> None:
            self.connection = connection

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            prefetch = given["prefetch"]
            return [Consumer([Queue(QUEUE)], callbacks=[self.on_task], prefetch_count=prefetch)]

        def on_task(self, body: int, message: Any) -> None:
            os.write(notes, b"%d\n" % body)
            message.ack()

    if given["mixin"] == "kombu":
        Noting(Connection(given["url"])).run()
    else:
        runtime = Runtime(given["url"])
        runtime.spawn(Noting)
        runtime.run()


if __name__ == "__main__":
    if sys.argv[1].startswith("{"):
        consume(json.loads(sys.argv[1]))
    else:
        main(int(sys.argv[1]), int((sys.argv[2:] or [100])[0]))
