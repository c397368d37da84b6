"""Owns a web application with consumers, as tests run it under gunicorn: what it is told comes by
environment.

Every handler notes in a journal what becomes of its message, with its process and the time: lines that
several processes append to one file. Imports nothing of gevent by itself: who runs it patches.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

from kombu import Queue

from greenconsume import ConsumerMixin, ConsumerOptions, Publisher, Runtime

BROKER = os.environ.get("BROKER", "memory://")
ARGUMENTS = json.loads(os.environ.get("QUEUE_ARGUMENTS", "{}"))
QUEUE = os.environ.get("QUEUE", "webapp")
CONSUMERS = int(os.environ.get("CONSUMERS", "1"))
CONCURRENCY = int(os.environ.get("CONCURRENCY", "10"))
WORK = tuple(map(float, os.environ.get("WORK", "0.05,0.05").split(",")))


def note(kind: str, body: object = "-", more: object = "") -> None:
    """Append a line to the journal."""
    line = f"{time.time():.6f} {os.getpid()} {kind} {body} {more}\n"
    fd = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line.encode())
    os.close(fd)


class Worker(ConsumerMixin):
    options = ConsumerOptions(concurrency=CONCURRENCY or None)  # 0: inline, in order

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        queue = Queue(QUEUE, durable=True, queue_arguments=ARGUMENTS)
        return [Consumer([queue], callbacks=[self.on_task], prefetch_count=CONCURRENCY or 1)]

    def on_consume_ready(self, *args: Any, **kwargs: Any) -> None:
        note("consuming")

    def on_task(self, body: Any, message: Any) -> None:
        note("begun", body, "redelivered" if message.delivery_info["redelivered"] else "")
        try:
            self.work(body)
        except BaseException as exc:
            note("ended", body, type(exc).__name__)
            raise
        message.ack()
        note("finished", body)

    def work(self, body: Any) -> None:
        if body == "spin":
            while True:
                pass
        time.sleep(random.uniform(*WORK))


runtime = Runtime(BROKER)
runtime.spawn(Worker, replicas=CONSUMERS)
publisher = Publisher(BROKER, timeout=float(os.environ.get("PUBLISH_TIMEOUT", "2")))


def app(environ: Any, start_response: Any) -> list[bytes]:
    """Answer with the process id; `/slow` takes a while, `/publish` publishes to the queue of the query."""
    path, query = environ["PATH_INFO"], environ["QUERY_STRING"]
    status, answer = "200 OK", str(os.getpid())
    if path == "/slow":
        time.sleep(float(query))
    elif path == "/spin":
        until = time.monotonic() + float(query)
        while time.monotonic() < until:
            pass
    elif path == "/publish":
        try:
            publisher.publish({"at": time.time()}, query)
        except Exception as exc:
            status, answer = "503 Service Unavailable", f"{type(exc).__name__}: {exc}"
    start_response(status, [("Content-Length", str(len(answer.encode())))])
    return [answer.encode()]
