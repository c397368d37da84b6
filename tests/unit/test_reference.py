"""The reference says what the code says."""

from __future__ import annotations

from tests.reference import FILE, with_table


def test_the_table_of_options_is_in_step_with_them():
    text = FILE.read_text(encoding="utf-8")
    assert text == with_table(text), "python -m tests.reference"
