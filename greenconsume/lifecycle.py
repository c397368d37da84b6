"""Owns what everything that concerns one consumer has to know: its name, stop signal, state and readiness.

The one state machine: the engine enters the states, greenlets, supervisor and runtime read them. It must know
nothing of handlers or links.
"""

from __future__ import annotations

from collections.abc import Callable

from gevent.event import Event

from greenconsume.events import ConsumerChanged, ConsumerState, emit
from greenconsume.stopping import Rungs, StopSignal
from greenconsume.tally import Tally


class Lifecycle:
    """One consumer's life.

    Attributes:
        name: What logs and events call it.
        stop: Ends it, in an orderly way.
        consume_stop: Ends consuming: the stop signal, or that of a kill switch, which a stop sets as well.
        state: Where it is.
        ready: Set while it consumes.
        tally: What becomes of its messages; a runtime's consumer has one through all its restarts.
        on_enter: Called after each change of the state; for its supervisor.
        on_refused: Called with the error and the remedy when the broker refuses what it declares, and no
            waiting mends that; returns whether it is raised to somebody.
    """

    __slots__ = (
        "_rungs",
        "consume_stop",
        "name",
        "on_enter",
        "on_refused",
        "ready",
        "state",
        "stop",
        "tally",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.stop = self.consume_stop = StopSignal()
        self.state = ConsumerState.STARTING
        self.ready = Event()
        self.on_enter: Callable[[], object] | None = None
        self.on_refused: Callable[[BaseException, str], bool] | None = None
        self.tally = Tally()
        self._rungs: Rungs | None = None

    def consume_until(self, signal: StopSignal | None) -> None:
        """Have `signal` end consuming; with None, the stop signal again. Never switches."""
        self.consume_stop = self.stop if signal is None else signal

    @property
    def rungs(self) -> Rungs:
        """The signals that hurry its drain; a runtime's consumers share them."""
        if self._rungs is None:
            self._rungs = Rungs()
        return self._rungs

    @rungs.setter
    def rungs(self, rungs: Rungs) -> None:
        self._rungs = rungs

    def refuse(self, error: BaseException, remedy: str) -> bool:
        """Tell its supervisor of a refusal; return whether that raises it. Never switches."""
        return self.on_refused is not None and self.on_refused(error, remedy)

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
