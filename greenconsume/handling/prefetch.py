"""Owns how many messages a consumer asks its broker for ahead: its own prefetch, or what its handlers need.

It must never set one itself. Called by `boundary`, before a consumer consumes.
"""

from __future__ import annotations

from collections.abc import Sequence

import kombu
from kombu import Consumer

from greenconsume.failures.delivery_limits import counts_returns
from greenconsume.failures.streams import is_stream
from greenconsume.handling.options import MAX_PREFETCH
from greenconsume.handling.pace import Pace
from greenconsume.handling.settings import Settings

#: The prefetch of callbacks that run inline, where the queue counts what goes back and none is set.
_INLINE_PREFETCH = 10


def chosen_prefetch(consumer: Consumer) -> int | None:
    """Return the prefetch that the consumer or its channel sets, if one does."""
    chosen: int | None = getattr(consumer, "prefetch_count", None)
    if chosen is None:
        chosen = getattr(consumer.channel, "prefetch_count", 0) or None
    return chosen


def wanted_prefetch(
    consumer: Consumer, settings: Settings, paces: Sequence[Pace]
) -> tuple[int | None, int | None]:
    """Return the prefetch that a consumer is to have, and the one that it sets itself; None: no bound.

    Args:
        consumer: It does not consume yet.
        settings: How its handlers run.
        paces: Its rate and that of its runtime, as far as there are any.
    """
    chosen = chosen_prefetch(consumer)
    if paces:
        most = min(pace.rate.most_unsettled for pace in paces)
        return (chosen if 0 < (chosen or 0) <= most else min(most, MAX_PREFETCH)), chosen
    if chosen is not None:
        return chosen, chosen
    queues = consumer.queues if isinstance(consumer, kombu.Consumer) else ()
    counted = any(map(counts_returns, queues))
    # A stream lets nobody consume without.
    if settings.concurrency is None and not counted and not any(map(is_stream, queues)):
        return None, None
    return min(_needed(settings, counted), MAX_PREFETCH), None


def _needed(settings: Settings, counted: bool) -> int:
    size, batch_size = settings.concurrency, settings.batch_size
    if size is None:
        return _INLINE_PREFETCH
    if batch_size is not None:
        return (size + 1) * batch_size  # for each batch that runs, and the next one
    # As much again as runs, so that the next message is at hand when a handler ends; but where each
    # way back is counted no more than is soon begun.
    return size + (max(1, size // 10) if counted else size)
