"""Owns what is measured on Redis: as `rows` does for RabbitMQ, peers of one group together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.benchmarks.bench import Bench
from tests.benchmarks.peers import PEERS
from tests.benchmarks.rows import GREEN, KOMBU, Row

#: Those of the peers that know Redis.
ON_REDIS = ("celery -P gevent", "dramatiq-gevent")


def redis_rows(bench: Bench) -> Iterator[Row]:
    """Yield the rows on Redis that can be measured here."""
    yield from _consuming(bench)
    yield from _handling(bench)
    yield from _waiting(bench)
    yield from _idling(bench)


def _consuming(bench: Bench) -> Iterator[Row]:
    group = "On Redis: consume and ack each, prefetch 100"
    yield group, GREEN, bench.worker("consume", GREEN, messages=100_000, prefetch=100)
    yield group, KOMBU, bench.worker("consume", KOMBU, messages=5_000, prefetch=100)
    yield from _peers(bench, group, messages=10_000, prefetch=100, handlers=None)


def _handling(bench: Bench) -> Iterator[Row]:
    group = "On Redis: 500 handlers in flight, 50 ms each"
    work: dict[str, Any] = {"messages": 40_000, "handlers": 500, "seconds": 0.05}
    own = {**work, "concurrency": 500}
    yield group, f"{GREEN}, concurrency=500", bench.worker("handlers", GREEN, **own)
    in_pool = bench.worker("pool", KOMBU, prefetch=500, **{**work, "messages": 5_000})
    yield group, f"{KOMBU}, gevent Pool(500)", in_pool
    yield from _peers(bench, group, **{**work, "messages": 10_000}, prefetch=500)
    yield group, "gevent Pool(500), no server", bench.worker("bound", "gevent", **work)


def _peers(bench: Bench, group: str, **options: Any) -> Iterator[Row]:
    for who in ON_REDIS:
        if PEERS[who].installed:
            yield group, who, bench.peer(who, **options)


def _waiting(bench: Bench) -> Iterator[Row]:
    group = "On Redis: 20 processes wait for one queue, 500 messages/s"
    for who in (GREEN, KOMBU, "BRPOP"):
        work = {"messages": 5_000, "burst": 1, "rate": 500}
        yield group, who, bench.waiters(who, 20, **work)


def _idling(bench: Bench) -> Iterator[Row]:
    for mixin in (GREEN, KOMBU):
        measure = bench.worker("idle", mixin, consumers=1_000, seconds=5)
        yield "On Redis: 1,000 consumers that wait", mixin, measure
    for mixin in (GREEN, KOMBU):
        measure = bench.worker("idle", mixin, consumers=1_000, queues=10, seconds=5)
        yield "On Redis: 1,000 consumers of 10 queues that wait", mixin, measure
