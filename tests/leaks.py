"""Owns the proof that a test leaves no greenlet, socket or thread behind."""

from __future__ import annotations

import os
import socket
from weakref import WeakSet

import gevent
from gevent import Greenlet

from tests.waiting import wait_until

SETTLE_SECONDS = 2.0

# Where there is no /proc, greenlets alone are watched.
FDS, THREADS = "/proc/self/fd", "/proc/self/task"
HAS_PROC = os.path.isdir(FDS)


class LeakWatch:
    """A look at what there is when a test begins, and at what has come since and is still there.

    Greenlets are those that gevent started (`gevent.Greenlet`, and threads, which are greenlets
    once patched); a bare `greenlet.greenlet` is not seen. Threads of gevent's own pool, which
    resolves host names, are nobody's leak. Costs a tenth of a millisecond for each test.
    """

    def __init__(self) -> None:
        self._greenlets: WeakSet[Greenlet] = WeakSet()
        self._sockets = _sockets()
        self._thread_count = _thread_count()
        # gevent's own hook: no walk over all objects, which takes 20 ms.
        Greenlet.add_spawn_callback(self._greenlets.add)

    def verify(self, within: float = SETTLE_SECONDS) -> None:
        """Wait until nothing is left over.

        Raises:
            AssertionError: Something is, after `within` seconds; what it is. Greenlets that were
                left over have been killed, so that they do not disturb the tests to come.

        Switches: yes.
        """
        Greenlet.remove_spawn_callback(self._greenlets.add)
        try:
            wait_until(lambda: not self._left_over(), within)
        except AssertionError:
            left_over = self._left_over()
            gevent.killall(self._alive(), timeout=1.0)
            if left_over:
                raise AssertionError("outlived the test: " + "; ".join(left_over)) from None

    def close(self) -> None:
        """Stop watching without a verdict."""
        Greenlet.remove_spawn_callback(self._greenlets.add)

    def _left_over(self) -> list[str]:
        found = [f"greenlet {greenlet!r}" for greenlet in self._alive()]
        found += [
            _describe(fd, name) for name, fd in _sockets().items() if name not in self._sockets
        ]
        threads = _thread_count() - self._thread_count
        if threads > 0:
            found.append(f"{threads} native threads")
        return found

    def _alive(self) -> list[Greenlet]:
        return [greenlet for greenlet in self._greenlets if not greenlet.ready()]


def _sockets() -> dict[str, int]:
    found = {}
    for fd in os.listdir(FDS) if HAS_PROC else ():
        try:
            name = os.readlink(f"{FDS}/{fd}")
        except OSError:  # the descriptor of the listing itself
            continue
        if name.startswith("socket:"):
            found[name] = int(fd)
    return found


def _thread_count() -> int:
    if not HAS_PROC:
        return 0
    pooled: int = gevent.get_hub().threadpool.size
    return len(os.listdir(THREADS)) - pooled


def _describe(fd: int, name: str) -> str:
    try:
        with socket.socket(fileno=os.dup(fd)) as twin:
            return f"{name} {twin.getsockname()} -> {twin.getpeername()}"
    except OSError:
        return f"{name} (not connected)"
