"""Owns what a link has to send: commands of one turn of the hub, to be joined, in their order.

It must never wait. Called by `link`.
"""

from __future__ import annotations

import socket


class Outgoing:
    """The commands that were not sent yet."""

    __slots__ = ("_unsent", "is_sending")

    def __init__(self) -> None:
        self._unsent: list[bytes] = []
        self.is_sending = False  # the writer has some in hand, and what follows has to wait

    def put(self, command: bytes) -> None:
        """Add a command."""
        self._unsent.append(command)

    def take(self) -> bytes:
        """Return all of them, and forget them."""
        data = b"".join(self._unsent)
        self._unsent.clear()
        return data

    def clear(self) -> None:
        """Forget them: nobody is there to read them."""
        self._unsent.clear()

    def send_now(self, sock: socket.socket) -> None:
        """Send what a socket takes without waiting; the writer sees to the rest, and to any error."""
        raw = getattr(sock, "_sock", None)
        if self.is_sending or not self._unsent or raw is None or hasattr(sock, "_sslobj"):
            return
        data = b"".join(self._unsent)
        try:
            sent = raw.send(data)
        except OSError:
            return
        self._unsent[:] = [data[sent:]] if sent < len(data) else []

    def __bool__(self) -> bool:
        return bool(self._unsent)
