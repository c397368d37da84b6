from __future__ import annotations

import signal
import socket

import pytest

from tests.servers import MissingServerError, end, find_program, free_port, launch, missing
from tests.waiting import wait_until


def test_a_missing_server_skips_at_a_desk(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no such broker"):
        missing(MissingServerError("no such broker"))


def test_a_missing_server_fails_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no such broker"):
        missing(MissingServerError("no such broker"))


def test_a_program_that_is_not_installed_names_its_package():
    with pytest.raises(MissingServerError, match="apt-get install no-such-broker"):
        find_program("no-such-broker")


def test_a_free_port_can_be_listened_on():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen()
        assert listener.getsockname()[1] < 32_768


def test_a_program_that_ignores_its_signal_is_killed(tmp_path):
    program = launch("sh", "-c", "trap '' TERM; echo up; read x", log=tmp_path / "log", stdin=True)
    wait_until((tmp_path / "log").read_text)
    end(program, signal.SIGTERM, within=0.02)
    assert program.returncode == -signal.SIGKILL
