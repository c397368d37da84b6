"""Owns a Celery application and worker, in a process of their own, that share queues with greenconsume.

    python tests/integration/redis/celery_app.py URL QUEUE FILE

The worker notes the number of each task in the file; SIGTERM ends it.
"""

from __future__ import annotations

import sys
from typing import Any

from celery import Celery


def main(url: str, queue: str, notes: str) -> None:
    """Work until the process is told to end."""
    app = Celery("fleet", broker=url)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        task_default_queue=queue,
        task_acks_late=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
    )

    @app.task(name="fleet.note")  # type: ignore[untyped-decorator]
    def note(number: int) -> None:
        with open(notes, "a") as file:
            file.write(f"{number}\n")

    arguments: list[Any] = ["worker", "--pool", "solo", "--without-gossip", "--without-mingle"]
    app.worker_main([*arguments, "--without-heartbeat", "--loglevel", "WARNING"])


if __name__ == "__main__":
    main(*sys.argv[1:])
