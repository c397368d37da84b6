"""Owns where a measurement takes place: a fresh virtual host, or a fresh database, of a private server."""

from __future__ import annotations

from typing import Protocol

from kombu.utils.url import parse_url

from tests.brokers import RabbitMQ
from tests.redis_server import RedisServer


class Ground(Protocol):
    """A server, as a measurement sees it."""

    @property
    def pid(self) -> int:
        """The number of its process."""

    @property
    def port(self) -> int:
        """The port that it listens on."""

    def add(self) -> str:
        """Return the address of a fresh place."""

    def drop(self, url: str) -> None:
        """Forget a place, with all that is in it."""


class VirtualHosts:
    """Those of a RabbitMQ."""

    def __init__(self, broker: RabbitMQ) -> None:
        self._broker = broker

    @property
    def pid(self) -> int:
        return self._broker.pid

    @property
    def port(self) -> int:
        return self._broker.port

    def add(self) -> str:
        return self._broker.url(self._broker.add_vhost())

    def drop(self, url: str) -> None:
        self._broker.delete_vhost(parse_url(url)["virtual_host"])


class Databases:
    """Those of a Redis."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server

    @property
    def pid(self) -> int:
        return self._server.pid

    @property
    def port(self) -> int:
        return self._server.port

    def add(self) -> str:
        return self._server.url(self._server.fresh_database())

    def drop(self, url: str) -> None:
        """Do nothing: a database is emptied before it is used again."""
