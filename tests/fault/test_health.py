"""Five faults by three answers: what wedges a process is told apart by its probes, each naming what it is.

===========================  =========  =========  =======
fault                        live       ready      stalled
===========================  =========  =========  =======
a handler never returns      yes        yes        **its consumer**
a handler blocks the hub     **no**     **no**     no answer
its queue was deleted        yes        **its consumer**  no
the broker is stopped        yes        **all its consumers**  no
its channel was closed       yes        **its consumer**  no
its publishers are blocked   yes        **the link**  no
===========================  =========  =========  =======
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from time import monotonic

import gevent
import pytest
from amqp.exceptions import ChannelError
from gevent.event import Event
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Publisher, Runtime
from greenconsume.cli.asking import ask
from tests.messages import declare, publish
from tests.waiting import wait_until

STALL_AFTER = 0.3


class Probes:
    """The answers that a runtime gives to a probe."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str) -> tuple[bool, str]:
        reply = ask(self.address, path)
        return reply.code == 200, reply.text

    def is_full(self) -> bool:
        """Return whether its one handler runs, and another message waits, out of the inbox, for room."""
        (consumer,) = json.loads(self.ask("/status.json")[1])["consumers"]
        return (
            consumer["unsettled"] == 2 and consumer["in_progress"] == 1 and not consumer["waiting"]
        )

    def answers(self) -> tuple[bool, bool, bool]:
        """Live, ready, moving."""
        return tuple(self.ask(path)[0] for path in ("/livez", "/readyz", "/stalledz"))


@pytest.fixture
def serve(tmp_path):
    """Run consumers of a class with an admin."""
    runtimes = []

    def run(make, url):
        address = f"unix:{tmp_path}/shop.sock"
        options = ConsumerOptions(concurrency=1, drain_timeout=0.1, cancel_timeout=0.1)
        runtime = Runtime(url, admin=address, stall_after=STALL_AFTER, options=options)
        runtime.spawn(make)
        runtime.start()
        runtimes.append(runtime)
        probes = Probes(address)
        wait_until(lambda: probes.answers() == (True, True, True))
        return probes

    yield run
    for runtime in runtimes:
        runtime.stop()
        runtime.join()


def consumer_of(queue, work=lambda body: None, no_declare=False, prefetch=None):
    class Orders(ConsumerMixin):
        def __init__(self, connection):
            self.connection = connection

        def get_consumers(self, Consumer, channel):
            wanted = Queue(queue, no_declare=no_declare)
            return [Consumer([wanted], callbacks=[self.on_order], prefetch_count=prefetch)]

        def on_order(self, body, message):
            work(body)
            message.ack()

    return Orders


def test_a_handler_that_never_returns_is_a_stall_and_nothing_else(serve, amqp_url, queue_name):
    probes = serve(consumer_of(queue_name, lambda body: Event().wait()), amqp_url)
    publish(amqp_url, queue_name, 1)
    wait_until(lambda: probes.answers() == (True, True, False))
    assert "consumer Orders-1: the handler of message 1 has run for" in probes.ask("/stalledz")[1]


def test_a_handler_that_blocks_the_hub_leaves_every_probe_without_an_answer(
    serve, amqp_url, queue_name, tmp_path
):
    said = [tmp_path / what for what in ("live", "ready", "stalled")]
    blocked, asking = tmp_path / "blocked", []
    wait = f"while [ ! -e {blocked} ]; do sleep 0.01; done; "

    def block(body):
        for path in (
            said
        ):  # starting a process gives the hub a turn: they ask only when none comes any more
            check = f"exec {sys.executable} -m greenconsume check {path.name} --timeout 0.5"
            with path.open("w") as output:
                command = f"{wait}{check} --admin {probes.address}"
                asking.append(subprocess.Popen(["/bin/sh", "-c", command], stdout=output))
        blocked.touch()
        until = monotonic() + 60
        while monotonic() < until and not all(path.stat().st_size for path in said):
            pass  # without a turn for the hub, until all of them have said something

    probes = serve(consumer_of(queue_name, block), amqp_url)
    publish(amqp_url, queue_name, 1)
    wait_until(lambda: len(asking) == len(said), within=90)
    assert [each.wait(30) for each in asking] == [1, 1, 1]
    assert all("does not answer within 0.5 s" in path.read_text() for path in said)
    wait_until(lambda: probes.answers() == (True, True, True))


def test_a_queue_that_was_deleted_makes_its_consumer_unready(serve, amqp_url, queue_name):
    declare(amqp_url, queue_name)
    probes = serve(consumer_of(queue_name, no_declare=True), amqp_url)
    with Connection(amqp_url) as connection:
        connection.default_channel.queue_delete(queue_name)
    wait_until(lambda: probes.answers() == (True, False, True))
    assert "consumer Orders-1 is" in probes.ask("/readyz")[1]
    wait_until(lambda: "NOT_FOUND - no queue" in probes.ask("/readyz")[1])
    declare(amqp_url, queue_name)
    wait_until(lambda: probes.answers() == (True, True, True))


def test_a_broker_that_is_stopped_makes_the_process_unready_and_not_dead(
    serve, rabbitmq_fault, amqp_url, queue_name
):
    probes = serve(consumer_of(queue_name), amqp_url)
    rabbitmq_fault.stop()
    wait_until(lambda: probes.answers() == (True, False, True))
    assert "consumer Orders-1 is connecting" in probes.ask("/readyz")[1]
    rabbitmq_fault.start()
    wait_until(lambda: probes.answers() == (True, True, True), within=60)


def test_a_consumer_whose_handlers_hang_is_unready_once_its_link_is_gone(
    serve, rabbitmq_fault, amqp_url, queue_name
):
    """It waits for room for the next message, and not for its link: it would say that it consumes."""
    hanging = consumer_of(queue_name, lambda body: Event().wait(), prefetch=2)
    probes = serve(hanging, amqp_url)
    publish(amqp_url, queue_name, 2)
    wait_until(probes.is_full)
    rabbitmq_fault.stop()
    wait_until(lambda: probes.answers() == (True, False, False))
    assert "consumer Orders-1 is connecting" in probes.ask("/readyz")[1]


def test_a_consumer_whose_handlers_hang_is_unready_once_its_channel_is_closed(
    serve, amqp_url, queue_name
):
    """As RabbitMQ does after half an hour without an ack."""

    go = Event()

    class Asks(consumer_of(queue_name, prefetch=2)):
        def on_order(self, body, message):
            go.wait()
            with suppress(ChannelError):
                message.channel.queue_declare(f"{queue_name}.none", passive=True)
            Event().wait()

    probes = serve(Asks, amqp_url)
    publish(amqp_url, queue_name, 2)
    wait_until(probes.is_full)
    go.set()
    wait_until(lambda: probes.answers() == (True, False, False))
    assert "consumer Asks-1 is connecting" in probes.ask("/readyz")[1]


def test_publishers_that_are_blocked_make_the_process_unready_by_their_link(
    serve, rabbitmq_fault, amqp_url, queue_name
):
    probes = serve(consumer_of(queue_name), amqp_url)
    with Publisher(amqp_url, routing_key=queue_name) as publisher:
        publisher.publish(0)
        rabbitmq_fault.block()
        publishing = gevent.spawn(publisher.publish, 1)
        wait_until(lambda: probes.answers() == (True, False, True))
        assert "is blocked: the broker takes no messages" in probes.ask("/readyz")[1]
        rabbitmq_fault.unblock()
        publishing.join()
        wait_until(lambda: probes.answers() == (True, True, True))
