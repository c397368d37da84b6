"""Signals to a process that runs a runtime on a real broker: it drains, and loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import gevent
import pytest

from tests.messages import publish
from tests.waiting import AT_ONCE, wait_until

SCRIPT = """
import sys, greenconsume
greenconsume.patch_all()
import gevent, logging
from greenconsume import ConsumerMixin, ConsumerOptions, Runtime
from greenconsume.links import backoff
from kombu import Connection, Queue

url, queue, seconds, drain_timeout = sys.argv[1:]

def say(*words):
    print(*words, flush=True)

class Worker(ConsumerMixin):
    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue(queue)], callbacks=[self.on_task], prefetch_count=3)]

    def on_task(self, body, message):
        say("begun", body)
        gevent.sleep(float(seconds))
        message.ack()
        say("done", body)

    def on_consume_ready(self, *args, **kwargs):
        say("ready")

backoff.FIRST_DELAY = 60.0
logging.basicConfig(level=logging.INFO)
connection = Connection(url, transport_options={"close_timeout": 0.2})
options = ConsumerOptions(drain_timeout=float(drain_timeout), cancel_timeout=1.0)
runtime = Runtime(connection, options=options)
runtime.spawn(Worker)
clean = runtime.run()
say("clean" if clean else "abandoned")
sys.exit(0 if clean else 1)
"""


class Worker:
    """A process that runs the script, and what it has said."""

    def __init__(self, folder: Path, *args: object) -> None:
        script = folder / "worker.py"
        script.write_text(SCRIPT)
        self._said, self._log = folder / "said", folder / "log"
        root = Path(__file__).parents[2]
        with self._said.open("wb") as said, self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *map(str, args)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(root)])},
                stdout=said,
                stderr=log,
            )

    @property
    def said(self) -> list[str]:
        return self._said.read_text().splitlines()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, line: str) -> None:
        wait_until(lambda: line in self.said, 30.0, f"{line} is said; the log: {self.log}")

    def signal(self, sig: int) -> None:
        self.process.send_signal(sig)

    def exit_code(self, within: float = 30.0) -> int:
        """Wait for the end of the process."""
        return self.process.wait(within)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def make(url: str, queue: str, seconds: float = 0.0, drain_timeout: float = 10.0) -> Worker:
        workers.append(Worker(tmp_path, url, queue, seconds, drain_timeout))
        return workers[-1]

    yield make
    for worker in workers:
        worker.process.kill()
        worker.process.wait()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_handler_finish_and_exits_clean(
    rabbitmq, amqp_url, queue_name, start, sig
):
    """HAZARDS row 12: what was prefetched goes back, what was begun is acknowledged."""
    publish(amqp_url, queue_name, 5)
    worker = start(amqp_url, queue_name, seconds=1.0)
    worker.wait_for("begun 0")
    began = monotonic()
    worker.signal(sig)
    assert worker.exit_code() == 0, worker.log
    print(f"\ngone {monotonic() - began:.2f} s after the signal, within a handler of 1 s")
    assert worker.said == ["ready", "begun 0", "done 0", "clean"]
    assert "Traceback" not in worker.log
    assert rabbitmq.queue_counts(amqp_url, queue_name) == (4, 0, 0)
    assert rabbitmq.connection_count(amqp_url) == 0


def test_a_killed_process_leaves_its_messages_to_the_broker(rabbitmq, amqp_url, queue_name, start):
    """kill -9 in the midst of a handler: redelivered, all of them."""
    publish(amqp_url, queue_name, 3)
    worker = start(amqp_url, queue_name, seconds=60.0)
    worker.wait_for("begun 0")
    worker.signal(signal.SIGKILL)
    assert worker.exit_code() == -signal.SIGKILL
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (3, 0, 0))


def test_a_process_that_was_suspended_comes_back(amqp_url, queue_name, start):
    """HAZARDS row 5: Ctrl-Z for longer than the heartbeat: the link is lost, the consumer is not."""
    worker = start(f"{amqp_url}?heartbeat=1", queue_name)
    worker.wait_for("ready")
    worker.signal(signal.SIGSTOP)
    gevent.sleep(3.5)
    worker.signal(signal.SIGCONT)
    publish(amqp_url, queue_name, 1)
    worker.wait_for("done 0")
    worker.signal(signal.SIGTERM)
    assert worker.exit_code() == 0, worker.log
    assert worker.said == ["ready", "ready", "begun 0", "done 0", "clean"]
    assert "Traceback" not in worker.log


def test_a_signal_after_the_broker_froze_is_bounded_by_the_close_timeout(
    rabbitmq_fault, amqp_url, queue_name, start
):
    """HAZARDS row 17: in a process that had nothing to do."""
    worker = start(amqp_url, queue_name)
    worker.wait_for("ready")
    rabbitmq_fault.pause()
    began = monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.exit_code() == 0, worker.log
    assert monotonic() - began < AT_ONCE
