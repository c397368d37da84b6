"""Owns how the state of a consumer and of a link becomes a value that can be shown.

It reads and changes nothing, and must never wait: it is called while handlers run. Called by `control`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from operator import attrgetter
from time import monotonic
from typing import Any

from greenconsume.admin.status import ConsumerStatus, LinkStatus, RunningHandler
from greenconsume.amqp.link import all_links as amqp_links
from greenconsume.consuming.engine import Engine, ensure_engine
from greenconsume.events import ConsumerState
from greenconsume.handling.jobs import Job
from greenconsume.handling.settings import Settings
from greenconsume.links.dialer import Dialer
from greenconsume.links.numbers import link_numbers
from greenconsume.links.pool import LinkPool
from greenconsume.links.session import Holding
from greenconsume.logs import redact
from greenconsume.runtime.child import Child
from greenconsume.tally import Timings

#: When one began that was at work before anybody looked.
_UNKNOWN = float("inf")


def status_of(child: Child, now: float) -> ConsumerStatus:
    """Return how a consumer fares."""
    tally = child.tally
    engine = ensure_engine(child.consumer) if child.consumer is not None else None
    rate, p50, p99 = _pace_of(tally.timings, now)
    in_progress, idle, running = _work_of(engine, now)
    waiting, unsettled, oldest, prefetch = _held_by(engine.holding if engine else None, now)
    settings = engine.handling.settings if engine and engine.handling else None
    return ConsumerStatus(
        name=child.name,
        group=child.group,
        state=_state_of(child, engine),
        queues=engine.queues if engine else (),
        concurrency=settings.concurrency if settings else None,
        prefetch=prefetch,
        in_progress=in_progress,
        idle=idle,
        waiting=waiting,
        unsettled=unsettled,
        oldest_unsettled=oldest,
        received=tally.received,
        outcomes=tally.outcomes,
        errors=dict(tally.errors),
        given_back=tally.given_back,
        stale_settles=tally.stale_settles,
        retries=tally.retries,
        dead_letters=tally.dead_letters,
        restarts=child.restart_count,
        switched_off=engine is not None and engine.switched_off,
        held=settings is not None and _is_held(settings),
        error=_error_of(child, engine),
        rate=rate,
        p50=p50,
        p99=p99,
        running=running,
        timings=tally.timings,
    )


def watch(child: Child, now: float) -> None:
    """Have the times of a consumer's handlers be kept; of those that run already, from now on. Idempotent."""
    if child.tally.timings is not None:
        return
    child.tally.watch()
    for job in _jobs_of(child):
        job.look(now)


def handlers_of(child: Child, now: float) -> tuple[RunningHandler, ...]:
    """Return all handlers of a consumer that run, the oldest first."""
    return tuple(_running(job, now) for job in sorted(_jobs_of(child), key=_began))


def links_of(pools: Iterable[LinkPool]) -> tuple[LinkStatus, ...]:
    """Return the links of some pools and those that plain connections have by themselves, by number."""
    now = monotonic()
    dialers = [dialer for pool in pools for dialer in pool.dialers]
    pooled = {id(dialer.link) for dialer in dialers}
    redis: Any = sys.modules.get(
        "greenconsume.redis.link"
    )  # it needs an extra, and may not be there
    single = [
        link
        for link in (*amqp_links, *(redis.all_links if redis is not None else ()))
        if link.connected and not link.is_closing and id(link) not in pooled
    ]
    numbers = iter(link_numbers.of([*dialers, *single]))
    found = [
        *(_place_of(dialer, next(numbers), now) for dialer in dialers),
        *(_link_of(link, next(numbers), 0, now) for link in single),
    ]
    return tuple(sorted(found, key=attrgetter("number")))


def _place_of(dialer: Dialer, number: int, now: float) -> LinkStatus:
    if dialer.link is not None and dialer.is_live:
        return _link_of(dialer.link, number, dialer.reconnect_count, now)
    uri, reconnects = redact(dialer.uri), dialer.reconnect_count
    return LinkStatus(uri, up=False, reconnects=reconnects, number=number)


def _link_of(link: Any, number: int, reconnects: int, now: float) -> LinkStatus:
    return LinkStatus(
        redact(link.uri),
        up=True,
        blocked=link.blocked,
        sessions=len(link.sessions),
        reconnects=reconnects,
        silent=now - link.last_read,
        heartbeat=link.heartbeat,
        number=number,
    )


def _jobs_of(child: Child) -> list[Job]:
    if child.consumer is None:
        return []
    handling = ensure_engine(child.consumer).handling
    return handling.running() if handling is not None else []


def _state_of(child: Child, engine: Engine | None) -> ConsumerState:
    """Return the state of a consumer; one that cannot know yet that its link is gone does not consume.

    While its handlers leave no room it waits for them, not for messages, and connects again after that.
    """
    state = child.state
    if state is not ConsumerState.CONSUMING or engine is None or engine.holding is None:
        return state
    return ConsumerState.CONNECTING if engine.holding.is_lost else state


def _pace_of(
    timings: Timings | None, now: float
) -> tuple[float | None, float | None, float | None]:
    """Return the rate of the last minute, and the median and the 99th percentile of its durations."""
    if timings is None:
        return None, None, None
    minute = timings.last_minute(now)
    if not minute.count:
        return 0.0, None, None
    return round(minute.rate, 3), _rounded(minute.quantile(0.5)), _rounded(minute.quantile(0.99))


def _work_of(engine: Engine | None, now: float) -> tuple[int, int, tuple[RunningHandler, ...]]:
    """Return how many handlers of a consumer run, how many more could, and the oldest that runs."""
    if engine is None or engine.handling is None:
        return 0, 0, ()
    handling = engine.handling
    jobs = handling.running()
    idle = 0
    if engine.life.state is ConsumerState.CONSUMING:
        idle, slots = handling.settings.concurrency or 1, handling.settings.shared.slots
        idle = max(0, idle - len(jobs) if slots is None else min(idle - len(jobs), slots.free))
    if not jobs:
        return 0, idle, ()
    return len(jobs), idle, (_running(min(jobs, key=_began), now),)


def _is_held(settings: Settings) -> bool:
    shared = settings.shared
    return bool(settings.rate or shared.pace or (shared.intake and shared.intake.halvings))


def _held_by(holding: Holding | None, now: float) -> tuple[int, int, float | None, int]:
    """Return how many messages wait and are unsettled, the oldest one's age, and how many may be."""
    if holding is None:
        return 0, 0, None, 0
    unsettled = holding.unsettled_count
    oldest = holding.oldest_unsettled_at if unsettled else None
    age = None if oldest is None else _rounded(now - oldest)
    return holding.backlog, unsettled, age, holding.prefetch_count


def _began(job: Job) -> float:
    return job.began or _UNKNOWN


def _running(job: Job, now: float) -> RunningHandler:
    seconds = round(now - job.began, 6) if job.began else None
    return RunningHandler(str(job.message.delivery_tag), seconds)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _error_of(child: Child, engine: Engine | None) -> str:
    """Return what ended a consumer, or why the broker does not let it consume."""
    if child.error is not None:
        return f"{type(child.error).__name__}: {_shortened(str(child.error))}"
    return _shortened(engine.refusals.reason) if engine is not None else ""


def _shortened(words: str) -> str:
    return " ".join(redact(words).split())[:200]
