"""Tests what the documents say of the code, and the code of the documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import greenconsume
from greenconsume import errors

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("greenconsume", "tests") for path in (ROOT / folder).rglob("*.py")]
TESTS = [path for path in SOURCES if path.is_relative_to(ROOT / "tests")]
HAZARD = re.compile(r"HAZARDS?(?:\.md)?(?: rows?)? (\d+(?:(?:, | and |, and )\d+)*)")
LAW = re.compile(r"\b[Ll]aws? (\d+)")


def hazards() -> dict[int, str]:
    """Return the text of each entry of the hazards by its number."""
    text = (ROOT / "docs" / "hazards.md").read_text()
    parts = re.split(r"^### (\d+)\. ", text, flags=re.MULTILINE)[1:]
    return dict(zip(map(int, parts[::2]), parts[1::2], strict=True))


def cited(paths: list[Path], pattern: re.Pattern[str]) -> Iterator[int]:
    """Yield the numbers that the files cite."""
    for path in paths:
        for found in pattern.findall(path.read_text()):
            yield from map(int, re.findall(r"\d+", found))


def test_the_hazards_are_numbered_without_gaps():
    numbers = re.findall(r"^### (\d+)\. ", (ROOT / "docs" / "hazards.md").read_text(), re.MULTILINE)
    assert sorted(map(int, numbers)) == list(range(1, len(numbers) + 1))


def test_every_hazard_that_is_cited_is_described():
    assert set(cited(SOURCES, HAZARD)) <= hazards().keys()


def test_every_hazard_is_cited_by_a_test_or_marked_as_planned():
    held = set(cited(TESTS, HAZARD))
    unheld = [
        number
        for number, text in hazards().items()
        if number not in held and "*Planned" not in text
    ]
    assert unheld == []


def test_every_law_that_is_cited_is_written_down():
    text = (ROOT / "docs" / "design.md").read_text()
    laws = {int(number) for number in re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE)}
    assert set(cited(SOURCES, LAW)) <= laws


@pytest.mark.parametrize(
    "document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name
)
def test_the_files_that_a_document_names_exist(document: Path):
    named = set(
        re.findall(r"`((?:greenconsume|tests|examples|docs)/[\w/]+\.\w+)", document.read_text())
    )
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "reference.md").read_text()
    assert [name for name in greenconsume.__all__ if f"`greenconsume.{name}`" not in text] == []
    raised = [name for name, found in vars(errors).items() if isinstance(found, type)]
    assert [name for name in raised if not re.search(rf"`(greenconsume\.)?{name}`", text)] == []


def test_the_newcomers_path_is_short_and_its_files_exist():
    """What explains the whole may be read in half an hour."""
    (path,) = re.findall(
        r"In this order[^:]*:\n\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL
    )
    files = [ROOT / name for name in re.findall(r"^\d+\. \[`?([\w/.]+)`?\]", path, re.MULTILINE)]
    assert len(files) >= 6
    assert sum(len(file.read_text().splitlines()) for file in files) <= 1500
