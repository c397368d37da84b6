"""Owns the fixtures that several unit tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from kombu import Connection

from greenconsume.events import Event
from greenconsume.transports import registry
from tests.unit.fakes import recording

# What takes long is slow, not wrong; the rest is as hypothesis has it, which knows where CI is.
settings.register_profile(
    "patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """The events that are told while the test runs."""
    with recording() as events:
        yield events


@pytest.fixture
def connect(make_peer: Any) -> Iterator[Callable[..., Connection]]:
    """Connect to a peer by kombu, over the green link; whatever is left is dropped in the end."""
    registry.register()
    connections: list[Connection] = []

    def open_connection(peer: Any, **options: Any) -> Connection:
        options = {"close_timeout": 2.0, **options}
        connections.append(Connection(peer.url, transport_options=options))
        connections[-1].connect()
        return connections[-1]

    yield open_connection
    for connection in connections:
        connection.collect()
