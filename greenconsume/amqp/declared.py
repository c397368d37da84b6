"""Owns what one link knows of the queues that were declared over it. Does no I/O; called by `channel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class DeclaredQueues:
    """The queues that were declared over one link, with what their consumers have to know of them.

    Attributes:
        lasting: Those that are not deleted when unused: their consumer may be paused.
        streams: Those that are streams, which know acks only.
    """

    __slots__ = ("lasting", "streams")

    def __init__(self) -> None:
        self.lasting: set[str] = set()
        self.streams: set[str] = set()

    def note(self, queue: str, auto_delete: bool, arguments: Mapping[str, Any]) -> None:
        """Note a queue that was declared with these properties, not passively."""
        # A single active consumer hands on to another, while messages are still here.
        hands_on = "x-single-active-consumer" in arguments
        if not (auto_delete or hands_on or "x-expires" in arguments):
            self.lasting.add(queue)
        if arguments.get("x-queue-type") == "stream":
            self.streams.add(queue)
        else:
            self.streams.discard(queue)
