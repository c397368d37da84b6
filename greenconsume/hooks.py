"""Owns the one seam that logs, metrics and tracing hang on: hooks, which are called with every event.

Every part calls `emit` with a frozen event of `events`; hooks are subscribed by `logs` and by users. A
hook is called in the greenlet (or hub) that emits: it must not switch. One that fails is logged and does no
harm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

logger = logging.getLogger("greenconsume.events")


@dataclass(frozen=True, slots=True)
class Event:
    """The root of all events."""


class Hook(Protocol):
    """An observer of events: a callable that takes one, does not switch and does not raise."""

    def __call__(self, event: Event, /) -> None:
        """Observe `event`."""


_hooks: list[Hook] = []


def subscribe(hook: Hook) -> Callable[[], None]:
    """Have `hook` called with every event from now on.

    Args:
        hook: Called in the greenlet, or the hub, that tells of the event; it must not switch.

    Returns:
        A function that ends the subscription.

    Switches: never. From any greenlet or thread.
    """
    _hooks.append(hook)

    def unsubscribe() -> None:
        if hook in _hooks:
            _hooks.remove(hook)

    return unsubscribe


def emit(event: Event) -> None:
    """Tell every hook of `event`. Never raises, never switches."""
    for hook in tuple(_hooks):
        try:
            hook(event)
        except Exception:  # a broken observer must not break what it observes
            logger.exception("the hook %r failed on %s", hook, type(event).__name__)
