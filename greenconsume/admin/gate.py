"""Owns who may ask the admin what: the address it listens on, a token, and the browser's headers.

A web page must not be able to look at or steer a port of its visitor's machine: so a foreign `Host` (a name
that was bound to this address since), and a foreign `Origin`, are refused. It must never tell why a token is
wrong. Called by `app` for each request, before anything is read of its body.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, NamedTuple

from greenconsume.admin.address import Address, is_loopback

#: What is answered to whoever reaches the address: a probe, and a page that holds no data.
OPEN = frozenset({"/", "/livez", "/readyz"})


class Refusal(NamedTuple):
    """The reason why a request is not answered, and the status that says so."""

    status: str
    reason: str


class Gate:
    """Lets requests through, or says why not.

    Args:
        address: Where they come in.
        token: What they must show, where the address does not say enough.
    """

    def __init__(self, address: Address, token: str | None = None) -> None:
        self._address = address
        self._token = None if token is None else token.encode()

    def refusal(self, method: str, path: str, environ: Mapping[str, Any]) -> Refusal | None:
        """Return why a request is refused, or None. Never switches."""
        if self._is_foreign_host(environ.get("HTTP_HOST", "")):
            return Refusal("421 Misdirected Request", "this is not the host that was asked for")
        if self._is_foreign_page(environ):
            return Refusal("403 Forbidden", "asked by a page of another origin")
        if self._needs_token(method, path) and not self.knows(environ):
            return Refusal("401 Unauthorized", self._remedy)
        return None

    def knows(self, environ: Mapping[str, Any]) -> bool:
        """Return whether a request shows the token, in constant time."""
        shown = str(environ.get("HTTP_AUTHORIZATION", ""))
        scheme, _, given = shown.partition(" ")
        if self._token is None or scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token)

    def may_see(self, environ: Mapping[str, Any]) -> bool:
        """Return whether a request may be told the names of consumers and brokers."""
        return self._address.is_private or self.knows(environ)

    def _needs_token(self, method: str, path: str) -> bool:
        if self._address.is_unix:
            return False  # its file's mode has said who may
        if self._address.is_private:
            return method not in ("GET", "HEAD")
        return path not in OPEN or method not in ("GET", "HEAD")

    @property
    def _remedy(self) -> str:
        if self._token is None:
            return "to steer needs a token (--admin-token), or a Unix socket (--admin unix:/PATH)"
        return "show the admin token: Authorization: Bearer TOKEN"

    def _is_foreign_host(self, host: str) -> bool:
        # Elsewhere the token says enough: whoever rebinds a name has none.
        if self._address.is_unix or not self._address.is_private:
            return False
        name, port = _split(host)
        own = name == self._address.host.lower() or is_loopback(name)
        return not (own and port == str(self._address.port))

    @staticmethod
    def _is_foreign_page(environ: Mapping[str, Any]) -> bool:
        if environ.get("HTTP_SEC_FETCH_SITE", "none") not in ("none", "same-origin"):
            return True
        origin = environ.get("HTTP_ORIGIN")
        if origin is None:
            return False
        host = environ.get("HTTP_HOST", "").lower()
        return not host or origin.lower() not in (f"http://{host}", f"https://{host}")


def _split(host: str) -> tuple[str, str]:
    """Return the name and port of a `Host` header; a port that is not said is 80."""
    host = host.strip().lower()
    if host.startswith("["):
        name, _, rest = host[1:].partition("]")
        return name, rest.removeprefix(":") or "80"
    name, _, port = host.partition(":")
    return name, port or "80"
