"""A session against a scripted peer: draining, stopping at any byte, pausing, sharing a link, closing."""

from __future__ import annotations

import socket
from collections import Counter
from time import monotonic, process_time

import amqp
import gevent
import pytest
from amqp.exceptions import ConnectionForced, NotFound, RecoverableConnectionError
from gevent.event import Event
from kombu import Connection

from greenconsume.amqp.inbox import PAUSE_AT, RESUME_AT
from greenconsume.amqp.link import LinkLostError
from greenconsume.amqp.session import Session
from greenconsume.errors import StoppedError
from greenconsume.events import LinkDown
from greenconsume.stopping import StopSignal
from greenconsume.transports import registry
from tests import frames
from tests.unit.fakes import of_type, recording
from tests.waiting import AT_ONCE, NEVER, wait_until

TAG = "t"


@pytest.fixture
def share(connect):
    """Give further sessions on the link of a connection."""
    sessions = []

    def session_on(connection):
        sessions.append(Session(connection.connection.link, connection))
        return sessions[-1]

    yield session_on
    for session in sessions:
        session.collect()


def consuming(connection, callback, queue="q", tag=TAG, **options):
    """A channel that consumes; `callback` is called with py-amqp's message."""
    channel = connection.channel()
    channel.basic_consume(queue, consumer_tag=tag, callback=callback, **options)
    return channel


def draining(connection, stop):
    """A greenlet that drains until it is stopped."""

    def drain():
        try:
            while True:
                connection.drain_events(stop=stop)
        except StoppedError:
            pass

    return gevent.spawn(drain)


def settled(peer):
    """Return what became of each delivery, by channel and tag, however the settles were merged."""
    delivered, found = Counter(), {}
    for frame in peer.received:
        if frame.name in ("basic.ack", "basic.reject", "basic.nack"):
            tag, flags = frame.args[0], frame.args[1:]
            multiple = frame.name != "basic.reject" and flags[0]
            first = delivered[frame.channel] + 1 if multiple else tag
            for each in range(first, tag + 1):
                found.setdefault((frame.channel, each), []).append(frame.name)
            delivered[frame.channel] = max(delivered[frame.channel], tag) if multiple else 0
    return found


# -- draining -----------------------------------------------------------------------------------------


def test_a_delivery_is_handed_to_its_callback(connect, peer):
    connection, got = connect(peer), []
    consuming(connection, got.append)
    peer.deliver(1, TAG, 7, b'{"n": 1}', exchange="e", routing_key="k", redelivered=True)
    connection.drain_events(timeout=30)
    (message,) = got
    assert message.body == '{"n": 1}'
    assert message.delivery_info == {
        "consumer_tag": TAG,
        "delivery_tag": 7,
        "redelivered": True,
        "exchange": "e",
        "routing_key": "k",
    }


def test_each_drain_hands_out_one_message_in_the_order_they_came(connect, peer):
    connection, got = connect(peer), []
    consuming(connection, got.append)
    peer.send(b"".join(frames.deliver(1, TAG, n, b"%d" % n) for n in range(1, 6)))
    for handed_out in range(1, 6):
        connection.drain_events(timeout=30)
        assert [message.delivery_tag for message in got] == list(range(1, handed_out + 1))


def test_a_drain_times_out_when_nothing_comes(connect, peer):
    connection = connect(peer)
    begun = monotonic()
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0.03)
    assert 0.025 < monotonic() - begun < AT_ONCE


def test_heartbeats_and_part_frames_do_not_extend_a_drain(connect, peer):
    """HAZARDS.md row 4."""
    connection = connect(peer)
    consuming(connection, lambda message: None)
    slow = frames.deliver(1, TAG, 1, bytes(40_000))  # comes in more than a minute

    def trickle():
        for n in range(0, len(slow), 2):
            peer.send(frames.heartbeat() if n < 20 else slow[n - 20 : n - 18])
            Event().wait(0.004)

    trickling = gevent.spawn(trickle)
    begun = monotonic()
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0.06)
    assert monotonic() - begun < AT_ONCE
    trickling.kill()


def test_a_drain_with_no_time_hands_out_what_is_there_and_else_times_out_at_once(connect, peer):
    connection, got = connect(peer), []
    consuming(connection, got.append)
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0)
    peer.deliver(1, TAG, 1)
    wait_until(lambda: connection.connection.backlog)
    connection.drain_events(timeout=0)
    assert len(got) == 1


def test_looping_over_a_drain_with_no_time_does_not_freeze_the_hub(connect, peer):
    """HAZARDS.md row 7: py-amqp's drain with no time spins on half a frame."""
    connection, got = connect(peer), []
    consuming(connection, got.append)
    whole = frames.deliver(1, TAG, 1, bytes(500))
    peer.send(whole[:100])
    rest = gevent.spawn_later(0.01, peer.send, whole[100:])
    deadline = monotonic() + 2
    while not got and monotonic() < deadline:
        try:
            connection.drain_events(timeout=0)
        except socket.timeout:
            pass
    assert len(got) == 1
    rest.get()


def test_a_busy_session_lets_the_hub_breathe(connect, peer):
    connection = connect(peer)
    consuming(connection, lambda message: None)
    peer.send(b"".join(frames.deliver(1, TAG, n) for n in range(1, 3001)))
    wait_until(lambda: connection.connection.backlog == 3000)
    gaps, last, over = [], monotonic(), Event()

    def tick():
        nonlocal last
        while not over.is_set():
            gevent.sleep(0)
            gaps.append(monotonic() - last)
            last = monotonic()

    ticking = gevent.spawn(tick)
    begun = process_time()  # not what the machine spends on others
    for _ in range(3000):
        connection.drain_events(timeout=30)
    seconds = process_time() - begun
    over.set()
    ticking.get()
    assert len(gaps) > seconds / 0.02  # every 2 ms, on a machine that is much slower than that


def test_many_greenlets_drain_one_session_and_no_message_comes_twice(connect, peer):
    """HAZARDS.md row 6."""
    connection, got, stop = connect(peer), [], StopSignal()

    def callback(message):
        got.append((message.delivery_tag, gevent.getcurrent()))
        Event().wait(0.001)

    consuming(connection, callback)
    drainers = [draining(connection, stop) for _ in range(5)]
    gevent.idle()
    for n in range(1, 51):
        peer.deliver(1, TAG, n)
    wait_until(lambda: len(got) >= 50)
    stop.set()
    gevent.joinall(drainers, timeout=30, raise_error=True)
    assert sorted(tag for tag, _ in got) == list(range(1, 51))
    assert len({greenlet for _, greenlet in got}) == 5


def test_what_a_callback_raises_is_raised_by_the_drain_and_harms_nothing(connect, peer):
    connection = connect(peer)
    got = []

    def callback(message):
        got.append(message.delivery_tag)
        if len(got) == 1:
            raise KeyError("mine")

    consuming(connection, callback)
    peer.send(frames.deliver(1, TAG, 1) + frames.deliver(1, TAG, 2))
    with pytest.raises(KeyError, match="mine"):
        connection.drain_events(timeout=30)
    connection.drain_events(timeout=30)
    assert got == [1, 2]


# -- stopping -----------------------------------------------------------------------------------------


def test_a_stop_wakes_a_drain_at_once(connect, peer):
    connection, stop = connect(peer), StopSignal()
    drainer = gevent.spawn(connection.drain_events, stop=stop, timeout=60)
    gevent.idle()
    begun = monotonic()
    stop.set("enough")
    with pytest.raises(StoppedError, match="enough"):
        drainer.get(timeout=30)
    assert monotonic() - begun < AT_ONCE


def test_a_stop_from_a_foreign_thread_wakes_a_drain(connect, peer):
    connection, stop = connect(peer), StopSignal()
    drainer = draining(connection, stop)
    gevent.idle()
    gevent.get_hub().threadpool.apply(stop.set)
    drainer.get(timeout=30)


def test_nothing_is_handed_out_once_stop_is_set(connect, peer):
    """HAZARDS.md row 17."""
    connection, stop, got = connect(peer), StopSignal(), []
    consuming(connection, got.append)
    peer.deliver(1, TAG, 1)
    wait_until(lambda: connection.connection.backlog)
    stop.set()
    with pytest.raises(StoppedError):
        connection.drain_events(stop=stop)
    assert got == []


def test_a_stop_wakes_every_drainer_though_one_of_them_has_left(connect, peer):
    connection, stop = connect(peer), StopSignal()
    patient = draining(connection, stop)
    gevent.idle()
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0.005, stop=stop)
    stop.set()
    patient.get(timeout=30)


def test_a_stop_tells_the_broker_and_gives_back_what_was_not_started(connect, peer):
    connection, started, go_on, stop = connect(peer), Event(), Event(), StopSignal()

    def callback(message):
        started.set()
        go_on.wait(30)
        message.channel.basic_ack(message.delivery_tag)

    consuming(connection, callback)
    stop.link(connection.connection.announce_stop)
    drainer = draining(connection, stop)
    peer.send(b"".join(frames.deliver(1, TAG, n) for n in (1, 2, 3)))
    assert started.wait(30)
    wait_until(lambda: connection.connection.backlog == 2)
    stop.set()
    wait_until(lambda: len(settled(peer)) == 2)
    assert peer.frames("basic.cancel")[0].args == [TAG, True]
    assert set(settled(peer)) == {(1, 2), (1, 3)}
    assert "basic.ack" not in peer.names
    go_on.set()
    drainer.get(timeout=30)
    peer.wait_for("basic.ack")
    assert settled(peer)[1, 1] == ["basic.ack"]


def test_the_broker_is_told_to_send_no_more_before_it_gets_messages_back(connect, peer):
    """The other way round it would send them again, to the consumer that is about to leave."""
    connection = connect(peer)
    for n in (1, 2):
        consuming(connection, lambda message: None, tag=f"t{n}")
        peer.deliver(n, f"t{n}", 1)
    wait_until(lambda: connection.connection.backlog == 2)
    connection.connection.announce_stop()
    peer.wait_for("basic.nack", 2)
    names = [name for name in peer.names if name in ("basic.cancel", "basic.nack")]
    assert names == ["basic.cancel", "basic.cancel", "basic.nack", "basic.nack"]


def positions(data, dense=400, stride=61):
    """Every place to cut at near both ends, and some between."""
    return sorted({*range(min(dense, len(data) + 1)), *range(0, len(data), stride), len(data)})


class Stoppable:
    """A consumer that acks what it handles, and knows whether it was stopped before."""

    def __init__(self, connection):
        self.stop = StopSignal()
        self.handled = []
        self.late = []
        self.channel = consuming(connection, self.handle)
        session = connection.connection
        self.stop.link(session.announce_stop)
        self.greenlet = gevent.spawn(self.run, connection)

    def run(self, connection):
        try:
            while True:
                connection.drain_events(stop=self.stop)
        except StoppedError:
            pass
        connection.close()

    def handle(self, message):
        (self.late if self.stop.is_set() else self.handled).append(message.delivery_tag)
        self.channel.basic_ack(message.delivery_tag)


def stop_at(connect, peer, data, cut, rest_comes=True, **options):
    """Send a delivery up to a byte, stop, send the rest; return the consumer and its settles."""
    del peer.received[:]
    connection = connect(peer, **{"close_timeout": NEVER, **options})
    consumer, link = Stoppable(connection), connection.connection.link
    sent_at = monotonic()
    peer.send(data[:cut])
    wait_until(lambda: link.last_read >= sent_at or not cut)
    if cut == len(data):
        wait_until(lambda: consumer.handled)
    consumer.stop.set()
    if rest_comes:
        peer.send(data[cut:])
    begun = monotonic()
    consumer.greenlet.get(timeout=30)
    assert monotonic() - begun < AT_ONCE
    wait_until(lambda: peer.open_count == 0)
    return consumer, settled(peer)


def check_stopped(consumer, outcome, peer):
    assert consumer.late == []
    assert peer.names.count("basic.ack") == len(consumer.handled)
    if consumer.handled:
        assert outcome == {(1, 1): ["basic.ack"]}
    else:
        assert outcome in ({}, {(1, 1): ["basic.nack"]})


@pytest.mark.parametrize("body", [b"{}", b""])
def test_a_stop_at_every_byte_of_a_delivery_ends_clean(connect, peer, body):
    data = frames.deliver(1, TAG, 1, body, exchange="e", routing_key="k")
    handled = 0
    for cut in range(len(data) + 1):
        consumer, outcome = stop_at(connect, peer, data, cut)
        check_stopped(consumer, outcome, peer)
        assert peer.names[-1] == "connection.close"
        handled += len(consumer.handled)
    assert handled == 1  # where it was there in whole


def test_a_stop_at_every_byte_of_a_delivery_of_two_frames_ends_clean(connect, make_peer):
    peer = make_peer(frame_max=4096)
    data = frames.deliver(1, TAG, 1, bytes(4096), frame_max=4096, content_encoding="binary")
    for cut in positions(data, dense=150, stride=97):
        consumer, outcome = stop_at(connect, peer, data, cut)
        check_stopped(consumer, outcome, peer)
        assert peer.names[-1] == "connection.close"


def test_a_stop_at_every_byte_where_the_rest_never_comes_is_bounded(connect, peer):
    data = frames.deliver(1, TAG, 1, b"{}")
    for cut in range(0, len(data), 5):
        consumer, outcome = stop_at(connect, peer, data, cut, rest_comes=False, close_timeout=0.02)
        check_stopped(consumer, outcome, peer)


def test_a_stop_at_every_byte_of_a_delivery_behind_its_consume_ok_ends_clean(connect, make_peer):
    ok = frames.method_frame(1, "basic.consume-ok", TAG)
    data = ok + frames.deliver(1, TAG, 1, b"{}")
    for cut in range(len(ok), len(data) + 1):
        peer = make_peer(answers={"basic.consume": data[:cut]})
        consumer = Stoppable(connect(peer))
        gevent.idle()
        consumer.stop.set()
        peer.send(data[cut:])
        consumer.greenlet.get(timeout=30)
        check_stopped(consumer, settled(peer), peer)


def test_a_stop_while_the_consume_ok_is_cut_ends_the_call(connect, make_peer):
    ok = frames.method_frame(1, "basic.consume-ok", TAG)
    data = ok + frames.deliver(1, TAG, 1, b"{}")
    for cut in range(len(ok)):
        peer = make_peer(answers={"basic.consume": data[:cut]})
        connection, stop, got = connect(peer), StopSignal(), []
        connection.connection.begin_setup(stop)
        setting_up = gevent.spawn(consuming, connection, got.append)
        peer.wait_for("basic.consume")
        stop.set()
        with pytest.raises(StoppedError):
            setting_up.get(timeout=30)
        peer.send(data[cut:])
        connection.close()
        assert got == []
        assert "basic.ack" not in peer.names


def test_a_consumer_that_is_set_up_waits_for_no_answer_but_those_it_needs(connect, make_peer):
    peer = make_peer(silent=("channel.open", "basic.qos"))
    connection = connect(peer)
    connection.connection.begin_setup(StopSignal())
    channel = connection.channel()
    channel.basic_qos(0, 10, False)
    setting_up = gevent.spawn(channel.basic_consume, "q", TAG)
    peer.wait_for("basic.consume")
    assert [name for name in peer.names if name in ("channel.open", "basic.qos")] == [
        "channel.open",
        "basic.qos",
    ]
    setting_up.kill()
    channel.collect()


def test_a_channel_that_cannot_be_opened_while_a_consumer_is_set_up_fails_its_next_call(
    connect, make_peer
):
    close = frames.method_frame(1, "channel.close", 404, "NOT_FOUND", 0, 0)
    peer = make_peer(answers={"channel.open": close})
    connection = connect(peer)
    connection.connection.begin_setup(StopSignal())
    channel = connection.channel()
    with pytest.raises(NotFound):
        channel.queue_declare("q")
    peer.wait_for("channel.close-ok")


# -- what is cut short --------------------------------------------------------------------------------


def test_a_gevent_timeout_around_a_drain_leaves_the_connection_usable(connect, peer):
    """HAZARDS.md row 1: in py-amqp it loses the half of the frame that was read."""
    connection, got = connect(peer), []
    consuming(connection, got.append)
    data = frames.deliver(1, TAG, 1, b"whole")
    for n in range(0, len(data), 9):
        peer.send(data[n : n + 9])
        if n + 9 < len(data):
            with gevent.Timeout(0.002, False):
                connection.drain_events()
    connection.drain_events(timeout=30)
    assert [message.body for message in got] == ["whole"]


def test_kills_of_draining_greenlets_leave_the_connection_usable(connect, peer):
    """HAZARDS.md row 1: 92 of 300 kills wedged a connection of py-amqp's."""
    connection, got = connect(peer), []
    consuming(connection, lambda message: got.append(message.delivery_tag))
    data = b"".join(frames.deliver(1, TAG, n, b"x" * n) for n in range(1, 101))
    size = -(-len(data) // 300)
    for n in range(0, len(data), size):
        drainer = gevent.spawn(connection.drain_events)
        gevent.idle()
        peer.send(data[n : n + size])
        gevent.sleep(0)
        drainer.kill()
    while len(got) < 100:
        connection.drain_events(timeout=30)
    assert got == list(range(1, 101))


def test_the_time_that_a_drain_has_is_not_that_of_a_write(connect, peer):
    """HAZARDS.md row 8: py-amqp sets the timeout of the socket, and cuts a frame in two."""
    connection = connect(peer)
    channel, stop = connection.channel(), StopSignal()

    def drain():
        while not stop.is_set():
            with pytest.raises(socket.timeout):
                connection.drain_events(timeout=0.0005)

    draining = gevent.spawn(drain)
    body = bytes(range(256)) * 40_000
    channel.basic_publish(amqp.Message(body, content_encoding="binary"))
    channel.queue_declare("behind it")
    stop.set()
    draining.get(timeout=30)
    assert [message.body for message in peer.published] == [body]


def test_a_gevent_timeout_around_a_call_leaves_the_connection_usable(connect, make_peer):
    """HAZARDS.md row 1."""
    peer = make_peer(silent={"queue.declare"})
    channel = connect(peer).channel()
    with pytest.raises(gevent.Timeout):
        with gevent.Timeout(0.01):
            channel.queue_declare("late")
    answer = frames.method_frame(1, "queue.declare-ok", "late", 11, 0)
    peer.silent.clear()
    peer.send(answer)
    assert channel.queue_declare("next").queue == "next"


# -- errors -------------------------------------------------------------------------------------------


def test_a_lost_link_wakes_everything_that_waits_and_says_why(connect, make_peer):
    peer = make_peer(silent={"queue.declare"})
    connection = connect(peer)
    session = connection.connection
    channels = [connection.channel() for _ in range(3)]
    waiting = [gevent.spawn(channel.queue_declare, "q") for channel in channels]
    waiting += [gevent.spawn(session.drain_events) for _ in range(2)]
    peer.wait_for("queue.declare", 3)
    peer.send(frames.connection_close(320, "CONNECTION_FORCED - the broker goes down"))
    for greenlet in waiting:
        with pytest.raises(LinkLostError, match="the broker goes down") as caught:
            greenlet.get(timeout=30)
        assert isinstance(caught.value.__cause__, ConnectionForced)
    for use in (session.drain_events, session.channel, session.heartbeat_tick):
        with pytest.raises(LinkLostError, match="the broker goes down"):
            use()


def test_what_was_not_started_when_the_link_was_lost_is_not_handed_out(connect, peer):
    connection, got = connect(peer), []
    consuming(connection, got.append)
    peer.send(frames.deliver(1, TAG, 1) + frames.deliver(1, TAG, 2))
    session = connection.connection
    wait_until(lambda: session.backlog == 2)
    peer.hang_up()
    wait_until(lambda: not session.connected)
    with pytest.raises(LinkLostError):
        session.drain_events(timeout=30)
    assert got == []


def test_what_was_delivered_without_acks_is_handed_out_though_the_link_was_lost(connect, peer):
    """The broker forgot it when it sent it."""
    connection, got = connect(peer), []
    consuming(connection, got.append, no_ack=True)
    peer.send(frames.deliver(1, TAG, 1) + frames.deliver(1, TAG, 2))
    session = connection.connection
    wait_until(lambda: session.backlog == 2)
    peer.hang_up()
    wait_until(lambda: not session.connected)
    session.drain_events(timeout=30)
    session.drain_events(timeout=30)
    assert [message.delivery_tag for message in got] == [1, 2]
    with pytest.raises(LinkLostError):
        session.drain_events(timeout=30)


def test_a_link_lost_between_two_drains_is_told_before_kombu_opens_another(connect, peer):
    """Else the next one would wait on a connection that consumes nothing, for ever."""
    connection = connect(peer)
    consuming(connection, print)
    session = connection.connection
    peer.send(frames.connection_close(320, "CONNECTION_FORCED - the broker goes down"))
    wait_until(lambda: not session.connected)
    with pytest.raises(LinkLostError, match="the broker goes down"):
        connection.drain_events(timeout=30)
    assert not connection.connected
    assert connection.channel().queue_declare("q").queue == "q"
    assert peer.connection_count == 2


def test_what_came_without_acks_before_the_link_was_lost_is_drained_by_kombu(connect, peer):
    connection, got = connect(peer), []
    consuming(connection, got.append, no_ack=True)
    peer.send(frames.deliver(1, TAG, 1))
    session = connection.connection
    wait_until(lambda: session.backlog == 1)
    peer.hang_up()
    wait_until(lambda: not session.connected)
    connection.drain_events(timeout=30)
    assert [message.delivery_tag for message in got] == [1]
    with pytest.raises(LinkLostError):
        connection.drain_events(timeout=30)


def test_a_channel_error_reaches_no_other_channel_and_no_other_session(connect, peer, share):
    connection = connect(peer)
    other = share(connection)
    got = []
    neighbours = [connection.channel(), other.channel()]
    for channel in neighbours:
        tag = f"t{channel.channel_id}"
        channel.basic_consume("q", consumer_tag=tag, callback=got.append)
    failing = connection.channel()
    failing.basic_consume("q", consumer_tag=TAG, callback=got.append)
    peer.send(frames.channel_close(failing.channel_id, 404, "NOT_FOUND - no queue"))
    with pytest.raises(NotFound):
        connection.drain_events(timeout=30)
    peer.wait_for("channel.close-ok")
    for channel in neighbours:
        peer.deliver(channel.channel_id, f"t{channel.channel_id}", 1)
    connection.drain_events(timeout=30)
    other.drain_events(timeout=30)
    assert len(got) == 2
    assert connection.connected


# -- pausing ------------------------------------------------------------------------------------------


def flooded(connect, peer, count=PAUSE_AT + 5, declare=None, **options):
    """A consumer without a limit of its own that was sent more than it handles."""
    connection, got = connect(peer), []
    channel = connection.channel()
    declare = {"durable": True, "auto_delete": False} if declare is None else declare
    channel.queue_declare("q", **declare)
    channel.basic_consume("q", consumer_tag=TAG, callback=got.append, **options)
    peer.send(b"".join(frames.deliver(1, TAG, n) for n in range(1, count + 1)))
    wait_until(lambda: connection.connection.backlog == count)
    return connection, got


def said_of(peer, name, tag=TAG):
    """The frames of one kind that concern a consumer, and not its stand-in."""
    place = 2 if name == "basic.consume" else 0
    return [frame for frame in peer.frames(name) if frame.args[place] == tag]


@pytest.mark.parametrize("options", [{"no_ack": True}, {"no_ack": False}])
def test_a_consumer_without_a_limit_is_paused_and_resumed(connect, peer, options):
    connection, got = flooded(connect, peer, **options)
    assert peer.wait_for("basic.cancel").args == [TAG, True]
    while connection.connection.backlog > RESUME_AT:
        assert len(said_of(peer, "basic.consume")) == 1
        connection.drain_events(timeout=0)
    wait_until(lambda: len(said_of(peer, "basic.consume")) == 2)
    first, second = said_of(peer, "basic.consume")
    assert second.args == [*first.args[:6], True, first.args[7]]  # the same, without an answer
    while connection.connection.backlog:
        connection.drain_events(timeout=0)
    peer.deliver(1, TAG, 5000)
    connection.drain_events(timeout=30)
    assert [message.delivery_tag for message in got] == [*range(1, PAUSE_AT + 6), 5000]
    assert len(said_of(peer, "basic.cancel")) == 1


def test_a_paused_consumer_keeps_its_place_by_a_stand_in(connect, peer):
    """HAZARDS row 39: a queue that has no consumer for a while may expire, by policy."""
    connection, _ = flooded(connect, peer)
    peer.wait_for("basic.cancel")
    begun = [(frame.name, frame.args) for frame in peer.received if frame.name.startswith("basic.")]
    consumed = ["q", "t.paused", False, False, False, True, {}]
    assert begun[1:] == [
        ("basic.qos", [0, 1, False]),
        ("basic.consume", [0, *consumed]),
        ("basic.qos", [0, 0, False]),
        ("basic.cancel", [TAG, True]),
    ]
    while connection.connection.backlog > RESUME_AT:
        connection.drain_events(timeout=0)
    peer.wait_for("basic.cancel", 2)
    assert [frame.name for frame in peer.received[-2:]] == ["basic.consume", "basic.cancel"]
    assert peer.received[-1].args == ["t.paused", True]


@pytest.mark.parametrize("no_ack", [True, False])
def test_what_a_stand_in_is_sent_is_its_consumers_in_its_turn(connect, peer, no_ack):
    connection, got = flooded(connect, peer, no_ack=no_ack)
    peer.wait_for("basic.cancel")
    peer.deliver(1, "t.paused", 5000)
    wait_until(lambda: connection.connection.backlog == PAUSE_AT + 6)
    while connection.connection.backlog > 1:
        connection.drain_events(timeout=0)
    assert "basic.ack" not in peer.names
    connection.drain_events(timeout=0)
    assert [message.delivery_tag for message in got] == [*range(1, PAUSE_AT + 6), 5000]
    assert got[-1].delivery_info["consumer_tag"] == TAG
    if no_ack:  # the broker would send no other, and the consumer sends no acks
        assert peer.wait_for("basic.ack").args == [5000, False]


def test_a_stand_in_goes_with_its_consumer_and_gives_back_what_it_has(connect, peer):
    connection, _ = flooded(connect, peer, no_ack=True)
    peer.wait_for("basic.cancel")
    (channel,) = connection.connection.channels.values()
    channel.basic_cancel(TAG)
    peer.deliver(1, "t.paused", 5000)
    assert peer.wait_for("basic.nack").args == [5000, False, True]
    assert [frame.args[0] for frame in peer.frames("basic.cancel")] == [TAG, TAG, "t.paused"]


def test_the_end_of_a_stand_ins_queue_is_its_consumers(connect, peer):
    cancelled = []
    connection, _ = flooded(connect, peer, on_cancel=cancelled.append)
    peer.wait_for("basic.cancel")
    peer.send(frames.method_frame(1, "basic.cancel", "t.paused", True))
    wait_until(lambda: connection.connection.backlog == PAUSE_AT + 6)
    while connection.connection.backlog:
        connection.drain_events(timeout=0)
    assert cancelled == [TAG]
    assert len(said_of(peer, "basic.consume")) == 1


def test_a_drain_ends_a_stand_in_too(connect, peer):
    connection, _ = flooded(connect, peer)
    peer.wait_for("basic.cancel")
    connection.connection.announce_stop()
    peer.wait_for("basic.cancel", 3)
    assert [frame.args[0] for frame in peer.frames("basic.cancel")] == [TAG, TAG, "t.paused"]
    peer.wait_for("basic.nack")
    names = [name for name in peer.names if name in ("basic.cancel", "basic.nack")]
    assert names == ["basic.cancel"] * 3 + ["basic.nack"]


def test_a_consumer_is_paused_again_when_it_falls_behind_again(connect, peer):
    connection, _ = flooded(connect, peer)
    while connection.connection.backlog > RESUME_AT:
        connection.drain_events(timeout=0)
    wait_until(lambda: len(said_of(peer, "basic.consume")) == 2)
    peer.send(b"".join(frames.deliver(1, TAG, n) for n in range(2000, 3000)))
    wait_until(lambda: len(said_of(peer, "basic.cancel")) == 2)


@pytest.mark.parametrize(
    ("declare", "options"),
    [
        ({"auto_delete": True}, {}),
        ({"auto_delete": False, "arguments": {"x-expires": 1000}}, {}),
        ({"auto_delete": False, "passive": True}, {}),
        ({"auto_delete": False}, {"exclusive": True}),
    ],
)
def test_a_queue_that_may_vanish_without_its_consumer_is_never_paused(
    connect, peer, declare, options
):
    connection, _ = flooded(connect, peer, declare=declare, **options)
    for _ in range(5):
        connection.drain_events(timeout=0)
    assert "basic.cancel" not in peer.names


def test_a_consumer_with_a_prefetch_is_never_paused(connect, peer):
    connection, got = connect(peer), []
    channel = connection.channel()
    channel.queue_declare("q", auto_delete=False)
    channel.basic_qos(0, 2000, False)
    channel.basic_consume("q", consumer_tag=TAG, callback=got.append)
    peer.send(b"".join(frames.deliver(1, TAG, n) for n in range(1, PAUSE_AT + 6)))
    wait_until(lambda: connection.connection.backlog == PAUSE_AT + 5)
    connection.drain_events(timeout=0)
    assert "basic.cancel" not in peer.names


def test_a_paused_consumer_that_was_cancelled_stays_away(connect, peer):
    connection, _ = flooded(connect, peer)
    peer.wait_for("basic.cancel")
    (channel,) = connection.connection.channels.values()
    channel.basic_cancel(TAG)
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0.01)
    assert len(said_of(peer, "basic.consume")) == 1


def test_a_paused_consumer_goes_on_though_its_neighbour_took_the_backlog_along(connect, peer):
    """The backlog may go without being handed out."""
    connection = connect(peer)
    for number, tag in ((1, "greedy"), (2, "modest")):
        channel = connection.channel()
        channel.queue_declare(f"q{number}", auto_delete=False)
        channel.basic_consume(f"q{number}", consumer_tag=tag, callback=lambda message: None)
    more = PAUSE_AT + RESUME_AT + 50
    peer.send(b"".join(frames.deliver(1, "greedy", n) for n in range(1, PAUSE_AT + 1)))
    peer.send(frames.deliver(2, "modest", 1))  # one too many
    peer.send(b"".join(frames.deliver(1, "greedy", n) for n in range(PAUSE_AT + 1, more)))
    wait_until(lambda: len(peer.frames("basic.cancel")) == 2)
    for _ in range(PAUSE_AT + 1):
        connection.drain_events(timeout=0)
    assert connection.connection.backlog > RESUME_AT
    connection.connection.channels[1].basic_cancel("greedy")
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=0.01)
    wait_until(lambda: len(said_of(peer, "basic.consume", "modest")) == 2)
    assert peer.frames("basic.consume")[-1].args[2] == "modest"


# -- sharing and closing ------------------------------------------------------------------------------


def test_a_session_closes_its_own_channels_and_the_last_one_the_link(connect, peer, share):
    connection = connect(peer)
    other = share(connection)
    channels = [connection.channel(), connection.channel()]
    kept = other.channel()
    connection.close()
    assert [frame.channel for frame in peer.frames("channel.close")] == [
        channel.channel_id for channel in channels
    ]
    assert kept.queue_declare("q").queue == "q"
    assert "connection.close" not in peer.names
    other.close()
    assert peer.names[-1] == "connection.close"
    wait_until(lambda: peer.open_count == 0)


def test_closing_a_session_wakes_who_drains_it(connect, peer):
    connection = connect(peer)
    session = connection.connection
    drainer = gevent.spawn(session.drain_events)
    gevent.idle()
    connection.close()
    with pytest.raises((RecoverableConnectionError, LinkLostError)):
        drainer.get(timeout=30)


def test_close_is_bounded_where_no_channel_is_answered_and_the_link_lives_on(
    connect, make_peer, share
):
    """HAZARDS.md row 17."""
    peer = make_peer(silent={"channel.close"})
    connection = connect(peer, close_timeout=0.2)
    other = share(connection)
    for _ in range(100):
        connection.channel()
    begun = monotonic()
    connection.close()
    assert monotonic() - begun < AT_ONCE  # one deadline, not a hundred: 20 s
    assert len(peer.frames("channel.close")) == 100
    assert other.channel().queue_declare("q").queue == "q"


def test_all_channels_close_in_one_round_trip(connect, peer):
    connection = connect(peer)
    for _ in range(3):
        connection.channel()
    del peer.received[:]
    connection.close()
    assert peer.names == ["channel.close"] * 3 + ["connection.close"]


def test_a_kill_while_closing_leaves_the_link_and_the_neighbours(connect, make_peer, share):
    peer = make_peer(silent={"channel.close"})
    connection = connect(peer, close_timeout=60)
    session, other = connection.connection, share(connection)
    connection.channel()
    closer = gevent.spawn(session.close)
    peer.wait_for("channel.close")
    closer.kill()
    assert session.link.sessions == {other}
    assert session.channels == {}
    assert other.channel().queue_declare("q").queue == "q"


def test_a_kill_while_the_last_session_closes_drops_the_socket(connect, make_peer):
    peer = make_peer(silent={"channel.close"})
    connection = connect(peer, close_timeout=60)
    connection.channel()
    closer = gevent.spawn(connection.connection.close)
    peer.wait_for("channel.close")
    closer.kill()
    wait_until(lambda: peer.open_count == 0)


def test_collect_lets_go_at_once_and_tells_nobody(connect, make_peer, share):
    """HAZARDS.md row 21: kombu's own sets the process-wide timeout for it."""
    peer = make_peer(silent={"channel.close", "connection.close"})
    connection = connect(peer, close_timeout=60)
    other = share(connection)
    connection.channel()
    before = socket.getdefaulttimeout()
    begun = monotonic()
    with recording() as events:
        connection.collect(socket_timeout=0.5)
        assert socket.getdefaulttimeout() == before
        assert other.connected
        other.collect()
    assert monotonic() - begun < AT_ONCE
    assert of_type(events, LinkDown) == []
    wait_until(lambda: peer.open_count == 0)


def test_closing_twice_closes_once(connect, peer):
    connection = connect(peer)
    session = connection.connection
    connection.channel()
    session.close()
    session.close()
    session.collect()
    assert peer.names.count("channel.close") == 1
    assert peer.names.count("connection.close") == 1
    with pytest.raises((RecoverableConnectionError, LinkLostError)):
        session.channel()


def test_a_connection_opens_again_after_it_was_lost(connect, peer):
    connection = connect(peer)
    connection.channel()
    peer.hang_up()
    wait_until(lambda: not connection.connected)
    assert connection.channel().queue_declare("q").queue == "q"
    assert peer.connection_count == 2


def test_greenlets_that_use_an_unconnected_connection_share_one_link(peer):
    registry.register()
    with Connection(peer.url) as connection:
        users = [gevent.spawn(lambda: connection.channel().queue_declare("q")) for _ in range(10)]
        gevent.joinall(users, timeout=30, raise_error=True)
        assert peer.connection_count == 1
        assert len(peer.frames("channel.open")) == 10


def test_a_session_is_asked_for_what_is_its_links(connect, make_peer):
    peer = make_peer(channel_max=55, heartbeat=7)
    connection = connect(peer)
    assert connection.connection.channel_max == 55
    assert connection.get_heartbeat_interval() == 7
    assert connection.connection.server_properties["product"] == "scripted peer"
    assert not hasattr(connection.connection, "no_such_thing")


def test_a_channel_of_a_given_number_is_made_once(connect, peer):
    session = connect(peer).connection
    channel = session.channel(5)
    assert session.channel(5) is channel
    assert channel.channel_id == 5
    assert session.channel().channel_id == 1
