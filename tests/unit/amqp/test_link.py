"""The green link against a scripted peer: handshake, heartbeats, back-pressure, loss, close."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from time import monotonic, perf_counter

import amqp
import gevent
import pytest
from amqp.exceptions import (
    AccessRefused,
    ConnectionForced,
    FrameSyntaxError,
    NotAllowed,
    RecoverableConnectionError,
    ResourceError,
    UnexpectedFrame,
)
from gevent.event import Event
from gevent.server import StreamServer
from kombu import Connection

from greenconsume.amqp import heartbeats, publish_gate
from greenconsume.amqp.link import Link, LinkLostError
from greenconsume.errors import StoppedError
from greenconsume.events import LinkBlocked, LinkDown, LinkUp, subscribe
from greenconsume.stopping import Deadline, StopSignal
from greenconsume.transports import registry
from tests import frames
from tests.peer import REFUSES_PASSWORD, REFUSES_VHOST
from tests.servers import HOST
from tests.unit.fakes import of_type, recording
from tests.waiting import AT_ONCE, NEVER, wait_until

BRING_UP = ["connection.start-ok", "connection.tune-ok", "connection.open"]
# What a peer sends until a link is up: Start, Tune and OpenOk.
STAGES = ["connection.start-ok", "connection.tune-ok", "connection.open"]


@pytest.fixture
def make_link(make_peer):
    """Make links to ports; whatever is left of them is dropped in the end."""
    links = []

    def make(port, **options):
        options = {"connect_timeout": 2, "close_timeout": 2.0, **options}
        link = Link(host=f"{HOST}:{port}", **options)
        link.uri = "amqp://guest:**@peer//"
        links.append(link)
        return link

    yield make
    for link in links:
        link.is_closing = True
        link.fail(RuntimeError("the test is over"))


@pytest.fixture
def dial(make_link):
    """Connect a link to a peer."""

    def connect(peer, **options):
        link = make_link(peer.port, **options)
        link.connect()
        return link

    return connect


@contextmanager
def serving(answer):
    """A server that is no AMQP broker: it says `answer` and then nothing, until the client goes."""

    def serve(sock, address):
        sock.sendall(answer)
        while sock.recv(1024):
            pass

    with_server = StreamServer((HOST, 0), serve)
    with_server.start()
    try:
        yield with_server.server_port
    finally:
        with_server.stop(timeout=1)


def block_hub(seconds):
    """Keep the hub from everybody, as a handler that computes does."""
    until = perf_counter() + seconds
    while perf_counter() < until:
        pass


@contextmanager
def watching(kind):
    """An event that is set by the first event of a kind."""
    seen = Event()
    unsubscribe = subscribe(lambda event: seen.set() if isinstance(event, kind) else None)
    try:
        yield seen
    finally:
        unsubscribe()


# -- coming up ----------------------------------------------------------------------------------------


def test_a_link_comes_up_and_closes_in_order(dial, peer):
    link = dial(peer)
    assert link.connected
    link.close()
    assert peer.names == [*BRING_UP, "connection.close"]
    assert not link.connected
    wait_until(lambda: peer.open_count == 0)


def test_a_link_tells_the_hooks_when_it_comes_up_and_nothing_when_it_is_closed(dial, peer):
    with recording() as events:
        dial(peer).close()
    assert events == [LinkUp("amqp://guest:**@peer//")]


def test_connecting_is_bounded_where_a_peer_accepts_and_says_nothing(make_link):
    with serving(b"") as port:
        begun = monotonic()
        with pytest.raises(TimeoutError, match="does not speak AMQP"):
            make_link(port, connect_timeout=0.05).connect()
        assert monotonic() - begun < AT_ONCE


@pytest.mark.parametrize("stage", STAGES)
def test_connecting_is_bounded_where_a_peer_stops_answering(make_link, make_peer, stage):
    peer = make_peer(silent={stage, "connection.open"})
    begun = monotonic()
    with pytest.raises(TimeoutError):
        make_link(peer.port, connect_timeout=0.05).connect()
    assert monotonic() - begun < AT_ONCE
    wait_until(lambda: peer.open_count == 0)


@pytest.mark.parametrize(
    ("answers", "error"),
    [(REFUSES_PASSWORD, AccessRefused), (REFUSES_VHOST, NotAllowed)],
)
def test_a_refusal_is_raised_at_once_and_closes_the_socket(make_link, make_peer, answers, error):
    peer = make_peer(answers=answers)
    begun = monotonic()
    with pytest.raises(error):
        make_link(peer.port, connect_timeout=NEVER).connect()
    assert monotonic() - begun < AT_ONCE
    peer.wait_for("connection.close-ok")
    wait_until(lambda: peer.open_count == 0)


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x00\x00\x08\x00", b"SSH-2.0-OpenSSH_9.2\r\n"],
)
def test_a_server_of_another_protocol_is_named_so(make_link, answer):
    with serving(answer) as port:
        with pytest.raises(UnexpectedFrame, match="is this really an AMQP port"):
            make_link(port).connect()


def test_a_frame_that_is_too_large_ends_the_handshake(make_link):
    with serving(frames.raw_frame(1, 0, bytes(200_000))) as port:
        with pytest.raises(FrameSyntaxError, match="where at most 131072 were agreed"):
            make_link(port).connect()


def test_a_handshake_that_makes_no_sense_is_an_error_and_leaves_nothing(make_link):
    with serving(frames.raw_frame(1, 0, b"\x00\x0a\x00\x0a\xff")) as port:
        with pytest.raises(FrameSyntaxError, match="cannot be decoded"):
            make_link(port).connect()


def test_a_peer_that_hangs_up_at_any_byte_of_the_handshake_is_an_error(make_link, make_peer):
    whole = 0
    for count in range(0, 400, 7):
        peer = make_peer(close_after=count or None)
        if not count:
            make_link(peer.port).connect()
            continue
        try:
            make_link(peer.port).connect()
        except OSError:
            whole = count
        else:
            break
    assert whole > 100  # Start, Tune and most of OpenOk


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_stage_of_the_handshake_leaves_no_socket(make_link, make_peer, stage):
    peer = make_peer(silent={stage, "connection.open"})
    dialer = gevent.spawn(make_link(peer.port).connect)
    peer.wait_for("connection.open" if stage == "connection.tune-ok" else stage)
    assert not dialer.ready()
    dialer.kill()
    wait_until(lambda: peer.open_count == 0)


def test_a_kill_before_the_first_byte_leaves_no_socket(make_link):
    with serving(b"") as port:
        link = make_link(port)
        dialer = gevent.spawn(link.connect)
        wait_until(lambda: link._transport is not None and link._transport.connected)
        dialer.kill()
        assert link.failure is not None


def test_a_kill_while_the_socket_connects_leaves_no_socket(black_hole_url, make_link):
    link = make_link(Connection(black_hole_url).port)
    dialer = gevent.spawn(link.connect)
    wait_until(lambda: link._transport is not None and link._transport.sock)
    dialer.kill()
    assert link._transport.sock.fileno() == -1


def test_a_gevent_timeout_around_connect_leaves_no_socket(make_link, make_peer):
    peer = make_peer(silent={"connection.open"})
    with pytest.raises(gevent.Timeout):
        with gevent.Timeout(0.02):
            make_link(peer.port).connect()
    wait_until(lambda: peer.open_count == 0)


def test_what_is_agreed_is_the_lower_channel_max_and_heartbeat(dial, make_peer):
    peer = make_peer(heartbeat=60, channel_max=100, frame_max=8192)
    link = dial(peer, heartbeat=20, channel_max=7)
    assert peer.frames("connection.tune-ok")[0].args == [7, 8192, 20]
    assert (link.channel_max, link.frame_max, link.heartbeat) == (7, 8192, 20)


def test_a_peer_without_limits_gets_the_clients(dial, make_peer):
    peer = make_peer(heartbeat=0, channel_max=0, frame_max=0)
    dial(peer, heartbeat=10)
    assert peer.frames("connection.tune-ok")[0].args == [65535, 131072, 10]


# -- being lost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_a_link_that_the_peer_drops_is_down_and_says_why(dial, peer, reset):
    with recording() as events, watching(LinkDown) as down:
        link = dial(peer)
        peer.hang_up(reset)
        assert down.wait(30)
    assert not link.connected
    (event,) = of_type(events, LinkDown)
    assert isinstance(event.error, ConnectionResetError)
    with pytest.raises(LinkLostError, match=r"the link to amqp://guest:\*\*@peer// is gone: .*\w"):
        link.write([frames.heartbeat()])


def test_a_connection_closed_by_the_broker_is_answered_and_says_why(dial, peer):
    with watching(LinkDown) as down:
        link = dial(peer)
        peer.send(frames.connection_close(320, "CONNECTION_FORCED - broker shuts down"))
        assert down.wait(30)
    peer.wait_for("connection.close-ok")
    with pytest.raises(LinkLostError, match="broker shuts down") as caught:
        link.write([frames.heartbeat()])
    assert isinstance(caught.value.__cause__, ConnectionForced)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"this is no frame at all", UnexpectedFrame),
        (frames.raw_frame(3, 1, b"a body from nowhere"), UnexpectedFrame),
        (frames.raw_frame(1, 0, b"\x00\x0a\x00\x32\x00"), FrameSyntaxError),
        (frames.raw_frame(1, 0, b"\x00"), FrameSyntaxError),
        (frames.raw_frame(3, 1, bytes(131072)), FrameSyntaxError),
        (frames.raw_frame(1, 0, b"\x00\x0a\x27\x0f"), amqp.exceptions.AMQPNotImplementedError),
    ],
)
def test_bytes_that_make_no_sense_end_the_link_with_a_clear_error(dial, peer, data, error):
    with watching(LinkDown) as down:
        link = dial(peer)
        peer.send(data)
        assert down.wait(30)
        assert isinstance(link.failure, error)
        assert str(link.failure)


def test_frames_for_a_channel_that_is_gone_do_no_harm(dial, peer):
    with watching(LinkDown) as down:
        link = dial(peer)
        peer.send(frames.deliver(9, "t", 1) + frames.basic_ack(9, 1) + frames.heartbeat())
        assert not down.wait(0.02)
    assert link.connected


def test_a_link_is_lost_once(dial, peer):
    with recording() as events:
        link = dial(peer)
        link.fail(OSError("first"))
        link.fail(OSError("second"))
    assert str(link.failure) == "first"
    assert len(of_type(events, LinkDown)) == 1


# -- closing ------------------------------------------------------------------------------------------


def test_close_is_bounded_where_the_peer_never_answers(dial, make_peer):
    peer = make_peer(silent={"connection.close"})
    link = dial(peer, close_timeout=0.05)
    begun = monotonic()
    link.close()
    assert 0.04 < monotonic() - begun < AT_ONCE
    wait_until(lambda: peer.open_count == 0)


def test_close_is_bounded_by_the_deadline_it_is_given(dial, make_peer):
    peer = make_peer(silent={"connection.close"})
    link = dial(peer, close_timeout=60)
    begun = monotonic()
    link.close(deadline=Deadline(0.02))
    assert monotonic() - begun < AT_ONCE


def test_closing_twice_at_once_or_afterwards_is_one_close(dial, peer):
    link = dial(peer)
    gevent.joinall([gevent.spawn(link.close) for _ in range(3)], timeout=30, raise_error=True)
    link.close()
    assert peer.names.count("connection.close") == 1


def test_what_was_written_before_close_is_sent(dial, peer):
    link = dial(peer)
    link.write([frames.heartbeat()] * 3)
    link.close()
    assert peer.names[-4:] == [*["heartbeat"] * 3, "connection.close"]


def test_a_kill_while_closing_drops_the_socket(dial, make_peer):
    peer = make_peer(silent={"connection.close"})
    link = dial(peer, close_timeout=60)
    closer = gevent.spawn(link.close)
    peer.wait_for("connection.close")
    closer.kill()
    assert link.failure is not None
    wait_until(lambda: peer.open_count == 0)


def test_a_peer_that_hangs_up_instead_of_answering_ends_the_close(dial, make_peer):
    peer = make_peer(silent={"connection.close"})
    link = dial(peer, close_timeout=60)
    closer = gevent.spawn(link.close)
    peer.wait_for("connection.close")
    with recording() as events:
        peer.hang_up()
        closer.get(timeout=30)
    assert of_type(events, LinkDown) == []


def test_a_close_that_crosses_the_brokers_own_ends(dial, make_peer):
    peer = make_peer(answers={"connection.close": frames.connection_close(320, "bye")})
    link = dial(peer, close_timeout=60)
    with recording() as events:
        gevent.spawn(link.close).get(timeout=30)
    assert of_type(events, LinkDown) == []


# -- heartbeats ---------------------------------------------------------------------------------------


def beating(dial, peer, seconds, **options):
    """A link whose heartbeats are faster than the whole seconds that can be agreed on."""
    link = dial(peer, heartbeat=1, **options)
    link.heartbeat = seconds  # the greenlet that beats has not run yet
    return link


def test_heartbeats_are_sent_while_the_link_is_idle(dial, make_peer):
    peer = make_peer(heartbeat=1)
    beating(dial, peer, 0.02)
    peer.wait_for("heartbeat", 2)


def test_no_heartbeats_are_sent_beside_other_traffic(dial, make_peer):
    peer = make_peer(heartbeat=1)
    link = beating(dial, peer, 0.2)
    until = monotonic() + 0.25
    while monotonic() < until:
        link.write([frames.method_frame(1, "basic.ack", 1, False)])
        peer.send(frames.heartbeat())
        Event().wait(0.01)
    assert "heartbeat" not in peer.names


def test_no_heartbeats_are_sent_where_none_were_agreed(dial, make_peer):
    peer = make_peer(heartbeat=5)
    link = dial(peer, heartbeat=0)
    assert not link.heartbeat
    assert peer.frames("connection.tune-ok")[0].args[2] == 0


def test_a_silent_peer_loses_the_link_after_two_heartbeats(dial, make_peer):
    peer = make_peer(heartbeat=1)
    with watching(LinkDown) as down:
        link = beating(dial, peer, 0.04)
        begun = monotonic()
        assert down.wait(30)
    assert monotonic() - begun > 0.08
    assert isinstance(link.failure, ConnectionForced)
    assert "no heartbeat from the broker for" in str(link.failure)


def test_any_byte_from_the_peer_counts_as_a_heartbeat(dial, make_peer):
    peer = make_peer(heartbeat=1)
    slow = frames.deliver(1, "t", 1, bytes(100))
    with watching(LinkDown) as down:
        beating(dial, peer, 0.04)
        for n in range(15):
            peer.send(slow[n : n + 1])
            assert not down.wait(0.02)


def test_a_hub_that_was_busy_does_not_take_unread_input_for_silence(dial, make_peer, monkeypatch):
    """HAZARDS.md row 5: a handler that computes does not lose its link."""
    monkeypatch.setattr(heartbeats, "GRACE", 1.0)
    peer = make_peer(heartbeat=1)
    with watching(LinkDown) as down:
        beating(dial, peer, 0.06)
        assert not down.wait(0.01)
        for _ in range(2):
            peer.send(frames.heartbeat())
            block_hub(0.15)  # two heartbeats and a half
            assert not down.wait(0.005)
        block_hub(0.15)
        late = gevent.spawn_later(0.01, peer.send, frames.heartbeat())  # blocked as this side was
        assert not down.wait(0.03)
        late.get()


def test_heartbeats_go_on_while_a_greenlet_waits(dial, make_peer):
    """HAZARDS.md row 5: a handler that waits for long does not lose its link."""
    peer = make_peer(heartbeat=1)
    beating(dial, peer, 0.02)
    before = len(peer.frames("heartbeat"))
    Event().wait(0.06)
    assert len(peer.frames("heartbeat")) - before >= 2


def test_heartbeat_checks_of_pyamqps_users_do_nothing(dial, make_peer):
    peer = make_peer(heartbeat=1)
    link = dial(peer, heartbeat=1)
    for _ in range(3):
        link.heartbeat_tick(rate=0)
    assert link.connected


def test_kombus_connections_have_heartbeats_unless_told_otherwise(make_peer):
    registry.register()
    peer = make_peer(heartbeat=60)
    for options in ({}, {"heartbeat": 10}, {"transport_options": {"heartbeat": 0}}):
        with Connection(peer.url, **options) as connection:
            connection.connect()
    assert [f.args[2] for f in peer.frames("connection.tune-ok")] == [30, 10, 0]


# -- back-pressure ------------------------------------------------------------------------------------


def publishable(link, timeout=None, stop=None):
    return gevent.spawn(link.wait_publishable, Deadline(timeout), stop)


def test_publishers_wait_while_the_broker_blocks_and_go_on_after(dial, peer):
    link = dial(peer)
    with recording() as events, watching(LinkBlocked) as blocked:
        peer.send(frames.blocked("low on disk"))
        assert blocked.wait(30)
        waiters = [publishable(link) for _ in range(3)]
        gevent.joinall(waiters, timeout=0.02)
        assert not any(waiter.ready() for waiter in waiters)
        peer.send(frames.unblocked())
        gevent.joinall(waiters, timeout=30, raise_error=True)
    assert events == [
        LinkBlocked(link.uri, True, "low on disk"),
        LinkBlocked(link.uri, False, ""),
    ]


def test_waiting_for_a_blocked_broker_ends_by_the_timeout(dial, peer):
    link = dial(peer)
    with watching(LinkBlocked) as blocked:
        peer.send(frames.blocked())
        assert blocked.wait(30)
    with pytest.raises(RecoverableConnectionError, match="timed out: the broker blocks publishers"):
        publishable(link, timeout=0.02).get(timeout=30)


def test_waiting_for_a_blocked_broker_ends_by_the_stop(dial, peer):
    link, stop = dial(peer), StopSignal()
    with watching(LinkBlocked) as blocked:
        peer.send(frames.blocked())
        assert blocked.wait(30)
    stopped, other = publishable(link, stop=stop), publishable(link)
    gevent.joinall([stopped, other], timeout=0.02)
    stop.set()
    with pytest.raises(StoppedError):
        stopped.get(timeout=30)
    assert not other.ready()
    peer.send(frames.unblocked())
    other.get(timeout=30)


def test_waiting_for_a_blocked_broker_ends_with_the_link(dial, peer):
    link = dial(peer)
    with watching(LinkBlocked) as blocked:
        peer.send(frames.blocked())
        assert blocked.wait(30)
    waiter = publishable(link)
    waiter.join(0.02)
    peer.hang_up()
    with pytest.raises(LinkLostError):
        waiter.get(timeout=30)


def test_acks_flow_while_the_broker_blocks_publishers(dial, peer):
    link = dial(peer)
    with watching(LinkBlocked) as blocked:
        peer.send(frames.blocked())
        assert blocked.wait(30)
    link.write([frames.method_frame(1, "basic.ack", 5, False)])
    assert peer.wait_for("basic.ack").args == [5, False]


def test_users_callbacks_for_blocking_may_wait(dial, peer):
    seen, go_on = [], Event()

    def on_blocked(reason):
        go_on.wait(30)
        seen.append(reason)

    dial(peer, on_blocked=on_blocked, on_unblocked=lambda: seen.append("unblocked"))
    peer.send(frames.blocked("memory") + frames.unblocked())
    wait_until(lambda: seen == ["unblocked"])
    go_on.set()
    wait_until(lambda: seen == ["unblocked", "memory"])


def test_publishers_wait_while_the_broker_takes_no_bytes(dial, make_peer, monkeypatch):
    monkeypatch.setattr(publish_gate, "HIGH_WATER", 20_000)
    reading = Event()
    peer = make_peer(answers={"basic.ack": lambda frame: b"" * reading.wait(30)})
    link = dial(peer)
    link.write([frames.method_frame(1, "basic.ack", 1, False)])
    peer.wait_for("basic.ack")

    def publish_for_ever():
        while True:
            link.wait_publishable(Deadline(0.05))
            link.write([frames.raw_frame(3, 1, bytes(1 << 20))])

    with pytest.raises(RecoverableConnectionError, match="the broker takes no more bytes"):
        publish_for_ever()
    waiter = publishable(link)
    waiter.join(0.02)
    assert not waiter.ready()
    reading.set()
    waiter.get(timeout=30)


# -- channel ids --------------------------------------------------------------------------------------


def test_channel_ids_end_at_the_agreed_maximum(dial, make_peer):
    link = dial(make_peer(channel_max=3))
    for wanted in (1, 2, 3):
        channel_id = link.allocate()
        assert channel_id == wanted
        link.channels[channel_id] = object()
    with pytest.raises(ResourceError, match=r"all 3 channels .* raise channel_max .* more links"):
        link.allocate()
    link.forget(2)
    assert link.allocate() == 2
    link.channels.clear()


def test_an_explicit_channel_id_is_given_once(dial, peer):
    link = dial(peer)
    assert link.allocate(5) == 5
    link.channels[5] = object()
    with pytest.raises(amqp.ConnectionError, match="5 already open"):
        link.allocate(5)
    assert [link.allocate() for _ in range(4)] == [1, 2, 3, 4]
    assert link.allocate() == 6
    del link.channels[5]


# -- small things --------------------------------------------------------------------------------------


def test_no_password_is_in_what_a_link_says(peer):
    registry.register()
    url = peer.url.replace("guest:guest", "guest:s3cret")
    with recording() as events, Connection(url) as connection:
        session = connection.connect()
        assert "s3cret" not in session.link.uri
        peer.hang_up()
        wait_until(lambda: not session.connected)
        assert "s3cret" not in str(session.link.lost())
    assert "s3cret" not in repr(events)


def test_the_socket_of_a_failed_link_is_closed_at_once(dial, peer):
    link = dial(peer)
    sock = link.transport.sock
    link.fail(OSError("cut"))
    assert sock.fileno() == -1


def test_a_broker_that_takes_no_bytes_for_a_while_is_left_to_the_heartbeats(dial, peer):
    """py-amqp has the kernel give up after a second, which is what a blocked broker looks like."""
    sock = dial(peer).transport.sock
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
    settings = {socket.TCP_USER_TIMEOUT: 2500}
    sock = dial(peer, socket_settings=settings).transport.sock
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2500
