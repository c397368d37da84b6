"""A stream's messages: whatever becomes of them, the broker is told nothing but acks."""

from __future__ import annotations

import amqp
import gevent
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
            peer.silent.add("basic.consume")
            yield connection, consumer, got


def suspect(peer, consumer, tag, redelivered=False):
    headers = {"x-stream-offset": tag}
    peer.deliver(1, consumer._active_tags["s"], tag, headers=headers, redelivered=redelivered)


#: What RabbitMQ says to a consumer without a prefetch that wants to begin at an offset.
TOLD = {
    "stream": "consumer prefetch count is not set for stream queue 's' in vhost '/'",
    "quorum": "invalid arg 'x-stream-offset' for queue 's' of queue type rabbit_quorum_queue",
    "classic": "invalid arg 'x-stream-offset' for queue 's' of queue type rabbit_classic_queue",
}


def asked(peer):
    """Wait until the peer is asked what the queue is."""
    return peer.wait_for("basic.consume", 2, within=30)


def refuse(peer, code, text):
    peer.send(frames.channel_close(asked(peer).channel, code, text, "basic.consume"))


def say(peer, current):
    """Answer the question what the queue is."""
    refuse(peer, 406, f"PRECONDITION_FAILED - {TOLD[current]}")


def test_nothing_is_handed_out_before_the_broker_has_said_what_the_queue_is(peer, suspecting):
    connection, consumer, got = suspecting
    for tag in (1, 2, 3):
        suspect(peer, consumer, tag)
    asked(peer)
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
    assert peer.names.count("basic.consume") == 2


def test_a_queue_that_is_no_stream_takes_its_messages_back(peer, suspecting):
    connection, consumer, got = suspecting
    suspect(peer, consumer, 1, redelivered=True)
    say(peer, "quorum")
    connection.drain_events(timeout=30)
    got[0].requeue()
    wait_until(lambda: settles(peer) == [("basic.reject", 1)], within=30)


@pytest.mark.parametrize(
    ("code", "text", "error"),
    [
        (403, "ACCESS_REFUSED - read access to queue refused", amqp.AccessRefused),
        (405, "RESOURCE_LOCKED", amqp.ResourceLocked),
        (406, "PRECONDITION_FAILED - in words of another broker", amqp.PreconditionFailed),
    ],
)
def test_where_the_broker_does_not_say_what_the_queue_is_nothing_is_settled(
    peer, suspecting, code, text, error
):
    """An ack would lose a queue's message, a requeue all links' of a stream's: both are its as it closes."""
    connection, consumer, got = suspecting
    suspect(peer, consumer, 1)
    refuse(peer, code, text)
    with pytest.raises(error):
        connection.drain_events(timeout=30)
    assert got == []
    assert settles(peer) == []


@pytest.mark.parametrize(("current", "how"), [("stream", "ack"), ("classic", "nack")])
def test_what_is_held_goes_back_as_its_queue_wants_it_where_its_consumer_has_ended(
    peer, suspecting, current, how
):
    _connection, consumer, _got = suspecting
    suspect(peer, consumer, 1)
    asked(peer)
    consumer.cancel()
    say(peer, current)
    wait_until(lambda: settles(peer) == [(f"basic.{how}", 1)], within=30)


def test_a_broker_that_says_nothing_at_all_is_no_wait_that_timed_out(peer):
    """A loop takes a `TimeoutError` for a queue that is empty, and would never get what is held."""
    registry.register()
    options = {"close_timeout": 2.0, "call_timeout": 0.5}
    with Connection(peer.url, transport_options=options) as connection:
        channel = connection.channel()
        queue = Queue("s", no_declare=True)
        with Consumer(channel, [queue], callbacks=[print], prefetch_count=9) as consumer:
            peer.wait_for("basic.consume")
            peer.silent.add("basic.consume")
            suspect(peer, consumer, 1)
            with pytest.raises(RecoverableConnectionError, match="no reply"):
                connection.drain_events(timeout=30)


@pytest.mark.parametrize("current", ["stream", "quorum"])
def test_what_comes_after_a_recover_while_the_broker_is_asked_is_handed_out(
    peer, suspecting, current
):
    connection, consumer, got = suspecting
    suspect(peer, consumer, 1)
    asked(peer)
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


# -- what comes after a cancel --------------------------------------------------------------------------


@pytest.mark.parametrize(("current", "how"), [("stream", "ack"), ("quorum", "nack")])
@pytest.mark.parametrize("asks_before", [True, False])
def test_what_comes_after_a_cancel_goes_back_as_its_queue_wants_it(
    peer, suspecting, current, how, asks_before
):
    """Sent before the broker had the cancel, it comes while nobody knows what the queue is."""
    _connection, consumer, _got = suspecting
    tag = consumer._active_tags["s"]
    if asks_before:
        suspect(peer, consumer, 1)
        asked(peer)
    peer.silent.add("basic.cancel")
    cancel = gevent.spawn(consumer.cancel)
    peer.wait_for("basic.cancel", within=30)
    peer.deliver(1, tag, 2, headers={"x-stream-offset": 2})
    peer.send(frames.method_frame(1, "basic.cancel-ok", tag))
    cancel.get()
    say(peer, current)
    # Sent together they are merged into one.
    wait_until(lambda: settles(peer)[-1:] == [(f"basic.{how}", 2)], within=30)
    assert {name for name, _ in settles(peer)} == {f"basic.{how}"}
    assert consumer.channel.deliveries.consumers.unsure(tag) is None


def test_what_comes_to_a_drain_goes_back_as_its_stream_wants_it(peer, suspecting):
    """It cancels without waiting for an answer."""
    connection, consumer, _got = suspecting
    tag = consumer._active_tags["s"]
    connection.connection.announce_stop()
    peer.wait_for("basic.cancel", within=30)
    for each in (1, 2):
        peer.deliver(1, tag, each, headers={"x-stream-offset": each})
    say(peer, "stream")
    wait_until(lambda: settles(peer)[-1:] == [("basic.ack", 2)], within=30)
    assert {name for name, _ in settles(peer)} == {"basic.ack"}


def test_what_comes_to_a_caller_who_gave_up_goes_back_as_its_stream_wants_it(peer):
    registry.register()
    options = {"call_timeout": 0.1, "close_timeout": 2.0}
    with Connection(peer.url, transport_options=options) as connection:
        channel = connection.channel()
        channel.basic_qos(0, 9, False)
        peer.silent.add("basic.consume")
        with pytest.raises(TimeoutError):
            channel.basic_consume("s", "late", callback=print)
        connection.connection.link.call_timeout = 60.0
        peer.send(frames.method_frame(1, "basic.consume-ok", "late"))
        peer.deliver(1, "late", 1, headers={"x-stream-offset": 1})
        say(peer, "stream")
        wait_until(lambda: settles(peer) == [("basic.ack", 1)], within=30)


def test_a_cancel_that_was_answered_leaves_nothing_behind(peer):
    """A channel may consume and cancel for years, each time by another tag."""
    registry.register()
    with Connection(peer.url, transport_options={"close_timeout": 2.0}) as connection:
        channel = connection.channel()
        channel.basic_qos(0, 9, False)
        for number in range(3):
            channel.basic_consume("s", str(number), callback=print)
            channel.basic_cancel(str(number))
            assert channel.deliveries.consumers.unsure(str(number)) is None
