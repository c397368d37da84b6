"""Owns what stands for small objects of kombu's in fewer bytes, as thousands of consumers have one each.

They do what kombu's do. Called by `mixins`.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from functools import cached_property
from time import monotonic
from typing import Any

from kombu.utils.limits import TokenBucket


class Alone(AbstractContextManager[list[Any]]):
    """The block that kombu's `nested` makes of a single context manager."""

    __slots__ = ("_entered",)

    def __init__(self, entered: AbstractContextManager[Any]) -> None:
        self._entered = entered

    def __enter__(self) -> list[Any]:
        return [self._entered.__enter__()]

    def __exit__(self, *error: Any) -> Any:
        return self._entered.__exit__(*error)


class RestartLimit(TokenBucket):  # type: ignore[misc]  # kombu is untyped
    """A token bucket without the queue that kombu's brings along and `run` never uses: 600 bytes each."""

    def __init__(self, fill_rate: float, capacity: int = 1) -> None:
        self.fill_rate, self.capacity = float(fill_rate), float(capacity)
        self.timestamp = monotonic()
        self._tokens = capacity

    @cached_property
    def contents(self) -> deque[Any]:
        """The queue, for whoever does use it."""
        return deque()
