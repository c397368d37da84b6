"""Measures a Celery worker with the gevent pool on py-amqp and on the green transport, in turn.

    python tests/patched.py tests.benchmarks.celery_worker [ROUNDS] [TASKS]

The worker is the same but for the transport: `-P gevent -c 100 -E`, acks late, tasks that do nothing and
wait in their queue when it starts. It is measured with heartbeats, which is Celery's default, and without:
with them, and events, its loop waits up to 0.1 s on the connection for its events after each turn. A row
says the tasks per second and the CPU seconds of the process per 1,000 tasks, from the first to the last:
median, minimum, maximum.
"""

# the worker imports nothing of the tests, and the parent nothing of Celery

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

QUEUE = "celery-bench"
#: What is measured, by name: the transport, and Celery's interval of heartbeats (None: the default).
ROWS = {
    "py-amqp": ("stock", None),
    "greenconsume": ("green", None),
    "py-amqp, no heartbeats": ("stock", 0),
    "greenconsume, no heartbeats": ("green", 0),
}
LIMIT = 300.0


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        return
    rounds, tasks = (*map(int, sys.argv[1:]), *(5, 200)[len(sys.argv) - 1 :])
    measure(rounds, tasks)


def measure(rounds: int, tasks: int) -> None:
    from tests.brokers import RabbitMQ, fresh_vhost

    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        broker = RabbitMQ(Path(folder))
        broker.start()
        try:
            for _ in range(rounds):
                for name in ROWS:
                    with fresh_vhost(broker) as vhost:
                        found[name].append(run(broker.url(vhost), name, tasks))
        finally:
            broker.close()
    print(f"{rounds} rounds of {tasks} tasks, load {os.getloadavg()[0]:.1f}")
    print("|  | tasks/s | CPU s per 1,000 |\n|---|---|---|")
    for name, figures in found.items():
        rates = spread([each["rate"] for each in figures])
        print(f"| {name} | {rates} | {spread([each['cpu_per_10k'] / 10 for each in figures])} |")


def spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def run(url: str, name: str, tasks: int) -> dict[str, float]:
    """Run one worker until it has done its tasks; return its figures."""
    from tests.integration.test_celery import send_tasks
    from tests.messages import declare

    declare(url, QUEUE)
    send_tasks(url, QUEUE, tasks)
    transport, heartbeat = ROWS[name]
    options = [url, transport, json.dumps(heartbeat), str(tasks)]
    command = [sys.executable, __file__, "--worker", *options]
    env = {**os.environ, "C_FORCE_ROOT": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    ) as it:
        out, _ = it.communicate(timeout=LIMIT)
    figures: dict[str, float] = json.loads(out.splitlines()[-1])
    return figures


def work(url: str, transport: str, heartbeat: str, tasks: str) -> None:
    """Be the worker: print the figures as JSON once the last task is done, and end."""
    from gevent import monkey

    monkey.patch_all()
    if transport == "green":
        import greenconsume

        greenconsume.patch_all()
    from celery import Celery
    from kombu import Exchange, Queue
    from meter import Meter  # beside this file

    def end() -> None:
        print(json.dumps(meter.figures()), file=sys.__stdout__, flush=True)
        os._exit(0)

    meter = Meter(int(tasks), end)
    app = Celery(broker=url)
    options: dict[str, Any] = {"broker_heartbeat": json.loads(heartbeat)}
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        task_queues=[Queue(QUEUE, Exchange(""), QUEUE)],
        worker_prefetch_multiplier=1,
        **({} if options["broker_heartbeat"] is None else options),
    )

    @app.task(name="tell")  # type: ignore[untyped-decorator]
    def tell(_body: object) -> None:
        meter.tick()

    app.worker_main(["--quiet", "worker", "--pool", "gevent", "--concurrency", "100", "-E"])


if __name__ == "__main__":
    main()
