"""Redis: faults of all kinds in turn, round after round, under load.

GREENCONSUME_TEST_ROUNDS sets how many rounds there are, GREENCONSUME_TEST_PAUSE for how many seconds the
server is stopped. The target is that all consumers are back within 5 s of it, which each round prints.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import gevent
import pytest
import redis
from kombu import Connection

from greenconsume import Runtime
from tests.fault.consumers import Collector, duplicates, everything
from tests.fault.test_redis import Redis, started
from tests.integration.redis.payloads import held_count, put
from tests.proxy import Proxy
from tests.rounds import rounds
from tests.waiting import wait_until

ROUNDS = rounds(5)
PAUSE = float(os.environ.get("GREENCONSUME_TEST_PAUSE", "1"))
CONSUMERS, LINKS, BATCH = 5, 2, 200


@pytest.fixture
def process(tmp_path) -> Iterator[Redis]:
    """A server that writes each command to its disk before it answers."""
    with started(tmp_path) as process:
        yield process


def pause(process: Redis, proxy: Proxy) -> None:
    assert process._process is not None
    process._process.send_signal(signal.SIGSTOP)
    gevent.sleep(PAUSE)
    process._process.send_signal(signal.SIGCONT)


def cut(process: Redis, proxy: Proxy) -> None:
    proxy.cut()


def half_open(process: Redis, proxy: Proxy) -> None:
    proxy.half_open()


def kill(process: Redis, proxy: Proxy) -> None:
    process.kill()
    gevent.sleep(0.1)
    process.start()


def stall(process: Redis, proxy: Proxy) -> None:
    proxy.stall("to_client")
    gevent.sleep(0.3)
    proxy.cut()
    proxy.resume()


FAULTS: list[Callable[[Redis, Proxy], None]] = [pause, cut, half_open, kill, stall]


@pytest.mark.slow
@pytest.mark.timeout(120 + ROUNDS * (60 + PAUSE))
def test_whatever_happens_to_the_server_all_is_handled_and_all_come_back(
    process, make_proxy, queue_name
):
    """HAZARDS rows 2, 16 and 22."""
    proxy, handled = make_proxy(process.url), Counter[Any]()
    options = {"health_check_interval": 0.5}
    with Runtime(Connection(proxy.url, transport_options=options), links=LINKS) as runtime:
        runtime.spawn(
            lambda c: Collector(c, queue_name, handled, work=lambda _: gevent.sleep(0.001)),
            replicas=CONSUMERS,
        )
        for number in range(ROUNDS):
            wait_until(lambda: all(child.started for child in runtime.children))
            fault = FAULTS[number % len(FAULTS)]
            seconds = disturb(process, proxy, fault, queue_name, handled, 2 * BATCH * number)
            print(f"\n{fault.__name__}: all is handled after {seconds:.2f} s", end="")
            wait_until(lambda: proxy.open_count == LINKS)
        print(f"\n{duplicates(handled)} of {len(handled)} messages were handled twice")


def disturb(
    process: Redis,
    proxy: Proxy,
    fault: Callable[[Redis, Proxy], None],
    queue: str,
    handled: Counter[Any],
    first: int,
) -> float:
    """Have a fault amid messages; return the seconds from its end until all of them were handled."""
    middle, end = first + BATCH, first + 2 * BATCH
    with redis.Redis.from_url(process.url) as server:
        put(server, queue, *range(first, middle))
    wait_until(lambda: len(handled) > first)
    gevent.sleep(random.uniform(0, 0.05))
    fault(process, proxy)
    began = monotonic()
    with redis.Redis.from_url(process.url) as server:
        put(server, queue, *range(middle, end))
        wait_until(everything(handled, end))
        seconds = monotonic() - began
        wait_until(lambda: held_count(server) == 0)
        assert server.llen(queue) == 0
    return seconds
