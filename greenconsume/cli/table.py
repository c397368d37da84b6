"""Owns how the status of a process is written as text: figures, words and columns.

Called by `control` and `top`, with what `/status.json` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Status = dict[str, Any]


def of_process(status: Status) -> str:
    """Return a process as lines: what it is, what is wrong, its links and its consumers."""
    lines = [headline(status), *(f"  ! {each}" for each in troubles(status))]
    lines += [f"  {link_line(each)}" for each in status["links"]]
    rows = [[column.show(each) for column in COLUMNS] for each in status["consumers"]]
    return "\n".join([*lines, *_aligned([column.name for column in COLUMNS], rows)])


def headline(status: Status) -> str:
    """Return what a process is, in a line."""
    lag = status["lag"]
    return (
        f"{status['name']} (pid {status['pid']}) is {status['state']}, up {seconds(status['uptime'])}, "
        f"hub lag p99 {seconds(lag['p99'])}, at most {seconds(lag['longest'])}, "
        f"{status['greenlets']} greenlets"
    )


def troubles(status: Status) -> list[str]:
    """Return what is wrong with a process."""
    health = status["health"]
    return [*health["live"], *health["ready"], *health["stalled"]]


def link_line(link: Status) -> str:
    """Return a link in a line."""
    state = "blocked" if link["blocked"] else "up" if link["up"] else "down"
    return f"link to {link['uri']} is {state}: {link['sessions']} sessions, {link['reconnects']} reconnects"


def failed(consumer: Status) -> int:
    """Return how many handlers of a consumer failed."""
    outcomes = consumer["outcomes"] or {}
    return sum(outcomes.get(how, 0) for how in ("failed", "timed_out", "killed"))


def number(value: float | None) -> str:
    """Return a figure as it is read best."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def seconds(value: float | None) -> str:
    """Return a duration as it is read best."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"


class Column:
    """A column of the consumers' table: its head, and what it shows of a consumer."""

    def __init__(self, name: str, show: Callable[[Status], str], is_number: bool = True) -> None:
        self.name, self.show, self.is_number = name, show, is_number


def _state(consumer: Status) -> str:
    return "switched off" if consumer["switched_off"] else str(consumer["state"])


def _progress(consumer: Status) -> str:
    return f"{consumer['in_progress']} of {consumer['concurrency'] or 1}"


COLUMNS = (
    Column("CONSUMER", lambda each: str(each["name"]), is_number=False),
    Column("STATE", _state, is_number=False),
    Column("QUEUE", lambda each: ",".join(each["queues"]), is_number=False),
    Column("RATE/S", lambda each: number(each["rate"])),
    Column("BUSY", _progress),
    Column("WAITING", lambda each: number(each["waiting"])),
    Column("UNSETTLED", lambda each: number(each["unsettled"])),
    Column("FAILED", lambda each: number(failed(each))),
    Column("P50", lambda each: seconds(each["p50"])),
    Column("P99", lambda each: seconds(each["p99"])),
    Column("RESTARTS", lambda each: number(each["restarts"])),
)


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column.is_number else cell.ljust(width)
            for cell, width, column in zip(row, widths, COLUMNS, strict=True)
        ).rstrip()
        for row in (heads, *rows)
    ]
