"""Measures what many consumers of a queue each take to start, and where their bytes are.

    python tests/patched.py tests.benchmarks.starts [--consumers 10000] [--links 5] [--runs 3] [TREE …]
    python tests/patched.py tests.benchmarks.starts --places [--consumers 2000] [TREE …]

Each TREE has a `greenconsume` of its own; without any it is this one. They are measured in turn, and with
them `bare`: a script that writes the four methods of each consumer (open, qos, declare, consume) at once,
which is the least that the broker needs. CPU seconds are the process's, and the broker's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from tests.brokers import RabbitMQ

HERE = Path(__file__).resolve().parent
TIMEOUT = 300.0
_COLUMNS = {
    "start_s": "start s",
    "cpu_s": "CPU s",
    "broker_s": "the broker's CPU s",
    "kb_each": "KB each",
}


def measure(broker: RabbitMQ, tree: Path | None, given: dict[str, Any]) -> dict[str, float]:
    """Measure once, in a process and a virtual host of its own; without a tree, the bare script."""
    vhost = broker.add_vhost()
    given = {"who": "bare" if tree is None else "greenconsume", "url": broker.url(vhost), **given}
    env = {**os.environ, "PYTHONPATH": "" if tree is None else str(tree), "PYTHONSAFEPATH": "1"}
    process = psutil.Process(broker.pid)
    before = process.cpu_times()
    try:
        command = [sys.executable, str(HERE / "starting.py"), json.dumps(given)]
        out = subprocess.check_output(command, env=env, text=True, timeout=TIMEOUT)
        after = process.cpu_times()
    finally:
        broker.delete_vhost(vhost)
    figures: dict[str, float] = json.loads(out.splitlines()[-1])
    figures["broker_s"] = after.user + after.system - before.user - before.system
    return figures


def compare(broker: RabbitMQ, trees: list[Path], given: dict[str, Any], runs: int) -> None:
    """Measure each tree, and the bare script, in turn; print the medians and ranges."""
    subjects: list[Path | None] = [*trees, None]
    found: dict[Path | None, list[dict[str, float]]] = {each: [] for each in subjects}
    for number in range(runs):
        for each in subjects if number % 2 == 0 else reversed(subjects):
            found[each].append(measure(broker, each, given))
    print("| | " + " | ".join(_COLUMNS.values()) + " |\n|---|" + "--:|" * len(_COLUMNS))
    for each in subjects:
        cells = (_cell([figures[column] for figures in found[each]]) for column in _COLUMNS)
        print(f"| {'bare' if each is None else each} | " + " | ".join(cells) + " |")


def _cell(values: list[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="*", type=Path, default=[HERE.parent.parent])
    parser.add_argument("--consumers", type=int)
    parser.add_argument("--links", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--places", action="store_true", help="where the bytes are, by line")
    args = parser.parse_args()
    consumers = args.consumers or (2000 if args.places else 10_000)
    given = {"consumers": consumers, "links": args.links, "places": args.places}
    with tempfile.TemporaryDirectory() as folder, closing(RabbitMQ(Path(folder))) as broker:
        broker.start()
        if not args.places:
            compare(broker, args.trees, given, args.runs)
            return
        for tree in args.trees:
            print(tree)
            for place, size in measure(broker, tree, given).items():
                print(f"{size:9.1f}  {place}")


if __name__ == "__main__":
    main()
