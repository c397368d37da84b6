"""Owns what the package says in the log: one record an event, on the logger `greenconsume.<module>`.

The first hook: importing this module subscribes it, and the lower layers speak through `events` alone. It
must never show a message's body or a password. Only the command line calls `configure`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import fields
from datetime import datetime, timezone
from functools import cache, singledispatch
from typing import Any, Literal, NamedTuple

from greenconsume.events import (
    AdminAsked,
    AdminListening,
    AdminRefused,
    ConnectFailed,
    ConsumerChanged,
    ConsumerDrained,
    ConsumerGivenUp,
    ConsumerRefused,
    ConsumerRestarting,
    ConsumersScaled,
    DrainEscalated,
    DrainFinished,
    DrainStarted,
    Event,
    GarbageFrozen,
    GreenletsDumped,
    HandlerFailed,
    HandlerInterrupted,
    HubBlocked,
    KillSwitchReset,
    KillSwitchTripped,
    LinkBlocked,
    LinkDown,
    LinkUp,
    MessageRenewed,
    PollingTransport,
    PrefetchTooSmall,
    PublishFailed,
    StaleSettle,
    UnsettledTooLong,
    subscribe,
)

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

_HANDLER_NAME = "greenconsume"
_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s]*@")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "taskName"}


class Line(NamedTuple):
    """The log record of an event: its logger, level and words, and the traceback or stack that is shown."""

    module: str
    level: int
    text: str
    args: tuple[object, ...] = ()
    error: BaseException | None = None
    stack: str | None = None


def log(event: Event, /) -> None:
    """Log `event` as one record, with its fields in the record's `greenconsume` attribute."""
    line = describe(event)
    logger = _logger(line.module)
    if logger.isEnabledFor(line.level):
        extra = {"greenconsume": _fields(event)}
        if line.stack is None:
            logger.log(line.level, line.text, *line.args, exc_info=line.error, extra=extra)
        else:  # another one than the caller's, which is all that `stack_info` gives
            where = (logger.name, line.level, __file__, 0, line.text, line.args)
            logger.handle(logger.makeRecord(*where, None, None, extra, line.stack))


class JSONFormatter(logging.Formatter):
    """Formats a record as one line of JSON: the time, the words, an event's fields, a user's extras."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        shown: dict[str, Any] = {
            key: value for key, value in vars(record).items() if key not in _STANDARD
        }
        shown.update(shown.pop("greenconsume", {}))
        shown.update(
            time=at.isoformat(timespec="milliseconds"),
            level=record.levelname,
            logger=record.name,
            message=record.getMessage(),
        )
        if record.exc_info:
            shown["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            shown["stack"] = record.stack_info
        return redact(json.dumps(shown, default=str))


class TextFormatter(logging.Formatter):
    """Formats a record as a line to read, with any traceback below it."""

    def __init__(self) -> None:
        super().__init__(TEXT_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def configure(level: str = "INFO", format: Literal["text", "json"] = "text") -> None:
    """Send the whole process's log to stderr; calling it again replaces what it set up before.

    Args:
        level: The lowest level that is shown, by name.
        format: `text` to read, `json` for one object a line.

    Raises:
        ValueError: The level or the format is unknown.
    """
    if not isinstance(logging.getLevelName(level.upper()), int):
        raise ValueError(f"unknown log level {level!r}: use DEBUG, INFO, WARNING or ERROR")
    if format not in ("text", "json"):
        raise ValueError(f"unknown log format {format!r}: use text or json")
    handler = logging.StreamHandler(sys.stderr)
    handler.name = _HANDLER_NAME
    handler.setFormatter(JSONFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.name == _HANDLER_NAME]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


def redact(text: str) -> str:
    """Return `text` with the password of every URL in it masked."""
    return _PASSWORD.sub(r"\1**@", text)


@singledispatch
def describe(event: Event) -> Line:
    """Say what the log says of `event`; one that this package does not know is named at DEBUG."""
    return Line("events", logging.DEBUG, "%s", (type(event).__name__,))


@describe.register
def _(event: LinkUp) -> Line:
    return Line("links", logging.INFO, "link to %s is up", (redact(event.uri),))


@describe.register
def _(event: LinkDown) -> Line:
    args = (redact(event.uri), event.consumers, _words(event.error))
    return Line("links", logging.WARNING, "link to %s is lost, with %d consumers: %s", args)


@describe.register
def _(event: LinkBlocked) -> Line:
    if event.blocked:
        args = (redact(event.uri), event.reason)
        return Line("links", logging.WARNING, "link to %s: the broker blocks publishing: %s", args)
    text = "link to %s: the broker lets publish again"
    return Line("links", logging.INFO, text, (redact(event.uri),))


@describe.register
def _(event: ConnectFailed) -> Line:
    what = "%s refused the connection" if event.refused else "cannot connect to %s"
    args = (redact(event.uri), _words(event.error))
    if event.raised:
        return Line("links", logging.DEBUG, what + ": %s (raised to the caller)", args)
    text = what + ": %s (attempt %d, the next in %.1f s)"
    return Line("links", logging.WARNING, text, (*args, event.attempt, event.delay))


@describe.register
def _(event: PollingTransport) -> Line:
    text = "transport %s has no green one of its own: it is polled, every %.1f s at the most"
    return Line("transports", logging.INFO, text, (event.transport, event.interval))


@describe.register
def _(event: ConsumerChanged) -> Line:
    args = (event.consumer, event.new, event.old)
    return Line("runtime", logging.DEBUG, "consumer %s is %s, was %s", args)


@describe.register
def _(event: ConsumerRefused) -> Line:
    text = "consumer %s: %s%s (attempt %d, the next in %.1f s)"
    remedy = f": {event.remedy}" if event.remedy else ""
    args = (event.consumer, _words(event.error), remedy, event.attempt, event.delay)
    level = logging.INFO if event.stands_by else logging.WARNING
    return Line("consuming", logging.DEBUG if event.told else level, text, args)


@describe.register
def _(event: ConsumerRestarting) -> Line:
    text = "consumer %s %s: restart %d in %.1f s"
    how = "returned" if event.error is None else f"failed with {_words(event.error)}"
    args = (event.consumer, how, event.attempt, event.delay)
    return Line("runtime", logging.WARNING, text, args, event.error)


@describe.register
def _(event: ConsumerGivenUp) -> Line:
    text = "consumer %s is given up: %s"
    how = "it returned too often" if event.error is None else _words(event.error)
    return Line("runtime", logging.ERROR, text, (event.consumer, how), event.error)


@describe.register
def _(event: HandlerFailed) -> Line:
    text = "consumer %s failed on %s %s (routing key %r) with %s: %s"
    count = event.message_count
    args = (
        event.consumer,
        "message" if count == 1 else f"a batch of {count} messages that begins with",
        event.delivery_tag,
        event.routing_key,
        _words(event.error),
        event.outcome,
    )
    return Line("handling", logging.ERROR, text, args, event.error)


@describe.register
def _(event: KillSwitchTripped) -> Line:
    text = "kill switch of %s: %d of %d messages failed; it consumes nothing for %.1f s, then one"
    args = (event.consumer, event.failed_count, event.count, event.pause)
    return Line("handling", logging.WARNING, text, args)


@describe.register
def _(event: KillSwitchReset) -> Line:
    text = "kill switch of %s: a message was handled after %.1f s; it consumes again"
    return Line("handling", logging.INFO, text, (event.consumer, event.seconds))


@describe.register
def _(event: UnsettledTooLong) -> Line:
    text = (
        "consumer %s: message %s has been unsettled for %.0f s; at %.0f s the broker closes the channel, "
        "and delivers everything on it again"
    )
    args = (event.consumer, event.delivery_tag, event.seconds, event.deadline)
    return Line("handling", logging.WARNING, text, args)


@describe.register
def _(event: HubBlocked) -> Line:
    text = (
        "the whole process has been blocked for %.1f s by %s: it computes, or waits, without gevent"
    )
    who = "code outside of handlers"
    if event.consumer:
        who = f"consumer {event.consumer}, message {event.delivery_tag}"
    return Line("runtime", logging.WARNING, text, (event.seconds, who), stack=event.stack)


@describe.register
def _(event: StaleSettle) -> Line:
    text = "message %s was settled after its channel was gone: the broker has it back (%d so far)"
    return Line("handling", logging.DEBUG, text, (event.delivery_tag, event.count))


@describe.register
def _(event: MessageRenewed) -> Line:
    if event.buried_in:
        text = "consumer %s: a message of %s came back again and again, never settled: put into %s"
        args: tuple[object, ...] = (event.consumer, event.queue, event.buried_in)
        return Line("handling", logging.ERROR, text, args)
    text = "consumer %s: a message of %s came back too often: written to its queue again (time %d)"
    return Line("handling", logging.DEBUG, text, (event.consumer, event.queue, event.count))


@describe.register
def _(event: PublishFailed) -> Line:
    text = "%d messages for %s that nobody waited for were not published; the first: %s"
    args = (event.count, redact(event.uri), _words(event.error))
    return Line("publishing", logging.ERROR, text, args)


@describe.register
def _(event: GarbageFrozen) -> Line:
    text = "all consume: %d objects are exempt from garbage collection from now on (%.0f ms)"
    return Line("runtime", logging.INFO, text, (event.count, event.seconds * 1000))


@describe.register
def _(event: DrainStarted) -> Line:
    text = "stopping %d consumers within %.1f s (%s)"
    return Line("runtime", logging.INFO, text, (event.consumers, event.timeout, event.reason))


@describe.register
def _(event: DrainEscalated) -> Line:
    text = "drain: %s; consumers still running: %d (%s)"
    return Line("runtime", logging.WARNING, text, (event.rung, event.consumers, event.reason))


@describe.register
def _(event: DrainFinished) -> Line:
    abandoned = event.killed or event.cancelled_handlers or event.killed_handlers
    level = logging.WARNING if abandoned else logging.INFO
    text = (
        "stopped in %.2f s: consumers: %d drained, %d killed; "
        "handlers: %d finished, %d cancelled, %d killed; messages given back: %d"
    )
    handlers = (event.finished_handlers, event.cancelled_handlers, event.killed_handlers)
    args = (event.seconds, event.drained, event.killed, *handlers, event.given_back)
    return Line("runtime", level, text, args)


@describe.register
def _(event: HandlerInterrupted) -> Line:
    text = "consumer %s: %s the handler of message %s: %s"
    what = "killed" if event.killed else "interrupted"
    args = (event.consumer, what, event.delivery_tag, event.reason)
    # A drain sums up those that it interrupts.
    level = logging.WARNING if event.killed else logging.DEBUG
    return Line("handling", level, text, args)


@describe.register
def _(event: ConsumerDrained) -> Line:
    level = logging.WARNING if event.cancelled or event.killed else logging.DEBUG
    text = "consumer %s drained: handlers: %d finished, %d cancelled, %d killed; messages given back: %d"
    numbers = (event.finished, event.cancelled, event.killed, event.given_back)
    return Line("handling", level, text, (event.consumer, *numbers))


@describe.register
def _(event: PrefetchTooSmall) -> Line:
    why = f"leaves handlers idle: concurrency is {event.concurrency}"
    if event.batch_size is not None and event.prefetch < event.batch_size:
        why = f"never fills a batch of {event.batch_size}: each is handed over by its timeout"
    elif event.batch_size is not None:
        why += f", each with a batch of {event.batch_size}"
    text = "consumer %s: a prefetch of %d %s; set none, or a larger one"
    return Line("handling", logging.WARNING, text, (event.consumer, event.prefetch, why))


@describe.register
def _(event: ConsumersScaled) -> Line:
    args = (event.group, event.before, event.replicas)
    return Line("runtime", logging.INFO, "%s is scaled from %d consumers to %d", args)


@describe.register
def _(event: GreenletsDumped) -> Line:
    return Line("runtime", logging.WARNING, "all greenlets, as asked by SIGUSR1:", stack=event.tree)


@describe.register
def _(event: AdminListening) -> Line:
    return Line("admin", logging.INFO, "the admin listens on %s", (event.address,))


@describe.register
def _(event: AdminAsked) -> Line:
    args = (event.command, event.subject)
    return Line("admin", logging.INFO, "the admin was asked to %s %s", args)


@describe.register
def _(event: AdminRefused) -> Line:
    text = "the admin refused %d requests; the last, %s %r: %s"
    args = (event.count, event.method, event.path, event.reason)
    return Line("admin", logging.WARNING, text, args)


@cache
def _logger(module: str) -> logging.Logger:
    """Look a logger up once: thousands of consumers change their states at the same time."""
    return logging.getLogger(f"greenconsume.{module}")


def _fields(event: Event) -> dict[str, Any]:
    """Return the event's name and fields, as what a formatter can show."""
    shown = {field.name: _plain(getattr(event, field.name)) for field in fields(event)}
    return {"event": type(event).__name__, **shown}


def _plain(value: object) -> object:
    if isinstance(value, BaseException):
        return _words(value)
    return redact(str(value)) if isinstance(value, str) else value


def _words(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(redact(str(error)).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


subscribe(log)
