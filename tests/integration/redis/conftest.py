"""Owns the fixtures of the Redis tests: a connection over the green transport, and an eye on the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from kombu import Connection

from tests.integration.consumers import green_connection


@pytest.fixture
def connection(redis_url) -> Iterator[Connection]:
    with green_connection(redis_url) as lent:
        yield lent


@pytest.fixture
def server(redis_url) -> Iterator[Any]:
    """redis-py's client, to look at the keys by oneself."""
    with redis.Redis.from_url(redis_url) as client:
        yield client
