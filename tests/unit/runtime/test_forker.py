"""Nothing consumes in a process that forks others for it (HAZARDS row 23)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from greenconsume import Runtime, spawn
from greenconsume.errors import ArbiterError
from greenconsume.runtime import forker
from tests.unit.fakes import Idle, Stubborn


@pytest.fixture(autouse=True)
def forbidden_in_the_test_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(forker, "_forbidden_in", None)
    yield
    monkeypatch.undo()


def test_what_consumes_is_ended_and_counted():
    forker.forbid(0.0)
    forker._forbidden_in = None  # what other tests have left, has been counted
    runtime = Runtime()
    runtime.spawn(Idle, replicas=3)
    runtime.start()
    greenlet = spawn(Idle(runtime.connection))
    assert forker.forbid(5.0) == 2
    assert greenlet.ready()
    assert all(child.greenlet.ready() for child in runtime.children)
    assert forker.forbid(5.0) == 0


def test_what_does_not_end_in_time_is_killed():
    greenlet = spawn(Stubborn(Runtime().connection))
    assert forker.forbid(0.01) >= 1
    assert greenlet.killed


def test_nothing_can_be_started_from_then_on():
    forker.forbid(5.0)
    runtime = Runtime()
    runtime.spawn(Idle)
    with pytest.raises(ArbiterError, match="name it in gunicorn"):
        runtime.start()
    with pytest.raises(ArbiterError):
        spawn(Idle(runtime.connection))
