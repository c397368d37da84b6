"""Owns how one figure is measured: against which broker, fed by whom, in which process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles
from time import monotonic
from typing import Any

import psutil
from kombu.utils.url import parse_url

from tests.benchmarks.grounds import Ground
from tests.benchmarks.peers import PEERS
from tests.benchmarks.tap import AckTap
from tests.servers import HOST

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
PATCHED = HERE.parent / "patched.py"

QUEUE = "bench"
PEERS_MODULE = "tests.benchmarks.peers"

#: Seconds that one measurement may take before it counts as failed.
TIMEOUT = 300.0

Figures = dict[str, float]
Measure = Callable[[], Figures]
Options = dict[str, Any]


class Bench:
    """Runs measurements, each in a process of its own and in a fresh place of a server.

    Args:
        ground: The server, which runs.
        folder: Where to build the C client.
        scale: A factor on the message counts.
    """

    def __init__(self, ground: Ground, folder: Path, scale: float) -> None:
        self._ground = ground
        self._program = folder / "limit"
        self._scale = scale
        self._url = ""

    def _fresh(self, measure: Measure) -> Measure:
        """Return what measures in a place of its own; what it leaves there goes with it."""

        def measured() -> Figures:
            self._url = self._ground.add()
            try:
                return measure()
            finally:
                self._ground.drop(self._url)

        return measured

    # -- what can be measured -----------------------------------------------------------------------

    def worker(self, measure: str, who: str, **options: Any) -> Measure:
        """Return what takes one of `worker`'s measures of greenconsume or kombu."""
        mixin = "kombu" if who.startswith("kombu") else "greenconsume"

        def run() -> Figures:
            given = self._given(measure=measure, mixin=mixin, **options)
            if measure == "latency":
                return self._fed_meanwhile(given)
            if measure == "acks":
                return self._tapped(given)
            if measure in ("consume", "pool", "handlers"):
                self._feed(given)
            elif measure == "publish":
                self._feed({**given, "messages": 0})
            return _figures(_worker(given))

        return self._fresh(run)

    def waiters(self, who: str, count: int, **options: Any) -> Measure:
        """Return what measures the server's CPU while many processes wait for one queue."""

        def run() -> Figures:
            given = self._given(measure="wait", mixin=who.partition(".")[0], prefetch=1, **options)
            command = _plain("brpop", given) if who == "BRPOP" else _worker(given)
            processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
            try:
                for process in processes:
                    assert process.stdout is not None
                    process.stdout.readline()
                return self._server_cpu(given)
            finally:
                for process in processes:
                    process.kill()
                    process.communicate()

        return self._fresh(run)

    def _server_cpu(self, given: Options) -> Figures:
        server = psutil.Process(self._ground.pid)
        began, before = monotonic(), server.cpu_times()
        fed = json.loads(subprocess.check_output(_feeder(given), text=True))["fed"]
        after, passed = server.cpu_times(), monotonic() - began
        used = after.user + after.system - before.user - before.system
        return {"server_cpu_percent": used / passed * 100, "fed": fed / given["rate"]}

    def peer(self, who: str, **options: Any) -> Measure:
        """Return what measures a peer."""
        peer = PEERS[who]
        command = _patched(PEERS_MODULE) if peer.patched else [sys.executable, "-m", PEERS_MODULE]
        # Where the tree is kept off the path, as for tests of the wheel; a peer has no use for that.
        env = {**os.environ, "PYTHONPATH": str(TREE), "PYTHONWARNINGS": "ignore"}

        def run() -> Figures:
            given = self._given(who=who, **options)
            self._feed({**given, "kind": peer.kind})
            return _figures([*command, json.dumps({**given, "queue": f"{QUEUE}.0"})], env=env)

        return self._fresh(run)

    def limit(self, messages: int, prefetch: int) -> Measure:
        """Return what measures the C client."""

        def run() -> Figures:
            self._compile()
            given = self._given(messages=messages)
            self._feed(given)
            vhost = parse_url(self._url)["virtual_host"]
            address = [HOST, str(self._ground.port), vhost, f"{QUEUE}.0"]
            return _figures([str(self._program), *address, str(prefetch), str(given["messages"])])

        return self._fresh(run)

    def limit_version(self) -> str:
        """Return the version of the C client's library, or nothing where it is not to be had."""
        try:
            self._compile()
        except (OSError, subprocess.CalledProcessError):
            return ""
        return subprocess.check_output([str(self._program)], text=True).strip()

    def _compile(self) -> None:
        if not self._program.exists():
            source = [str(HERE / "limit.c"), "-lrabbitmq"]
            subprocess.run(["cc", "-O2", "-o", str(self._program), *source], check=True)

    # -- how ----------------------------------------------------------------------------------------

    def _given(self, **options: Any) -> Options:
        given = {"url": self._url, "queue": QUEUE, **options}
        if "messages" in given:
            given["messages"] = max(1000, int(given["messages"] * self._scale) // 1000 * 1000)
        return given

    def _feed(self, given: Options) -> None:
        """Fill the queues, and return when the broker has all of it."""
        subprocess.run(_feeder(given), check=True)

    def _fed_meanwhile(self, given: Options) -> Figures:
        lines, fed = _feed_meanwhile(given)
        return {**lines, "fed": fed}

    def _tapped(self, given: Options) -> Figures:
        with closing(AckTap(self._ground.port)) as tap:
            through = given["url"].replace(f":{self._ground.port}/", f":{tap.port}/")
            acked, fed = _feed_meanwhile({**given, "url": through})
            delays = [(tap.seen(tag) - at) * 1000 for at, tag in acked]
        return {"p50_ms": median(delays), "p99_ms": quantiles(delays, n=100)[98], "fed": fed}


def _feed_meanwhile(given: Options) -> tuple[Any, float]:
    """Publish while a worker consumes; return what it printed, and the share of the rate that was kept."""
    command = _worker(given)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        try:
            worker.stdout.readline()  # it consumes, or it has failed
            feeder = json.loads(subprocess.check_output(_feeder(given), text=True))
            printed = worker.communicate(timeout=TIMEOUT)[0]
        finally:
            worker.kill()
    if worker.returncode:
        raise subprocess.CalledProcessError(worker.returncode, command)
    return json.loads(printed), feeder["fed"] / given["rate"]


def _figures(command: list[str], **options: Any) -> Figures:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT, **options
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _feeder(given: Options) -> list[str]:
    queues = {"queues": given.get("consumers", 1)}
    name = "redis_feeder" if given["url"].startswith("redis:") else "feeder"
    return _plain(name, {**given, **queues})


def _worker(given: Options) -> list[str]:
    return [*_patched("tests.benchmarks.worker"), json.dumps(given)]


def _patched(module: str) -> list[str]:
    return [sys.executable, str(PATCHED), module]


def _plain(name: str, given: Options) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), json.dumps(given)]
