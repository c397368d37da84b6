"""Owns the pictures of the figures: bars as text, and as an SVG for the README."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from tests.benchmarks.report import Measured, human, median_of

#: The groups that are drawn, each with both figures.
GROUPS = ("Consume and ack each, prefetch 100", "500 handlers in flight, 50 ms each")
FIGURES = {
    "rate": "messages/s, more is better",
    "cpu_per_10k": "CPU seconds per 10,000, less is better",
}
OURS = "greenconsume"

TEXT_WIDTH = 50
LABELS, BARS, VALUES, LINE = 250, 200, 60, 20
STYLE = """
text { font: 13px sans-serif; fill: #24292f } .title { font-weight: bold }
rect { fill: #8c959f } .ours { fill: #1f883d }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .ours { fill: #3fb950 } }
"""


def drawn(rows: list[Measured]) -> Iterator[tuple[str, list[Measured]]]:
    """Yield each group that was measured, with those that consumed from a broker."""
    for group in GROUPS:
        of_group = [row for row in rows if row["group"] == group and row["runs"]]
        consumers = [row for row in of_group if "no broker" not in row["who"]]
        if consumers:
            yield group, consumers


def bars(rows: list[Measured]) -> Iterator[str]:
    """Yield the lines of a chart in text."""
    for group, consumers in drawn(rows):
        for name, meaning in FIGURES.items():
            yield f"\n{group}: {meaning}"
            most = max(median_of(row, name) for row in consumers)
            for row in consumers:
                value = median_of(row, name)
                bar = "█" * max(1, round(value / most * TEXT_WIDTH))
                yield f"  {row['who']:<32} {bar} {human(value)}"


def svg(rows: list[Measured]) -> str:
    """Return the same chart as a picture."""
    parts, y = [], 0
    for group, consumers in drawn(rows):
        y += LINE
        parts.append(_text(4, y, group, ' class="title"'))
        parts += [_text(_left(n), y + LINE, text) for n, text in enumerate(FIGURES.values())]
        for row in consumers:
            y += LINE
            parts += _line(row, consumers, y)
        y += 2 * LINE
    size = f"{_left(len(FIGURES))} {y}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def _line(row: Measured, consumers: list[Measured], y: int) -> Iterator[str]:
    yield _text(4, y + LINE, row["who"])
    ours = ' class="ours"' if row["who"].startswith(OURS) else ""
    for number, name in enumerate(FIGURES):
        value, left = median_of(row, name), _left(number)
        length = round(value / max(median_of(other, name) for other in consumers) * BARS)
        yield f'<rect{ours} x="{left}" y="{y + 8}" width="{length}" height="{LINE - 6}"/>'
        yield _text(left + length + 6, y + LINE, human(value))


def _left(number: int) -> int:
    return LABELS + number * (BARS + VALUES)


def _text(x: int, y: int, text: str, attributes: str = "") -> str:
    return f'<text{attributes} x="{x}" y="{y}">{escape(text)}</text>'
