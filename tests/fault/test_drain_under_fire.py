"""Hundreds of handlers at work while the process, the broker or the link dies: nothing is lost.

What was in flight may be handled twice, and never more; how many were is printed. `GREENCONSUME_TEST_ROUNDS`
says how often each is done.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
from kombu import Queue

import greenconsume
from greenconsume import Runtime
from greenconsume.events import DrainFinished
from greenconsume.handling.options import ConsumerOptions
from tests.brokers import RabbitMQ
from tests.fault.consumers import (
    Collector,
    Unlimited,
    connection_to,
    duplicates,
    everything,
    observing,
)
from tests.messages import declare, publish, queue_depth
from tests.proxy import Proxy
from tests.rounds import rounds
from tests.servers import launch
from tests.waiting import AT_ONCE, NEVER, wait_until

#: How often each is done, by what it costs: a broker needs 5 s to come back, a process 1 s.
BROKERS, PROCESSES, LINKS = rounds(1), rounds(3), rounds(5)
#: Handlers at once, and what the broker has at the most delivered and not seen settled.
CONCURRENCY, PREFETCH = 200, 400
SECONDS = 0.02

WORKER = """
import greenconsume; greenconsume.patch_all()
import os, sys, gevent
from kombu import Queue

url, queue, path = sys.argv[1:]
log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

class Worker(greenconsume.ConsumerMixin):
    options = greenconsume.ConsumerOptions(concurrency=CONCURRENCY)

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue(queue)], callbacks=[self.on_task])]

    def on_task(self, body, message):
        gevent.sleep(SECONDS)
        os.write(log, b"%d\\n" % body)
        message.ack()

runtime = greenconsume.Runtime(url)
runtime.spawn(Worker)
sys.exit(0 if runtime.run() else 1)
""".replace("CONCURRENCY", str(CONCURRENCY)).replace("SECONDS", str(SECONDS))


class Crowd(Collector):
    """A collector with a pool, which waits a little for each message."""

    restart_limit = Unlimited()

    def __init__(self, url: str, queue: str, handled: Counter[Any]) -> None:
        connection = connection_to(url)
        super().__init__(connection, queue, handled, PREFETCH, self.wait, CONCURRENCY)
        self.queue = Queue(queue, no_declare=True)

    def wait(self, _body: Any) -> None:
        gevent.sleep(SECONDS)


def report(what: str, rounds: int, handled: Counter[Any]) -> None:
    print(f"{what}: {rounds} times, {len(handled)} messages, {duplicates(handled)} handled again")


# -- the process --------------------------------------------------------------------------------------


class Process:
    """A worker in a process of its own, and what all of them together have handled."""

    def __init__(self, url: str, queue: str, folder: Path) -> None:
        self._command = [sys.executable, "-c", WORKER, url, queue, str(folder / "handled")]
        self._path, self._log = folder / "handled", folder / "worker.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        home = str(Path(greenconsume.__file__).parents[1])
        self.process = launch(*self._command, log=self._log, env={**os.environ, "PYTHONPATH": home})

    def end(self, signum: int) -> int:
        assert self.process is not None
        self.process.send_signal(signum)
        return self.process.wait(timeout=30)

    @property
    def line_count(self) -> int:
        return self._path.read_bytes().count(b"\n") if self._path.exists() else 0

    @property
    def handled(self) -> Counter[int]:
        return Counter(map(int, self._path.read_text().split()))


@pytest.fixture
def process(amqp_url: str, queue_name: str, tmp_path: Path) -> Iterator[Process]:
    process = Process(amqp_url, queue_name, tmp_path)
    yield process
    if process.process is not None and process.process.poll() is None:
        process.end(signal.SIGKILL)


@pytest.mark.slow
def test_a_process_killed_under_load_loses_nothing(
    amqp_url: str, queue_name: str, process: Process
):
    count, rng = 3000 * (PROCESSES + 1), random.Random(5)
    publish(amqp_url, queue_name, count)
    for _ in range(PROCESSES):
        process.start()
        enough = process.line_count + rng.randrange(500, 2500)
        wait_until(lambda enough=enough: process.line_count >= enough)
        process.end(signal.SIGKILL)
    process.start()
    wait_until(lambda: len(process.handled) == count, within=60)
    assert process.end(signal.SIGTERM) == 0
    handled = process.handled
    report("kill -9 of the process", PROCESSES, handled)
    assert set(handled) == set(range(count))
    assert duplicates(handled) <= PROCESSES * PREFETCH
    assert queue_depth(amqp_url, queue_name) == 0


def test_a_process_told_to_stop_under_load_handles_nothing_twice(
    amqp_url: str, queue_name: str, process: Process
):
    """SIGTERM at random moments: exit code 0, and what comes next goes on where it ended."""
    count, rng = 9000, random.Random(6)
    publish(amqp_url, queue_name, count)
    for _ in range(3):
        process.start()
        enough = process.line_count + rng.randrange(200, 1500)
        wait_until(lambda enough=enough: process.line_count >= enough)
        assert process.end(signal.SIGTERM) == 0
    process.start()
    wait_until(lambda: len(process.handled) == count, within=60)
    assert process.end(signal.SIGTERM) == 0
    assert process.handled == Counter(range(count))


# -- the broker and the link ----------------------------------------------------------------------------


@pytest.fixture
def handled() -> Counter[Any]:
    return Counter()


@pytest.fixture
def crowd() -> Iterator[Callable[..., Runtime]]:
    """Run a crowd of handlers; afterwards it is stopped."""
    runtimes: list[Runtime] = []

    def run(url: str, queue: str, handled: Counter[Any], **options: Any) -> Runtime:
        runtime = Runtime(connection_to(url), options=ConsumerOptions(**options))
        runtimes.append(runtime)
        runtime.spawn(Crowd(url, queue, handled))
        runtime.start()
        return runtime

    yield run
    for runtime in runtimes:
        runtime.kill()
        assert runtime.join(30)


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * BROKERS)
@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_broker_killed_under_load_loses_nothing(
    rabbitmq_fault: RabbitMQ,
    amqp_url: str,
    queue_name: str,
    handled: Counter[Any],
    crowd: Any,
    kind: str,
):
    """A classic queue delivers again, too, what was acked and is not yet on its disk; a quorum queue not."""
    count, rng = 4000 * (BROKERS + 1), random.Random(7)
    declare(amqp_url, queue_name, x_queue_type=kind)
    # A RabbitMQ 3.10 that is killed soon after it has made a quorum queue forgets which files are its.
    rabbitmq_fault.eval("[dets:sync(Table) || Table <- dets:all()]")
    publish(amqp_url, queue_name, count)
    runtime = crowd(amqp_url, queue_name, handled)
    for _ in range(BROKERS):
        enough = handled.total() + rng.randrange(500, 3000)
        wait_until(lambda enough=enough: handled.total() >= enough)
        rabbitmq_fault.kill()
        rabbitmq_fault.start()
    wait_until(everything(handled, count), within=60)
    runtime.stop()
    assert runtime.join(30)
    report(f"kill -9 of the broker, a {kind} queue", BROKERS, handled)
    assert queue_depth(amqp_url, queue_name) == 0
    assert duplicates(handled) <= BROKERS * (3000 + PREFETCH if kind == "classic" else PREFETCH)


@pytest.mark.usefixtures("every_link_has_lived")
@pytest.mark.slow
def test_a_link_cut_under_load_loses_nothing(
    proxy: Proxy, amqp_url: str, queue_name: str, handled: Counter[Any], crowd: Any
):
    count, rng = 2500 * (LINKS + 1), random.Random(8)
    publish(amqp_url, queue_name, count)
    runtime = crowd(proxy.url, queue_name, handled)
    for _ in range(LINKS):
        enough = handled.total() + rng.randrange(100, 1500)
        wait_until(lambda enough=enough: handled.total() >= enough)
        proxy.cut()
    wait_until(everything(handled, count), within=60)
    runtime.stop()
    assert runtime.join(30)
    report("a cut link", LINKS, handled)
    assert duplicates(handled) <= LINKS * PREFETCH
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 0)


@pytest.mark.parametrize("fault", ["cut", "stall", "half_open", "refuse"])
@pytest.mark.parametrize("before", [True, False])
def test_a_drain_whose_link_fails_is_over_in_time_and_loses_nothing(
    proxy: Proxy,
    amqp_url: str,
    queue_name: str,
    handled: Counter[Any],
    crowd: Any,
    fault: str,
    before: bool,
):
    """HAZARDS.md rows 12 and 17: just before the stop, or while handlers are waited for."""
    count = 3000
    publish(amqp_url, queue_name, count)
    runtime = crowd(proxy.url, queue_name, handled, drain_timeout=NEVER, cancel_timeout=NEVER)
    wait_until(lambda: handled.total() > 600)
    began = monotonic()
    with observing(DrainFinished) as events:
        if before:
            strike(proxy, fault)
        runtime.stop()
        if not before:
            gevent.sleep(0.01)
            strike(proxy, fault)
        assert runtime.join(30)
    assert monotonic() - began < AT_ONCE
    assert (events[0].cancelled_handlers, events[0].killed_handlers) == (0, 0)
    once, in_flight = dict(handled), PREFETCH
    proxy.resume()
    proxy.cut()  # what is half open, the broker finds out now
    crowd(amqp_url, queue_name, handled)
    wait_until(everything(handled, count))
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 0)
    assert len(once) < count
    assert duplicates(handled) <= in_flight


def strike(proxy: Proxy, fault: str) -> None:
    if fault == "refuse":
        proxy.refuse()
        proxy.cut()
    else:
        getattr(proxy, fault)()


def test_a_broker_killed_during_a_drain_does_not_hold_it_up(
    rabbitmq_fault: RabbitMQ, amqp_url: str, queue_name: str, handled: Counter[Any], crowd: Any
):
    count = 2000
    publish(amqp_url, queue_name, count)
    runtime = crowd(amqp_url, queue_name, handled, drain_timeout=NEVER, cancel_timeout=NEVER)
    wait_until(lambda: handled.total() > 600)
    began = monotonic()
    runtime.stop()
    gevent.sleep(0.005)
    rabbitmq_fault.kill()
    assert runtime.join(30)
    assert monotonic() - began < AT_ONCE
    rabbitmq_fault.start()
    crowd(amqp_url, queue_name, handled)
    wait_until(everything(handled, count))
