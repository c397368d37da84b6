"""Consumers in gunicorn's gevent workers, and every way in which a worker ends: hazard 24."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket

import psutil
import pytest

from tests.gunicorns import Gunicorn, Load, Tally, settled
from tests.messages import declare, publish, queue_depth
from tests.servers import HOST
from tests.waiting import wait_until


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_to_the_arbiter_lets_every_handler_finish(
    rabbitmq, amqp_url, queue_name, start, sig
):
    """HAZARDS row 24: what has begun is acknowledged, the rest goes back."""
    server = start("graceful_timeout = 30\nworkers = 2\n", consuming=4, CONSUMERS=2, WORK="0.5,1.5")
    publish(amqp_url, queue_name, 100)
    wait_until(lambda: server.count("begun") >= 40)
    server.signal(sig)
    assert server.wait_end() < 25.0
    assert settled(rabbitmq, amqp_url, queue_name, server, 100).cancelled == 0
    assert rabbitmq.connection_count(amqp_url) == 0


def test_ctrl_c_reaches_all_processes_and_is_one_signal(rabbitmq, amqp_url, queue_name, start):
    """HAZARDS row 24: a worker gets it from the terminal, and another from the arbiter."""
    server = start("workers = 2\n", consuming=2, WORK="1,1.5")
    publish(amqp_url, queue_name, 60)
    wait_until(lambda: server.count("begun") >= 20)
    server.signal_group(signal.SIGINT)
    server.wait_end()
    assert settled(rabbitmq, amqp_url, queue_name, server, 60).cancelled == 0


def test_quit_after_term_cancels_at_once(rabbitmq, amqp_url, queue_name, start):
    """HAZARDS row 24: the arbiter leaves 2 s then, whatever graceful_timeout says."""
    server = start(consuming=1, WORK="30,30")
    publish(amqp_url, queue_name, 20)
    wait_until(lambda: server.count("begun") >= 10)
    server.signal(signal.SIGTERM)
    server.wait_log("Handling signal: term")
    wait_until(lambda: "stopping 1 consumers" in server.log)
    server.signal(signal.SIGQUIT)
    assert server.wait_end() < 25.0
    assert settled(rabbitmq, amqp_url, queue_name, server, 20).cancelled == 10
    assert "SIGKILL" not in server.log


@pytest.mark.parametrize("ending", ["quit", "max_requests"])
def test_two_targets_of_one_worker_both_drain(
    rabbitmq, amqp_url, queue_name, start, tmp_path, ending
):
    """HAZARDS row 24: neither is told too late, nor takes the first signal for a further one."""
    (tmp_path / "second.py").write_text(
        "from tests.webapp import *\nother = Runtime(BROKER)\nother.spawn(Worker)\n"
    )
    server = start(
        f"pythonpath = {str(tmp_path)!r}\nmax_requests = {5 * (ending == 'max_requests')}\n"
        "one, two = post_worker_init, consumers('second:other')\n"
        "def post_worker_init(worker):\n"
        "    one(worker)\n"
        "    two(worker)\n",
        consuming=2,
        WORK="2,2",
    )
    publish(amqp_url, queue_name, 20)
    wait_until(lambda: server.count("begun") == 20)
    (worker,) = server.workers
    if ending == "quit":
        server.signal(signal.SIGQUIT)
        server.wait_end()
    else:
        for _ in range(5):
            server.get()
        wait_until(lambda: worker not in server.workers)
    assert server.log.count("stopping 1 consumers") == 2
    tally = settled(rabbitmq, amqp_url, queue_name, server, 20)
    assert (tally.finished, tally.cancelled) == (20, 0)


def test_a_grace_shorter_than_the_handlers_cancels_them_in_order(
    rabbitmq, amqp_url, queue_name, start
):
    """HAZARDS row 24: drain and cancel fit into graceful_timeout, though the runtime says 30 and 5 s."""
    server = start("graceful_timeout = 6\n", WORK="30,30")
    publish(amqp_url, queue_name, 20)
    wait_until(lambda: server.count("begun") >= 10)
    server.signal(signal.SIGTERM)
    assert 1.0 < server.wait_end() < 6.0
    assert settled(rabbitmq, amqp_url, queue_name, server, 20).cancelled == 10
    assert "SIGKILL" not in server.log


def test_without_a_grace_a_worker_that_ends_alone_drains_all_the_same(amqp_url, queue_name, start):
    """HAZARDS row 24: where gunicorn itself ends it kills its workers at once, which is said."""
    server = start("graceful_timeout = 0\n", WORK="30,30")
    server.wait_log("graceful_timeout = 0: when gunicorn ends, it kills this worker at once")
    publish(amqp_url, queue_name, 10)
    wait_until(lambda: server.count("begun") == 10)
    (worker,) = server.workers
    server.signal(signal.SIGTERM, worker)
    server.wait_log("stopping 1 consumers within 1.8 s")
    wait_until(lambda: worker not in server.workers)


def test_a_worker_beats_while_it_drains_for_longer_than_its_timeout(
    rabbitmq, amqp_url, queue_name, start
):
    """HAZARDS row 24: else the arbiter takes it for hung."""
    server = start("timeout = 2\n", WORK="4,4")
    publish(amqp_url, queue_name, 10)
    wait_until(lambda: server.count("begun") >= 10)
    (worker,) = server.workers
    server.signal(signal.SIGTERM, worker)
    wait_until(lambda: not psutil.pid_exists(worker))
    assert Tally.of(server.journal).finished == 10
    settled(rabbitmq, amqp_url, queue_name, server, 10)
    assert "WORKER TIMEOUT" not in server.log


def test_a_worker_that_is_told_to_end_finishes_and_its_successor_goes_on(
    rabbitmq, amqp_url, queue_name, start
):
    """HAZARDS row 24: TERM to one worker, under load."""
    server = start("workers = 2\n", consuming=2, WORK="0.2,0.5")
    publish(amqp_url, queue_name, 200)
    wait_until(lambda: server.count("begun") >= 20)
    server.signal(signal.SIGTERM, server.workers[0])
    wait_until(lambda: server.count("finished") == 200)
    assert settled(rabbitmq, amqp_url, queue_name, server, 200).begun == 200
    assert server.count("consuming") == 3


def test_a_reload_drains_the_old_workers(rabbitmq, amqp_url, queue_name, start):
    """HAZARDS row 24: HUP repeats TERM each second, and never kills: nothing is cancelled for it."""
    server = start("workers = 2\ngraceful_timeout = 30\n", consuming=2, WORK="3,3")
    publish(amqp_url, queue_name, 40)
    wait_until(lambda: server.count("begun") >= 20)
    old = server.workers
    server.signal(signal.SIGHUP)
    wait_until(lambda: not any(map(psutil.pid_exists, old)))
    wait_until(lambda: server.count("finished") == 40)
    tally = settled(rabbitmq, amqp_url, queue_name, server, 40)
    assert (tally.begun, tally.cancelled) == (40, 0)


def test_one_worker_fewer_drains_it(rabbitmq, amqp_url, queue_name, start):
    """HAZARDS row 24: TTOU repeats TERM, too."""
    server = start("workers = 2\n", consuming=2, WORK="2,3")
    publish(amqp_url, queue_name, 40)
    wait_until(lambda: server.count("begun") >= 20)
    server.signal(signal.SIGTTOU)
    wait_until(lambda: server.count("finished") == 40)
    assert settled(rabbitmq, amqp_url, queue_name, server, 40).begun == 40
    wait_until(lambda: len(server.workers) == 1)


def test_a_worker_whose_arbiter_was_killed_drains_before_it_goes(
    rabbitmq, amqp_url, queue_name, start
):
    """HAZARDS row 24: it notices within a second, and `notify` exits."""
    server = start("workers = 2\n", consuming=2, WORK="1,2")
    publish(amqp_url, queue_name, 60)
    wait_until(lambda: server.count("begun") >= 20)
    workers = server.workers
    server.process.kill()
    wait_until(lambda: not any(map(psutil.pid_exists, workers)))
    assert settled(rabbitmq, amqp_url, queue_name, server, 60).cancelled == 0


def test_at_max_requests_consumers_drain_first_while_http_is_served(
    rabbitmq, amqp_url, queue_name, start
):
    """HAZARDS row 24: the arbiter starts the next worker only after the exit."""
    server = start("max_requests = 5\n", WORK="2,2")
    publish(amqp_url, queue_name, 10)
    wait_until(lambda: server.count("begun") >= 10)
    (worker,) = server.workers
    for _ in range(5):
        server.get()
    load = Load(server, clients=2)
    wait_until(lambda: not psutil.pid_exists(worker))
    load.stop()
    assert load.failed == []
    assert load.answered > 10
    assert load.slowest < 15.0
    assert server.log.count("Autorestarting worker") == 1
    assert settled(rabbitmq, amqp_url, queue_name, server, 10).finished == 10


def test_an_idle_keep_alive_connection_does_not_hold_the_drain_up(amqp_url, queue_name, start):
    """HAZARDS row 24: the worker ends as soon as it would without consumers."""
    server = start("graceful_timeout = 30\nkeepalive = 60\n", WORK="0.1,0.1")
    connection = http.client.HTTPConnection(HOST, server.port)
    connection.request("GET", "/")
    assert connection.getresponse().read()
    server.signal(signal.SIGQUIT)
    assert server.wait_end() < 25.0
    connection.close()


def test_nothing_is_accepted_any_more_after_quit(amqp_url, queue_name, start):
    """HAZARDS row 24: the process lives on for its handlers alone."""
    server = start(WORK="4,4")
    publish(amqp_url, queue_name, 1)
    wait_until(lambda: server.count("begun") == 1)
    server.signal(signal.SIGQUIT)
    wait_until(lambda: "stopping 1 consumers" in server.log)
    wait_until(lambda: not listens(server))
    assert server.workers != []
    assert server.count("finished") == 0
    server.wait_end()
    assert Tally.of(server.journal).finished == 1


def listens(server: Gunicorn) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, server.port)) == 0


def test_abrt_is_an_end_like_any_other(rabbitmq, amqp_url, queue_name, start):
    """HAZARDS row 24: an operator's, to a worker that is well."""
    server = start(WORK="1,2")
    publish(amqp_url, queue_name, 30)
    wait_until(lambda: server.count("begun") >= 10)
    server.signal(signal.SIGABRT, server.workers[0])
    wait_until(lambda: server.count("finished") == 30)
    assert settled(rabbitmq, amqp_url, queue_name, server, 30).begun == 30


def test_an_upgrade_of_the_binary_drains_the_old_workers(rabbitmq, amqp_url, queue_name, start):
    """HAZARDS row 24: USR2, then TERM to the old arbiter."""
    server = start("workers = 2\n", consuming=2, WORK="0.3,0.6")
    publish(amqp_url, queue_name, 150)
    wait_until(lambda: server.count("begun") >= 20)
    server.signal(signal.SIGUSR2)
    server.wait_consuming(4)
    server.signal(signal.SIGTERM)
    server.process.wait(30)
    wait_until(lambda: server.count("finished") == 150)
    assert settled(rabbitmq, amqp_url, queue_name, server, 150).begun == 150


def test_the_reloader_drains_the_worker(rabbitmq, amqp_url, queue_name, start, tmp_path):
    """HAZARDS row 24: what development reloads, too."""
    watched = tmp_path / "watched.txt"
    watched.touch()
    conf = f"reload = True\nreload_engine = 'poll'\nreload_extra_files = [{str(watched)!r}]\n"
    server = start(conf, WORK="1,1")
    publish(amqp_url, queue_name, 30)
    wait_until(lambda: server.count("begun") >= 10)
    os.utime(watched, (2e9, 2e9))
    wait_until(lambda: server.count("finished") == 30)
    assert server.count("consuming") == 2
    assert settled(rabbitmq, amqp_url, queue_name, server, 30).begun == 30


@pytest.mark.parametrize("own_exchange", [False, True])
def test_a_handler_that_never_yields_loses_its_worker_and_its_message_goes_to_the_dead_letters(
    rabbitmq, amqp_url, queue_name, start, own_exchange
):
    """HAZARDS row 24: ABRT raises SystemExit in it, and the same message would hang the successor."""
    declare(amqp_url, f"{queue_name}.dead")
    dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{queue_name}.dead"}
    arguments = json.dumps(dead if own_exchange else {})
    server = start("timeout = 2\n", WORK="1,1", QUEUE_ARGUMENTS=arguments)
    (worker,) = server.workers
    publish(amqp_url, queue_name, [*range(9), "spin"])
    wait_until(lambda: not psutil.pid_exists(worker))
    server.wait_consuming(2)
    wait_until(lambda: server.count("finished") == 9)
    assert queue_depth(amqp_url, f"{queue_name}.dead") == 1
    assert rabbitmq.queue_counts(amqp_url, queue_name)[:2] == (0, 0)
    told = server.log[server.log.index("kept the whole process waiting for") :]
    assert "in work" in told
    assert "Perhaps out of memory" not in server.log
