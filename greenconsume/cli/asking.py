"""Owns how a command finds running processes and asks their admin: one request over a plain socket.

Standard library only, and little of it: `greenconsume check` has 50 ms for all it does. It must never import
what the process runs. Called by `check`, `control` and `top`.
"""

from __future__ import annotations

import socket

from greenconsume.admin.run_folder import Announced, announced

#: Seconds that a process has to answer.
TIMEOUT = 5.0
#: Bytes that an answer may have.
_MAX_ANSWER = 64 << 20
_UNIX = "unix:"


class NoAnswerError(Exception):
    """A process did not answer, or not as an admin does; the message says why."""


class Reply:
    """The answer of a process: an HTTP status, and its body."""

    __slots__ = ("body", "code")

    def __init__(self, code: int, body: bytes) -> None:
        self.code, self.body = code, body

    @property
    def text(self) -> str:
        """The answer as text."""
        return self.body.decode("utf-8", "replace").strip()


def processes(address: str | None, pid: int | None = None) -> list[Announced]:
    """Return the process at an address, or those that the run folder names.

    Args:
        address: As `--admin` has it; None and `run` mean the run folder.
        pid: Of these, only the process of this number.
    """
    if address not in (None, "", "run"):
        return [Announced(0, str(address), str(address))]
    return [each for each in announced() if pid in (None, each.pid)]


def ask(
    address: str,
    path: str,
    command: dict[str, object] | None = None,
    token: str | None = None,
    timeout: float = TIMEOUT,
) -> Reply:
    """Ask an admin, by GET, or with a command by POST.

    Raises:
        NoAnswerError: Nobody answers there.

    Switches: yes, where the process is patched.
    """
    body = b"" if command is None else _encode(command)
    lines = [f"{'GET' if command is None else 'POST'} {path} HTTP/1.0"]
    lines += [f"Host: {'localhost' if address.startswith(_UNIX) else address}"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
    try:
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    except UnicodeEncodeError as exc:
        raise NoAnswerError("a token or path has characters that no request can") from exc
    return _parse(_exchange(address, head + body, timeout))


def _encode(command: dict[str, object]) -> bytes:
    import json  # not above: a probe has no command, and its import takes a tenth of its time

    return json.dumps(command).encode()


def _exchange(address: str, request: bytes, timeout: float) -> bytes:
    try:
        with _connect(address, timeout) as sock:
            sock.sendall(request)
            parts, size = [], 0
            while data := sock.recv(1 << 16):
                parts.append(data)
                size += len(data)
                if size > _MAX_ANSWER:
                    raise NoAnswerError(f"{address} answers without an end")
            return b"".join(parts)
    except TimeoutError as exc:
        raise NoAnswerError(f"{address} does not answer within {timeout:g} s") from exc
    except (OSError, ValueError) as exc:
        raise NoAnswerError(f"{address} does not answer: {exc}") from exc


def _connect(address: str, timeout: float) -> socket.socket:
    if address.startswith(_UNIX):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout)
            sock.connect(address.removeprefix(_UNIX))
        except BaseException:  # Ctrl-C too: the socket is nobody's then
            sock.close()
            raise
        return sock
    host, _, port = address.rpartition(":")
    where = (host.removeprefix("[").removesuffix("]"), int(port))
    return socket.create_connection(where, timeout)


def _parse(answer: bytes) -> Reply:
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise NoAnswerError("what answers there is no greenconsume admin")
    return Reply(int(words[1]), body)
