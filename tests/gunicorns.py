"""Owns gunicorn as tests run it: a real arbiter and its workers, what they log, answer and do with messages.

The application is `tests.webapp`, whose journal tells what its handlers did.
"""

from __future__ import annotations

import http.client
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import psutil

from tests.brokers import RabbitMQ
from tests.servers import HOST, free_port, launch
from tests.waiting import wait_until

#: The script, for USR2 runs it again.
GUNICORN = Path(sys.executable).with_name("gunicorn")

CONF = """\
from greenconsume.gunicorn import consumers

bind = "{host}:{port}"
worker_class = "gevent"
control_socket_disable = True
graceful_timeout = 10
post_worker_init = consumers("tests.webapp:runtime")
"""


@dataclass(frozen=True)
class Entry:
    """A line of the journal."""

    at: float
    pid: int
    kind: str
    body: str
    more: str


class Gunicorn:
    """A gunicorn server of its own session.

    Args:
        folder: For its configuration, log and journal.
        conf: What follows the usual configuration, as lines of Python; later assignments win.
        app: The application; None: what `conf` says.
        command: What to run instead of gunicorn.
        cwd: In which folder.
        **env: What `tests.webapp` is told.
    """

    def __init__(
        self,
        folder: Path,
        conf: str = "",
        app: str | None = "tests.webapp:app",
        command: list[str] | None = None,
        cwd: Path | None = None,
        **env: object,
    ) -> None:
        self.port = free_port()
        self._log, self._journal = folder / "log", folder / "journal"
        self._journal.touch()
        (folder / "gunicorn.conf.py").write_text(CONF.format(host=HOST, port=self.port) + conf)
        root = Path(__file__).parents[1]
        mine = {
            "JOURNAL": self._journal,
            "PYTHONPATH": os.pathsep.join([*sys.path, str(root)]),
            **env,
        }
        # A child of the test run takes none of its own options from it.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("GREENCONSUME_")}
        self.process = launch(
            *(command or [GUNICORN, "-c", folder / "gunicorn.conf.py", *filter(None, [app])]),
            log=self._log,
            cwd=cwd,
            env={**inherited, **{name: str(value) for name, value in mine.items()}},
        )

    # -- what it is ------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """The text that arbiter and workers have printed."""
        return self._log.read_text(errors="replace")

    @property
    def journal(self) -> list[Entry]:
        """The notes of the handlers."""
        found = []
        for line in (
            self._journal.read_text().rpartition("\n")[0].splitlines()
        ):  # the last may be half written
            at, pid, kind, body, *more = line.split(" ", 4)
            found.append(Entry(float(at), int(pid), kind, body, more[0] if more else ""))
        return found

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers, the oldest first."""
        try:
            children = psutil.Process(self.process.pid).children()
            alive = [each for each in children if each.status() != psutil.STATUS_ZOMBIE]
            return [each.pid for each in sorted(alive, key=psutil.Process.create_time)]
        except psutil.NoSuchProcess:
            return []

    def count(self, kind: str) -> int:
        """Return how many lines of a kind the journal has."""
        return sum(entry.kind == kind for entry in self.journal)

    # -- what is done with it ----------------------------------------------------------------------------

    def wait_consuming(self, count: int = 1, within: float = 60.0) -> None:
        """Wait until so many consumers have begun to consume, ever."""
        wait_until(lambda: self.count("consuming") >= count, within, f"{count} consume")

    def wait_serving(self, within: float = 60.0) -> None:
        """Wait until HTTP is answered."""
        wait_until(lambda: self.get("/", 5.0) is not None, within, "HTTP is answered")

    def wait_log(self, text: str, within: float = 30.0) -> None:
        """Wait until the log has a text."""
        wait_until(lambda: text in self.log, within, f"{text!r} is logged")

    def get(self, path: str = "/", timeout: float = 30.0) -> tuple[int, str] | None:
        """Return the status and body of a GET over a connection of its own; None: it failed."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def signal(self, sig: int, pid: int | None = None) -> None:
        """Signal the arbiter, or one of its workers."""
        os.kill(pid or self.process.pid, sig)

    def signal_group(self, sig: int) -> None:
        """Signal all of its processes at once, as Ctrl-C at a terminal does."""
        os.killpg(self.process.pid, sig)

    def wait_end(self, within: float = 60.0) -> float:
        """Wait until arbiter and workers have ended; return the seconds that it took."""
        began = monotonic()
        workers = self.workers
        self.process.wait(within)
        wait_until(lambda: not any(map(psutil.pid_exists, workers)), within, "the workers end")
        return monotonic() - began

    def close(self) -> None:
        """Kill whatever is left of it, and print what it logged, for a test that failed."""
        self.close_quietly()
        print(self.log)

    def close_quietly(self) -> None:
        """Kill whatever is left of it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


@dataclass(frozen=True)
class Tally:
    """The fate of messages, by a journal."""

    begun: int
    finished: int
    cancelled: int
    cut: list[str]  # a handler began, and neither finished nor was cancelled
    doubled: list[str]  # more than one handler finished

    @classmethod
    def of(cls, journal: list[Entry]) -> Tally:
        """Count a journal."""
        by = {kind: Counter((e.pid, e.body) for e in journal if e.kind == kind) for kind in KINDS}
        finished = Counter(entry.body for entry in journal if entry.kind == "finished")
        return cls(
            begun=by["begun"].total(),
            finished=by["finished"].total(),
            cancelled=by["ended"].total(),
            cut=[body for _, body in (by["begun"] - by["finished"] - by["ended"]).elements()],
            doubled=[body for body, count in finished.items() if count > 1],
        )


KINDS = ("begun", "finished", "ended")


def settled(
    rabbitmq: RabbitMQ, amqp_url: str, queue_name: str, server: Gunicorn, published: int
) -> Tally:
    """Check that nothing was cut, lost or doubled, and that what is not finished is back in its queue."""
    tally = Tally.of(server.journal)
    assert (tally.cut, tally.doubled) == ([], []), server.log
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name).unacked == 0)
    left = rabbitmq.queue_counts(amqp_url, queue_name).ready
    assert left + tally.finished == published, server.log
    return tally


class Load:
    """HTTP clients that ask on and on, a connection for each request, and count.

    Attributes:
        answered: How many requests were answered with 200.
        failed: What became of the others.
        slowest: The longest answer took so many seconds.
    """

    def __init__(self, server: Gunicorn, clients: int = 2, pause: float = 0.1) -> None:
        self.answered = 0
        self.failed: list[Any] = []
        self.slowest = 0.0
        self._stopping = False
        self._server, self._pause = server, pause
        self._greenlets = [gevent.spawn(self._ask) for _ in range(clients)]

    def stop(self) -> None:
        """Let the requests that are under way be answered, and ask no more."""
        self._stopping = True
        gevent.joinall(self._greenlets, timeout=30, raise_error=True)

    def _ask(self) -> None:
        while not self._stopping:
            began = monotonic()
            answer = self._server.get("/", 20.0)
            if answer is not None and answer[0] == 200:
                self.answered += 1
            else:
                self.failed.append(answer)
            self.slowest = max(self.slowest, monotonic() - began)
            gevent.sleep(self._pause)
