"""Owns the three answers to a probe: is the process live, is it ready, does something in it stand still.

Live never asks for a broker: one that is away must not have every process restarted. Ready is whether it does
its work. Stalled names what should move and does not. Called by `app`; emits no event.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic

from greenconsume.admin.status import ConsumerStatus, LinkStatus, ProcessStatus

#: Seconds for which messages may wait beside an idle handler: it is woken at the hub's next turn.
IDLE_SECONDS = 5.0
#: What a reader may be late, beyond the two heartbeats after which its link is lost.
_GRACE = 5.0
#: States of a consumer that is as somebody wanted it, though it consumes nothing: one that stands by takes
#: over when another is gone, one that is idle has cancelled itself.
_AS_WANTED = ("consuming", "idle", "paused", "standby", "stopped")


@dataclass(frozen=True, slots=True)
class Answer:
    """Yes, or the reasons why not."""

    reasons: tuple[str, ...] = ()

    @property
    def yes(self) -> bool:
        """True if there are no reasons against it."""
        return not self.reasons


def live(status: ProcessStatus) -> Answer:
    """Return whether the process can go on. That it answers at all says that its hub turns."""
    return Answer(tuple(_dead_readers(status.links)))


def ready(status: ProcessStatus) -> Answer:
    """Return whether every consumer consumes, no link is blocked, and the process does not drain."""
    reasons = [] if status.state == "running" else [f"the process is {status.state}"]
    reasons += [
        f"link {link.uri} is blocked: the broker takes no messages"
        for link in status.links
        if link.blocked
    ]
    reasons += _not_consuming(status.consumers)
    return Answer(tuple(reasons))


class StallWatch:
    """Tells which consumers stand still; it remembers what it saw, so one serves a process.

    Args:
        stall_after: Seconds after which a handler that still runs is told of; None: never.
    """

    def __init__(self, stall_after: float | None) -> None:
        self._stall_after = stall_after
        self._idle: dict[str, tuple[int, float]] = {}

    def stalled(self, status: ProcessStatus, now: float | None = None) -> Answer:
        """Return whether nothing stands still ("yes"), or what does. Never switches."""
        now = monotonic() if now is None else now
        found = [*self._long(status.consumers), *self._idle_beside(status.consumers, now)]
        return Answer(tuple(found))

    def _long(self, consumers: Iterable[ConsumerStatus]) -> Iterable[str]:
        if self._stall_after is None:
            return
        for consumer in consumers:
            late = [each for each in consumer.running if (each.seconds or 0) >= self._stall_after]
            if late:
                yield (
                    f"consumer {consumer.name}: the handler of message {late[0].message} has run for "
                    f"{late[0].seconds:.0f} s"
                )

    def _idle_beside(self, consumers: Iterable[ConsumerStatus], now: float) -> Iterable[str]:
        seen: dict[str, tuple[int, float]] = {}
        for consumer in consumers:
            if not _should_take(consumer):
                continue
            received, since = self._idle.get(consumer.name, (-1, now))
            if received != consumer.received:
                since = now  # it moved
            seen[consumer.name] = (consumer.received, since)
            if now - since >= IDLE_SECONDS:
                yield (
                    f"consumer {consumer.name}: {consumer.waiting} messages wait while {consumer.idle} "
                    f"handlers are idle, for {now - since:.0f} s"
                )
        self._idle = seen


def _should_take(consumer: ConsumerStatus) -> bool:
    return bool(
        consumer.waiting and consumer.idle and not consumer.held and consumer.state == "consuming"
    )


def _dead_readers(links: Iterable[LinkStatus]) -> Iterable[str]:
    for link in links:
        if not (link.up and link.heartbeat) or link.silent is None:
            continue
        if link.silent > 2 * link.heartbeat + _GRACE:
            yield f"the reader of link {link.uri} has not moved for {link.silent:.0f} s"


def _not_consuming(consumers: Iterable[ConsumerStatus]) -> list[str]:
    reasons = []
    for consumer in consumers:
        if consumer.switched_off:
            reasons.append(f"consumer {consumer.name}: its kill switch has tripped")
        elif consumer.state not in _AS_WANTED:
            because = f": {consumer.error}" if consumer.error else ""
            reasons.append(f"consumer {consumer.name} is {consumer.state}{because}")
    return reasons
