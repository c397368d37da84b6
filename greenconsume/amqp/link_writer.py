"""Owns the writing of a link: what is queued, and the settles of a turn of the hub, sent by one `sendall`.

It runs in a greenlet of its own, the only one that writes to the socket, and nobody kills it there (law 2):
it ends when the link fails. It must never make anybody wait but those who publish, at the gate. Called by
`link`.
"""

from __future__ import annotations

from time import monotonic
from typing import Any, Protocol

import gevent
from gevent.event import Event

from greenconsume.amqp.link_users import TakesDeliveries
from greenconsume.amqp.publish_gate import PublishGate
from greenconsume.amqp.send_queue import Outgoing


class WriteLink(Protocol):
    """A link, as its writer sees it."""

    failure: BaseException | None
    transport: Any

    def fail(self, error: BaseException) -> None:
        """End the link."""
        ...


class LinkWriter:
    """Writes to one link until it fails.

    Attributes:
        gate: Where those wait who publish.
        last_write: When something was last written (`time.monotonic`).
    """

    __slots__ = ("_link", "_outgoing", "_settling", "_unsent", "gate", "last_write")

    def __init__(self, link: WriteLink) -> None:
        self._link = link
        self._outgoing = Outgoing()
        self._settling: list[TakesDeliveries] = []
        self._unsent = Event()
        self.gate = PublishGate(self._outgoing)
        self.last_write = monotonic()

    def put(self, frames: list[bytes]) -> None:
        """Queue frames, all of one channel, for the hub's next turn. Never switches."""
        self._outgoing.put(frames)
        self._unsent.set()

    def flush_soon(self, deliveries: TakesDeliveries) -> None:
        """Ask a channel for its settles at the hub's next turn. Never switches."""
        self._settling.append(deliveries)
        self._unsent.set()

    def run(self) -> None:
        """Write until the link fails, by what is written here or by another. Switches: yes."""
        link, sendall = self._link, self._link.transport.sock.sendall
        try:
            while self._await_unsent():
                settling, self._settling = self._settling, []
                for deliveries in settling:
                    deliveries.flush()
                data = self._outgoing.take()
                self.gate.note_sending(len(data))
                sendall(data)
                self.last_write = monotonic()
                self.gate.note_sent()
                if self._outgoing:
                    self._unsent.set()
                    gevent.sleep(0)  # sendall does not switch while the kernel takes all
        except OSError as exc:
            link.fail(exc)

    def _await_unsent(self) -> bool:
        """Wait until something is to be written; return False once the link has failed."""
        self._unsent.wait()
        self._unsent.clear()
        return self._link.failure is None

    def take_unsent(self) -> bytes:
        """Return what is queued, for a last try to send it, and forget it. Never switches."""
        return self._outgoing.take()

    def end(self) -> None:
        """Forget what is queued, and let go of everybody who waits: the link has failed. Never switches."""
        self.gate.note_lost()
        self._outgoing.clear()
        self._settling.clear()
        self._unsent.set()
