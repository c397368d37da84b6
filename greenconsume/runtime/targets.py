"""Owns what may be spawned: a class, a callable or an instance, checked where it enters.

It must never connect. Called by `runtime`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import kombu
from kombu import mixins as kombu_mixins

from greenconsume.errors import InvalidConsumerError
from greenconsume.mixins import ConsumerMixin
from greenconsume.transports import registry


def maker_of(target: object, connection: kombu.Connection, replicas: object) -> Callable[[], Any]:
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


def _require_get_consumers(target: object, name: str) -> None:
    """Refuse a class that has the mixins' own `get_consumers` alone, which only raises."""
    inherited = (ConsumerMixin.get_consumers, kombu_mixins.ConsumerMixin.get_consumers)
    if getattr(target, "get_consumers", None) in inherited:
        raise InvalidConsumerError(f"{name} has no get_consumers: define it")


def _adopt(instance: Any, connection: kombu.Connection, replicas: object) -> None:
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
        registry.require_green(instance.connection)
