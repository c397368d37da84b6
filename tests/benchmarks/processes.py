"""Measures what a second process adds, with 500 handlers of 50 ms each and with no-ops: on its own broker.

    python tests/patched.py tests.benchmarks.processes [SECONDS [ROUNDS [TARGET ...]]]

One process and two in turn, as often as ROUNDS says. It reads how fast the queue gets shorter, and the CPU
that the processes and the broker took: where both cores are the broker's or somebody else's, a second process
adds little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import gevent
import psutil
from kombu import Queue

from greenconsume import ConsumerMixin, ConsumerOptions
from tests.benchmarks import feeder
from tests.brokers import RabbitMQ, fresh_vhost
from tests.gunicorns import Gunicorn

QUEUE = "scaled"
#: As the feeder names it.
FED = f"{QUEUE}.0"
#: Seconds until both processes are at their pace.
SETTLE = 1.0
#: By target the most messages a second that two processes could handle: so many wait for each second.
TARGETS = {"Waiting": 20_000, "Longer": 10_000, "NoOp": 60_000}


class NoOp(ConsumerMixin):
    """Does nothing with a message."""

    options = ConsumerOptions(auto_settle=True)

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        queue = Queue(FED, durable=False)
        return [Consumer([queue], callbacks=[self.on_message], prefetch_count=1000)]

    def on_message(self, body: Any, message: Any) -> None:
        """Do nothing."""


class Waiting(NoOp):
    """Waits for 50 ms, with up to 500 messages at once."""

    options = ConsumerOptions(concurrency=500, auto_settle=True)

    seconds = 0.05

    def on_message(self, body: Any, message: Any) -> None:
        time.sleep(self.seconds)


class Longer(Waiting):
    """Waits for twice as long: the same number of handlers at half the CPU."""

    seconds = 0.1


def measure(broker: RabbitMQ, target: str, processes: int, seconds: float) -> tuple[float, str]:
    """Return the messages a second, and a row with the CPU that they took."""
    with fresh_vhost(broker) as vhost, tempfile.TemporaryDirectory() as folder:
        url = broker.url(vhost)
        fill(url, int(TARGETS[target] * (seconds + SETTLE + 1)))
        command = [
            sys.executable,
            "-m",
            "greenconsume",
            "run",
            f"tests.benchmarks.processes:{target}",
        ]
        command += ["--broker", url, "--processes", str(processes), "--log-level", "warning"]
        server = Gunicorn(Path(folder), command=[*command, "--freeze-gc"])
        try:
            while broker.queue_counts(url, FED).consumers < processes:
                gevent.sleep(0.05)
            gevent.sleep(SETTLE)
            used = [psutil.Process(pid) for pid in (*server.workers, broker.pid)]
            before, left, began = cpu_of(used), depth(broker, url), monotonic()
            gevent.sleep(seconds)
            passed, rest = monotonic() - began, depth(broker, url)
            taken = [now - old for now, old in zip(cpu_of(used), before, strict=True)]
        finally:
            server.close_quietly()
    assert rest, "the queue was empty before the end"
    rate = (left - rest) / passed
    *ours, brokers, all_of_it = (f"{each / passed:.0%}" for each in taken)
    return (
        rate,
        f"| {target} | {processes} | {rate:,.0f}/s | {' + '.join(ours)} | {brokers} | {all_of_it} |",
    )


def fill(url: str, count: int) -> None:
    """Have so many messages wait."""
    given = json.dumps({"url": url, "queue": QUEUE, "messages": count})
    subprocess.run([sys.executable, feeder.__file__, given], check=True)


def depth(broker: RabbitMQ, url: str) -> int:
    counts = broker.queue_counts(url, FED)
    return counts.ready + counts.unacked


def cpu_of(processes: list[psutil.Process]) -> list[float]:
    """Return the CPU seconds that each has taken, and those of the whole machine."""
    each = [sum(process.cpu_times()[:2]) for process in processes]
    machine = psutil.cpu_times()
    return [*each, sum(machine) - machine.idle - machine.iowait - machine.guest]


def main() -> None:
    seconds = float(sys.argv[1]) if sys.argv[1:] else 5.0
    rounds = int(sys.argv[2]) if sys.argv[2:] else 3
    with tempfile.TemporaryDirectory() as folder, closing(RabbitMQ(Path(folder))) as broker:
        broker.start()
        print(f"load {os.getloadavg()[0]:.1f} before")
        print("| target | processes | messages | their CPU | the broker's CPU | all CPU |")
        print("|---|---|---|---|---|---|", flush=True)
        for target in sys.argv[3:] or TARGETS:
            rates: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(rounds):
                for processes, found in rates.items():
                    rate, row = measure(broker, target, processes, seconds)
                    found.append(rate)
                    print(row, flush=True)
            times = median(rates[2]) / median(rates[1])
            print(f"two processes handle {times:.2f} times as much", flush=True)


if __name__ == "__main__":
    main()
