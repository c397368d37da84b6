"""Owns how figures are shown: as a table in Markdown, medians with their ranges."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, log10
from statistics import median
from typing import Any, NamedTuple

Figures = dict[str, float]
Measured = dict[str, Any]  # a group, who was measured, and the figures of each run

#: What everything is compared with.
BASE = "kombu"

#: Below this share of the intended rate, the publishing side held the measurement up.
FED_ENOUGH = 0.98

NOTES = {
    "Consume": "The messages, 100 bytes of JSON, wait in the queue; the callback acks and does no more.",
    "500": "The messages wait in the queue; prefetch 500, or what the package sets by itself.",
    "5,000": "The messages wait in the queue.",
    "Publish to callback": "Another process stamps and publishes; the clock is the machine's monotonic one.",
    "Last ack": "From the callback's last `ack()` to a tap between it and the broker.",
    "Publish confirmed": "Every greenlet waits for each message's confirm. Publishing is what is measured.",
    "Cost": "The messages wait, in all queues alike; the clock starts when all consumers are ready.",
    "On Redis: 20": "One message each 2 ms; prefetch 1, what others wait for is handled by nobody else.",
    "10,000": "After ten idle seconds the same process publishes one message to each.",
}


class Column(NamedTuple):
    """One kind of figure: its heading, and whether it is compared with kombu's."""

    heading: str
    compared: bool = False


COLUMNS = {
    "rate": Column("messages/s", True),
    "cpu_per_10k": Column("CPU s per 10,000", True),
    "core": Column("% of a core"),
    "in_flight": Column("most in flight"),
    "p50_ms": Column("p50 ms", True),
    "p99_ms": Column("p99 ms", True),
    "start_s": Column("start s"),
    "idle_cpu_percent": Column("idle CPU %"),
    "kb_each": Column("KB each"),
    "sockets": Column("sockets"),
    "commands_per_s": Column("commands/s"),
    "server_cpu_percent": Column("the server's CPU %"),
    "one_each_s": Column("a message to each s"),
    "stop_s": Column("stop s"),
}


def report(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the whole report, of what `--json` writes."""
    named = (f"{name} {version}" for name, version in figures["versions"].items())
    yield f"{figures['machine']}; {', '.join(named)}"
    rows = [row for row in figures["rows"] if row["runs"]]
    yield f"Medians of {figures['runs']} runs, with their ranges. {fed(rows)}"
    for row in figures["rows"]:
        if len(row["runs"]) < figures["runs"]:
            yield f"Of {row['group']}: {row['who']}: {len(row['runs'])} runs only, the others failed."
    for group in dict.fromkeys(row["group"] for row in rows):
        yield f"\n### {group}\n"
        yield from (f"{note}\n" for start, note in NOTES.items() if group.startswith(f"{start} "))
        yield from table([row for row in rows if row["group"] == group])


def fed(rows: list[Measured]) -> str:
    """Say whether the publishing side was the limit of any figure."""
    held_up = [
        f"{row['group']}: {row['who']}"
        for row in rows
        if any(run.get("fed", 1.0) < FED_ENOUGH for run in row["runs"])
    ]
    if held_up:
        return f"The publishing side was late, and so the limit, in: {'; '.join(held_up)}."
    return "The publishing side was the limit of none."


def table(rows: list[Measured]) -> Iterator[str]:
    """Yield a group's table."""
    base = next((row for row in rows if row["who"].startswith(BASE)), None)
    names = [name for name in COLUMNS if values_of(rows[0], name)]
    headings = ["", *(_heading for name in names for _heading in headings_of(name, base))]
    cells = [headings, *([row["who"], *cells_of(row, names, base)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for line in cells:
        padded = [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
        yield f"| {' | '.join(padded)} |"


def headings_of(name: str, base: Measured | None) -> list[str]:
    column = COLUMNS[name]
    return [column.heading, "× kombu"] if column.compared and base else [column.heading]


def cells_of(row: Measured, names: list[str], base: Measured | None) -> Iterator[str]:
    for name in names:
        values = values_of(row, name)
        if not values:  # a peer that does not tell
            yield from [""] * len(headings_of(name, base))
            continue
        low, high = human(min(values)), human(max(values))
        yield human(median_of(row, name)) + (f" ({low} to {high})" if low != high else "")
        if COLUMNS[name].compared and base:
            yield human(median_of(row, name) / median_of(base, name), digits=2)


def median_of(row: Measured, name: str) -> float:
    return median(values_of(row, name))


def values_of(row: Measured, name: str) -> list[float]:
    """Return a figure of every run; `core` is how busy the consumer was while it was measured."""
    if name == "core":
        return [run["rate"] * run["cpu_per_10k"] / 100 for run in row["runs"] if "rate" in run]
    return [run[name] for run in row["runs"] if name in run]


def human(value: float, digits: int = 3) -> str:
    """Write a figure with as many digits as mean something."""
    if not value:
        return "0"
    places = digits - 1 - floor(log10(abs(value)))
    return f"{round(value, places):,.{max(0, min(places, 3))}f}"
