"""Owns the fixtures of the integration tests alone: a kombu connection and what hangs on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Queue

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
