"""kombu's own `examples/`, unchanged but for the broker's address, over the green transport."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.brokers import RabbitMQ, vhost_of
from tests.erlang import ErlangError
from tests.integration.consumers import SOON
from tests.unit.test_kombu_mixins import fetched, unpacked
from tests.waiting import wait_until

SCRIPTS = [
    "complete_receive.py",
    "complete_send.py",
    "delayed_infra.py",
    "experimental/async_consume.py",
    "hello_consumer.py",
    "hello_publisher.py",
    "memory_transport.py",
    "rpc-tut6/rpc_client.py",
    "rpc-tut6/rpc_server.py",
    "simple_receive.py",
    "simple_send.py",
    "simple_task_queue/__init__.py",
    "simple_task_queue/client.py",
    "simple_task_queue/queues.py",
    "simple_task_queue/tasks.py",
    "simple_task_queue/worker.py",
]
ADDRESS = re.compile(r"(['\"])(py)?amqp://[^'\"]*\1")
#: Patches the process, and then runs what follows: a script by its path, or a module by its name.
RUNS = """\
from gevent import monkey; monkey.patch_all()
import greenconsume; greenconsume.patch_all()
import runpy, sys
sys.path.insert(0, ".")
run = runpy.run_path if sys.argv[1].endswith(".py") else runpy.run_module
run(sys.argv[1], run_name="__main__")
"""


class Program:
    """An example that runs in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], printed: Path) -> None:
        self.process = process
        self._printed = printed

    @property
    def printed(self) -> str:
        """All that it has printed so far."""
        return self._printed.read_text()

    def end(self, code: int = 0) -> str:
        """Wait for its end; return what it printed."""
        assert self.process.wait(SOON) == code, self.printed
        return self.printed


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetched(tmp_path_factory.mktemp("kombu"))


@pytest.fixture
def start(archive: Path, tmp_path: Path, amqp_url: str) -> Iterator[Callable[[str], Program]]:
    """Start an example, by its path or as a module."""
    folder = unpacked(archive, tmp_path / "kombu", [f"examples/{each}" for each in SCRIPTS])
    for path in folder.rglob("*.py"):
        path.write_text(ADDRESS.sub(repr(amqp_url), path.read_text()))

    with ExitStack() as stack:

        def started(name: str) -> Program:
            printed = tmp_path / f"{name.replace('/', '.')}.out"
            out = stack.enter_context(printed.open("wb"))
            command = [sys.executable, "-u", "-c", RUNS, name]
            cwd = folder / "examples"
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=cwd)
            stack.enter_context(process)
            stack.callback(process.kill)
            return Program(process, printed)

        yield started


def test_hello(start: Callable[[str], Program]) -> None:
    sent = start("hello_publisher.py").end().removeprefix("Sent: ")
    assert sent.startswith("helloworld")
    assert start("hello_consumer.py").end() == f"Received: {sent}"


def test_the_simple_interface(start: Callable[[str], Program]) -> None:
    start("simple_send.py").end()
    assert start("simple_receive.py").end() == "{'hello': 'world'}\n"


def test_a_consumer_without_a_mixin(
    start: Callable[[str], Program], rabbitmq: RabbitMQ, amqp_url: str
) -> None:
    receiver = start("complete_receive.py")
    wait_until(lambda: consumers_of(rabbitmq, amqp_url, "kombu_demo") == 1, SOON)
    start("complete_send.py").end()
    wait_until(lambda: "Received message: {'hello': 'world'}" in receiver.printed, SOON)


def test_calls_and_their_answers(start: Callable[[str], Program]) -> None:
    server = start("rpc-tut6/rpc_server.py")
    wait_until(lambda: "Awaiting RPC requests" in server.printed, SOON)
    assert "Got 832040" in start("rpc-tut6/rpc_client.py").end()
    assert "fib(30)" in server.printed


def test_a_queue_of_tasks(
    start: Callable[[str], Program], rabbitmq: RabbitMQ, amqp_url: str
) -> None:
    worker = start("simple_task_queue.worker")
    wait_until(lambda: consumers_of(rabbitmq, amqp_url, "hipri") == 1, SOON)
    start("simple_task_queue.client").end()
    wait_until(lambda: "Hello Kombu" in worker.printed, SOON)


def test_the_queues_of_delayed_delivery(
    start: Callable[[str], Program], rabbitmq: RabbitMQ, amqp_url: str
) -> None:
    start("delayed_infra.py").end()
    names = rabbitmq.eval(
        f'[N || {{resource, _, queue, N}} <- rabbit_amqqueue:list_names(<<"{vhost_of(amqp_url)}">>)]'
    )
    assert names.count("my_prefix_") == 28
    assert "destination" in names


def test_the_memory_transport(start: Callable[[str], Program]) -> None:
    assert "RECEIVED MESSAGE: {'foo': 'bar'}" in start("memory_transport.py").end()


def test_the_asynchronous_hub_is_refused_in_words(start: Callable[[str], Program]) -> None:
    said = start("experimental/async_consume.py").end(code=1)
    assert "greenconsume.errors.EventLoopError: kombu's asynchronous hub cannot read" in said


def consumers_of(rabbitmq: RabbitMQ, url: str, queue: str) -> int:
    """Return how many consume from a queue, which may not be there yet."""
    try:
        return rabbitmq.queue_counts(url, queue).consumers
    except ErlangError:
        return 0
