from __future__ import annotations

import signal
import socket

import pytest

from tests import newer_servers
from tests.brokers import RELEASE_VARIABLE, chosen_release
from tests.servers import (
    MissingServerError,
    end,
    find_newer_program,
    find_program,
    free_port,
    launch,
    missing,
)
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


def test_a_server_that_was_not_fetched_names_who_fetches_it(monkeypatch, tmp_path):
    monkeypatch.setattr(newer_servers, "STAMP", tmp_path / "complete")
    with pytest.raises(MissingServerError, match="tests/run fetches it"):
        find_newer_program("redis-server")


def test_half_a_fetch_counts_as_none(monkeypatch, tmp_path):
    """A run that was interrupted leaves no stamp, one of an older recipe another."""
    monkeypatch.setattr(newer_servers, "STAMP", tmp_path / "complete")
    assert not newer_servers.available()
    newer_servers.STAMP.write_text("trixie 0")
    assert not newer_servers.available()


def test_a_machine_without_apt_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(newer_servers, "FOLDER", tmp_path)
    monkeypatch.setattr(newer_servers, "STAMP", tmp_path / "complete")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(newer_servers.UnavailableError, match="no apt-get and no apt-cache"):
        newer_servers.fetch()


def test_a_mirror_that_fails_is_asked_again(monkeypatch):
    answers = iter([newer_servers.UnavailableError("flaky"), None])

    def fetch_one():
        if answer := next(answers):
            raise answer
        return ""

    pauses = []
    monkeypatch.setattr(newer_servers.time, "sleep", pauses.append)
    newer_servers._patiently(fetch_one)
    assert pauses == [2]


def test_a_release_that_nobody_has_is_refused(monkeypatch):
    monkeypatch.setenv(RELEASE_VARIABLE, "5.0")
    with pytest.raises(ValueError, match=r"installed, 4\.0"):
        chosen_release()


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
