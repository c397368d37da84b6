"""Owns what is done to a link's socket beside reading and writing: drop it, or leave it to a parent."""

from __future__ import annotations

import os
import socket
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amqp.transport import _AbstractTransport as Transport


def drop(transport: Transport) -> None:
    """Close the socket of py-amqp's transport under whoever reads or writes it. Never switches."""
    # Not transport.close(): over TLS it waits for the peer's close_notify.
    sock = transport and transport.sock
    if not sock:
        return
    transport.connected = False
    _say_goodbye(sock)
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the peer was faster
    sock.close()


def _say_goodbye(sock: socket.socket) -> None:
    """Send TLS's close_notify without a wait: RabbitMQ may keep a connection for 30 s where it is missing."""
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(0.0)
        try:
            sock.unwrap()
        except (OSError, ValueError):
            pass  # it waits for the peer's, or nothing can be sent any more


def send_at_once(transport: Transport, data: bytes) -> None:
    """Try once to send, without waiting, before a plain socket is dropped. Never switches."""
    try:
        transport.sock._sock.send(data)
    except OSError:
        pass  # the broker closes by itself, too


def leave_to_parent(transport: Transport) -> None:
    """Let go of the socket, in a forked child, without a word to the peer. Never switches."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, transport.sock.fileno())  # shutdown() would end the parent's connection
    os.close(null)
