"""Owns which consumer is started again, when, and how all of them are brought to their end.

One greenlet serves every consumer of a runtime: it sleeps until one ends, a restart is due or the stop
signal is set, and then runs the drain. It must never run a consumer, nor what makes one, itself.
Called by `runtime` alone. A failure restarts the consumer that failed and no other::

    supervisor greenlet
    ├─ ConsumerGreenlet   ends with an error: restarted after a backoff, up to max_restarts in a period,
    ├─ ConsumerGreenlet   then given up; its siblings live on
    └─ …
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from time import monotonic

import gevent
from gevent.event import Event
from gevent.pool import Group

from greenconsume.consuming.engine import Engine, ensure_engine
from greenconsume.errors import InvalidConsumerError
from greenconsume.events import (
    ConsumerGivenUp,
    ConsumerRestarting,
    ConsumerState,
    DrainEscalated,
    DrainStarted,
    Outcome,
    emit,
)
from greenconsume.handling.drain import LAST
from greenconsume.handling.options import ConsumerOptions
from greenconsume.handling.shared import Shared
from greenconsume.links.pool import LinkPool
from greenconsume.runtime.child import Child, Wanted
from greenconsume.runtime.greenlet import ConsumerGreenlet
from greenconsume.runtime.restart_policy import RestartPolicy
from greenconsume.stopping import Deadline, Rungs, StopSignal, wait

#: Seconds that a consumer has beyond the deadlines of its handlers, to say goodbye to its broker (one that is
#: cut short may have acks lost on the way); what is killed then has `LAST`.
_GOODBYE = 0.7
#: Consumers that are set up at once where more start: what one needs meanwhile is the next one's then.
_AT_ONCE = 400
#: Seconds that the next ones wait for these; where that is too short, all others start at once.
_PATIENCE = 2.0
#: What may be wanted of a consumer that is not to run.
_UNWANTED = (Wanted.PAUSED, Wanted.RETIRED)


class Supervisor:
    """Restarts the consumers of a runtime until it stops, then drains them.

    Attributes:
        failed: The consumers that were given up before a stop was asked for.
        exhausted: Those of them that used up their restarts.
        changed: Set whenever a consumer went to another state, or has ended and it was decided what
            becomes of it.
        closed: Draining, or past it: nothing is started any more.
    """

    def __init__(
        self,
        policy: RestartPolicy,
        stop: StopSignal,
        links: LinkPool,
        rungs: Rungs | None = None,
        options: ConsumerOptions | None = None,
        shared: Shared | None = None,
        on_refused: Callable[[str, BaseException, str], bool] | None = None,
    ) -> None:
        self.failed: list[Child] = []
        self.exhausted: list[Child] = []
        self.changed = Event()
        self.closed = False
        self._policy = policy
        self._stop = stop
        self._links = links
        self._rungs = rungs or Rungs()
        self._options, self._shared = options, shared or Shared()
        self._on_refused = on_refused
        self._live: set[Child] = set()
        self._drained: tuple[Child, ...] = ()
        self._ended_before = Outcome()  # of consumers that ended by themselves
        self._ended: deque[Child] = deque()
        self._due: list[tuple[float, int, Child]] = []
        self._numbers = count()  # children that are due at the same time have no order
        self._makers = Group()
        self._adding = 0
        self._empty = True
        self._held = False
        self._wake = Event()

    def add(self, children: Iterable[Child]) -> None:
        """Make and start consumers; unless a stop is asked for, which ends it early.

        Raises:
            Exception: What the class or factory of one raised; those before it have started.

        Switches: if a class or factory does.
        """
        self._adding += 1
        setting_up: list[Child] = []
        in_turn = True
        try:
            for child in children:
                if in_turn and len(setting_up) == _AT_ONCE:
                    in_turn = self._await_half(setting_up)
                if self.closed or self._stop.is_set():
                    break
                self._launch(child)
                setting_up.append(child)
        finally:
            self._adding -= 1
            self._wake.set()

    def _await_half(self, setting_up: list[Child]) -> bool:
        """Wait until the first half of these has been set up; return False if that takes too long.

        Switches: yes, unless they are.
        """
        last = setting_up[_AT_ONCE // 2 - 1]
        del setting_up[: _AT_ONCE // 2]
        if not last.started and last.greenlet is not None:
            last.greenlet.ready.wait(_PATIENCE)
        return last.started

    def run(self) -> None:
        """Restart what ends, until the stop signal is set or every consumer has ended for good.

        Before the first consumer was added, and while one is being added, it does not return.

        Switches: yes. In the supervisor greenlet.
        """
        while not self._stop.is_set():
            self._wake.clear()  # first, so that what comes from now on wakes it again
            self._settle_ended()
            self._launch_due()
            if self._idle():
                return
            wait(self._wake, Deadline(self._until_due()), self._stop)

    def hold(self) -> None:
        """Go on without any consumer until the stop signal: an operator stopped some, and may want them."""
        self._held = True

    def start_soon(self, children: Iterable[Child]) -> None:
        """Make and start consumers elsewhere; one that cannot be made is restarted as if it had failed.

        Switches: never. From any greenlet.
        """
        for child in children:
            heapq.heappush(self._due, (monotonic(), next(self._numbers), child))
        self._wake.set()

    def retire(self, child: Child, reason: str, wanted: Wanted = Wanted.RETIRED) -> None:
        """Drain a consumer for good, also one that is paused or waits for a restart. Switches: never."""
        waits = child.resting or self._forget_due(child)
        child.stop_to_be(wanted, reason)
        if waits:
            child.enter(ConsumerState.STOPPED)
            self._end(child, given_up=False)

    def restart(self, child: Child) -> None:
        """Drain a consumer and start it again, or start one again that has ended. Switches: never."""
        if child in self._live:
            child.stop_to_be(Wanted.RESTARTED, "restart")
            return
        self._forget_due(child)
        for given_up in (self.failed, self.exhausted):
            if child in given_up:
                given_up.remove(child)
        child.reset(keep_count=True)
        child.restart_count += 1
        self.start_soon([child])

    def pause(self, child: Child) -> None:
        """Drain a consumer, and keep it for `resume`. Switches: never."""
        self.hold()
        waits = self._forget_due(child)
        child.stop_to_be(Wanted.PAUSED, "pause")
        if waits:
            child.enter(ConsumerState.PAUSED)

    def resume(self, child: Child) -> None:
        """Start a consumer again that was paused, once it has drained. Switches: never."""
        rests, child.wanted = child.resting, Wanted.RESUMED
        if rests:
            self.start_soon([child])

    def drain(
        self, timeout: float, cancel_timeout: float, announced: float | None = None
    ) -> tuple[int, int]:
        """Stop every consumer; kill those that still run soon after both timeouts, or the kill rung.

        Each consumer drains its own handlers, up to the same deadlines unless it has others of its own. What
        is killed here is a consumer that hangs elsewhere.

        Args:
            timeout: Seconds that handlers have to end by themselves.
            cancel_timeout: Seconds that they have after they were cancelled.
            announced: Seconds that `DrainStarted` tells of, if a stop was asked for; None: it is not emitted.

        Returns:
            How many ended by themselves, and how many were killed.

        Switches: yes. In the supervisor greenlet.
        """
        self.closed = True
        self.changed.set()
        self._due.clear()
        reason = self._stop.reason or "stop"
        if self._makers:
            self._makers.kill(timeout=cancel_timeout)
        self._settle_ended()
        running = len(self._live)
        self._drained = tuple(self._live)
        if announced is not None and self._stop.is_set():
            emit(DrainStarted(running, reason, announced))
        for child in self._drained:
            child.stop(reason)
        self._follow_down(timeout, cancel_timeout)
        killed = len(self._live)
        if killed:
            self._kill(self._rungs.kill.reason or "both timeouts of the drain are over")
        return running - killed, killed

    def _follow_down(self, timeout: float, cancel_timeout: float) -> None:
        """Follow the consumers down their ladders, which they go by themselves."""
        for name, rung, seconds, hurry in (
            ("drain_timeout", "cancel the handlers that still run", timeout, self._rungs.cancel),
            (
                "cancel_timeout",
                "kill the handlers that still run",
                cancel_timeout,
                self._rungs.kill,
            ),
        ):
            used = (each.handling for each in self._drained_engines)
            own = [getattr(each.settings, name) for each in used if each is not None]
            longest = max([seconds, *own])
            self._await_ended(Deadline(longest), hurry)
            if self._live:
                why = hurry.reason or f"{name} of {longest:g} s is over"
                emit(DrainEscalated(rung, len(self._live), why))
        self._await_ended(Deadline(_GOODBYE), None)

    @property
    def outcome(self) -> Outcome:
        """The sum of what became of the messages that its consumers held when the drain began."""
        return sum((each.outcome for each in self._drained_engines), self._ended_before)

    @property
    def _drained_engines(self) -> list[Engine]:
        """The engines of the consumers that were stopped."""
        consumers = {id(child.consumer): child.consumer for child in self._drained}
        return [ensure_engine(consumer) for consumer in consumers.values()]

    def _kill(self, reason: str) -> None:
        emit(DrainEscalated("kill what is left", len(self._live), reason))
        gevent.killall([child.greenlet for child in self._live], block=False)
        self._await_ended(Deadline(LAST), None)

    def _await_ended(self, deadline: Deadline, hurry: StopSignal | None) -> None:
        while True:
            self._wake.clear()
            self._settle_ended()
            if not self._live or deadline.expired or (hurry is not None and hurry.is_set()):
                return
            wait(self._wake, deadline, hurry)

    def _launch(self, child: Child) -> None:
        greenlet = child.make()
        engine = ensure_engine(greenlet.consumer)
        engine.join_fleet(self._links, self._rungs, self._shared)
        engine.surround(child.options, self._options)
        engine.life.on_enter = self.changed.set
        if self._on_refused is not None:
            engine.life.on_refused = partial(self._on_refused, child.name)
        try:  # now, for it would else be found out when it has connected
            engine.settings()
        except InvalidConsumerError:
            engine.owned = False  # by a greenlet that will not start
            raise
        if self.closed or child.wanted in _UNWANTED:  # the stop came while it was being made
            child.stop(self._stop.reason or "stop")
        self._empty = False
        self._live.add(child)
        greenlet.rawlink(partial(self._on_end, child))
        greenlet.start()

    def _on_end(self, child: Child, _greenlet: ConsumerGreenlet) -> None:
        """Leave what follows to the supervisor greenlet: this is the hub."""
        self._ended.append(child)
        self._wake.set()

    def _settle_ended(self) -> None:
        while self._ended:
            child = self._ended.popleft()
            self._live.discard(child)
            assert child.greenlet is not None
            self._settle(child, child.greenlet.exception)

    def _settle(self, child: Child, error: BaseException | None) -> None:
        child.error = error
        closing = self.closed or self._stop.is_set()
        if not closing and self._settle_wanted(child):
            return
        stopping = closing or child.stopping
        if stopping or not self._policy.restarts(error):
            self._end(child, given_up=error is not None)
            return
        delay = child.next_delay(self._policy)
        if delay is None:
            self.exhausted.append(child)
            self._end(child, given_up=True)
            return
        emit(ConsumerRestarting(child.name, error, child.restart_count, delay))
        heapq.heappush(self._due, (monotonic() + delay, next(self._numbers), child))

    def _settle_wanted(self, child: Child) -> bool:
        """Do what an operator wants of a consumer that has ended; return whether he wants something."""
        if child.wanted in (Wanted.RESTARTED, Wanted.RESUMED):
            child.restart_count += child.wanted is Wanted.RESTARTED
            self.start_soon([child])
        elif child.wanted is Wanted.PAUSED:
            child.enter(ConsumerState.PAUSED)
            self.changed.set()
        else:
            return False
        return True

    def _end(self, child: Child, given_up: bool) -> None:
        child.ended, child.given_up = True, given_up
        if not self.closed and child.greenlet is not None:
            self._ended_before += ensure_engine(child.greenlet.consumer).outcome
        if given_up:
            if not (self.closed or self._stop.is_set()):
                self.failed.append(child)
            emit(ConsumerGivenUp(child.name, child.error))
        self.changed.set()

    def _launch_due(self) -> None:
        while self._due and self._due[0][0] <= monotonic():
            child = heapq.heappop(self._due)[2]
            # Made elsewhere: a class or factory may wait, and the others shall not wait for it.
            self._adding += 1
            self._makers.spawn(self._relaunch, child)

    def _relaunch(self, child: Child) -> None:
        try:
            if child.wanted in _UNWANTED:  # since it was due
                self._settle(child, None)
            else:
                self._launch(child)
        except (Exception, SystemExit) as error:  # a failure like any other of this consumer
            self._settle(child, error)
        finally:
            self._adding -= 1
            self._wake.set()

    def _forget_due(self, child: Child) -> bool:
        """Have a consumer not be started again by itself; return whether it would have been."""
        kept = [each for each in self._due if each[2] is not child]
        was_due = len(kept) < len(self._due)
        self._due = kept
        heapq.heapify(self._due)
        return was_due

    def _idle(self) -> bool:
        return not (self._held or self._empty or self._adding or self._live or self._due)

    def _until_due(self) -> float | None:
        return max(0.0, self._due[0][0] - monotonic()) if self._due else None
