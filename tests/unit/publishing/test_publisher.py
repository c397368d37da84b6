"""The publisher against a scripted peer, and over memory: whose answer is whose, and what is lost."""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import suppress
from datetime import datetime
from time import monotonic
from uuid import UUID

import gevent
import pytest
from amqp.exceptions import (
    AMQPNotImplementedError,
    ChannelError,
    InternalError,
    MessageNacked,
    NotFound,
    PreconditionFailed,
    RecoverableConnectionError,
)
from gevent.threadpool import ThreadPool
from kombu import Connection, Exchange, Producer, Queue, serialization
from kombu.exceptions import EncodeError

from greenconsume import Publisher
from greenconsume.amqp.link import LinkLostError
from greenconsume.errors import (
    BlockedError,
    ForeignThreadError,
    ForkedError,
    NackedError,
    PublishError,
    PublishTimeoutError,
    RefusedError,
    ReturnedError,
    StoppedError,
    UnconfirmedError,
    UnsupportedTransportError,
)
from greenconsume.events import PublishFailed
from greenconsume.links.pool import LinkPool
from greenconsume.publishing import outbox
from greenconsume.transports import memory, registry
from tests import frames
from tests.servers import HOST, free_port
from tests.unit.fakes import of_type, recording, run
from tests.waiting import AT_ONCE, NEVER, wait_until

SOON = 30.0


@pytest.fixture
def publish_to(make_peer):
    """Make publishers; they are stopped and closed in the end."""
    publishers = []

    def make(broker, **options):
        url = broker if isinstance(broker, str) else broker.url
        options = {"timeout": SOON, **options}
        connection = Connection(url, transport_options={"close_timeout": 0.5})
        publishers.append(Publisher(connection, **options))
        return publishers[-1]

    yield make
    for publisher in publishers:
        publisher.stop()
        with suppress(PublishError):
            publisher.close()


@pytest.fixture
def publisher(publish_to, peer):
    return publish_to(peer)


def answering(peer, answer=frames.basic_ack):
    """Have a peer answer for each message at once: a function of the channel and the delivery tag."""
    tags = Counter()

    def on_open(frame):
        tags[frame.channel] = 0
        return frames.method_frame(frame.channel, "channel.open-ok", "")

    def on_body(frame):
        tags[frame.channel] += 1
        return answer(frame.channel, tags[frame.channel])

    peer.answers.update({"channel.open": on_open, "body": on_body})
    return peer


@pytest.fixture
def broker(peer):
    """A peer that confirms everything at once."""
    return answering(peer)


def outcomes(calls, within=SOON):
    return [each.get(timeout=within) for each in calls]


def bodies(peer):
    return [message.body for message in peer.published]


def arrived(peer, count):
    wait_until(lambda: len(peer.published) >= count, SOON)
    return peer.published


# -- confirms ---------------------------------------------------------------------------------------


def test_nothing_is_connected_before_it_is_used(publisher, peer):
    publisher.close()
    assert peer.connection_count == 0


def test_each_greenlet_waits_for_the_confirm_of_its_own_message(publisher, peer):
    calls = [run(publisher.publish, n, "q") for n in range(5)]
    arrived(peer, 5)
    for tags, expected in [
        (frames.basic_ack(1, 4), [3]),
        (frames.basic_ack(1, 2, multiple=True), [0, 1, 3]),
        (frames.basic_ack(1, 5, multiple=True), [0, 1, 2, 3, 4]),
    ]:
        peer.send(tags)
        wait_until(lambda: [n for n, each in enumerate(calls) if each.ready()] == expected)  # noqa: B023  # called here
    assert outcomes(calls) == [None] * 5


def test_a_hundred_greenlets_share_one_channel_and_ask_for_confirms_once(publish_to, broker):
    publisher = publish_to(broker)
    calls = [run(publisher.publish, n, "q") for n in range(100) for _ in range(3)]
    assert outcomes(calls) == [None] * 300
    assert Counter(broker.names)["channel.open"] == Counter(broker.names)["confirm.select"] == 1
    assert broker.connection_count == 1
    assert bodies(broker) == [b"%d" % n for n in range(100) for _ in range(3)]


def test_a_message_is_what_a_kombu_producer_makes_of_it(publish_to, broker):
    """kombu's options are kombu's: everything but the message id is the same on the wire."""
    registry.register()
    options = {
        "exchange": "e",
        "routing_key": "k",
        "headers": {"a": 1},
        "compression": "zlib",
        "serializer": "json",
        "expiration": 1.5,
        "priority": 3,
        "delivery_mode": "transient",
        "correlation_id": "c",
        "reply_to": "r",
        "mandatory": True,
    }
    with Connection(broker.url) as connection:
        Producer(connection).publish({"x": ["ü"]}, **options)
        arrived(broker, 1)
    publish_to(broker).publish({"x": ["ü"]}, **options)
    plain, ours = broker.published
    message_id = ours.properties.pop("message_id")
    assert (ours, UUID(message_id).hex) == (plain, message_id)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    "body",
    [{}, [], {"ü": [1.5, None, True]}, {"at": datetime(2026, 1, 2), "id": UUID(int=7)}, [b"\xff"]],
)
def test_plain_json_is_what_kombu_makes_of_it(publish_to, broker, body, compression):
    registry.register()
    options = {"routing_key": "k", "compression": compression}
    with Connection(broker.url) as connection:
        Producer(connection).publish(body, **options)
        arrived(broker, 1)
    publish_to(broker).publish(body, **options)
    plain, ours = broker.published
    del ours.properties["message_id"]
    assert ours == plain


def test_another_default_serializer_is_kombus_to_choose(publish_to, broker):
    encode = serialization.registry._default_encode
    serialization.registry._set_default_serializer("pickle")
    try:
        publish_to(broker).publish({"a": 1}, "k")
    finally:
        serialization.registry._set_default_serializer("json")
    assert serialization.registry._default_encode is encode
    assert "json" not in broker.published[0].properties["content_type"]


def test_the_publishers_own_options_hold_unless_told_otherwise(publish_to, broker):
    publisher = publish_to(
        broker, exchange="e", routing_key="k", serializer="pickle", compression="zlib"
    )
    publisher.publish([1])
    publisher.publish("text", "other", exchange="", serializer="raw", compression="bzip2")
    first, second = broker.published
    assert (first.exchange, first.routing_key) == ("e", "k")
    assert first.properties["content_type"] == "application/x-python-serialize"
    assert first.properties["headers"] == {"compression": "application/x-gzip"}
    assert (second.exchange, second.routing_key) == ("e", "other")  # "" is kombu's for its default
    assert second.properties["content_type"] == "application/data"


def test_message_ids_are_unique_and_the_users_are_kept(publish_to, broker):
    first, second = publish_to(broker), publish_to(broker)
    for publisher in (first, second):
        publisher.publish(1, "q")
        publisher.publish(1, "q", message_id=None)
        publisher.publish(1, "q", message_id="mine")
    ids = [message.properties["message_id"] for message in broker.published]
    assert ids.count("mine") == 2
    assert len(set(ids)) == 5


def test_publishing_without_waiting_gives_what_may_be_waited_for(publisher, peer):
    publication = publisher.publish_nowait(1, "q", message_id="m")
    waiters = [run(publication.wait) for _ in range(3)]
    arrived(peer, 1)
    assert (publication.ready, publication.message_id) == (False, "m")
    peer.send(frames.basic_ack(1, 1))
    assert outcomes(waiters) == [None] * 3
    assert publication.ready
    publication.wait()


def test_waiting_for_less_than_the_timeout_does_not_give_the_message_up(publisher, peer):
    publication = publisher.publish_nowait(1, "q")
    arrived(peer, 1)
    with pytest.raises(PublishTimeoutError, match="is not confirmed after"):
        publication.wait(timeout=0.01)
    peer.send(frames.basic_ack(1, 1))
    publication.wait(timeout=SOON)


def test_a_confirmed_message_is_not_kept(publish_to, broker):
    publisher = publish_to(broker)
    publications = [publisher.publish_nowait(n, "q") for n in range(10)]
    publisher.flush()
    assert all(publication.ready for publication in publications)
    assert not publisher._outbox._outstanding
    assert not publisher._outbox._channel.channel.confirms


def test_a_body_that_cannot_be_serialized_is_an_error_here(publish_to, broker):
    publisher = publish_to(broker, max_unconfirmed=1)
    with pytest.raises(EncodeError):
        publisher.publish(object(), "q")
    publisher.publish(1, "q")


@pytest.mark.parametrize("options", [{"routing_key": "k" * 256}, {"headers": {"x": object()}}])
def test_what_cannot_be_encoded_is_an_error_of_that_message_alone(publish_to, broker, options):
    """Also for the first message, which the sender writes."""
    publisher = publish_to(broker, max_unconfirmed=2)
    for _ in range(3):
        with pytest.raises(PublishError, match="cannot be published"):
            publisher.publish("bad", **options)
        publisher.publish("good", "q")
    assert bodies(broker) == [b"good"] * 3


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"routing_key": "k" * 256}, "its routing key takes 256 bytes"),
        ({"exchange": "é" * 128}, "its exchange takes 256 bytes"),
        ({"priority": 300}, "its property 'priority' cannot be 300"),
        ({"timestamp": "soon"}, "its property 'timestamp' cannot be 'soon'"),
        ({"app_id": "x" * 256}, "its property 'app_id' cannot be 'xxx"),
        ({"headers": {"x": object()}}, "the header 'x' cannot be sent"),
        ({"headers": {"x": [float("nan")]}}, "the header 'x' cannot be sent: nan is no number"),
    ],
)
def test_what_cannot_be_encoded_is_named(publish_to, broker, options, part):
    """struct's own words are of no use: `ubyte format requires 0 <= number <= 255`."""
    publisher = publish_to(broker)
    with pytest.raises(PublishError, match=re.escape(part)):
        publisher.publish("bad", **options)


# -- what the broker says no to ---------------------------------------------------------------------


def test_a_nacked_message_is_an_error_of_its_own_greenlet(publisher, peer):
    calls = [run(publisher.publish, n, "q", exchange="e", message_id=f"m{n}") for n in range(3)]
    arrived(peer, 3)
    peer.send(frames.basic_nack(1, 2) + frames.basic_ack(1, 3, multiple=True))
    first, error, last = outcomes(calls)
    assert (first, last) == (None, None)
    assert isinstance(error, NackedError)
    assert (error.exchange, error.routing_key, error.message_id) == ("e", "q", "m1")
    assert isinstance(error.__cause__, MessageNacked)


def test_a_returned_message_is_an_error_of_its_own_greenlet(publisher, peer):
    """Returns are told apart by message id among messages to the same address, routable or not."""
    calls = [
        run(publisher.publish, "same", "nowhere", mandatory=n != 1, message_id=f"m{n}")
        for n in range(5)
    ]
    arrived(peer, 5)
    for n in (4, 2):
        back = {"routing_key": "nowhere", "message_id": f"m{n}"}
        peer.send(frames.basic_return(1, b"same", **back))
    peer.send(frames.basic_ack(1, 5, multiple=True))
    results = outcomes(calls)
    assert [type(each) for each in results] == [
        type(None),
        type(None),
        ReturnedError,
        type(None),
        ReturnedError,
    ]
    assert [(results[n].message_id, results[n].reply_code) for n in (2, 4)] == [
        ("m2", 312),
        ("m4", 312),
    ]
    assert results[2].reply_text == "NO_ROUTE"


def no_exchange(name, channel=1):
    text = f"NOT_FOUND - no exchange '{name}' in vhost '/'"
    return frames.channel_close(channel, 404, text, "basic.publish")


def test_a_missing_exchange_is_an_error_of_who_published_to_it_alone(publisher, peer):
    """The channel that they share was closed: the others' messages are written again, over the same link."""
    calls = [run(publisher.publish, n, "q", exchange=e) for n, e in enumerate("abab")]
    arrived(peer, 4)
    peer.send(no_exchange("b"))
    arrived(peer, 6)
    peer.send(frames.basic_ack(1, 2, multiple=True))
    first, second, third, fourth = outcomes(calls)
    assert (first, third) == (None, None)
    for error in (second, fourth):
        assert (type(error), error.reply_code, error.exchange) == (RefusedError, 404, "b")
        assert isinstance(error.__cause__, NotFound)
    assert bodies(peer) == [b"0", b"1", b"2", b"3", b"0", b"2"]
    ids = [message.properties["message_id"] for message in peer.published]
    assert ids[4:] == [ids[0], ids[2]]
    assert (peer.connection_count, peer.names.count("confirm.select")) == (1, 2)


def test_who_closed_the_channel_is_found_where_the_broker_names_nobody(publisher, peer):
    """Each is then written with no other on its way; none more than twice."""
    refusal = frames.channel_close(1, 406, "PRECONDITION_FAILED - x", "basic.publish")
    calls = [run(publisher.publish, text, "q") for text in ("a", "bad", "b", "bad", "c")]
    arrived(peer, 5)
    answering(peer)
    confirm = peer.answers["body"]
    peer.answers["body"] = lambda frame: refusal if frame.payload == b"bad" else confirm(frame)
    peer.send(refusal)
    results = outcomes(calls)
    refused = [isinstance(each, RefusedError) for each in results]
    assert refused == [False, True, False, True, False]
    assert isinstance(results[1].__cause__, PreconditionFailed)
    assert bodies(peer)[5:] == [b"a", b"bad", b"b", b"bad", b"c"]
    assert (results[0], peer.connection_count) == (None, 1)


def test_what_is_published_while_each_is_written_alone_goes_behind_them(publisher, peer):
    calls = [run(publisher.publish, text, "q") for text in ("a", "b")]
    arrived(peer, 2)
    peer.send(frames.channel_close(1, 406, "PRECONDITION_FAILED - x", "basic.publish"))
    arrived(peer, 3)
    calls.append(run(publisher.publish, "c", "q"))
    for tag in (1, 2, 3):
        calls[-1].join(0.01)
        assert len(peer.published) == 2 + tag
        peer.send(frames.basic_ack(1, tag))
        calls[(tag - 1)].join(SOON)
        wait_until(lambda: len(peer.published) == min(5, 3 + tag))  # noqa: B023  # called here
    assert outcomes(calls) == [None] * 3
    assert bodies(peer) == [b"a", b"b", b"a", b"b", b"c"]


# -- declaring --------------------------------------------------------------------------------------


def test_an_exchange_is_declared_once_and_before_its_first_message(publish_to, broker):
    publisher = publish_to(broker, exchange=Exchange("orders", "topic"))
    calls = [run(publisher.publish, n, "q", declare=[Queue("q")]) for n in range(10)]
    assert outcomes(calls) == [None] * 10
    names = broker.names
    assert names.count("exchange.declare") == names.count("queue.declare") == 1
    assert names.index("exchange.declare") < names.index("basic.publish")
    assert {message.exchange for message in broker.published} == {"orders"}
    assert broker.frames("exchange.declare")[0].channel != broker.published[0].channel


def test_what_is_declared_later_is_declared_before_its_message_and_keeps_the_order(
    publish_to, broker
):
    publisher = publish_to(broker)
    publisher.publish(0, "q")
    calls = [
        run(publisher.publish, 1, "q", declare=[Queue("q")]),
        run(publisher.publish, 2, "q"),
    ]
    assert outcomes(calls) == [None, None]
    assert bodies(broker) == [b"0", b"1", b"2"]
    names = broker.names
    assert names.index("queue.declare") < len(names) - names[::-1].index("basic.publish") - 2


def test_what_a_broker_refuses_to_declare_is_an_error_of_that_message_alone(publish_to, broker):
    def refuse(frame):
        return frames.channel_close(frame.channel, 406, "inequivalent arg", "exchange.declare")

    broker.answers["exchange.declare"] = refuse
    publisher = publish_to(broker)
    calls = [
        run(publisher.publish, 0, "q"),
        run(publisher.publish, 1, "q", declare=[Exchange("bad")]),
        run(publisher.publish, 2, "q"),
    ]
    first, error, last = outcomes(calls)
    assert (first, last) == (None, None)
    assert (type(error), error.reply_code) == (RefusedError, 406)
    del broker.answers["exchange.declare"]
    publisher.publish(3, "q", declare=[Exchange("bad")])
    assert bodies(broker) == [b"0", b"2", b"3"]


def test_it_is_declared_again_on_a_new_link(publish_to, peer):
    publisher = publish_to(peer, exchange=Exchange("orders"))
    calls = [run(publisher.publish, n, "q") for n in range(2)]
    arrived(peer, 2)
    answering(peer)
    peer.hang_up()
    assert outcomes(calls) == [None, None]
    assert peer.names.count("exchange.declare") == 2


# -- lost links -------------------------------------------------------------------------------------


def test_what_a_lost_link_left_unconfirmed_is_written_again_in_its_order(publisher, peer):
    calls = [run(publisher.publish, n, "q") for n in range(5)]
    arrived(peer, 5)
    peer.send(frames.basic_ack(1, 2))
    wait_until(calls[1].ready)
    peer.hang_up(reset=True)
    written = arrived(peer, 9)
    peer.send(frames.basic_ack(1, 4, multiple=True))
    assert outcomes(calls) == [None] * 5
    assert written[5:] == [written[n] for n in (0, 2, 3, 4)]  # message ids and all
    assert peer.connection_count == 2


def test_a_link_that_was_lost_while_idle_is_noticed_and_loses_nothing(publish_to, broker):
    publisher = publish_to(broker)
    for n in range(3):
        publisher.publish(n, "q")
        broker.hang_up()
        wait_until(lambda: broker.open_count == 0)
    publisher.publish(3, "q")
    assert bodies(broker) == [b"0", b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("own", "options"),
    [
        ({"max_retries": 0}, {}),
        ({}, {"retry": False}),
        ({}, {"retry_policy": {"max_retries": 0}}),
        ({"max_retries": 0}, {"retry": True, "retry_policy": {"interval_start": 1}}),
    ],
)
def test_without_retries_a_lost_link_is_an_error(publish_to, peer, own, options):
    publisher = publish_to(peer, **own)
    waiting = run(publisher.publish, 1, "q", **options)
    arrived(peer, 1)
    peer.hang_up()
    error = waiting.get(timeout=SOON)
    assert (type(error), type(error.__cause__)) == (UnconfirmedError, LinkLostError)
    assert "may or may not have arrived" in str(error)
    answering(peer)
    publisher.publish(2, "q")
    assert bodies(peer) == [b"1", b"2"]


def test_a_message_is_written_again_as_often_as_was_said(publish_to, peer):
    publisher = publish_to(peer, max_retries=1)
    waiting = run(publisher.publish, 1, "q")
    for count in (1, 2):
        arrived(peer, count)
        peer.hang_up()
    assert isinstance(waiting.get(timeout=SOON), UnconfirmedError)
    assert len(peer.published) == 2


def test_a_link_that_is_lost_whenever_it_is_used_is_not_dialled_in_a_loop(publish_to, make_peer):
    peer = make_peer(answers={"body": frames.connection_close(320, "CONNECTION_FORCED")})
    publisher = publish_to(peer, timeout=0.15)
    with pytest.raises(PublishTimeoutError, match="may or may not have arrived") as caught:
        publisher.publish(1, "q")
    assert isinstance(caught.value.__cause__, LinkLostError)
    assert peer.connection_count == 2


def closing_link_for(peer, poison, code=541):
    """Have a peer confirm every message but one, for which it closes the connection."""
    answering(peer)
    confirm = peer.answers["body"]
    closed = frames.connection_close(code, "INTERNAL_ERROR")
    peer.answers["body"] = lambda frame: closed if frame.payload == poison else confirm(frame)
    return peer


def test_a_message_that_kills_the_link_is_refused_and_its_neighbours_are_published(
    publish_to, peer
):
    publisher = publish_to(closing_link_for(peer, b"3"))
    publisher.publish(0, "q")
    calls = [run(publisher.publish, n, "q") for n in range(1, 131)]
    results = outcomes(calls)
    assert [n for n, each in enumerate(results, 1) if each is not None] == [3]
    assert (type(results[2]), results[2].reply_code) == (RefusedError, 541)
    assert isinstance(results[2].__cause__, InternalError)
    assert max(Counter(bodies(peer)).values()) == 2
    assert peer.connection_count == 3


def test_each_of_several_messages_that_kill_the_link_is_told_so(publish_to, peer):
    publisher = publish_to(closing_link_for(peer, b"bad"))
    calls = [run(publisher.publish, text, "q") for text in ("bad", "a", "bad", "b", "bad")]
    results = outcomes(calls)
    assert [isinstance(each, RefusedError) for each in results] == [True, False] * 2 + [True]
    assert results[1::2] == [None, None]


def test_a_message_that_kills_the_link_is_not_taken_for_another_publishers(publish_to, peer):
    """They share a link, until one of their messages closes it: then none is suspect for another's."""
    closing_link_for(peer, b"bad")
    links = LinkPool()
    publishers = [publish_to(peer, links=links) for _ in range(3)]
    for publisher in publishers:
        publisher.publish(0, "q")
    calls = [run(publisher.publish, n, "q") for publisher in publishers for n in range(5)]
    bad = run(publishers[1].publish, "bad", "q")
    assert isinstance(bad.get(timeout=SOON), RefusedError)
    assert outcomes(calls) == [None] * 15


def test_the_only_message_on_its_way_is_refused_at_once(publish_to, peer):
    """The broker names the method that it closed the connection for, and there is one such call."""
    closed = frames.connection_close(540, "NOT_IMPLEMENTED - immediate=true", (60, 40))
    peer.answers["body"] = closed
    with pytest.raises(RefusedError, match="immediate=true") as caught:
        publish_to(peer).publish(1, "q", immediate=True)
    assert isinstance(caught.value.__cause__, AMQPNotImplementedError)
    assert len(peer.published) == peer.connection_count == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**70, object(), [float("-inf")]])
def test_a_value_that_amqp_cannot_hold_is_refused_at_the_call_naming_its_header(
    publish_to, broker, value
):
    publisher = publish_to(broker)
    publisher.publish(0, "q")
    with pytest.raises(PublishError, match="the header 'rate' cannot be sent"):
        publisher.publish_nowait(1, "q", headers={"tenant": "acme", "rate": value})
    publisher.publish(2, "q")
    assert bodies(broker) == [b"0", b"2"]


def test_a_broker_that_is_away_is_waited_for(publish_to, make_peer, monkeypatch):
    monkeypatch.setattr("greenconsume.links.backoff.FIRST_DELAY", 0.01)
    peer = answering(make_peer(answers={"connection.open": frames.connection_close(320, "no")}))
    publisher = publish_to(peer)
    calls = [run(publisher.publish, n, "q") for n in range(3)]
    wait_until(lambda: peer.connection_count > 1)
    del peer.answers["connection.open"]
    assert outcomes(calls) == [None] * 3
    assert bodies(peer) == [b"0", b"1", b"2"]


def test_a_broker_that_stays_away_is_an_error_at_the_timeout_that_says_why(publish_to):
    publisher = publish_to(f"amqp://guest:guest@{HOST}:{free_port()}//", timeout=0.1)
    began = monotonic()
    with pytest.raises(PublishTimeoutError, match="it was never sent") as caught:
        publisher.publish(1, "q")
    assert 0.1 <= monotonic() - began < AT_ONCE
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


# -- waiting ----------------------------------------------------------------------------------------


def test_a_message_that_is_not_confirmed_in_time_is_given_up(publish_to, peer):
    publisher = publish_to(peer, max_unconfirmed=1)
    with pytest.raises(PublishTimeoutError, match="may or may not have arrived"):
        publisher.publish(1, "q", timeout=0.05)
    waiting = run(publisher.publish, 2, "q")
    arrived(peer, 2)
    peer.send(frames.basic_ack(1, 1))  # too late, and nobody else's
    waiting.join(0.01)
    assert not waiting.ready()
    peer.send(frames.basic_ack(1, 2))
    assert waiting.get(timeout=SOON) is None


def test_a_message_that_nobody_waits_for_is_given_up_too(publisher, peer):
    short = publisher.publish_nowait(1, "q", timeout=0.02)
    long = publisher.publish_nowait(1, "q", timeout=0.04)
    wait_until(lambda: short.ready)
    assert not long.ready
    wait_until(lambda: long.ready)
    assert isinstance(long.error, PublishTimeoutError)


def test_publishing_waits_while_too_much_is_outstanding(publish_to, peer):
    publisher = publish_to(peer, max_unconfirmed=2)
    for n in range(2):
        publisher.publish_nowait(n, "q")
    third = run(publisher.publish_nowait, 2, "q")
    with pytest.raises(PublishTimeoutError, match="2 others are unconfirmed"):
        publisher.publish_nowait(3, "q", timeout=0.05)
    assert not third.ready()
    peer.send(frames.basic_ack(1, 1))
    assert third.get(timeout=SOON)
    arrived(peer, 3)
    assert bodies(peer) == [b"0", b"1", b"2"]


def test_publishing_waits_while_the_broker_blocks(publish_to, broker):
    publisher = publish_to(broker)
    publisher.publish(0, "q")
    broker.send(frames.blocked())
    wait_until(lambda: publisher._outbox._channel.blocked)
    waiting = run(publisher.publish, 1, "q")
    with pytest.raises(BlockedError, match="was not written in time"):
        publisher.publish(2, "q", timeout=0.05)
    assert not waiting.ready()
    broker.send(frames.unblocked())
    assert waiting.get(timeout=SOON) is None
    assert bodies(broker) == [b"0", b"1"]


def test_what_was_written_before_the_broker_blocked_says_so_too(publish_to, make_peer):
    peer = make_peer(answers={"body": frames.blocked()})
    with pytest.raises(BlockedError, match="not confirmed in time: it may or may not"):
        publish_to(peer).publish(1, "q", timeout=0.1)


def test_a_link_lost_while_the_broker_blocks_lets_publish_over_the_next(publish_to, broker):
    publisher = publish_to(broker)
    publisher.publish(0, "q")
    broker.send(frames.blocked())
    wait_until(lambda: publisher._outbox._channel.blocked)
    waiting = run(publisher.publish, 1, "q")
    waiting.join(0.01)
    broker.hang_up()
    assert waiting.get(timeout=SOON) is None


@pytest.mark.parametrize("where", ["confirm", "room", "blocked"])
def test_a_killed_greenlet_leaves_the_publisher_as_it_was(publish_to, peer, where):
    publisher = publish_to(peer, max_unconfirmed=2 if where == "room" else 3)
    publisher.publish_nowait(0, "q")
    publisher.publish_nowait(1, "q")
    arrived(peer, 2)
    if where == "blocked":
        peer.send(frames.blocked())
        wait_until(lambda: publisher._outbox._channel.blocked)
    waiting = gevent.spawn(publisher.publish, 2, "q")
    waiting.join(0.01)
    waiting.kill()
    answering(peer)
    peer.send(frames.unblocked() + frames.basic_ack(1, 3, multiple=True))
    wait_until(lambda: not publisher._outbox._outstanding)
    peer.answers["body"] = lambda frame: frames.basic_ack(1, 2**32, multiple=True)
    assert outcomes([run(publisher.publish, n, "q") for n in range(3)]) == [None] * 3


# -- flushing and closing ---------------------------------------------------------------------------


def test_flush_waits_for_all_that_is_outstanding(publisher, peer):
    for n in range(3):
        publisher.publish_nowait(n, "q")
    flushing = run(publisher.flush)
    arrived(peer, 3)
    peer.send(frames.basic_ack(1, 2, multiple=True))
    flushing.join(0.01)
    assert not flushing.ready()
    peer.send(frames.basic_ack(1, 3))
    assert flushing.get(timeout=SOON) is None
    publisher.flush(timeout=0)


def test_flush_ends_at_its_timeout_and_gives_nothing_up(publisher, peer):
    publications = [publisher.publish_nowait(n, "q") for n in range(2)]
    with pytest.raises(PublishTimeoutError, match="2 messages are not confirmed"):
        publisher.flush(timeout=0.02)
    arrived(peer, 2)
    peer.send(frames.basic_ack(1, 2, multiple=True))
    for publication in publications:
        publication.wait()


def test_a_failure_that_nobody_waited_for_is_raised_by_flush_once_and_logged_once(publisher, peer):
    with recording() as events:
        for n in range(5):
            publisher.publish_nowait(n, "q")
        arrived(peer, 5)
        peer.send(frames.basic_nack(1, 3, multiple=True) + frames.basic_ack(1, 5, multiple=True))
        with pytest.raises(PublishError, match=r"3 messages .* the first: .*nacked") as caught:
            publisher.flush()
        wait_until(lambda: of_type(events, PublishFailed))
    assert isinstance(caught.value.__cause__, NackedError)
    (event,) = of_type(events, PublishFailed)
    assert (event.uri, event.count) == (publisher.uri, 3)
    publisher.flush()


def test_a_failure_that_was_seen_is_not_told_again(publisher, peer):
    publications = [publisher.publish_nowait(n, "q") for n in range(2)]
    arrived(peer, 2)
    peer.send(frames.basic_nack(1, 2, multiple=True))
    for publication in publications:
        with pytest.raises(NackedError):
            publication.wait()
    publisher.flush()


def test_not_all_that_failed_is_kept_for_ever(publish_to, peer, monkeypatch):
    monkeypatch.setattr(outbox, "_MAX_UNSEEN", 3)
    publisher = publish_to(answering(peer, frames.basic_nack))
    for n in range(10):
        publisher.publish_nowait(n, "q")
    with pytest.raises(PublishError, match="3 messages"):
        publisher.flush()


def test_close_flushes_and_lets_go_of_the_link(publish_to, broker):
    publisher = publish_to(broker)
    for n in range(10):
        publisher.publish_nowait(n, "q")
    publisher.close()
    assert len(broker.published) == 10
    assert broker.names[-1] == "connection.close"
    publisher.close()
    with pytest.raises(StoppedError):
        publisher.publish(1, "q")


def test_close_fails_what_is_not_confirmed_in_time(publisher, peer):
    publication = publisher.publish_nowait(1, "q")
    arrived(peer, 1)
    with pytest.raises(PublishTimeoutError, match="1 messages"):
        publisher.close(timeout=0.02)
    assert isinstance(publication.error, UnconfirmedError)
    wait_until(lambda: peer.open_count == 0)


def test_leaving_a_with_block_closes_and_tells_what_failed(publish_to, peer):
    answering(peer, frames.basic_nack)

    def leave(error=None):
        with publish_to(peer) as publisher:
            publisher.publish_nowait(1, "q")
            if error:
                raise error

    with pytest.raises(PublishError, match="1 messages"):
        leave()
    with pytest.raises(LookupError):
        leave(LookupError())
    wait_until(lambda: peer.open_count == 0)


# -- stopping ---------------------------------------------------------------------------------------


def test_a_stop_ends_every_wait(publish_to, peer):
    publisher = publish_to(peer, max_unconfirmed=2, timeout=None)
    waits = [run(publisher.publish, n, "q") for n in range(4)]
    arrived(peer, 2)
    waits.append(run(publisher.flush))
    waits[-1].join(0.01)
    publisher.stop("deploy")
    first, second, third, fourth, flushed = outcomes(waits)
    for error in (first, second):
        assert isinstance(error, UnconfirmedError)
        assert isinstance(error.__cause__, StoppedError)
        assert "may or may not have arrived" in str(error)
    assert [str(third), str(fourth)] == ["stopped: deploy"] * 2
    assert flushed is None
    with pytest.raises(StoppedError):
        publisher.publish(1, "q")


@pytest.mark.parametrize("silent", ["connection.start-ok", "channel.open", "exchange.declare"])
def test_a_stop_ends_connecting_and_declaring(publish_to, make_peer, silent):
    """HAZARDS row 3."""
    peer = make_peer(silent={silent})
    publisher = publish_to(peer, timeout=None, exchange=Exchange("e"))
    waiting = run(publisher.publish, 1, "q")
    peer.wait_for(silent)
    publisher.stop()
    assert "it was never sent" in str(waiting.get(timeout=30))
    began = monotonic()
    publisher.close(timeout=NEVER)
    assert monotonic() - began < AT_ONCE


def test_a_stop_ends_the_wait_for_a_broker_that_blocks(publish_to, broker):
    publisher = publish_to(broker, timeout=None)
    publisher.publish(0, "q")
    broker.send(frames.blocked())
    wait_until(lambda: publisher._outbox._channel.blocked)
    waiting = run(publisher.publish, 1, "q")
    waiting.join(0.01)
    publisher.stop()
    assert isinstance(waiting.get(timeout=30), StoppedError)


def test_a_stop_may_come_from_a_thread_and_before_the_first_use(publish_to, peer):
    publisher = publish_to(peer)
    gevent.get_hub().threadpool.apply(publisher.stop)
    with pytest.raises(StoppedError):
        publisher.publish(1, "q")
    publisher.close()
    assert peer.connection_count == 0


def test_a_publisher_refuses_to_be_used_across_a_fork(publish_to, broker):
    """HAZARDS row 23."""
    publisher = publish_to(broker)
    publisher.publish(1, "q")
    pid = os.fork()
    if not pid:
        try:
            publisher.publish(2, "q")
        except ForkedError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    publisher.publish(3, "q")
    assert bodies(broker) == [b"1", b"3"]


def test_a_publisher_refuses_to_be_used_in_a_native_thread_that_is_not_its_own(publish_to, broker):
    """gevent only says that it would block for ever; this says whose it is, and what to do instead."""
    publisher = publish_to(broker)
    publisher.publish(1, "q")
    with pytest.raises(ForeignThreadError, match="make a Publisher in this thread"):
        gevent.get_hub().threadpool.apply(publisher.publish, (2, "q"))
    publisher.publish(3, "q")
    assert bodies(broker) == [b"1", b"3"]


def test_a_native_thread_may_have_a_publisher_of_its_own(broker):
    def publish():
        with Publisher(broker.url, timeout=SOON) as publisher:
            publisher.publish(1, "q")
        hub = gevent.get_hub()  # the thread's own: its link is closed when nothing is left to run
        hub.join(SOON)
        hub.destroy(destroy_loop=True)

    threads = ThreadPool(1)
    threads.apply(publish)
    threads.kill()
    assert bodies(broker) == [b"1"]


# -- links ------------------------------------------------------------------------------------------


def test_publishers_share_the_link_of_a_pool(publish_to, broker):
    links = LinkPool()
    publishers = [publish_to(broker, links=links) for _ in range(3)]
    for publisher in publishers:
        publisher.publish(1, "q")
    assert (broker.connection_count, links.open_count) == (1, 1)
    assert len({message.channel for message in broker.published}) == 3
    for publisher in publishers:
        publisher.close()
    wait_until(lambda: links.open_count == 0)


# -- other transports -------------------------------------------------------------------------------


@pytest.fixture
def memory_broker():
    """A memory broker, empty again afterwards."""
    yield "memory://"
    memory.Channel.queues.clear()
    memory.Transport.global_state.clear()


def taken(queue):
    registry.register()
    with Connection("memory://") as connection:
        channel = connection.default_channel
        return [m.payload for m in iter(lambda: channel.basic_get(queue, no_ack=True), None)]


def test_without_confirms_a_message_is_published_when_the_transport_has_it(
    publish_to, memory_broker
):
    orders = Exchange("orders", "topic")
    publisher = publish_to(memory_broker, exchange=orders)
    queue = Queue("q", orders, routing_key="new.#")
    publisher.publish({"n": 0}, "new.x", declare=[queue], compression="zlib", mandatory=True)
    assert taken("q") == [{"n": 0}]
    calls = [run(publisher.publish, {"n": n}, "new.x") for n in range(1, 50)]
    publication = publisher.publish_nowait({"n": 50}, "new.x")
    publisher.flush()
    assert publication.ready
    assert outcomes(calls) == [None] * 49
    assert taken("q") == [{"n": n} for n in (50, *range(1, 50))]


def test_without_confirms_a_lost_connection_is_made_again(publish_to, memory_broker, monkeypatch):
    failing = [RecoverableConnectionError("gone"), RecoverableConnectionError("gone")]
    publish = memory.Channel.publish_as_is

    def fail_first(channel, message, **options):
        if failing:
            raise failing.pop()
        return publish(channel, message, **options)

    monkeypatch.setattr(memory.Channel, "publish_as_is", fail_first)
    monkeypatch.setattr("greenconsume.links.backoff.FIRST_DELAY", 0.01)
    publisher = publish_to(memory_broker)
    publisher.publish(1, "q", declare=[Queue("q")])
    assert taken("q") == [1]
    failing.append(RecoverableConnectionError("gone"))
    with pytest.raises(UnconfirmedError, match="may or may not have arrived"):
        publisher.publish(2, "q", retry=False)


def test_without_confirms_an_error_is_that_of_the_message(publish_to, memory_broker, monkeypatch):
    failing = [ChannelError("refused"), LookupError("a bug")]
    publish = memory.Channel.publish_as_is

    def fail_first(channel, message, **options):
        if failing:
            raise failing.pop(0)
        return publish(channel, message, **options)

    monkeypatch.setattr(memory.Channel, "publish_as_is", fail_first)
    publisher = publish_to(memory_broker)
    with pytest.raises(RefusedError, match="refused"):
        publisher.publish(1, "q")
    with pytest.raises(PublishError, match="a bug"):
        publisher.publish(1, "q")
    publisher.publish(2, "q", declare=[Queue("q")])
    assert taken("q") == [2]


# -- arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "broker", "options"),
    [
        (UnsupportedTransportError, "no-such://", {}),
        (TypeError, 7, {}),
        (ValueError, "memory://", {"max_unconfirmed": 0}),
        (ValueError, "memory://", {"timeout": 0}),
        (ValueError, "memory://", {"max_retries": -1}),
        (ValueError, "memory://", {"max_unconfirmed": "9"}),
        (ValueError, "memory://", {"timeout": "2s"}),
        (ValueError, "memory://", {"max_retries": 1.5}),
        (TypeError, "memory://", {"links": 2}),
        (TypeError, "memory://", {"exchange": 3}),
        (TypeError, "memory://", {"around": [3]}),
        (TypeError, "memory://", {"around": 3}),
    ],
)
def test_wrong_arguments_are_refused_where_they_enter(error, broker, options):
    with pytest.raises(error):
        Publisher(broker, **options)


def test_the_address_shows_no_password(publish_to):
    assert publish_to("amqp://user:secret@host//").uri == "amqp://user:**@host:5672//"


def test_a_message_that_was_returned_in_a_life_that_ended_and_then_arrives_is_confirmed(
    publisher, peer
):
    publication = publisher.publish_nowait(1, "k", mandatory=True)
    (sent,) = arrived(peer, 1)
    address = {"exchange": sent.exchange, "routing_key": sent.routing_key}
    own = {"message_id": sent.properties["message_id"]}
    peer.send(frames.basic_return(sent.channel, sent.body, **address, **own))
    peer.send(frames.channel_close(sent.channel, 541, "INTERNAL_ERROR"))
    arrived(peer, 2)
    peer.send(frames.basic_ack(sent.channel, 1))
    assert publication.wait(30) is None


def test_a_declare_that_is_not_answered_fails_its_own_message_alone(make_peer):
    peer = make_peer(silent={"queue.declare"})
    connection = Connection(
        peer.url, transport_options={"call_timeout": 0.05, "close_timeout": 0.1}
    )
    publisher = Publisher(connection, timeout=SOON)
    first = publisher.publish_nowait("first", "k")
    arrived(peer, 1)
    declaring = publisher.publish_nowait("second", "k", declare=[Queue("q")])
    with pytest.raises(PublishTimeoutError, match="what it declares is not answered in time"):
        declaring.wait(30)
    third = publisher.publish_nowait("third", "k")
    arrived(peer, 2)
    peer.send(frames.basic_ack(1, 2, multiple=True))
    first.wait(30)
    third.wait(30)
    assert bodies(peer) == [b"first", b"third"]
    publisher.close()
