"""Owns the private Redis that integration and fault tests run against."""

from __future__ import annotations

import socket
from itertools import count
from pathlib import Path

from tests.servers import HOST, end, find_program, free_port, launch
from tests.waiting import wait_until

DATABASE_COUNT = 256


class RedisServer:
    """A Redis that keeps nothing on disk. Every method but `url` switches."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._numbers = count()
        self._process = launch(
            find_program("redis-server"),
            *("--port", str(self.port), "--bind", HOST, "--dir", folder),
            *("--save", "", "--appendonly", "no", "--databases", str(DATABASE_COUNT)),
            log=folder / "redis.out",
        )
        wait_until(self.ready, message="redis-server is ready")

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self._process.pid

    def url(self, database: int = 0) -> str:
        """The address of a database."""
        return f"redis://{HOST}:{self.port}/{database}"

    def fresh_database(self) -> int:
        """Empty a database that no test has used for long, and return its number. Under 1 ms."""
        database = next(self._numbers) % DATABASE_COUNT
        self._ask(f"SELECT {database}", "FLUSHDB")
        return database

    def ready(self) -> bool:
        """Whether the server answers now."""
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
