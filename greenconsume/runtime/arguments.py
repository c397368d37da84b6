"""Owns how the arguments of a runtime and of a spawn are checked, where they enter.

It must never change one. Called by `runtime`, `groups` and `greenlet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from greenconsume.around import Around
from greenconsume.checks import is_count, is_seconds
from greenconsume.handling.options import ConsumerOptions
from greenconsume.runtime.restart_policy import RestartPolicy


def check_options(options: object) -> None:
    """Check that these are options, or None.

    Raises:
        TypeError: They are something else; the message says how they are written.
    """
    if options is not None and not isinstance(options, ConsumerOptions):
        raise TypeError(
            f"options must be a ConsumerOptions, not {options!r}: write options=ConsumerOptions(…)"
        )


def options_with(options: ConsumerOptions | None, around: Sequence[Around]) -> ConsumerOptions:
    """Return the options of a runtime, with `around` entered outside of what they have around callbacks.

    Raises:
        TypeError: `options` are none.
        InvalidOptionsError: `around` is no list of what can be entered.
    """
    check_options(options)
    said = options or ConsumerOptions()
    if not around:
        return said
    ConsumerOptions(around=around)  # to say what is wrong with it
    return replace(said, around=(*around, *said.value_of("around")))


def checked_restart(restart: RestartPolicy | None) -> RestartPolicy:
    """Return the restart policy that was said, or the default.

    Raises:
        TypeError: It is none.
    """
    if restart is None:
        return RestartPolicy()
    if not isinstance(restart, RestartPolicy):
        raise TypeError(
            f"restart must be a RestartPolicy, not {restart!r}: write restart=RestartPolicy(kind=…)"
        )
    return restart


def check_counts(links: int, **counts: int | None) -> None:
    """Check numbers that must be 1 or more; those but `links` may be None.

    Raises:
        ValueError: One is not.
    """
    if not is_count(links):
        raise ValueError(f"links must be 1 or more, not {links!r}")
    for name, count in counts.items():
        if count is not None and not is_count(count):
            raise ValueError(f"{name} must be 1 or more, or None, not {count!r}")


def check_seconds(**times: float | None) -> None:
    """Check times, which must be more than 0 seconds, or None.

    Raises:
        ValueError: One is not.
    """
    for name, seconds in times.items():
        if seconds is not None and not is_seconds(seconds, above_zero=True):
            raise ValueError(f"{name} must be more than 0 seconds, or None, not {seconds!r}")
