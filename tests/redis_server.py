"""Owns the private Redis servers that integration and fault tests run against.

The installed Redis, and those of the kind that `tests.newer_servers` fetches: each started when
the first test asks for it, and kept for the whole run.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from tests.servers import HOST, end, find_newer_program, find_program, free_port, launch
from tests.waiting import wait_until

DATABASE_COUNT = 256

INSTALLED = "redis"
# By kind: what finds its program, and the program's name.
PROGRAMS: dict[str, tuple[Callable[[str], str], str]] = {
    INSTALLED: (find_program, "redis-server"),
    "redis8": (find_newer_program, "redis-server"),
    "valkey8": (find_newer_program, "valkey-server"),
}


class RedisServer:
    """A Redis, or a Valkey, that keeps nothing on disk. Every method but `url` switches.

    Args:
        folder: A folder for what it prints.
        kind: One of `PROGRAMS`.
    """

    def __init__(self, folder: Path, kind: str = INSTALLED) -> None:
        self.kind = kind
        self.port = free_port()
        self._numbers = count()
        find, name = PROGRAMS[kind]
        self._process = launch(
            find(name),
            *("--port", str(self.port), "--bind", HOST, "--dir", folder),
            *("--save", "", "--appendonly", "no", "--databases", str(DATABASE_COUNT)),
            log=folder / "redis.out",
        )
        wait_until(self.ready, message=f"{name} is ready")

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self._process.pid

    @property
    def version(self) -> tuple[int, ...]:
        """The version by its own name: ``(7, 0, 15)``, say."""
        told = self._ask("INFO server").decode()
        name = "valkey" if "valkey_version" in told else "redis"
        found = re.search(rf"{name}_version:(\d+)\.(\d+)\.(\d+)", told)
        assert found is not None, told
        return tuple(map(int, found.groups()))

    def url(self, database: int = 0) -> str:
        """The address of a database."""
        return f"redis://{HOST}:{self.port}/{database}"

    def fresh_database(self) -> int:
        """Empty a database that no test has used for long, and return its number. Under 1 ms."""
        database = next(self._numbers) % DATABASE_COUNT
        self._ask(f"SELECT {database}", "FLUSHDB")
        return database

    def ready(self) -> bool:
        """Return whether the server answers now."""
        try:
            return self._ask("PING").startswith(b"+PONG")
        except OSError:
            return False

    def close(self) -> None:
        """End the server."""
        end(self._process)

    def _ask(self, *commands: str) -> bytes:
        # Redis's inline protocol: no client library is needed to say this much.
        with socket.create_connection((HOST, self.port), 5.0) as client:
            client.sendall("".join(f"{command}\r\n" for command in (*commands, "QUIT")).encode())
            answer = b""
            while received := client.recv(4096):
                answer += received
        if b"-ERR" in answer:
            raise AssertionError(answer.decode())
        return answer


class RedisServers:
    """The servers of a run by their kind, each started when it is first asked for."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder
        self._servers: dict[str, RedisServer] = {}

    def get(self, kind: str) -> RedisServer:
        """Return the server of a kind.

        Raises:
            MissingServerError: Its program is not there.
        """
        if kind not in self._servers:
            self._servers[kind] = RedisServer(self._make_folder(kind), kind)
        return self._servers[kind]

    def close(self) -> None:
        """End them all."""
        for server in self._servers.values():
            server.close()


def as_user(url: str, user: str, password: str) -> str:
    """Return the address for a user of the server who has a password."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}").geturl()
