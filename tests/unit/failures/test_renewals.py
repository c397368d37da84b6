"""Tests who renews a message of a queue that counts, and who handles it, against a scripted peer."""

from __future__ import annotations

from typing import Any

import gevent
import pytest
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Requeue, spawn
from greenconsume.failures import message_copy
from tests import frames
from tests.waiting import wait_until

QUORUM = {"x-queue-type": "quorum"}


class Worker(ConsumerMixin):
    """Acks and keeps what it gets, or fails on it."""

    options = ConsumerOptions(on_error=Requeue(delay=0.0))

    def __init__(self, url: str, error: Exception | None = None, **consumer: Any) -> None:
        self.connection = Connection(url, transport_options={"close_timeout": 0.5})
        self.consumer = consumer
        self.error = error
        self.got: list[tuple[Any, dict[str, Any]]] = []

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        queue = Queue("q", queue_arguments=QUORUM)
        return [Consumer([queue], callbacks=[self.on_task], **self.consumer)]

    def on_task(self, body: Any, message: Any) -> None:
        self.got.append((body, dict(message.headers)))
        if self.error is not None:
            raise self.error
        if not self.consumer.get("no_ack"):
            message.ack()


@pytest.fixture
def broker(make_peer):
    """Make a peer that says which RabbitMQ it is, and confirms what is published."""

    def make(release="4.3.0", answer=frames.basic_ack):
        peer = make_peer(rabbitmq=release)
        peer.answers["body"] = lambda frame: answer(frame.channel, 1)
        return peer

    return make


@pytest.fixture
def consuming():
    """Start workers; they are stopped in the end."""
    greenlets = []

    def start(peer, *args, **options):
        worker = Worker(peer.url, *args, **options)
        greenlets.append(spawn(worker))
        assert greenlets[-1].ready.wait(30)
        return worker

    yield start
    for greenlet in greenlets:
        greenlet.stop()
    gevent.joinall(greenlets, timeout=30)


def deliver(peer, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    tag = peer.wait_for("basic.consume").args[2]
    peer.deliver(1, tag, 1, b"7", redelivered=True, headers=named)


def test_a_message_whose_ways_back_are_used_up_is_written_to_its_queue_again(broker, consuming):
    peer = broker()
    worker = consuming(peer)
    deliver(peer, x_delivery_count=19, x_acquired_count=25, tenant="acme")
    assert peer.wait_for("basic.ack", within=30).args == [1, False]
    (copy,) = peer.published
    assert (copy.exchange, copy.routing_key, copy.body) == ("", "q", b"7")
    assert copy.properties["headers"] == {
        "tenant": "acme",
        message_copy.EXCHANGE: "",
        message_copy.ROUTING_KEY: "",
        message_copy.QUEUE: "q",
        message_copy.RENEWALS: 1,
    }
    assert worker.got == []
    assert peer.names.index("basic.publish") < peer.names.index("basic.ack")


@pytest.mark.parametrize(
    ("release", "headers"),
    [
        ("4.3.0", {"x_acquired_count": 500}),  # it was given back, and a nack costs nothing there
        ("4.3.0", {"x_acquired_count": 500, "x_delivery_count": 3}),
        ("4.0.5", {"x_delivery_count": 14}),
        ("3.13.7", {"x_delivery_count": 500}),  # its queues have no limit unless they say one
        ("4.0.5", {"x_delivery_count": "19"}),  # somebody else's header
    ],
)
def test_a_message_that_may_still_come_back_is_handled(broker, consuming, release, headers):
    peer = broker(release)
    worker = consuming(peer)
    deliver(peer, **headers)
    wait_until(lambda: len(worker.got) == 1, 30)
    assert peer.published == []


def test_a_message_that_cannot_be_renewed_is_handled(broker, consuming):
    peer = broker(answer=frames.basic_nack)
    worker = consuming(peer)
    deliver(peer, x_delivery_count=19)
    wait_until(lambda: len(worker.got) == 1, 30)
    assert peer.wait_for("basic.ack", within=30).args == [1, False]


def test_what_needs_no_ack_is_nobodys_to_renew(broker, consuming):
    peer = broker()
    worker = consuming(peer, no_ack=True)
    deliver(peer, x_delivery_count=19)
    wait_until(lambda: len(worker.got) == 1, 30)
    assert peer.published == []


def test_what_failed_often_enough_is_parked_and_what_was_only_acquired_often_is_not(
    broker, consuming
):
    peer = broker()
    consuming(peer, LookupError("no such hat"))
    deliver(peer, x_acquired_count=500, x_delivery_count=3)
    assert peer.wait_for("basic.reject", within=30).args == [1, True]
    assert peer.published == []
    other = broker()
    consuming(other, LookupError("no such hat"))
    deliver(other, x_delivery_count=14)
    assert other.wait_for("basic.ack", within=30).args == [1, False]
    (copy,) = other.published
    assert copy.routing_key == "q.dead"
    assert copy.properties["headers"][message_copy.ERROR] == "no such hat"
