"""Owns what may be spawned, and the broker that it is spawned for: both are checked where they enter.

It must never connect. Called by `runtime`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import kombu
from kombu import mixins as kombu_mixins

from greenconsume import transports
from greenconsume.errors import InvalidConsumerError
from greenconsume.mixins import ConsumerMixin


def connection_to(broker: Any) -> kombu.Connection:
    """Return a connection, not connected, whose transports are known and do not block the hub.

    Raises:
        UnsupportedTransportError: A transport is unknown, lacks a library, or blocks.
        TypeError: `broker` is neither a URL nor a connection.
        ValueError: It is no URL that can be parsed.
    """
    if isinstance(broker, kombu.Connection):
        transports.require_green(broker)
        return broker
    if not isinstance(broker, str):
        raise TypeError(f"broker must be a URL or a kombu Connection, not {broker!r}")
    if not broker:
        raise ValueError("broker must be a URL such as amqp:// or memory://, not an empty string")
    transports.require_known(broker)
    connection = _parsed(broker)
    transports.require_green(connection)
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


def maker_of(target: Any, connection: kombu.Connection, replicas: Any) -> Callable[[], Any]:
    """Return what makes the consumer of `target`, the same one each time if it is an instance."""
    if not isinstance(replicas, int) or replicas < 1:
        raise ValueError(f"replicas must be 1 or more, not {replicas!r}")
    if not isinstance(target, type) and hasattr(target, "get_consumers"):
        _adopt(target, connection, replicas)
        return lambda: target
    name = getattr(target, "__name__", repr(target))
    if not callable(target):
        raise InvalidConsumerError(
            f"{name} is no consumer: it has no get_consumers, and cannot be called to make one"
        )
    if isinstance(target, type) and not hasattr(target, "get_consumers"):
        raise InvalidConsumerError(
            f"{name} has no get_consumers: subclass greenconsume.ConsumerMixin and define it"
        )
    try:
        inspect.signature(target).bind(connection)
    except TypeError as exc:
        raise InvalidConsumerError(
            f"{name} cannot be called with the connection alone: {exc}; give it an "
            "__init__(self, connection), or spawn a function of the connection that makes it"
        ) from exc
    except ValueError:  # it has no signature to look at; calling it will tell
        pass
    _require_get_consumers(target, name)
    return partial(target, connection)


def _require_get_consumers(target: Any, name: str) -> None:
    """Refuse a class that has the mixins' own `get_consumers` alone, which only raises."""
    inherited = (ConsumerMixin.get_consumers, kombu_mixins.ConsumerMixin.get_consumers)
    if getattr(target, "get_consumers", None) in inherited:
        raise InvalidConsumerError(f"{name} has no get_consumers: define it")


def _adopt(instance: Any, connection: kombu.Connection, replicas: int) -> None:
    """Check an instance, and give it the runtime's connection if it has none."""
    name = type(instance).__name__
    _require_get_consumers(type(instance), name)
    if replicas != 1:
        raise InvalidConsumerError(
            f"an instance of {name} cannot have {replicas} replicas: spawn its class, or a function"
        )
    if getattr(instance, "connection", None) is None:
        try:
            instance.connection = connection
        except AttributeError as exc:
            raise InvalidConsumerError(f"{name} has no connection and takes none: {exc}") from exc
    elif isinstance(instance.connection, kombu.Connection):
        transports.require_green(instance.connection)


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
