"""Owns many consumers together: what starts, stops and waits for all of them, over a few shared links.

It composes; what a restart or a drain is, `supervisor` knows. It must never wait inside `stop`, nor run a
user's code in the hub. Called by users and the command line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import kombu

from greenconsume.around import Around
from greenconsume.errors import AlreadyRunningError, ForkedError, RestartLimitError
from greenconsume.handling.intake import Intake
from greenconsume.handling.options import ConsumerOptions
from greenconsume.handling.pace import Pace, rate_of
from greenconsume.handling.shared import Shared
from greenconsume.handling.slots import Slots
from greenconsume.links.brokers import connection_to
from greenconsume.patching import require_patched
from greenconsume.runtime import forker
from greenconsume.runtime.arguments import (
    check_counts,
    check_seconds,
    checked_restart,
    options_with,
)
from greenconsume.runtime.bound import DrainBound
from greenconsume.runtime.child import Child
from greenconsume.runtime.control import Control
from greenconsume.runtime.freezing import freeze_garbage
from greenconsume.runtime.groups import Groups
from greenconsume.runtime.quota import Quota
from greenconsume.runtime.restart_policy import RestartPolicy
from greenconsume.runtime.run import Run
from greenconsume.runtime.signals import rungs_on_signals
from greenconsume.runtime.targets import maker_of
from greenconsume.stopping import StopSignal

if TYPE_CHECKING:
    from greenconsume.admin.server import Server


class Runtime:
    """Runs many consumers as greenlets of one process, over a few links to one broker.

    Making one connects nothing. It is started, stopped and joined, and may then be started again. `stop`
    may come at any time, from any greenlet, thread or signal handler, and any number of times; one that
    comes before `start` makes that return at once. A stop holds until `join` (or `run`, or the end of
    `with`) has returned.

    It belongs to the process and thread that start it first. One that a fork finds only made is each child's
    own, as where a server loads an application before it forks its workers.

    Args:
        broker: A kombu URL (`;` between alternatives to fail over to), or a kombu `Connection`.
        links: How many connections to the broker all consumers share.
        restart: When a consumer that ended is started again; by default `RestartPolicy()`.
        options: How messages are handled where neither a consumer nor its `spawn` says so. The two
            timeouts of the drain also bound the end of the runtime itself.
        around: What is entered around each callback of all consumers, outermost: a short way to say
            `options=ConsumerOptions(around=…)`.
        max_handlers: How many handlers run at once in all consumers together that have a concurrency.
        block_warning: Seconds for which a callback may keep every other greenlet waiting before a warning
            says which, and where it is; None: no warning. It costs a thread, and a few wake-ups in
            that time.
        admin: Where its state is shown and commands are taken while it runs: `127.0.0.1:9191`,
            `unix:/run/shop.sock`, or `run` for a Unix socket in the run folder; None or `none`: nowhere.
        admin_token: What must be shown to steer it over a port, or to see it from another machine.
        stall_after: Seconds after which a handler that still runs counts as stalled; None: never.
        freeze_gc: Once all consume, exempt what exists from garbage collection: full collections, which
            hold up every greenlet for 50 to 200 ms with hundreds of consumers, no longer look at it.
            What is part of a cycle by then is never freed, such as consumers that are replaced later.
        rate: How many messages all consumers together begin with in a time, such as `"100/s"` or
            `"100/s burst 20"`; None: no limit. Each takes no more than a second's ahead.
        max_hub_lag: Seconds that the hub may be late, because callbacks compute, before consumers are sent
            less: their prefetch is halved, step by step, and grows again. None: never.
        max_messages: How many messages are handled until the runtime stops, or soon after; None: no end.

    Attributes:
        connection: The kombu `Connection` that classes and factories are called with; never connected.
        children: A `Child` for each consumer, in the order of their `spawn`.
        links: As given, like `options`, `restart` and `admin`; the next start goes by them.
        title: Its name in what is shown of it; by default that of the script.
        control: Its state, and what can be asked of its consumers by name.

    Raises:
        UnsupportedTransportError: The broker's transport is unknown, or blocks the whole process.
        TypeError: `broker` is neither a URL nor a connection, or `options` or `restart` is of another kind.
        ValueError: A number is out of its range, or `admin` is an address that cannot be used.
    """

    def __init__(
        self,
        broker: str | kombu.Connection = "memory://",
        *,
        links: int = 1,
        restart: RestartPolicy | None = None,
        options: ConsumerOptions | None = None,
        around: Sequence[Around] = (),
        max_handlers: int | None = None,
        block_warning: float | None = None,
        admin: str | None = None,
        admin_token: str | None = None,
        stall_after: float | None = 300.0,
        freeze_gc: bool = False,
        max_messages: int | None = None,
        rate: str | None = None,
        max_hub_lag: float | None = None,
    ) -> None:
        check_counts(links=links, max_handlers=max_handlers, max_messages=max_messages)
        check_seconds(block_warning=block_warning, max_hub_lag=max_hub_lag, stall_after=stall_after)
        ConsumerOptions(rate=rate)  # to say now what is wrong with it
        self.connection = connection_to(broker)
        self._groups = Groups()
        self.children = self._groups.children
        self.links = links
        self.restart = checked_restart(restart)
        self.options = options_with(options, around)
        self.max_handlers = max_handlers
        self.block_warning, self.freeze_gc = block_warning, freeze_gc
        self.max_messages = max_messages
        self.rate, self.max_hub_lag = rate, max_hub_lag
        self._stop = StopSignal()
        self._run: Run | None = None
        self.title = ""
        self.control = Control(self._groups, lambda: self._run, self.stop, lambda: self.title)
        self.admin = admin
        self.admin_token = admin_token
        self.stall_after = stall_after
        self._make_admin()  # to say now what is wrong with it
        self._pid: int | None = None  # of the process that started it

    def spawn(
        self, target: object, replicas: int = 1, options: ConsumerOptions | None = None
    ) -> list[Child]:
        """Add consumers; they start with the runtime, or now if it runs.

        Args:
            target: A consumer class or another callable, called with the kombu `Connection` for each
                consumer and again for each restart; or an instance, which is run again when it restarts
                and is given the runtime's connection if it has none.
            replicas: How many; 1 for an instance.
            options: How their messages are handled, where their own `options` do not say.

        Returns:
            A `Child` for each, which tells how it fares.

        Raises:
            InvalidConsumerError: `target` is no consumer, and makes none.
            TypeError: `options` are none.
            ForkedError: The runtime was started in another process.
            Exception: What the class or factory raised, if the runtime runs.

        Switches: only if the runtime runs, and the class or factory waits.
        """
        self._check_process()
        make = maker_of(target, self.connection, replicas)
        added = self._groups.spawn(target, make, replicas, options)
        if self._run is not None and not self._run.ended:
            self._add(self._run, added)
        return added

    def start(self) -> None:
        """Start every consumer, and wait until each consumes, or is known to stand by.

        One stands by while another has its queue for itself: see `Child.state`. A broker that cannot be
        reached is waited for. A stop ends the wait, and `start` returns. It raises with nothing left running.

        Raises:
            BrokerRefusedError: The broker refused the connection.
            ConsumerRefusedError: The broker refuses what a consumer declares, and has it otherwise.
            Exception: What a class or factory raised, or that for which a consumer was given up meanwhile.
            AlreadyRunningError: The runtime runs, or has not finished stopping.
            NotPatchedError: The process is not patched by gevent.
            ForkedError: The runtime was started in another process.
            ArbiterError: This process is gunicorn's arbiter.
            AddressError: Its admin cannot listen.

        Switches: yes. From any greenlet of this hub, never from a signal handler.
        """
        self._check_process()
        require_patched()
        if self._run is not None and not self._run.ended:
            raise AlreadyRunningError("the runtime runs already: stop() and join() it first")
        forker.enter(self)
        self._pid = os.getpid()
        self._stop.engage()
        if self._stop.is_set():
            return
        self._run = run = self._new_run()
        self._start_admin(run)
        if self.max_messages is not None:
            run.on_end(Quota(self.max_messages, self.children, self.stop).close)
        try:
            run.start(list(self.children))
        except BaseException:  # also a kill or a Timeout: nothing that was started is left behind
            if self._run is run:  # else it was stopped and joined meanwhile
                run.fail_start()
            self._finish(run, None)
            raise
        if self.freeze_gc and not self._stop.is_set():
            freeze_garbage()

    def stop(self, reason: str = "stop", within: float | None = None) -> None:
        """Ask every consumer to stop. Idempotent, and legal before `start`; use `join` to wait.

        Args:
            reason: What the log says of it.
            within: Seconds from now until all has ended, where the timeouts of the runtime and of its
                consumers allow more; the first stop that says so counts.

        Raises:
            ForkedError: The runtime was started in another process.

        Switches: never. From any greenlet, thread or signal handler.
        """
        self._check_process()
        if within is not None:
            bound = DrainBound(within)
            if self._run is not None:
                self._run.limit(bound)
        self._stop.set(reason)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until every consumer has ended and the links are closed.

        They end by themselves, or because of `stop`; then the drain bounds the wait.

        Args:
            timeout: Upper bound in seconds; `None` waits for ever.

        Returns:
            `False` if something was still running at the deadline.

        Raises:
            RestartLimitError: Consumers used up their restarts; everything has ended.
            ForkedError: The runtime was started in another process.

        Switches: yes. From any greenlet of this hub but its consumers', never from a signal handler.
        """
        self._check_process()
        run = self._run
        if run is None:
            self._stop.clear()
            return True
        if not self._finish(run, timeout):
            return False
        run.raise_failure()
        return True

    def cancel(self, reason: str = "cancel") -> None:
        """Stop, and do not wait for running handlers: `Shutdown` is raised in them now.

        Their messages go back to the broker. Use `join` to wait.

        Raises:
            ForkedError: The runtime was started in another process.

        Switches: never. From any greenlet, thread or signal handler.
        """
        self._check_process()
        run = self._run
        self._stop.set(reason)
        if run is not None:
            run.rungs.cancel.set(reason)

    def kill(self, reason: str = "kill") -> None:
        """Cut the drain short: what still runs is killed, and the links are closed. The last resort.

        What a killed handler had done is left to the broker to redeliver. Use `join` to wait.

        Raises:
            ForkedError: The runtime was started in another process.

        Switches: never. From any greenlet, thread or signal handler.
        """
        self.cancel(reason)
        if self._run is not None:
            self._run.rungs.kill.set(reason)

    def run(self) -> bool:
        """Run until a stop, SIGTERM or SIGINT, or until every consumer has ended by itself; then drain.

        The first signal drains; a second one cancels the handlers that still run, a third one kills them;
        a fourth one exits the process at once, with code 1. In another thread than the main one signals
        are left alone.

        Returns:
            Whether all consumers and handlers ended by themselves: `False` means that work was abandoned.

        Raises:
            RestartLimitError: Consumers used up their restarts; the others were drained.
            BrokerRefusedError: As `start`; so is whatever else that raises.

        Switches: yes. From any greenlet of this hub, never from a signal handler.
        """
        self._check_process()
        require_patched()
        with rungs_on_signals(self):
            self.start()
            run = self._run
            self.join()
        return run is None or not run.abandoned

    def __enter__(self) -> Runtime:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and os.getpid() != self._pid:
            return  # a forked child leaves the block, by sys.exit() for one: nothing in here is its own
        self.stop()
        try:
            self.join()
        except RestartLimitError:
            if error is None:  # else the block's own error is the one to tell
                raise

    def _new_run(self) -> Run:
        rate = None if self.rate is None else rate_of(self.rate)
        shared = Shared(
            None if self.max_handlers is None else Slots(self.max_handlers),
            None if rate is None else Pace(rate),
            None if self.max_hub_lag is None else Intake(self.max_hub_lag),
        )
        return Run(self._stop, self.restart, self.links, self.options, shared, self.block_warning)

    def _make_admin(self) -> Server | None:
        if self.admin in (None, "none"):
            return None
        from greenconsume.admin.server import Server  # not above: it brings gevent's WSGI server

        return Server(self.control, self.admin, self.admin_token, self.stall_after)

    def _start_admin(self, run: Run) -> None:
        """Have it answer from before the first consumer starts until after the last has ended."""
        try:
            admin = self._make_admin()
            if admin is not None:
                admin.start()
                run.on_end(admin.stop)
        except BaseException:  # a kill too: it does not run then
            self._run = None
            raise
        self.control.begin(run.shared.intake)
        run.on_end(self.control.close)

    def _finish(self, run: Run, timeout: float | None) -> bool:
        if not run.join(timeout):
            return False
        self._check_process()  # a fork ends the copy of the run that it made in the child
        # Of many that join the same run, the first ends it: the stop that comes after belongs to the next.
        if self._run is run:
            self._run = None
            self._stop.clear()
        return True

    def _add(self, run: Run, added: list[Child]) -> None:
        try:
            run.supervisor.add(added)
        except BaseException:  # the caller is told; what could not be made is not tried again later
            self._groups.forget(lambda child: child in added and child.greenlet is None)
            raise

    def _check_process(self) -> None:
        if self._pid is not None and os.getpid() != self._pid:
            raise ForkedError("this Runtime")
