"""The warning that a message stays unsettled until the broker loses patience."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from kombu import Connection, Queue

from greenconsume.amqp.ledger import ACK, Ledger
from greenconsume.events import Event as AnyEvent
from greenconsume.events import UnsettledTooLong
from greenconsume.handling import unsettled_watch
from greenconsume.handling.options import ConsumerOptions
from greenconsume.mixins import ConsumerMixin
from greenconsume.runtime.greenlet import spawn
from tests.options import say
from tests.peer import Peer
from tests.unit.fakes import of_type
from tests.waiting import wait_until

#: Seconds; told at four fifths of it, and looked for twenty times in it.
DEADLINE = 0.1


class Channel:
    """As much of a channel as is looked at."""

    def __init__(self) -> None:
        self.epoch = 0
        self.ledger = Ledger()

    @property
    def oldest_unsettled(self) -> tuple[int, float] | None:
        return self.ledger.oldest

    def settle(self, tag: int) -> None:
        self.ledger.settle(tag, ACK)
        self.ledger.flush()


class Session(SimpleNamespace):
    __hash__ = object.__hash__


@pytest.fixture
def make_session() -> Iterator[Callable[..., Any]]:
    sessions: list[Any] = []

    def make(deadline: float = DEADLINE, channels: int = 1) -> Any:
        sessions.append(Session(channels={n: Channel() for n in range(channels)}))
        unsettled_watch.watch(sessions[-1], f"c-{len(sessions)}", deadline)
        return sessions[-1]

    yield make
    for session in sessions:
        unsettled_watch.unwatch(session)


def told(events: list[AnyEvent]) -> list[tuple[str, int]]:
    return [(e.consumer, e.delivery_tag) for e in of_type(events, UnsettledTooLong)]


def test_the_ledger_knows_its_oldest_delivery():
    channel = Channel()
    assert channel.oldest_unsettled is None
    for tag in (1, 2, 3):
        channel.ledger.deliver(tag)
    channel.settle(2)
    channel.settle(1)
    assert channel.oldest_unsettled is not None
    assert channel.oldest_unsettled[0] == 3


def test_a_message_is_told_of_once_and_before_the_deadline(make_session, events: list[AnyEvent]):
    session = make_session()
    session.channels[0].ledger.deliver(7)
    wait_until(lambda: told(events))
    (event,) = of_type(events, UnsettledTooLong)
    assert event.deadline == DEADLINE
    assert event.seconds >= unsettled_watch.SHARE * DEADLINE
    gevent.sleep(DEADLINE / 2)
    assert told(events) == [("c-1", 7)]


def test_of_many_on_a_channel_the_oldest_is_told_of(make_session, events: list[AnyEvent]):
    """Five hundred handlers that hang are not five hundred lines."""
    session = make_session(channels=2)
    for tag in range(1, 500):
        session.channels[0].ledger.deliver(tag)
    session.channels[1].ledger.deliver(900)
    wait_until(lambda: len(told(events)) == 2)
    gevent.sleep(DEADLINE / 4)
    assert sorted(told(events)) == [("c-1", 1), ("c-1", 900)]
    session.channels[0].settle(1)
    wait_until(lambda: ("c-1", 2) in told(events))


def test_a_message_that_is_settled_in_time_is_not_told_of(make_session, events: list[AnyEvent]):
    session, other = make_session(), make_session()
    session.channels[0].ledger.deliver(1)
    other.channels[0].ledger.deliver(2)
    session.channels[0].settle(1)
    wait_until(lambda: told(events))
    assert told(events) == [("c-2", 2)]


def test_the_same_tag_of_a_channels_next_life_is_another_message(make_session, events):
    session = make_session()
    channel = session.channels[0]
    channel.ledger.deliver(1)
    wait_until(lambda: len(told(events)) == 1)
    channel.ledger.clear()
    channel.epoch += 1
    channel.ledger.deliver(1)
    wait_until(lambda: len(told(events)) == 2)


def test_a_shorter_deadline_that_comes_later_is_kept(make_session, events: list[AnyEvent]):
    make_session(deadline=1000.0)
    gevent.idle()
    session = make_session()
    session.channels[0].ledger.deliver(1)
    wait_until(lambda: told(events))


def test_ten_thousand_consumers_are_looked_after_by_one_greenlet(make_session):
    started: list[Any] = []
    gevent.Greenlet.add_spawn_callback(started.append)
    try:
        for _ in range(10_000):
            make_session(deadline=1800.0)
        gevent.idle()
    finally:
        gevent.Greenlet.remove_spawn_callback(started.append)
    assert len(started) <= 1


class Forgetful(ConsumerMixin):
    """Settles nothing."""

    options = ConsumerOptions(settle_deadline=DEADLINE)

    def __init__(self, url: str) -> None:
        self.connection = Connection(url, transport_options={"close_timeout": 0.2})

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([Queue("q")], callbacks=[lambda body, message: None])]


@pytest.mark.parametrize("concurrency", [None, 2])
def test_a_consumer_is_looked_after_while_it_consumes(
    peer: Peer, events: list[AnyEvent], concurrency: int | None
):
    """HAZARDS.md row 19: a warning before the broker closes the channel."""
    consumer = Forgetful(peer.url)
    say(consumer, concurrency=concurrency)
    greenlet = spawn(consumer)
    assert greenlet.ready.wait(30)
    peer.deliver(1, peer.wait_for("basic.consume").args[2], 5)
    wait_until(lambda: told(events) == [(greenlet.name, 5)])
    greenlet.stop()
    assert greenlet.join(30)


def test_a_consumer_that_wants_no_warning_is_not_looked_after(peer: Peer, events):
    greenlets = []
    for number, deadline in enumerate((0, DEADLINE)):
        consumer = Forgetful(peer.url)
        say(consumer, settle_deadline=deadline)
        greenlets.append(spawn(consumer))
        assert greenlets[-1].ready.wait(30)
        peer.deliver(1, peer.wait_for("basic.consume", number + 1).args[2], 5)
    wait_until(lambda: told(events) == [(greenlets[1].name, 5)])
    for greenlet in greenlets:
        greenlet.stop()
        assert greenlet.join(30)
