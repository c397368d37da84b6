"""The link pool against scripted peers: sharing, dialling once for all, backing off, stopping at once."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from time import monotonic

import amqp
import gevent
import pytest
from gevent.event import Event
from kombu import Connection
from kombu.exceptions import OperationalError

from greenconsume.amqp.link import Link, LinkLostError
from greenconsume.errors import StoppedError, UnsupportedTransportError
from greenconsume.events import ConnectFailed, LinkDown, LinkUp, subscribe
from greenconsume.links import backoff
from greenconsume.links import dialer as dialer_module
from greenconsume.links.backoff import FIRST_DELAY, MAX_DELAY, MAX_PUBLISHING_DELAY, delays
from greenconsume.links.pool import LinkPool
from greenconsume.stopping import StopSignal
from greenconsume.transports import registry
from tests import frames
from tests.peer import REFUSES_PASSWORD, REFUSES_VHOST
from tests.servers import HOST, free_port
from tests.unit.fakes import of_type, recording
from tests.waiting import AT_ONCE, NEVER, wait_until


@pytest.fixture
def make_pool(make_peer):
    """Make link pools; they are closed in the end."""
    pools = []

    def make(**options):
        pools.append(LinkPool(**options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close(timeout=0.5)


@pytest.fixture
def pool(make_pool):
    return make_pool()


@pytest.fixture
def connections():
    """Make kombu connections that are not connected; they are let go of in the end."""
    registry.register()
    made = []

    def make(url, **options):
        options.setdefault("close_timeout", 2.0)
        ways = {name: options.pop(name) for name in list(options) if name in ("heartbeat", "ssl")}
        made.append(Connection(url, connect_timeout=NEVER, transport_options=options, **ways))
        return made[-1]

    yield make
    for connection in made:
        connection.collect()


@pytest.fixture
def connected(pool, connections):
    """Connect to a peer over the pool."""

    def connect(peer, **options):
        connection = connections(peer.url)
        pool.connect(connection, StopSignal(), **options)
        return connection

    return connect


@pytest.fixture
def short_delays(monkeypatch):
    """Back off for a few milliseconds, so that a test sees several attempts."""
    monkeypatch.setattr(backoff, "delays", lambda *_: iter([0.005] * 1000))
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.005)


def link_of(connection):
    return connection.connection.link


def connecting(pool, connection, stop=None, **options):
    """Connect in a greenlet that returns what it raises."""

    def connect():
        try:
            pool.connect(connection, stop or StopSignal(), **options)
        except Exception as exc:  # looked at by the test
            return exc
        return None

    return gevent.spawn(connect)


def opening_after(event):
    """Have a peer open the connection only after an event."""

    def answer(frame):
        event.wait(30)
        return frames.method_frame(0, "connection.open-ok", "")

    return answer


def away():
    """The address of a broker that is away."""
    return f"amqp://guest:guest@{HOST}:{free_port()}//"


@contextmanager
def at(kind, action):
    """Do something in the moment of the first event of a kind."""
    pending = [action]

    def hook(event):
        if isinstance(event, kind) and pending:
            pending.pop()()

    unsubscribe = subscribe(hook)
    try:
        yield
    finally:
        unsubscribe()


# -- sharing ------------------------------------------------------------------------------------------


def test_connections_share_a_link_and_have_a_channel_each(connected, pool, peer):
    first, second = connected(peer), connected(peer)
    assert link_of(first) is link_of(second)
    channels = [first.channel(), second.channel()]
    assert [channel.channel_id for channel in channels] == [1, 2]
    assert (peer.connection_count, pool.open_count) == (1, 1)


def test_a_link_closes_with_its_last_connection(connected, pool, peer):
    first, second = connected(peer), connected(peer)
    first.close()
    assert "connection.close" not in peer.names
    second.close()
    assert peer.names[-1] == "connection.close"
    assert pool.open_count == 0


def test_a_few_links_are_filled_evenly(make_pool, connections, peer):
    pool = make_pool(links=3)
    made = [connections(peer.url) for _ in range(9)]
    for connection in made:
        pool.connect(connection, StopSignal())
    assert peer.connection_count == pool.open_count == 3
    assert sorted(len(link.sessions) for link in set(map(link_of, made))) == [3, 3, 3]


def test_the_least_loaded_link_is_chosen(make_pool, connections, peer):
    pool = make_pool(links=2)
    made = [connections(peer.url) for _ in range(6)]
    for connection in made:
        pool.connect(connection, StopSignal())
    one, two = made[0].connection.link, made[1].connection.link
    for connection in [c for c in made if link_of(c) is one][:2]:
        connection.close()
    for _ in range(2):
        connection = connections(peer.url)
        pool.connect(connection, StopSignal())
        assert link_of(connection) is one
    assert len(one.sessions) == len(two.sessions) == 3


def test_a_further_link_is_opened_where_channels_are_used_up(pool, connections, make_peer):
    peer = make_peer(channel_max=2)
    made = [connections(peer.url) for _ in range(5)]
    for connection in made:
        pool.connect(connection, StopSignal())
        connection.channel()
    assert peer.connection_count == 3
    made[0].close()
    again = connections(peer.url)
    pool.connect(again, StopSignal())
    assert peer.connection_count == 3


def test_many_at_once_get_no_more_links_than_their_channels_need(pool, connections, make_peer):
    peer = make_peer(channel_max=3)
    greenlets = [connecting(pool, connections(peer.url)) for _ in range(10)]
    assert [greenlet.get(timeout=30) for greenlet in greenlets] == [None] * 10
    assert peer.connection_count == 4


def test_a_connection_that_uses_many_channels_leaves_less_room(pool, connections, make_peer):
    peer = make_peer(channel_max=3)
    greedy, modest = connections(peer.url), connections(peer.url)
    pool.connect(greedy, StopSignal())
    for _ in range(3):
        greedy.channel()
    pool.connect(modest, StopSignal())
    assert link_of(modest) is not link_of(greedy)
    modest.channel()


def test_one_dial_serves_all_who_wait(pool, connections, make_peer):
    release = Event()
    peer = make_peer(answers={"connection.open": opening_after(release)})
    greenlets = [connecting(pool, connections(peer.url)) for _ in range(20)]
    peer.wait_for("connection.open")
    release.set()
    assert [greenlet.get(timeout=30) for greenlet in greenlets] == [None] * 20
    assert peer.connection_count == 1


def test_different_brokers_users_and_virtual_hosts_never_share(pool, connections, make_peer):
    one, two = make_peer(), make_peer()
    urls = [
        one.url,
        two.url,
        one.url + "other",
        one.url.replace("guest:guest", "guest:secret"),
        one.url.replace("guest:guest", "somebody:guest"),
    ]
    made = [connections(url) for url in urls]
    made += [connections(one.url, login_method="PLAIN"), connections(one.url, heartbeat=7)]
    for connection in made:
        pool.connect(connection, StopSignal())
    assert len(set(map(link_of, made))) == len(made)


def test_publishing_and_consuming_never_share_a_link(pool, connections, peer):
    """The broker blocks publishers by blocking their connection."""
    made = [(connections(peer.url), publishing) for publishing in (True, False, True, False)]
    for connection, publishing in made:
        pool.connect(connection, StopSignal(), publishing=publishing)
    (a, _), (b, _), (c, _), (d, _) = made
    assert link_of(a) is link_of(c)
    assert link_of(b) is link_of(d)
    assert link_of(a) is not link_of(b)


def test_a_shared_link_that_was_lost_is_shared_again(connected, peer):
    first, second = connected(peer), connected(peer)
    peer.hang_up()
    wait_until(lambda: not first.connected)
    first.connect()
    second.connect()
    assert link_of(first) is link_of(second)
    assert peer.connection_count == 2


def test_a_pool_needs_a_link():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        LinkPool(links=0)
    with pytest.raises(ValueError, match="at least 1, not '2'"):
        LinkPool(links="2")


# -- trying again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [MAX_DELAY, MAX_PUBLISHING_DELAY])
def test_delays_grow_to_a_limit_each_with_a_quarter_of_jitter(longest):
    expected, delay = [], FIRST_DELAY
    for _ in range(8):
        expected.append(delay)
        delay = min(2 * delay, longest)
    seen = [list(islice(delays(longest), 8)) for _ in range(200)]
    for column, center in zip(zip(*seen, strict=True), expected, strict=True):
        assert center * 0.75 <= min(column) < center * 0.8
        assert center * 1.2 < max(column) <= center * 1.25
    assert expected[-1] == longest


@pytest.mark.usefixtures("short_delays")
def test_connecting_goes_on_until_the_broker_is_there(pool, connections, make_peer):
    errors, peer = [], make_peer(close_after=1)
    connection = connections(peer.url)
    greenlet = connecting(pool, connection, on_failed_attempt=lambda *args: errors.append(args))
    wait_until(lambda: len(errors) >= 3)
    peer._close_after = None
    assert greenlet.get(timeout=30) is None
    assert {type(exc) for exc, _ in errors} <= {ConnectionResetError, BrokenPipeError}
    assert {delay for _, delay in errors} == {0.005}


@pytest.mark.usefixtures("short_delays")
def test_an_attempt_that_failed_is_told_once_however_many_wait(pool, connections):
    url, stop, told = away(), StopSignal(), []
    with recording() as events:
        waiters = [
            connecting(
                pool, connections(url), stop, on_failed_attempt=lambda exc, _: told.append(exc)
            )
            for _ in range(10)
        ]
        wait_until(lambda: len(told) >= 30)
        stop.set()
        gevent.joinall(waiters, timeout=30)
    failures = of_type(events, ConnectFailed)
    assert [failure.attempt for failure in failures] == list(range(1, len(failures) + 1))
    assert 3 <= len(failures) <= len(told) / 10 + 1
    assert not any(failure.refused for failure in failures)
    assert "guest:**@" in failures[0].uri


@pytest.mark.parametrize("answers", [REFUSES_PASSWORD, REFUSES_VHOST])
def test_a_refusal_is_told_as_one(pool, connections, make_peer, answers):
    peer = make_peer(answers=answers)
    with recording() as events:
        outcome = connecting(pool, connections(peer.url), max_retries=0).get(timeout=30)
    assert isinstance(outcome, OperationalError)
    assert [failure.refused for failure in of_type(events, ConnectFailed)] == [True]


@pytest.mark.parametrize("publishing", [False, True])
@pytest.mark.usefixtures("short_delays")
def test_a_refusal_is_told_to_the_owner_of_the_pool(make_pool, connections, make_peer, publishing):
    """Once a dialer, with the address; not that of who publishes, for whom nobody waits with the start."""
    peer, told = make_peer(answers=REFUSES_PASSWORD), []
    pool = make_pool(on_refused=lambda uri, error: not told.append((uri, str(error))))
    with recording() as events:
        connecting(pool, connections(peer.url), max_retries=0, publishing=publishing).get(
            timeout=30
        )
    assert len(told) == (0 if publishing else 1)
    assert all("guest:**@" in uri and "ACCESS_REFUSED" in error for uri, error in told)
    assert [failure.raised for failure in of_type(events, ConnectFailed)] == [not publishing]


@pytest.mark.parametrize("max_retries", [0, 1, 3])
@pytest.mark.usefixtures("short_delays")
def test_retries_are_counted(pool, connections, max_retries):
    errors = []
    greenlet = connecting(
        pool,
        connections(away()),
        on_failed_attempt=lambda exc, delay: errors.append(exc),
        max_retries=max_retries,
    )
    outcome = greenlet.get(timeout=30)
    assert isinstance(outcome, OperationalError)
    assert isinstance(outcome.__cause__, ConnectionRefusedError)
    assert len(errors) == max_retries


@pytest.mark.usefixtures("long_backoff")
def test_failover_urls_are_tried_one_after_the_other_without_delay(pool, connections, peer):
    errors = []
    connection = connections(";".join([away(), away(), peer.url]))
    greenlet = connecting(pool, connection, on_failed_attempt=lambda _, delay: errors.append(delay))
    begun = monotonic()
    assert greenlet.get(timeout=30) is None
    assert monotonic() - begun < AT_ONCE
    assert errors == [0.0, 0.0]


def test_a_round_of_failover_urls_is_followed_by_a_delay(pool, connections):
    errors, stop = [], StopSignal()
    connection = connections(";".join([away(), away()]))
    greenlet = connecting(
        pool, connection, stop, on_failed_attempt=lambda _, delay: errors.append(delay)
    )
    wait_until(lambda: len(errors) == 2)
    assert errors[0] == 0.0
    assert errors[1] >= 0.75 * FIRST_DELAY
    stop.set()
    assert isinstance(greenlet.get(timeout=30), StoppedError)


@pytest.mark.usefixtures("short_delays")
def test_a_link_that_is_lost_as_soon_as_it_is_up_is_dialled_again(pool, connections, peer):
    connection, errors = connections(peer.url), []

    def lose():
        (dialled,) = [dialer.link for dialers in pool._dialers.values() for dialer in dialers]
        dialled.fail(ConnectionResetError("cut"))

    with at(LinkUp, lambda: gevent.get_hub().loop.run_callback(lose)):
        greenlet = connecting(pool, connection, on_failed_attempt=lambda exc, _: errors.append(exc))
        assert greenlet.get(timeout=30) is None
    assert peer.connection_count == 2
    assert connection.connected
    assert [str(error) for error in errors] == ["the new link was lost at once"]


@pytest.fixture
def every_life_is_short(monkeypatch):
    """Take each link that is lost for one that hardly lived, however slow the machine is."""
    monkeypatch.setattr(dialer_module, "MIN_LIFE", NEVER)


def lose_at_once(connection):
    """Connections accepted only to be ended: the link is lost as soon as somebody has it."""
    link_of(connection).fail(ConnectionResetError("cut"))
    connection.collect()


@pytest.mark.usefixtures("short_delays", "every_life_is_short")
def test_links_that_hardly_live_are_dialled_with_a_delay_from_the_second_on(
    pool, connections, peer
):
    connection, told = connections(peer.url), []

    def connect():
        greenlet = connecting(pool, connection, on_failed_attempt=lambda *args: told.append(args))
        assert greenlet.get(timeout=30) is None

    with recording() as events:
        for _ in range(2):
            connect()
            lose_at_once(connection)
            assert told == []
        for lost_count in range(1, 4):
            connect()
            assert len(told) == lost_count
            lose_at_once(connection)
    assert {(type(error), delay) for error, delay in told} == {(LinkLostError, 0.005)}
    assert [failure.attempt for failure in of_type(events, ConnectFailed)] == [1, 2, 3]
    assert peer.connection_count == 5


@pytest.mark.usefixtures("short_delays", "every_life_is_short")
def test_a_broker_that_ends_its_connections_at_once_is_left_for_the_next_of_the_failover_urls(
    pool, connections, make_peer
):
    first, second = make_peer(), make_peer()
    url = f"{first.url};{second.url}"
    for _ in range(2):
        connection = connections(url)
        assert connecting(pool, connection).get(timeout=30) is None
        lose_at_once(connection)
    assert (first.connection_count, second.connection_count) == (2, 0)
    assert connecting(pool, connections(url)).get(timeout=30) is None
    assert (first.connection_count, second.connection_count) == (2, 1)


@pytest.mark.usefixtures("short_delays")
def test_a_link_that_lived_for_a_while_is_dialled_again_at_once(
    pool, connections, peer, monkeypatch
):
    monkeypatch.setattr(dialer_module, "MIN_LIFE", 0.0)
    connection, told = connections(peer.url), []
    for _ in range(4):
        greenlet = connecting(pool, connection, on_failed_attempt=lambda *args: told.append(args))
        assert greenlet.get(timeout=30) is None
        lose_at_once(connection)
    assert told == []


def test_what_is_no_error_of_the_brokers_is_raised_where_it_was_asked_for(pool, connections, peer):
    connection = connections(peer.url)
    connection.login_method = "HANDSHAKE"
    outcome = connecting(pool, connection).get(timeout=30)
    assert isinstance(outcome, ValueError)
    assert "HANDSHAKE" in str(outcome)
    assert peer.connection_count == 0


def test_a_transport_that_is_unknown_is_refused(pool, connections):
    connection = connections("memory://")
    connection.transport_cls = "nonsense"
    outcome = connecting(pool, connection).get(timeout=30)
    assert isinstance(outcome, UnsupportedTransportError)


# -- stopping -----------------------------------------------------------------------------------------


def stopped_at_once(greenlet, stop):
    begun = monotonic()
    stop.set("enough")
    outcome = greenlet.get(timeout=30)
    assert isinstance(outcome, StoppedError)
    assert monotonic() - begun < AT_ONCE


@pytest.mark.usefixtures("long_backoff")
def test_a_stop_interrupts_a_backoff(pool, connections):
    """HAZARDS.md row 3."""
    stop, failed = StopSignal(), Event()
    greenlet = connecting(
        pool, connections(away()), stop, on_failed_attempt=lambda *_: failed.set()
    )
    assert failed.wait(30)
    gevent.idle()
    stopped_at_once(greenlet, stop)


@pytest.mark.parametrize("stage", ["connection.start-ok", "connection.tune-ok", "connection.open"])
def test_a_stop_interrupts_a_dial(pool, connections, make_peer, stage):
    """HAZARDS.md row 3."""
    peer = make_peer(silent={stage, "connection.open"})
    stop = StopSignal()
    greenlet = connecting(pool, connections(peer.url), stop)
    peer.wait_for(stage)
    stopped_at_once(greenlet, stop)
    wait_until(lambda: peer.open_count == 0)


def test_a_stop_interrupts_a_connect_that_nobody_answers(pool, connections, black_hole_url):
    """HAZARDS.md row 3."""
    stop = StopSignal()
    greenlet = connecting(pool, connections(black_hole_url), stop)
    gevent.joinall([greenlet], timeout=0.02)
    stopped_at_once(greenlet, stop)


def test_a_stop_that_is_set_already_dials_nobody(pool, connections, peer):
    stop = StopSignal()
    stop.set()
    assert isinstance(connecting(pool, connections(peer.url), stop).get(timeout=30), StoppedError)
    assert peer.connection_count == 0


def test_a_stop_of_one_leaves_the_dial_to_the_others(pool, connections, make_peer):
    release = Event()
    peer = make_peer(answers={"connection.open": opening_after(release)})
    stop = StopSignal()
    stopped = connecting(pool, connections(peer.url), stop)
    patient = connecting(pool, connections(peer.url))
    peer.wait_for("connection.open")
    stopped_at_once(stopped, stop)
    release.set()
    assert patient.get(timeout=30) is None
    assert peer.connection_count == 1


def test_a_dialer_ends_when_nobody_waits_any_more(pool, connections, make_peer, monkeypatch):
    monkeypatch.setattr(backoff, "delays", lambda *_: iter([0.002] * 1000))
    attempts = []
    stop = StopSignal()
    with recording() as events:
        greenlet = connecting(
            pool, connections(away()), stop, on_failed_attempt=lambda *_: attempts.append(1)
        )
        wait_until(lambda: len(attempts) > 2)
        stopped_at_once(greenlet, stop)
        seen = len(of_type(events, ConnectFailed))
        Event().wait(0.02)
        assert len(of_type(events, ConnectFailed)) <= seen + 1


def test_a_stop_in_the_moment_a_link_comes_up_leaves_no_link(pool, connections, peer):
    stop = StopSignal()
    with at(LinkUp, stop.set):
        outcome = connecting(pool, connections(peer.url), stop).get(timeout=30)
    assert isinstance(outcome, StoppedError)
    wait_until(lambda: peer.open_count == 0)
    assert pool.open_count == 0


def test_a_kill_in_the_moment_a_link_comes_up_leaves_no_link(pool, connections, peer, monkeypatch):
    """The dialer may be done before the kill that its only waiter sent it arrives."""
    waiters, open_ok = [], Link._on_open_ok

    def on_open_ok(link):
        waiters[0].kill(block=False)
        open_ok(link)

    monkeypatch.setattr(Link, "_on_open_ok", on_open_ok)
    waiters.append(connecting(pool, connections(peer.url)))
    waiters[0].join(30)
    wait_until(lambda: peer.connection_count == 1 and peer.open_count == 0)
    assert pool.open_count == 0


def test_a_stop_while_consumers_come_back_spread_leaves_no_link(
    pool, connections, peer, monkeypatch
):
    monkeypatch.setattr(dialer_module, "SPREAD", 10.0)
    monkeypatch.setattr(dialer_module, "MAX_SPREAD", 60.0)
    first = connections(peer.url)
    pool.connect(first, StopSignal())
    peer.hang_up()
    wait_until(lambda: not first.connected)
    stop = StopSignal()
    waiters = [connecting(pool, connections(peer.url), stop) for _ in range(3)]
    wait_until(lambda: pool.open_count == 1)
    gevent.joinall(waiters, timeout=0.01)
    stop.set()
    for waiter in waiters:
        assert isinstance(waiter.get(timeout=30), StoppedError)
    wait_until(lambda: peer.open_count == 0)


def test_consumers_come_back_to_a_new_link_spread(pool, connections, peer, monkeypatch):
    """HAZARDS.md row 28: not in lockstep."""
    monkeypatch.setattr(dialer_module, "SPREAD", 0.01)
    first = connections(peer.url)
    pool.connect(first, StopSignal())
    peer.hang_up()
    wait_until(lambda: not first.connected)
    moments = []

    def come_back():
        pool.connect(connections(peer.url), StopSignal())
        moments.append(monotonic())

    gevent.joinall([gevent.spawn(come_back) for _ in range(20)], timeout=30, raise_error=True)
    assert peer.connection_count == 2
    assert max(moments) - min(moments) > 0.02


def test_the_first_to_connect_are_not_spread(pool, connections, peer, monkeypatch):
    monkeypatch.setattr(dialer_module, "SPREAD", 60.0)
    monkeypatch.setattr(dialer_module, "MAX_SPREAD", 60.0)
    greenlets = [connecting(pool, connections(peer.url)) for _ in range(5)]
    assert [greenlet.get(timeout=30) for greenlet in greenlets] == [None] * 5


def test_a_kill_of_the_only_one_who_waits_ends_the_dial(pool, connections, make_peer):
    peer = make_peer(silent={"connection.open"})
    greenlet = connecting(pool, connections(peer.url))
    peer.wait_for("connection.open")
    greenlet.kill()
    wait_until(lambda: peer.open_count == 0)


def test_a_gevent_timeout_around_connecting_ends_the_dial(pool, connections, make_peer):
    peer = make_peer(silent={"connection.open"})
    with pytest.raises(gevent.Timeout):
        with gevent.Timeout(0.02):
            pool.connect(connections(peer.url), StopSignal())
    wait_until(lambda: peer.open_count == 0)


def test_closing_a_pool_drops_its_links_and_its_dialers(make_pool, connections, make_peer):
    pool, peer = make_pool(), make_peer()
    silent = make_peer(silent={"connection.open"})
    connection = connections(peer.url)
    pool.connect(connection, StopSignal())
    waiting = connecting(pool, connections(silent.url))
    silent.wait_for("connection.open")
    pool.close(timeout=0.2)
    wait_until(lambda: peer.open_count == silent.open_count == 0)
    assert not connection.connected
    waiting.kill()


def test_closing_a_pool_is_bounded_where_its_broker_does_not_answer(
    make_pool, connections, make_peer, monkeypatch
):
    """Law 3, also where no bound is said."""
    monkeypatch.setattr("greenconsume.links.pool.DEFAULT_CLOSE_TIMEOUT", 0.05)
    pool, silent = make_pool(), make_peer(silent={"connection.close"}, heartbeat=0)
    pool.connect(connections(silent.url), StopSignal())
    with gevent.Timeout(30):
        pool.close()
    wait_until(lambda: silent.open_count == 0)


# -- connections that connect again by themselves -----------------------------------------------------


@pytest.mark.usefixtures("short_delays")
def test_kombu_connects_a_lost_connection_again_over_the_pools_link(connected, pool, peer):
    connection = connected(peer)
    peer.hang_up()
    wait_until(lambda: not connection.connected)
    assert connection.channel().queue_declare("q").queue == "q"
    assert (peer.connection_count, pool.open_count) == (2, 1)


def test_what_kombu_is_told_of_a_failed_attempt_is_an_error_it_knows(connected, pool, peer):
    connection = connected(peer)
    peer._server.stop()
    peer.hang_up()
    wait_until(lambda: not connection.connected)
    with pytest.raises(OperationalError):
        connection.ensure_connection(max_retries=0)


def test_a_lost_link_is_told_once_with_how_many_used_it(connected, peer):
    made = [connected(peer) for _ in range(5)]
    with recording() as events:
        peer.hang_up()
        wait_until(lambda: not made[0].connected)
    (event,) = of_type(events, LinkDown)
    assert event.consumers == 5


def test_a_neighbours_close_and_its_errors_disturb_nobody(connected, peer):
    one, two = connected(peer), connected(peer)
    failing, kept = one.channel(), two.channel()
    peer.answers["queue.declare"] = lambda frame: (
        frames.channel_close(frame.channel, 404, "NOT_FOUND", "queue.declare")
        if frame.args[1] == "gone"
        else frames.method_frame(frame.channel, "queue.declare-ok", frame.args[1], 0, 0)
    )
    with pytest.raises(amqp.NotFound):
        failing.queue_declare("gone", passive=True)
    assert kept.queue_declare("q").queue == "q"
    one.close()
    assert kept.queue_declare("r").queue == "r"


# -- transports without links -------------------------------------------------------------------------


def test_a_transport_without_links_is_connected_by_itself(pool, connections):
    connection = connections("memory://")
    pool.connect(connection, StopSignal())
    assert connection.connected
    assert pool.open_count == 0
    connection.close()


@pytest.mark.usefixtures("long_backoff")
def test_a_transport_without_links_is_backed_off_and_stopped_as_others_are(
    pool, connections, monkeypatch
):
    connection, stop, errors = connections("memory://"), StopSignal(), []

    def refuse():
        raise connection.connection_errors[0]("away")

    monkeypatch.setattr(connection.transport, "establish_connection", refuse)
    greenlet = connecting(
        pool, connection, stop, on_failed_attempt=lambda *args: errors.append(args)
    )
    wait_until(lambda: errors)
    assert 0.75 * NEVER <= errors[0][1] <= 1.25 * NEVER
    stopped_at_once(greenlet, stop)


def test_a_transport_without_links_that_hangs_is_left_behind_by_a_stop(
    pool, connections, monkeypatch
):
    connection, stop, hanging = connections("memory://"), StopSignal(), Event()
    monkeypatch.setattr(connection.transport, "establish_connection", lambda: Event().wait())
    hanging.set()
    greenlet = connecting(pool, connection, stop)
    gevent.joinall([greenlet], timeout=0.01)
    stopped_at_once(greenlet, stop)


def test_a_kill_leaves_no_attempt_of_a_transport_without_links(pool, connections, monkeypatch):
    connection = connections("memory://")
    monkeypatch.setattr(connection.transport, "establish_connection", lambda: Event().wait())
    greenlet = connecting(pool, connection)
    gevent.joinall([greenlet], timeout=0.01)
    greenlet.kill()


def test_nobody_dials_on_where_the_only_one_who_waited_has_his_error(pool, connected, make_peer):
    """As kombu's own reconnects do, which make one attempt at a time."""
    peer = make_peer()
    connection = connected(peer)
    ((dialer,),) = pool._dialers.values()
    peer.close()
    wait_until(lambda: not dialer.is_live)
    with pytest.raises(ConnectionRefusedError):
        connection.transport.establish_connection()
    wait_until(lambda: dialer._dialling is None)
    connection.release()
