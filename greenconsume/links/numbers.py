"""Owns the numbers by which a process's links are told apart wherever they are shown.

A link, or the place of one that is dialled again, keeps its number for as long as it is shown, whatever
others come and go; a new one gets the smallest that is free, so that there are never more numbers than links.
It must never keep a link alive. Called by `runtime.observing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary


class LinkNumbers:
    """Gives numbers, from 1 on, to what is shown."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def of(self, shown: Sequence[Any]) -> Iterable[int]:
        """Return the number of each that is shown; what is not shown loses its own. Never switches."""
        known = {each: self._known[each] for each in shown if each in self._known}
        taken = set(known.values())
        free = (number for number in count(1) if number not in taken)
        for each in shown:
            if each not in known:
                known[each] = next(free)
        self._known = WeakKeyDictionary(known)
        return [known[each] for each in shown]


#: Those of this process, which all its runtimes show.
link_numbers = LinkNumbers()
