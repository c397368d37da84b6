"""Tests the three answers to a probe."""

from __future__ import annotations

import pytest

from greenconsume.admin.health import IDLE_SECONDS, StallWatch, live, ready
from greenconsume.admin.status import RunningHandler
from tests.unit.admin.fakes import consumer, link, process


def test_a_process_that_consumes_is_live_and_ready():
    status = process(consumer(), links=(link(),))
    assert live(status).yes
    assert ready(status).yes


def test_a_broker_that_is_away_does_not_make_a_process_dead():
    status = process(consumer(state="connecting"), links=(link(up=False),))
    assert live(status).yes
    assert not ready(status).yes


def test_a_reader_that_does_not_move_makes_the_process_dead():
    status = process(consumer(), links=(link(heartbeat=30.0, silent=66.0),))
    assert "reader of link amqp://guest:**@127.0.0.1//" in live(status).reasons[0]
    assert live(process(links=(link(heartbeat=30.0, silent=60.0),))).yes
    assert live(process(links=(link(heartbeat=0.0, silent=6000.0),))).yes


@pytest.mark.parametrize("state", ["starting", "connecting", "draining", "failed"])
def test_one_consumer_that_does_not_consume_makes_the_process_unready(state):
    status = process(consumer("Orders-1"), consumer("Orders-2", state=state, error="OSError: gone"))
    assert ready(status).reasons == (f"consumer Orders-2 is {state}: OSError: gone",)


@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_what_an_operator_wanted_is_ready(state):
    assert ready(process(consumer(state=state))).yes


@pytest.mark.parametrize("state", ["standby", "idle"])
def test_who_stands_by_or_cancelled_itself_is_no_reason_to_be_unready(state):
    """A process that is there to take over would never be ready."""
    assert ready(process(consumer("Orders-1"), consumer("Orders-2", state=state))).yes


def test_a_blocked_link_a_drain_and_a_kill_switch_are_unready():
    assert "blocked" in ready(process(links=(link(blocked=True),))).reasons[0]
    assert ready(process(state="draining")).reasons == ("the process is draining",)
    assert "kill switch" in ready(process(consumer(switched_off=True))).reasons[0]


def test_a_handler_that_runs_for_too_long_is_a_stall():
    running = (RunningHandler("5", 61.0), RunningHandler("6", 1.0))
    status = process(consumer(running=running))
    assert "message 5 has run for 61 s" in StallWatch(60.0).stalled(status).reasons[0]
    assert StallWatch(62.0).stalled(status).yes
    assert StallWatch(None).stalled(status).yes


def test_messages_that_wait_beside_idle_handlers_are_a_stall_if_nothing_moves():
    watch = StallWatch(None)
    status = process(consumer(waiting=3, idle=2, received=10))
    assert watch.stalled(status, now=0.0).yes
    assert watch.stalled(status, now=IDLE_SECONDS - 0.1).yes
    (reason,) = watch.stalled(status, now=IDLE_SECONDS).reasons
    assert reason.startswith("consumer Orders-1: 3 messages wait while 2 handlers are idle")
    moved = process(consumer(waiting=3, idle=2, received=11))
    assert watch.stalled(moved, now=IDLE_SECONDS + 1).yes


@pytest.mark.parametrize(
    "known", [{"held": True}, {"idle": 0}, {"waiting": 0}, {"state": "paused"}]
)
def test_a_consumer_that_should_not_take_more_does_not_stall(known):
    watch = StallWatch(None)
    status = process(consumer(**{"waiting": 3, "idle": 2, **known}))
    watch.stalled(status, now=0.0)
    assert watch.stalled(status, now=100.0).yes
