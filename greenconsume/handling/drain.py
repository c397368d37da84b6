"""Owns how one consumer's handlers are brought to their end: the drain ladder.

A rung after the other, until no handler runs; each begins when the one before has run out of time, or at
once when it is hurried (`Rungs`)::

    announce    readiness is false, the broker is told to send no more
    give back   what no handler has started goes back to its queue
    wait        running handlers finish and settle, for `drain_timeout`
    cancel      `Shutdown` is raised in those that still run; `cancel_timeout` to clean up
    kill        `GreenletExit` is raised in what is left, and its message left to the broker

A handler that goes on even then is left behind, and logged. A consumer that hangs elsewhere than in a handler
is killed by `supervisor`. Called by `engine`.

A quorum queue with a delivery limit counts each return of a message once, however it comes about
(RabbitMQ 3.10, measured: a reject or a nack with requeue, a recover, a channel that closes), and whether
or not a handler had begun. So giving a message back at once counts no more than leaving it until the channel
closes, and another consumer gets it sooner. The consumer is cancelled first: otherwise it would be sent again
what it gave back, with one more count each time.
"""

from __future__ import annotations

import socket
from time import monotonic
from types import TracebackType
from typing import Any

import gevent
from gevent import GreenletExit

from greenconsume.errors import Shutdown
from greenconsume.events import ConsumerDrained, ConsumerState, HandlerInterrupted, Outcome, emit
from greenconsume.handling import unsettled_watch
from greenconsume.handling.boundary import Handling
from greenconsume.lifecycle import Lifecycle
from greenconsume.links.session import GreenSession
from greenconsume.stopping import Deadline, StopSignal, wait_open

#: Seconds that killed handlers have to end.
LAST = 0.3


class Drain:
    """The end of one consumer's handlers, whatever ends them: a stop, a lost link, a kill.

    Args:
        life: The consumer's lifecycle.
        handling: Its handlers.

    Attributes:
        finished: How many handlers ended by themselves during the drain.
        killed: How many had to be killed.
        is_over: True once no handler is waited for any more, and `ConsumerDrained` was emitted.
    """

    __slots__ = (
        "_descent",
        "_handling",
        "_is_down",
        "_life",
        "_orderly",
        "finished",
        "is_over",
        "killed",
    )

    def __init__(self, life: Lifecycle, handling: Handling) -> None:
        self._handling = handling
        self.finished = self.killed = 0
        self.is_over = False
        self._life = life
        self._descent: Any = None
        self._is_down = self._orderly = False

    def consuming(
        self, session: GreenSession | None, broker_errors: tuple[type[BaseException], ...]
    ) -> Consuming:
        """Return a block to consume in: it watches over the handlers, and ends them in the end.

        Where it is left with one of `broker_errors` they run on: what they hold is the broker's again.

        Args:
            session: Its share of an AMQP link, or None.
            broker_errors: What is raised where the connection or channel is lost.

        Switches: at its end, if a handler runs.
        """
        return Consuming(self, session, broker_errors)

    def begin(self, session: GreenSession | None) -> None:
        """Begin to watch over the handlers, and to react to a stop. Never switches."""
        self._is_down = False
        if self._handling.pool is not None:
            self._handling.pool.open()
        if session is not None:
            self._life.consume_stop.link(session.announce_stop)
            deadline = self._handling.settings.settle_deadline
            if deadline is not None:
                unsettled_watch.watch(session, self._life.name, deadline)
        self._life.stop.link(self._on_stop)

    def end_for(
        self,
        error: BaseException | None,
        session: GreenSession | None,
        broker_errors: tuple[type[BaseException], ...],
    ) -> None:
        """End the handlers, in the way that suits the error that ended consuming, or None.

        Switches: yes, if one runs.
        """
        if error is None:
            self.end(orderly=True)
        elif isinstance(error, GreenletExit):
            self.abandon()
        # An idle `timeout` is an OSError, too, but there the link is well.
        elif not isinstance(error, broker_errors) or isinstance(error, socket.timeout):
            # An error of the user's, or the end of a generator.
            self.end(orderly=isinstance(error, socket.timeout))
        elif session is not None and session.connected and self._handling.holds_live:
            self.end()  # one queue, or one channel of several, is gone: what runs is still ours

    def _on_stop(self) -> None:
        # In the hub. An idle consumer, one of thousands, needs no greenlet to be drained.
        self._life.enter(ConsumerState.DRAINING)
        if self._descent is None and self._handling.busy:
            self._descent = gevent.spawn(self._go_down)

    def end(self, orderly: bool = False) -> None:
        """Wait, up to the ladder's end, for the handlers that still run.

        Args:
            orderly: The consumer has what it came for, so what it has gathered is handled, too.

        Switches: yes, if one runs.
        """
        try:
            self._orderly = orderly and not self._life.consume_stop.is_set()
            if self._orderly:
                self._handling.complete()
            if self._life.stop.is_set():
                self._life.enter(ConsumerState.DRAINING)
            if self._descent is None and self._handling.busy:
                self._descent = gevent.spawn(self._go_down)
            if self._descent is not None:
                self._descent.join()
            else:
                self._go_down()
        except BaseException:  # a kill
            self.abandon()
            raise
        self._descent = None

    def finish(self) -> None:
        """Wait for handlers that a lost link left running, as the consumer stops, and tell how it went.

        Switches: yes, if one runs.
        """
        if self.is_over:
            return
        began = monotonic()
        if self._handling.busy and not self._is_down:
            self.end()
        self.is_over = True
        found, seconds = self.outcome, monotonic() - began
        if found:
            numbers = (found.finished, found.given_back, found.cancelled, found.killed)
            emit(ConsumerDrained(self._life.name, *numbers, seconds))

    @property
    def outcome(self) -> Outcome:
        """The numbers of the messages in hand by what has become of them, so far."""
        handling = self._handling
        return Outcome(self.finished, handling.given_back, handling.cancelled, self.killed)

    def abandon(self) -> None:
        """Kill the handlers with their consumer, and leave their messages to the broker."""
        self._handling.retire()
        for job in self._handling.running():
            if not job.killed and job.greenlet is not gevent.getcurrent():
                self.killed += 1
                job.kill("its consumer was killed", by_force=True)

    def retire(self, session: GreenSession | None) -> None:
        """Stop watching, because the channel closes. Never switches."""
        self._life.stop.unlink(self._on_stop)
        if session is not None:
            unsettled_watch.unwatch(session)
            self._life.consume_stop.unlink(session.announce_stop)
            self._handling.given_back += session.given_back_count
            self._life.tally.given_back += session.given_back_count
        self._handling.retire()

    # -- the ladder -------------------------------------------------------------------------------

    def _go_down(self) -> None:
        handling, settings, rungs = self._handling, self._handling.settings, self._life.rungs
        started = sum(job.greenlet is not None for job in handling.running())
        before = handling.cancelled + self.killed
        if not self._orderly:
            self._give_back()
        ended = self._ended(settings.drain_timeout, rungs.cancel)
        self._give_back()
        if not ended:
            self._cancel(
                rungs.cancel.reason or f"drain_timeout of {settings.drain_timeout:g} s is over"
            )
            if not self._ended(settings.cancel_timeout, rungs.kill):
                self._kill(
                    rungs.kill.reason or f"cancel_timeout of {settings.cancel_timeout:g} s is over"
                )
        self.finished += started - (handling.cancelled + self.killed - before)
        self._is_down = (
            True  # a handler that runs on although it was killed is not waited for again
        )

    def _give_back(self) -> None:
        for job in self._handling.unstarted():
            try:
                self._handling.give_back(job.message)
            except Exception:  # the broker's: it has the message back when the channel closes
                pass

    def _ended(self, seconds: float, hurry: StopSignal | None) -> bool:
        """Wait until no handler runs, for `seconds` or until it is hurried; return whether none does."""
        return not self._handling.busy or wait_open(self._handling.idle, Deadline(seconds), hurry)

    def _cancel(self, why: str) -> None:
        for job in self._handling.running():
            job.interrupt(Shutdown(why), why)
        gevent.sleep(0)  # most end at once, also where they are left no time to

    def _kill(self, why: str) -> None:
        for job in self._handling.running():
            self.killed += 1
            job.kill(why, by_force=True)
        if not self._ended(LAST, None):
            for job in self._handling.running():
                tag, reason = job.message.delivery_tag, "it goes on although it was killed"
                emit(HandlerInterrupted(self._life.name, tag, reason, True))


class Consuming:
    """A block within which a consumer consumes; a class, for thousands of consumers are in theirs."""

    __slots__ = ("_broker_errors", "_drain", "_session")

    def __init__(
        self,
        drain: Drain,
        session: GreenSession | None,
        broker_errors: tuple[type[BaseException], ...],
    ) -> None:
        self._drain, self._session, self._broker_errors = drain, session, broker_errors

    def __enter__(self) -> None:
        self._drain.begin(self._session)

    def __exit__(
        self, _kind: object, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            self._drain.end_for(error, self._session, self._broker_errors)
        finally:
            self._drain.retire(self._session)
