"""Owns the private PostgreSQL that the conformance tests run kombu's SQLAlchemy transport on.

Started when the first test asks for it, and kept for the whole run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path
from signal import SIGINT

import psycopg

from tests.servers import HOST, MissingServerError, end, free_port, launch
from tests.waiting import wait_until

USER = "greenconsume"
#: Who runs it where the tests run as root, which PostgreSQL refuses to.
ACCOUNT = "postgres"


class PostgresServer:
    """A PostgreSQL that trusts everybody on loopback. Every method but `url` switches.

    Raises:
        MissingServerError: It is not installed.
    """

    def __init__(self) -> None:
        self._programs = _find_programs()
        self.port = free_port()
        self._numbers = count()
        # Not pytest's folder, which is closed to the account that runs the server.
        self._folder = Path(tempfile.mkdtemp(prefix="greenconsume-postgres-"))
        if os.geteuid() == 0:
            shutil.chown(self._folder, ACCOUNT)
        self._initialise()
        options = {"fsync": "off", "listen_addresses": HOST, "unix_socket_directories": ""}
        options |= {"max_connections": "300", "shared_buffers": "16MB"}
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        self._process = launch(
            *_as_account(dies_with_us=True),
            *(self._programs / "postgres", "-D", self._folder / "data", "-p", str(self.port)),
            *settings,
            log=self._folder / "postgres.out",
            cwd=self._folder,
        )
        wait_until(self._answers, message="PostgreSQL is ready")

    def url(self, database: str) -> str:
        """The address of a database, as SQLAlchemy spells it."""
        return f"postgresql+psycopg://{USER}@{HOST}:{self.port}/{database}"

    def fresh_database(self) -> str:
        """Make an empty database, and return its name."""
        name = f"test{next(self._numbers)}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return name

    def close(self) -> None:
        """End the server, whoever is connected, and remove what it wrote."""
        end(self._process, SIGINT)
        shutil.rmtree(self._folder)

    def _initialise(self) -> None:
        command = [*_as_account(), self._programs / "initdb", "-D", self._folder / "data"]
        options = ("-A", "trust", "-U", USER, "-E", "UTF8", "--locale", "C", "--no-sync")
        subprocess.run(
            [*map(str, command), *options], check=True, capture_output=True, cwd=self._folder
        )

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError), self._connect():
            return True
        return False

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host=HOST, port=self.port, user=USER, dbname="postgres", autocommit=True
        )


def _find_programs() -> Path:
    # Debian keeps them off the path, by version.
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    on_path = shutil.which("initdb")
    if on_path is not None:
        folders.insert(0, Path(on_path).resolve().parent)
    for folder in reversed(folders):
        if (folder / "postgres").exists():
            return folder
    raise MissingServerError("PostgreSQL is not installed: apt-get install postgresql")


def _as_account(dies_with_us: bool = False) -> list[str]:
    if os.geteuid() != 0:
        return []
    words = ["setpriv", f"--reuid={ACCOUNT}", f"--regid={ACCOUNT}", "--clear-groups", "--"]
    # A change of the user forgets the signal that `launch` asked for.
    return [*words, "setpriv", "--pdeathsig", "KILL", "--"] if dies_with_us else words
