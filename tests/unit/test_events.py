from __future__ import annotations

import dataclasses
import logging

import pytest

from greenconsume import events
from greenconsume.events import Event, LinkUp, emit, subscribe
from tests.unit.fakes import recording

UP = LinkUp("amqp://localhost//")


def test_every_hook_is_told_of_an_event_in_the_order_of_their_subscription():
    """All observers see the same event, the oldest subscription first."""
    told: list[tuple[str, Event]] = []
    ends = [subscribe(lambda event, name=name: told.append((name, event))) for name in "ab"]
    emit(UP)
    for end in ends:
        end()
    assert told == [("a", UP), ("b", UP)]


def test_a_hook_whose_subscription_ended_is_told_no_more():
    """Ending a subscription is final, and ending it twice does no harm."""
    told: list[Event] = []
    end = subscribe(told.append)
    end()
    end()
    emit(UP)
    assert told == []


def test_a_failing_hook_is_logged_and_isolated(caplog: pytest.LogCaptureFixture):
    """What one observer raises reaches neither the others nor whoever emits."""

    def broken(event: Event, /) -> None:
        raise RuntimeError("broken observer")

    end = subscribe(broken)
    with recording() as seen:
        emit(UP)
    end()
    assert seen == [UP]
    (record,) = [r for r in caplog.records if r.name == "greenconsume.events"]
    assert record.levelno == logging.ERROR
    assert "broken" in record.getMessage()
    assert "LinkUp" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], RuntimeError)


def test_a_hook_may_end_its_own_subscription():
    """A hook that leaves while it is called does not make the next one miss the event."""
    told: list[str] = []

    def once(event: Event, /) -> None:
        told.append("once")
        end_once()

    end_once = subscribe(once)
    end_always = subscribe(lambda event: told.append("always"))
    emit(UP)
    emit(UP)
    end_always()
    assert told == ["once", "always", "always"]


KINDS = [
    kind
    for kind in vars(events).values()
    if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_cannot_be_changed(kind: type[Event]):
    """Events are values: a hook cannot alter what the next one sees."""
    fields = [field.name for field in dataclasses.fields(kind)]
    event = kind(*fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, fields[0], "other")
    assert not hasattr(event, "__dict__")


def test_a_state_is_shown_as_its_word():
    """Logs, metrics and messages name a state by the word in the documentation."""
    assert f"{events.ConsumerState.CONSUMING}" == "consuming"
    assert events.ConsumerState("failed") is events.ConsumerState.FAILED
