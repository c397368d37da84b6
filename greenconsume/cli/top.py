"""Owns `greenconsume top`: the page in a terminal, by rich.

Called by `control`, which has found out that rich is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import sleep
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from greenconsume.cli import table

#: Rates that a sparkline shows.
_POINTS = 30
_BARS = " ▁▂▃▄▅▆▇█"
_STYLES = {"consuming": "green", "running": "green", "failed": "red", "stopped": "dim"}


def watch(
    statuses: Callable[[], list[dict[str, Any]]], every: float, console: Console | None = None
) -> None:
    """Show the processes again and again, until Ctrl-C; by default on the terminal."""
    screen = Screen()
    console = console or Console()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        try:
            while True:
                live.update(_shown(screen, statuses, console.height), refresh=True)
                sleep(every)
        except KeyboardInterrupt:
            pass


def _shown(
    screen: Screen, statuses: Callable[[], list[dict[str, Any]]], height: int
) -> Group | Text:
    try:
        return screen.render(statuses(), height)
    except click.ClickException as exc:  # it is started again, or has ended: keep looking
        return Text(exc.format_message(), "bold red")


class Screen:
    """The picture of some processes in a terminal; it remembers the rates that it has shown."""

    def __init__(self) -> None:
        self._rates: dict[tuple[int, str], deque[float]] = {}

    def render(self, statuses: list[dict[str, Any]], height: int) -> Group:
        """Return what is to be shown in so many lines; the busiest consumers come first."""
        room = max(3, (height - 6 * len(statuses)) // max(1, len(statuses)))
        return Group(*(each for status in statuses for each in self._process(status, room)))

    def _process(self, status: dict[str, Any], room: int) -> list[Text | Table]:
        head = Text(table.headline(status), "bold")
        wrong = [Text(f"! {each}", "red") for each in table.troubles(status)[:5]]
        links = [Text(table.link_line(each), "dim") for each in status["links"][:5]]
        return [head, *wrong, *links, self._consumers(status, room)]

    def _consumers(self, status: dict[str, Any], room: int) -> Table:
        grid = Table(box=None, pad_edge=False, header_style="dim")
        for column in table.COLUMNS:
            grid.add_column(
                column.name, justify="right" if column.is_number else "left", no_wrap=True
            )
        grid.add_column("LAST MINUTE", no_wrap=True)
        consumers = sorted(status["consumers"], key=lambda each: -(each["rate"] or 0))
        for consumer in consumers[:room]:
            cells = [Text(column.show(consumer)) for column in table.COLUMNS]
            cells[1].stylize(_STYLES.get(consumer["state"], "yellow"))
            grid.add_row(*cells, Text(self._line(status["pid"], consumer), "green"))
        if len(consumers) > room:
            grid.add_row(Text(f"… and {len(consumers) - room} more", "dim"))
        return grid

    def _line(self, pid: int, consumer: dict[str, Any]) -> str:
        rates = self._rates.setdefault((pid, consumer["name"]), deque(maxlen=_POINTS))
        rates.append(consumer["rate"] or 0.0)
        most = max(rates) or 1.0
        return "".join(_BARS[round(rate / most * (len(_BARS) - 1))] for rate in rates)
