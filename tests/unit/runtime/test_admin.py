"""Tests a runtime's admin: from before its first consumer starts until its last has ended."""

from __future__ import annotations

import json
import os
import socket

import pytest

from greenconsume import Runtime
from greenconsume.admin import run_folder
from greenconsume.admin.address import AddressError
from tests.unit.fakes import Connecting, Idle, Stubborn, run
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setenv(run_folder.VARIABLE, str(path))
    return path


def ask(path, request="GET /status.json"):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        sock.sendall(f"{request} HTTP/1.0\r\n\r\n".encode())
        received = b""
        while data := sock.recv(65536):
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_it_answers_while_the_runtime_runs_and_is_found_in_the_run_folder(folder):
    runtime = Runtime(admin="run")
    runtime.spawn(Idle, 3)
    with runtime:
        (found,) = run_folder.announced()
        assert (found.pid, found.address) == (os.getpid(), f"unix:{folder}/{os.getpid()}.sock")
        code, body = ask(found.address.removeprefix("unix:"))
        assert code == 200
        assert len(json.loads(body)["consumers"]) == 3
    assert os.listdir(folder) == []


def test_it_answers_while_the_runtime_starts_and_while_it_drains(tmp_path):
    path = str(tmp_path / "shop.sock")
    runtime = Runtime(admin=f"unix:{path}")
    runtime.spawn(Connecting)
    starting = run(runtime.start)
    wait_until(lambda: os.path.exists(path))
    assert ask(path, "GET /livez")[0] == 200
    assert ask(path, "GET /readyz") == (
        503,
        b"the process is starting\nconsumer Connecting-1 is connecting\n",
    )
    runtime.stop()
    starting.join()
    runtime.join()

    from greenconsume import ConsumerOptions

    options = ConsumerOptions(drain_timeout=60, cancel_timeout=60)
    runtime = Runtime(admin=f"unix:{path}", options=options)
    runtime.spawn(Stubborn)
    runtime.start()
    runtime.stop()
    assert json.loads(ask(path)[1])["state"] == "draining"
    runtime.kill()
    runtime.join()
    assert not os.path.exists(path)


def test_a_runtime_can_be_drained_by_its_admin(tmp_path):
    path = str(tmp_path / "shop.sock")
    runtime = Runtime(admin=f"unix:{path}")
    runtime.spawn(Idle)
    runtime.start()
    assert ask(path, "POST /drain")[0] == 202
    assert runtime.join(timeout=30)


def test_an_address_that_cannot_be_had_fails_the_start_and_nothing_is_left(tmp_path):
    runtime = Runtime(admin=f"unix:{tmp_path}/no/such/folder.sock")
    runtime.spawn(Idle)
    with pytest.raises(AddressError, match="cannot listen"):
        runtime.start()
    assert runtime.join()
    assert runtime.children[0].greenlet is None


def test_an_address_that_others_reach_is_refused_when_the_runtime_is_made():
    with pytest.raises(AddressError, match="set an admin token"):
        Runtime(admin="0.0.0.0:9191")


def test_a_start_that_fails_leaves_no_admin(tmp_path):
    path = tmp_path / "shop.sock"

    def broken(connection):
        raise ValueError("no such thing")

    runtime = Runtime(admin=f"unix:{path}")
    runtime.spawn(broken)
    with pytest.raises(ValueError, match="no such thing"):
        runtime.start()
    assert not path.exists()


def test_what_dead_processes_left_in_the_run_folder_is_removed(folder):
    folder.mkdir(mode=0o700)
    (folder / "4194305.process").write_text("unix:/x\nx\n")  # above the highest
    (folder / "4194305.sock").write_text("")
    assert run_folder.announced() == []
    assert os.listdir(folder) == []


def test_what_a_dead_process_left_is_removed_though_another_has_its_number(folder):
    folder.mkdir(mode=0o700)
    left = folder / f"{os.getppid()}.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    (folder / f"{os.getppid()}.process").write_text(f"unix:{left}\nx\n")
    assert run_folder.announced() == []
    assert os.listdir(folder) == []


def test_a_run_folder_that_others_may_write_to_is_not_used(folder):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(AddressError, match="run folder cannot be used"):
        with Runtime(admin="run"):
            pass
    assert run_folder.announced() == []


def test_two_runtimes_of_a_process_are_both_found(folder):
    first, second = Runtime(admin="run"), Runtime(admin="run")
    with first, second:
        addresses = [each.address for each in run_folder.announced()]
        assert len(set(addresses)) == 2
        assert all(ask(each.removeprefix("unix:"))[0] == 200 for each in addresses)
    assert os.listdir(folder) == []


def test_a_runtime_starts_again_where_one_of_its_number_left_its_files(folder):
    """In a container every process may have the number 1."""
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / f"{os.getpid()}.sock"))
    (folder / f"{os.getpid()}.process").write_text("unix:/nowhere\nx\n")
    for _ in range(2):
        with Runtime(admin="run"):
            (found,) = run_folder.announced()
            assert ask(found.address.removeprefix("unix:"), "GET /livez")[0] == 200
