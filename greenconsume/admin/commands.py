"""Owns the commands that an operator gives: their names, their arguments, and what each asks of the process.

Nothing here waits: a command signals, and the state tells when it is done. Called by `app`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from greenconsume.admin.status import Process
from greenconsume.events import AdminAsked, emit

#: Replicas that a command may ask for: a slip of the finger is no fleet.
MAX_REPLICAS = 10_000

_LEVELS = ("debug", "info", "warning", "error")
_LOGGERS = "greenconsume"


class BadRequestError(ValueError):
    """A command that makes no sense; the message says why.

    Attributes:
        status: The HTTP status that says so.
    """

    def __init__(self, message: str, status: str = "400 Bad Request") -> None:
        super().__init__(message)
        self.status = status


Command = Callable[[Process, Mapping[str, Any]], str]


def _of_consumer(
    name: str, ask: Callable[[Process, str], None]
) -> Callable[[Process, Mapping[str, Any]], str]:
    def command(process: Process, given: Mapping[str, Any]) -> str:
        consumer = _text(given, "consumer")
        ask(process, consumer)
        emit(AdminAsked(name, consumer))
        return f"{name} {consumer}"

    return command


def _scale(process: Process, given: Mapping[str, Any]) -> str:
    group, replicas = _text(given, "consumer"), given.get("replicas")
    if type(replicas) is not int or not 0 <= replicas <= MAX_REPLICAS:
        raise BadRequestError(f"replicas must be a number from 0 to {MAX_REPLICAS}")
    process.scale(group, replicas)
    emit(AdminAsked("scale", f"{group} to {replicas}"))
    return f"scale {group} to {replicas}"


def _drain(process: Process, _given: Mapping[str, Any]) -> str:
    emit(AdminAsked("drain", "the process"))
    process.stop("asked by the admin")
    return "drain"


def _log_level(_process: Process, given: Mapping[str, Any]) -> str:
    level = _text(given, "level").lower()
    if level not in _LEVELS:
        raise BadRequestError(f"level must be one of {', '.join(_LEVELS)}")
    logging.getLogger(_LOGGERS).setLevel(level.upper())
    emit(AdminAsked("log-level", level))
    return f"log-level {level}"


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequestError(f"say {name!r}, as text")
    return value


COMMANDS: dict[str, Command] = {
    "pause": _of_consumer("pause", lambda process, name: process.pause(name)),
    "resume": _of_consumer("resume", lambda process, name: process.resume(name)),
    "stop": _of_consumer("stop", lambda process, name: process.stop_consumer(name)),
    "restart": _of_consumer("restart", lambda process, name: process.restart_consumer(name)),
    "scale": _scale,
    "drain": _drain,
    "log-level": _log_level,
}
