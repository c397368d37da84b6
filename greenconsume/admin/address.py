"""Owns where the admin listens: an address's words, its meaning, and the socket that is made of it.

It must never listen on what is neither loopback nor a Unix socket without a token. Called by `server`, and by
the commands, which connect to it.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass
from ipaddress import ip_address

from greenconsume.errors import GreenconsumeError

#: In an address: a Unix socket.
UNIX = "unix:"
#: Characters that a token must have: it is guessed at by whoever reaches the port.
MIN_TOKEN = 16


class AddressError(GreenconsumeError, ValueError):
    """An admin address that cannot be used; the message says why, and what to write."""


@dataclass(frozen=True, slots=True)
class Address:
    """The place where the admin listens: a host and a port, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def is_unix(self) -> bool:
        """True for a Unix socket."""
        return bool(self.path)

    @property
    def is_private(self) -> bool:
        """True if only processes of this machine reach it."""
        return self.is_unix or is_loopback(self.host)

    def __str__(self) -> str:
        if self.is_unix:
            return UNIX + self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: object) -> Address:
    """Return the address that `text` says: `HOST:PORT`, `[::1]:PORT` or `unix:/PATH`.

    Raises:
        AddressError: It says none.
    """
    if not isinstance(text, str):
        raise AddressError(f"{text!r} is no admin address: write HOST:PORT, or unix:/run/shop.sock")
    if text.startswith(UNIX):
        path = text.removeprefix(UNIX)
        if not os.path.isabs(path):
            raise AddressError(f"{text!r} is no admin address: write unix:/run/shop.sock")
        return Address(path=os.path.normpath(path))
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise AddressError(
            f"{text!r} is no admin address: write HOST:PORT, such as 127.0.0.1:9191, or unix:/run/shop.sock"
        )
    return Address(host=host, port=int(port))


def check(address: Address, token: str | None) -> None:
    """Refuse what would let strangers in.

    Raises:
        AddressError: Others than this machine reach it and there is no token, or the token is short.
    """
    if token is not None and len(token) < MIN_TOKEN:
        raise AddressError(f"an admin token must have {MIN_TOKEN} characters or more")
    if token is None and not address.is_private:
        raise AddressError(
            f"the admin address {address} is reached from other machines: set an admin token "
            "(--admin-token, GREENCONSUME_ADMIN_TOKEN), or listen on 127.0.0.1 or a Unix socket"
        )


def is_loopback(host: str) -> bool:
    """Return whether a host, by its name or number, is this machine and nothing else."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listen(address: Address) -> socket.socket:
    """Return a socket that listens on `address`; of a Unix socket the file is its owner's alone.

    Raises:
        AddressError: It cannot be had: somebody listens there, or it may not be used.
    """
    try:
        return _listen_unix(address.path) if address.is_unix else _listen_tcp(address)
    except OSError as exc:
        raise AddressError(f"cannot listen on {address}: {exc.strerror or exc}") from exc


def _listen_tcp(address: Address) -> socket.socket:
    family, kind, _, _, where = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(128)
    except BaseException:  # a kill too: the socket is nobody's then
        listener.close()
        raise
    return listener


def _listen_unix(path: str) -> socket.socket:
    _remove_abandoned(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        # Before it has a name: Linux gives the file this mode, so that nobody slips in.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(128)
    except BaseException:  # a kill too: the socket is nobody's then
        listener.close()
        raise
    return listener


def _remove_abandoned(path: str) -> None:
    """Remove the socket of a process that is gone; what somebody listens on, or is no socket, stays."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "there is a file of that name")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise OSError(errno.EADDRINUSE, "another process listens there")
