"""Owns what was spawned on a runtime, by name: which consumers it made, and how to make more of them.

It must never start or stop one. Called by `runtime` and `control`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from greenconsume.errors import ControlError, UnknownConsumerError
from greenconsume.handling.options import ConsumerOptions
from greenconsume.runtime.arguments import check_options
from greenconsume.runtime.child import Child


class _Group(NamedTuple):
    make: Callable[[], Any]
    options: ConsumerOptions | None
    is_instance: bool


class Groups:
    """The consumers of a runtime by what they were spawned from.

    Attributes:
        children: All of them, in the order in which they were made.
    """

    def __init__(self) -> None:
        self.children: list[Child] = []
        self._groups: dict[str, _Group] = {}
        self._numbers: Counter[str] = Counter()

    def spawn(
        self,
        target: object,
        make: Callable[[], Any],
        replicas: int,
        options: ConsumerOptions | None,
    ) -> list[Child]:
        """Make a child for each replica of a target.

        Raises:
            TypeError: `options` are none.
        """
        check_options(options)
        name = getattr(target, "__name__", None) or type(target).__name__
        is_instance = not isinstance(target, type) and hasattr(target, "get_consumers")
        self._groups[name] = _Group(make, options, is_instance)
        return self._add(name, replicas)

    def more(self, name: str, count: int) -> list[Child]:
        """Make some more children of what was spawned by this name last.

        Raises:
            UnknownConsumerError: Nothing was.
            ControlError: It was an instance, of which there is one.
        """
        if name not in self._groups:
            raise UnknownConsumerError(name)
        if self._groups[name].is_instance:
            raise ControlError(f"{name} was spawned as an instance, which cannot have replicas")
        return self._add(name, count)

    def of(self, name: str) -> list[Child]:
        """Return the children of what was spawned by a name, without those that ended or end for good.

        Raises:
            UnknownConsumerError: Nothing was.
        """
        if name not in self._groups:
            raise UnknownConsumerError(name)
        return [
            each
            for each in self.children
            if each.group == name and not (each.ended or each.retired)
        ]

    def forget(self, unwanted: Callable[[Child], bool]) -> None:
        """Forget the children that are unwanted; what holds the list sees it."""
        self.children[:] = [each for each in self.children if not unwanted(each)]

    def _add(self, name: str, count: int) -> list[Child]:
        group = self._groups[name]
        added = [
            Child(self._next_name(name), group.make, group.options, name) for _ in range(count)
        ]
        self.children += added
        return added

    def _next_name(self, name: str) -> str:
        self._numbers[name] += 1
        return f"{name}-{self._numbers[name]}"
