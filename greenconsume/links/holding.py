"""Owns what a connection holds of its consumers' messages, whatever its transport: how many, and since when.

It must never change anything, nor wait. Made by `consuming`; read by whoever shows consumers.
"""

from __future__ import annotations

from typing import Any

from kombu import Connection

from greenconsume.links.session import Holding, session_of


class VirtualHolding:
    """The messages of a connection of kombu's virtual kind: `memory://`, and what is polled.

    It has no inbox: a message is taken out of its queue when it is handed out. When it came is not kept.

    Args:
        transport: The connection's, which keeps its channels.
    """

    __slots__ = ("_transport",)

    is_lost = False  # it polls, and has nothing to lose
    backlog = 0
    oldest_unsettled_at = None

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    @property
    def unsettled_count(self) -> int:
        """The number of messages that are not settled."""
        # kombu's own takes out what was settled (`_dirty`) when it next looks.
        return sum([len(qos._delivered) - len(qos._dirty) for qos in self._limits()])

    @property
    def prefetch_count(self) -> int:
        """The number of messages that may be taken ahead; 0: one of its channels has no limit."""
        limits = [qos.prefetch_count or 0 for qos in self._limits()]
        return sum(limits) if all(limits) else 0

    def _limits(self) -> list[Any]:
        found = [getattr(channel, "_qos", None) for channel in self._transport.channels]
        return [each for each in found if each is not None]  # kombu makes it when it is asked for


def holding_of(conn: object) -> Holding | None:
    """Return what tells how much a connected connection holds; None where nothing does."""
    session = session_of(conn)
    if session is not None:
        return session
    transport = conn._connection if isinstance(conn, Connection) else None
    return VirtualHolding(transport) if hasattr(transport, "channels") else None
