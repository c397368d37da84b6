"""A stream's messages: whatever becomes of them, the broker is told nothing but acks."""

from __future__ import annotations

import amqp
import pytest
from amqp.exceptions import RecoverableConnectionError
from kombu import Connection, Consumer, Queue

from greenconsume.transports import registry
from tests import frames
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


# -- streams that were declared elsewhere -------------------------------------------------------------


@pytest.fixture
def suspecting(peer):
    """A kombu consumer of a queue of which nothing is known, and what it got; the peer owes it an answer."""
    registry.register()
    got = []
    with Connection(peer.url, transport_options={"close_timeout": 2.0}) as connection:
        channel = connection.channel()
        with Consumer(
            channel, [Queue("s", no_declare=True)], on_message=got.append, prefetch_count=9
        ) as consumer:
            peer.wait_for("basic.consume")
            peer.silent.add("queue.declare")
            yield connection, consumer, got


def suspect(peer, consumer, tag, redelivered=False):
    headers = {"x-stream-offset": tag}
    peer.deliver(1, consumer._active_tags["s"], tag, headers=headers, redelivered=redelivered)


def say(peer, current):
    """Answer the question what the queue is."""
    asked = peer.wait_for("queue.declare", 1)
    text = f"PRECONDITION_FAILED - inequivalent arg 'x-queue-type': current is '{current}'"
    peer.send(frames.channel_close(asked.channel, 406, text, "queue.declare"))


def test_nothing_is_handed_out_before_the_broker_has_said_what_the_queue_is(peer, suspecting):
    connection, consumer, got = suspecting
    for tag in (1, 2, 3):
        suspect(peer, consumer, tag)
    peer.wait_for("queue.declare")
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    say(peer, "stream")
    for _ in range(3):
        connection.drain_events(timeout=30)
    suspect(peer, consumer, 4)
    connection.drain_events(timeout=30)
    for message in got:
        message.reject()
    wait_until(lambda: [tag for _, tag in settles(peer)][-1:] == [4], within=30)
    assert {name for name, _ in settles(peer)} == {"basic.ack"}
    assert peer.names.count("queue.declare") == 1


def test_a_queue_that_is_no_stream_takes_its_messages_back(peer, suspecting):
    connection, consumer, got = suspecting
    suspect(peer, consumer, 1, redelivered=True)
    say(peer, "quorum")
    connection.drain_events(timeout=30)
    got[0].requeue()
    wait_until(lambda: settles(peer) == [("basic.reject", 1)], within=30)


def test_who_may_not_ask_takes_the_messages_word(peer, suspecting):
    connection, consumer, got = suspecting
    suspect(peer, consumer, 1)
    asked = peer.wait_for("queue.declare")
    peer.send(frames.channel_close(asked.channel, 403, "ACCESS_REFUSED", "queue.declare"))
    connection.drain_events(timeout=30)
    got[0].reject()
    wait_until(lambda: settles(peer) == [("basic.ack", 1)], within=30)


@pytest.mark.parametrize(("current", "how"), [("stream", "ack"), ("classic", "nack")])
def test_what_is_held_goes_back_as_its_queue_wants_it_where_its_consumer_has_ended(
    peer, suspecting, current, how
):
    _connection, consumer, _got = suspecting
    suspect(peer, consumer, 1)
    peer.wait_for("queue.declare")
    consumer.cancel()
    say(peer, current)
    wait_until(lambda: settles(peer) == [(f"basic.{how}", 1)], within=30)


def test_a_broker_that_does_not_answer_is_told_where_it_is_drained(peer, suspecting):
    """What was held is the broker's again as the channel closes; no ack may go in the place of a requeue."""
    connection, consumer, _got = suspecting
    suspect(peer, consumer, 1)
    asked = peer.wait_for("queue.declare")
    peer.send(frames.channel_close(asked.channel, 405, "RESOURCE_LOCKED", "queue.declare"))
    with pytest.raises(amqp.ResourceLocked):
        connection.drain_events(timeout=30)
    assert settles(peer) == []


def test_a_broker_that_says_nothing_at_all_is_no_wait_that_timed_out(peer):
    """A loop takes a `TimeoutError` for a queue that is empty, and would never get what is held."""
    registry.register()
    options = {"close_timeout": 2.0, "call_timeout": 0.5}
    with Connection(peer.url, transport_options=options) as connection:
        channel = connection.channel()
        queue = Queue("s", no_declare=True)
        with Consumer(channel, [queue], callbacks=[print], prefetch_count=9) as consumer:
            peer.wait_for("basic.consume")
            peer.silent.add("queue.declare")
            suspect(peer, consumer, 1)
            with pytest.raises(RecoverableConnectionError, match="no reply"):
                connection.drain_events(timeout=30)


@pytest.mark.parametrize("current", ["stream", "quorum"])
def test_what_comes_after_a_recover_while_the_broker_is_asked_is_handed_out(
    peer, suspecting, current
):
    connection, consumer, got = suspecting
    suspect(peer, consumer, 1)
    peer.wait_for("queue.declare")
    peer.silent.add("basic.recover")
    consumer.recover(requeue=True)
    peer.wait_for("basic.recover")
    peer.send(frames.method_frame(1, "basic.recover-ok"))
    suspect(peer, consumer, 2, redelivered=True)
    wait_until(lambda: consumer.channel.unsettled_count == 1)
    say(peer, current)
    connection.drain_events(timeout=30)
    assert [message.delivery_tag for message in got] == [2]
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    got[0].reject()
    how = "ack" if current == "stream" else "reject"
    wait_until(lambda: settles(peer) == [(f"basic.{how}", 2)])
