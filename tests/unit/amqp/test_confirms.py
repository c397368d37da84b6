"""Publishing against a scripted peer: confirms by tag, returns, back-pressure, whatever is lost."""

from __future__ import annotations

from collections import defaultdict
from time import monotonic

import amqp
import gevent
import pytest
from amqp.exceptions import (
    AMQPNotImplementedError,
    ChannelError,
    FrameSyntaxError,
    MessageNacked,
    NotFound,
    RecoverableConnectionError,
)
from gevent.event import Event
from gevent.monkey import get_original
from kombu import Exchange, Producer

from greenconsume.amqp.link import LinkLostError
from greenconsume.events import LinkDown
from greenconsume.stopping import StopSignal
from tests import frames
from tests.unit.fakes import of_type, recording, run
from tests.waiting import AT_ONCE, wait_until


@pytest.fixture
def channel(connect, peer):
    return connect(peer).channel()


def confirmed(channel, body=b"x", **options):
    """Publish with a confirm, in a greenlet."""
    return run(channel.basic_publish_confirm, amqp.Message(body), **options)


def waiting(calls):
    return [n for n, call in enumerate(calls, 1) if not call.ready()]


def check_waiting(calls, *expected):
    """These of the calls, counted from one, wait; the others have ended, or are about to."""
    wait_until(lambda: waiting(calls) == list(expected))
    gevent.joinall(calls, timeout=0.002)
    assert waiting(calls) == list(expected)


def block(seconds):
    """Keep the hub from running."""
    get_original("time", "sleep")(seconds)


def missing(channel_id=1):
    return frames.channel_close(channel_id, 404, "NOT_FOUND - no exchange 'e'", "basic.publish")


# -- without confirms ---------------------------------------------------------------------------------


def test_a_message_is_published_without_waiting(channel, peer):
    switched = []
    witness = gevent.spawn(switched.append, True)
    channel.basic_publish(
        amqp.Message(b"body", priority=3, application_headers={"h": [1, None]}), "e", "k"
    )
    assert switched == []
    peer.wait_for("body")
    (message,) = peer.published
    assert (message.exchange, message.routing_key, message.body) == ("e", "k", b"body")
    assert message.properties == {"priority": 3, "headers": {"h": [1, None]}}
    witness.join()


def test_bodies_of_many_greenlets_do_not_mix(connect, make_peer):
    peer = make_peer(frame_max=4096)
    channel = connect(peer).channel()
    bodies = [bytes([n]) * 10_000 for n in range(20)]
    calls = [run(channel.basic_publish, amqp.Message(body)) for body in bodies]
    gevent.joinall(calls)
    wait_until(lambda: len(peer.published) == 20)
    assert [message.body for message in peer.published] == bodies


def test_publishing_on_a_closed_channel_is_an_error(channel):
    channel.close()
    with pytest.raises(RecoverableConnectionError, match="connection closed"):
        channel.basic_publish(amqp.Message(b"x"))


def test_a_channel_error_is_raised_at_the_next_publish(channel, peer):
    channel.basic_publish(amqp.Message(b"x"), "e")
    peer.wait_for("body")
    peer.send(missing())
    peer.wait_for("channel.close-ok")
    with pytest.raises(NotFound, match="no exchange 'e'"):
        channel.basic_publish(amqp.Message(b"x"), "e")
    channel.basic_publish(amqp.Message(b"x"), "")
    wait_until(lambda: len(peer.published) == 2)
    assert peer.published[1].exchange == ""


@pytest.mark.parametrize(
    ("options", "properties"),
    [
        ({"routing_key": "k" * 256}, {}),
        ({"exchange": "e" * 256}, {}),
        ({}, {"correlation_id": "c" * 256}),
        ({}, {"application_headers": {"x": object()}}),
        ({}, {"application_headers": {"x" * 256: 1}}),
        ({}, {"application_headers": {"x": 2**70}}),
        ({}, {"application_headers": {"x": "y" * 131072}}),
        ({}, {"priority": 256}),
    ],
)
@pytest.mark.parametrize("confirm", [False, True])
def test_a_message_that_cannot_be_sent_is_an_error_here_and_harms_nobody(
    channel, peer, options, properties, confirm
):
    """Sent, it would end the link of everybody who shares it."""
    publish = channel.basic_publish_confirm if confirm else channel.basic_publish
    with pytest.raises(Exception, match=r".") as caught:
        publish(amqp.Message(b"x", **properties), **options)
    assert not isinstance(caught.value, (OSError, LinkLostError))
    peer.answers["body"] = frames.basic_ack(1, 1)
    channel.basic_publish_confirm(amqp.Message(b"next"))
    assert [message.body for message in peer.published] == [b"next"]


def test_properties_that_fit_no_frame_are_told_with_their_size(channel):
    message = amqp.Message(b"x", application_headers={"x": "y" * 131072})
    with pytest.raises(FrameSyntaxError, match=r"131\d\d\d bytes.*131072"):
        channel.basic_publish(message)


# -- confirms -----------------------------------------------------------------------------------------


def test_each_greenlet_waits_for_the_confirm_of_its_own_message(channel, peer):
    """HAZARDS.md row 18."""
    calls = [confirmed(channel) for _ in range(6)]
    peer.wait_for("body", 6)
    check_waiting(calls, 1, 2, 3, 4, 5, 6)
    peer.send(frames.basic_ack(1, 5))
    check_waiting(calls, 1, 2, 3, 4, 6)
    peer.send(frames.basic_nack(1, 2))
    check_waiting(calls, 1, 3, 4, 6)
    peer.send(frames.basic_ack(1, 4, multiple=True))
    check_waiting(calls, 6)
    peer.send(frames.basic_nack(1, 6, multiple=True))
    outcomes = [call.get(timeout=30) for call in calls]
    assert [type(outcome) for outcome in outcomes] == [
        type(None),
        MessageNacked,
        type(None),
        type(None),
        type(None),
        MessageNacked,
    ]


def test_an_ack_of_tag_zero_confirms_all(channel, peer):
    calls = [confirmed(channel) for _ in range(3)]
    peer.wait_for("body", 3)
    peer.send(frames.basic_ack(1, 0, multiple=True))
    check_waiting(calls)


def test_confirms_are_asked_for_once_and_without_a_round_trip(channel, peer):
    calls = [confirmed(channel) for _ in range(3)]
    peer.wait_for("body", 3)
    assert peer.names.count("confirm.select") == 1
    assert peer.frames("confirm.select")[0].args == [True]
    assert peer.names.index("confirm.select") < peer.names.index("basic.publish")
    peer.send(frames.basic_ack(1, 3, multiple=True))
    check_waiting(calls)


def test_messages_published_without_waiting_count_too(channel, peer):
    channel.confirm_select()
    channel.basic_publish(amqp.Message(b"1"))
    call = confirmed(channel)
    peer.wait_for("body", 2)
    peer.send(frames.basic_ack(1, 1))
    check_waiting([call], 1)
    peer.send(frames.basic_ack(1, 2))
    assert call.get(timeout=30) is None


def test_messages_published_before_confirms_were_asked_for_do_not_count(channel, peer):
    channel.basic_publish(amqp.Message(b"before"))
    call = confirmed(channel)
    peer.wait_for("body", 2)
    peer.send(frames.basic_ack(1, 1))
    assert call.get(timeout=30) is None


def test_waiting_for_a_confirm_ends_by_its_timeout_and_a_late_one_meets_nobody(channel, peer):
    begun = monotonic()
    with pytest.raises(TimeoutError):
        channel.basic_publish_confirm(amqp.Message(b"x"), confirm_timeout=0.02)
    assert monotonic() - begun < AT_ONCE
    call = confirmed(channel)
    peer.wait_for("body", 2)
    peer.send(frames.basic_ack(1, 1))
    check_waiting([call], 1)
    peer.send(frames.basic_ack(1, 2))
    assert call.get(timeout=30) is None


def test_a_gevent_timeout_around_a_confirmed_publish_leaves_the_channel_usable(channel, peer):
    """HAZARDS.md row 1."""
    with gevent.Timeout(0.01, False):
        channel.basic_publish_confirm(amqp.Message(b"x"))
    call = confirmed(channel)
    peer.wait_for("body", 2)
    peer.send(frames.basic_ack(1, 2, multiple=True))
    assert call.get(timeout=30) is None


def test_a_lost_link_wakes_who_waits_for_a_confirm(channel, peer):
    calls = [confirmed(channel) for _ in range(3)]
    peer.wait_for("body", 3)
    peer.hang_up()
    outcomes = [call.get(timeout=30) for call in calls]
    assert [type(outcome) for outcome in outcomes] == [LinkLostError] * 3
    assert "the broker closed the connection" in str(outcomes[0])


def test_a_channel_error_is_raised_at_all_who_wait_and_confirms_begin_anew(channel, peer):
    calls = [confirmed(channel, exchange="e") for _ in range(3)]
    peer.wait_for("body", 3)
    peer.send(frames.basic_ack(1, 1) + missing())
    outcomes = [call.get(timeout=30) for call in calls]
    assert [type(outcome) for outcome in outcomes] == [type(None), NotFound, NotFound]
    again = confirmed(channel)
    peer.wait_for("body", 4)
    peer.send(frames.basic_ack(1, 1))
    assert again.get(timeout=30) is None
    assert peer.names.count("confirm.select") == 2


def test_confirms_are_asked_for_again_after_an_error_that_nobody_waited_for(channel, peer):
    peer.answers["body"] = frames.basic_ack(1, 1)
    channel.basic_publish_confirm(amqp.Message(b"x"))
    peer.send(missing())
    peer.wait_for("channel.close-ok")
    with pytest.raises(NotFound):
        channel.basic_publish_confirm(amqp.Message(b"x"))
    channel.basic_publish_confirm(amqp.Message(b"x"), confirm_timeout=30)
    assert peer.names.count("confirm.select") == 2


def test_a_confirm_awaited_in_the_channels_next_life_is_not_lost_with_the_last(connect, make_peer):
    """Who publishes next may run before who waited in the channel's last life does; tags begin anew."""
    peer = make_peer(silent={"queue.declare"})
    connection = connect(peer)
    channel, other = connection.channel(), connection.channel()

    def declare_and_publish():
        other.queue_declare("q")
        channel.basic_publish_confirm(amqp.Message(b"second"), confirm_timeout=30)

    second = run(declare_and_publish)
    peer.wait_for("queue.declare")
    first = confirmed(channel)
    peer.wait_for("body")
    peer.send(frames.method_frame(2, "queue.declare-ok", "q", 0, 0) + missing())
    assert isinstance(first.get(timeout=30), NotFound)
    peer.wait_for("body", 2)
    peer.send(frames.basic_ack(1, 1))
    assert second.get(timeout=30) is None


def test_confirms_of_two_channels_do_not_mix(connect, peer):
    connection = connect(peer)
    calls = [confirmed(connection.channel()), confirmed(connection.channel())]
    peer.wait_for("body", 2)
    peer.send(frames.basic_ack(2, 1))
    check_waiting(calls, 1)
    peer.send(frames.basic_ack(1, 1))
    check_waiting(calls)


def test_a_hundred_greenlets_publish_confirmed_on_one_channel(channel, peer):
    """HAZARDS.md row 18."""
    published = defaultdict(int)

    def answer(frame):
        published[frame.channel] += 1
        tag = published[frame.channel]
        return b"" if tag % 3 else frames.basic_ack(frame.channel, tag, multiple=True)

    peer.answers["body"] = answer
    calls = [confirmed(channel, b"%d" % n) for n in range(99)]
    assert [call.get(timeout=30) for call in calls] == [None] * 99
    assert len(peer.published) == 99


# -- returned messages --------------------------------------------------------------------------------


def test_a_returned_message_is_raised_at_the_greenlet_that_published_it(channel, peer):
    """HAZARDS.md row 18."""
    keys = ["there", "nowhere", "there"]
    calls = [confirmed(channel, routing_key=key, mandatory=True) for key in keys]
    peer.wait_for("body", 3)
    peer.send(frames.basic_return(1, b"x", routing_key="nowhere"))
    check_waiting(calls, 1, 2, 3)  # its confirm follows
    peer.send(frames.basic_ack(1, 3, multiple=True))
    outcomes = [call.get(timeout=30) for call in calls]
    assert [type(outcome) for outcome in outcomes] == [type(None), ChannelError, type(None)]
    assert "NO_ROUTE" in str(outcomes[1])


def test_a_returned_message_is_never_taken_for_one_that_was_not_mandatory(channel, peer):
    calls = [confirmed(channel, mandatory=mandatory) for mandatory in (False, True)]
    peer.wait_for("body", 2)
    peer.send(frames.basic_return(1, b"x") + frames.basic_ack(1, 2, multiple=True))
    outcomes = [call.get(timeout=30) for call in calls]
    assert [type(outcome) for outcome in outcomes] == [type(None), ChannelError]


def test_a_returned_message_goes_to_who_listens_for_it(channel, peer):
    seen, go_on = [], Event()

    def on_return(exc, exchange, routing_key, message):
        seen.append((exc.reply_code, exchange, routing_key, message.body))
        go_on.wait(30)  # the reader must not wait for it

    channel.events["basic_return"].add(on_return)
    call = confirmed(channel, exchange="e", routing_key="k", mandatory=True)
    peer.wait_for("body")
    back = frames.basic_return(1, b"x", exchange="e", routing_key="k")
    peer.send(back + frames.basic_ack(1, 1))
    assert call.get(timeout=30) is None
    assert seen == [(312, "e", "k", b"x")]
    go_on.set()


def test_a_returned_message_that_nobody_waits_for_is_raised_at_the_next_use(channel, peer):
    channel.basic_publish(amqp.Message(b"x"), mandatory=True)
    peer.wait_for("body")
    peer.send(frames.basic_return(1, b"x") + frames.basic_ack(9, 1))
    wait_until(lambda: channel._calls.untold is not None)
    with pytest.raises(ChannelError, match="NO_ROUTE"):
        channel.queue_declare("q")
    assert channel.queue_declare("q").queue == "q"


def test_who_listens_for_confirms_may_wait_or_fail(channel, peer):
    seen = []
    channel.events["basic_ack"].add(lambda tag, multiple: seen.append(("ack", tag, multiple)))
    channel.events["basic_nack"].add(lambda tag, multiple: seen.append(("nack", tag, multiple)))
    channel.confirm_select()
    channel.basic_publish(amqp.Message(b"x"))
    peer.send(frames.basic_ack(1, 1) + frames.basic_nack(1, 3, multiple=True))
    wait_until(lambda: len(seen) == 2)
    assert seen == [("ack", 1, False), ("nack", 3, True)]


# -- kombu's producer ---------------------------------------------------------------------------------


def test_kombus_producer_confirms_from_many_greenlets_on_one_channel(connect, peer):
    """HAZARDS.md row 18."""
    producer = Producer(
        connect(peer, confirm_publish=True).channel(), Exchange("e"), auto_declare=False
    )
    calls = [run(producer.publish, {"n": n}, routing_key=str(n)) for n in range(3)]
    peer.wait_for("body", 3)
    peer.send(frames.basic_ack(1, 3))
    check_waiting(calls, 1, 2)
    peer.send(frames.basic_ack(1, 2, multiple=True))
    check_waiting(calls)
    assert [message.body for message in peer.published] == [b'{"n": 0}', b'{"n": 1}', b'{"n": 2}']


def test_kombus_producer_is_told_of_returned_messages(connect, peer):
    returned = []
    producer = Producer(connect(peer).channel(), on_return=lambda *args: returned.append(args[1:3]))
    producer.publish({}, routing_key="k", mandatory=True)
    peer.wait_for("body")
    peer.send(frames.basic_return(1, b"{}", routing_key="k"))
    wait_until(lambda: returned == [("", "k")])


def test_kombus_producer_publishes_again_on_a_new_link(connect, peer):
    connection = connect(peer, confirm_publish=True)
    producer = Producer(connection)

    def answer(frame):
        if peer.connection_count == 1:
            peer.hang_up()
            return b""
        return frames.basic_ack(frame.channel, 1)

    peer.answers["body"] = answer
    producer.publish({"n": 1}, routing_key="k", retry=True, retry_policy={"max_retries": 3})
    assert peer.connection_count == 2
    assert [message.body for message in peer.published] == [b'{"n": 1}', b'{"n": 1}']


# -- back-pressure ------------------------------------------------------------------------------------


def test_publishing_waits_while_the_broker_blocks_and_ends_by_its_timeout(channel, peer):
    link = channel.connection.link
    peer.send(frames.blocked("memory"))
    wait_until(lambda: link.blocked)
    patient = [run(channel.basic_publish, amqp.Message(b"1")), confirmed(channel, b"2")]
    with pytest.raises(RecoverableConnectionError, match="timed out: the broker blocks publishers"):
        channel.basic_publish(amqp.Message(b"3"), timeout=0.02)
    with pytest.raises(RecoverableConnectionError, match="timed out: the broker blocks publishers"):
        channel.basic_publish_confirm(amqp.Message(b"4"), timeout=0.02)
    check_waiting(patient, 1, 2)
    assert peer.published == []
    peer.answers["body"] = lambda frame: frames.basic_ack(1, 9, multiple=True)
    peer.send(frames.unblocked())
    assert [call.get(timeout=30) for call in patient] == [None, None]
    assert sorted(message.body for message in peer.published) == [b"1", b"2"]


def test_a_consumers_acks_and_calls_go_on_while_publishing_is_blocked(connect, peer):
    connection, got = connect(peer), []
    channel = connection.channel()
    channel.basic_consume("q", consumer_tag="t", callback=got.append)
    peer.send(frames.blocked("memory"))
    wait_until(lambda: connection.connection.link.blocked)
    publish = run(channel.basic_publish, amqp.Message(b"x"))
    peer.deliver(1, "t", 1)
    connection.drain_events(timeout=30)
    channel.basic_ack(1)
    assert channel.queue_declare("q").queue == "q"
    peer.wait_for("basic.ack")
    assert not publish.ready()
    peer.send(frames.unblocked())
    assert publish.get(timeout=30) is None


def test_a_channel_that_broke_while_publishing_was_blocked_still_confirms(connect, make_peer):
    """Its next life knows nothing of the confirm mode of its last."""
    peer = make_peer(silent={"queue.declare"})
    channel = connect(peer).channel()
    peer.send(frames.blocked("memory"))
    wait_until(lambda: channel.connection.link.blocked)
    publish = run(channel.basic_publish_confirm, amqp.Message(b"x"), confirm_timeout=30)
    call = run(channel.queue_declare, "gone")
    peer.wait_for("queue.declare")
    peer.send(missing())
    assert isinstance(call.get(timeout=30), NotFound)
    peer.answers["body"] = frames.basic_ack(1, 1)
    peer.send(frames.unblocked())
    assert publish.get(timeout=30) is None
    assert peer.names[-4:] == ["confirm.select", "basic.publish", "header", "body"]


def test_a_link_that_is_lost_while_publishing_is_blocked_says_so(channel, peer):
    with recording() as events:
        peer.send(frames.blocked("memory"))
        wait_until(lambda: channel.connection.link.blocked)
        publish = run(channel.basic_publish, amqp.Message(b"x"))
        check_waiting([publish], 1)
        peer.hang_up()
        assert isinstance(publish.get(timeout=30), LinkLostError)
    assert len(of_type(events, LinkDown)) == 1


def test_a_confirm_of_the_life_that_ended_confirms_nothing_of_the_next(connect, make_peer):
    peer = make_peer()
    channel = connect(peer).channel()
    first = confirmed(channel)
    peer.wait_for("body")
    peer.silent.add("channel.open")
    peer.send(missing())
    assert isinstance(first.get(timeout=30), NotFound)
    second = confirmed(channel)
    peer.wait_for("body", 2)
    peer.send(frames.basic_ack(1, 1))  # on its way when the channel was closed
    check_waiting([second], 1)
    peer.send(frames.method_frame(1, "channel.open-ok", b"") + frames.basic_ack(1, 1))
    assert second.get(timeout=30) is None


def test_asking_for_confirms_again_goes_on_counting(channel, peer):
    first = confirmed(channel)
    peer.wait_for("body")
    peer.send(frames.basic_ack(1, 1))
    assert first.get(timeout=30) is None
    channel.confirm_select()
    second = confirmed(channel)
    peer.wait_for("body", 2)
    peer.send(frames.basic_ack(1, 2))
    assert second.get(timeout=30) is None


def test_a_stop_in_the_turn_of_the_timeout_is_no_confirm(connect, peer):
    connection = connect(peer)
    channel, stop = connection.channel(), StopSignal()
    connection.connection.begin_publishing(stop)
    call = confirmed(channel, confirm_timeout=0.05)
    peer.wait_for("body")
    timer = gevent.get_hub().loop.timer(0.03)
    timer.start(stop.set)
    block(0.1)  # as a handler that computes: both are due when it ends
    assert isinstance(call.get(timeout=30), TimeoutError)
    timer.close()


def test_a_return_whose_publisher_gave_up_meets_nobody_else(channel, peer):
    with pytest.raises(TimeoutError):
        channel.basic_publish_confirm(
            amqp.Message(b"1"), "e", "k", mandatory=True, confirm_timeout=0.02
        )
    peer.send(frames.basic_return(1, b"1", exchange="e", routing_key="k") + frames.basic_ack(1, 1))
    channel.connection.channel()  # all of this was read when it is open
    call = confirmed(channel)
    peer.wait_for("body", 2)
    peer.send(frames.basic_ack(1, 2))
    assert call.get(timeout=30) is None


IMMEDIATE = frames.connection_close(540, "NOT_IMPLEMENTED - immediate=true", (60, 40))


def test_the_only_publish_on_its_way_is_told_why_the_broker_closed_the_connection(channel, peer):
    """As with py-amqp; a lost link would be tried again for ever."""
    call = confirmed(channel, immediate=True)
    peer.wait_for("body")
    peer.send(IMMEDIATE)
    assert isinstance(call.get(timeout=30), AMQPNotImplementedError)


def test_of_several_on_their_way_each_is_told_of_a_lost_link(channel, peer):
    calls = [confirmed(channel, immediate=n == 1) for n in range(3)]
    peer.wait_for("body", 3)
    peer.send(IMMEDIATE)
    assert {type(call.get(timeout=30)) for call in calls} == {LinkLostError}


@pytest.mark.parametrize(
    "close",
    [
        IMMEDIATE,  # it did not ask for that: somebody did who awaits no confirm
        frames.connection_close(320, "CONNECTION_FORCED - shutdown"),
        frames.connection_close(503, "COMMAND_INVALID - unknown exchange type", (40, 10)),
    ],
)
def test_what_another_method_was_closed_for_is_a_lost_link(channel, peer, close):
    call = confirmed(channel)
    peer.wait_for("body")
    peer.send(close)
    assert isinstance(call.get(timeout=30), LinkLostError)
