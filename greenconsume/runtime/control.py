"""Owns how a runtime is seen and steered while it runs: by its own program, or by an operator.

It finds consumers by name, reads their state, and asks `supervisor` and the consumers; it must never wait for
them. The admin shows and asks this (`admin.status.Process`). Users get it as `Runtime.control`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from time import monotonic, time
from typing import Protocol

import gevent

from greenconsume.admin import run_folder
from greenconsume.admin.greenlets import GreenletCount
from greenconsume.admin.lag import LagWatch
from greenconsume.admin.status import LagStatus, ProcessStatus, RunningHandler
from greenconsume.consuming.engine import ensure_engine
from greenconsume.errors import ControlError, UnknownConsumerError
from greenconsume.events import ConsumersScaled, Event, StaleSettle, emit, subscribe
from greenconsume.handling.intake import Intake
from greenconsume.handling.wrapping import current_handler
from greenconsume.links.pool import all_pools
from greenconsume.runtime import observing
from greenconsume.runtime.child import Child, Wanted
from greenconsume.runtime.groups import Groups
from greenconsume.runtime.supervisor import Supervisor
from greenconsume.tally import all_published


class Running(Protocol):
    """One start of a runtime."""

    @property
    def supervisor(self) -> Supervisor:
        """The supervisor of its consumers."""

    @property
    def state(self) -> str:
        """The state, as `ProcessStatus` has it."""


class Control:
    """The state of a runtime, and what can be asked of its consumers by name, while it runs.

    Nothing here waits or switches: what is asked is done a moment later, and the state tells when. From any
    greenlet of the runtime's hub.

    Args:
        groups: The runtime's consumers.
        run: Returns its present start, if there is one.
        stop: Stops it.
        title: Returns its name, or an empty one.
    """

    def __init__(
        self,
        groups: Groups,
        run: Callable[[], Running | None],
        stop: Callable[[str], None],
        title: Callable[[], str] = str,
    ) -> None:
        self._groups, self._run, self._stop, self._title = groups, run, stop, title
        self._unsubscribe: Callable[[], None] | None = None
        self._intake: Intake | None = None
        self._lag: LagWatch | None = None
        self._greenlets: GreenletCount | None = None
        self._started, self._began = time(), monotonic()

    def begin(self, intake: Intake | None = None) -> None:
        """Count what nobody but an observer can tell whose it is, until `close`. Never switches.

        Args:
            intake: Is told how late the hub is, if there is one.
        """
        if self._unsubscribe is None:
            self._unsubscribe = subscribe(self._observe)
        self._intake = intake
        if intake is not None:
            self._lag = LagWatch(self._adapt)

    def _adapt(self, lag: float) -> None:
        changed = self._intake.note(lag) if self._intake is not None else None
        if changed is not None:
            gevent.spawn(emit, changed)  # not in the hub, where nobody may wait

    def _observe(self, event: Event, /) -> None:
        # A channel that is gone has no consumer any more; the handler that settles on it has.
        if isinstance(event, StaleSettle):
            handler = current_handler()
            for child in self._groups.children if handler is not None else ():
                if handler is not None and child.name == handler.consumer:
                    child.tally.stale_settles += 1

    # -- looking --------------------------------------------------------------------------------

    def status(self) -> ProcessStatus:
        """Return how the process, its consumers and its links fare now. Never switches."""
        now, run = monotonic(), self._run()
        self._forget_retired()
        return ProcessStatus(
            name=self._title() or run_folder.title(),
            pid=os.getpid(),
            version=_version(),
            state="stopped" if run is None else run.state,
            started=self._started,
            uptime=now - self._began,
            consumers=tuple(observing.status_of(each, now) for each in self._groups.children),
            links=observing.links_of(all_pools()),
            lag=self._lag.status() if self._lag is not None else LagStatus(),
            intake=self._intake.share if self._intake is not None else 1.0,
            greenlets=self._greenlets.alive if self._greenlets is not None else 0,
            published=all_published(),
        )

    def watch(self) -> None:
        """Keep times from now on, until the runtime ends: somebody looks. Idempotent; never switches."""
        if self._lag is None:
            self._lag = LagWatch()
        if self._greenlets is None:
            self._greenlets = GreenletCount()
        now = monotonic()
        for child in self._groups.children:
            observing.watch(child, now)
        for published in all_published():
            published.watch()

    def handlers_of(self, consumer: str) -> tuple[RunningHandler, ...]:
        """Return all handlers of one consumer that run, the oldest first.

        Raises:
            UnknownConsumerError: There is none of that name.

        Switches: never.
        """
        return observing.handlers_of(self._child(consumer), monotonic())

    def close(self) -> None:
        """Keep no times any more: the runtime has ended. Idempotent. Never switches."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        for watch in (self._lag, self._greenlets):
            if watch is not None:
                watch.close()
        self._lag = self._greenlets = None

    # -- steering -------------------------------------------------------------------------------

    def stop(self, reason: str = "stop") -> None:
        """Drain all: as `Runtime.stop`. Never switches."""
        self._stop(reason)

    def pause(self, consumer: str) -> None:
        """Have a consumer take no more messages until `resume`; its running handlers end by themselves.

        It drains as in a stop, and waits without a channel; its instance is kept.

        Raises:
            UnknownConsumerError: There is none of that name.
            ControlError: It does not run, or its queue would be deleted with its messages.

        Switches: never.
        """
        child, supervisor = self._child(consumer), self._supervisor()
        if child.wanted is Wanted.PAUSED:
            return
        self._require_present(child)
        fleeting = (
            ensure_engine(child.consumer).fleeting_queues if child.consumer is not None else ()
        )
        if fleeting:
            raise ControlError(
                f"consumer {consumer} cannot be paused: {', '.join(fleeting)} is auto_delete or exclusive, "
                "and would be deleted with its messages"
            )
        supervisor.pause(child)

    def resume(self, consumer: str) -> None:
        """Have a consumer that was paused consume again.

        Raises:
            UnknownConsumerError: There is none of that name.
            ControlError: It is not paused, or the runtime does not run.

        Switches: never.
        """
        child, supervisor = self._child(consumer), self._supervisor()
        if child.wanted is not Wanted.PAUSED:
            raise ControlError(f"consumer {consumer} is not paused: it is {child.state}")
        supervisor.resume(child)

    def stop_consumer(self, consumer: str) -> None:
        """Drain one consumer; the runtime goes on, also without any. Raises as `resume`. Never switches."""
        child, supervisor = self._child(consumer), self._supervisor()
        self._require_present(child)
        supervisor.hold()
        supervisor.retire(child, "asked by an operator", Wanted.AS_POLICY_SAYS)

    def restart_consumer(self, consumer: str) -> None:
        """Drain one consumer and start it again; also one that was stopped or given up.

        Raises as `resume`. Never switches.
        """
        child, supervisor = self._child(consumer), self._supervisor()
        supervisor.restart(child)

    def scale(self, group: str, replicas: int) -> None:
        """Have so many consumers of what was spawned by a name: start some, or drain the last.

        Raises:
            UnknownConsumerError: Nothing of that name was spawned.
            ControlError: The runtime does not run, or it was spawned as an instance.

        Switches: never.
        """
        supervisor = self._supervisor()
        present = self._groups.of(group)
        if len(present) < replicas:
            supervisor.start_soon(self._groups.more(group, replicas - len(present)))
        elif len(present) > replicas:
            supervisor.hold()
            for child in present[replicas:]:
                supervisor.retire(child, "scaled down")
        else:
            return
        emit(ConsumersScaled(group, len(present), replicas))

    # -- finding --------------------------------------------------------------------------------

    def _child(self, name: str) -> Child:
        for child in self._groups.children:
            if child.name == name:
                return child
        raise UnknownConsumerError(name)

    @staticmethod
    def _require_present(child: Child) -> None:
        """Refuse one that has ended, or is about to."""
        if child.ended or (child.stopping and not child.resting):
            raise ControlError(f"consumer {child.name} does not run: it is {child.state}")

    def _supervisor(self) -> Supervisor:
        run = self._run()
        if run is None or run.state == "draining":
            raise ControlError("the process drains, or does not run")
        return run.supervisor

    def _forget_retired(self) -> None:
        if any(child.retired and child.ended for child in self._groups.children):
            self._groups.forget(lambda child: child.retired and child.ended)


@cache
def _version() -> str:
    try:
        return version("greenconsume")
    except PackageNotFoundError:  # it runs from its source
        return "?"
