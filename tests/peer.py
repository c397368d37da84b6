"""Owns the scripted AMQP peer: a loopback server that says what a test has it say.

By itself it speaks enough AMQP 0-9-1 to bring a connection up, declare, consume and close; all
else, deliveries first of all, a test sends in chosen bytes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Collection, Iterator, Mapping

from gevent.pool import Group
from gevent.server import StreamServer

from tests.frames import (
    PROTOCOL_HEADER,
    Frame,
    Published,
    basic_cancel,
    connection_close,
    deliver,
    method_frame,
    parse,
    published,
)
from tests.servers import HOST, free_port
from tests.waiting import wait_until

Answer = bytes | Callable[[Frame], bytes]

CAPABILITIES = {
    "publisher_confirms": True,
    "consumer_cancel_notify": True,
    "basic.nack": True,
    "connection.blocked": True,
    "authentication_failure_close": True,
}

# Where a method has a no-wait bit: the position of the argument.
NO_WAIT = {
    "exchange.declare": 7,
    "exchange.delete": 3,
    "exchange.bind": 4,
    "exchange.unbind": 4,
    "queue.declare": 6,
    "queue.bind": 4,
    "queue.purge": 2,
    "queue.delete": 4,
    "basic.consume": 6,
    "basic.cancel": 1,
    "confirm.select": 0,
}

# What an -ok method carries, where it carries anything.
OK_ARGS: dict[str, Callable[[Frame], tuple[object, ...]]] = {
    "connection.open": lambda frame: ("",),
    "channel.open": lambda frame: ("",),
    "channel.flow": lambda frame: (frame.args[0],),
    "queue.declare": lambda frame: (frame.args[1] or f"amq.gen-{frame.channel}", 0, 0),
    "queue.purge": lambda frame: (0,),
    "queue.delete": lambda frame: (0,),
    "basic.consume": lambda frame: (frame.args[2] or f"amq.ctag-{frame.channel}",),
    "basic.cancel": lambda frame: (frame.args[0],),
}
# Methods of a client that ask for no answer.
UNANSWERED = {"connection.tune-ok", "basic.publish", "basic.ack", "basic.reject", "basic.nack"}

# After these, and the answer to them, a server closes the connection.
ENDINGS = {"connection.close", "connection.close-ok"}

# What RabbitMQ says to a wrong password, and to a virtual host that is not there.
REFUSES_PASSWORD = {"connection.start-ok": connection_close(403, "ACCESS_REFUSED - login refused")}
REFUSES_VHOST = {"connection.open": connection_close(530, "NOT_ALLOWED - vhost not found")}


# What RabbitMQ 4.3 refuses, and no broker here does: transient queues that are not exclusive, and global QoS.
RABBITMQ_4_3: dict[str, Answer] = {
    "queue.declare": lambda frame: _refused_if(
        not any(frame.args[2:5]),
        frame,
        541,
        "INTERNAL_ERROR - Feature `transient_nonexcl_queues` is deprecated.",
    ),
    "basic.qos": lambda frame: _refused_if(
        frame.args[2], frame, 540, "NOT_IMPLEMENTED - Feature `global_qos` is deprecated."
    ),
}


class Peer:
    """A fake broker on a loopback port.

    It may be connected to many times; what a test sends goes to the connection that came last.

    Args:
        answers: By method name (``"connection.open"``): what to send in place of the peer's own
            answer; bytes, or a function of the frame.
        silent: Method names that are recorded and never answered.
        heartbeat: Proposed in Tune, in seconds; 0 for none.
        channel_max: Proposed in Tune.
        frame_max: Proposed in Tune.
        rabbitmq: The version of RabbitMQ that it says it is; None: it is none.
        close_after: Send this many bytes on each connection, in all, then close it.

    Attributes:
        received: Every frame that came in, in order, over all connections.
        connection_count: How many connections were ever accepted.
        errors: What went wrong while reading, such as bytes that are no frame.
    """

    def __init__(
        self,
        *,
        answers: Mapping[str, Answer] | None = None,
        silent: Collection[str] = (),
        heartbeat: int = 0,
        channel_max: int = 2047,
        frame_max: int = 131072,
        rabbitmq: str | None = None,
        close_after: int | None = None,
    ) -> None:
        self.answers = dict(answers or {})
        self.silent = set(silent)
        self.received: list[Frame] = []
        self.errors: list[Exception] = []
        self.connection_count = 0
        self.port = free_port()
        self._tune = method_frame(0, "connection.tune", channel_max, frame_max, heartbeat)
        self._start = _start(rabbitmq)
        self._close_after = close_after
        self._line: _Line | None = None
        self._handlers = Group()
        self._server = StreamServer((HOST, self.port), self._serve, spawn=self._handlers.spawn)
        self._server.start()

    @property
    def url(self) -> str:
        """The address to connect to."""
        return f"amqp://guest:guest@{HOST}:{self.port}//"

    @property
    def names(self) -> list[str]:
        """The names of all frames received, in order."""
        return [frame.name for frame in self.received]

    @property
    def published(self) -> list[Published]:
        """The messages that were published in whole."""
        return published(self.received)

    @property
    def open_count(self) -> int:
        """The number of connections that are open now."""
        return len(self._handlers)

    def frames(self, name: str) -> list[Frame]:
        """All frames received that have this name."""
        return [frame for frame in self.received if frame.name == name]

    def wait_for(self, name: str, count: int = 1, within: float = 2.0) -> Frame:
        """Wait until this many frames of this name have been received; returns the last of them.

        Switches: yes.
        """
        wait_until(
            lambda: len(self.frames(name)) >= count,
            within,
            f"{count} x {name} from the client, which sent {self.names}",
        )
        return self.frames(name)[count - 1]

    def send(self, data: bytes) -> None:
        """Send bytes as they are: whole frames, halves, or rubbish.

        Switches: yes, if the client does not read.
        """
        assert self._line is not None, "nobody has connected"
        self._line.send(data)

    def deliver(
        self,
        channel: int,
        consumer_tag: str,
        delivery_tag: int,
        body: bytes = b"{}",
        **options: object,
    ) -> bytes:
        """Send a whole delivery and return its bytes; `options` are those of `frames.deliver`."""
        data = deliver(channel, consumer_tag, delivery_tag, body, **options)  # type: ignore[arg-type]  # forwarded
        self.send(data)
        return data

    def deliver_counted(
        self,
        channel: int,
        consumer_tag: str,
        delivery_tag: int,
        acquired: int,
        failed: int = 0,
        **options: object,
    ) -> bytes:
        """Send a delivery as a quorum queue of RabbitMQ 4.3 does: `failed` leaves out what was nacked."""
        counts = {"x-acquired-count": acquired, "x-delivery-count": failed}
        headers = counts if acquired else {}
        return self.deliver(channel, consumer_tag, delivery_tag, headers=headers, **options)  # type: ignore[arg-type]  # forwarded

    def cancel(self, channel: int, consumer_tag: str) -> None:
        """Cancel a consumer, as RabbitMQ 4.3 does where a delivery was not settled in time."""
        self.send(basic_cancel(channel, consumer_tag))

    def hang_up(self, reset: bool = False) -> None:
        """Close the last connection, by FIN or by RST."""
        assert self._line is not None, "nobody has connected"
        self._line.close(reset)

    def close(self) -> None:
        """Stop listening and drop all connections."""
        self._server.close()
        self._handlers.kill()

    def _serve(self, sock: socket.socket, address: object) -> None:
        self.connection_count += 1
        line = self._line = _Line(sock, self._close_after)
        try:
            if line.read_protocol_header():
                line.send(self._start)
                self._converse(line)
        except OSError:
            pass  # the client, or a test, has closed the connection
        except (
            Exception
        ) as exc:  # whatever a client's bytes can do to the parser: told by the fixture
            self.errors.append(exc)
        finally:
            line.close()

    def _converse(self, line: _Line) -> None:
        for frame in line.frames():
            self.received.append(frame)
            line.send(self._answer(frame))
            if frame.name in ENDINGS and frame.name not in self.silent:
                return

    def _answer(self, frame: Frame) -> bytes:
        name = frame.name
        if name in self.silent:
            return b""
        if name in self.answers:
            answer = self.answers[name]
            return answer if isinstance(answer, bytes) else answer(frame)
        if name == "connection.start-ok":
            return self._tune
        if name == "basic.get":
            return method_frame(frame.channel, "basic.get-empty", "")
        return _ok(frame, name)


class _Line:
    """One connection of a peer."""

    def __init__(self, sock: socket.socket, close_after: int | None) -> None:
        # Else what follows another small frame waits 40 ms for the client's kernel to acknowledge that.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._left = close_after
        self._buffer = bytearray()

    def read_protocol_header(self) -> bool:
        while len(self._buffer) < len(PROTOCOL_HEADER):
            if not self._read():
                return False
        header = bytes(self._buffer[: len(PROTOCOL_HEADER)])
        del self._buffer[: len(PROTOCOL_HEADER)]
        assert header == PROTOCOL_HEADER, header
        return True

    def frames(self) -> Iterator[Frame]:
        yield from parse(self._buffer)
        while self._read():
            yield from parse(self._buffer)

    def send(self, data: bytes) -> None:
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        self._sock.sendall(data)
        if self._left == 0:
            self.close()

    def close(self, reset: bool = False) -> None:
        if reset:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def _read(self) -> bool:
        data = self._sock.recv(65536)
        self._buffer += data
        return bool(data)


def _start(rabbitmq: str | None) -> bytes:
    product, version = ("RabbitMQ", rabbitmq) if rabbitmq else ("scripted peer", "0")
    properties = {"product": product, "version": version, "capabilities": CAPABILITIES}
    return method_frame(0, "connection.start", 0, 9, properties, "PLAIN AMQPLAIN", "en_US")


def _refused_if(refused: object, frame: Frame, code: int, text: str) -> bytes:
    assert frame.method is not None
    return connection_close(code, text, frame.method) if refused else _ok(frame, frame.name)


def _nothing(frame: Frame) -> tuple[object, ...]:
    return ()


def _ok(frame: Frame, name: str) -> bytes:
    if name in UNANSWERED or frame.method is None or name.endswith("-ok"):
        return b""
    if name in NO_WAIT and frame.args[NO_WAIT[name]]:
        return b""
    args = OK_ARGS.get(name, _nothing)(frame)
    return method_frame(frame.channel, f"{name}-ok", *args)
