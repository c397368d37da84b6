"""Owns the first words with a server: which protocol it speaks, whether it may be used, whether it wakes us.

Blocks no longer than the connection's own timeouts. Called by `link`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from redis import exceptions

if TYPE_CHECKING:
    from redis.connection import AbstractConnection as RedisConnection

#: The oldest server that can be used: `RPOP` takes a count, and `ZADD` compares.
MIN_VERSION = (6, 2)
#: The versions of the protocol. The older one has no HELLO, and nobody is told of changes.
OLDER, NEWEST = 2, 3


class ServerRefusedError(exceptions.ConnectionError):
    """The server answered, and cannot be used: too old, or a part of a cluster."""


#: What says that the server was reached and refused; trying again does not help by itself.
REFUSALS = (
    ServerRefusedError,
    exceptions.AuthenticationError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)


@dataclass(frozen=True, slots=True)
class Greeting:
    """Facts that a server tells of itself.

    Attributes:
        client_id: The number by which it knows this connection; empty if it does not say.
        tracks: True if it tells when a key changes that this connection has read (client tracking).
        protocol: The version that is spoken, 2 or 3.
    """

    version: str = ""
    client_id: str = ""
    tracks: bool = False
    protocol: int = NEWEST


def protocol_of(options: dict[str, Any]) -> int:
    """Return the version of the protocol that transport options ask for.

    Raises:
        ValueError: It is none.
    """
    protocol = options.get("protocol", NEWEST)
    if protocol not in (OLDER, NEWEST):
        raise ValueError(f"protocol must be {OLDER} or {NEWEST}, not {protocol!r}")
    return int(protocol)


def greet(
    dialler: Callable[[int], Any], took: Callable[[Any], object], protocol: int = NEWEST
) -> tuple[Any, Greeting]:
    """Connect, log in and see what the server can.

    Args:
        dialler: Makes a redis-py connection, not connected, that speaks a protocol, 2 or 3.
        took: Called with each connection before it connects.
        protocol: The one to begin with; the older one is tried where a server does not know the newer.

    Raises:
        ServerRefusedError: It cannot be used.
        redis.exceptions.RedisError: It cannot be reached, or does not let us in.

    Switches: yes.
    """
    connection = dialler(protocol)
    took(connection)
    try:
        connection.connect()
    except (
        exceptions.ResponseError
    ) as exc:  # it does not know the newer protocol, or a proxy does not
        if isinstance(exc, REFUSALS) or "HELLO" not in str(exc).upper():
            raise
        connection = dialler(OLDER)
        took(connection)
        connection.connect()
    facts = _facts_of(connection)
    _require_usable(facts)
    tracks = (
        connection.protocol == NEWEST
        and _asked(connection, "CLIENT", "TRACKING", "ON", "NOLOOP") == b"OK"
    )
    spoken = connection.protocol
    return connection, Greeting(facts.get("version", ""), facts.get("id", ""), tracks, spoken)


def _facts_of(connection: RedisConnection) -> dict[str, str]:
    said = connection.handshake_metadata if connection.protocol == NEWEST else None
    facts = {_text(name): _text(value) for name, value in (said or {}).items()}
    if not facts:
        info = _text(_asked(connection, "INFO", "server"))
        lines = (line.partition(":") for line in info.splitlines())
        known = {name: value for name, _, value in lines}
        facts = {"version": known.get("redis_version", ""), "mode": known.get("redis_mode", "")}
        facts["id"] = _text(_asked(connection, "CLIENT", "ID"))
    return facts


def _require_usable(facts: dict[str, str]) -> None:
    if facts.get("mode") == "cluster":
        raise ServerRefusedError(
            "this Redis is part of a cluster, where one message's keys are on several servers: use one "
            "that is none, alone or with Sentinel"
        )
    numbers = [part for part in facts.get("version", "").split(".")[:2] if part.isdigit()]
    if numbers and tuple(int(part) for part in numbers) < MIN_VERSION:
        raise ServerRefusedError(
            f"this Redis is version {facts['version']}: greenconsume needs 6.2 or later, or Valkey"
        )


def _asked(connection: Any, *command: str) -> Any:
    """Return the reply, or None where the server refuses the command."""
    try:
        connection.send_command(*command, check_health=False)
        return connection.read_response()
    except exceptions.ResponseError:
        return None


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)
