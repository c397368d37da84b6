"""Owns the one way in which a test waits for something that tells nobody when it happens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

import gevent

T = TypeVar("T")

#: Seconds between two looks, at first and after a while: what is waited for needs the machine more.
POLL_SECONDS, LONGEST_POLL_SECONDS = 0.002, 0.02
#: Seconds in which that which happens at once has happened, also on a machine that is busy for a moment.
AT_ONCE = 10.0
#: Seconds of a deadline that no test lives to see: what ends by it has not ended `AT_ONCE`.
NEVER = 60.0


def wait_until(predicate: Callable[[], T | None], within: float = 30.0, message: str = "") -> T:
    """Poll `predicate`, every few milliseconds at first, until it is true, and return what it returned.

    Args:
        predicate: Called in this greenlet; what it raises is not caught.
        within: Seconds after which to give up. The predicate is called once more at the end.
        message: What was waited for; without it, the failure shows the predicate's source.

    Raises:
        AssertionError: The predicate was still false; tells its last value.

    Switches: yes.
    """
    began = monotonic()
    while True:
        waited = monotonic() - began
        late = waited >= within
        value = predicate()
        if value:
            return value
        if late:
            what = message or _source(predicate)
            raise AssertionError(f"not within {within:g} s: {what} (last value: {value!r})")
        gevent.sleep(min(max(POLL_SECONDS, waited / 20), LONGEST_POLL_SECONDS))


def _source(predicate: Callable[[], object]) -> str:
    try:
        return " ".join(inspect.getsource(predicate).split())
    except (OSError, TypeError):
        return repr(predicate)
