"""Runs the benchmarks against a private RabbitMQ and prints one table; see `--help`.

Each figure is measured in a process of its own, greenconsume and its peer in turn, several times over;
the table shows medians and ranges. Run it with `tox -e bench`, or `python tests/patched.py tests.benchmarks`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import metadata
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.brokers import RabbitMQ
from tests.servers import HOST

HERE = Path(__file__).resolve().parent
PATCHED = HERE.parent / "patched.py"

Figures = dict[str, float]


class Row(NamedTuple):
    """One line of the table: what is measured, who is measured, and how."""

    group: str
    who: str
    measure: Callable[[], Figures]


class Bench:
    """The broker, and how a measurement is run against it."""

    def __init__(self, broker: RabbitMQ, folder: Path, scale: float) -> None:
        self.url = broker.url("%2F")
        self.port = broker.port
        self.folder = folder
        self.scale = scale
        self._names = (f"bench{number}" for number in count())

    def worker(self, measure: str, mixin: str, **options: Any) -> Callable[[], Figures]:
        """Return what measures one of `worker`'s measures with one of the mixins."""

        def run() -> Figures:
            given = {"measure": measure, "mixin": mixin, "url": self.url, **options}
            given["queue"] = queue = next(self._names)
            if "messages" in given:
                given["messages"] = max(200, int(given["messages"] * self.scale) // 100 * 100)
            command = [sys.executable, str(PATCHED), "tests.benchmarks.worker", json.dumps(given)]
            if measure in ("consume", "pool"):
                self.feed(queue, given["messages"], queues=given.get("consumers", 1))
            if measure == "latency":
                return self._measure_latency(command, queue, given["messages"])
            return figures_of(command)

        return run

    def limit(self, prefetch: int, messages: int) -> Callable[[], Figures]:
        """Return what measures the C client, compiled here."""
        program = self.folder / "limit"
        if not program.exists():
            source = [str(HERE / "limit.c"), "-lrabbitmq"]
            subprocess.run(["cc", "-O2", "-o", str(program), *source], check=True)

        def run() -> Figures:
            queue, total = next(self._names), int(messages * self.scale)
            self.feed(queue, total)
            address = [HOST, str(self.port), "/", f"{queue}.0"]
            return figures_of([str(program), *address, str(prefetch), str(total)])

        return run

    def feed(self, queue: str, messages: int, **options: Any) -> None:
        """Fill queues and return when the broker has all of it."""
        subprocess.run(self._feeder(queue, messages, **options), check=True)

    def _feeder(self, queue: str, messages: int, **options: Any) -> list[str]:
        given = {"url": self.url, "queue": queue, "messages": messages, **options}
        return [sys.executable, str(HERE / "feeder.py"), json.dumps(given)]

    def _measure_latency(self, command: list[str], queue: str, messages: int) -> Figures:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            worker.stdout.readline()  # it consumes
            with subprocess.Popen(self._feeder(queue, messages, rate=500)):
                return dict(json.loads(worker.stdout.readline()))


def figures_of(command: list[str]) -> Figures:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def rows(bench: Bench) -> Iterator[Row]:
    """Yield the whole table's rows, peers of one group together."""
    for prefetch in (100, 1000):
        group = f"consume, ack each, prefetch {prefetch}"
        for mixin in ("greenconsume", "kombu"):
            options = {"messages": 40_000, "prefetch": prefetch}
            yield Row(group, mixin, bench.worker("consume", mixin, **options))
        if shutil.which("cc") and Path("/usr/include/amqp.h").exists():
            yield Row(group, "C librabbitmq", bench.limit(prefetch, 100_000))
    for mixin in ("greenconsume", "kombu"):
        options = {"messages": 30_000, "in_flight": 500}
        yield Row("500 handlers x 50 ms", mixin, bench.worker("pool", mixin, **options))
    for mixin in ("greenconsume", "kombu"):
        yield Row("latency at 500/s (ms)", mixin, bench.worker("latency", mixin, messages=3_000))
    for mixin in ("greenconsume", "kombu"):
        yield Row("confirmed publish", mixin, bench.worker("publish", mixin, messages=20_000))
    for mixin in ("greenconsume", "kombu"):
        yield Row("1,000 idle", mixin, bench.worker("idle", mixin, consumers=1000, seconds=5))
    for consumers, links in ((1, 1), (100, 1), (1000, 1), (1000, 10)):
        options = {"messages": 40_000, "prefetch": 100, "consumers": consumers, "links": links}
        who = f"{consumers} consumers, {links} links"
        yield Row("cost by fleet", who, bench.worker("consume", "greenconsume", **options))
    options = {"consumers": 10_000, "seconds": 10, "links": 5, "deliver": True}
    yield Row("10,000 over 5 links", "greenconsume", bench.worker("idle", "greenconsume", **options))


def versions(broker: RabbitMQ) -> dict[str, str]:
    """Name everything that has a part in the figures."""
    found = {name: metadata.version(name) for name in ("kombu", "amqp", "gevent", "greenlet")}
    found["python"] = platform.python_version()
    found["rabbitmq"] = broker.eval('rabbit_misc:version()').strip('"')
    return found


def table(measured: dict[tuple[str, str], list[Figures]]) -> Iterator[str]:
    """Yield the lines of the table: the median of each figure, with its range."""
    last = ""
    for (group, who), runs in measured.items():
        if group != last:
            yield f"\n{group}"
            last = group
        cells = []
        for name in runs[0]:
            values = [run[name] for run in runs]
            cells.append(f"{name} {median(values):,.3g} ({min(values):,.3g} to {max(values):,.3g})")
        yield f"  {who:<28} " + "   ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs of each row (default 3)")
    parser.add_argument("--only", default="", help="only groups that contain this text")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the message counts")
    parser.add_argument("--json", type=Path, help="write every run's figures to this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = RabbitMQ(folder)
        with closing(broker):
            broker.start()
            bench = Bench(broker, folder, given.scale)
            chosen = [row for row in rows(bench) if given.only in row.group]
            measured: dict[tuple[str, str], list[Figures]] = {}
            for number in range(given.runs):
                for row in chosen:
                    print(f"run {number + 1}: {row.group}: {row.who}", file=sys.stderr)
                    measured.setdefault((row.group, row.who), []).append(row.measure())
            print(json.dumps(versions(broker)))
            print("\n".join(table(measured)))
    if given.json:
        rows_ = [{"group": g, "who": w, "runs": runs} for (g, w), runs in measured.items()]
        given.json.write_text(json.dumps(rows_, indent=1))


if __name__ == "__main__":
    main()
