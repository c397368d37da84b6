"""Owns how an option of the command line is declared, and the flags that are made from `ConsumerOptions`.

Each option has a flag and an environment variable of one name. Called by `main`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from greenconsume.handling.declaring import Count, Declaration, Seconds, YesOrNo
from greenconsume.handling.options import OPTIONS

_Function = TypeVar("_Function", bound=Callable[..., Any])


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
    positive = click.FloatRange(min=0, min_open=True)
    above_zero = isinstance(kind, Seconds) and kind.above_zero
    return flag(name, type=positive if above_zero else seconds, metavar="SECONDS", **details)
