"""`greenconsume run --processes`: gunicorn's arbiter without sockets, and a runtime in each process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest

from tests.gunicorns import Gunicorn, settled
from tests.messages import publish, queue_depth
from tests.waiting import AT_ONCE, wait_until


@pytest.fixture
def run(tmp_path: Path, amqp_url: str, queue_name: str) -> Iterator[Callable[..., Gunicorn]]:
    """Start `greenconsume run` with options, and wait until the given number of consumers consume."""
    started: list[Gunicorn] = []

    def make(
        *options: str, consuming: int = 1, target: str = "tests.webapp:runtime", **env: Any
    ) -> Gunicorn:
        command = [sys.executable, "-m", "greenconsume", "run", target, *options]
        env = {"BROKER": amqp_url, "QUEUE": queue_name, **env}
        started.append(Gunicorn(tmp_path, command=command, **env))
        started[-1].wait_consuming(consuming)
        return started[-1]

    yield make
    for each in started:
        each.close()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_drains_all_processes(rabbitmq, amqp_url, queue_name, run, sig):
    """HAZARDS row 24: exit code 0 says that all was finished."""
    processes = run("--processes", "2", consuming=2, WORK="0.5,1")
    publish(amqp_url, queue_name, 60)
    wait_until(lambda: processes.count("begun") >= 20)
    processes.signal(sig)
    assert processes.wait_end() < 25.0  # by its deadlines it would take 30
    assert processes.process.returncode == 0
    settled(rabbitmq, amqp_url, queue_name, processes, 60)
    assert "Listening at" not in processes.log
    assert "Traceback" not in processes.log


def test_ctrl_c_at_a_terminal_drains_all_processes(rabbitmq, amqp_url, queue_name, run):
    processes = run("--processes", "2", consuming=2, WORK="1,1.5")
    publish(amqp_url, queue_name, 60)
    wait_until(lambda: processes.count("begun") >= 20)
    processes.signal_group(signal.SIGINT)
    processes.wait_end()
    assert processes.process.returncode == 0
    assert settled(rabbitmq, amqp_url, queue_name, processes, 60).cancelled == 0


def test_a_process_that_has_just_been_forked_hears_the_signal_too(run):
    """Until it has set its own handlers a signal is the arbiter's: it would be killed in the end."""
    processes = run("--processes", "2", consuming=0)
    processes.wait_log("Booting worker with pid")
    processes.signal(signal.SIGTERM)
    assert processes.process.wait(60) == 0


def test_work_that_is_abandoned_is_exit_code_1(rabbitmq, amqp_url, queue_name, run):
    options = ("--processes", "2", "--drain-timeout", "0.5", "--cancel-timeout", "1")
    processes = run(*options, consuming=2, WORK="60,60")
    publish(amqp_url, queue_name, 20)
    wait_until(lambda: processes.count("begun") == 20)
    processes.signal(signal.SIGTERM)
    assert processes.wait_end() < 25.0  # by the deadlines that nobody chose it would take 35
    assert processes.process.returncode == 1
    assert settled(rabbitmq, amqp_url, queue_name, processes, 20).cancelled == 20


def test_a_rolling_restart_loses_and_doubles_nothing(rabbitmq, amqp_url, queue_name, run):
    """HAZARDS row 24: HUP under load; the new processes come before the old ones go."""
    processes = run("--processes", "2", consuming=2, WORK="0.1,0.4")
    publish(amqp_url, queue_name, 200)
    wait_until(lambda: processes.count("begun") >= 20)
    old = processes.workers
    processes.signal(signal.SIGHUP)
    wait_until(lambda: processes.count("finished") == 200)
    assert settled(rabbitmq, amqp_url, queue_name, processes, 200).begun == 200
    wait_until(lambda: not any(map(psutil.pid_exists, old)))
    assert len(processes.workers) == 2


def test_a_killed_process_is_replaced_at_once_and_nothing_is_lost(
    rabbitmq, amqp_url, queue_name, run
):
    processes = run("--processes", "2", consuming=2, WORK="0.1,0.3")
    publish(amqp_url, queue_name, 200)
    wait_until(lambda: processes.count("begun") >= 20)
    processes.signal(signal.SIGKILL, processes.workers[0])
    killed = monotonic()
    wait_until(lambda: len(processes.workers) == 2)
    assert monotonic() - killed < AT_ONCE
    wait_until(lambda: len({e.body for e in processes.journal if e.kind == "finished"}) == 200)
    processes.wait_consuming(3)
    assert rabbitmq.queue_counts(amqp_url, queue_name)[:2] == (0, 0)


def test_a_single_active_consumer_keeps_the_order_over_several_processes(amqp_url, queue_name, run):
    """The process that has it is killed, twice; what comes again comes in order."""
    arguments = json.dumps({"x-single-active-consumer": True})
    options = {"CONCURRENCY": 0, "WORK": "0.01,0.02", "QUEUE_ARGUMENTS": arguments}
    processes = run("--processes", "3", consuming=3, **options)
    publish(amqp_url, queue_name, 300)
    for count in (50, 150):
        wait_until(lambda count=count: processes.count("finished") >= count)
        processes.signal(signal.SIGKILL, processes.journal[-1].pid)

    def finished() -> list[str]:
        return list(dict.fromkeys(e.body for e in processes.journal if e.kind == "finished"))

    wait_until(lambda: len(finished()) == 300)
    assert finished() == [str(number) for number in range(300)]
    assert len({entry.pid for entry in processes.journal if entry.kind == "finished"}) >= 2


def test_one_process_more_and_one_fewer(rabbitmq, amqp_url, queue_name, run):
    """HAZARDS row 24: TTIN and TTOU under load."""
    processes = run("--processes", "1", WORK="0.5,1")
    publish(amqp_url, queue_name, 60)
    processes.signal(signal.SIGTTIN)
    processes.wait_consuming(2)
    processes.signal(signal.SIGTTOU)
    wait_until(lambda: processes.count("finished") == 60)
    assert settled(rabbitmq, amqp_url, queue_name, processes, 60).begun == 60
    wait_until(lambda: len(processes.workers) == 1)


def test_processes_whose_arbiter_was_killed_drain_before_they_go(
    rabbitmq, amqp_url, queue_name, run
):
    """HAZARDS row 24."""
    processes = run("--processes", "2", consuming=2, WORK="1,2")
    publish(amqp_url, queue_name, 60)
    wait_until(lambda: processes.count("begun") >= 20)
    workers = processes.workers
    processes.process.kill()
    wait_until(lambda: not any(map(psutil.pid_exists, workers)))
    assert settled(rabbitmq, amqp_url, queue_name, processes, 60).cancelled == 0


def test_a_handler_that_never_yields_is_replaced_with_its_process(
    rabbitmq, amqp_url, queue_name, run
):
    """HAZARDS row 24: its message goes to the dead letters, those of the others are done."""
    processes = run("--processes", "2", "--hang-timeout", "2", consuming=2, WORK="1,1")
    publish(amqp_url, queue_name, [*range(19), "spin"])
    processes.wait_consuming(3)
    wait_until(lambda: processes.count("finished") == 19)
    wait_until(lambda: queue_depth(amqp_url, f"{queue_name}.dead") == 1)
    assert rabbitmq.queue_counts(amqp_url, queue_name)[:2] == (0, 0)
    assert "kept the whole process waiting" in processes.log


def test_a_process_ends_when_it_has_handled_enough_and_another_takes_its_place(
    rabbitmq, amqp_url, queue_name, run
):
    options = ("--processes", "1", "--max-messages", "30", "--max-messages-jitter", "5")
    processes = run(*options, WORK="0.1,0.2")
    publish(amqp_url, queue_name, 120)
    wait_until(lambda: processes.count("finished") == 120)
    settled(rabbitmq, amqp_url, queue_name, processes, 120)
    assert len({entry.pid for entry in processes.journal}) >= 3
    assert "max_messages of 3" in processes.log


def test_a_single_process_ends_when_it_has_handled_enough(amqp_url, queue_name, run):
    process = run("--max-messages", "10", WORK="0.2,0.2")
    publish(amqp_url, queue_name, 100)
    assert process.process.wait(30) == 0
    assert 10 <= process.count("finished") < 50
    assert "max_messages of 10 are handled" in process.log


def test_processes_that_fail_as_soon_as_they_start_are_slowed_down(amqp_url, run):
    """A wrong password is no reason to start a hundred processes a second."""
    wrong = amqp_url.replace("guest:guest", "guest:wrong")
    processes = run("--processes", "2", consuming=0, BROKER=wrong)
    processes.wait_log("the next in 1 s")
    processes.wait_log("the next in 2 s")
    assert "refused the connection" in processes.log
    assert processes.log.count("Booting worker") < 12
    processes.signal(signal.SIGTERM)
    assert processes.process.wait(30) is not None


def test_usr2_is_refused_and_a_pid_file_is_written(tmp_path, run):
    processes = run("--processes", "1", "--pid-file", str(tmp_path / "pid"))
    assert int((tmp_path / "pid").read_text()) == processes.process.pid
    processes.signal(signal.SIGUSR2)
    processes.wait_log("HUP starts all processes anew")
    assert processes.process.poll() is None
    processes.signal(signal.SIGTERM)
    processes.wait_end()


def test_a_pid_file_that_cannot_be_written_is_told_in_one_line(tmp_path, run):
    processes = run("--processes", "1", "--pid-file", str(tmp_path / "no" / "pid"), consuming=0)
    assert processes.process.wait(60) == 1
    assert "greenconsume: --pid-file cannot be used: " in processes.log
    assert "Traceback" not in processes.log


def test_a_change_of_the_code_starts_it_anew(tmp_path, amqp_url, queue_name):
    """What is broken meanwhile is waited for."""
    folder = tmp_path / "project"
    folder.mkdir()
    shop = folder / "shop.py"
    shop.write_text("from tests.webapp import *\n")
    command = [sys.executable, "-m", "greenconsume", "run", "shop:runtime", "--reload"]
    env = {"BROKER": amqp_url, "QUEUE": queue_name}
    process = Gunicorn(tmp_path, command=command, cwd=folder, **env)
    try:
        process.wait_consuming(1)
        shop.write_text("no python at all\n")
        process.wait_log("no consumers of shop:runtime in this worker: SyntaxError")
        shop.write_text("from tests.webapp import *\nnote('changed')\n")
        process.wait_consuming(2)
        assert process.count("changed") == 1
        process.signal(signal.SIGINT)
        process.wait_end()
    finally:
        process.close()


def test_a_service_manager_is_notified_and_its_watchdog_answered(tmp_path, run):
    """sd_notify as systemd has it: a datagram to a socket."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(30)
        processes = run("--processes", "1", NOTIFY_SOCKET=path, WATCHDOG_USEC=1_500_000)
        said = ""
        while said.count("WATCHDOG=1") < 3:
            said += notify.recv(4096).decode() + "\n"
        assert "READY=1" in said
        processes.signal(signal.SIGTERM)
        while "STOPPING=1" not in said:
            said += notify.recv(4096).decode() + "\n"
        processes.wait_end()


def test_without_the_extra_the_error_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name in HIDDEN else found(name, *more)\n"
        "HIDDEN = {'gunicorn'}\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "greenconsume", "run", "shop:Orders", "--processes", "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--processes needs gunicorn" in done.stderr
    assert "pip install 'greenconsume[gunicorn]'" in done.stderr


def test_a_mistake_in_the_call_is_told_before_any_process_starts(tmp_path):
    command = [sys.executable, "-m", "greenconsume", "run", "shop:Orders", "--processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No module named 'shop'" in done.stderr
