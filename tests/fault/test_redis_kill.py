"""Redis: consumers that are killed with -9, and consumers that stop, over and over under load.

Every round starts a process, lets it consume for a while, ends it and looks at the server: what is in no
note of a handler, in no queue and not unacknowledged would be lost. GREENCONSUME_TEST_ROUNDS sets how many
rounds there are.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
import redis

from tests.integration.redis.payloads import body_of, payload
from tests.rounds import rounds
from tests.waiting import wait_until

ROUNDS = rounds(5)
#: What a handler may have finished and not acknowledged when it is killed.
MAX_UNACKED = 16
PROCESS = Path(__file__).with_name("redis_worker.py")


class Field:
    """A queue under load, the processes that consume it, and what they noted."""

    def __init__(self, url: str, queue: str, folder: Path) -> None:
        self.server: Any = redis.Redis.from_url(url)
        self.queue = queue
        self.published = 0
        self._others = self._clients()
        self._url = url
        self._notes = folder / "notes"
        self._notes.touch()

    def _clients(self) -> set[str]:
        return {client["id"] for client in self.server.client_list()}

    def fill(self, count: int) -> None:
        """Publish until so many messages wait."""
        while (missing := count - self.server.llen(self.queue)) > 0:
            numbers = range(self.published, self.published + missing)
            self.server.lpush(self.queue, *(payload(n) for n in numbers))
            self.published += missing

    def start(self, prefetch: int, *options: object) -> subprocess.Popen[bytes]:
        arguments = (self._url, self.queue, prefetch, self._notes, *options)
        return subprocess.Popen([sys.executable, PROCESS, *map(str, arguments)])

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill with -9, and wait until the server has read what the kernel still had to send."""
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: self._clients() <= self._others)

    def wait_for_more(self) -> None:
        """Wait until a handler has noted another message."""
        size = self._notes.stat().st_size
        wait_until(lambda: self._notes.stat().st_size > size)

    @property
    def handled(self) -> list[int]:
        return [int(line) for line in self._notes.read_text().split()]

    @property
    def queued(self) -> set[int]:
        return {body_of(raw) for raw in self.server.lrange(self.queue, 0, -1)}

    @property
    def held(self) -> dict[bytes, int]:
        """The entries that are unacknowledged, by field."""
        tail = len(f',"","{self.queue}"]')
        entries = self.server.hgetall("unacked").items()
        return {field: body_of(entry[1:-tail]) for field, entry in entries}

    @property
    def lost(self) -> set[int]:
        everywhere = {*self.handled, *self.queued, *self.held.values()}
        return set(range(self.published)) - everywhere

    def put_back_what_is_held(self) -> None:
        """Do what a restorer would do, without the wait for the visibility timeout."""
        tail, handled = len(f',"","{self.queue}"]'), set(self.handled)
        for entry in self.server.hvals("unacked"):
            if body_of(entry[1:-tail]) not in handled:
                self.server.rpush(self.queue, entry[1:-tail])
        self.server.delete("unacked", "unacked_index", "_greenconsume.owners")


@pytest.fixture
def field(redis_url, queue_name, tmp_path) -> Iterator[Field]:
    lent = Field(redis_url, queue_name, tmp_path)
    yield lent
    lent.server.close()


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * ROUNDS)
@pytest.mark.parametrize("prefetch", [1, 10, 100])
def test_a_kill_9_under_load_loses_nothing(field, prefetch):
    """HAZARDS row 2: kombu lost 7 messages in 20 kills."""
    worst = 0
    for _ in range(ROUNDS):
        field.fill(5000)
        process = field.start(prefetch)
        field.wait_for_more()
        gevent.sleep(random.uniform(0, 0.1))
        field.kill(process)
        assert field.lost == set()
        handled = field.handled
        assert len(handled) == len(set(handled))
        worst = max(worst, len(set(handled) & set(field.held.values())))
        field.put_back_what_is_held()
    print(f"\nprefetch {prefetch}: {ROUNDS} kills, at most {worst} handled and not acknowledged")
    assert worst <= MAX_UNACKED


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * ROUNDS)
@pytest.mark.parametrize("options", [(), (0.002, 20)], ids=["inline", "20 handlers"])
def test_orderly_stops_under_load_neither_lose_nor_double_nor_leave_anything(field, options):
    for _ in range(ROUNDS):
        field.fill(5000)
        process = field.start(100, *options)
        field.wait_for_more()
        gevent.sleep(random.uniform(0, 0.1))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert field.held == {}
        assert field.server.zcard("unacked_index") == 0
        assert field.lost == set()
        handled = field.handled
        assert len(handled) == len(set(handled))
    assert field.queued == set(range(field.published)) - set(field.handled)
    assert field.server.hlen("_greenconsume.owners") == 0
