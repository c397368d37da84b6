"""Owns where a server is and how one logs in there: a kombu connection's parameters, as redis-py has them.

TCP, TLS, unix sockets and Sentinel. TLS verifies the certificate and the host's name, unless both are told
not to: kombu's `rediss://` does neither, and says so with nothing but `CERT_NONE`. Called by `transport`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import kombu
import redis.sentinel
from kombu.utils.imports import symbol_by_name
from kombu.utils.url import url_to_parts
from redis import CredentialProvider
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.retry import Retry

DEFAULT_PORT = 6379
DEFAULT_SENTINEL_PORT = 26379
DEFAULT_DATABASE = 0
#: Seconds until a server that does not answer is given up, unless the options say otherwise.
CONNECT_TIMEOUT = 5.0

_Sentinel: Any = redis.sentinel.Sentinel  # untyped
_PASSED_ON = ("socket_keepalive", "socket_keepalive_options", "client_name")


def dialler_of(client: kombu.Connection, options: dict[str, Any]) -> Callable[[int], Any]:
    """Return what makes a redis-py connection, not connected, that speaks a protocol, 2 or 3.

    Args:
        client: The `kombu.Connection`.
        options: Its transport options.

    Raises:
        ValueError: They make no sense.
    """
    cls, params = _parameters(client, options)

    def dialler(protocol: int) -> Any:
        return cls(protocol=protocol, **params)

    return dialler


def sentinel_dialler_of(client: kombu.Connection, options: dict[str, Any]) -> Callable[[int], Any]:
    """Return the same for whatever server the sentinels say is the master."""
    if options.get("master_name") is None:
        raise ValueError("'master_name' transport option must be specified.")
    cls, params = _parameters(client, options)
    del params["port"]  # a server's, where the URL says none
    first = (params.pop("host"), client.port or DEFAULT_SENTINEL_PORT)
    parts = [url_to_parts(url) for url in client.alt if url.startswith("sentinel://")]
    nodes = [(each.hostname, each.port or DEFAULT_SENTINEL_PORT) for each in parts] or [first]

    def dialler(protocol: int) -> Any:
        # redis-py would try one that is away for seconds, before it asks the next.
        patience = {
            "socket_timeout": CONNECT_TIMEOUT,
            "socket_connect_timeout": CONNECT_TIMEOUT,
            "retry": Retry(NoBackoff(), 0),
        }
        sentinel: Any = _Sentinel(
            nodes,
            min_other_sentinels=options.get("min_other_sentinels", 0),
            sentinel_kwargs={**patience, **(options.get("sentinel_kwargs") or {})},
        )
        try:
            host, port = sentinel.discover_master(options["master_name"])
        finally:
            for node in sentinel.sentinels:
                node.close()
        return cls(host=host, port=port, protocol=protocol, **params)

    return dialler


def database_of(client: kombu.Connection) -> int:
    """Return the number of the database.

    Raises:
        ValueError: It is none.
    """
    name = client.virtual_host
    if isinstance(name, int):
        return name
    name = (name or "").lstrip("/")
    try:
        return int(name or DEFAULT_DATABASE)
    except ValueError:
        raise ValueError(f"Database is int between 0 and limit - 1, not {name}") from None


def _parameters(client: kombu.Connection, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    params: dict[str, Any] = {name: options.get(name) for name in _PASSED_ON}
    timeout = options.get("socket_connect_timeout") or client.connect_timeout or CONNECT_TIMEOUT
    params |= {
        "db": database_of(client),
        "username": client.userid,
        "password": client.password,
        "socket_connect_timeout": timeout,
        "socket_timeout": options.get("socket_timeout") or timeout,  # of the handshake alone
        "retry": Retry(NoBackoff(), 0),
    }
    host = client.hostname or "127.0.0.1"
    cls: Any = Connection
    if "://" in host:
        cls, query = UnixDomainSocketConnection, _unix(host, params)
        provider = query.get("credential_provider")
    else:
        params |= {"host": host, "port": client.port or DEFAULT_PORT}
        provider = getattr(client, "credential_provider", None)  # older kombus have none
        if client.ssl:
            cls = SSLConnection
            params |= _verified(client.ssl)
    _provide(provider, params)
    return cls, params


def _unix(host: str, params: dict[str, Any]) -> dict[str, Any]:
    _, _, _, user, password, path, query = url_to_parts(host)
    for name in ("socket_connect_timeout", "socket_keepalive", "socket_keepalive_options"):
        params.pop(name)
    params |= {"path": f"/{path}", "username": user, "password": password}
    if "virtual_host" in query:
        params["db"] = int(query["virtual_host"])
    return dict(query)


def _verified(given: object) -> dict[str, Any]:
    chosen = dict(given) if isinstance(given, dict) else {}
    if chosen.get("ssl_check_hostname", True) and not _verifies(chosen):
        # kombu's default, which nobody has chosen; who means it says ssl_check_hostname=false as well.
        chosen["ssl_cert_reqs"] = ssl.CERT_REQUIRED
    return chosen


def _verifies(chosen: dict[str, Any]) -> bool:
    return chosen.get("ssl_cert_reqs", ssl.CERT_REQUIRED) not in (None, "none", ssl.CERT_NONE)


def _provide(provider: Any, params: dict[str, Any]) -> None:
    if not provider:
        return
    if isinstance(provider, str):
        provider = symbol_by_name(provider)()
    if not isinstance(provider, CredentialProvider):
        raise ValueError(
            "Credential provider is not an instance of a redis.CredentialProvider or a subclass"
        )
    params |= {"credential_provider": provider, "username": None, "password": None}
