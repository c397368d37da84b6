"""Owns which consumers have a link of their own, because the broker closed the one they shared (law 10).

A consumer is kept apart until it has done well for a while; then it shares links again when it connects
next. It dials nothing. Called by `pool`, and by the engine of a consumer.
"""

from __future__ import annotations

from time import monotonic

#: Seconds without another such loss after which a consumer shares links again, once it connects anew.
LONG_ENOUGH = 60.0


class Quarantine:
    """The consumers of one pool that are kept apart from the others, by name."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def put(self, name: str) -> None:
        """Keep a consumer apart from now on. Never switches."""
        self._since[name] = monotonic()

    def holds(self, name: str) -> bool:
        """Return whether a consumer that connects now is to have a link of its own. Never switches."""
        since = self._since.get(name)
        if since is None:
            return False
        if monotonic() - since < LONG_ENOUGH:
            return True
        del self._since[name]
        return False
