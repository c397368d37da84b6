"""Measures what a second process adds, with 500 handlers of 50 ms each: on a broker of its own.

    python tests/patched.py tests.benchmarks.processes [SECONDS]

It reads how fast the queue gets shorter, and the CPU that the processes and the broker took: where both cores
are the broker's or somebody else's, a second process adds little.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import psutil
from kombu import Queue

from greenconsume import ConsumerMixin, ConsumerOptions
from tests.brokers import RabbitMQ
from tests.gunicorns import Gunicorn
from tests.messages import delete_queue, publish

QUEUE = "scaled"
COUNT = 100_000


class Work(ConsumerMixin):
    """What each process runs."""

    options = ConsumerOptions(concurrency=500, auto_settle=True)

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([Queue(QUEUE)], callbacks=[self.on_message], prefetch_count=1000)]

    def on_message(self, body: Any, message: Any) -> None:
        time.sleep(0.05)


def measure(broker: RabbitMQ, processes: int, seconds: float) -> str:
    url = broker.url("/")
    publish(url, QUEUE, COUNT)
    target = "tests.benchmarks.processes:Work"
    command = [sys.executable, "-m", "greenconsume", "run", target, "--broker", url]
    command += ["--processes", str(processes), "--log-level", "warning", "--freeze-gc"]
    with tempfile.TemporaryDirectory() as folder:
        server = Gunicorn(Path(folder), command=command)
        try:
            while broker.queue_counts(url, QUEUE).consumers < processes:
                gevent.sleep(0.1)
            gevent.sleep(3)
            used = [psutil.Process(pid) for pid in (*server.workers, broker.pid)]
            before, left, began = [cpu(each) for each in used], depth(broker, url), monotonic()
            gevent.sleep(seconds)
            passed, done = monotonic() - began, left - depth(broker, url)
            shares = [(cpu(each) - old) / passed for each, old in zip(used, before, strict=True)]
        finally:
            server.close_quietly()
    delete_queue(url, QUEUE)
    ours = " + ".join(f"{share:.0%}" for share in shares[:-1])
    return f"| {processes} | {done / passed:,.0f}/s | {ours} | {shares[-1]:.0%} |"


def depth(broker: RabbitMQ, url: str) -> int:
    counts = broker.queue_counts(url, QUEUE)
    return counts.ready + counts.unacked


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    seconds = float(sys.argv[1]) if sys.argv[1:] else 10.0
    with tempfile.TemporaryDirectory() as folder, closing(RabbitMQ(Path(folder))) as broker:
        broker.start()
        print(f"load {os.getloadavg()[0]:.1f} before")
        print(
            "| processes | messages | their CPU | the broker's CPU |\n|---|---|---|---|", flush=True
        )
        for processes in (1, 2):
            print(measure(broker, processes, seconds), flush=True)


if __name__ == "__main__":
    main()
