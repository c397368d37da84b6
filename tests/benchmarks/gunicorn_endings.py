"""Measures every ending of gunicorn's workers under load, on a broker of its own.

    python tests/patched.py tests.benchmarks.gunicorn_endings [--plain] [ENDING ...]

Two workers with 20 consumers of concurrency 10 each, handlers of 0.2 to 3 s, 60 messages and 6 HTTP requests
a second, graceful_timeout 10. A row says what was begun and neither finished nor cancelled (cut), finished
twice (doubled), lost, cancelled, how long the exit took, and how HTTP fared. With `--plain` the runtime is
only started in post_worker_init, for comparison.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import psutil

from tests.brokers import RabbitMQ, fresh_vhost
from tests.gunicorns import Gunicorn, Load, Tally
from tests.messages import declare, publish
from tests.waiting import wait_until

PLAIN = """
def post_worker_init(worker):
    import gevent, greenconsume
    greenconsume.patch_all()
    from tests.webapp import runtime
    gevent.spawn(runtime.start)
"""
QUEUE = "load"


def feed(url: str, bodies: list[int], per_second: int) -> None:
    while True:
        batch = list(range(len(bodies), len(bodies) + per_second // 2))
        publish(url, QUEUE, batch)
        bodies += batch
        gevent.sleep(0.5)


def to_arbiter(sig: int) -> Callable[[Gunicorn], None]:
    return lambda server: server.signal(sig)


def term_then_quit(server: Gunicorn) -> None:
    server.signal(signal.SIGTERM)
    gevent.sleep(0.5)
    server.signal(signal.SIGQUIT)


def to_worker(sig: int) -> Callable[[Gunicorn], None]:
    return lambda server: server.signal(sig, server.workers[0])


def usr2(server: Gunicorn) -> None:
    server.signal(signal.SIGUSR2)
    server.wait_consuming(80)
    server.signal(signal.SIGTERM)


#: By name: what is done, what is configured, what the handlers take, whether the server ends.
ENDINGS: dict[str, tuple[Callable[[Gunicorn], None], str, str, bool]] = {
    "TERM": (to_arbiter(signal.SIGTERM), "", "0.2,3", True),
    "QUIT": (to_arbiter(signal.SIGQUIT), "", "0.2,3", True),
    "INT": (to_arbiter(signal.SIGINT), "", "0.2,3", True),
    "Ctrl-C to the group": (lambda s: s.signal_group(signal.SIGINT), "", "0.2,3", True),
    "TERM then QUIT": (term_then_quit, "", "0.2,3", True),
    "HUP": (to_arbiter(signal.SIGHUP), "", "0.2,3", False),
    "TTOU": (to_arbiter(signal.SIGTTOU), "", "0.2,3", False),
    "ABRT to a worker": (to_worker(signal.SIGABRT), "", "0.2,3", False),
    "USR2, then TERM": (usr2, "", "0.2,3", False),
    "arbiter killed": (lambda s: s.process.kill(), "", "0.2,3", True),
    "max_requests, one worker": (
        lambda s: None,
        "workers = 1\nmax_requests = 60\n",
        "0.2,3",
        False,
    ),
    "grace 3, handlers of 4 to 6 s": (
        to_arbiter(signal.SIGTERM),
        "graceful_timeout = 3\n",
        "4,6",
        True,
    ),
    "timeout 3, worker TERM": (to_worker(signal.SIGTERM), "timeout = 3\n", "4,6", False),
}


class Trial:
    """One ending of one server."""

    def __init__(self, url: str, server: Gunicorn) -> None:
        self._url, self._server = url, server
        self.bodies: list[int] = []
        self.exit_seconds = 0.0
        self._feeder = gevent.spawn(feed, url, self.bodies, 60)
        self.load = Load(server, clients=6, pause=0.9)

    def end(self, act: Callable[[Gunicorn], None], ends: bool) -> None:
        """Have it end under load, and wait until the workers that there were are gone."""
        gevent.sleep(6)
        workers = self._server.workers
        if ends:
            self.load.stop()
        began = monotonic()
        act(self._server)
        gone = workers if ends else workers[:1]
        wait_until(lambda: not any(map(psutil.pid_exists, gone)), 60)
        self.exit_seconds = monotonic() - began
        if not ends:
            gevent.sleep(4)
            self.load.stop()
        self._feeder.kill()
        if not ends:
            wait_until(lambda: len(self.finished()) >= len(self.bodies), 60)
        gevent.sleep(1)

    def finished(self) -> set[str]:
        """Return what was finished."""
        return {entry.body for entry in self._server.journal if entry.kind == "finished"}


def measure(broker: RabbitMQ, name: str, plain: bool) -> str:
    act, conf, work, ends = ENDINGS[name]
    with fresh_vhost(broker) as vhost, tempfile.TemporaryDirectory() as folder:
        url = broker.url(vhost)
        declare(url, QUEUE)
        env: dict[str, Any] = {"BROKER": url, "QUEUE": QUEUE, "CONSUMERS": 20, "WORK": work}
        server = Gunicorn(Path(folder), "workers = 2\n" + conf + (PLAIN if plain else ""), **env)
        try:
            server.wait_consuming(20 if "workers = 1" in conf else 40)
            trial = Trial(url, server)
            trial.end(act, ends)
            lost = len(trial.bodies) - len(trial.finished()) - broker.queue_counts(url, QUEUE).ready
            return row(name, trial, Tally.of(server.journal), lost)
        finally:
            server.close_quietly()


def row(name: str, trial: Trial, tally: Tally, lost: int) -> str:
    load = trial.load
    known = set(map(str, trial.bodies))  # the feeder was ended amid others
    cut = [body for body in tally.cut if body in known]
    numbers = (len(cut), len(tally.doubled), max(0, lost), tally.cancelled)
    cells = [name, len(trial.bodies), *numbers, f"{trial.exit_seconds:.1f} s"]
    cells += [load.answered, len(load.failed), f"{load.slowest:.1f} s"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    plain = "--plain" in sys.argv
    named = [name for name in sys.argv[1:] if name in ENDINGS]
    chosen = named or list(ENDINGS)
    with tempfile.TemporaryDirectory() as folder, closing(RabbitMQ(Path(folder))) as broker:
        broker.start()
        print(
            "| ending | messages | cut | doubled | lost | cancelled | exit | GETs | failed | slowest |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for name in chosen:
            try:
                print(measure(broker, name, plain), flush=True)
            except AssertionError as exc:
                print(f"| {name} | {exc} |", flush=True)


if __name__ == "__main__":
    os.environ.pop("GREENCONSUME_BROKER", None)
    main()
