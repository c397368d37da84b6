"""Owns finding, launching and ending the server programs that tests run against.

Every program is a child of the test run and dies with it, even when the run is killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import IO, NoReturn

import pytest
from gevent import monkey

from tests import newer_servers

HOST = "127.0.0.1"

# Below the range from which Linux takes the port of an outgoing connection: a client that retries
# a closed port in that range can be given it as its own, connect to itself, and keep the server out.
PORTS = range(20_000, 32_000)


class MissingServerError(Exception):
    """A server program is not installed."""


def find_program(name: str, *folders: str) -> str:
    """Return the path of an installed program; `folders` are tried before PATH and after it sbin.

    Raises:
        MissingServerError: It is in none of them; names the package to install.
    """
    for path in (os.pathsep.join(folders), None, "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"):
        found = shutil.which(name, path=path)
        if found:
            return found
    raise MissingServerError(f"{name} is not installed: apt-get install {name}")


def find_newer_program(name: str) -> str:
    """Return the path of a program of RabbitMQ 4, Redis 8 or Valkey 8, which `tests/run` fetches.

    Raises:
        MissingServerError: It was not fetched.
    """
    found = newer_servers.program(name)
    if found is None:
        how = "tests/run fetches it, or says why it cannot"
        raise MissingServerError(f"{name} of Debian 13 is not in {newer_servers.FOLDER}: {how}")
    return str(found)


def missing(exc: MissingServerError) -> NoReturn:
    """Skip the test at a desk, fail it where CI says so.

    Raises:
        BaseException: pytest's own, always.
    """
    if os.environ.get("CI"):
        pytest.fail(str(exc), pytrace=False)
    pytest.skip(str(exc))


def need_patched() -> None:
    """Fail the test unless gevent has patched this process: without it, the kit blocks itself.

    Raises:
        BaseException: pytest's own.
    """
    if not monkey.is_module_patched("socket"):
        pytest.fail("not patched: run python -m gevent.monkey --module pytest", pytrace=False)


def free_port() -> int:
    """Return a TCP port that nothing listens on, neither on loopback nor on any other address."""
    for _ in range(100):
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port among 100 tried")


def launch(
    *command: str | Path,
    log: Path,
    env: dict[str, str] | None = None,
    stdin: bool = False,
    cwd: Path | None = None,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that Ctrl-C at a terminal does not reach it.

    Args:
        *command: The program and its arguments.
        log: The file that takes what it prints.
        env: Its whole environment; ``None`` for this process's.
        stdin: Whether to give it a pipe to read; otherwise it reads nothing.
        cwd: The folder that it starts in; ``None`` for this process's.
        pass_fds: Descriptors that it has as well.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [*_dies_with_us(), *map(str, command)],
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
            pass_fds=pass_fds,
        )


def end(process: subprocess.Popen[bytes], sig: int = signal.SIGTERM, within: float = 30.0) -> None:
    """Signal a program, wait until it is gone, and kill it at the deadline.

    Switches: yes.
    """
    process.send_signal(sig)
    try:
        process.wait(within)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    stdin: IO[bytes] | None = process.stdin
    if stdin is not None:
        stdin.close()


def _dies_with_us() -> list[str]:
    # util-linux; it sets the signal and replaces itself, so the process id is the program's own.
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
