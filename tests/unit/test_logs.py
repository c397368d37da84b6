from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from greenconsume import events, logs
from greenconsume.events import ConsumerState, emit

URI = "amqp://guest:**@localhost:5672//"
ERROR = ValueError("no such thing")

LINES = [
    (events.LinkUp(URI), "links", "INFO"),
    (events.LinkDown(URI, ERROR, 500), "links", "WARNING"),
    (events.LinkBlocked(URI, True, "low on memory"), "links", "WARNING"),
    (events.LinkBlocked(URI, False, ""), "links", "INFO"),
    (events.SecretUpdated(URI, None, 0.0), "links", "DEBUG"),
    (events.SecretUpdated(URI, ERROR, 5.0), "links", "WARNING"),
    (events.ConnectFailed(URI, ERROR, 3, 4.0, False), "links", "WARNING"),
    (events.ConnectFailed(URI, ERROR, 1, 1.0, True), "links", "WARNING"),
    (events.PollingTransport("redis", 1.0), "transports", "INFO"),
    (
        events.ConsumerChanged("C-1", ConsumerState.STARTING, ConsumerState.CONNECTING),
        "runtime",
        "DEBUG",
    ),
    (events.ConsumerRestarting("C-1", ERROR, 2, 1.5), "runtime", "WARNING"),
    (events.ConsumerRestarting("C-1", None, 2, 1.5), "runtime", "WARNING"),
    (events.ConsumerGivenUp("C-1", ERROR), "runtime", "ERROR"),
    (events.ConsumerGivenUp("C-1", None), "runtime", "ERROR"),
    (events.HandlerFailed("C-1", 7, "orders", ERROR, "requeued in 1 s"), "handling", "ERROR"),
    (events.BlockingConnectionShared("C-1"), "handling", "WARNING"),
    (events.HandlerClosedChannel("C-1", 7, "orders", ERROR), "handling", "WARNING"),
    (events.ConsumerRefused("C-1", ERROR, "delete it", 1, 1.0), "consuming", "WARNING"),
    (events.ConsumerRefused("C-1", ERROR, "", 1, 1.0, stands_by=True), "consuming", "INFO"),
    (events.ConsumerRefused("C-1", ERROR, "", 1, 1.0, known=True), "consuming", "DEBUG"),
    (events.KillSwitchTripped("C-1", 11, 20, 30.0), "handling", "WARNING"),
    (events.KillSwitchReset("C-1", 31.5), "handling", "INFO"),
    (events.StaleSettle(7, 1), "handling", "DEBUG"),
    (events.UnsettledTooLong("C-1", 7, 1440.0, 1800.0), "handling", "WARNING"),
    (events.HubBlocked("C-1", 7, 2.5, "  File"), "runtime", "WARNING"),
    (events.HubBlocked("", None, 2.5, "  File"), "runtime", "WARNING"),
    (events.IntakeChanged(0.25, 0.7), "runtime", "WARNING"),
    (events.IntakeChanged(1.0, 0.0), "runtime", "INFO"),
    (events.MessageRenewed("C-1", "orders", 1, ""), "handling", "DEBUG"),
    (events.MessageRenewed("C-1", "orders", 10, "orders.dead"), "handling", "ERROR"),
    (events.PublishFailed(URI, 3, ERROR), "publishing", "ERROR"),
    (events.GarbageFrozen(900_000, 0.2), "runtime", "INFO"),
    (events.DrainStarted(20, "SIGTERM", 30.0), "runtime", "INFO"),
    (events.DrainEscalated("kill what is left", 2, "SIGTERM"), "runtime", "WARNING"),
    (events.DrainFinished(20, 0, 500, 300, 0, 0, 0.5), "runtime", "INFO"),
    (events.DrainFinished(18, 2, 500, 300, 0, 0, 0.5), "runtime", "WARNING"),
    (events.DrainFinished(20, 0, 500, 300, 1, 0, 0.5), "runtime", "WARNING"),
    (events.DrainFinished(20, 0, 500, 300, 0, 1, 0.5), "runtime", "WARNING"),
    (events.ConsumerDrained("C-1", 50, 30, 0, 0, 0.5), "handling", "DEBUG"),
    (events.ConsumerDrained("C-1", 50, 30, 1, 0, 0.5), "handling", "WARNING"),
    (events.ConsumerDrained("C-1", 50, 30, 0, 1, 0.5), "handling", "WARNING"),
    (events.HandlerInterrupted("C-1", 7, "SIGTERM", False), "handling", "DEBUG"),
    (events.HandlerInterrupted("C-1", 7, "SIGTERM", True), "handling", "WARNING"),
    (events.PrefetchTooSmall("C-1", 10, 50), "handling", "WARNING"),
    (events.ConsumersScaled("C", 1, 20), "runtime", "INFO"),
    (events.GreenletsDumped("hub"), "runtime", "WARNING"),
    (events.AdminListening("127.0.0.1:9191"), "admin", "INFO"),
    (events.AdminAsked("pause", "C-1"), "admin", "INFO"),
    (events.AdminRefused("POST", "/pause", "needs a token", 3), "admin", "WARNING"),
]


@pytest.fixture(autouse=True)
def all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "greenconsume")


@pytest.fixture
def root(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The root logger decides, and is afterwards as it was."""
    caplog.set_level(logging.NOTSET, "greenconsume")
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def stderr(root: None, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Read what was written since the last call."""
    return lambda: capsys.readouterr().err


@pytest.mark.parametrize(("event", "module", "level"), LINES)
def test_an_event_is_one_record(
    event: events.Event, module: str, level: str, caplog: pytest.LogCaptureFixture
):
    """Each event is logged once, by the logger of its module, at the level of the house."""
    emit(event)
    (record,) = caplog.records
    assert (record.name, record.levelname) == (f"greenconsume.{module}", level)
    assert "\n" not in record.getMessage()


def test_every_event_of_the_package_has_its_words():
    """No event is left to the words for unknown ones."""
    kinds = {kind for kind in vars(events).values() if is_event(kind)}
    assert kinds == {type(event) for event, _, _ in LINES}
    assert all(logs.describe(event).module != "events" for event, _, _ in LINES)


def is_event(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, events.Event) and kind is not events.Event


@dataclass(frozen=True, slots=True)
class Custom(events.Event):
    """An event of a user."""

    number: int


def test_an_event_of_a_user_is_named(caplog: pytest.LogCaptureFixture):
    """An event that the package does not know is told at DEBUG, with its fields for JSON."""
    emit(Custom(3))
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("DEBUG", "Custom")
    assert vars(record)["greenconsume"] == {"event": "Custom", "number": 3}


def test_a_failed_handler_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture):
    """The traceback is there, once, and with it what becomes of the message."""
    try:
        raise KeyError("price")
    except KeyError as exc:
        emit(events.HandlerFailed("C-1", 7, "orders", exc, "requeued in 1 s"))
    (record,) = caplog.records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)
    assert "requeued in 1 s" in record.getMessage()


def test_a_blocked_hub_is_logged_with_the_stack_of_what_blocks_it(
    stderr: Callable[[], str], caplog: pytest.LogCaptureFixture
):
    """Who and where: in the text below the line, in JSON as a field."""
    event = events.HubBlocked("C-1", 7, 2.5, '  File "shop.py", line 7, in on_order')
    logs.configure("INFO", "text")
    emit(event)
    line, stack = stderr().splitlines()
    assert "blocked for 2.5 s by consumer C-1, message 7" in line
    assert stack == event.stack
    logs.configure("INFO", "json")
    emit(event)
    assert json.loads(stderr())["stack"] == event.stack


def test_a_retry_is_logged_with_attempt_and_delay(caplog: pytest.LogCaptureFixture):
    """A line on a failed attempt says which it was and when the next one comes."""
    emit(events.ConnectFailed(URI, OSError("no route"), 3, 4.25, False))
    assert "no route (attempt 3, the next in 4.2 s)" in caplog.text
    assert "Traceback" not in caplog.text


def test_no_record_shows_a_password(caplog: pytest.LogCaptureFixture):
    """A password in an address or an error's words is masked, in the text and the fields."""
    secret = "amqp://me:s3cr/et@host//"
    for event in (
        events.LinkUp("amqp://me:s3cr@host//"),
        events.LinkDown("amqp://me:s3cr@host//", OSError("amqps://:s3cr@host failed"), 1),
        events.ConnectFailed("redis://:s3cr@h;redis://:s3cr@i", OSError(), 1, 1.0, False),
    ):
        emit(event)
    shown = caplog.text + str([vars(record)["greenconsume"] for record in caplog.records])
    assert "s3cr" not in shown
    assert "me:**@host" in shown
    assert logs.redact("http://host/path?at=me@there") == "http://host/path?at=me@there"
    assert logs.redact(secret.replace("/et", "%2Fet")) == "amqp://me:**@host//"


def test_text_is_a_line_to_read(stderr: Callable[[], str]):
    """The command line's text has time, level, logger and words."""
    logs.configure("INFO", "text")
    emit(events.LinkUp(URI))
    emit(events.StaleSettle(1, 1))
    (line,) = stderr().splitlines()
    assert line.endswith(f"INFO    greenconsume.links: link to {URI} is up")


def test_json_is_one_object_a_line_with_the_events_fields(stderr: Callable[[], str]):
    """A machine finds the event's own fields at the top of the object."""
    logs.configure("DEBUG", "json")
    emit(events.ConsumerRestarting("C-1", ERROR, 2, 1.5))
    (line,) = stderr().splitlines()
    shown: dict[str, Any] = json.loads(line)
    assert shown.pop("time").endswith("+00:00")
    assert shown.pop("traceback") == "ValueError: no such thing"
    assert shown == {
        "level": "WARNING",
        "logger": "greenconsume.runtime",
        "message": "consumer C-1 failed with ValueError: no such thing: restart 2 in 1.5 s",
        "event": "ConsumerRestarting",
        "consumer": "C-1",
        "error": "ValueError: no such thing",
        "attempt": 2,
        "delay": 1.5,
    }


def test_json_shows_a_users_own_records_and_their_extras(stderr: Callable[[], str]):
    """The application's records take the same form, whatever their extras hold, without passwords."""
    logs.configure("INFO", "json")
    logging.getLogger("shop").info("order %d", 7, extra={"customer": {1}, "via": "amqp://a:s3cr@b"})
    shown = json.loads(stderr())
    assert (shown["logger"], shown["message"], shown["customer"]) == ("shop", "order 7", "{1}")
    assert shown["via"] == "amqp://a:**@b"


def test_configuring_again_replaces_the_handler(stderr: Callable[[], str]):
    """A line is not written twice because `configure` was called twice."""
    logs.configure("INFO", "json")
    logs.configure("warning", "text")
    emit(events.LinkUp(URI))
    emit(events.LinkBlocked(URI, True, "low on memory"))
    assert len(stderr().splitlines()) == 1


@pytest.mark.parametrize(("level", "form"), [("LOUD", "text"), ("INFO", "xml")])
def test_an_unknown_level_or_format_is_refused(level: str, form: Any, stderr: Callable[[], str]):
    """The error names what was given, and nothing is configured."""
    with pytest.raises(ValueError, match=f"unknown log .*{level if form == 'text' else form}"):
        logs.configure(level, form)
    emit(events.LinkUp(URI))
    assert stderr() == ""
