"""Owns what is entered around a message: callables that take it and return a context manager.

One meaning for handlers, batches and publications. Called by `handling` and `publishing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

#: Takes the message, the `Batch` or the `Publication`, and returns what is entered around it.
Around = Callable[[Any], AbstractContextManager[object]]


@contextmanager
def entered(around: Sequence[Around], subject: object) -> Iterator[None]:
    """Enter what `around` returns for `subject`, the first outermost; leave it in the end."""
    with ExitStack() as stack:
        for make in around:
            stack.enter_context(make(subject))
        yield
