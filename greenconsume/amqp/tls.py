"""Owns TLS to an AMQP broker: whose certificate is taken, and what is said where it is another's.

py-amqp by itself verifies who signed a certificate, and not for whom: any trusted certificate will do. Here
its name has to be the broker's. Called by `transport` for the options and by `link` for the socket.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import closing
from typing import Any

from amqp.transport import SSLTransport

#: What OpenSSL calls a certificate for another name, or for another address.
_MISMATCHES = (62, 64)


def verified(options: object, host: str) -> Any:
    """Return kombu's ``ssl`` option with the name that the certificate has to have.

    Args:
        options: ``True``, or a dict as py-amqp's. ``check_hostname=False`` in it takes any name;
            ``server_hostname`` is expected instead of `host`.
        host: The broker's name in its URL.
    """
    if not options:
        return options
    options = dict(options) if isinstance(options, dict) else {}
    if not options.get("server_hostname"):
        options["server_hostname"] = host
    return options


class TLSTransport(SSLTransport):  # type: ignore[misc]  # amqp is untyped
    """py-amqp's socket with TLS, which verifies the broker's name."""

    def _setup_transport(self) -> None:
        # Before: the broker may hang up on who refuses it. A name may lead elsewhere the next time.
        address = self.sock.getpeername()[:2]
        try:
            super()._setup_transport()
        except ssl.SSLCertVerificationError as exc:
            if exc.verify_code not in _MISMATCHES:
                raise
            raise ssl.SSLCertVerificationError(exc.errno, self._told(exc, address)) from exc

    def _wrap_socket(
        self,
        sock: socket.socket,
        context: dict[str, Any] | None = None,
        check_hostname: bool | None = None,
        **options: object,
    ) -> Any:
        """Wrap a socket, without a handshake; as py-amqp's, but for the name."""
        if context is not None:
            check = {"check_hostname": True if check_hostname is None else check_hostname}
            return self._wrap_context(sock, options, **(check | context))
        unverified = options.get("cert_reqs") == ssl.CERT_NONE
        if check_hostname is not False and not unverified:
            return self._wrap_socket_sni(sock, **options)
        # py-amqp verifies a name wherever it is given one; here the broker is told it all the same.
        name = options.pop("server_hostname", None)
        wrapped = self._wrap_socket_sni(sock, **options)
        bare = socket.socket(fileno=wrapped.detach())
        return wrapped.context.wrap_socket(
            bare, server_hostname=name, do_handshake_on_connect=False
        )

    def _told(self, error: ssl.SSLCertVerificationError, address: tuple[Any, ...]) -> str:
        expected = self.sslopts.get("server_hostname")
        names = self._certified_names(address)
        has = f"is for {', '.join(names)}" if names else "has other names"
        return (
            f"{error.verify_message}: the certificate of the broker at {self.host}:{self.port} {has}, and "
            f"{expected} was expected. Connect to it by a name that it has, name that as "
            "ssl={'server_hostname': …}, or take any name by ssl={'check_hostname': False}"
        )

    def _certified_names(self, address: tuple[Any, ...]) -> list[str]:
        """Look at the certificate once more: a handshake that failed does not show it."""
        try:
            with socket.create_connection(address, self.connect_timeout) as sock:
                options = {**self.sslopts, "check_hostname": False}
                with closing(self._wrap_socket(sock, **options)) as wrapped:
                    wrapped.settimeout(self.connect_timeout)
                    wrapped.do_handshake()
                    certificate = wrapped.getpeercert() or {}
        except (OSError, ValueError):
            return []
        return [name for _, name in certificate.get("subjectAltName", ())]
