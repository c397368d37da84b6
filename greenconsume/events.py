"""Owns the events of the package and the one seam that logs, metrics and tracing hang on.

Every part calls `emit` with a frozen event; hooks are subscribed by `logs` and by users. A hook is called
in the greenlet (or hub) that emits: it must not switch. One that fails is logged and does no harm.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger("greenconsume.events")


class ConsumerState(str, enum.Enum):
    """Where a consumer is in its life."""

    STARTING = "starting"
    CONNECTING = "connecting"
    CONSUMING = "consuming"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Event:
    """The root of all events."""


@dataclass(frozen=True, slots=True)
class LinkUp(Event):
    """A link to a broker was established. `uri` has no password."""

    uri: str


@dataclass(frozen=True, slots=True)
class LinkDown(Event):
    """A link was lost, with everything on it; `consumers` is how many used it."""

    uri: str
    error: BaseException
    consumers: int


@dataclass(frozen=True, slots=True)
class LinkBlocked(Event):
    """The broker blocked the link's publishers (`blocked`), or let them go on."""

    uri: str
    blocked: bool
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectFailed(Event):
    """An attempt to connect failed; the next one follows in `delay` seconds.

    `refused`: the broker answered and refused (credentials, virtual host), it is not merely away.
    """

    uri: str
    error: BaseException
    attempt: int
    delay: float
    refused: bool


@dataclass(frozen=True, slots=True)
class PollingTransport(Event):
    """A transport without a green one of its own is polled, every `interval` seconds at the most."""

    transport: str
    interval: float


@dataclass(frozen=True, slots=True)
class ConsumerChanged(Event):
    """A consumer went from one state to another."""

    consumer: str
    old: ConsumerState
    new: ConsumerState


@dataclass(frozen=True, slots=True)
class ConsumerRestarting(Event):
    """A consumer ended and is started again in `delay` seconds; `error` is None if it just returned."""

    consumer: str
    error: BaseException | None
    attempt: int
    delay: float


@dataclass(frozen=True, slots=True)
class ConsumerGivenUp(Event):
    """A consumer ended and is not started again, because its policy says so."""

    consumer: str
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class HandlerFailed(Event):
    """A callback raised; `outcome` is what becomes of its message, in words. Never holds the body."""

    consumer: str
    delivery_tag: Any
    routing_key: str
    error: BaseException
    outcome: str


@dataclass(frozen=True, slots=True)
class HandlerInterrupted(Event):
    """A running handler was told to end (`killed` False), or killed because it did not."""

    consumer: str
    delivery_tag: Any
    reason: str
    killed: bool


@dataclass(frozen=True, slots=True)
class ConsumerDrained(Event):
    """A consumer stopped: what became of the messages that it held."""

    consumer: str
    finished: int
    given_back: int
    cancelled: int
    killed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PrefetchTooSmall(Event):
    """A consumer's prefetch is below its concurrency: handlers will stand idle."""

    consumer: str
    prefetch: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class StaleSettle(Event):
    """A message was settled after its channel was gone; the broker has it back already."""

    delivery_tag: Any
    count: int


@dataclass(frozen=True, slots=True)
class DrainStarted(Event):
    """A runtime begins to stop its consumers."""

    consumers: int
    reason: str
    timeout: float


@dataclass(frozen=True, slots=True)
class DrainEscalated(Event):
    """A drain went one rung further down the ladder: `rung` says which, `reason` why."""

    rung: str
    consumers: int
    reason: str


@dataclass(frozen=True, slots=True)
class DrainFinished(Event):
    """A runtime has stopped: how many consumers stopped by themselves, and how many were killed.

    `cancelled_handlers` were cancelled or killed; their messages are the broker's again.
    """

    drained: int
    killed: int
    cancelled_handlers: int
    seconds: float


class Hook(Protocol):
    """What observes events: a callable that takes one, does not switch and does not raise."""

    def __call__(self, event: Event, /) -> None:
        """Observe `event`."""


_hooks: list[Hook] = []


def subscribe(hook: Hook) -> Callable[[], None]:
    """Have `hook` called with every event from now on.

    Returns:
        A function that ends the subscription.
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
