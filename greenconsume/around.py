"""Owns what is entered around a message: callables that take it and return a context manager.

One meaning for handlers, batches and publications. What a plain `kombu.Producer` publishes over a green
transport is such a publication where somebody chose that (`around_producers`). Called by `handling`,
`publishing` and the channels of the green transports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import gevent

#: Takes the message, the `Batch` or the publication, and returns what is entered around it.
Around = Callable[[Any], AbstractContextManager[object]]


@contextmanager
def entered(around: Sequence[Around], subject: object) -> Iterator[None]:
    """Enter what `around` returns for `subject`, the first outermost; leave it in the end.

    Switches: as what is entered does.
    """
    with ExitStack() as stack:
        for make in around:
            stack.enter_context(make(subject))
        yield


@dataclass(frozen=True, slots=True)
class PlainPublication:
    """A message of a plain `kombu.Producer`, as what is entered around it sees it: a `Publication`'s address.

    Attributes:
        exchange: The name of its exchange.
        routing_key: Its routing key.
        message_id: Its `message_id` property, or an empty one.
        headers: Its headers, which may be added to; never the caller's own.
    """

    exchange: str
    routing_key: str
    message_id: str
    headers: dict[str, Any]


class Producers:
    """The context managers that are entered around each message of this process's plain producers."""

    def __init__(self) -> None:
        self._around: tuple[Around, ...] = ()
        self._chosen: dict[object, tuple[Around, ...]] = {}
        # The greenlets that publish within it now. No context variable: others may inherit that.
        self._inside: set[Any] = set()

    @property
    def around(self) -> bool:
        """True if something is to be entered around a message that is published here and now.

        Nothing is around what these context managers publish themselves: it would have no end.
        """
        return bool(self._around) and gevent.getcurrent() not in self._inside

    @contextmanager
    def entered(self, publication: PlainPublication) -> Iterator[None]:
        """Enter what was chosen for a message; leave it in the end. Switches: as what is entered does."""
        current = gevent.getcurrent()
        self._inside.add(current)
        try:
            with entered(self._around, publication):
                yield
        finally:
            self._inside.discard(current)

    def add(self, around: Sequence[Around]) -> Callable[[], None]:
        """Enter `around`, too, from now on; return what takes it away. Never switches."""
        mine = object()  # not the callables: somebody else may have chosen the same ones
        self._chosen[mine] = tuple(around)
        self._join()

        def remove() -> None:
            self._chosen.pop(mine, None)
            self._join()

        return remove

    def _join(self) -> None:
        self._around = tuple(each for chosen in self._chosen.values() for each in chosen)


#: Asked by the green channels, for each message that is published by their `basic_publish`.
plain_producers = Producers()


def around_producers(around: Sequence[Around]) -> Callable[[], None]:
    """Enter `around` around each message that a plain `kombu.Producer` publishes over a green transport.

    For the whole process, from now on, the first outermost. What this package publishes is none of these:
    neither a `Publisher`'s messages, nor copies of failed ones, which keep the headers that they came with.
    Nor is what `around` itself publishes.

    Args:
        around: Callables that take a `PlainPublication` and return a context manager.

    Returns:
        What ends it.

    Switches: never. From any greenlet.
    """
    return plain_producers.add(around)
