"""Owns the generated part of docs/reference.md: python -m tests.reference writes it, a test compares it."""

from __future__ import annotations

from pathlib import Path

from greenconsume.handling.declaring import Count, Declaration, Seconds, YesOrNo
from greenconsume.handling.options import OPTIONS

FILE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
BEGIN = "<!-- The table is made from ConsumerOptions: python -m tests.reference -->\n"
END = "<!-- The end of the table. -->\n"


def row(declared: Declaration) -> str:
    name = declared.name
    has_flag = isinstance(declared.kind, (Count, Seconds, YesOrNo))
    flag = f"`--{name.replace('_', '-')}`" if has_flag else ""
    unit = " s" if isinstance(declared.kind, Seconds) and not declared.said else ""
    cells = (f"`{name}`", declared.kind.allowed, declared.default_text + unit, flag, declared.doc)
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    head = "| Option | What it may be | Default | Flag | What it does |\n|---|---|---|---|---|\n"
    return f"{BEGIN}\n{head}{''.join(map(row, OPTIONS.values()))}\n{END}"


def with_table(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    return before + table() + rest.partition(END)[2]


if __name__ == "__main__":
    FILE.write_text(with_table(FILE.read_text(encoding="utf-8")), encoding="utf-8")
