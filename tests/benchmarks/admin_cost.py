"""Measures what it costs to look at a process, and to count what it does.

    python tests/patched.py tests.benchmarks.admin_cost [ROUNDS]

A process of 1,000 consumers over memory://, of which 500 have a handler that runs, is asked for
`/status.json` and `/metrics` afresh, by `greenconsume check` and, ten times a second, by what asks as the
page does. Medians, minima and maxima; CPU is that of the process that is asked. What it costs to count each
message stands among the rows of `tests.benchmarks`, as "metrics on".
"""

# the worker imports nothing of the tests

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from time import monotonic, process_time
from typing import Any

CONSUMERS, BUSY = 1000, 500
#: Seconds that the page is polled for, and how often a second.
POLLED, OFTEN = 8.0, 10


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(sys.argv[2])), flush=True)
        return
    rounds = int(sys.argv[1]) if sys.argv[1:] else 3
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--worker", folder]
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            for name, value in json.loads(ran.stdout.splitlines()[-1]).items():
                found.setdefault(name, []).append(value)
    print(f"{rounds} rounds, load {os.getloadavg()[0]:.1f}\n\n|  |  |\n| --- | ---: |")
    for name, values in found.items():
        print(f"| {name} | {median(values):.3g} ({min(values):.3g} to {max(values):.3g}) |")


def work(folder: str) -> dict[str, float]:
    """Measure once, in a process of its own."""
    import greenconsume

    greenconsume.patch_all()
    path = str(Path(folder) / "admin.sock")
    with _busy(path) as runtime:
        return {**_answers(runtime), **_check(path), **_polling(path)}


# -- answers ------------------------------------------------------------------------------------------


@contextmanager
def _busy(path: str) -> Iterator[Any]:
    import gevent
    from gevent.event import Event
    from kombu import Connection, Queue

    from greenconsume import ConsumerMixin, ConsumerOptions, Runtime

    let, numbers = Event(), count()

    class Orders(ConsumerMixin):  # type: ignore[misc]
        options = ConsumerOptions(concurrency=10)

        def __init__(self, connection: Any) -> None:
            self.connection, self.number = connection, next(numbers)

        def get_consumers(self, Consumer: Any, channel: Any) -> Any:
            return [Consumer([Queue(f"orders-{self.number}")], callbacks=[self.on_order])]

        def on_order(self, _body: Any, message: Any) -> None:
            if self.number < BUSY:
                let.wait()
            message.ack()

    runtime = Runtime("memory://", admin=f"unix:{path}")
    runtime.spawn(Orders, CONSUMERS)
    with runtime:
        runtime.control.watch()
        status = runtime.control.status
        with Connection("memory://") as connection:
            producer = connection.Producer()
            for number in range(CONSUMERS):
                for _ in range(3):
                    producer.publish({}, routing_key=f"orders-{number}")
        try:
            with gevent.Timeout(60.0):  # it is busy itself, as long as they start
                while sum(bool(each.in_progress) for each in status().consumers) < BUSY:
                    gevent.sleep(0.1)
            yield runtime
        finally:
            let.set()


def _answers(runtime: Any) -> dict[str, float]:
    """Return the CPU milliseconds of the answers, where nothing is at hand."""
    from greenconsume.admin.address import Address
    from greenconsume.admin.app import App
    from greenconsume.admin.gate import Gate

    def ask(path: str) -> None:
        app = App(runtime.control, Gate(Address(path="x"), None), 300.0)
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "HTTP_HOST": "localhost"}
        assert b"".join(app(environ, lambda *_: None))

    return {
        f"{path}, ms of CPU": _best(lambda path=path: ask(path))  # type: ignore[misc]
        for path in ("/status.json", "/metrics")
    }


def _best(call: Callable[[], object]) -> float:
    found = []
    for _ in range(15):
        began = process_time()
        call()
        found.append((process_time() - began) * 1000)
    return median(found)


def _check(path: str) -> dict[str, float]:
    """Return the CPU milliseconds of `greenconsume check`, its process's start among them."""
    import gevent.subprocess

    command = [sys.executable, "-m", "greenconsume", "check", "live", "--admin", f"unix:{path}"]
    bare = [sys.executable, "-c", "pass"]
    # Compiled, as it is where it was installed.
    compiled = {
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(Path(path).parent / "pyc"),
    }
    environment = {**os.environ, **compiled}
    gevent.subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, list[float]] = {"check": [], "python -c pass": []}
    for _ in range(9):
        for name, each in (("check", command), ("python -c pass", bare)):
            before = _spent_by_children()
            gevent.subprocess.run(each, env=environment, check=True, stdout=subprocess.DEVNULL)
            found[name].append((_spent_by_children() - before) * 1000)
    return {f"{name}, ms of CPU": median(values) for name, values in found.items()}


def _spent_by_children() -> float:
    used = getrusage(RUSAGE_CHILDREN)  # `os.times` counts hundredths
    return used.ru_utime + used.ru_stime


#: Asks as a browser does: it says what it has. In a process of its own, so that its CPU is not counted.
_CLIENT = """
import socket, sys, time
path, seconds, often = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
until, tag, answers, bodies = time.monotonic() + seconds, "", 0, 0
while time.monotonic() < until:
    began = time.monotonic()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        have = f"If-None-Match: {tag}\\r\\n" if tag else ""
        sock.sendall(f"GET /status.json HTTP/1.1\\r\\nHost: localhost\\r\\n{have}\\r\\n".encode())
        received = b"".join(iter(lambda: sock.recv(1 << 20), b""))
    head, _, body = received.partition(b"\\r\\n\\r\\n")
    answers, bodies = answers + 1, bodies + bool(body)
    for line in head.decode().split("\\r\\n"):
        if line.lower().startswith("etag:"):
            tag = line.partition(":")[2].strip()
    time.sleep(max(0.0, 1 / often - (time.monotonic() - began)))
print(answers, bodies)
"""


def _polling(path: str) -> dict[str, float]:
    import gevent
    import gevent.subprocess

    def cpu_while(call: Callable[[], object]) -> float:
        began, spent = monotonic(), process_time()
        call()
        return 100 * (process_time() - spent) / (monotonic() - began)

    client = [sys.executable, "-c", _CLIENT, path, str(POLLED), str(OFTEN)]
    ask = lambda: gevent.subprocess.run(client, check=True, stdout=sys.stderr)  # noqa: E731
    quiet = cpu_while(lambda: gevent.sleep(3.0))
    return {"idle, % of a core": quiet, f"polled {OFTEN} times a second, %": cpu_while(ask) - quiet}


if __name__ == "__main__":
    main()
