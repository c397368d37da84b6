"""Tests the commands that look at and steer running processes, on a runtime of this process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from greenconsume import Runtime
from greenconsume.admin import run_folder
from greenconsume.cli import table, top
from greenconsume.cli.check import main as check
from greenconsume.cli.main import main
from tests.unit.fakes import Connecting, Idle
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setenv(run_folder.VARIABLE, str(path))
    monkeypatch.delenv("GREENCONSUME_ADMIN", raising=False)
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def runtime():
    runtime = Runtime(admin="run")
    runtime.spawn(Idle, 2)
    with runtime:
        yield runtime


@pytest.fixture
def say(capsys):
    """Run a command; return its exit code and what it said."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        said = capsys.readouterr()
        return ended.value.code or 0, said.out + said.err

    return run


def test_status_shows_every_consumer_of_every_process(runtime, say):
    code, said = say("status")
    assert code == 0
    assert f"pid {os.getpid()}) is running" in said
    assert "Idle-1" in said
    assert "Idle-2" in said


def test_status_as_json_is_for_programs(runtime, say):
    (found,) = json.loads(say("status", "--json")[1])
    assert [each["name"] for each in found["consumers"]] == ["Idle-1", "Idle-2"]


def test_one_process_can_be_asked_by_its_address_or_its_number(runtime, say):
    (found,) = run_folder.announced()
    assert say("status", "--admin", found.address)[0] == 0
    assert say("status", "--pid", str(found.pid))[0] == 0
    assert "no process is found" in say("status", "--pid", "1")[1]


def test_a_command_says_what_it_asked_for(runtime, say):
    code, said = say("scale", "Idle", "3")
    assert (code, said.strip().endswith("scale Idle to 3")) == (0, True)
    wait_until(lambda: len(runtime.children) == 3)
    assert say("restart", "Idle-1")[0] == 0
    assert say("stop", "Idle-2")[0] == 0
    wait_until(lambda: runtime.children[1].ended)
    assert say("drain")[0] == 0
    assert runtime.join(timeout=30)


def test_what_no_process_can_do_fails_in_one_line(runtime, say):
    code, said = say("restart", "Ide-1")
    assert code == 1
    assert "did you mean Idle-1?" in said
    assert len(said.splitlines()) == 1


def test_without_a_process_commands_say_so(say):
    code, said = say("status")
    assert code == 1
    assert "no process is found" in said


def test_a_process_that_does_not_answer_is_named(say, tmp_path):
    code, said = say("status", "--admin", f"unix:{tmp_path}/nobody.sock")
    assert code == 1
    assert "nobody.sock does not answer" in said


def test_dump_shows_the_greenlets(runtime, say):
    code, said = say("dump")
    assert code == 0
    assert "greenconsume supervisor" in said


def test_check_is_zero_when_all_is_well_and_one_when_not(runtime, capsys):
    assert check(["ready"]) == check(["live"]) == check(["stalled"]) == check([]) == 0
    runtime.spawn(Connecting)
    wait_until(lambda: runtime.children[2].state.value == "connecting")
    wait_until(lambda: check(["ready"]) == 1)
    assert "consumer Connecting-1 is connecting" in capsys.readouterr().out
    assert check(["live"]) == 0


def test_check_without_a_process_is_not_well_and_a_mistake_is_a_two(capsys):
    assert check([]) == 1
    assert check(["alive"]) == 2
    assert check(["--timeout"]) == 2
    assert check(["--timeout", "soon"]) == 2
    assert check(["--help"]) == 0


def test_check_imports_next_to_nothing():
    """It has 50 ms: a bare Python takes a fourth of that."""
    code = (
        "import sys; before = set(sys.modules); from greenconsume.cli.check import main; main([]); "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines()[-1].split())
    heavy = {"gevent", "greenlet", "kombu", "amqp", "click", "typing", "json", "re", "dataclasses"}
    # `typing` and `re` come along where the interpreter's own start-up has imported nothing of them.
    assert not imported & (heavy - {"re"})
    assert len(imported) < 40


def test_top_renders_what_status_says(runtime):
    from rich.console import Console

    runtime.control.watch()
    from greenconsume.cli.control import Where

    screen = top.Screen()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(screen.render(Where(None, None, None).statuses(), height=20))
    text = console.export_text()
    assert "Idle-1" in text
    assert "consuming" in text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "-"),
        (0.0004, "0.4 ms"),
        (0.25, "250 ms"),
        (5.0, "5.0 s"),
        (600, "10 min"),
        (9000, "2 h"),
    ],
)
def test_durations_are_written_to_be_read(value, words):
    assert table.seconds(value) == words


def test_one_address_is_not_for_several_processes(say, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "ported.py").write_text(
        "from greenconsume import Runtime\nruntime = Runtime(admin='127.0.0.1:9191')\n"
    )
    code, said = say("run", "ported:runtime", "--processes", "2")
    assert code == 2
    assert "leave --admin away" in said


def test_a_process_is_known_by_its_target(runtime, say):
    runtime.title = "shop:runtime"
    assert say("status")[1].startswith("shop:runtime (pid")


def test_top_goes_on_while_a_process_is_away_and_shows_the_one_that_comes_back():
    import click
    from rich.console import Console

    from greenconsume.admin.status import to_json
    from tests.unit.admin.fakes import consumer, process

    def told(name, pid):
        reasons = {"live": (), "ready": (), "stalled": ()}
        shown = json.loads(to_json(process(consumer(name)), health=reasons))
        return [{**shown, "pid": pid}]

    away = click.ClickException("no process is found")
    looks = iter([told("Orders-1", 11), away, away, told("Bills-1", 12), KeyboardInterrupt()])

    def statuses():
        found = next(looks)
        if isinstance(found, BaseException):
            raise found
        return found

    out = io.StringIO()
    top.watch(statuses, 0.0, Console(width=160, height=30, file=out, force_terminal=True))
    assert next(looks, None) is None
    text = out.getvalue()
    first, gone, second = (text.index(each) for each in ("Orders-1", "no process", "Bills-1"))
    assert first < gone < second
