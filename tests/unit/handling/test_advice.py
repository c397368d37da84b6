"""Tests what is said of a handler's error besides its traceback."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import amqp
import pytest
from gevent.exceptions import ConcurrentObjectUseError

from greenconsume.events import BlockingConnectionShared, HandlerClosedChannel
from greenconsume.events import Event as AnyEvent
from greenconsume.handling import advice
from greenconsume.handling.advice import advise
from tests.unit.fakes import of_type


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "_told_of_sharing", False)


def message(is_open: bool = True) -> Any:
    channel = SimpleNamespace(is_open=is_open)
    return SimpleNamespace(channel=channel, delivery_tag=7, delivery_info={"routing_key": "q"})


def wrapped(error: BaseException) -> BaseException:
    try:
        raise OSError("publishing failed") from error
    except OSError as exc:
        return exc


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped])
def test_a_blocking_connection_that_handlers_share_is_told_of_once(
    wrap: Any, events: list[AnyEvent], caplog: pytest.LogCaptureFixture
):
    """HAZARDS row 40: py-amqp's connection has one user at a time, and each of fifty handlers fails on it."""
    for _ in range(50):
        advise("Orders-1", message(), wrap(ConcurrentObjectUseError("in use")))
    assert of_type(events, BlockingConnectionShared) == [BlockingConnectionShared("Orders-1")]
    assert "greenconsume.patch_all()" in caplog.text


def test_an_error_of_a_channel_that_is_still_open_has_another_cause(events: list[AnyEvent]):
    """As where a handler used a channel of its own, as it should."""
    advise("Orders-1", message(is_open=True), amqp.NotFound("no queue"))
    assert events == []
    advise("Orders-1", message(is_open=False), amqp.NotFound("no queue"))
    [event] = of_type(events, HandlerClosedChannel)
    assert (event.consumer, event.delivery_tag, event.routing_key) == ("Orders-1", 7, "q")


def test_an_error_of_the_handlers_own_needs_no_advice(events: list[AnyEvent]):
    advise("Orders-1", message(is_open=False), ValueError("no stock"))
    assert events == []
