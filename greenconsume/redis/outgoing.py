"""Owns what a link has to send: commands of one turn of the hub, to be joined, in their order.

It must never wait. Called by `link`.
"""

from __future__ import annotations

from typing import Any

#: Bytes that are sent at once where nobody waits. What TLS has no room for it wants to see again, from the
#: same byte on and no less of it: the writer sends more than this.
_PIECE = 16384


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

    def send_now(self, sock: Any) -> None:
        """Send what a socket takes without waiting; the writer sees to the rest, and to any error."""
        if self.is_sending or not self._unsent or getattr(sock, "_sock", None) is None:
            return
        tls = getattr(sock, "_sslobj", None)
        send = sock._sock.send if tls is None else tls.write
        data = b"".join(self._unsent)
        sent = 0
        try:
            while sent < len(data):
                sent += send(data[sent : sent + _PIECE])
        except OSError:  # there is no room, for one
            pass
        self._unsent[:] = [data[sent:]] if sent < len(data) else []

    def __bool__(self) -> bool:
        return bool(self._unsent)
