"""Owns the fixtures of the Redis tests: a connection over the green transport, and an eye on the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from kombu import Connection

from greenconsume.redis import keeper
from tests.integration.consumers import green_connection
from tests.redis_server import as_user


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
