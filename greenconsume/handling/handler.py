"""Owns what takes each delivery of a kombu `Consumer`, first of all. Called by it; made by `consuming`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kombu import Consumer

from greenconsume.handling.boundary import Handling


class Handler:
    """The callable that a kombu `Consumer` has in the place of its own `_receive_callback`.

    Args:
        consumer: The `kombu.Consumer` whose callbacks are run.
        handling: Where and how they run.
        handle: What handles each message; by `Handling.fitted`.
        accept: What sees each message first; by default, what its failure policies need.
    """

    __slots__ = ("_accept", "_again", "_consumer", "_handle", "_tally")

    #: A green channel hands over its deliveries as they came.
    takes_deliveries = True

    def __init__(
        self,
        consumer: Consumer,
        handling: Handling,
        handle: Callable[[Any, Any], None],
        accept: Callable[[Any, Any, Any], bool] | None = None,
    ) -> None:
        self._consumer = consumer
        self._handle = handle
        self._again = handling.handle_again
        self._accept = accept or handling.recoverer.accept
        self._tally = handling.tally

    def __call__(self, raw: Any) -> None:
        """Handle one delivery. Switches: inline as the user's callback does, else while the pool is full."""
        to_python = getattr(self._consumer.channel, "message_to_python", None)
        message = to_python(raw) if to_python is not None else raw
        self._tally.received += 1
        if not self._accept(self._consumer, message, raw):
            return
        if message.delivery_info.get("redelivered"):
            self._again(self._consumer, message, self._handle)
        else:
            self._handle(self._consumer, message)
