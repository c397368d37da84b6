"""Tests how much of their prefetch consumers take while the hub lags behind."""

from __future__ import annotations

import pytest
from kombu import Connection, Consumer, Queue

from greenconsume.handling.intake import Fitted, Intake, can_be_fitted


def after(intake, *lags):
    return [change.share for change in map(intake.note, lags) if change is not None]


def test_less_is_taken_step_by_step_while_the_hub_is_late():
    intake = Intake(0.1)
    assert after(intake, *[0.5] * 4) == [0.5]
    assert after(intake, *[0.5] * 4) == [0.25]
    assert intake.prefetch(100) == 25
    assert after(intake, *[0.5] * 100)[-1] == 2.0**-16
    assert intake.prefetch(100) == 1


def test_more_is_taken_again_once_the_hub_has_been_in_time_for_a_while():
    intake = Intake(0.1)
    after(intake, *[0.5] * 8)
    assert after(intake, *[0.08] * 100) == []  # within the limit, and no more than that
    assert after(intake, *[0.01] * 15) == []
    assert after(intake, *[0.01] * 17) == [0.5, 1.0]
    assert after(intake, *[0.01] * 100) == []
    assert intake.prefetch(100) == 100


def test_a_consumer_without_a_prefetch_has_one_while_the_hub_is_late():
    intake = Intake(0.1)
    assert (intake.prefetch(None), intake.prefetch(0)) == (0, 0)
    after(intake, *[0.5] * 4)
    assert (intake.prefetch(None), intake.prefetch(0)) == (500, 500)


@pytest.fixture
def channel():
    with Connection("memory://") as connection:
        yield connection.channel()


@pytest.mark.parametrize(
    ("queue", "options", "fitted"),
    [
        (Queue("q"), {}, True),
        (Queue("q"), {"no_ack": True}, False),
        (Queue("q", exclusive=True), {}, False),
        (Queue("q", auto_delete=True), {}, False),
        (Queue("q", queue_arguments={"x-queue-type": "stream"}), {}, False),
    ],
)
def test_who_would_lose_by_being_cancelled_is_left_alone(channel, queue, options, fitted):
    assert can_be_fitted(Consumer(channel, [queue], auto_declare=False, **options)) is fitted


def test_a_consumer_that_has_cancelled_itself_stays_so(channel):
    intake, consumer = Intake(0.1), Consumer(channel, [Queue("q")])
    handle = Fitted(consumer, 10, intake).handler(lambda *_: None)
    after(intake, *[0.5] * 4)
    handle(consumer, object())
    assert not consumer.consuming_from("q")
