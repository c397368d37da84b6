"""Owns how the state of a consumer and of a link becomes a value that can be shown.

It reads and changes nothing, and must never wait: it is called while handlers run. Called by `control`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from heapq import nsmallest
from time import monotonic
from typing import Any

from greenconsume.admin.status import ConsumerStatus, LinkStatus, RunningHandler
from greenconsume.amqp.link import all_links as amqp_links
from greenconsume.consuming.engine import Engine, ensure_engine
from greenconsume.events import ConsumerState
from greenconsume.handling.jobs import Job
from greenconsume.links.dialer import Dialer
from greenconsume.links.pool import LinkPool
from greenconsume.links.session import Holding
from greenconsume.logs import redact
from greenconsume.runtime.child import Child

#: Handlers of one consumer that its status holds; all of them are asked for by its name.
SHOWN_HANDLERS = 3

#: When one began that was at work before anybody looked.
_UNKNOWN = float("inf")


def status_of(child: Child, now: float) -> ConsumerStatus:
    """Return how a consumer fares."""
    tally = child.tally
    engine = ensure_engine(child.consumer) if child.consumer is not None else None
    minute = tally.timings.last_minute(now) if tally.timings is not None else None
    known: dict[str, Any] = _work_of(engine, now) if engine is not None else {}
    if minute is not None:
        known.update(
            rate=round(minute.rate, 3),
            p50=_rounded(minute.quantile(0.5)),
            p99=_rounded(minute.quantile(0.99)),
        )
    return ConsumerStatus(
        name=child.name,
        group=child.group,
        state=child.state.value,
        received=tally.received,
        outcomes=tally.outcomes,
        errors=dict(tally.errors),
        given_back=tally.given_back,
        stale_settles=tally.stale_settles,
        retries=tally.retries,
        dead_letters=tally.dead_letters,
        restarts=child.restart_count,
        error=_words(child.error),
        timings=tally.timings,
        **known,
    )


def handlers_of(child: Child, now: float) -> tuple[RunningHandler, ...]:
    """Return all handlers of a consumer that run, the oldest first."""
    if child.consumer is None:
        return ()
    handling = ensure_engine(child.consumer).handling
    jobs = handling.running() if handling is not None else []
    return tuple(_running(job, now) for job in sorted(jobs, key=_began))


def links_of(pools: Iterable[LinkPool]) -> tuple[LinkStatus, ...]:
    """Return the links of some pools, and after them those that plain connections have by themselves."""
    now = monotonic()
    dialers = [dialer for pool in pools for dialer in pool.dialers]
    pooled = {id(dialer.link) for dialer in dialers}
    redis: Any = sys.modules.get(
        "greenconsume.redis.link"
    )  # it needs an extra, and may not be there
    single: list[Any] = [*amqp_links, *(redis.all_links if redis is not None else ())]
    return (
        *(_place_of(dialer, now) for dialer in dialers),
        *(
            _link_of(link, 0, now)
            for link in single
            if link.connected and not link.is_closing and id(link) not in pooled
        ),
    )


def _place_of(dialer: Dialer, now: float) -> LinkStatus:
    if dialer.link is None or not dialer.is_live:
        return LinkStatus(redact(dialer.uri), up=False, reconnects=dialer.reconnect_count)
    return _link_of(dialer.link, dialer.reconnect_count, now)


def _link_of(link: Any, reconnects: int, now: float) -> LinkStatus:
    return LinkStatus(
        redact(link.uri),
        up=True,
        blocked=link.blocked,
        sessions=len(link.sessions),
        reconnects=reconnects,
        silent=now - link.last_read,
        heartbeat=link.heartbeat,
    )


def _work_of(engine: Engine, now: float) -> dict[str, Any]:
    """Return what the handlers of a consumer that connects or consumes do, and what waits for them."""
    handling = engine.handling
    known: dict[str, Any] = {"queues": engine.queues}
    if handling is None:
        return known
    settings, jobs = handling.settings, handling.running()
    free = (settings.concurrency or 1) - len(jobs)
    shared = settings.shared
    if shared.slots is not None:
        free = min(free, shared.slots.free)
    known.update(
        concurrency=settings.concurrency,
        held=bool(settings.rate or shared.pace or (shared.intake and shared.intake.halvings)),
        in_progress=len(jobs),
        idle=max(0, free) if engine.life.state is ConsumerState.CONSUMING else 0,
        running=tuple(_running(job, now) for job in nsmallest(SHOWN_HANDLERS, jobs, key=_began)),
    )
    if engine.holding is not None:
        known.update(_held_by(engine.holding, now))
    return known


def _held_by(holding: Holding, now: float) -> dict[str, Any]:
    oldest = holding.oldest_unsettled_at
    return {
        "waiting": holding.backlog,
        "unsettled": holding.unsettled_count,
        "oldest_unsettled": None if oldest is None else _rounded(now - oldest),
        "prefetch": holding.prefetch_count,
    }


def _began(job: Job) -> float:
    return job.began or _UNKNOWN


def _running(job: Job, now: float) -> RunningHandler:
    seconds = now - job.began if job.began else None
    return RunningHandler(str(job.message.delivery_tag), _rounded(seconds))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _words(error: BaseException | None) -> str:
    if error is None:
        return ""
    return f"{type(error).__name__}: {' '.join(redact(str(error)).split())}"[:200]
