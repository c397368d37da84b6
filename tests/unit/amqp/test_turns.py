"""A greenlet that drains several connections in turn, as a Celery worker's loop does."""

from __future__ import annotations

import socket

import gevent
import pytest

from greenconsume.amqp.link import LinkLostError
from tests.waiting import wait_until

TAG = "t"
#: Longer than the test may take: a wait that ends did not end by it.
LONG = 100.0


@pytest.fixture
def pair(connect, make_peer):
    """A peer and its connection that consumes, what that got, and a connection that only publishes."""
    peer, got = make_peer(), []
    consuming, publishing = connect(peer), connect(make_peer())
    consuming.channel().basic_consume("q", consumer_tag=TAG, callback=got.append)
    publishing.channel()
    return peer, consuming, got, publishing


def drain_quietly(connection, timeout=0.01):
    with pytest.raises(socket.timeout):
        connection.drain_events(timeout=timeout)


def test_a_wait_for_nothing_ends_when_the_connection_drained_before_has_something(pair):
    peer, consuming, got, publishing = pair
    drain_quietly(consuming)
    gevent.spawn_later(0.02, peer.deliver, 1, TAG, 1)
    drain_quietly(publishing, LONG)
    consuming.drain_events(timeout=0)
    assert [message.delivery_tag for message in got] == [1]


def test_what_waits_on_the_connection_drained_before_leaves_nothing_to_wait_for(pair):
    peer, consuming, got, publishing = pair
    for tag in (1, 2, 3):
        peer.deliver(1, TAG, tag)
    for _ in range(2):
        consuming.drain_events(timeout=LONG)
        wait_until(lambda: consuming.connection.backlog == 3 - len(got))
        drain_quietly(publishing, LONG)
    assert len(got) == 2


def test_a_loop_that_does_not_go_back_waits_in_full(pair):
    peer, consuming, got, publishing = pair
    drain_quietly(consuming)
    peer.deliver(1, TAG, 1)
    drain_quietly(publishing, LONG)
    begun = gevent.get_hub().loop.now()
    drain_quietly(publishing, 0.05)
    assert gevent.get_hub().loop.now() - begun > 0.04
    assert got == []


def test_a_callback_that_drains_another_connection_waits_in_full(pair):
    peer, consuming, got, publishing = pair
    took = []

    def wait_in_callback(message):
        begun = gevent.get_hub().loop.now()
        drain_quietly(publishing, 0.05)
        took.append(gevent.get_hub().loop.now() - begun)

    consuming.channel().basic_consume("other", consumer_tag="o", callback=wait_in_callback)
    peer.deliver(2, "o", 1)
    peer.deliver(1, TAG, 1)
    consuming.drain_events(timeout=LONG)
    assert took[0] > 0.04
    assert got == []


def test_a_connection_that_consumes_too_waits_in_full(pair):
    peer, consuming, _got, publishing = pair
    publishing.channel().basic_consume("q", callback=print)
    drain_quietly(consuming)
    peer.deliver(1, TAG, 1)
    begun = gevent.get_hub().loop.now()
    drain_quietly(publishing, 0.05)
    assert gevent.get_hub().loop.now() - begun > 0.04


def test_a_lost_link_is_told_by_the_connection_that_lost_it(pair):
    peer, consuming, _got, publishing = pair
    session = consuming.connection
    drain_quietly(consuming)
    gevent.spawn_later(0.02, peer.close)
    drain_quietly(publishing, LONG)
    with pytest.raises(LinkLostError):
        consuming.transport.drain_events(session, timeout=LONG)


def test_what_took_the_place_of_a_lost_connection_is_no_other_connection(connect, make_peer):
    """Who drained the lost one is told of the loss, and not that there is something on it."""
    peer = make_peer()
    connection = connect(peer)
    connection.channel().basic_consume("q", consumer_tag=TAG, callback=lambda message: None)
    lost = connection.connection  # which the garbage collector may leave there for a while
    drain_quietly(connection)
    peer.hang_up()
    wait_until(lambda: not lost.connected)

    def be_told_first():
        with pytest.raises(LinkLostError):
            connection.drain_events(timeout=LONG)
        connection.connect()

    gevent.spawn(be_told_first).get(timeout=30)
    assert connection.connection is not lost
    with pytest.raises(LinkLostError):
        connection.drain_events(timeout=0)
    drain_quietly(connection, 0)
