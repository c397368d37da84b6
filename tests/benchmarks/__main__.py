"""Runs the benchmarks against a private RabbitMQ and a Redis, and prints tables and a chart; see `--help`.

Each figure is measured in a process of its own, greenconsume and its peers in turn, several times over;
the tables show medians and ranges. Run it with `tox -e bench`, or `python tests/patched.py tests.benchmarks`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import greenconsume
from tests.benchmarks.bench import Bench
from tests.benchmarks.chart import bars, svg
from tests.benchmarks.grounds import Databases, VirtualHosts
from tests.benchmarks.redis_rows import redis_rows
from tests.benchmarks.report import Measured, report
from tests.benchmarks.rows import Row, rows
from tests.brokers import RabbitMQ
from tests.redis_server import RedisServer

PACKAGES = (
    *("kombu", "amqp", "gevent", "greenlet"),
    *("aio-pika", "celery", "dramatiq", "eventlet", "nameko", "pika", "uvloop"),
)

#: What may be going on elsewhere when a measurement begins, of all cores together.
IDLE_PERCENT = 10.0


def main() -> int:
    given = parse()
    figures = json.loads(given.read.read_text()) if given.read else measure(given)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    if given.svg:
        given.svg.write_text(svg(figures["rows"]))
    print("\n".join([*report(figures), *bars(figures["rows"])]))
    return 0 if all(len(row["runs"]) == figures["runs"] for row in figures["rows"]) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.benchmarks", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs of each row (default 3)")
    parser.add_argument(
        "--only", default="", help="only rows whose group or name contains this text"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the message counts")
    parser.add_argument(
        "--wait", action="store_true", help="measure only while the machine is idle"
    )
    parser.add_argument("--json", type=Path, help="write every run's figures to this file")
    parser.add_argument("--svg", type=Path, help="write the chart to this file")
    parser.add_argument("--read", type=Path, help="show a file of --json instead of measuring")
    return parser.parse_args()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return every run's figures, and what they were measured with."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = RabbitMQ(folder)
        with closing(broker):
            broker.start()
            bench = Bench(VirtualHosts(broker), folder, given.scale)
            with closing(RedisServer(folder)) as server:
                on_redis = Bench(Databases(server), folder, given.scale)
                measured = run([*rows(bench), *redis_rows(on_redis)], given)
                named = dict(versions(broker, bench, server))
    return {"machine": machine(), "versions": named, "runs": given.runs, "rows": measured}


def run(all_rows: list[Row], given: argparse.Namespace) -> list[Measured]:
    """Measure all rows that are asked for in turn, and that as often as is asked for."""
    chosen = [row for row in all_rows if given.only in f"{row[0]}: {row[1]}"]
    measured: list[Measured] = [{"group": row[0], "who": row[1], "runs": []} for row in chosen]
    for number in range(given.runs):
        for (group, who, of), kept in zip(chosen, measured, strict=True):
            print(f"run {number + 1}: {group}: {who}", file=sys.stderr)
            while given.wait and psutil.cpu_percent(1.0) > IDLE_PERCENT:
                pass
            try:
                kept["runs"].append(of())
            except subprocess.SubprocessError as exc:  # the others are not lost with it
                print(f"failed: {exc}", file=sys.stderr)
    return measured


def versions(broker: RabbitMQ, bench: Bench, server: RedisServer) -> Iterator[tuple[str, str]]:
    """Name everything that has a part in the figures."""
    yield "Python", platform.python_version()
    yield "RabbitMQ", broker.eval("rabbit_misc:version()").strip('"')
    yield "Redis", ".".join(map(str, server.version))
    if library := bench.limit_version():
        yield "librabbitmq", library
    yield "greenconsume", greenconsume.__version__
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            pass  # a peer that is not measured here


def machine() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores of {next(names, platform.machine())}, {platform.system()}"


if __name__ == "__main__":
    sys.exit(main())
