"""Owns the transports that the conformance tests run over, each with an empty broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from kombu import Connection

from tests.brokers import client_tls
from tests.integration.consumers import green_connection
from tests.postgres_server import PostgresServer
from tests.servers import MissingServerError, missing

#: Those that wake a consumer, and those that a consumer polls.
GREEN = ("amqp", "amqps", "redis", "redis8", "valkey8", "memory")
POLLED = ("filesystem", "sqlalchemy", "postgresql")

_MARKS = {
    "amqp": (pytest.mark.rabbitmq,),
    "amqps": (pytest.mark.rabbitmq,),
    "redis": (pytest.mark.redis,),
    "redis8": (pytest.mark.redis,),
    "valkey8": (pytest.mark.redis,),
}


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The private PostgreSQL of this run."""
    try:
        server = PostgresServer()
    except MissingServerError as exc:
        missing(exc)
    with closing(server):
        yield server


@pytest.fixture(params=[pytest.param(kind, marks=_MARKS.get(kind, ())) for kind in GREEN + POLLED])
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a transport; every test runs over each."""
    return str(request.param)


@pytest.fixture
def connect(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Connection]:
    """Make a connection, not connected, to the test's own broker."""
    if kind == "amqps":
        url = request.getfixturevalue("amqps_url")
        return lambda: green_connection(url, ssl=client_tls(request.getfixturevalue("rabbitmq")))
    if kind == "filesystem":
        return _folder(tmp_path)
    url = _url(kind, request, tmp_path)
    return lambda: green_connection(url)


def _url(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    if kind == "memory":
        return "memory://"
    if kind == "sqlalchemy":
        pytest.importorskip("sqlalchemy")
        return f"sqla+sqlite:///{folder}/queues.db"
    if kind == "postgresql":
        postgres = request.getfixturevalue("postgres")
        return f"sqla+{postgres.url(postgres.fresh_database())}"
    if kind == "amqp":
        return str(request.getfixturevalue("amqp_url"))
    try:
        server = request.getfixturevalue("redis_servers").get(kind)
    except MissingServerError as exc:
        missing(exc)
    return str(server.url(server.fresh_database()))


def _folder(folder: Path) -> Callable[[], Connection]:
    (folder / "queues").mkdir()
    options = {
        "data_folder_in": str(folder / "queues"),
        "data_folder_out": str(folder / "queues"),
        "control_folder": str(folder / "control"),
        "polling_interval": 0.05,
    }
    return lambda: green_connection("filesystem://", transport_options=options)


@pytest.fixture
def is_polled(kind: str) -> bool:
    """Return whether the transport can only be polled."""
    return kind in POLLED
