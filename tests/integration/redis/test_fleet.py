"""Mixed fleets: queues that greenconsume, plain kombu and Celery publish to and consume from at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from gevent.event import Event
from kombu import Connection, Producer

from tests.integration.consumers import Recorder, consuming, green_connection, pause_for
from tests.integration.redis.payloads import held_count
from tests.servers import end, launch
from tests.waiting import wait_until

try:
    from celery import Celery
except ImportError:
    Celery = None

HERE = Path(__file__).parent
PLAIN = "kombu.transport.redis:Transport"
#: How many messages each publisher of a fleet sends.
COUNT = 60

needs_celery = pytest.mark.skipif(
    Celery is None and "CI" not in os.environ, reason="Celery is not installed: pip install celery"
)


class Other:
    """A consumer of somebody else's make, in a process of its own."""

    def __init__(self, script: str, url: str, queue: str, folder: Path) -> None:
        self._notes = folder / f"{script}.notes"
        self._notes.touch()
        command = (sys.executable, HERE / script, url, queue, self._notes)
        self.process = launch(*command, log=folder / f"{script}.out", cwd=folder)

    @property
    def numbers(self) -> list[int]:
        return [int(line) for line in self._notes.read_text().split()]


@pytest.fixture
def start(redis_url: str, queue_name: str, tmp_path: Path) -> Iterator[Callable[[str], Other]]:
    """Start a consumer of the test's queue."""
    with ExitStack() as stack:

        def started(script: str) -> Other:
            other = Other(script, redis_url, queue_name, tmp_path)
            stack.callback(end, other.process, within=10.0)
            return other

        yield started


def number_of(body: Any) -> int:
    """The number of a message of ours, or of a task of Celery's."""
    return int(body if isinstance(body, int) else body[0][0])


def publish_tasks(url: str, queue: str, numbers: range) -> None:
    """Publish as a Celery application does, each with a priority."""
    app = Celery("publisher", broker=url, set_as_current=False)
    with Connection(url, transport=PLAIN) as connection:
        for n in numbers:
            options = {"queue": queue, "priority": n % 10, "ignore_result": True}
            app.send_task("fleet.note", args=[n], connection=connection, **options)


def publish(connection: Connection, queue: str, numbers: range) -> None:
    with connection:
        for n in numbers:
            Producer(connection).publish(n, routing_key=queue, priority=n % 10)


@needs_celery
def test_kombu_and_celery_publish_to_kombu_and_greenconsume_at_once(
    redis_url, server, queue_name, start
):
    kombus = start("kombu_consumer.py")
    ours = [Recorder(redis_url, queue_name, _briefly, prefetch_count=1) for _ in "ab"]
    with consuming(*ours):
        publish(Connection(redis_url, transport=PLAIN), queue_name, range(COUNT))
        publish(green_connection(redis_url), queue_name, range(COUNT, 2 * COUNT))
        publish_tasks(redis_url, queue_name, range(2 * COUNT, 3 * COUNT))
        total = 3 * COUNT
        while not kombus.numbers:  # however late that process has begun
            publish(green_connection(redis_url), queue_name, range(total, total + 1))
            total += 1
            pause_for(0.02)

        def handled() -> list[int]:
            return [*kombus.numbers, *(number_of(body) for each in ours for body in each.bodies)]

        wait_until(lambda: len(handled()) >= total)
        wait_until(lambda: held_count(server) == 0)
    assert sorted(handled()) == list(range(total))
    assert all(each.bodies for each in ours)


@needs_celery
def test_a_celery_worker_and_a_greenconsume_consumer_share_a_queue(
    redis_url, server, queue_name, start
):
    worker = start("celery_app.py")
    publish_tasks(redis_url, queue_name, range(1))
    wait_until(lambda: worker.numbers == [0], message="the Celery worker works")
    begun, gate = Event(), Event()

    def handle(_body: Any, _message: Any) -> None:
        begun.set()
        gate.wait()

    consumer, total = Recorder(redis_url, queue_name, handle, prefetch_count=1), 1
    with consuming(consumer):
        while (
            not begun.is_set() and total < 100 * COUNT
        ):  # the worker may be fast enough to take them all
            publish_tasks(redis_url, queue_name, range(total, total + COUNT))
            total += COUNT
            begun.wait(1)
        wait_until(lambda: len(worker.numbers) > 1)
        gate.set()
        wait_until(lambda: len(worker.numbers) + len(consumer.bodies) >= total)
        wait_until(lambda: held_count(server) == 0)
        theirs, ours = worker.numbers, [number_of(body) for body in consumer.bodies]
    assert sorted([*theirs, *ours]) == list(range(total))
    assert ours


def _briefly(_body: Any, _message: Any) -> None:
    pause_for(0.01)
