"""Celery workers whose broker is reached over the green transport."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import amqp
import pytest
from kombu import Connection
from kombu.asynchronous import Hub

from greenconsume.errors import EventLoopError
from greenconsume.transports import registry
from tests.brokers import RabbitMQ
from tests.integration.consumers import SOON
from tests.messages import channel, declare
from tests.waiting import wait_until

WORKER = Path(__file__).with_name("celery_worker.py")


def send_tasks(url: str, queue: str, count: int, task: str = "tell") -> None:
    """Put tasks as Celery's protocol has them, with a number each."""
    with channel(url) as chan:
        for number in range(count):
            name = str(uuid4())
            message = amqp.Message(
                f"[[{number}], {{}}, {{}}]",
                content_type="application/json",
                content_encoding="utf-8",
                correlation_id=name,
                application_headers={"lang": "py", "task": task, "id": name, "root_id": name},
                delivery_mode=2,
            )
            chan.basic_publish(message, routing_key=queue)


class Worker:
    """A worker's process, and what it has printed so far."""

    def __init__(self, process: subprocess.Popen[bytes], printed: Path) -> None:
        self.process = process
        self._printed = printed

    @property
    def done(self) -> list[str]:
        """The bodies of the tasks that it did."""
        lines = self._printed.read_text().splitlines()
        return [line.removeprefix("did ") for line in lines if line.startswith("did ")]


@contextmanager
def worker(folder: Path, url: str, queue: str, *options: str) -> Iterator[Worker]:
    printed = folder / "printed"
    command = [sys.executable, str(WORKER), url, queue, "green", *options]
    with printed.open("wb") as out:
        env = {**os.environ, "C_FORCE_ROOT": "1"}
        with subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env=env) as process:
            try:
                yield Worker(process, printed)
            finally:
                process.kill()


def test_a_worker_with_heartbeats_does_its_tasks_and_leaves_none(
    rabbitmq: RabbitMQ, amqp_url: str, queue_name: str, tmp_path: Path
) -> None:
    """It drains two connections in turn, and waits in none while the other has tasks: 200 take some seconds.

    On py-amqp, which waits 0.1 s after one or two of them, it is ten to twenty.
    """
    declare(amqp_url, queue_name)
    send_tasks(amqp_url, queue_name, 200)
    with worker(tmp_path, amqp_url, queue_name, "--task-events") as run:
        wait_until(lambda: len(run.done) == 200, SOON)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(SOON) == 0
    counts = rabbitmq.queue_counts(amqp_url, queue_name)
    assert (counts.ready, counts.unacked) == (0, 0)
    assert sorted(map(int, run.done)) == list(range(200))


def test_a_worker_whose_connections_the_broker_closes_comes_back(
    rabbitmq: RabbitMQ, amqp_url: str, queue_name: str, tmp_path: Path
) -> None:
    """Whatever it was about then: it is told once it drains, and does what is left."""
    declare(amqp_url, queue_name)
    send_tasks(amqp_url, queue_name, 40, "rest")
    options = ("--task-events", "--concurrency", "4")
    with worker(tmp_path, amqp_url, queue_name, *options) as run:
        for count in (5, 15, 25):
            wait_until(lambda count=count: len(set(run.done)) >= count, SOON)
            rabbitmq.close_connections(amqp_url)
        wait_until(lambda: len(set(run.done)) == 40, SOON)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(SOON) == 0
    counts = rabbitmq.queue_counts(amqp_url, queue_name)
    assert (counts.ready, counts.unacked) == (0, 0)


@pytest.mark.parametrize("kind", ["amqp", "redis", "memory"])
def test_kombus_asynchronous_hub_is_refused_in_words(
    request: pytest.FixtureRequest, kind: str
) -> None:
    registry.register()
    url = "memory://" if kind == "memory" else request.getfixturevalue(f"{kind}_url")
    with Connection(url) as connection:
        with pytest.raises(EventLoopError, match="-P gevent"):
            connection.register_with_event_loop(Hub())
        assert not connection.transport.implements.asynchronous
