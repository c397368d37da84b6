"""Owns what the package says in the log: one record an event, on the logger `greenconsume.<module>`.

The first hook: importing this module subscribes it, and the lower layers speak through `events` alone. It
must never show a message's body or a password. Only the command line calls `configure`.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import fields
from datetime import datetime, timezone
from functools import cache
from typing import Any, Literal

from greenconsume.events import Event, subscribe
from greenconsume.log_lines import describe as describe
from greenconsume.log_lines import redact as redact
from greenconsume.log_lines import words

#: One line to read, or one JSON object a line.
LogFormat = Literal["text", "json"]

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

_HANDLER_NAME = "greenconsume"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "taskName"}


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


def configure(level: str = "INFO", format: LogFormat = "text") -> None:
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
        return words(value)
    return redact(str(value)) if isinstance(value, str) else value


subscribe(log)
