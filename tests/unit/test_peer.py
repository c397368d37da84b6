"""The scripted peer, held against py-amqp as kombu drives it."""

from __future__ import annotations

import socket

import amqp
import gevent
import pytest
from kombu import Connection, Consumer, Exchange, Producer, Queue

from tests import frames
from tests.messages import publish, stock_connection
from tests.peer import RABBITMQ_4_3, REFUSES_PASSWORD, REFUSES_VHOST
from tests.servers import HOST

BRING_UP = ["connection.start-ok", "connection.tune-ok", "connection.open", "channel.open"]


def test_a_connection_comes_up_and_goes_down(peer):
    with stock_connection(peer.url) as connection:
        connection.channel()
    assert peer.names == [*BRING_UP, "connection.close"]
    assert peer.frames("connection.start-ok")[0].args[1:] == ["PLAIN", "\0guest\0guest", "en_US"]


def test_a_delivery_reaches_a_consumer_and_its_ack_the_peer(peer):
    got = []
    with stock_connection(peer.url) as connection, connection.channel() as channel:
        queue = Queue("q", Exchange("e"), routing_key="k")
        with Consumer(channel, queue, tag_prefix="c", prefetch_count=7) as consumer:
            consumer.register_callback(lambda body, message: (got.append(body), message.ack()))
            tag = peer.wait_for("basic.consume").args[2]
            peer.deliver(1, tag, 42, b'{"n": 1}', exchange="e", routing_key="k", headers={"h": 1})
            connection.drain_events(timeout=30)
            assert peer.wait_for("basic.ack").args == [42, False]
    assert got == [{"n": 1}]
    assert peer.frames("basic.qos")[0].args == [0, 7, False]
    assert peer.frames("queue.bind")[0].args[1:4] == ["q", "e", "k"]


def test_properties_and_a_body_of_many_frames_arrive_unchanged(peer):
    messages = []
    body = bytes(range(256)) * 40
    with stock_connection(peer.url) as connection:
        connection.channel().basic_consume("q", consumer_tag="t", callback=messages.append)
        peer.deliver(
            1,
            "t",
            1,
            body,
            frame_max=4096,
            content_type="application/octet-stream",
            content_encoding="binary",
            headers={"n": 1},
            priority=3,
            correlation_id="c",
            timestamp=1_700_000_000,
        )
        connection.drain_events(timeout=30)
    (message,) = messages
    assert bytes(message.body) == body
    assert (message.headers, message.properties["priority"]) == ({"n": 1}, 3)
    assert message.properties["correlation_id"] == "c"


def test_a_body_is_cut_into_frames_that_are_not_too_large():
    data = bytearray(frames.deliver(1, "t", 1, b"x" * 10_000, frame_max=4096))
    method, header, *bodies = frames.parse(data)
    assert (method.name, header.name, len(data)) == ("basic.deliver", "header", 0)
    assert [len(body.payload) for body in bodies] == [4088, 4088, 1824]


def test_publish_returns_when_all_is_confirmed(peer):
    greenlet = gevent.spawn(publish, peer.url, "q", 3)
    peer.wait_for("body", 3)
    peer.send(frames.basic_ack(1, 2, multiple=True))
    greenlet.join(timeout=0.02)
    assert not greenlet.ready()
    peer.send(frames.basic_ack(1, 3))
    assert greenlet.get(timeout=30) == 3


def test_what_a_client_publishes_is_put_together(peer):
    with stock_connection(peer.url) as connection:
        producer = Producer(connection.channel(), Exchange("e"), routing_key="k")
        producer.publish({"n": 1}, headers={"h": "v"}, declare=[Exchange("e")])
        producer.publish("x" * 300_000, routing_key="big")
    small, big = peer.published
    assert (small.exchange, small.routing_key, small.body) == ("e", "k", b'{"n": 1}')
    assert small.properties["headers"] == {"h": "v"}
    assert len(big.body) == 300_000
    assert len(peer.frames("body")) > 2


@pytest.mark.parametrize(
    ("answers", "error"),
    [(REFUSES_PASSWORD, amqp.AccessRefused), (REFUSES_VHOST, amqp.NotAllowed)],
)
def test_a_peer_refuses_as_a_broker_does(make_peer, answers, error):
    with pytest.raises(error):
        stock_connection(make_peer(answers=answers).url).connect()


def test_errors_of_channel_and_connection_are_raised_in_the_client(peer):
    with stock_connection(peer.url) as connection:
        connection.channel()
        peer.send(frames.channel_close(1, 406, "PRECONDITION_FAILED - unknown delivery tag"))
        with pytest.raises(amqp.PreconditionFailed):
            connection.drain_events(timeout=30)
        peer.wait_for("channel.close-ok")
        peer.send(frames.connection_close(320, "CONNECTION_FORCED"))
        with pytest.raises(amqp.ConnectionForced):
            connection.drain_events(timeout=30)
        peer.wait_for("connection.close-ok")


def test_what_is_negotiated_is_what_the_options_say(make_peer):
    peer = make_peer(heartbeat=30, channel_max=9, frame_max=8192)
    with stock_connection(peer.url, heartbeat=20) as connection:
        connection.connect()
        connection.heartbeat_check()
    assert peer.frames("connection.tune-ok")[0].args == [9, 8192, 20]


def test_a_silent_peer_records_and_does_not_answer(make_peer):
    peer = make_peer(silent={"channel.open"})
    connection = stock_connection(peer.url)
    connection.connect()
    with pytest.raises(socket.timeout), connection.connection.transport.having_timeout(0.05):
        connection.channel()
    assert peer.names[-1] == "channel.open"
    connection.collect()


def test_a_peer_closes_after_the_bytes_it_was_told(make_peer):
    peer = make_peer(close_after=10)
    with socket.create_connection((HOST, peer.port)) as client:
        client.sendall(frames.PROTOCOL_HEADER)
        received = b""
        while data := client.recv(100):
            received += data
    assert len(received) == 10
    assert received[:1] == b"\x01"


@pytest.mark.parametrize("reset", [False, True])
def test_a_peer_hangs_up_by_fin_or_by_reset(peer, reset):
    connection = stock_connection(peer.url)
    connection.connect()
    peer.hang_up(reset)
    with pytest.raises(ConnectionResetError if reset else OSError):
        connection.drain_events(timeout=30)
    connection.collect()


def test_blocked_returned_and_confirmed_are_understood(peer):
    seen = []
    options = {
        "on_blocked": lambda *_: seen.append("blocked"),
        "on_unblocked": lambda: seen.append("unblocked"),
        "confirm_publish": True,
    }
    peer.answers["basic.publish"] = b""
    peer.answers["body"] = lambda frame: (
        frames.basic_return(1, b"{}", routing_key="k")
        + frames.basic_ack(frame.channel, 1)
        + frames.blocked("memory")
        + frames.unblocked()
        + frames.heartbeat()
    )
    with stock_connection(peer.url, transport_options=options) as connection:
        channel = connection.channel()
        channel.events["basic_return"].add(lambda exc, *_: seen.append(exc.reply_code))
        Producer(channel).publish({}, routing_key="k")
        connection.drain_events(timeout=30)
        connection.drain_events(timeout=30)
    assert seen == [312, "blocked", "unblocked"]


def test_a_nack_fails_the_publish(peer):
    peer.answers["body"] = frames.basic_nack(1, 1)
    with stock_connection(peer.url, transport_options={"confirm_publish": True}) as connection:
        with pytest.raises(amqp.exceptions.MessageNacked):
            Producer(connection.channel()).publish({}, routing_key="k")


def test_a_servers_cancel_ends_a_consumer(peer):
    cancelled = []
    with stock_connection(peer.url) as connection:
        channel = connection.channel()
        channel.basic_consume("q", consumer_tag="t", on_cancel=cancelled.append)
        peer.send(frames.basic_cancel(1, "t"))
        connection.drain_events(timeout=30)
    assert cancelled == ["t"]


@pytest.mark.parametrize(
    ("call", "code", "culprit"),
    [
        (lambda channel: channel.queue_declare("q", durable=False), 541, (50, 10)),
        (lambda channel: channel.basic_qos(0, 10, True), 540, (60, 10)),
    ],
)
def test_it_refuses_what_rabbitmq_4_3_refuses(make_peer, call, code, culprit):
    with stock_connection(make_peer(answers=RABBITMQ_4_3).url) as connection:
        channel = connection.channel()
        channel.queue_declare("kept", durable=True)
        channel.queue_declare("mine", exclusive=True)
        channel.basic_qos(0, 10, False)
        with pytest.raises(amqp.AMQPError) as refused:
            call(channel)
        assert (refused.value.reply_code, refused.value.method_sig) == (code, culprit)


def test_it_counts_as_rabbitmq_4_3_and_cancels_who_is_late(peer):
    got, cancelled = [], []
    with stock_connection(peer.url) as connection:
        channel = connection.channel()
        channel.basic_consume("q", "t", callback=got.append, on_cancel=cancelled.append)
        peer.deliver_counted(1, "t", 1, acquired=0)
        peer.deliver_counted(1, "t", 2, acquired=3, failed=1)
        peer.cancel(1, "t")
        while not cancelled:
            connection.drain_events(timeout=30)
    assert [message.headers for message in got] == [
        {},
        {"x-acquired-count": 3, "x-delivery-count": 1},
    ]


def test_wait_for_tells_what_came_instead(peer):
    with Connection(peer.url) as connection:
        connection.connect()
        with pytest.raises(AssertionError, match=r"1 x basic\.ack .*connection\.open"):
            peer.wait_for("basic.ack", within=0.01)


def test_bytes_that_are_no_frame_are_an_error(make_peer):
    peer = make_peer()
    with socket.create_connection((HOST, peer.port)) as client:
        client.sendall(frames.PROTOCOL_HEADER + b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x0b\x00")
        while client.recv(4096):
            pass
    assert "no frame end" in str(peer.errors.pop())
