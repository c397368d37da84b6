"""A stream's messages: whatever becomes of them, the broker is told nothing but acks."""

from __future__ import annotations

import pytest
from kombu import Connection, Consumer, Queue

from greenconsume.transports import registry
from tests.waiting import wait_until


@pytest.fixture
def reading(peer):
    """A kombu consumer of a stream, and what it got."""
    registry.register()
    got = []
    with Connection(peer.url) as connection:
        queue = Queue("s", consumer_arguments={"x-stream-offset": "first"})
        channel = connection.channel()
        with Consumer(channel, [queue], on_message=got.append, prefetch_count=9) as consumer:
            yield connection, consumer, got


def settles(peer):
    names = ("basic.ack", "basic.nack", "basic.reject")
    return [(f.name, f.args[0]) for f in peer.received if f.name in names]


@pytest.mark.parametrize("how", ["ack", "reject", "requeue", "give_back"])
def test_however_it_is_settled_it_is_acked(peer, reading, how):
    connection, consumer, got = reading
    peer.deliver(1, consumer._active_tags["s"], 1)
    connection.drain_events(timeout=30)
    getattr(got[0], how)()
    wait_until(lambda: settles(peer) == [("basic.ack", 1)])


def test_what_nobody_has_started_is_acked_when_its_consumer_ends(peer, reading):
    _connection, consumer, _got = reading
    tag = consumer._active_tags["s"]
    peer.deliver(1, tag, 1)
    peer.deliver(1, tag, 2)
    wait_until(lambda: consumer.channel.unsettled_count == 2)
    consumer.cancel()
    peer.deliver(1, tag, 3)  # it was under way
    wait_until(lambda: settles(peer)[-1:] == [("basic.ack", 3)])
    assert {name for name, _ in settles(peer)} == {"basic.ack"}


def test_another_consumers_message_is_settled_as_ever(peer, reading):
    connection, consumer, got = reading
    with Consumer(consumer.channel, [Queue("q")], on_message=got.append) as other:
        peer.deliver(1, other._active_tags["q"], 1)
        connection.drain_events(timeout=30)
        got[0].reject()
        wait_until(lambda: settles(peer) == [("basic.reject", 1)])
