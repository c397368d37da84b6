"""Tests what a broker's refusals mean for a consumer, and how long it waits before it asks again."""

from __future__ import annotations

from typing import Any

import amqp
import pytest

from greenconsume.consuming import refusals
from greenconsume.consuming.refusals import Prospect, Refusals, refusal_of
from greenconsume.events import ConsumerRefused, ConsumerState
from greenconsume.events import Event as AnyEvent
from greenconsume.lifecycle import Lifecycle
from tests.unit.fakes import of_type

EXCLUSIVE = amqp.AccessRefused("ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use")
LOCKED = amqp.ResourceLocked(
    "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q' in vhost '/'"
)
OTHERWISE = amqp.PreconditionFailed(
    "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q' in vhost '/': received 'false' "
    "but current is 'true'"
)
MISSING = amqp.NotFound("NOT_FOUND - no queue 'q' in vhost '/'")


@pytest.fixture
def life() -> Lifecycle:
    return Lifecycle("Orders-1")


@pytest.fixture
def met(life: Lifecycle, monkeypatch: pytest.MonkeyPatch) -> Refusals:
    """The refusals of a consumer, whose waits have no jitter."""
    monkeypatch.setattr(refusals.random, "uniform", lambda low, high: 1.0)
    return Refusals(life)


@pytest.mark.parametrize(
    ("error", "prospect", "remedy"),
    [
        (EXCLUSIVE, Prospect.TAKE_OVER, "another consumer has the queue for itself"),
        (LOCKED, Prospect.TAKE_OVER, "leave out exclusive=True"),
        (OTHERWISE, Prospect.NONE, "it exists with other properties"),
        (MISSING, Prospect.HELP, "declare it"),
        (amqp.AccessRefused("access to queue 'q' refused"), Prospect.HELP, "grant the user"),
        (
            amqp.AccessRefused("access to queue 'exclusive' in vhost '/' refused for user 'u'"),
            Prospect.HELP,
            "grant the user",
        ),
        (
            amqp.AccessRefused("queue name 'amq.mine' contains reserved prefix 'amq.*'"),
            Prospect.NONE,
            "give it another",
        ),
        (
            amqp.AccessRefused("operation not permitted on the default exchange"),
            Prospect.NONE,
            "by its name",
        ),
        (
            amqp.PreconditionFailed("invalid arg 'x-message-ttl' for queue 'q': expected integer"),
            Prospect.NONE,
            "correct the argument",
        ),
        (
            amqp.PreconditionFailed("unknown exchange type 'no-such-type'"),
            Prospect.NONE,
            "correct the exchange's type",
        ),
        (amqp.PreconditionFailed("delivery ack timed out"), Prospect.HELP, "settle sooner"),
        (amqp.PreconditionFailed("unknown delivery tag 1"), Prospect.HELP, "settled twice"),
        (amqp.ChannelError("CHANNEL_ERROR"), Prospect.HELP, ""),
    ],
)
def test_a_refusal_has_its_remedy(error: BaseException, prospect: Prospect, remedy: str):
    refusal = refusal_of(error)
    assert refusal.prospect is prospect
    assert remedy in refusal.remedy


def test_the_waits_grow_up_to_their_maximum(met: Refusals):
    assert [met.tell(MISSING) for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_who_stands_by_looks_often_enough_to_take_over_soon(met: Refusals):
    assert [met.tell(EXCLUSIVE) for _ in range(4)] == [1.0, 2.0, 4.0, 4.0]


def test_the_waits_begin_anew_for_who_has_consumed_well(
    met: Refusals, monkeypatch: pytest.MonkeyPatch
):
    for _ in range(3):
        met.tell(MISSING)
    met.consumes()
    assert met.tell(MISSING) == 8.0  # it had hardly begun
    monkeypatch.setattr(refusals, "CONSUMED_WELL", 0.0)
    met.consumes()
    assert met.tell(MISSING) == 1.0


@pytest.mark.parametrize(
    ("error", "state"), [(LOCKED, ConsumerState.STANDBY), (MISSING, ConsumerState.CONNECTING)]
)
def test_only_who_may_take_over_stands_by(
    met: Refusals, life: Lifecycle, error: BaseException, state: ConsumerState
):
    met.tell(error)
    assert life.state is state


def test_a_refusal_is_one_line_with_the_remedy_and_no_traceback(
    met: Refusals, caplog: pytest.LogCaptureFixture
):
    met.tell(OTHERWISE)
    [record] = caplog.records
    assert record.exc_info is None
    assert "Orders-1" in record.getMessage()
    assert "declare it with these, or delete it once it is empty" in record.getMessage()
    assert "(attempt 1, the next in 1.0 s)" in record.getMessage()


def test_who_stands_by_says_so_once(met: Refusals, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        for _ in range(5):
            met.tell(EXCLUSIVE)
        met.tell(LOCKED)
    assert len(caplog.records) == 2


def test_what_no_waiting_mends_is_told_to_who_starts(
    met: Refusals, life: Lifecycle, events: list[AnyEvent], caplog: pytest.LogCaptureFixture
):
    told: list[Any] = []
    life.on_refused = lambda error, remedy: not told.append((error, remedy))
    met.tell(MISSING)
    assert told == []
    caplog.clear()
    met.tell(OTHERWISE)
    assert told[0][0] is OTHERWISE
    assert caplog.text == ""  # it is raised
    assert of_type(events, ConsumerRefused)[-1].known


def test_a_mistake_of_a_running_consumer_is_no_refusal_of_its_start(met: Refusals, life: Lifecycle):
    """A handler may declare something otherwise on the channel that its consumer consumes on."""
    told: list[Any] = []
    life.on_refused = lambda error, remedy: not told.append(error)
    met.consumes()
    met.tell(OTHERWISE)
    assert told == []
