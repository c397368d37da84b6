"""Publishing from request handlers under gunicorn, and the end of a process that has published."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from time import monotonic

import gevent

from tests.messages import declare, queue_depth
from tests.waiting import AT_ONCE, NEVER, wait_until


def test_many_requests_publish_over_one_connection(rabbitmq, amqp_url, queue_name, start):
    declare(amqp_url, f"{queue_name}-out")
    server = start()
    path = f"/publish?{queue_name}-out"
    answers = [gevent.spawn(server.get, path) for _ in range(50)]
    gevent.joinall(answers, timeout=30)
    assert [each.value[0] for each in answers] == [200] * 50
    assert queue_depth(amqp_url, f"{queue_name}-out") == 50
    assert rabbitmq.connection_count(amqp_url) == 2  # one that consumes, one that publishes
    server.signal(signal.SIGTERM)
    server.wait_end()
    assert rabbitmq.connection_count(amqp_url) == 0


def test_requests_fail_in_time_while_the_broker_is_down_and_work_when_it_is_back(
    rabbitmq_fault, amqp_url, queue_name, start
):
    """Without a restart, and with an error that says why."""
    declare(amqp_url, f"{queue_name}-out")
    server = start(PUBLISH_TIMEOUT=1.5)
    path = f"/publish?{queue_name}-out"
    assert server.get(path) == (200, server.get()[1])
    rabbitmq_fault.stop()
    for _ in range(3):
        began = monotonic()
        status, said = server.get(path)
        assert status == 503
        assert monotonic() - began < 1.5 + AT_ONCE
        assert "was not confirmed in time" in said
    assert server.get()[0] == 200
    rabbitmq_fault.start()
    began = monotonic()
    wait_until(lambda: server.get(path)[0] == 200, 10.0)
    print(f"\npublishing again {monotonic() - began:.1f} s after the broker was back")


def test_a_process_that_ends_closes_what_it_published_with(amqp_url, queue_name):
    """What is not confirmed yet is waited for."""
    declare(amqp_url, queue_name)
    code = (
        "import sys, greenconsume; greenconsume.patch_all()\n"
        "from greenconsume import Publisher\n"
        "publisher = Publisher(sys.argv[1])\n"
        "for n in range(100):\n"
        "    publisher.publish_nowait(n, sys.argv[2])\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, amqp_url, queue_name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert queue_depth(amqp_url, queue_name) == 100


def test_a_process_ends_soon_whose_broker_is_away(amqp_url, proxy):
    """The end waits a second for what cannot be confirmed, and no longer."""
    proxy.refuse()
    code = (
        "import sys, greenconsume; greenconsume.patch_all()\n"
        "from greenconsume import Publisher\n"
        "publisher = Publisher(sys.argv[1])\n"
        "publisher.publish_nowait(1, 'nowhere')\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, proxy.url]
    began = monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert monotonic() - began < NEVER
