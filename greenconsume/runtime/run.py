"""Owns one start of a runtime, up to its end: its links, its supervisor and the greenlet of both.

It must never decide when to stop, nor log: it tells observers. Called by `runtime` alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic

import gevent

from greenconsume import hub
from greenconsume.errors import RestartLimitError
from greenconsume.events import DrainFinished, emit
from greenconsume.handling.options import ConsumerOptions
from greenconsume.handling.shared import Shared
from greenconsume.links.pool import LinkPool
from greenconsume.runtime.bound import DrainBound, hurried
from greenconsume.runtime.child import Child
from greenconsume.runtime.hub_watch import watched_hub
from greenconsume.runtime.restart_policy import RestartPolicy
from greenconsume.runtime.starting import Starting
from greenconsume.runtime.supervisor import Supervisor
from greenconsume.stopping import Deadline, Rungs, StopSignal


class Run:
    """One start of a runtime.

    Args:
        stop: Ends it, in an orderly way.
        restart: By which its consumers are started again.
        link_count: How many links to each broker they share.
        options: What holds for consumers that do not say otherwise.
        shared: The limits for all of their handlers together.
        block_warning: As `Runtime` has it.

    Attributes:
        rungs: What hurries its drain.
        shared: As given.
        supervisor: What restarts its consumers.
        abandoned: True once its drain has cancelled or killed something.
    """

    def __init__(
        self,
        stop: StopSignal,
        restart: RestartPolicy,
        link_count: int,
        options: ConsumerOptions,
        shared: Shared,
        block_warning: float | None,
    ) -> None:
        self.rungs = Rungs()
        self.shared = shared
        self.abandoned = False
        self._stop = stop
        self._restart = restart
        self._timeouts = (options.value_of("drain_timeout"), options.value_of("cancel_timeout"))
        self._block_warning = block_warning
        self._bound: DrainBound | None = None
        self._at_end: list[Callable[[], None]] = []
        self._pid = os.getpid()
        self._links = LinkPool(link_count, self._on_refused)
        self.supervisor = Supervisor(
            restart, stop, self._links, self.rungs, options, shared, self._on_consumer_refused
        )
        self._starting: Starting | None = Starting(self.supervisor)
        self._greenlet = gevent.Greenlet(self._serve)
        self._greenlet.name = "greenconsume supervisor"

    @property
    def state(self) -> str:
        """The state: `starting`, `running`, `draining` or `stopped`."""
        if self.ended:
            return "stopped"
        if self._stop.is_set() or self.supervisor.closed:
            return "draining"
        return "running" if self._starting is None else "starting"

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when all of it has ended, before `join` returns; it must not wait."""
        self._at_end.append(callback)

    @property
    def ended(self) -> bool:
        """True once all of it has ended, its links too."""
        return bool(self._greenlet.ready())

    def start(self, children: list[Child]) -> None:
        """Start `children`, wait until they consume or a stop comes, or raise why they cannot.

        Switches: yes.
        """
        assert self._starting is not None
        self._greenlet.start()
        for child in children:
            child.reset()
        self.supervisor.add(children)
        self._starting.wait(children, self._stop)
        self._starting = None

    def fail_start(self) -> None:
        """Have it end, as its `start` raised. Use `join` to wait. Switches: never."""
        if self._starting is not None:
            self._starting.failed = True
        self._stop.set("start failed")

    def limit(self, bound: DrainBound) -> None:
        """Have its drain end within a bound; the first one counts, and none once it drains.

        Switches: never. From any greenlet, thread or signal handler.
        """
        self._bound = self._bound or bound

    def join(self, timeout: float | None) -> bool:
        """Wait until it has ended; return whether it has. Switches: yes."""
        self._greenlet.join(timeout)
        return self.ended

    def raise_failure(self) -> None:
        """Raise what somebody who waited for its end has to know.

        Raises:
            RestartLimitError: Consumers used up their restarts.
        """
        self._greenlet.get()  # a defect of the supervisor is not kept quiet
        exhausted = self.supervisor.exhausted
        if exhausted:
            names = tuple(child.name for child in exhausted)
            what = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
            raise RestartLimitError(
                f"given up after {self._restart.max_restarts} restarts in {self._restart.period:g} s: "
                f"{what}",
                names,
            ) from exhausted[0].error

    def _on_refused(self, uri: str, error: BaseException) -> bool:
        """Fail the start; return False, for the log to tell it, when that is over."""
        if self._starting is None:
            return False
        self._starting.refuse(uri, error)
        return True

    def _on_consumer_refused(self, name: str, error: BaseException, remedy: str) -> bool:
        """Fail the start for what one consumer declares, as `_on_refused` does for a connection."""
        if self._starting is None:
            return False
        self._starting.refuse_consumer(name, error, remedy)
        return True

    def _serve(self) -> None:
        with hub.kept_waiting(), watched_hub(self._block_warning):
            try:
                self.supervisor.run()
            finally:
                # A forked child has a copy of this greenlet; the links are its parent's.
                if os.getpid() == self._pid:
                    self._drain()
                for callback in self._at_end:
                    callback()

    def _drain(self) -> None:
        began, end = monotonic(), Deadline(sum(self._timeouts))
        # A start that failed is told by its exception: an orderly end of it is no news.
        started = self._starting is None or not self._starting.failed
        with hurried(self.rungs, self._bound, self._timeouts[1]):
            announced = self._timeouts[0]
            if self._bound is not None:
                announced = min(announced, self._bound.within)
            drained, killed = self.supervisor.drain(*self._timeouts, announced if started else None)
        goodbye = min(self._timeouts[1], end.remaining or 0.0)
        self._links.close(0.0 if self.rungs.kill.is_set() else goodbye)
        found, seconds = self.supervisor.outcome, monotonic() - began
        self.abandoned = bool(killed or found.abandoned)
        if started or self.abandoned:
            numbers = (found.finished, found.given_back, found.cancelled, found.killed)
            emit(DrainFinished(drained, killed, *numbers, seconds))
