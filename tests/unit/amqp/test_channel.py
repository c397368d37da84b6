"""A channel against a scripted peer: calls and replies, errors, consumers, settling once."""

from __future__ import annotations

import socket
import struct
from collections import Counter
from time import monotonic

import amqp
import gevent
import pytest
from amqp.exceptions import (
    ChannelError,
    ConsumerCancelled,
    FrameSyntaxError,
    NotFound,
    PreconditionFailed,
    RecoverableConnectionError,
    ResourceError,
)
from gevent.event import Event
from kombu import Consumer, Exchange, Queue
from kombu.exceptions import MessageStateError

from greenconsume.amqp.link import LinkLostError
from greenconsume.events import LinkDown, StaleSettle
from tests import frames
from tests.unit.fakes import of_type, recording, run
from tests.waiting import AT_ONCE, NEVER, wait_until

TAG = "t"


def kombu_consumer(connection, got, no_ack=False, **options):
    """Consume by kombu; `got` collects its messages."""
    consumer = Consumer(
        connection.channel(),
        [Queue("q", Exchange("e"), "k")],
        on_message=got.append,
        auto_declare=False,
        no_ack=no_ack,
        **options,
    )
    consumer.consume()
    return consumer


def tag_of(consumer):
    (tag,) = consumer._active_tags.values()
    return tag


def settles(peer):
    """Return how often each message was acked, requeued and rejected, as a broker understands it."""
    counts, open_tags = Counter(), {}
    for frame in peer.received:
        tags = open_tags.setdefault(frame.channel, set())
        if frame.name not in ("basic.ack", "basic.nack", "basic.reject"):
            continue
        tag, how = frame.args[0], frame.name
        if how != "basic.ack":
            how = "requeue" if frame.args[-1] else "reject"
        multiple = frame.name != "basic.reject" and frame.args[1]
        for each in range(1, tag + 1) if multiple else [tag]:
            if each not in tags:
                counts[frame.channel, each, how] += 1
                tags.add(each)
            elif not multiple:
                counts[frame.channel, each, "again"] += 1
    return counts


# -- calls --------------------------------------------------------------------------------------------


def test_many_greenlets_call_on_one_channel_and_each_gets_its_own_reply(connect, peer):
    """HAZARDS.md row 6."""
    peer.answers["queue.declare"] = lambda frame: frames.method_frame(
        frame.channel, "queue.declare-ok", frame.args[1], int(frame.args[1]), 0
    )
    channel = connect(peer).channel()
    calls = [run(channel.queue_declare, str(n)) for n in range(50)]
    for n, call in enumerate(calls):
        assert call.get(timeout=30) == (str(n), n, 0)


def test_replies_of_several_kinds_find_their_callers(connect, make_peer):
    peer = make_peer(silent={"queue.declare", "basic.qos", "queue.bind"})
    channel = connect(peer).channel()
    declare = run(channel.queue_declare, "q")
    qos = run(channel.basic_qos, 0, 1, False)
    bind = run(channel.queue_bind, "q", "e", "k")
    again = run(channel.queue_declare, "r")
    peer.wait_for("queue.declare", 2)
    peer.send(frames.method_frame(1, "queue.declare-ok", "q", 0, 0))
    assert declare.get(timeout=30).queue == "q"
    assert not qos.ready()
    assert not again.ready()
    peer.send(
        frames.method_frame(1, "basic.qos-ok")
        + frames.method_frame(1, "queue.bind-ok")
        + frames.method_frame(1, "queue.declare-ok", "r", 0, 0)
    )
    assert qos.get(timeout=30) is None
    assert bind.get(timeout=30) is None
    assert again.get(timeout=30).queue == "r"


def test_a_reply_that_comes_after_its_caller_gave_up_meets_nobody(connect, make_peer):
    peer = make_peer(silent={"queue.declare"})
    channel = connect(peer, call_timeout=0.02).channel()
    with pytest.raises(TimeoutError, match="no reply from amqp://"):
        channel.queue_declare("late")
    channel.connection.link.call_timeout = 60
    next_call = run(channel.queue_declare, "next")
    peer.wait_for("queue.declare", 2)
    peer.send(frames.method_frame(1, "queue.declare-ok", "late", 1, 1))
    gevent.idle()
    peer.send(frames.method_frame(1, "queue.declare-ok", "next", 2, 2))
    assert next_call.get(timeout=30).queue == "next"


def test_a_message_whose_get_was_given_up_goes_back_to_its_queue(connect, make_peer):
    peer = make_peer(silent={"basic.get"})
    channel = connect(peer).channel()
    with gevent.Timeout(0.01, False):
        channel.basic_get("q")
    peer.wait_for("basic.get")
    peer.send(
        frames.method_frame(1, "basic.get-ok", 9, False, "", "q", 0) + frames.content(1, b"x")
    )
    assert peer.wait_for("basic.nack").args == [9, False, True]


def test_a_consumer_whose_start_was_given_up_is_cancelled(connect, make_peer):
    peer = make_peer(silent={"basic.consume"})
    connection, got = connect(peer), []
    channel = connection.channel()
    with gevent.Timeout(0.01, False):
        channel.basic_consume("q", consumer_tag=TAG, callback=got.append)
    peer.wait_for("basic.consume")
    peer.send(frames.method_frame(1, "basic.consume-ok", TAG) + frames.deliver(1, TAG, 1))
    assert peer.wait_for("basic.cancel").args[0] == TAG
    assert peer.wait_for("basic.nack").args == [1, False, True]
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0.005)
    assert got == []


def test_a_get_returns_the_message_or_none(connect, peer):
    channel = connect(peer).channel()
    assert channel.basic_get("q") is None
    peer.answers["basic.get"] = frames.method_frame(
        1, "basic.get-ok", 4, True, "e", "k", 12
    ) + frames.content(1, b"hello", content_encoding="utf-8", headers={"h": 1})
    message = channel.message_to_python(channel.basic_get("q"))
    assert (message.body, message.headers, message.delivery_tag) == ("hello", {"h": 1}, 4)
    assert message.delivery_info["message_count"] == 12
    message.ack()
    assert peer.wait_for("basic.ack").args == [4, False]


def test_calls_without_an_answer_do_not_wait(connect, peer):
    channel = connect(peer).channel()
    channel.queue_declare("q", nowait=True)
    channel.queue_bind("q", "e", nowait=True)
    assert channel.basic_consume("q", consumer_tag=TAG, nowait=True) == TAG
    assert "queue.declare" not in peer.names  # nothing switched yet
    assert channel.queue_declare("r").queue == "r"
    assert peer.names[-4:] == ["queue.declare", "queue.bind", "basic.consume", "queue.declare"]


def test_consuming_without_an_answer_needs_a_tag(connect, peer):
    channel = connect(peer).channel()
    with pytest.raises(ValueError, match="tag must be specified"):
        channel.basic_consume("q", nowait=True)
    assert "basic.consume" not in peer.names


def test_transactions_and_the_rest_of_the_protocol_pass(connect, peer):
    channel = connect(peer).channel()
    channel.tx_select()
    channel.tx_commit()
    channel.tx_rollback()
    channel.exchange_declare("e", "direct")
    channel.exchange_bind("f", "e")
    channel.exchange_unbind("f", "e")
    channel.exchange_delete("e")
    channel.queue_unbind("q", "e")
    assert channel.queue_purge("q") == 0
    assert channel.queue_delete("q") == 0
    channel.flow(True)
    channel.basic_recover(requeue=True)
    assert channel.queue_declare("still").queue == "still"


# -- the channel's errors -----------------------------------------------------------------------------

MISSING = frames.channel_close(1, 404, "NOT_FOUND - no queue 'gone'", "queue.declare")


def test_a_channel_error_is_raised_at_its_caller_and_the_channel_opens_again(connect, peer):
    channel = connect(peer).channel()
    peer.answers["queue.declare"] = MISSING
    with pytest.raises(NotFound, match="no queue 'gone'"):
        channel.queue_declare("gone", passive=True)
    del peer.answers["queue.declare"]
    assert channel.queue_declare("there").queue == "there"
    assert peer.names[-4:] == ["queue.declare", "channel.close-ok", "channel.open", "queue.declare"]


def test_a_channel_error_is_raised_at_every_caller_that_waits(connect, make_peer):
    peer = make_peer(silent={"queue.declare"})
    channel = connect(peer).channel()
    calls = [run(channel.queue_declare, "q") for _ in range(3)]
    peer.wait_for("queue.declare", 3)
    peer.send(MISSING)
    errors = [call.get(timeout=30) for call in calls]
    assert [type(error) for error in errors] == [NotFound] * 3
    assert len({id(error) for error in errors}) == 3


def test_a_channel_error_that_nobody_waits_for_is_raised_at_the_next_use(connect, peer):
    channel = connect(peer).channel()
    peer.send(frames.channel_close(1, 406, "PRECONDITION_FAILED - unknown delivery tag 7"))
    peer.wait_for("channel.close-ok")
    with pytest.raises(PreconditionFailed, match="unknown delivery tag 7"):
        channel.queue_declare("q")
    assert channel.queue_declare("q").queue == "q"


def test_a_consuming_channels_error_is_raised_where_it_is_drained(connect, peer):
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    peer.send(
        frames.deliver(1, tag_of(consumer), 1)
        + frames.channel_close(1, 406, "PRECONDITION_FAILED - delivery acknowledgement timed out")
    )
    with pytest.raises(PreconditionFailed, match="acknowledgement timed out"):
        connection.drain_events(timeout=30)
    assert got == []  # the broker has requeued it
    consumer.channel.queue_declare("q")
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0.005)


def test_what_the_broker_still_sends_on_a_channel_that_it_closed_is_dropped(connect, peer):
    """An answer to it would end the link, and in the channel's next life mean another message."""
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    tag, channel = tag_of(consumer), consumer.channel
    late = frames.deliver(1, tag, 2) + frames.deliver(1, tag, 3) + frames.basic_cancel(1, tag)
    peer.send(frames.deliver(1, tag, 1) + MISSING + late)
    with pytest.raises(NotFound):
        connection.drain_events(timeout=30)
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0.02)
    assert peer.names[-1] == "channel.close-ok"
    peer.answers["channel.open"] = late + frames.method_frame(1, "channel.open-ok", b"")
    assert channel.queue_declare("there").queue == "there"
    channel.queue_declare("there")
    assert (got, peer.names.count("channel.close-ok")) == ([], 1)
    assert settles(peer) == {}


def test_a_consuming_channels_error_reaches_both_its_caller_and_its_drainer(connect, make_peer):
    peer = make_peer(silent={"queue.declare"})
    connection = connect(peer)
    consumer = kombu_consumer(connection, [])
    call, drain = run(consumer.channel.queue_declare, "gone"), run(connection.drain_events)
    peer.wait_for("queue.declare")
    peer.send(MISSING)
    assert isinstance(call.get(timeout=30), NotFound)
    assert isinstance(drain.get(timeout=30), NotFound)


def test_the_brokers_cancel_is_raised_where_it_is_drained(connect, peer):
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    peer.send(frames.deliver(1, tag_of(consumer), 1) + frames.basic_cancel(1, tag_of(consumer)))
    connection.drain_events(timeout=30)
    with pytest.raises(ConsumerCancelled, match="its queue was deleted"):
        connection.drain_events(timeout=30)
    assert len(got) == 1


def test_the_brokers_cancel_calls_on_cancel_where_it_is_drained(connect, peer):
    connection, cancelled = connect(peer), []

    def on_cancel(tag):
        cancelled.append((tag, gevent.getcurrent()))

    channel = connection.channel()
    channel.basic_consume("q", consumer_tag=TAG, callback=print, on_cancel=on_cancel)
    peer.send(frames.basic_cancel(1, TAG))
    connection.drain_events(timeout=30)
    assert cancelled == [(TAG, gevent.getcurrent())]


def test_a_link_that_is_lost_is_told_before_a_channel_opens_again(connect, peer):
    channel = connect(peer).channel()
    peer.send(MISSING)
    peer.wait_for("channel.close-ok")
    peer.hang_up()
    wait_until(lambda: not channel.connection.connected)
    with pytest.raises(NotFound):
        channel.queue_declare("q")
    with pytest.raises(LinkLostError):
        channel.queue_declare("q")


# -- consuming ----------------------------------------------------------------------------------------


def test_a_delivery_in_the_same_read_as_its_consume_ok_reaches_its_callback(connect, peer):
    ok = frames.method_frame(1, "basic.consume-ok", TAG)
    peer.answers["basic.consume"] = ok + frames.deliver(1, TAG, 1) + frames.deliver(1, TAG, 2)
    connection, got = connect(peer), []
    connection.channel().basic_consume("q", consumer_tag=TAG, callback=got.append)
    connection.drain_events(timeout=30)
    connection.drain_events(timeout=30)
    assert [message.delivery_tag for message in got] == [1, 2]
    assert {"basic.reject", "basic.nack"}.isdisjoint(peer.names)


def test_a_delivery_to_a_tag_that_the_broker_chose_reaches_its_callback(connect, peer):
    ok = frames.method_frame(1, "basic.consume-ok", "amq.ctag-x")
    peer.answers["basic.consume"] = ok + frames.deliver(1, "amq.ctag-x", 1)
    connection, got = connect(peer), []
    assert connection.channel().basic_consume("q", callback=got.append) == "amq.ctag-x"
    connection.drain_events(timeout=30)
    assert len(got) == 1


def test_deliveries_to_a_cancelled_consumer_are_given_back(connect, make_peer):
    """HAZARDS.md row 17."""
    peer = make_peer(silent={"basic.cancel"})
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    tag = tag_of(consumer)
    peer.deliver(1, tag, 1)
    wait_until(lambda: connection.connection.backlog)
    cancel = run(consumer.cancel)
    peer.wait_for("basic.cancel")
    peer.send(frames.deliver(1, tag, 2) + frames.method_frame(1, "basic.cancel-ok", tag))
    assert cancel.get(timeout=30) is None
    wait_until(lambda: len(settles(peer)) == 2)
    assert settles(peer) == {(1, 1, "requeue"): 1, (1, 2, "requeue"): 1}
    assert peer.names.index("basic.cancel") < peer.names.index("basic.nack")
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0.005)
    assert got == []


def test_deliveries_without_acks_to_a_cancelled_consumer_are_not_rejected(connect, make_peer):
    """The broker would close the channel for it."""
    peer = make_peer(silent={"basic.cancel"})
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got, no_ack=True)
    tag = tag_of(consumer)
    peer.deliver(1, tag, 1)
    wait_until(lambda: connection.connection.backlog)
    cancel = run(consumer.cancel)
    peer.wait_for("basic.cancel")
    peer.send(frames.deliver(1, tag, 2) + frames.method_frame(1, "basic.cancel-ok", tag))
    assert cancel.get(timeout=30) is None
    connection.drain_events(timeout=30)
    got[0].ack()  # nothing to do, as kombu has it
    consumer.channel.queue_declare("after")
    assert [message.delivery_tag for message in got] == [1]
    assert settles(peer) == {}


def test_cancelling_one_consumer_leaves_its_neighbour_on_the_channel(connect, peer):
    connection, got = connect(peer), []
    channel = connection.channel()
    for tag in ("a", "b"):
        channel.basic_consume("q", consumer_tag=tag, callback=got.append)
    peer.send(b"".join(frames.deliver(1, tag, n) for n, tag in enumerate("abab", 1)))
    wait_until(lambda: connection.connection.backlog == 4)
    channel.basic_cancel("a")
    connection.drain_events(timeout=30)
    connection.drain_events(timeout=30)
    assert [message.delivery_tag for message in got] == [2, 4]
    wait_until(lambda: settles(peer) == {(1, 1, "requeue"): 1, (1, 3, "requeue"): 1})


def test_cancelling_over_a_lost_link_does_nothing(connect, peer):
    """Nameko's proxy, for one, expects no error of it but `OSError`, and begins anew."""
    connection = connect(peer)
    channel, session = connection.channel(), connection.connection
    channel.basic_consume("q", consumer_tag=TAG, callback=print)
    peer.hang_up()
    wait_until(lambda: not session.connected)
    assert channel.basic_cancel(TAG) is None
    with pytest.raises(OSError, match="is gone") as caught:
        connection.drain_events(timeout=1)
    assert isinstance(caught.value, amqp.RecoverableConnectionError)


def test_cancelling_on_a_closed_channel_does_nothing(connect, peer):
    channel = connect(peer).channel()
    channel.close()
    assert channel.basic_cancel(TAG) is None
    assert "basic.cancel" not in peer.names


def test_a_poisoned_encoding_harms_nobody(connect, peer):
    """A codec's name comes from the publisher; what looking it up raises must not end the link."""
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    tag = tag_of(consumer)
    with recording() as events:
        for n, encoding in enumerate(
            ["a\0b", "\ud800", "../..", "rot13", "undefined", "ï" * 100], 1
        ):
            peer.deliver(1, tag, n, b"\xff", content_encoding=encoding)
            connection.drain_events(timeout=30)
            assert got[-1].body == b"\xff"
    assert of_type(events, LinkDown) == []


@pytest.mark.parametrize("body", [b"x", b"x" * 5000])
def test_a_routing_key_that_is_no_utf_8_harms_nobody(connect, make_peer, body):
    """RabbitMQ takes any bytes."""
    peer = make_peer(frame_max=4096)
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    data = frames.deliver(1, tag_of(consumer), 1, body, routing_key="R?K", frame_max=4096)
    peer.send(data.replace(b"R?K", b"R\xffK"))
    connection.drain_events(timeout=30)
    assert got[0].delivery_info["routing_key"].encode("utf-8", "surrogateescape") == b"R\xffK"
    assert got[0].body == body.decode()


@pytest.mark.parametrize(
    "properties",
    [
        b"\x20\x00\x00\x00\x00\x0b\x01tT\x00\x00\x01\x8f\x00\x00\x00",  # a date that is cut short
        b"\x20\x00\x00\x00\x00\x03\x01t?",  # a type that AMQP does not know
        b"",
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_properties_that_cannot_be_decoded_are_a_decode_error_of_their_message(
    connect, peer, properties, parts
):
    """Not the link's: it would be lost again with each redelivery."""
    connection, got, undecodable = connect(peer), [], []
    consumer = kombu_consumer(connection, got)
    consumer.on_decode_error = lambda message, exc: undecodable.append(message)
    method = frames.method_frame(1, "basic.deliver", tag_of(consumer), 1, False, "e", "k")
    header = frames.raw_frame(2, 1, frames.header_frame(1, 2)[7:19] + properties)
    body = frames.raw_frame(3, 1, b"xy")
    if parts == 2:
        body = frames.raw_frame(3, 1, b"x") + frames.raw_frame(3, 1, b"y")
    peer.send(method + header + body)
    connection.drain_events(timeout=30)
    (message,) = undecodable
    assert (message.body, message.delivery_info["routing_key"]) == (b"xy", "k")
    assert (message.headers, message.properties) == ({}, {})
    message.reject()
    assert peer.wait_for("basic.reject").args == [1, False]
    assert got == []


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_a_message_is_the_same_however_it_came(connect, make_peer, size):
    peer = make_peer(frame_max=4096)
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    properties = {"headers": {"n": [1, None]}, "priority": 4, "reply_to": "r"}
    data = frames.deliver(
        1, tag_of(consumer), 1, b"x" * size, frame_max=4096, exchange="e", **properties
    )
    peer.send(data[:-1])
    wait_until(lambda: connection.connection.link.bytes_recv or size == 0)
    peer.send(data[-1:] + data)
    connection.drain_events(timeout=30)
    connection.drain_events(timeout=30)
    for message in got:
        assert (message.body, message.content_type) == ("x" * size, "application/json")
        assert message.headers == {"n": [1, None]}
        assert (message.properties["priority"], message.properties["reply_to"]) == (4, "r")
        assert message.delivery_info["exchange"] == "e"


def test_properties_that_are_no_utf_8_arrive(connect, peer):
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    data = frames.deliver(1, tag_of(consumer), 1, correlation_id="c?c", headers={"h": "v"})
    peer.send(data.replace(b"c?c", b"c\xffc"))
    connection.drain_events(timeout=30)
    assert got[0].properties["correlation_id"].encode("utf-8", "surrogateescape") == b"c\xffc"
    assert (got[0].headers, got[0].body) == ({"h": "v"}, "{}")


# -- settling -----------------------------------------------------------------------------------------


def delivered(connect, peer, count=1):
    """A kombu consumer's connection and messages."""
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    for n in range(1, count + 1):
        peer.deliver(1, tag_of(consumer), n)
    for _ in range(count):
        connection.drain_events(timeout=30)
    return connection, got


def test_each_way_to_settle_reaches_the_broker(connect, peer):
    connection, (first, second, third, fourth) = delivered(connect, peer, 4)
    first.ack()
    second.reject()
    third.reject(requeue=True)
    fourth.requeue()
    wait_until(lambda: len(settles(peer)) == 4)
    assert settles(peer) == {
        (1, 1, "basic.ack"): 1,
        (1, 2, "reject"): 1,
        (1, 3, "requeue"): 1,
        (1, 4, "requeue"): 1,
    }
    assert connection.connected


def test_acks_in_any_order_ack_what_was_acked_and_nothing_else(connect, peer):
    _, messages = delivered(connect, peer, 6)
    for tag in (3, 1, 6, 2):
        messages[tag - 1].ack()
    wait_until(lambda: len(settles(peer)) == 4)
    messages[4].ack()
    wait_until(lambda: len(settles(peer)) == 5)
    assert settles(peer) == {(1, tag, "basic.ack"): 1 for tag in (1, 2, 3, 5, 6)}


def test_an_ack_of_several_settles_all_up_to_it(connect, peer):
    _, messages = delivered(connect, peer, 4)
    messages[2].ack(multiple=True)
    messages[3].ack()
    wait_until(lambda: len(settles(peer)) == 4)
    assert settles(peer) == {(1, tag, "basic.ack"): 1 for tag in (1, 2, 3, 4)}


@pytest.mark.parametrize("again", ["ack", "reject", "requeue"])
def test_settling_twice_is_an_error_and_not_sent(connect, peer, again):
    connection, (message,) = delivered(connect, peer)
    message.ack()
    with pytest.raises(MessageStateError, match="already acknowledged with state: ACK"):
        getattr(message, again)()
    connection.channel()
    assert settles(peer) == {(1, 1, "basic.ack"): 1}


def test_settling_never_switches(connect, peer):
    _, messages = delivered(connect, peer, 3)
    switched = []
    witness = gevent.spawn(switched.append, True)
    messages[0].ack()
    messages[1].reject()
    messages[2].requeue()
    assert switched == []
    witness.join()


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue"])
def test_a_settle_after_the_link_was_lost_is_counted_and_does_nothing(connect, peer, settle):
    """HAZARDS.md row 13."""
    connection, (message,) = delivered(connect, peer)
    channel, session = message.channel, connection.connection
    peer.hang_up()
    wait_until(lambda: not session.connected)
    with recording() as events:
        getattr(message, settle)()
    assert events == [StaleSettle(1, 1)]
    assert channel.stale_count == 1
    assert message.acknowledged
    with pytest.raises(MessageStateError):
        message.ack()


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue"])
def test_a_settle_after_the_channel_opened_again_is_counted_and_not_sent(connect, peer, settle):
    """HAZARDS.md row 13: its tag would be another message's."""
    connection, (message,) = delivered(connect, peer)
    channel = message.channel
    peer.send(MISSING)
    with pytest.raises(NotFound):
        connection.drain_events(timeout=30)
    with recording() as events:
        getattr(message, settle)()
    channel.queue_declare("there")
    assert of_type(events, StaleSettle) == [StaleSettle(1, 1)]
    assert settles(peer) == {}


def test_a_settle_after_the_channel_was_closed_is_counted_and_not_sent(connect, peer):
    connection, (first, second) = delivered(connect, peer, 2)
    first.channel.close()
    with recording() as events:
        first.ack()
        second.requeue()
    connection.channel()
    assert events == [StaleSettle(1, 1), StaleSettle(2, 2)]
    assert settles(peer) == {}


def test_a_settle_just_before_the_channel_closes_is_sent_before_it(connect, peer):
    connection, (message,) = delivered(connect, peer)
    message.ack()
    message.channel.close()
    assert peer.names.index("basic.ack") < peer.names.index("channel.close")
    connection.close()


def test_an_unroutable_message_does_not_come_between_a_handler_and_its_ack(connect, peer):
    """What was returned to a consuming channel is told where it is drained, not at the next ack."""
    connection, (message,) = delivered(connect, peer)
    message.channel.basic_publish(amqp.Message(b"x"), routing_key="nowhere", mandatory=True)
    peer.wait_for("body")
    peer.send(frames.basic_return(1, b"x", routing_key="nowhere") + frames.heartbeat())
    with pytest.raises(ChannelError, match="NO_ROUTE"):
        connection.drain_events(timeout=30)
    message.ack()
    assert peer.wait_for("basic.ack").args == [1, False]


def test_a_message_without_acks_is_settled_by_nobody(connect, peer):
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got, no_ack=True)
    peer.deliver(1, tag_of(consumer), 1)
    connection.drain_events(timeout=30)
    got[0].ack()
    connection.channel()
    assert settles(peer) == {}


def test_a_message_without_acks_that_outlived_its_channel_is_settled_by_nobody(connect, peer):
    """It was in hand when the channel was closed, and is handled in the channel's next life."""
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got, no_ack=True)
    peer.send(frames.deliver(1, tag_of(consumer), 1) + MISSING)
    peer.wait_for("channel.close-ok")
    connection.drain_events(timeout=30)
    consumer.channel.queue_declare("opens again")
    got[0].ack()
    connection.channel()
    assert settles(peer) == {}


# -- closing ------------------------------------------------------------------------------------------


def test_close_is_bounded_where_it_is_never_answered_and_the_id_stays_taken(connect, make_peer):
    peer = make_peer(silent={"channel.close"}, channel_max=2)
    connection = connect(peer, close_timeout=0.03)
    channel = connection.channel()
    begun = monotonic()
    channel.close()
    assert 0.02 < monotonic() - begun < AT_ONCE
    assert connection.channel().channel_id == 2
    with pytest.raises(ResourceError, match="all 2 channels"):
        connection.channel()
    peer.send(frames.method_frame(1, "channel.close-ok"))
    wait_until(lambda: 1 not in connection.connection.link.channels)
    assert connection.channel().channel_id == 1


def test_an_id_is_used_again_once_its_close_was_answered(connect, peer):
    connection = connect(peer)
    for _ in range(3):
        channel = connection.channel()
        assert channel.channel_id == 1
        channel.close()
    assert peer.names[-2:] == ["channel.open", "channel.close"]


def test_the_id_of_a_channel_that_the_broker_closed_is_free_once_it_is_closed(connect, peer):
    connection = connect(peer)
    channel = connection.channel()
    peer.send(MISSING)
    peer.wait_for("channel.close-ok")
    assert connection.channel().channel_id == 2
    channel.close()
    assert connection.channel().channel_id == 1
    assert "channel.close" not in peer.names


def test_a_channel_that_takes_a_freed_id_at_once_is_not_forgotten_with_its_predecessor(
    connect, make_peer
):
    """Its opener may run before the one that closed the id's last user does."""
    peer = make_peer(silent={"channel.close", "queue.declare"})
    connection = connect(peer)
    first, other = connection.channel(), connection.channel()
    session, made = connection.connection, []

    def declare_and_open():
        other.queue_declare("q")
        made.append(session.channel())

    opener = run(declare_and_open)
    peer.wait_for("queue.declare")
    closer = run(first.close)
    peer.wait_for("channel.close")
    peer.send(
        frames.method_frame(2, "queue.declare-ok", "q", 0, 0)
        + frames.method_frame(1, "channel.close-ok")
    )
    gevent.joinall([opener, closer], timeout=30)
    (successor,) = made
    assert successor.channel_id == first.channel_id == 1
    assert session.channels == {1: successor, 2: other}


def test_closing_a_channel_wakes_its_callers(connect, make_peer):
    peer = make_peer(silent={"queue.declare"})
    channel = connect(peer).channel()
    call = run(channel.queue_declare, "q")
    peer.wait_for("queue.declare")
    channel.close()
    assert isinstance(call.get(timeout=30), RecoverableConnectionError)
    with pytest.raises(RecoverableConnectionError, match="already closed"):
        channel.queue_declare("q")


def test_closing_a_channel_twice_or_from_two_greenlets_closes_it_once(connect, peer):
    channel = connect(peer).channel()
    gevent.joinall([gevent.spawn(channel.close) for _ in range(3)], timeout=30, raise_error=True)
    channel.close()
    assert peer.names.count("channel.close") == 1


def test_what_comes_between_close_and_its_answer_is_dropped(connect, make_peer):
    peer = make_peer(silent={"channel.close"})
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    tag, channel = tag_of(consumer), consumer.channel
    closer = run(channel.close)
    peer.wait_for("channel.close")
    peer.send(
        frames.deliver(1, tag, 1)
        + frames.basic_cancel(1, tag)
        + frames.channel_close(1, 406, "crossed")
        + frames.method_frame(1, "channel.close-ok")
    )
    assert closer.get(timeout=30) is None
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0.005)
    assert got == []
    assert settles(peer) == {}
    assert peer.names[-1] == "channel.close-ok"


def test_closing_a_channel_of_a_lost_link_returns_at_once(connect, peer):
    connection = connect(peer, close_timeout=NEVER)
    channel = connection.channel()
    peer.hang_up()
    wait_until(lambda: not connection.connected)
    begun = monotonic()
    channel.close()
    assert monotonic() - begun < AT_ONCE


def test_a_kill_in_a_call_leaves_the_channel_usable(connect, make_peer):
    peer = make_peer(silent={"queue.declare"})
    channel = connect(peer).channel()
    killed = gevent.spawn(channel.queue_declare, "killed")
    peer.wait_for("queue.declare")
    killed.kill()
    peer.silent.clear()
    peer.send(frames.method_frame(1, "queue.declare-ok", "killed", 0, 0))
    assert channel.queue_declare("next").queue == "next"


def test_a_channel_waits_for_nothing_while_another_greenlet_waits_on_it(connect, make_peer):
    peer = make_peer(silent={"queue.declare"})
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    call = run(consumer.channel.queue_declare, "q")
    peer.wait_for("queue.declare")
    peer.deliver(1, tag_of(consumer), 1)
    connection.drain_events(timeout=30)
    got[0].ack()
    peer.wait_for("basic.ack")
    assert not call.ready()
    assert not Event().wait(0.001)
    peer.send(frames.method_frame(1, "queue.declare-ok", "q", 0, 0))
    assert call.get(timeout=30).queue == "q"


# -- what comes too late ----------------------------------------------------------------------------------


def test_nothing_is_sent_on_a_channel_that_closes(connect, make_peer):
    peer = make_peer(silent={"channel.close"})
    connection = connect(peer)
    channel = connection.channel()
    closer = run(channel.close)
    peer.wait_for("channel.close")
    publishing = run(channel.basic_publish, amqp.Message("late"), "e", "k")
    declaring = run(channel.queue_declare, "late")
    for call in (publishing, declaring):
        assert isinstance(call.get(timeout=30), RecoverableConnectionError)
    channel.basic_cancel("no-such-tag")
    peer.send(frames.method_frame(1, "channel.close-ok"))
    closer.get(timeout=30)
    connection.channel()
    assert peer.names[-2:] == ["channel.close", "channel.open"]


def undecodable(channel, body=b"{}"):
    """Content with a header of a type that AMQP does not have."""
    table = b"\x01d?"
    header = struct.pack(">HHQHI", 60, 0, len(body), 0x2000, len(table)) + table
    return frames.raw_frame(2, channel, header) + frames.raw_frame(3, channel, body)


def test_a_message_that_is_got_with_properties_that_cannot_be_decoded_harms_nobody(connect, peer):
    got_ok = frames.method_frame(1, "basic.get-ok", 1, False, "", "k", 0)
    peer.answers["basic.get"] = got_ok + undecodable(1)
    connection = connect(peer)
    channel = connection.channel()
    with pytest.raises(FrameSyntaxError, match="unknown type '\\?'"):
        Queue("q", channel=channel).get()
    message = channel.message_to_python(channel.basic_get("q"))
    message.reject()
    channel.queue_declare("q")
    assert connection.connected
    assert settles(peer) == {(1, 1, "reject"): 1}


def test_a_returned_message_whose_properties_cannot_be_decoded_harms_nobody(connect, peer):
    connection = connect(peer)
    channel = connection.channel()
    channel.basic_publish(amqp.Message("x"), "e", "k", mandatory=True)
    peer.wait_for("basic.publish")
    returned = frames.method_frame(1, "basic.return", 312, "NO_ROUTE", "e", "k")
    peer.send(returned + undecodable(1))
    with pytest.raises(ChannelError, match="NO_ROUTE"):
        wait_until(lambda: channel.queue_declare("q") is None)
    assert connection.connected


def test_a_consumer_that_is_cancelled_while_it_is_paused_is_not_started_again(connect, peer):
    connection, got = connect(peer), []
    channel = connection.channel()
    channel.queue_declare("q", auto_delete=False)
    channel.basic_consume("q", "t", no_ack=True, callback=got.append)
    peer.send(b"".join(frames.deliver(1, "t", tag) for tag in range(1, 1102)))
    wait_until(lambda: connection.connection.inbox.paused)
    channel.basic_cancel("t")
    channel.basic_consume("q", "t", no_ack=True, callback=got.append)
    while connection.connection.backlog:
        connection.drain_events(timeout=30)
    channel.queue_declare("q")
    # The second is the stand-in that kept its place.
    tags = [frame.args[2] for frame in peer.frames("basic.consume")]
    assert tags == ["t", "t.paused", "t"]


def test_a_call_that_is_given_up_on_a_channel_that_the_broker_closed_is_not_undone(
    connect, make_peer
):
    """The reply and the close come in one read, and the kill before its caller runs."""
    peer = make_peer(silent={"basic.consume"})
    connection = connect(peer)
    channel, link = connection.channel(), connection.connection.link
    call = gevent.spawn(channel.basic_consume, "q", "t", callback=print)
    peer.wait_for("basic.consume")
    take = link.on_inbound_frame

    def take_and_kill(frame):
        call.kill(block=False)  # it comes before the reply wakes its caller
        take(frame)

    link.on_inbound_frame = take_and_kill
    peer.send(frames.method_frame(1, "basic.consume-ok", "t") + MISSING)
    call.join(30)
    link.on_inbound_frame = take
    connection.channel()
    assert peer.names[-2:] == ["channel.close-ok", "channel.open"]


def test_an_error_is_told_to_the_next_caller_where_the_one_that_waited_gave_up(connect, make_peer):
    peer = make_peer(silent={"queue.declare"})
    channel = connect(peer, call_timeout=0.02).channel()
    with pytest.raises(TimeoutError):
        channel.queue_declare("slow")
    peer.send(MISSING)
    peer.wait_for("channel.close-ok")
    with pytest.raises(NotFound):
        channel.basic_publish(amqp.Message("x"), "e", "k")


def test_what_a_recover_gave_back_is_neither_handled_nor_settled(connect, make_peer):
    peer = make_peer(silent={"basic.recover"})
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got)
    tag, channel = tag_of(consumer), consumer.channel
    peer.send(frames.deliver(1, tag, 1) + frames.deliver(1, tag, 2))
    connection.drain_events(timeout=30)
    wait_until(lambda: connection.connection.backlog == 1)
    consumer.recover(requeue=True)
    peer.wait_for("basic.recover")
    got[0].ack()
    # 3 was on its way when the broker took everything back; 4 is the first that came after it.
    late, new = frames.deliver(1, tag, 3), frames.deliver(1, tag, 4, redelivered=True)
    peer.send(late + frames.method_frame(1, "basic.recover-ok") + new)
    connection.drain_events(timeout=30)
    assert [message.delivery_tag for message in got] == [1, 4]
    got[1].ack()
    channel.queue_declare("q")
    assert settles(peer) == {(1, 4, "basic.ack"): 1}


def test_a_consumer_without_acks_whose_start_was_given_up_rejects_nothing(connect, make_peer):
    peer = make_peer(silent={"basic.consume"})
    channel = connect(peer).channel()
    with gevent.Timeout(0.02, False):
        channel.basic_consume("q", "t", no_ack=True, callback=print)
    peer.wait_for("basic.consume")
    peer.send(frames.method_frame(1, "basic.consume-ok", "t") + frames.deliver(1, "t", 1))
    peer.wait_for("basic.cancel")
    channel.queue_declare("q")
    assert settles(peer) == {}


def test_a_message_in_hand_that_needs_no_ack_is_not_acked_after_its_consumer_was_cancelled(
    connect, peer
):
    connection, got = connect(peer), []
    consumer = kombu_consumer(connection, got, no_ack=True)
    peer.send(frames.deliver(1, tag_of(consumer), 1))
    connection.drain_events(timeout=30)
    consumer.cancel()
    got[0].ack()
    got[0].channel.queue_declare("q")
    assert settles(peer) == {}


def test_a_message_got_together_with_the_end_of_its_channel_is_not_returned(connect, peer):
    """HAZARDS.md row 13: what settled it would settle another one, in the channel's next life."""
    connection = connect(peer)
    consumer = kombu_consumer(connection, [])
    got_ok = frames.method_frame(1, "basic.get-ok", 7, False, "", "k", 0)
    peer.answers["basic.get"] = got_ok + frames.content(1, b"") + MISSING
    with pytest.raises(RecoverableConnectionError):
        consumer.channel.basic_get("q")


def test_an_id_is_free_again_where_opening_its_channel_was_given_up(connect, make_peer):
    peer = make_peer()
    connection = connect(peer)
    link = connection.connection.link
    peer.silent.add("channel.open")
    with gevent.Timeout(0.02, False):
        connection.connection.channel()
    peer.send(frames.method_frame(1, "channel.open-ok", b""))
    wait_until(lambda: set(link.channels) == {0})


def test_decoding_may_be_turned_off_on_a_channel(connect, peer):
    """As py-amqp's attribute of that name."""
    channel = connect(peer).channel()
    channel.auto_decode = False
    assert channel.auto_decode is False


CALLS = {
    "queue.declare": lambda channel, arguments: channel.queue_declare("q", arguments=arguments),
    "queue.bind": lambda channel, arguments: channel.queue_bind("q", "e", arguments=arguments),
    "exchange.declare": lambda channel, arguments: channel.exchange_declare(
        "e", "direct", arguments=arguments
    ),
    "basic.consume": lambda channel, arguments: channel.basic_consume("q", arguments=arguments),
}


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-share", float("nan")),
        ("x-share", float("inf")),
        ("x-max-length", 2**64),
        ("x-what", object()),
        ("x" * 256, 1),
        ("x-deep", {"x-a": [float("nan")]}),
    ],
    ids=str,
)
def test_an_argument_that_amqp_cannot_hold_is_refused_at_the_call_by_name(
    connect, peer, method, name, value
):
    channel = connect(peer).channel()
    with pytest.raises(ValueError, match=f"the argument '{name}' cannot be sent"):
        CALLS[method](channel, {"x-good": 1, name: value})
    channel.queue_declare("q", arguments={"x-max-length": 5})
    sent = [frame for frame in peer.received if frame.name in CALLS]
    assert [frame.args[-1] for frame in sent] == [{"x-max-length": 5}]


def test_a_name_that_is_too_long_is_refused_at_the_call_in_words(connect, peer):
    channel = connect(peer).channel()
    with pytest.raises(ValueError, match="is longer than AMQP allows"):
        channel.queue_declare("q" * 256)
    with pytest.raises(ValueError, match="holds a larger number than AMQP allows"):
        channel.basic_qos(0, 2**16, False)
    assert channel.is_open


@pytest.mark.parametrize("frame_max", [4096, 131072])
def test_a_call_larger_than_a_frame_is_refused_and_harms_nobody(make_peer, connect, frame_max):
    """Sent, it would end the link of everybody who shares it (501)."""
    peer = make_peer(frame_max=frame_max)
    channel = connect(peer).channel()
    with pytest.raises(ValueError, match=rf"more than fit into a frame of {frame_max}"):
        channel.queue_declare("q", arguments={"x-note": "n" * frame_max})
    with pytest.raises(ValueError, match="raise frame_max at the broker"):
        channel.basic_consume("q", arguments={"x-note": "n" * frame_max}, callback=print)
    room = frame_max - 8 - 4 - len("\0\0\1q\0") - 4 - len("\6x-noteS") - 4
    assert channel.queue_declare("q", arguments={"x-note": "n" * room}).queue == "q"
    assert len(peer.frames("queue.declare")) == 1
    with pytest.raises(ValueError, match="cannot be sent"):
        channel.queue_declare("q", arguments={"x-note": "n" * (room + 1)})
