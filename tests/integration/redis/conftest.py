"""Owns the fixtures of the Redis tests: a connection over the green transport, and an eye on the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from kombu import Connection

from greenconsume.redis import keeper
from tests.integration.consumers import green_connection
from tests.redis_server import as_user
from tests.servers import HOST, MissingServerError, end, find_program, free_port, launch, missing
from tests.waiting import wait_until

Start = Callable[..., int]


@pytest.fixture
def connection(redis_url) -> Iterator[Connection]:
    with green_connection(redis_url) as lent:
        yield lent


@pytest.fixture
def server(redis_url) -> Iterator[Any]:
    """redis-py's client, to look at the keys by oneself."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def quick(monkeypatch) -> None:
    """Look often at what is overdue, and take the silent for dead soon."""
    monkeypatch.setattr(keeper, "BEAT_INTERVAL", 0.1)
    monkeypatch.setattr(keeper, "DEAD_AFTER", 0.3)


@pytest.fixture
def restricted(redis_url, server, queue_name) -> Iterator[str]:
    """The address of the server for a user who may touch his own queues only."""
    keys = [f"{queue_name}*", "unacked*", "_kombu*", "_greenconsume*"]
    server.acl_setuser(
        queue_name, enabled=True, passwords=["+h0rse"], keys=keys, commands=["+@all"]
    )
    yield as_user(redis_url, queue_name, "h0rse")
    server.acl_deluser(queue_name)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a Redis with options of a test's own; returns its port."""
    with ExitStack() as stack:

        def started(*options: str) -> int:
            port = free_port()
            try:
                program = find_program("redis-server")
            except MissingServerError as exc:
                missing(exc)
            process = launch(
                program,
                *("--port", str(port), "--bind", HOST, "--dir", tmp_path, "--save", "", *options),
                log=tmp_path / "redis.out",
            )
            stack.callback(end, process)
            wait_until(lambda: _answers(port))
            return port

        yield started


def _answers(port: int) -> bool:
    with redis.Redis(HOST, port, protocol=2) as client:
        try:
            client.ping()
        except redis.exceptions.AuthenticationError:
            return True
        except redis.exceptions.ConnectionError:
            return False
    return True
