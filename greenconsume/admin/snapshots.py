"""Owns the bound on what looking costs: what was made is shown again for a while that follows from its cost.

Whatever number of pages and scrapers ask, at most one part in `REUSE` of the time goes into answers, or one
answer in `MAX_AGE`, where that takes more. It must never outlive a command: whoever gave one sees its effect
at once. Called by `app`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from time import monotonic, thread_time
from typing import Any

#: For so many times as long as it took to make it an answer is given again.
REUSE = 100.0
#: No answer is older than so many seconds.
MAX_AGE = 3.0
#: Answers that are kept at once.
_MAX_KEPT = 64


class Snapshots:
    """Keeps answers for as long as they may be given again."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[float, Any]] = {}

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returned lately for `key`, or returns now. Switches: as `make` does."""
        until, value = self._kept.get(key, (0.0, None))
        if monotonic() < until:
            return value
        began = thread_time()  # what it cost, not how long others had the machine meanwhile
        with _garbage_left():
            value = make()
        cost = thread_time() - began
        if len(self._kept) >= _MAX_KEPT:
            self._kept.clear()
        self._kept[key] = (monotonic() + min(MAX_AGE, REUSE * cost), value)
        return value

    def clear(self) -> None:
        """Forget all: something was changed. Never switches."""
        self._kept.clear()


@contextmanager
def _garbage_left() -> Iterator[None]:
    """Have no garbage collected meanwhile.

    An answer is tens of thousands of objects in no cycle. Each few hundred of them would have the collector
    look, and now and then at all that the process has: half of what the answer costs.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
