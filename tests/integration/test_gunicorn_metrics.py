"""Metrics of gunicorn's workers, merged by prometheus_client's multiprocess folder."""

from __future__ import annotations

import re
import signal
from contextlib import closing

from tests.gunicorns import Gunicorn
from tests.waiting import wait_until

#: Each worker has queues of its own in memory, and publishes to itself when it is asked to.
APP = """
import os


from kombu import Queue
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from greenconsume import ConsumerMixin, ConsumerOptions, Publisher, Runtime


class Orders(ConsumerMixin):
    options = ConsumerOptions(auto_settle=True)

    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, Consumer, channel):
        return [Consumer([Queue("metered")], callbacks=[lambda body, message: None])]


runtime = Runtime("memory://")
runtime.spawn(Orders)


def app(environ, start_response):
    answer = str(os.getpid()).encode()
    if environ["PATH_INFO"] == "/work":
        with Publisher("memory://", routing_key="metered") as publisher:
            publisher.publish({"order": 7})
    elif environ["PATH_INFO"] == "/metrics":
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        answer = generate_latest(registry)
    start_response("200 OK", [("Content-Length", str(len(answer)))])
    return [answer]
"""

CONF = """
workers = 2
chdir = {folder!r}
start = consumers("metered:runtime")

def post_worker_init(worker):
    start(worker)
    import metered
    from greenconsume.metrics import Mirror
    worker.mirror = Mirror(metered.runtime.control, every=0.1)
    worker.mirror.start()

def child_exit(server, worker):
    from prometheus_client.multiprocess import mark_process_dead
    mark_process_dead(worker.pid)
"""

#: Name, pid (for a gauge) and value.
_SAMPLE = re.compile(r'^(greenconsume_\w+)\{(?:.*?pid="(\d+)")?.*\} (\S+)$', re.MULTILINE)


def test_metrics_are_the_sum_over_the_workers_and_a_dead_ones_gauges_vanish(tmp_path):
    folder = tmp_path / "prometheus"
    folder.mkdir()
    (tmp_path / "metered.py").write_text(APP)
    conf = CONF.format(folder=str(tmp_path))
    server = Gunicorn(tmp_path, conf, app="metered:app", PROMETHEUS_MULTIPROC_DIR=folder)
    with closing(server):
        server.wait_serving()
        wait_until(lambda: consuming(server) == set(server.workers) and len(server.workers) == 2)
        dead, left = server.workers
        published = work_until_each_has(server, {dead, left})
        wait_until(lambda: total(server, "received_messages_total") == published)
        server.signal(signal.SIGKILL, dead)
        wait_until(lambda: dead not in consuming(server))
        wait_until(lambda: len(consuming(server)) == 2)  # another took its place
        assert left in consuming(server)
        # What was counted stays counted.
        assert total(server, "received_messages_total") == published


def samples(server: Gunicorn) -> list[tuple[str, int, float]]:
    code, text = server.get("/metrics") or (0, "")
    assert code in (0, 200), text
    found = _SAMPLE.findall(text)
    return [
        (name.removeprefix("greenconsume_"), int(pid or 0), float(value))
        for name, pid, value in found
    ]


def total(server: Gunicorn, name: str) -> float:
    return sum(value for known, _, value in samples(server) if known == name)


def consuming(server: Gunicorn) -> set[int]:
    """The workers whose consumer consumes, as the merged metrics say."""
    return {pid for name, pid, value in samples(server) if name == "consumer_consuming" and value}


def work_until_each_has(server: Gunicorn, workers: set[int]) -> int:
    """Have messages published until each worker had one; return how many there were."""
    answered = []
    while not workers <= set(answered) or len(answered) < 10:
        code, pid = server.get("/work") or (0, "")
        assert code == 200
        answered.append(int(pid))
        assert len(answered) < 1000
    return len(answered)
