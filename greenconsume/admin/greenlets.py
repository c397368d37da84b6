"""Owns the tree of the process's greenlets as text: who started whom, what each is for, and where it waits.

It must never show a variable: a stack has lines of code only. It walks all objects, which takes some tens of
milliseconds: it is for a person who looks. Called by `app`, and on SIGUSR1.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any
from weakref import WeakSet

import gevent
import greenlet  # type: ignore[import-untyped]  # its stubs are a package of their own

#: Lines that one tree may have: 10,000 consumers are seen better by their states.
MAX_LINES = 20_000
#: Of a stack the innermost frames.
_FRAMES = 12

_is_dead: Callable[[Any], bool] = attrgetter("dead")


class GreenletCount:
    """Counts the greenlets that gevent started, from now until it is closed, and those that live already."""

    def __init__(self) -> None:
        self._known: WeakSet[Any] = WeakSet(
            each for each in gc.get_objects() if isinstance(each, gevent.Greenlet) and each
        )
        gevent.Greenlet.add_spawn_callback(self._known.add)

    @property
    def alive(self) -> int:
        """The number of those that live. Never switches."""
        known = list(self._known)
        return len(known) - sum(map(_is_dead, known))

    def close(self) -> None:
        """Count no more. Idempotent."""
        gevent.Greenlet.remove_spawn_callback(self._known.add)


def tree() -> str:
    """Return the tree. Never switches."""
    found = _greenlets()
    below: dict[Any, list[Any]] = {}
    for each in found:
        spawner = getattr(each, "spawning_greenlet", None)
        parent = spawner() if spawner is not None else None
        below.setdefault(parent if parent in found else None, []).append(each)
    lines: list[str] = [f"{len(found)} greenlets"]
    for line in _lines(None, below, 0):
        if len(lines) >= MAX_LINES:
            lines.append("… and more")
            break
        lines.append(line)
    return "\n".join(lines)


def _greenlets() -> set[Any]:
    return {each for each in gc.get_objects() if isinstance(each, greenlet.greenlet) and each}


def _lines(parent: greenlet.greenlet, below: dict[Any, list[Any]], depth: int) -> Iterator[str]:
    # Deeper than Python's own stack no tree of spawned greenlets is walked: a chain ends in a list.
    for each in sorted(below.get(parent, ()), key=_title):
        indent = "  " * min(depth, 20)
        yield f"{indent}{_title(each)}"
        for line in _stack(each):
            yield f"{indent}    {line}"
        if depth < 100:
            yield from _lines(each, below, depth + 1)


def _title(each: greenlet.greenlet) -> str:
    if isinstance(each, gevent.hub.Hub):
        return "hub"
    name = getattr(each, "name", "")
    if name:
        return str(name)
    return "main greenlet" if each.parent is None else type(each).__name__


def _stack(each: greenlet.greenlet) -> list[str]:
    frame = each.gr_frame
    if frame is None:  # it runs now, or has not begun
        return ["(running)"] if each is greenlet.getcurrent() else ["(about to begin)"]
    frames = traceback.extract_stack(frame)[-_FRAMES:]
    return [f"{each.filename}:{each.lineno} in {each.name}: {each.line}" for each in frames]
