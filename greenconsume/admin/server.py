"""Owns the admin's server: its socket, how many connections it holds, and for how long.

It runs in the process's own hub, so its cost is bounded: each connection has a deadline that nothing extends,
and serves one request; where there are too many, the oldest goes. It must never raise into the process
that it shows. Called by whoever runs consumers.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import gevent
from gevent.pywsgi import WSGIHandler, WSGIServer

from greenconsume.admin import address as addresses
from greenconsume.admin import run_folder
from greenconsume.admin.app import App
from greenconsume.admin.gate import Gate
from greenconsume.admin.status import Process
from greenconsume.events import AdminListening, emit

#: Seconds that a connection has, from its acceptance to the end of its answer.
CONNECTION_SECONDS = 5.0
#: The address that means: a Unix socket in the run folder.
IN_FOLDER = "run"
#: Connections that are held at once; a further one takes the place of the oldest.
MAX_CONNECTIONS = 64

_logger = logging.getLogger("greenconsume.admin")


class Server:
    """Serves the admin of one process, from `start` to `stop`.

    Args:
        process: What is shown.
        where: As `address.parse` takes it, or `run`: a Unix socket in the run folder.
        token: What strangers must show; see `gate`.
        stall_after: Seconds after which a handler counts as stalled; None: never.

    Raises:
        AddressError: `where` says no address, or one that needs a token.
    """

    def __init__(
        self,
        process: Process,
        where: str,
        token: str | None = None,
        stall_after: float | None = None,
    ) -> None:
        self._in_folder = where == IN_FOLDER
        self.address = addresses.Address() if self._in_folder else addresses.parse(where)
        if not self._in_folder:
            addresses.check(self.address, token)
        self._process, self._token, self._stall_after = process, token, stall_after
        self._server: _Server | None = None
        self._place: run_folder.Place | None = None
        self._pid = 0

    def start(self) -> None:
        """Listen, and answer from now on.

        Raises:
            AddressError: The address cannot be had.

        Switches: only where a host name is looked up.
        """
        self._place = self._find_place()
        try:
            listener = addresses.listen(self.address)
        except BaseException:  # a kill too must not leave its place taken
            self._leave()
            raise
        if not self.address.is_unix:  # port 0 is any that is free
            self.address = addresses.Address(self.address.host, listener.getsockname()[1])
        app = App(self._process, Gate(self.address, self._token), self._stall_after)
        self._server = _Server(listener, app)
        self._server.start()
        self._pid = os.getpid()
        self._announce()
        if not self._in_folder:  # where it is found without being told
            emit(AdminListening(str(self.address)))

    def _find_place(self) -> run_folder.Place | None:
        try:
            place = run_folder.Place()
        except OSError as exc:
            if self._in_folder:
                raise addresses.AddressError(
                    f"the run folder cannot be used: {exc}; set {run_folder.VARIABLE}"
                ) from exc
            _logger.debug("not announced in the run folder: %s", exc)
            return None
        if self._in_folder:
            self.address = addresses.Address(path=place.socket)
        return place

    def _leave(self) -> None:
        if self._place is not None:
            self._place.leave()

    def _announce(self) -> None:
        if self._place is None:
            return
        try:
            self._place.announce(str(self.address), self._process.status().name)
        except OSError as exc:  # it is served all the same, to who knows the address
            _logger.debug("not announced in the run folder: %s", exc)

    def stop(self) -> None:
        """Listen no more, and drop what is open. Idempotent. Never switches."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        server.drop_all()
        self._leave()
        if self.address.is_unix and os.getpid() == self._pid:  # a fork's is its parent's
            try:
                os.unlink(self.address.path)
            except OSError:
                pass  # somebody was faster


class _Server(WSGIServer):  # type: ignore[misc]  # gevent is untyped
    """gevent's, with a bound on the connections and one on the time of each."""

    def __init__(self, listener: socket.socket, app: Callable[..., Any]) -> None:
        # The name is said, as pywsgi would ask the resolver for it.
        environ = {"SERVER_NAME": "greenconsume", "SERVER_PORT": "0"}
        super().__init__(
            listener, app, log=None, error_log=_logger, handler_class=_Handler, environ=environ
        )
        self._open: dict[Any, None] = {}

    def handle(self, sock: socket.socket, address: object) -> None:
        """Serve one connection, within its deadline. Runs in a greenlet of its own."""
        gevent.getcurrent().name = "greenconsume admin"
        if len(self._open) >= MAX_CONNECTIONS:
            _drop(next(iter(self._open)))
        self._open[sock] = None
        timer = gevent.get_hub().loop.timer(CONNECTION_SECONDS)
        timer.start(_drop, sock)  # its reads and writes then end by themselves: nobody is killed
        try:
            super().handle(sock, address)
        finally:
            timer.stop()
            timer.close()
            self._open.pop(sock, None)

    def drop_all(self) -> None:
        """End all connections. Never switches."""
        for sock in list(self._open):
            _drop(sock)


class _Handler(WSGIHandler):  # type: ignore[misc]  # gevent is untyped
    """Serves one request of a connection."""

    def read_request(self, raw_requestline: str) -> bool:
        """Read the request's head; the connection ends with its answer."""
        found = bool(super().read_request(raw_requestline))
        self.close_connection = True
        return found

    def handle_error(self, t: Any, v: Any, tb: Any) -> None:
        """Answer 500, and log a defect; a connection that ended early is none."""
        if not isinstance(v, OSError):
            _logger.error("the admin failed on a request", exc_info=(t, v, tb))
        self._send_error_response_if_possible(500)

    def log_request(self) -> None:
        """Write no line for each request, nor make one."""

    def log_error(self, msg: str, *args: object) -> None:
        """Log what a client did wrong at DEBUG: it is not this process's trouble."""
        _logger.debug(msg, *args)


def _drop(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is gone already
