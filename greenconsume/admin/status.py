"""Owns what a process tells of itself, as values, and what may be asked of it: every surface shows these.

It must never hold a message's body, headers, routing key or id. Made by whoever runs consumers (`runtime`);
shown by the page, the metrics, the health answers and the commands.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

from greenconsume.tally import PublishTally, Timings


class RunningHandler(NamedTuple):
    """A handler at work.

    Attributes:
        message: The delivery tag of its message; of a batch, the first one's.
        seconds: For how long it has run, or since somebody looked first; None: nobody has yet.
    """

    message: str
    seconds: float | None


class ConsumerStatus(NamedTuple):
    """One consumer of a process; a tuple, for thousands are made at each look, in a fifth of the time.

    Attributes:
        name: Its name, through all restarts.
        group: What it was spawned from, with its replicas: what can be scaled.
        state: A `ConsumerState`.
        queues: The names of the queues that it consumes from.
        concurrency: How many handlers run at once; None: inline, one.
        prefetch: What the broker may send ahead; 0: without a limit.
        in_progress: How many handlers run.
        idle: How many more could start now: 0 also where a bound that it shares with others is used up.
        waiting: Deliveries that wait in its inbox; 0 where the transport has none (`memory://`, polled ones).
        unsettled: Deliveries that are not settled.
        oldest_unsettled: The age of the oldest of these, in seconds.
        received: Messages that reached it, since the process began, as all that follow.
        outcomes: How many messages' handlers ended in which way; a batch counts as its messages.
        errors: How many messages failed, by the name of the exception's class.
        given_back: Messages that went back before a handler had started.
        stale_settles: Messages that were settled after their channel was gone.
        retries: Messages that are tried again later.
        dead_letters: Messages that were put where failed ones are kept.
        restarts: How often it was started again.
        switched_off: Its kill switch has tripped.
        held: Something lets it take less than it could: its rate, or a hub that lags behind.
        error: What ended it last, or why the broker does not let it consume, in words.
        rate: Handled messages a second, in the last minute; None while nobody has looked before.
        p50: The median of the seconds that its handlers took in the last minute.
        p99: What 99 of 100 of them did not exceed.
        running: The handler that has run for longest, if one runs; all of them are asked for by its name.
        timings: What the rate and the quantiles come from; no part of the JSON.
    """

    name: str
    group: str
    state: str
    queues: tuple[str, ...] = ()
    concurrency: int | None = None
    prefetch: int = 0
    in_progress: int = 0
    idle: int = 0
    waiting: int = 0
    unsettled: int = 0
    oldest_unsettled: float | None = None
    received: int = 0
    outcomes: dict[str, int] | None = None
    errors: dict[str, int] | None = None
    given_back: int = 0
    stale_settles: int = 0
    retries: int = 0
    dead_letters: int = 0
    restarts: int = 0
    switched_off: bool = False
    held: bool = False
    error: str = ""
    rate: float | None = None
    p50: float | None = None
    p99: float | None = None
    running: tuple[RunningHandler, ...] = ()
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """A link to a broker.

    Attributes:
        uri: The broker's address, without its password.
        up: It is connected.
        blocked: The broker blocks its publishers.
        sessions: How many consumers and publishers use it.
        reconnects: How often it was connected again.
        silent: Seconds since its reader last read something; None if nothing is to be expected.
        heartbeat: The seconds of its heartbeat; 0: none.
        number: What tells it apart from the process's other links; it keeps it while it is shown.
    """

    uri: str
    up: bool
    blocked: bool = False
    sessions: int = 0
    reconnects: int = 0
    silent: float | None = None
    heartbeat: float = 0.0
    number: int = 1


@dataclass(frozen=True, slots=True)
class LagStatus:
    """The lateness of the hub in the last minute, in seconds."""

    p50: float | None = None
    p99: float | None = None
    longest: float = 0.0
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """A process: its consumers, its links, its hub.

    Attributes:
        state: `starting`, `running`, `draining` or `stopped`.
        started: When it started, in seconds since the epoch.
        uptime: For how many seconds it has been running.
        intake: The part of their prefetch that its consumers take; below 1.0 while its hub lags behind.
    """

    name: str
    pid: int
    version: str
    state: str
    started: float
    uptime: float
    consumers: tuple[ConsumerStatus, ...] = ()
    links: tuple[LinkStatus, ...] = ()
    lag: LagStatus = LagStatus()
    intake: float = 1.0
    greenlets: int = 0
    published: tuple[PublishTally, ...] = ()


class Process(Protocol):
    """A process, as the admin sees and steers it. Nothing of it waits, but where it says so."""

    def status(self) -> ProcessStatus:
        """Return what is so now. Never switches."""

    def watch(self) -> None:
        """Keep times from now on, for somebody looks. Idempotent; never switches."""

    def handlers_of(self, consumer: str) -> tuple[RunningHandler, ...]:
        """Return all handlers of one consumer that run.

        Raises:
            UnknownConsumerError: There is none of that name.
        """

    def pause(self, consumer: str) -> None:
        """Have a consumer take no more messages until `resume`; what runs ends. Only signals.

        Raises:
            UnknownConsumerError: There is none of that name.
            ControlError: It cannot be paused.
        """

    def resume(self, consumer: str) -> None:
        """Have a consumer that was paused consume again. Only signals. Raises as `pause`."""

    def stop_consumer(self, consumer: str) -> None:
        """Drain a consumer, for good. Only signals. Raises as `pause`."""

    def restart_consumer(self, consumer: str) -> None:
        """Drain a consumer, and start it again. Only signals. Raises as `pause`."""

    def scale(self, group: str, replicas: int) -> None:
        """Have so many replicas of what was spawned: add some, or drain the last. Only signals.

        Raises:
            UnknownConsumerError: Nothing of that name was spawned.
            ControlError: It cannot have so many.
        """

    def stop(self, reason: str = "stop") -> None:
        """Drain all. Only signals."""


def to_json(status: ProcessStatus, **more: object) -> bytes:
    """Return a status as one JSON object, with `more` keys. Never switches."""
    shown = {
        **_plain(status),
        "consumers": [_shown(each) for each in status.consumers],
        "links": [_plain(each) for each in status.links],
        "lag": _plain(status.lag),
        "published": [each.shown() for each in status.published],
        **more,
    }
    return _encode(shown).encode()


# Of values without circles, so that none is looked for: a sixth of the time.
_encode = json.JSONEncoder(separators=(",", ":"), default=str, check_circular=False).encode


def _shown(consumer: ConsumerStatus) -> dict[str, Any]:
    shown: dict[str, Any] = dict(zip(ConsumerStatus._fields, consumer, strict=True))
    del shown["timings"]
    if consumer.running:
        shown["running"] = [each._asdict() for each in consumer.running]
    return shown


def _plain(value: ProcessStatus | LinkStatus | LagStatus) -> dict[str, Any]:
    # Not `dataclasses.asdict`, which copies all that is below.
    names = (field.name for field in fields(value) if field.name != "timings")
    return {name: getattr(value, name) for name in names}
