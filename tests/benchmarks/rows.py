"""Owns what is measured: every row of the table, peers of one group together."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.bench import Bench, Measure
from tests.benchmarks.peers import PEERS

GREEN, KOMBU = "greenconsume", "kombu.mixins"

Row = tuple[str, str, Measure]  # the group, who is measured, and how


def rows(bench: Bench) -> Iterator[Row]:
    """Yield the rows that can be measured here."""
    for prefetch in (100, 1000):
        yield from _consuming(bench, prefetch)
    yield from _handling(bench)
    yield from _handling_many(bench)
    yield from _delays(bench)
    yield from _publishing(bench)
    yield from _fleets(bench)
    yield from _idling(bench)


def _consuming(bench: Bench, prefetch: int) -> Iterator[Row]:
    group = f"Consume and ack each, prefetch {prefetch:,}"
    work = {"messages": 100_000, "prefetch": prefetch}
    yield group, GREEN, bench.worker("consume", GREEN, **work)
    yield group, f"{GREEN}, metrics on", bench.worker("consume", GREEN, watched=True, **work)
    yield group, KOMBU, bench.worker("consume", KOMBU, messages=40_000, prefetch=prefetch)
    if prefetch == 100:
        yield from _peers(bench, group, messages=20_000, prefetch=prefetch, handlers=None)
    if shutil.which("cc") and Path("/usr/include/amqp.h").exists():
        yield group, "C, librabbitmq", bench.limit(messages=100_000, prefetch=prefetch)


def _handling(bench: Bench) -> Iterator[Row]:
    group = "500 handlers in flight, 50 ms each"
    work: dict[str, Any] = {"messages": 40_000, "handlers": 500, "seconds": 0.05}
    own = {**work, "concurrency": 500}
    yield group, f"{GREEN}, concurrency=500", bench.worker("handlers", GREEN, **own)
    watched = bench.worker("handlers", GREEN, watched=True, **own)
    yield group, f"{GREEN}, the same, metrics on", watched
    for mixin in (GREEN, KOMBU):
        in_pool = bench.worker("pool", mixin, prefetch=500, **work)
        yield group, f"{mixin}, gevent Pool(500)", in_pool
    yield from _peers(bench, group, **{**work, "messages": 20_000}, prefetch=500)
    yield group, "gevent Pool(500), no broker", bench.worker("bound", "gevent", **work)


def _handling_many(bench: Bench) -> Iterator[Row]:
    group = "5,000 handlers in flight, 1 s each"
    work: dict[str, Any] = {"messages": 40_000, "handlers": 5_000, "seconds": 1.0}
    own = {**work, "concurrency": 5_000}
    yield group, f"{GREEN}, concurrency=5000", bench.worker("handlers", GREEN, **own)
    for mixin in (GREEN, KOMBU):
        in_pool = bench.worker("pool", mixin, prefetch=5_000, **work)
        yield group, f"{mixin}, gevent Pool(5000)", in_pool


def _peers(bench: Bench, group: str, **options: Any) -> Iterator[Row]:
    for who, peer in PEERS.items():
        if peer.installed:
            yield group, who, bench.peer(who, **options)


def _delays(bench: Bench) -> Iterator[Row]:
    single: dict[str, Any] = {"messages": 3_000, "burst": 1, "rate": 500, "prefetch": 100}
    for mixin in (GREEN, KOMBU):
        yield "Publish to callback, at 500/s", mixin, bench.worker("latency", mixin, **single)
    bursts: dict[str, Any] = {"messages": 20_000, "burst": 100, "rate": 40, "prefetch": 100}
    for mixin in (GREEN, KOMBU):
        yield (
            "Last ack of a burst of 100, to the wire",
            mixin,
            bench.worker("acks", mixin, **bursts),
        )


def _publishing(bench: Bench) -> Iterator[Row]:
    group = "Publish confirmed, from 100 greenlets"
    senders = {
        f"{GREEN}, Publisher": "publisher",
        f"{GREEN}, one kombu Producer": "shared_producer",
        "kombu, pool of 10 producers": "kombu_pool",
    }
    for who, sender in senders.items():
        yield group, who, bench.worker("publish", who, messages=40_000, sender=sender)


def _fleets(bench: Bench) -> Iterator[Row]:
    for consumers, links in ((1, 1), (100, 1), (100, 10), (1000, 1), (1000, 10)):
        who = f"{_count(consumers, 'consumer')} over {_count(links, 'link')}"
        fleet = {"consumers": consumers, "links": links, "prefetch": 100}
        measure = bench.worker("consume", GREEN, messages=200_000, **fleet)
        yield "Cost by consumers and links", who, measure


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number > 1)


def _idling(bench: Bench) -> Iterator[Row]:
    for mixin in (GREEN, KOMBU):
        measure = bench.worker("idle", mixin, consumers=1_000, seconds=5)
        yield "1,000 consumers that wait", mixin, measure
    many = {"consumers": 10_000, "seconds": 10, "links": 5, "deliver": True}
    yield "10,000 consumers over 5 links", GREEN, bench.worker("idle", GREEN, **many)
