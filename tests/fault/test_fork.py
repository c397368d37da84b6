"""Forks while a runtime runs: the child must neither use nor end what is its parent's (HAZARDS row 23)."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import gevent
import pytest
from kombu import Connection, Producer

from greenconsume import Publisher, Runtime, spawn
from greenconsume.errors import ForkedError
from greenconsume.events import ConnectFailed, LinkDown, LinkUp
from tests.brokers import client_tls
from tests.fault.consumers import (
    Collector,
    connection_to,
    everything,
    freeze,
    observing,
    running,
)
from tests.messages import declare, publish, queue_depth
from tests.waiting import wait_until


def in_child(action: Callable[[], object], within: float = 20.0) -> str:
    """Fork, run `action` in the child and end that at once; returns what it returned, or its traceback."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = str(action())
        except BaseException:  # told to the parent
            answer = traceback.format_exc()
        os.write(writer, answer.encode()[:60000])
        os._exit(0)
    os.close(writer)
    with gevent.Timeout(within), os.fdopen(reader, "rb") as pipe:
        answer = gevent.get_hub().threadpool.apply(pipe.read).decode()
    _, status = os.waitpid(pid, 0)
    assert status == 0
    return answer


def outcome(action: Callable[[], object]) -> str:
    """Return what `action` raised, in words, and why."""
    try:
        return f"returned {action()!r}"
    except Exception as exc:  # whatever it is, it is what is asked for
        return f"{type(exc).__name__}({type(exc.__cause__).__name__}): {exc}"


@pytest.fixture(params=["amqp", "amqps"])
def connection(request, rabbitmq, amqp_url) -> Connection:
    """A connection, not connected, plain or over TLS."""
    if request.param == "amqp":
        return connection_to(amqp_url)
    url = request.getfixturevalue("amqps_url")
    return Connection(url, ssl=client_tls(rabbitmq), transport_options={"close_timeout": 0.2})


def test_a_child_that_closes_everything_leaves_its_parents_link_alone(
    connection, amqp_url, queue_name
):
    """HAZARDS row 23: parent and child share a socket."""
    declare(amqp_url, queue_name)
    producing = connection.clone()
    with observing(LinkDown) as lost, running(Collector(connection, queue_name)) as (greenlet,):
        with producing:
            producer = Producer(producing.default_channel)
            producer.publish(0, routing_key=queue_name)
            wait_until(everything(greenlet.consumer.handled, 1))

            def use_and_close() -> list[str]:
                said = [
                    outcome(lambda: producer.channel.basic_qos(0, 1, False)),
                    outcome(lambda: producer.channel.queue_declare("never")),
                    outcome(lambda: greenlet.join(30)),
                    outcome(producing.release),
                    outcome(connection.release),
                ]
                gevent.sleep(0.3)
                return said

            said = in_child(use_and_close)
            assert said.count("LinkLostError(ForkedError)") == 2, said
            assert "make connections, consumers and the Runtime in the child" in said
            assert said.count("returned") == 3, said
            for body in range(1, 50):
                producer.publish(body, routing_key=queue_name)
            wait_until(everything(greenlet.consumer.handled, 50))
        assert greenlet.ready.is_set()
        assert lost == []
    assert queue_depth(amqp_url, queue_name) == 0


def test_the_childs_copies_of_consumers_do_not_consume(connection, amqp_url, queue_name):
    """HAZARDS row 23: nor do they come back over a link of their own."""
    declare(amqp_url, queue_name)
    with Runtime(connection) as runtime:
        runtime.spawn(lambda c: Collector(c, queue_name), replicas=10)
        consumers = [child.consumer for child in runtime.children]
        handled = consumers[0].handled

        def wait_and_count() -> str:
            with observing(LinkUp) as ups:
                publish(amqp_url, queue_name, 100)
                gevent.sleep(1.5)
            states = {str(child.greenlet.state) for child in runtime.children}
            return f"{sum(len(c.handled) for c in consumers)} handled, {len(ups)} links, {states}"

        assert in_child(wait_and_count) == "0 handled, 0 links, {'stopped'}"
        wait_until(lambda: sum(len(c.handled) for c in consumers) == 100)
        assert all(child.greenlet.ready.is_set() for child in runtime.children)
        assert len(handled) > 0


def test_a_runtime_refuses_to_be_used_in_a_child(amqp_url, queue_name):
    """HAZARDS row 23: the remedy is in the message."""
    with Runtime(connection_to(amqp_url)) as runtime:
        runtime.spawn(lambda c: Collector(c, queue_name))

        def use() -> list[str]:
            actions = (runtime.stop, runtime.join, runtime.kill, runtime.start, runtime.run)
            return [outcome(action) for action in actions]

        said = in_child(use)
        assert said.count("ForkedError") == 5, said
        assert said.count("after the fork") == 5
        publish(amqp_url, queue_name, 1)
        wait_until(lambda: runtime.children[0].consumer.handled[0] == 1)


def test_a_runtime_that_is_made_in_the_child_works(amqp_url, queue_name):
    """HAZARDS row 23: while that of the parent goes on."""
    declare(amqp_url, queue_name)
    publish(amqp_url, f"{queue_name}-child", 100)
    with Runtime(connection_to(amqp_url)) as runtime:
        runtime.spawn(lambda c: Collector(c, queue_name))

        def consume() -> str:
            own = Runtime(connection_to(amqp_url))
            children = own.spawn(lambda c: Collector(c, f"{queue_name}-child"), replicas=3)
            with own:
                wait_until(lambda: sum(len(c.consumer.handled) for c in children) == 100)
            return "ended well"

        assert in_child(consume) == "ended well"
        publish(amqp_url, queue_name, 10)
        wait_until(lambda: len(runtime.children[0].consumer.handled) == 10)
    assert queue_depth(amqp_url, f"{queue_name}-child") == 0


def test_a_publisher_that_was_only_made_before_the_fork_publishes_in_each_process(
    amqp_url, queue_name
):
    """HAZARDS row 23: it binds to its process with its first message, whose id no other process has."""
    declare(amqp_url, queue_name)
    publisher = Publisher(connection_to(amqp_url))

    def publish_one() -> str:
        with publisher:
            publication = publisher.publish_nowait(1, queue_name)
            publication.wait()
        return str(publication.message_id)

    ids = {in_child(publish_one), in_child(publish_one), publish_one()}
    assert {len(each) for each in ids} == {32}, ids
    assert len(ids) == 3
    assert queue_depth(amqp_url, queue_name) == 3


def test_a_publisher_that_has_published_refuses_to_in_a_child(amqp_url, queue_name):
    """HAZARDS row 23: the remedy is in the message."""
    declare(amqp_url, queue_name)
    with Publisher(connection_to(amqp_url)) as publisher:
        publisher.publish(1, queue_name)
        said = in_child(lambda: outcome(lambda: publisher.publish(2, queue_name)))
        assert said.startswith("ForkedError"), said
        assert "after the fork" in said
        publisher.publish(3, queue_name)
    assert queue_depth(amqp_url, queue_name) == 2


def test_a_consumer_can_be_spawned_in_a_child_with_the_parents_connection(amqp_url, queue_name):
    """A `kombu.Connection` that the parent has used is cloned: the child dials a link of its own."""
    connection = connection_to(amqp_url)
    publish(amqp_url, f"{queue_name}-child", 10)
    with running(Collector(connection, queue_name)):

        def consume() -> str:
            consumer = Collector(connection, f"{queue_name}-child")
            with running(consumer):
                wait_until(lambda: len(consumer.handled) == 10)
            return "ended well"

        assert in_child(consume) == "ended well"


def test_a_fork_while_connecting_leaves_the_dial_to_the_parent(
    rabbitmq_fault, amqp_url, queue_name
):
    """HAZARDS row 23: half a handshake belongs to one process."""
    freeze(rabbitmq_fault)
    with observing(ConnectFailed) as failures:
        greenlet = spawn(Collector(connection_to(amqp_url), queue_name))
        gevent.sleep(0.05)
        assert in_child(lambda: gevent.sleep(0.3) or greenlet.state) == "stopped"
        rabbitmq_fault.resume()
        wait_until(greenlet.ready.is_set)
    assert failures == []
    greenlet.stop()
    assert greenlet.join(30)


SCRIPT = """
import sys, greenconsume
greenconsume.patch_all()
import multiprocessing, os, subprocess, gevent
from gevent.event import Event
from greenconsume import Runtime
from tests.fault.consumers import Collector, connection_to, everything
from tests.messages import publish
from tests.waiting import wait_until

published = Event()

def report(queue):
    queue.put("hello from the child")

def fork_in_handler(body):
    if body == "fork":
        published.wait()
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        os.waitpid(pid, 0)
        print("the handler's child is gone", flush=True)

if __name__ == "__main__":
    url, name = sys.argv[1:]
    with Runtime(connection_to(url)) as runtime:
        runtime.spawn(lambda c: Collector(c, name, work=fork_in_handler))
        consumer = runtime.children[0].consumer
        publish(url, name, ["fork"])
        published.set()
        wait_until(lambda: consumer.handled["fork"])
        gevent.sleep(1.0)
        pid = os.fork()
        if pid == 0:
            print("the child exits", flush=True)
            sys.exit(0)  # as a user would: finalizers, atexit and `with` blocks run
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=report, args=(queue,))
        process.start()
        print(queue.get(timeout=30), flush=True)
        process.join(30)
        assert process.exitcode == 0, process.exitcode
        subprocess.run([sys.executable, "-c", "print('hello from a subprocess')"], check=True)
        publish(url, name, 100)
        wait_until(everything(consumer.handled, 100))
        assert consumer.handled["fork"] == 1
        assert runtime.children[0].restart_count == 0
    print("the parent is well", flush=True)
"""


def test_children_that_exit_as_users_let_them_harm_nobody(rabbitmq, amqp_url, queue_name, tmp_path):
    """HAZARDS row 23: sys.exit() in a fork, multiprocessing, subprocess."""
    script = tmp_path / "forking.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), amqp_url, queue_name],
        check=False,  # its standard error says more than an exit code
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(root)])},
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "the handler's child is gone",
        "the child exits",
        "hello from the child",
        "hello from a subprocess",
        "the parent is well",
    ], done.stderr
    assert "Traceback" not in done.stderr
    assert rabbitmq.connection_count(amqp_url) == 0


SILENT = """
import sys, greenconsume
greenconsume.patch_all()
import os, gevent
from gevent import monkey
from gevent.event import Event
from kombu import Connection, Queue
from greenconsume import ConsumerMixin, Publisher, Runtime, spawn

broker, name = sys.argv[1:]
waitpid = monkey.get_original("os", "waitpid")

class Forking(ConsumerMixin):
    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue(name)], callbacks=[self.on_message], prefetch_count=5)]

    def on_message(self, body, message):
        if body == "fork":
            confirmed.wait()  # else the child has a copy of a publish that waits, and ends with it
        message.ack()  # it is still to be written when the process forks
        if body == "fork":
            publisher.publish_nowait("of the parent", name)  # and so is this
            fork()
        if body == "of the parent":
            done.set()

def fork():
    print("forks", flush=True)
    os.read(0, 1)  # natively, as all in here: the parent sends nothing until it is told to
    pid = os.fork()
    if pid == 0:
        use_everything()
        sys.exit(0)  # as a user would: finalizers, atexit and `with` blocks run
    waitpid(pid, 0)
    print("the child is gone", flush=True)
    os.read(0, 1)

def use_everything():
    for use in (runtime.stop, runtime.kill, runtime.join, runtime.start, publisher.close, connection.release,
                lambda: publisher.publish(1, name), lambda: publisher.publish_nowait(1, name),
                single.stop):
        try:
            use()
        except Exception as exc:
            print(type(exc).__name__, flush=True)
    gevent.sleep(1.3)  # longer than between two heartbeats

confirmed, done = Event(), Event()
connection = Connection(broker, heartbeat=2)
runtime = Runtime(connection)
runtime.spawn(Forking)
publisher = Publisher(Connection(broker, heartbeat=2))
single = spawn(Forking(Connection(broker, heartbeat=2)))
with publisher, runtime:
    single.ready.wait()
    publisher.publish("first", name)
    publisher.publish("fork", name)
    confirmed.set()
    done.wait()
    single.stop()
    single.join()
print("the parent is well", flush=True)
"""


def test_a_child_sends_no_byte_over_its_parents_sockets(proxy, amqp_url, queue_name, tmp_path):
    """HAZARDS row 23: a handler forks while an acknowledgement and a message are still to be written.

    The parent waits natively as long as the child lives, so whatever comes is the child's: of its links, of
    its copies of a runtime, a publisher and a consumer, or of their heartbeats.
    """
    script, log = tmp_path / "silent.py", tmp_path / "out"
    script.write_text(SILENT)
    command = [sys.executable, str(script), proxy.url, queue_name]
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
        ) as parent,
    ):
        assert parent.stdin is not None
        wait_until(lambda: "forks" in log.read_text(), 30.0)
        gevent.sleep(0.3)  # what is under way arrives
        known, recorded = proxy.connection_count, proxy.record()
        assert known == 3
        os.write(parent.stdin.fileno(), b"1")
        wait_until(lambda: "the child is gone" in log.read_text(), 30.0)
        gevent.sleep(0.3)
        assert recorded == {}, log.read_text()
        os.write(parent.stdin.fileno(), b"2")
        assert parent.wait(30) == 0, log.read_text()
    assert "the parent is well" in log.read_text()
    assert log.read_text().count("ForkedError") == 6, log.read_text()
    assert queue_depth(amqp_url, queue_name) == 0


def test_forked_errors_say_what_to_do():
    assert "after the fork" in str(ForkedError("a broker link"))
