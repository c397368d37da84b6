"""Owns redis-py's own client for users who reach for it: kombu's channels have one as `client`.

It has connections of its own, apart from the link. Nothing in here uses it. Called by `topology`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis

_Pool: Any = redis.ConnectionPool  # so that its methods may be untyped


class _DiallingPool(_Pool):  # type: ignore[misc]  # see above
    def __init__(self, dialler: Callable[[int], Any]) -> None:
        super().__init__()
        self._dialler = dialler

    def make_connection(self) -> Any:
        return self._dialler(2)


def plain_client(dialler: Callable[[int], Any], prefix: str) -> Any:
    """Return a `redis.Redis`, which connects when it is first used; it prefixes keys as kombu's does."""
    pool = _DiallingPool(dialler)
    if not prefix:
        return redis.Redis(connection_pool=pool)
    from kombu.transport.redis import PrefixedStrictRedis

    return PrefixedStrictRedis(connection_pool=pool, global_keyprefix=prefix)
