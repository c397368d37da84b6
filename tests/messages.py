"""Owns putting messages into a real broker and counting them, by py-amqp alone.

It takes no part of greenconsume and no transport of kombu's, so that a test never measures the
code under test with itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import amqp
from kombu import Connection
from kombu.transport.pyamqp import SSLTransport, Transport
from kombu.utils.url import parse_url


def stock_connection(url: str, **options: Any) -> Connection:
    """A kombu connection over kombu's own AMQP transport, whatever is registered for the scheme."""
    parts = parse_url(url)
    transport = SSLTransport if parts.pop("transport") == "amqps" else Transport
    return Connection(transport=transport, **parts, **options)


@contextmanager
def channel(url: str) -> Iterator[Any]:
    """Lend a py-amqp channel on a connection of its own; both are closed afterwards."""
    parts = parse_url(url)
    with amqp.Connection(
        host=f"{parts['hostname']}:{parts['port'] or 5672}",
        userid=parts["userid"],
        password=parts["password"],
        virtual_host=parts["virtual_host"],
    ) as connection:
        yield connection.channel()


def declare(url: str, queue: str, **arguments: Any) -> None:
    """Declare a durable queue; `arguments` are its ``x-`` arguments, dashes as underscores."""
    table = {name.replace("_", "-"): value for name, value in arguments.items()}
    with channel(url) as chan:
        chan.queue_declare(queue, durable=True, auto_delete=False, arguments=table)


def publish(url: str, queue: str, bodies: Iterable[Any] | int = 1) -> int:
    """Publish persistent JSON messages to a queue; returns once the broker confirmed all.

    Args:
        url: The broker's address, with the virtual host.
        queue: Declared as durable if it is missing.
        bodies: A message each; a number n stands for the bodies 0 … n - 1.

    Returns:
        How many were published.
    """
    with channel(url) as chan:
        _declare_if_missing(chan, queue)
        chan.confirm_select()
        confirms = _Confirms(chan)
        sent = 0
        for sent, body in enumerate(range(bodies) if isinstance(bodies, int) else bodies, 1):
            confirms.outstanding.add(sent)
            chan.basic_publish(_message(body), routing_key=queue)
        while confirms.outstanding:
            chan.connection.drain_events(timeout=30)
    return sent


def queue_depth(url: str, queue: str) -> int:
    """Return how many messages of a queue are ready to be delivered.

    Raises:
        amqp.NotFound: There is no such queue.
    """
    with channel(url) as chan:
        return int(chan.queue_declare(queue, passive=True).message_count)


def delete_queue(url: str, queue: str) -> None:
    """Delete a queue: its consumers get the server's basic.cancel."""
    with channel(url) as chan:
        chan.queue_delete(queue)


def _declare_if_missing(chan: Any, queue: str) -> None:
    # What it was declared with is not known here; and the error closes the channel that asked.
    try:
        chan.connection.channel().queue_declare(queue, passive=True)
    except amqp.NotFound:
        chan.queue_declare(queue, durable=True, auto_delete=False)


class _Confirms:
    def __init__(self, channel: Any) -> None:
        self.outstanding: set[int] = set()
        channel.events["basic_ack"].add(self._on_ack)

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self.outstanding -= {t for t in self.outstanding if t <= tag} if multiple else {tag}


def _message(body: Any) -> Any:
    return amqp.Message(
        json.dumps(body),
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=2,
    )
