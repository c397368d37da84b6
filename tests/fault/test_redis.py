"""Redis, through the fallback that polls: killed and restarted, cut, down; and what handlers raise."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import pytest
from kombu import Connection, Consumer, Queue

from greenconsume import Requeue, Runtime, spawn
from greenconsume.events import ConnectFailed, HandlerFailed
from greenconsume.handling.options import ConsumerOptions
from tests.fault.consumers import (
    Collector,
    consuming,
    duplicates,
    everything,
    observing,
    patient_connection_to,
    running,
    stop_and_join,
)
from tests.servers import HOST, MissingServerError, end, find_program, free_port, launch, missing
from tests.waiting import AT_ONCE, wait_until

#: Seconds between two looks at whether to stop, and some for the poll that is under way.
POLL = 1.0


class Redis:
    """A Redis of one test's own, to be killed and started again; it writes every command to its disk."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://{HOST}:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = launch(
            find_program("redis-server"),
            *("--port", str(self.port), "--bind", HOST, "--dir", self._folder, "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "always"),
            log=self._folder / "redis.out",
        )
        wait_until(self._answers, message="redis-server is ready")

    def kill(self) -> None:
        if self._process is not None:
            end(self._process, signal.SIGKILL)
            self._process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), 1.0) as client:
                client.sendall(b"PING\r\n")
                return client.recv(5) == b"+PONG"
        except OSError:
            return False


@contextmanager
def started(folder: Path) -> Iterator[Redis]:
    """Start one; kill it in the end. The test is skipped, or fails in CI, where there is none to start."""
    server = Redis(folder)
    try:
        server.start()
    except MissingServerError as exc:
        missing(exc)
    yield server
    server.kill()


@pytest.fixture
def redis(tmp_path) -> Iterator[Redis]:
    with started(tmp_path) as server:
        yield server


@pytest.fixture(autouse=True)
def collected(caplog) -> Iterator[None]:
    """redis-py leaves the sockets of its pools to the collector."""
    # A record that pytest keeps has a traceback, and that the sockets.
    caplog.set_level(logging.CRITICAL, logger="greenconsume")
    yield
    gc.collect()


def publish(url: str, queue: str, bodies: Any) -> None:
    with Connection(url) as connection:
        producer = connection.Producer()
        for body in bodies:
            producer.publish(body, routing_key=queue, declare=[Queue(queue, durable=True)])


def left_over(url: str, queue: str) -> int:
    """Return how many messages are in a queue, or were delivered and not settled."""
    with Connection(url) as connection:
        client = connection.default_channel.client
        return int(client.llen(queue)) + int(client.hlen("unacked"))


def test_a_stop_is_heard_within_the_interval_of_the_polling(redis, queue_name):
    with running(Collector(Connection(redis.url), queue_name)) as (greenlet,):
        seconds = stop_and_join(greenlet)
        print(f"\nan idle Redis consumer is joined in {seconds:.2f} s")
        assert seconds < AT_ONCE
        assert greenlet.successful()


@pytest.mark.usefixtures("long_backoff")
def test_a_stop_while_redis_is_down_is_heard_at_once(queue_name):
    """HAZARDS row 3: on the fallback, too."""
    with observing(ConnectFailed) as failures:
        url = f"redis://{HOST}:{free_port()}/0"
        greenlet = spawn(Collector(patient_connection_to(url), queue_name))
        wait_until(lambda: failures)
        gevent.sleep(0.05)
        assert stop_and_join(greenlet) < AT_ONCE


# redis-py leaves a socket whose connect was given up to the collector.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)
def test_a_stop_while_redis_is_unreachable_is_heard_at_once(black_hole_url, queue_name):
    """HAZARDS rows 3 and 16: a connect that nobody answers."""
    url = black_hole_url.replace("amqp://guest:guest@", "redis://").removesuffix("/") + "0"
    greenlet = spawn(Collector(patient_connection_to(url), queue_name))
    gevent.sleep(0.1)
    assert str(greenlet.state) == "connecting"
    assert stop_and_join(greenlet) < AT_ONCE


def test_consumers_come_back_after_redis_was_killed(redis, queue_name):
    """HAZARDS row 22; what was delivered and not acknowledged is Redis's to restore, later."""
    with Runtime(Connection(redis.url)) as runtime:
        runtime.spawn(lambda c: Collector(c, queue_name), replicas=5)
        wait_until(lambda: all(child.started for child in runtime.children))
        publish(redis.url, queue_name, range(100))
        consumers = [child.consumer for child in runtime.children]
        wait_until(lambda: sum(len(c.handled) for c in consumers) == 100)
        wait_until(lambda: left_over(redis.url, queue_name) == 0)
        redis.kill()
        wait_until(
            lambda: not any(child.greenlet.ready.is_set() for child in runtime.children), 5.0
        )
        redis.start()
        began = monotonic()
        publish(redis.url, queue_name, range(100, 200))
        wait_until(lambda: sum(len(c.handled) for c in consumers) == 200)
        print(f"\nfive Redis consumers are back {monotonic() - began:.2f} s after their broker")
        assert all(child.restart_count == 0 for child in runtime.children)
    assert left_over(redis.url, queue_name) == 0


def test_a_cut_connection_is_made_again(redis, make_proxy, queue_name):
    proxy = make_proxy(redis.url)
    consumer = Collector(Connection(proxy.url), queue_name)
    with running(consumer) as (greenlet,):
        for cut in range(3):
            # While it is idle: what Redis has popped and not yet sent is lost with the connection.
            proxy.cut()
            publish(redis.url, queue_name, range(cut * 10, cut * 10 + 10))
            wait_until(everything(consumer.handled, cut * 10 + 10))
        assert greenlet.exception is None
    wait_until(lambda: gc.collect() >= 0 and proxy.open_count == 0)


@pytest.mark.parametrize(
    "error", [OSError, TimeoutError, ConnectionResetError, KeyError, ValueError], ids=str
)
def test_what_a_handler_raises_is_never_taken_for_the_brokers_error(redis, queue_name, error):
    """HAZARDS row 11: on Redis an OSError reconnects, and so does even a KeyError."""

    class Failing(Collector):
        options = ConsumerOptions(on_error=Requeue(delay=0.1))
        connects = 0

        def on_connection_revived(self) -> None:
            self.connects += 1

    def work(body: Any) -> None:
        if body == 0 and consumer.handled[body] < 3:
            raise error("from the handler")

    consumer = Failing(Connection(redis.url), queue_name, work=work)
    with observing(HandlerFailed) as failures, running(consumer):
        publish(redis.url, queue_name, range(10))
        wait_until(lambda: consumer.handled[0] == 3)
        wait_until(everything(consumer.handled, 10))
        assert consumer.connects == 1
    assert [type(failure.error) for failure in failures] == [error, error]
    assert duplicates(consumer.handled) == 2
    assert left_over(redis.url, queue_name) == 0


def test_a_stop_in_a_handler_settles_its_message_and_gives_back_the_rest(redis, queue_name):
    """HAZARDS row 12 on the fallback: nothing is stranded among the unacknowledged."""
    publish(redis.url, queue_name, range(10))
    consumer = Collector(Connection(redis.url), queue_name, prefetch=5)
    consumer.work = lambda _body: gevent.sleep(0.2)
    with running(consumer) as (greenlet,):
        wait_until(lambda: consumer.handled)
        stop_and_join(greenlet)
    assert len(consumer.handled) < 10
    assert left_over(redis.url, queue_name) == 10 - len(consumer.handled)
    rest = Collector(Connection(redis.url), queue_name, consumer.handled)
    with running(rest) as greenlets:
        consuming(greenlets)
        wait_until(everything(consumer.handled, 10))
    assert duplicates(consumer.handled) == 0


def test_a_plain_consumer_on_redis_is_not_disturbed_by_the_package(redis, queue_name):
    """What is registered for AMQP and memory leaves Redis as kombu has it."""
    publish(redis.url, queue_name, ["hello"])
    bodies: list[Any] = []
    with Connection(redis.url) as connection:
        with Consumer(connection, [Queue(queue_name)], callbacks=[lambda b, m: bodies.append(b)]):
            connection.drain_events(timeout=30)
    assert bodies == ["hello"]
