"""Tests what becomes of a message that its handler did not settle, over memory and over a scripted peer."""

from __future__ import annotations

from uuid import uuid4

import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Consumer, Producer, Queue

from greenconsume.failures.requeues import DelayedRequeues, give_back, is_settleable
from greenconsume.transports import registry
from tests import frames
from tests.unit.fakes import recording
from tests.waiting import wait_until


@pytest.fixture
def channel():
    """A channel of the memory transport."""
    registry.register()
    with Connection("memory://") as connection:
        yield connection.channel()


@pytest.fixture
def requeues():
    made = DelayedRequeues()
    yield made
    made.cancel()


def received(channel, no_ack=False):
    """A queue, and the message that was in it."""
    queue, got = Queue(f"q-{uuid4().hex[:8]}"), []
    consumer = Consumer(channel, [queue], on_message=got.append, no_ack=no_ack)
    consumer.consume()
    Producer(channel).publish({"n": 1}, routing_key=queue.name)
    channel.connection.client.drain_events(timeout=30)
    consumer.cancel()
    return queue.name, got[0]


def amqp_message(peer, no_ack=False):
    """A message from a peer, and its connection."""
    registry.register()
    connection, got = Connection(peer.url, transport_options={"close_timeout": 0.2}), []
    consumer = Consumer(connection.channel(), [Queue("q")], on_message=got.append, no_ack=no_ack)
    consumer.consume()
    peer.deliver(1, next(iter(consumer._active_tags.values())), 1)
    connection.drain_events(timeout=30)
    return connection, got[0]


# -- whether it can be settled ------------------------------------------------------------------------


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue"])
def test_a_message_is_settleable_until_it_is_settled(channel, settle):
    _, message = received(channel)
    assert is_settleable(message)
    getattr(message, settle)()
    assert not is_settleable(message)


def test_a_message_that_was_settled_behind_its_back_is_not_settleable(channel):
    _, message = received(channel)
    channel.basic_ack(message.delivery_tag)
    assert not is_settleable(message)


def test_a_message_without_acks_is_not_settleable(channel):
    _, message = received(channel, no_ack=True)
    assert not is_settleable(message)


def test_a_message_without_a_channel_is_not_settleable(channel):
    _, message = received(channel)
    message.channel = None
    assert not is_settleable(message)


@pytest.mark.parametrize("no_ack", [False, True])
def test_a_message_from_a_broker_is_settleable_unless_it_needs_no_ack(peer, no_ack):
    connection, message = amqp_message(peer, no_ack)
    assert is_settleable(message) is not no_ack
    message.ack()
    assert not is_settleable(message) or no_ack
    connection.close()


# -- requeueing later ---------------------------------------------------------------------------------


def test_a_message_is_requeued_after_the_delay_and_not_before(channel, requeues):
    name, message = received(channel)
    requeues.add(message, 0.02)
    gevent.sleep(0)
    assert (channel._size(name), len(requeues)) == (0, 1)
    wait_until(lambda: channel._size(name) == 1)
    assert not is_settleable(message)
    wait_until(lambda: len(requeues) == 0)


def test_a_message_that_was_settled_meanwhile_is_left_alone(channel, requeues, monkeypatch):
    errors = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda *args: errors.append(args))
    name, message = received(channel)
    requeues.add(message, 0.005)
    message.ack()
    wait_until(lambda: len(requeues) == 0)
    assert (channel._size(name), errors) == (0, [])


def test_cancelling_forgets_all_and_leaves_them_unsettled(channel, requeues):
    messages = [received(channel)[1] for _ in range(3)]
    for message in messages:
        requeues.add(message, 0.005)
    requeues.cancel()
    assert len(requeues) == 0
    Event().wait(0.02)
    assert all(is_settleable(message) for message in messages)


def test_cancelling_never_switches(channel, requeues):
    requeues.add(received(channel)[1], 60)
    switched = []
    witness = gevent.spawn(switched.append, True)
    requeues.cancel()
    assert switched == []
    witness.join()


def test_a_message_whose_link_was_lost_meanwhile_is_only_counted(peer, requeues):
    connection, message = amqp_message(peer)
    session = connection.connection
    peer.hang_up()
    wait_until(lambda: not session.connected)
    with recording() as events:
        requeues.add(message, 0.001)
        wait_until(lambda: len(requeues) == 0)
    assert [type(event).__name__ for event in events] == ["StaleSettle"]
    assert message.channel.stale_count == 1
    connection.collect()


def test_a_message_whose_channel_was_closed_meanwhile_is_only_counted(peer, requeues):
    connection, message = amqp_message(peer)
    peer.send(frames.channel_close(1, 406, "PRECONDITION_FAILED"))
    peer.wait_for("channel.close-ok")
    requeues.add(message, 0.001)
    wait_until(lambda: len(requeues) == 0)
    assert "basic.reject" not in peer.names
    assert message.channel.stale_count == 1
    connection.collect()


@pytest.mark.parametrize(("failed", "said"), [(True, "basic.reject"), (False, "basic.nack")])
def test_the_broker_is_told_whether_a_message_has_failed_or_only_waited(
    peer, requeues, failed, said
):
    """From RabbitMQ 4.3 on a quorum queue counts a reject towards its limit, and a nack not."""
    connection, message = amqp_message(peer)
    requeues.add(message, 0.001, failed=failed)
    frame = peer.wait_for(said)
    assert frame.args == ([1, True] if failed else [1, False, True])
    assert {"basic.reject", "basic.nack"} & set(peer.names) == {said}
    connection.collect()


def test_the_users_own_requeue_and_reject_are_rejects(peer):
    connection, message = amqp_message(peer)
    message.requeue()
    assert peer.wait_for("basic.reject").args == [1, True]
    assert "basic.nack" not in peer.names
    connection.collect()


def test_what_a_stop_overtakes_goes_back_as_not_failed(peer):
    connection, message = amqp_message(peer)
    give_back(message)
    assert peer.wait_for("basic.nack").args == [1, False, True]
    assert message.acknowledged
    connection.collect()


def test_a_message_of_a_transport_that_knows_no_difference_is_requeued(channel):
    queue, message = received(channel)
    give_back(message)
    assert message.acknowledged
    assert channel.basic_get(queue).payload == {"n": 1}
