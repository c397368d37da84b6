"""Tests who is kept apart, for how long, and which messages are known to close a link."""

from __future__ import annotations

import pytest

from greenconsume.links import quarantine
from greenconsume.links.quarantine import LONG_ENOUGH, MAX_POISONS, Quarantine


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(quarantine, "monotonic", lambda: now[0])
    return now


def test_only_time_in_which_a_consumer_consumed_counts(clock):
    kept = Quarantine()
    kept.put("a")
    clock[0] += 10 * LONG_ENOUGH
    assert kept.holds("a")
    kept.note_consuming("a", True)
    clock[0] += LONG_ENOUGH - 1
    kept.note_consuming("a", False)
    clock[0] += 10 * LONG_ENOUGH
    assert kept.holds("a")
    kept.note_consuming("a", True)
    clock[0] += 1
    assert not kept.holds("a")


def test_another_loss_begins_the_time_anew(clock):
    kept = Quarantine()
    kept.put("a")
    kept.note_consuming("a", True)
    clock[0] += LONG_ENOUGH - 1
    kept.put("a")
    clock[0] += 2
    assert kept.holds("a")


def test_who_is_not_of_a_group_is_a_group_by_himself(clock):
    kept = Quarantine()
    kept.put("a")
    kept.put("b", "many")
    assert [kept.group_of(name) for name in "abc"] == ["a", "many", ""]
    assert kept.groups == {"a", "many"}


def test_a_message_has_failed_once_for_each_time_that_it_closed_a_link():
    kept, error = Quarantine(), ValueError()
    assert kept.sentence("m") is None
    for count in (1, 2):
        kept.convict("m", error)
        assert kept.sentence("m") == (error, count)
        assert kept.sentence("m") is None


def test_no_more_messages_are_remembered_than_so_many():
    kept = Quarantine()
    for number in range(MAX_POISONS + 1):
        kept.convict(str(number), ValueError())
    assert kept.sentence("0") is None
    assert kept.sentence(str(MAX_POISONS)) is not None
