"""Owns the addresses of brokers: a URL or a connection of the user's is checked here, where it enters.

It must never connect. Called by `runtime`, `Publisher` and the dead letters.
"""

from __future__ import annotations

import kombu

from greenconsume.transports import registry


def connection_to(broker: object) -> kombu.Connection:
    """Return a connection, not connected, whose transports are known and do not block the hub.

    Raises:
        UnsupportedTransportError: A transport is unknown, lacks a library, or blocks.
        TypeError: `broker` is neither a URL nor a connection.
        ValueError: It is no URL that can be parsed.
    """
    if isinstance(broker, kombu.Connection):
        registry.require_green(broker)
        return broker
    if not isinstance(broker, str):
        raise TypeError(f"broker must be a URL or a kombu Connection, not {broker!r}")
    if not broker:
        raise ValueError("broker must be a URL such as amqp:// or memory://, not an empty string")
    registry.require_known(broker)
    connection = _parsed(broker)
    registry.require_green(connection)
    if not connection.hostname:
        # The transport's default, as kombu has it; which warns of it once for each consumer.
        connection.hostname = connection.transport.default_connection_params.get("hostname")
    return connection


def alternatives_of(connection: kombu.Connection) -> list[kombu.Connection]:
    """Return a connection for each of the URLs that `connection` fails over to."""
    if not connection.alt:
        return [connection]
    clones = [connection.clone() for _ in connection.alt]
    for clone, uri in zip(clones, connection.alt, strict=True):
        clone.switch(uri)
    return clones


def _parsed(url: str) -> kombu.Connection:
    try:
        connection = kombu.Connection(url)
        alternatives_of(connection)
    except ValueError:
        # Not `from exc`: urllib quotes what it took for the port, which is a part of the password.
        raise ValueError(
            "the broker URL cannot be parsed: is its port no number, or a special character in its "
            "user name or password not percent-encoded?"
        ) from None
    return connection
