"""Owns `greenconsume run --processes N`: a runtime in each process, under gunicorn's arbiter without sockets.

Respawning, hang detection, rolling restarts, the pid file and sd_notify are gunicorn's. Ours is what it lacks
without HTTP: a loop of failing processes is slowed down, systemd's watchdog is answered, the exit code
tells of abandoned work. This runs as a program, unpatched; only its workers patch themselves, and import
what is the user's. Started by `greenconsume.cli.handover`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

from gunicorn import systemd
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

if TYPE_CHECKING:
    from gunicorn.config import Config
    from gunicorn.workers.base import Worker

    from greenconsume.logs import LogFormat

#: A process that fails within so many seconds of its start is not replaced at once, from the second in a
#: row on.
_YOUNG = 30.0
#: The longest time that a replacement waits, in seconds.
_MAX_DELAY = 30.0
#: Seconds between two TERMs to a process: one that has just been forked does not hear the first.
_REPEAT = 1.0


class Application(BaseApplication):  # type: ignore[misc]  # gunicorn is untyped
    """gunicorn's application of processes that serve no HTTP.

    Args:
        orders: What the command line says.
    """

    def __init__(self, orders: dict[str, Any]) -> None:
        self.orders = orders
        super().__init__()

    def load_config(self) -> None:
        """Say how gunicorn is to run: called at the start and at each HUP."""
        orders = self.orders
        settings = {
            "bind": [],
            "workers": orders["processes"],
            "worker_class": "gevent",
            "timeout": orders["hang_timeout"],
            # Less a tenth, up to a second, that the drain leaves; see `greenconsume.gunicorn.ending`.
            "graceful_timeout": math.ceil(orders["grace"] + 1.0),
            "pidfile": orders["pid_file"] or None,
            "proc_name": f"greenconsume {orders['target']}",
            "loglevel": orders["log_level"],
            "logger_class": _logger_class(orders["log_level"], orders["log_format"]),
            # One of a web gunicorn of the same user would be unlinked.
            "control_socket_disable": True,
            "post_worker_init": self._start_consumers,
        }
        for name, value in settings.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> Any:
        """Return the WSGI application, which nobody can reach."""
        return lambda _environ, _start_response: []

    def run(self) -> None:
        """Run the arbiter to its end."""
        self.reports = Reports()
        ProcessArbiter(self).run()

    def _start_consumers(self, worker: Worker) -> None:
        from greenconsume.gunicorn.worker import start_alone  # it has patched itself by now

        start_alone(worker, self.orders, self.reports.send)


class Reports:
    """The last words of the workers: a pipe that all of them write to."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)

    def send(self, report: str) -> None:
        """Say how this worker ends: "clean", "abandoned" or "failed". In a worker."""
        os.write(self._writer, f"{os.getpid()} {report}\n".encode())

    def take(self) -> dict[int, str]:
        """Return what has been said since, by process id. In the arbiter."""
        try:
            said = os.read(self._reader, 65536).decode()
        except BlockingIOError:
            return {}
        pairs = (line.split() for line in said.splitlines())
        return {int(pid): report for pid, report in pairs}


class ProcessArbiter(Arbiter):  # type: ignore[misc]  # gunicorn is untyped
    """gunicorn's arbiter, with what is missing where there is no HTTP."""

    def __init__(self, app: Application) -> None:
        super().__init__(app)
        self._reports = app.reports
        self._born: dict[int, float] = {}
        self._said: dict[int, str] = {}
        self._failures = 0
        self._hold_until = 0.0
        self._abandoned = False
        self._watchdog_due = 0.0
        self._repeat_due = math.inf

    def start(self) -> None:
        """Write the pid file, which is all that can fail here.

        Raises:
            SystemExit: It cannot be written, or is that of another arbiter; in one line.
        """
        try:
            super().start()
        except (RuntimeError, OSError) as exc:
            raise SystemExit(f"greenconsume: --pid-file cannot be used: {exc}") from None

    def spawn_worker(self) -> Any:
        """Start a process, and remember when. Returns in the arbiter alone."""
        pid = super().spawn_worker()
        self._born[pid] = monotonic()
        return pid

    def spawn_workers(self) -> None:
        """Replace what is missing, unless processes fail as soon as they start."""
        if monotonic() >= self._hold_until:
            super().spawn_workers()

    def reap_workers(self) -> None:
        """Take note of the processes that have ended. Called in every loop that the arbiter has."""
        self._answer_watchdog()
        self._repeat_term()
        before = set(self.WORKERS)
        super().reap_workers()
        ended = before - set(self.WORKERS)
        if ended:
            self._note_ends(ended)

    def wait_for_signals(self, timeout: float | None = 1.0) -> Any:
        """Answer the watchdog, then wait."""
        self._answer_watchdog()
        return super().wait_for_signals(timeout=timeout)

    def handle_usr2(self) -> None:
        """Refuse to start another arbiter: it would take over sockets, and there are none."""
        self.log.warning("USR2 is of no use here: HUP starts all processes anew")

    def stop(self, graceful: bool = True) -> None:
        """End all processes, those too that could not hear the first signal."""
        self._repeat_due = monotonic() + _REPEAT
        super().stop(graceful)

    def halt(self, reason: str | None = None, exit_status: int = 0) -> NoReturn:
        """End all processes, then this one; with 1 if work was abandoned."""
        systemd.sd_notify("STOPPING=1\nSTATUS=draining", self.log)
        try:
            super().halt(reason, exit_status)
        except SystemExit as exc:
            abandoned = self._abandoned or bool(self.WORKERS)  # what is left was killed
            raise SystemExit(exc.code or int(abandoned)) from None
        raise AssertionError("unreachable")

    def _note_ends(self, ended: set[int]) -> None:
        self._said |= self._reports.take()
        ends = {pid: self._said.pop(pid, "killed") for pid in ended}
        ages = {pid: monotonic() - self._born.pop(pid, 0.0) for pid in ended}
        self._abandoned = self._abandoned or not {"abandoned", "killed"}.isdisjoint(ends.values())
        failed = [pid for pid, end in ends.items() if end in ("failed", "killed")]
        if not failed:
            self._failures = 0
        elif min(ages[pid] for pid in failed) < _YOUNG:
            self._slow_down()

    def _slow_down(self) -> None:
        self._failures += 1
        if self._failures > 1:  # the first is replaced at once
            delay = min(_MAX_DELAY, 2.0 ** (self._failures - 2))
            self._hold_until = monotonic() + delay
            self.log.warning("processes end as soon as they start: the next in %g s", delay)

    def _repeat_term(self) -> None:
        # To one that has heard it, it is the same signal: see `greenconsume.gunicorn.ending`.
        if monotonic() >= self._repeat_due:
            self._repeat_due = monotonic() + _REPEAT
            self.kill_workers(signal.SIGTERM)

    def _answer_watchdog(self) -> None:
        interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        if interval and monotonic() >= self._watchdog_due:
            self._watchdog_due = monotonic() + interval / 3
            systemd.sd_notify("WATCHDOG=1", self.log)


def _logger_class(level: str, form: LogFormat) -> type[Logger]:
    class Log(Logger):  # type: ignore[misc]  # gunicorn is untyped
        """gunicorn's log, in the form of greenconsume's."""

        def setup(self, cfg: Config) -> None:
            from greenconsume import logs

            super().setup(cfg)
            logs.configure(level, form)
            self.error_log.handlers.clear()
            self.error_log.propagate = True

        def info(self, msg: str, *args: object, **kwargs: object) -> None:
            if not msg.startswith("Listening at"):  # nothing follows it
                super().info(msg, *args, **kwargs)

    return Log


def main() -> None:
    """Run the arbiter.

    Raises:
        SystemExit: Always. 0: all processes drained clean; 1: work was abandoned.
    """
    from greenconsume.cli.handover import VARIABLE

    # Kept out of the environment of what consumers start.
    orders = json.loads(os.environ.pop(VARIABLE))
    if "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    Application(orders).run()


if __name__ == "__main__":
    main()
