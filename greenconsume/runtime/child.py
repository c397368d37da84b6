"""Owns one consumer of a runtime through all its restarts: what makes it, runs it now and ended it last.

It must never decide whether a consumer is started again: that is `supervisor`, which calls it. Users
get it from `Runtime.spawn` and read it.
"""

from __future__ import annotations

import contextvars
import enum
from collections.abc import Callable
from time import monotonic
from typing import Any

from kombu.utils.limits import TokenBucket

from greenconsume.consuming.engine import ensure_lifecycle
from greenconsume.events import ConsumerState
from greenconsume.handling.options import ConsumerOptions
from greenconsume.runtime.greenlet import ConsumerGreenlet
from greenconsume.runtime.restart_policy import RestartPolicy
from greenconsume.tally import Tally


class Wanted(enum.Enum):
    """The wish for a consumer, when its greenlet ends."""

    AS_POLICY_SAYS = enum.auto()
    RESTARTED = enum.auto()
    PAUSED = enum.auto()
    RESUMED = enum.auto()  # after a pause: the same instance, and not counted as a restart
    RETIRED = enum.auto()


class Child:
    """One consumer of a runtime, through all its restarts.

    Users read it, from any greenlet of the runtime's hub: none of its attributes switches. Its methods are
    the runtime's.

    Attributes:
        name: What logs and events call it, whichever instance runs.
        group: What it was spawned from, with its replicas.
        tally: What has become of its messages.
        options: What its `spawn` said of how its messages are handled.
        consumer: The instance that runs, or ran last; `None` before the first start.
        greenlet: The greenlet that it runs in, or ran in last; `None` before the first start.
        error: What ended it last.
        restart_count: How often it was started again since its runtime started.
        given_up: It ended with an error, or once too often, and is not started again.
        ended: It has ended and is not started again, for whatever reason.
        wanted: What an operator wants of it.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Any],
        options: ConsumerOptions | None = None,
        group: str = "",
    ) -> None:
        self.name = name
        self.group = group or name
        self.tally = Tally()
        self.options = options
        self.consumer: Any = None
        self.greenlet: ConsumerGreenlet | None = None
        self.error: BaseException | None = None
        self.restart_count = 0
        self.given_up = False
        self.ended = False
        self.wanted = Wanted.AS_POLICY_SAYS
        self._make = make
        # A consumer made hours later, by the supervisor, has its spawner's context variables.
        self._context = contextvars.copy_context()
        self._restarts: list[float] = []
        self._asked = False

    @property
    def state(self) -> ConsumerState:
        """The state of the consumer; `failed` while it waits for a restart, too."""
        if self.resting:
            return ConsumerState.PAUSED
        if self.given_up or self.error is not None:
            return ConsumerState.FAILED
        return ConsumerState.STARTING if self.greenlet is None else self.greenlet.state

    @property
    def stopping(self) -> bool:
        """True if a stop was asked for, by its runtime or by itself."""
        if self.consumer is None:
            return self._asked
        stopped = ensure_lifecycle(self.consumer).stop.is_set()
        return self._asked or stopped or _should_stop(self.consumer)

    @property
    def running(self) -> bool:
        """True while its greenlet has yet to finish."""
        return self.greenlet is not None and not self.greenlet.ready()

    @property
    def started(self) -> bool:
        """True if a start need not wait for it: it consumes, stands by, or has ended for good."""
        if self.ended or self.resting:
            return True
        ready = None if self.greenlet is None else self.greenlet.ready
        return ready is not None and (ready.is_set() or ready.stands_by)

    @property
    def resting(self) -> bool:
        """True while it is paused, and its greenlet has ended."""
        return self.wanted is Wanted.PAUSED and not self.running

    @property
    def retired(self) -> bool:
        """True if its runtime was scaled down: it ends, and is forgotten then."""
        return self.wanted is Wanted.RETIRED

    def reset(self, keep_count: bool = False) -> None:
        """Forget the restarts and errors of a former start of the runtime, or what an operator mended.

        Switches: never. Called by the runtime.
        """
        self.error = None
        self.restart_count = self.restart_count if keep_count else 0
        self.given_up = self.ended = False
        self.wanted = Wanted.AS_POLICY_SAYS
        self._restarts.clear()

    def make(self) -> ConsumerGreenlet:
        """Make the consumer, or take the same instance again, and a greenlet for it: not started.

        Raises:
            InvalidConsumerError: What was made is no consumer.
            AlreadyRunningError: It has a greenlet already.
            Exception: Whatever its class or factory raised.

        Switches: if the class or factory does.
        """
        context = self._context.copy()
        resumed = self.wanted is Wanted.RESUMED and self.consumer is not None
        self.wanted = Wanted.AS_POLICY_SAYS
        consumer = self.consumer if resumed else context.run(self._make)
        greenlet = ConsumerGreenlet(consumer, context)
        self._prepare(greenlet)
        self.consumer, self.greenlet, self.error = greenlet.consumer, greenlet, None
        return greenlet

    def stop(self, reason: str) -> None:
        """Ask the consumer to stop, for good; called by the supervisor. Switches: never."""
        self._asked = True
        if self.greenlet is not None:
            try:
                self.greenlet.stop(reason)
            except Exception:  # a user's read-only `should_stop`; the signal is set all the same
                pass

    def stop_to_be(self, wanted: Wanted, reason: str) -> None:
        """Ask the consumer to stop, as something else is wanted of it. Switches: never."""
        self.wanted = wanted
        self.stop(reason)

    def enter(self, state: ConsumerState) -> None:
        """Have the consumer be in a state that only its runtime knows of, as paused. Switches: never."""
        if self.consumer is not None:
            ensure_lifecycle(self.consumer).enter(state)

    def next_delay(self, policy: RestartPolicy) -> float | None:
        """Count a restart; return how many seconds it waits, or `None` if it is one too many.

        Switches: never. Called by the supervisor.
        """
        now = monotonic()
        while self._restarts and now - self._restarts[0] >= policy.period:
            del self._restarts[0]
        if len(self._restarts) >= policy.max_restarts:
            return None
        self._restarts.append(now)
        self.restart_count += 1
        return policy.delay(len(self._restarts))

    def _prepare(self, greenlet: ConsumerGreenlet) -> None:
        lifecycle = ensure_lifecycle(greenlet.consumer)
        lifecycle.name = greenlet.name = self.name
        lifecycle.tally = self.tally
        greenlet.supervised = True
        if self._asked and greenlet.consumer is self.consumer:
            self._revive()
        self._asked = False
        lifecycle.enter(ConsumerState.STARTING)

    def _revive(self) -> None:
        """Take back the stop that its runtime asked for when it was stopped last."""
        ensure_lifecycle(self.consumer).stop.clear()
        if _should_stop(self.consumer):
            try:
                self.consumer.should_stop = False
            except Exception:  # a user's read-only `should_stop`: theirs to clear
                pass
        limit = getattr(self.consumer, "restart_limit", None)
        if isinstance(
            limit, TokenBucket
        ):  # it was asked to stop: that is no restart to be slowed down
            limit.timestamp -= limit.capacity / limit.fill_rate


def _should_stop(consumer: object) -> bool:
    """Read a flag that a class may have put in the place of the mixin's: it is no signal then."""
    try:
        return bool(getattr(consumer, "should_stop", False))
    except Exception:  # a user's property; what is wrong with it must not end the supervisor
        return False
