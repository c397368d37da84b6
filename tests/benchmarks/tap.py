"""Owns the wire tap between a consumer and the broker: it notes when acks come by, and for what.

It is greenlets of the process that waits for the measurement, which is not the one that is measured.
"""

from __future__ import annotations

import socket
from time import monotonic

import gevent
from gevent.server import StreamServer

from tests.servers import HOST, free_port

#: A frame's size, then Basic.Ack's class and method; the delivery tag follows.
ACK = b"\x00\x00\x00\x0d\x00\x3c\x00\x50"


class AckTap:
    """Forwards connections to a port of this machine.

    Attributes:
        port: Where it listens.
        acks: When the bytes of an ack came by, by the clock of `monotonic`, and its delivery tag.
    """

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.acks: list[tuple[float, int]] = []
        self._target = target
        self._server = StreamServer((HOST, self.port), self._serve)
        self._server.start()

    def close(self) -> None:
        self._server.stop()

    def seen(self, tag: int) -> float:
        """Return when a tag was acked: by itself, or with later ones."""
        return next(at for at, acked in self.acks if acked >= tag)

    def _serve(self, client: socket.socket, _address: object) -> None:
        with socket.create_connection((HOST, self._target)) as server:
            back = gevent.spawn(self._pump, server, client)
            self._pump(client, server, note=True)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket, note: bool = False) -> None:
        try:
            while data := source.recv(65536):
                if note:
                    self._note(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other way was closed first, with something still to be read: the end as well

    def _note(self, data: bytes) -> None:
        found = data.rfind(ACK)
        if found >= 0:
            start = found + len(ACK)
            self.acks.append((monotonic(), int.from_bytes(data[start : start + 8], "big")))
