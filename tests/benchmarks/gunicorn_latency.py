"""Measures how soon HTTP is answered beside 500 consumers in the same gevent worker, on a broker of its own.

    python tests/patched.py tests.benchmarks.gunicorn_latency [SECONDS]

One worker, one client with one connection that asks a hundred times a second. A row each: without
consumers; with 500 that are idle; with 500 that are busy for about a second with each message; the same with
`freeze_gc`. It says the load of the machine, without which no percentile means anything.
"""

from __future__ import annotations

import http.client
import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from time import monotonic, perf_counter

import gevent

from tests.brokers import RabbitMQ, fresh_vhost
from tests.gunicorns import Gunicorn
from tests.messages import publish
from tests.servers import HOST

QUEUE = "latency"
COUNT = 500
NONE = "post_worker_init = lambda worker: None\n"
FROZEN = "post_worker_init = consumers('tests.webapp:runtime', freeze_gc=True)\n"
#: By name: what is configured, how many consumers, how many messages.
ROWS = {
    "none": (NONE, 0, 0),
    "idle": ("", COUNT, 0),
    "busy": ("", COUNT, 40_000),
    "busy, freeze_gc": (FROZEN, COUNT, 40_000),
}


def percentiles(port: int, seconds: float) -> tuple[float, float, float]:
    """Return the median, the 99th percentile and the maximum of GETs, in milliseconds."""
    took = []
    with closing(http.client.HTTPConnection(HOST, port, timeout=30)) as connection:
        until = monotonic() + seconds
        while monotonic() < until:
            began = perf_counter()
            connection.request("GET", "/")
            connection.getresponse().read()
            took.append(1000 * (perf_counter() - began))
            gevent.sleep(0.01)
    took.sort()
    return took[len(took) // 2], took[len(took) * 99 // 100], took[-1]


def measure(broker: RabbitMQ, name: str, seconds: float) -> str:
    conf, consumers, messages = ROWS[name]
    with fresh_vhost(broker) as vhost, tempfile.TemporaryDirectory() as folder:
        url = broker.url(vhost)
        env = {"BROKER": url, "QUEUE": QUEUE, "CONSUMERS": consumers or 1, "CONCURRENCY": 1}
        server = Gunicorn(Path(folder), conf, WORK="0.8,1.2", **env)
        try:
            server.wait_consuming(consumers)
            server.wait_serving()
            if messages:
                publish(url, QUEUE, messages)
            gevent.sleep(2)
            load = os.getloadavg()[0]
            median, p99, worst = percentiles(server.port, seconds)
        finally:
            server.close_quietly()
    return f"| {name} | {median:.1f} ms | {p99:.1f} ms | {worst:.0f} ms | {load:.1f} |"


def main() -> None:
    seconds = float(sys.argv[1]) if sys.argv[1:] else 20.0
    with tempfile.TemporaryDirectory() as folder, closing(RabbitMQ(Path(folder))) as broker:
        broker.start()
        print("| consumers | p50 | p99 | max | load |\n|---|---|---|---|---|", flush=True)
        for name in ROWS:
            print(measure(broker, name, seconds), flush=True)


if __name__ == "__main__":
    main()
