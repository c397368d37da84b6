"""Owns what the package keeps about one consumer: its name, stop signal, state and readiness.

The one state machine: the mixin enters the states, greenlets, supervisor and runtime read them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from gevent.event import Event

from greenconsume.events import ConsumerChanged, ConsumerState, emit
from greenconsume.stopping import Rungs, StopSignal
from greenconsume.tally import Tally

_ATTRIBUTE = "_greenconsume"
_numbers = count(1)


class Lifecycle:
    """One consumer's life; made when it is first asked for, and kept on the consumer itself."""

    __slots__ = (
        "_rungs",
        "around",
        "drain",
        "links",
        "name",
        "on_enter",
        "owned",
        "queues",
        "ready",
        "session",
        "slots",
        "state",
        "stop",
        "switch",
        "tally",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.stop = StopSignal()
        self.state = ConsumerState.STARTING
        self.ready = Event()  # set while consuming
        self.links: Any = None  # the LinkPool it connects over; None: one of its own
        self.drain: Any = None  # its handlers and how they end, once it connected
        self.around: tuple[Any, ...] = ()  # the options that its spawn and its runtime say
        self.slots: Any = None  # the places that a runtime's handlers share
        self.switch: Any = None  # its kill switch, while it runs
        self.tally = Tally()  # a runtime's consumer has the same one through all its restarts
        self.queues: tuple[str, ...] = ()  # those that it consumes from, or did last
        self.session: Any = None  # its share of an AMQP link, while it consumes
        self._rungs: Rungs | None = None
        self.on_enter: Callable[[], object] | None = (
            None  # its supervisor is told of each new state
        )
        self.owned = False  # it runs in a ConsumerGreenlet: no foreign code below it on the stack

    @property
    def leave(self) -> StopSignal:
        """The signal that ends consuming: the stop signal, or the kill switch's, which a stop sets, too."""
        leave: StopSignal = self.stop if self.switch is None else self.switch.leave
        return leave

    @property
    def rungs(self) -> Rungs:
        """The signals that hurry its drain; a runtime's consumers share them."""
        if self._rungs is None:
            self._rungs = Rungs()
        return self._rungs

    @rungs.setter
    def rungs(self, rungs: Rungs) -> None:
        self._rungs = rungs

    def enter(self, state: ConsumerState) -> None:
        """Go to `state` and tell the hooks; entering the present one is no event. Never switches."""
        old, self.state = self.state, state
        if state is ConsumerState.CONSUMING:
            self.ready.set()
        else:
            self.ready.clear()
        if old is not state:
            if self.on_enter is not None:
                self.on_enter()
            emit(ConsumerChanged(self.name, old, state))


def lifecycle_of(consumer: object) -> Lifecycle:
    """Return the consumer's lifecycle, making it on first use: users' `__init__` need not call ours."""
    found = vars(consumer).get(_ATTRIBUTE)
    if found is None:
        name = f"{type(consumer).__name__}-{next(_numbers)}"
        found = vars(consumer)[_ATTRIBUTE] = Lifecycle(name)
    assert isinstance(found, Lifecycle)
    return found
