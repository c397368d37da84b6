"""Owns the loopback fault proxy that stands between a client and a real broker.

Everything in it is greenlets of this process, so it serves patched clients only.
"""

from __future__ import annotations

import socket
import struct
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import gevent
from gevent.event import Event
from gevent.pool import Group
from gevent.server import StreamServer

from tests.servers import HOST, free_port

Direction = Literal["to_client", "to_server"]
DIRECTIONS: tuple[Direction, Direction] = ("to_client", "to_server")

CHUNK_SIZE = 65536
DEFAULT_PORTS = {"amqp": 5672, "pyamqp": 5672, "amqps": 5671, "redis": 6379}


class Proxy:
    """Forwards TCP connections to the server of a URL, and does what networks do.

    A fault holds for the connections that are open and, apart from `cut` and `half_open`, for all
    that come later, until it is taken back. Methods that end connections switch, and return when
    the sockets are closed.

    Attributes:
        url: The server's URL with the proxy's address in it: scheme, login and path are kept.
        port: Where it listens on loopback; the same for its whole life.
        connection_count: How many clients have ever been accepted.
        bytes_to_client: How many bytes clients have been sent, over all connections.
        bytes_to_server: The other way.
    """

    def __init__(self, target_url: str) -> None:
        self.port = free_port()
        self.url, self._target = _reroute(target_url, self.port)
        self.connection_count = 0
        self.bytes_to_client = 0
        self.bytes_to_server = 0
        self._recorded: dict[int, bytearray] | None = None
        self._pairs: set[_Pair] = set()
        self._flowing = {direction: Event() for direction in DIRECTIONS}
        self._latency = 0.0
        self._truncate_after: int | None = None
        self._server: StreamServer | None = None
        self._handlers = Group()
        self.resume()
        self.accept()

    @property
    def open_count(self) -> int:
        """The number of clients that are connected now."""
        return len(self._pairs)

    def record(self) -> dict[int, bytearray]:
        """Return what clients send from now on, by their number in the order of their coming, from 1 on."""
        self._recorded = recorded = {}
        return recorded

    def accept(self) -> None:
        """Listen again, after `refuse`."""
        if self._server is None:
            self._server = StreamServer((HOST, self.port), self._serve, spawn=self._handlers.spawn)
            self._server.start()

    def refuse(self) -> None:
        """Stop listening: new connections are refused, those that are open stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def cut(self) -> None:
        """Reset every connection, on both sides (RST)."""
        for pair in list(self._pairs):
            self._drop(pair, reset=True)

    def half_open(self) -> None:
        """Drop the server's side of every connection; the clients are not told.

        What a client sends is accepted and lost; when it closes, `open_count` falls.
        """
        for pair in list(self._pairs):
            pair.stop_pumps()
            pair.server.close()
            pair.pumps = [gevent.spawn(self._swallow, pair)]

    def stall(self, direction: Direction | None = None) -> None:
        """Stop forwarding, one way or both, and keep all sockets open.

        Up to `CHUNK_SIZE` bytes are taken in, the kernel's buffers take some more, then senders block.
        """
        for stalled in DIRECTIONS if direction is None else (direction,):
            self._flowing[stalled].clear()

    def resume(self) -> None:
        """Go on forwarding, both ways; what was held up goes first."""
        for flowing in self._flowing.values():
            flowing.set()

    def latency(self, seconds: float) -> None:
        """Hold every chunk back for this long, both ways; 0 ends it.

        One chunk at a time: a flood is slowed down as well.
        """
        self._latency = seconds

    def truncate_at(self, byte_count: int) -> None:
        """Forward this many more bytes to clients, over all connections, then close them all.

        The bytes do arrive: the end is a FIN, not a reset. Holds once.
        """
        self._truncate_after = byte_count

    def close(self) -> None:
        """Stop listening and drop all connections."""
        self.refuse()
        self.cut()
        self._handlers.kill()

    def _serve(self, client: socket.socket, address: object) -> None:
        self.connection_count += 1
        number = self.connection_count
        try:
            server = socket.create_connection(self._target, 10.0)
        except OSError:
            _reset(client)
            return
        server.settimeout(None)
        pair = _Pair(client, server, number)
        self._pairs.add(pair)
        pair.pumps = [gevent.spawn(self._pump, pair, direction) for direction in DIRECTIONS]
        pair.dropped.wait()

    def _pump(self, pair: _Pair, direction: Direction) -> None:
        source, sink = pair.route(direction)
        try:
            while data := source.recv(CHUNK_SIZE):
                if direction == "to_server" and self._recorded is not None:
                    self._recorded.setdefault(pair.number, bytearray()).extend(data)
                self._flowing[direction].wait()
                if self._latency:
                    gevent.sleep(self._latency)
                if not self._forward(sink, data, direction):
                    return
            self._flowing[direction].wait()
        except OSError:
            pass  # either side was reset, which ends the pair as a close does
        self._drop(pair)

    def _forward(self, sink: socket.socket, data: bytes, direction: Direction) -> bool:
        if direction == "to_server":
            sink.sendall(data)
            self.bytes_to_server += len(data)
            return True
        allowed = self._truncate_after
        whole = allowed is None or len(data) < allowed
        data = data[:allowed]
        if allowed is not None:
            self._truncate_after = allowed - len(data) if whole else None
        sink.sendall(data)
        self.bytes_to_client += len(data)
        if not whole:
            for pair in list(self._pairs):
                self._drop(pair)
        return whole

    def _swallow(self, pair: _Pair) -> None:
        try:
            while pair.client.recv(CHUNK_SIZE):
                pass
        except OSError:
            pass  # the client reset the connection, which is as good as a close here
        self._drop(pair)

    def _drop(self, pair: _Pair, reset: bool = False) -> None:
        if pair not in self._pairs:
            return  # both pumps came to their end: the other one drops the pair
        self._pairs.remove(pair)
        pair.stop_pumps()
        for end in (pair.client, pair.server):
            if reset:
                _reset(end)
            end.close()
        pair.dropped.set()


def _reroute(url: str, port: int) -> tuple[str, tuple[str, int]]:
    parts = urlsplit(url)
    assert parts.hostname, f"no host in {url}"
    login, at, _ = parts.netloc.rpartition("@")
    # A certificate is for the name: the one that stands for loopback is kept.
    host = "localhost" if parts.hostname == "localhost" else HOST
    rerouted = parts._replace(netloc=f"{login}{at}{host}:{port}")
    return urlunsplit(rerouted), (parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme])


class _Pair:
    """One client's connection and the one to the server that was made for it."""

    def __init__(self, client: socket.socket, server: socket.socket, number: int) -> None:
        for sock in (client, server):  # else a small piece waits 40 ms for the one before
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number = number
        self.client = client
        self.server = server
        self.pumps: list[gevent.Greenlet] = []
        self.dropped = Event()

    def route(self, direction: Direction) -> tuple[socket.socket, socket.socket]:
        if direction == "to_client":
            return self.server, self.client
        return self.client, self.server

    def stop_pumps(self) -> None:
        # Before the sockets are closed: gevent would close one that is being waited on later, not now.
        current = gevent.getcurrent()
        gevent.killall([pump for pump in self.pumps if pump is not current])


def _reset(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # closed already, by the other side's reset
    sock.close()
