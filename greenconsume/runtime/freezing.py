"""Owns taking what a started process consists of out of the collector's sight. Called by `runtime`."""

from __future__ import annotations

import gc
from time import monotonic

from greenconsume.events import GarbageFrozen, emit


def freeze_garbage() -> None:
    """Collect once more, then have the collector pass over everything that exists now, for good.

    With hundreds of consumers a full collection looks at a million objects and holds up every greenlet for
    50 to 200 ms. It takes one such pause, now. What is frozen is freed by its reference count as ever, but
    where it becomes part of a cycle later it stays: what the consumers of today leave behind when they
    restart. New objects are collected as before.

    Switches: no.
    """
    began = monotonic()
    gc.collect()
    gc.freeze()
    emit(GarbageFrozen(gc.get_freeze_count(), monotonic() - began))
