"""Owns the fixtures of the integration tests alone: a kombu connection and what hangs on it, and gunicorn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Queue

from tests.gunicorns import Gunicorn
from tests.integration.consumers import green_connection


@pytest.fixture
def connection(amqp_url) -> Iterator[Connection]:
    with green_connection(amqp_url) as lent:
        yield lent


@pytest.fixture
def channel(connection) -> Iterator[Any]:
    with connection.channel() as lent:
        yield lent


@pytest.fixture
def queue(channel, queue_name) -> Queue:
    """A queue that is bound to `channel`, and declared."""
    bound = Queue(queue_name, durable=False)(channel)
    bound.declare()
    return bound


@pytest.fixture
def start(tmp_path: Path, amqp_url: str, queue_name: str) -> Iterator[Callable[..., Gunicorn]]:
    """Start gunicorn with consumers of `queue_name`, and wait until the given number consume."""
    started: list[Gunicorn] = []

    def make(conf: str = "", consuming: int = 1, **env: Any) -> Gunicorn:
        env = {"BROKER": amqp_url, "QUEUE": queue_name, **env}
        started.append(Gunicorn(tmp_path, conf, **env))
        started[-1].wait_consuming(consuming)
        return started[-1]

    yield make
    for each in started:
        each.close()
