"""Tests when a kill switch trips, waits, tries and resets."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytest
from gevent.event import Event

from greenconsume import KillSwitch, Reject
from greenconsume.events import ConsumerState, KillSwitchReset, KillSwitchTripped
from greenconsume.handling.kill_switch import Switch, fit_switch
from greenconsume.lifecycle import Lifecycle
from tests.integration.consumers import Recorder, consuming, green_connection, observed
from tests.options import say
from tests.unit.fakes import of_type, recording
from tests.waiting import AT_ONCE, wait_until


def switch(threshold: float = 0.5, window: int = 4, pause: float = 10.0) -> Switch:
    return Switch(KillSwitch(threshold, window, pause), Lifecycle("orders"))


def note(switch: Switch, outcomes: str) -> None:
    for outcome in outcomes:
        switch.note(failed=outcome == "x")


@pytest.mark.parametrize(
    ("outcomes", "trips"),
    [
        ("xxx", False),  # not enough to judge by
        ("xx..", False),  # half of them is not more than half
        (".xxx", True),
        ("xxx.", False),  # a success never trips
        ("xxx..xx", False),
        ("xxx..xxx", True),
        ("xx.x", True),
    ],
)
def test_it_trips_when_more_than_its_share_of_the_last_messages_failed(outcomes, trips):
    tried = switch()
    note(tried, outcomes)
    assert tried.consume_stop.is_set() is trips


def test_what_fails_after_it_has_tripped_trips_it_once():
    with recording() as events:
        tried = switch()
        note(tried, "xxxxxxxx")
    assert of_type(events, KillSwitchTripped) == [KillSwitchTripped("orders", 4, 4, 10.0)]


def test_it_does_not_pause_before_it_has_tripped():
    tried = switch()
    note(tried, "xx..")
    assert tried.pause() is None
    assert not tried.half_open


def test_it_waits_tries_one_waits_again_and_resets():
    with recording() as events:
        tried = switch()
        note(tried, "xxxx")
        pauses = [tried.pause()]
        tried.resume()
        assert tried.half_open
        assert not tried.consume_stop.is_set()
        note(tried, "x")
        pauses.append(tried.pause())
        tried.resume()
        note(tried, ".")
        assert tried.pause() is None
        assert not tried.half_open
    assert all(pause is not None and 10.0 <= pause <= 11.0 for pause in pauses)
    assert [type(event) for event in events] == [
        KillSwitchTripped,
        KillSwitchTripped,
        KillSwitchReset,
    ]


def test_after_a_reset_it_judges_by_new_messages_alone():
    tried = switch()
    note(tried, "xxxx")
    tried.pause()
    tried.resume()
    note(tried, ".")
    tried.pause()
    note(tried, "xxx")
    assert not tried.consume_stop.is_set()
    note(tried, "x")
    assert tried.consume_stop.is_set()


def test_without_a_message_to_judge_by_it_tries_another_one():
    tried = switch()
    note(tried, "xxxx")
    tried.pause()
    tried.resume()
    assert tried.pause() is None
    assert tried.half_open


def test_a_stop_ends_the_loop_and_is_not_taken_back():
    life = Lifecycle("orders")
    tried = Switch(KillSwitch(), life)
    life.stop.set()
    wait_until(tried.consume_stop.is_set)
    tried.resume()
    assert tried.consume_stop.is_set()


def test_half_open_it_has_the_broker_send_one_message():
    asked: list[int] = []

    class Asked:
        def qos(self, prefetch_count: int) -> None:
            asked.append(prefetch_count)

    consumer = Asked()
    tried = switch()
    fit_switch(consumer, tried)
    tried.half_open = True
    fit_switch(consumer, tried)
    fit_switch(consumer, None)
    assert asked == [1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": -0.1},
        {"threshold": 1},
        {"threshold": float("nan")},
        {"window": 0},
        {"window": 2.5},
        {"window": True},
        {"pause": -1},
        {"pause": float("nan")},
        {"threshold": "half"},
        {"pause": "1m"},
    ],
)
def test_numbers_out_of_range_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        KillSwitch(**arguments)


@pytest.fixture
def consumer(queue_name: str) -> Any:
    """Consumes from memory, and fails on all messages but those that say otherwise."""

    def handle(body: Any, _message: Any) -> None:
        assert body == "good"

    made = Recorder("memory://", queue_name, handle)
    say(made, on_error=Reject())
    made.restart_limit.fill_rate = made.restart_limit.capacity = 1000  # a token is no part of this
    return made


def publish(queue: str, *bodies: str) -> None:
    with green_connection("memory://") as connection:
        for body in bodies:
            connection.Producer().publish(body, routing_key=queue)


def test_the_backlog_stays_in_its_queue(consumer, queue_name):
    say(consumer, kill_switch=KillSwitch(0.5, 4, pause=60.0))
    with observed(KillSwitchTripped) as tripped, consuming(consumer) as (greenlet,):
        publish(queue_name, *["bad"] * 10)
        wait_until(lambda: tripped)
        wait_until(lambda: greenlet.state is ConsumerState.CONNECTING)
        with green_connection("memory://") as connection:
            assert connection.default_channel._size(queue_name) == 6


def test_what_waits_for_a_place_in_the_pool_is_given_back(consumer, queue_name):
    gate, begun = Event(), []

    def handle(body: Any, message: Any) -> None:
        begun.append(message)
        gate.wait()
        raise ValueError(body)

    consumer.handle = handle
    say(consumer, concurrency=2)
    say(consumer, kill_switch=KillSwitch(0.5, 2, pause=60.0))
    with consuming(consumer) as (greenlet,):
        publish(queue_name, *["bad"] * 10)
        wait_until(lambda: len(begun) == 2)
        gate.set()
        wait_until(lambda: greenlet.state is ConsumerState.CONNECTING)
        with green_connection("memory://") as connection:
            assert connection.default_channel._size(queue_name) == 8
    assert len(begun) == 2


def test_it_consumes_again_after_one_message_was_handled(consumer, queue_name):
    say(consumer, kill_switch=KillSwitch(0.5, 4, pause=0.01))
    with observed(KillSwitchTripped) as tripped, observed(KillSwitchReset) as reset:
        with consuming(consumer):
            publish(queue_name, *["bad"] * 6, *["good"] * 10)
            consumer.wait_for(10)
    assert len(tripped) == 3  # by four of them, and then by each of the two that it tried
    assert len(reset) == 1


def test_a_stop_ends_the_pause_at_once(consumer, queue_name):
    say(consumer, kill_switch=KillSwitch(0.5, 1, pause=60.0))
    with observed(KillSwitchTripped) as tripped, consuming(consumer) as (greenlet,):
        publish(queue_name, "bad")
        wait_until(lambda: tripped)
        began = monotonic()
        greenlet.stop()
        assert greenlet.join(30)
        assert monotonic() - began < AT_ONCE


def test_a_consumer_that_shadows_should_stop_is_not_deaf_in_the_pause(consumer, queue_name):
    class Shadowing(type(consumer)):  # type: ignore[misc]
        should_stop = False

    consumer.__class__ = Shadowing
    say(consumer, kill_switch=KillSwitch(0.5, 1, pause=60.0))
    with observed(KillSwitchTripped) as tripped, consuming(consumer) as (greenlet,):
        publish(queue_name, "bad")
        wait_until(lambda: tripped)
        consumer.should_stop = True
        assert greenlet.join(30)
