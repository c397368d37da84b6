"""Owns the options of `greenconsume run`, those of them that are made from `ConsumerOptions` among them.

Each option has a flag and an environment variable of one name. Called by `main` and the other commands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from greenconsume.handling.declaring import Count, Declaration, Seconds, YesOrNo
from greenconsume.handling.options import OPTIONS
from greenconsume.handling.pace import rate_of

_Function = TypeVar("_Function", bound=Callable[..., Any])

_ONE_OR_MORE = click.IntRange(min=1)
_ABOVE_ZERO = click.FloatRange(min=0, min_open=True)


def _rate(value: str) -> str:
    if rate_of(value) is None:
        raise click.BadParameter(f"{value!r} is no rate such as 100/s, 90/m or '100/s burst 20'")
    return value


def flag(name: str, **details: Any) -> Callable[[_Function], _Function]:
    """Declare an option, as `click.option` does, with its environment variable.

    Args:
        name: As it is written: `--links`, or `--auto-settle/--no-auto-settle`.
        **details: As those of `click.option`.
    """
    words = name.partition("/")[0].removeprefix("--")
    envvar = "GREENCONSUME_" + words.replace("-", "_").upper()
    details = {"envvar": envvar, "show_envvar": True, "show_default": True, **details}
    return click.option(name, **details)


def seconds(value: str | float) -> float:
    """Return a number of seconds, 0 or more.

    Raises:
        click.BadParameter: It is none.
    """
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise click.BadParameter(f"{value!r} is no number of seconds, 0 or more")
    return found


def consumer_flags(function: _Function) -> _Function:
    """Declare a flag for each option of a consumer that a number, yes or no can say."""
    for declared in reversed(OPTIONS.values()):
        if isinstance(declared.kind, (Count, Seconds, YesOrNo)):
            function = _flag_of(declared)(function)
    return function


def _flag_of(declared: Declaration) -> Callable[[_Function], _Function]:
    name, kind = "--" + declared.name.replace("_", "-"), declared.kind
    details: dict[str, Any] = {"help": declared.summary, "default": declared.default}
    if declared.default is None:
        details["show_default"] = declared.default_text
    if isinstance(kind, YesOrNo):
        return flag(f"{name}/--no-{name[2:]}", **details)
    if isinstance(kind, Count):
        return flag(name, type=click.IntRange(kind.least, kind.most), **details)
    above_zero = isinstance(kind, Seconds) and kind.above_zero
    return flag(name, type=_ABOVE_ZERO if above_zero else seconds, metavar="SECONDS", **details)


#: The options of `run`: first those that say what runs where, then a consumer's, then a process's.
_FIRST = (
    flag(
        "--broker",
        metavar="URL",
        default="memory://",
        help="A kombu URL, or several to fail over to, with ';' between.",
    ),
    flag(
        "--replicas",
        type=_ONE_OR_MORE,
        default=1,
        help="How many consumers of a class to run.",
    ),
    flag(
        "--links",
        type=_ONE_OR_MORE,
        default=1,
        help="Connections to the broker, shared by all consumers.",
    ),
)
_LAST = (
    flag(
        "--max-handlers",
        type=_ONE_OR_MORE,
        help="Handlers at once of all consumers that have a concurrency; without: no such bound.",
    ),
    flag(
        "--block-warning",
        type=_ABOVE_ZERO,
        metavar="SECONDS",
        help="Warn of a handler that keeps all others waiting for so long, with its stack.",
    ),
    flag(
        "--runtime-rate",
        type=_rate,
        metavar="RATE",
        help="How many messages all consumers together begin with in a time: 100/s, 90/m, 100/s burst 20.",
    ),
    flag(
        "--max-hub-lag",
        type=_ABOVE_ZERO,
        metavar="SECONDS",
        help="Have consumers sent less while callbacks compute so much that the process lags behind so far.",
    ),
    flag(
        "--processes",
        type=_ONE_OR_MORE,
        metavar="N",
        help="Run so many processes, each with all the consumers, under gunicorn's arbiter.",
    ),
    flag(
        "--max-messages",
        type=_ONE_OR_MORE,
        help="End a process when it has handled so many messages; with --processes another takes its place.",
    ),
    flag(
        "--max-messages-jitter",
        type=click.IntRange(min=0),
        default=0,
        help="A random part of so many further messages, so that not all processes end at once.",
    ),
    flag(
        "--hang-timeout",
        type=_ONE_OR_MORE,
        metavar="SECONDS",
        default=60,
        help="With --processes: replace a process that does not answer for so long.",
    ),
    flag(
        "--pid-file",
        metavar="PATH",
        default="",
        show_default=False,
        help="With --processes: where the arbiter writes its process id.",
    ),
    flag(
        "--reload",
        is_flag=True,
        help="For development: start anew whenever a Python file in this folder changes.",
    ),
    flag(
        "--freeze-gc",
        is_flag=True,
        help="Exempt what exists once all consume from garbage collection, whose pauses grow with it.",
    ),
    flag(
        "--admin",
        metavar="ADDRESS",
        default="run",
        help="Where to show its state and take commands: HOST:PORT, unix:/PATH, `run` for a Unix socket in "
        "the run folder, where the other commands find it, or `none`.",
    ),
    flag(
        "--admin-token",
        metavar="TOKEN",
        show_default=False,
        help="To be shown to steer it over a port, or to see it from another machine. Better in the "
        "environment.",
    ),
    flag(
        "--stall-after",
        type=_ABOVE_ZERO,
        metavar="SECONDS",
        default=300.0,
        help="A handler that still runs then counts as stalled.",
    ),
    flag(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
        default="info",
        help="The least that is logged, to stderr.",
    ),
    flag(
        "--log-format",
        type=click.Choice(["text", "json"], case_sensitive=False),
        default="text",
        help="Lines to read, or one JSON object a line.",
    ),
)


def run_flags(function: _Function) -> _Function:
    """Declare every option of `run`, in the order in which its help shows them."""
    for declare in reversed(_LAST):
        function = declare(function)
    function = consumer_flags(function)
    for declare in reversed(_FIRST):
        function = declare(function)
    return function
