"""Owns the boundary around the user's callback: where it runs, what ends it, what its failure means.

Whatever a callback raises stays here (law 5): it is never taken for the broker's error. The consumer
lives on, the failure is told once with its traceback, and the message meets the consumer's policy.
Called by `mixins`; callbacks run inline in the consumer's greenlet, or in a `HandlerPool`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event
from kombu import serialization
from kombu.utils import json as kombu_json

from greenconsume.deliveries import DelayedRequeues, is_settleable
from greenconsume.errors import HandlerTimeout, Interrupt, InvalidConsumerError, Shutdown
from greenconsume.events import (
    ConsumerDrained,
    HandlerFailed,
    HandlerInterrupted,
    PrefetchTooSmall,
    emit,
)
from greenconsume.lifecycle import Lifecycle, lifecycle_of
from greenconsume.policies import FailurePolicy, Requeue
from greenconsume.pools import HandlerPool, Job
from greenconsume.stopping import FORK, Deadline, wait_open

#: What `json.loads` calls in the end; without white space around, nothing else is left of it.
_scan = json.JSONDecoder().scan_once


def decode(message: Any) -> Any:
    """Return the decoded body, as `message.decode()` does, sooner for plain JSON.

    kombu builds a decoder for each message, and calls a Python function for each object in it, to bring
    back types that it marks with "__type__". A text without that mark, nor an escape that could
    hide it, needs neither.
    """
    body = message.body
    if (
        message.content_type != "application/json"
        or type(body) is not str
        or not body
        or "__type__" in body
        or "\\" in body
        or (message.accept is not None and "application/json" not in message.accept)
        or serialization.registry._decoders.get("application/json") is not kombu_json.loads
        or "application/json" in serialization.registry._disabled_content_types
    ):
        return message.decode()
    try:
        decoded, end = _scan(body, 0)
    except (ValueError, StopIteration):
        return message.decode()  # which says what is wrong with it in kombu's words
    if end != len(body):
        return message.decode()
    message._decoded_cache = decoded
    return decoded


@dataclass(frozen=True, slots=True)
class Settings:
    """How a consumer's handlers run; see `ConsumerMixin`."""

    on_error: FailurePolicy
    handler_timeout: float | None
    drain_timeout: float
    cancel_timeout: float
    auto_settle: bool


class Handler:
    """What a kombu `Consumer` calls with each delivery, in the place of its own `_receive_callback`.

    Args:
        consumer: The `kombu.Consumer` whose callbacks are run.
        handling: Where and how they run.
    """

    __slots__ = ("_consumer", "_handle")

    #: A green channel hands over its deliveries as they came.
    takes_deliveries = True

    def __init__(self, consumer: Any, handling: Handling) -> None:
        self._consumer = consumer
        self._handle = handling.handle if handling.pool is None else handling.submit

    def __call__(self, raw: Any) -> None:
        """Handle one delivery. Switches: inline as the user's callback does, else while the pool is full."""
        to_python = getattr(self._consumer.channel, "message_to_python", None)
        self._handle(self._consumer, to_python(raw) if to_python is not None else raw)


class Handling:
    """One consumer's handlers: the pool they run in, their policy, and how a stop ends them.

    Args:
        life: The consumer's lifecycle. In a greenlet that is not greenconsume's own (`owned`), what is no
            `Exception` (a kill, a `gevent.Timeout`, `SystemExit`) may be meant for somebody else's
            code, and passes.
        settings: How they run.
        pool: Where they run; None: inline.
        partition: The key of a message, for a pool that keeps an order.
    """

    def __init__(
        self,
        life: Lifecycle,
        settings: Settings,
        pool: HandlerPool | None = None,
        partition: Callable[[Any], Hashable] | None = None,
    ) -> None:
        self.settings = settings
        self.pool = pool
        self._partition = partition
        self.requeues = DelayedRequeues()
        self.finished = self.given_back = self.cancelled = self.killed = 0
        self._life = life
        self._inline = Job(lambda job: None, None)
        self._climber: Any = None

    # -- one message ----------------------------------------------------------------------------

    def submit(self, consumer: Any, message: Any) -> None:
        """Handle `message` in the pool; one that the stop overtakes is given back."""
        assert self.pool is not None
        job = Job(self._work, message, consumer)
        if self._partition is not None:
            try:
                job.key = self._partition(message)
                hash(job.key)
            except Exception as exc:  # the user's code, as much as the handler is
                self._failed(job, exc)
                return
        if self._life.stop.is_set() or not self.pool.submit(job, self._life.stop):
            self._give_back(message)

    def handle(self, consumer: Any, message: Any) -> None:
        """Handle `message` here and now."""
        job = self._inline
        job.message, job.consumer, job.greenlet = message, consumer, gevent.getcurrent()
        try:
            self._work(job)
        finally:
            job.greenlet = None
            if self._climber is not None:
                self._climber.inline_done.set()

    def _work(self, job: Job) -> None:
        alarm = self.settings.handler_timeout and _Alarm(self, job)
        try:
            self._receive(job.consumer, job.message)
            if self.settings.auto_settle and is_settleable(job.message):
                job.message.ack()
        except Shutdown:
            self.cancelled += 1
            self._give_back(job.message)
        except (
            Exception,
            HandlerTimeout,
        ) as exc:  # the boundary: what the user's code raises ends here
            self._failed(job, exc)
        except BaseException as exc:
            if not self._is_the_handlers_own(job, exc):
                raise
            self._failed(job, exc)
        finally:
            if alarm:
                alarm.stop()

    @staticmethod
    def _receive(consumer: Any, message: Any) -> None:
        if consumer.accept is not None:
            message.accept = consumer.accept
        if message.errors:
            message._reraise_error(consumer.on_decode_error)
            return
        if consumer.on_message:
            consumer.on_message(message)
            return
        try:
            body = decode(message)
        except Exception as exc:  # as kombu: whatever a serializer raises is a decode error
            if not consumer.on_decode_error:
                raise
            consumer.on_decode_error(message, exc)
            return
        consumer.receive(body, message)

    def _is_the_handlers_own(self, job: Job, exc: BaseException) -> bool:
        if job.killed or isinstance(exc, (KeyboardInterrupt, GeneratorExit)):
            return False
        if isinstance(exc, SystemExit) and self._life.stop.reason == FORK:
            return False  # a forked child that exits, in a copy of the handler
        if job is not self._inline:
            return True
        return self._life.owned and not getattr(gevent.getcurrent(), "killed", False)

    def _failed(self, job: Job, exc: BaseException) -> None:
        message = job.message
        outcome = "left as the handler settled it"
        if is_settleable(message):
            outcome = self._settle_failed(message, exc)
        elif not message.acknowledged:
            outcome = "lost: its consumer takes messages without acknowledging them"
        routing_key = str(message.delivery_info.get("routing_key", ""))
        emit(HandlerFailed(self._life.name, message.delivery_tag, routing_key, exc, outcome))

    def _settle_failed(self, message: Any, exc: BaseException) -> str:
        try:
            return self.settings.on_error.apply(message, exc, self.requeues)
        except Exception as error:  # a policy that cannot act must not lose the message
            if is_settleable(message):
                self.requeues.add(message, 1.0)
            return f"requeued in 1 s, because its policy failed: {error!r}"

    def _give_back(self, message: Any) -> None:
        self.given_back += 1
        if is_settleable(message):
            message.requeue()

    # -- the drain ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a handler runs."""
        return self._inline.greenlet is not None or (self.pool is not None and bool(self.pool.jobs))

    def begin(self) -> None:
        """The consumer consumes: from now on a stop begins the drain."""
        if self.pool is not None:
            self.pool.open()
        self._life.stop.link(self._on_stop)

    def end(self) -> None:
        """The consumer has left its loop: wait, up to the ladder's end, for the handlers that still run.

        Switches: yes, if one runs.
        """
        self._life.stop.unlink(self._on_stop)
        climber = self._climber or _Climber(self)
        if self._climber is None:
            climber.climb()
        else:
            climber.greenlet.join()
        self._climber = None

    def finish(self) -> None:
        """The consumer stops: wait for handlers that a lost link left running, and tell how it went."""
        began = monotonic()
        if self.busy:
            self.end()
        if self.finished or self.given_back or self.cancelled or self.killed:
            emit(
                ConsumerDrained(
                    self._life.name,
                    self.finished,
                    self.given_back,
                    self.cancelled,
                    self.killed,
                    monotonic() - began,
                )
            )

    def abandon(self) -> None:
        """The consumer was killed: its handlers are, too; their messages are left to the broker."""
        for job in self.running():
            if job is not self._inline:
                self.kill(job, "its consumer was killed")

    def fit_prefetch(self, consumer: Any) -> None:
        """Have the broker send enough to keep the pool busy, where the consumer sets no prefetch itself."""
        if self.pool is None:
            return
        chosen = getattr(consumer, "prefetch_count", None)
        if chosen is None:
            chosen = getattr(consumer.channel, "prefetch_count", 0) or None
        if chosen is None:
            # As much again as runs, so that the next message is at hand when a handler ends.
            consumer.qos(prefetch_count=min(2 * self.pool.size, 65535))
        elif 0 < chosen < self.pool.size:
            emit(PrefetchTooSmall(self._life.name, chosen, self.pool.size))

    def retire(self) -> None:
        """Let go of idle greenlets; running handlers, left by a lost link, end by themselves."""
        self._life.stop.unlink(self._on_stop)
        self.requeues.cancel()
        if self.pool is not None:
            self.pool.close()

    def _on_stop(self) -> None:
        # In the hub. An idle consumer, one of thousands, needs no greenlet to be drained.
        if self._climber is None and self.busy:
            self._climber = _Climber(self)
            self._climber.greenlet = gevent.spawn(self._climber.climb)

    def return_unstarted(self) -> None:
        """Give back what waits for its partition's turn."""
        for job in self.pool.unstarted() if self.pool is not None else ():
            self._give_back(job.message)

    def running(self) -> list[Job]:
        """Return the jobs that run now."""
        jobs = list(self.pool.jobs) if self.pool is not None else []
        return [*jobs, self._inline] if self._inline.greenlet is not None else jobs

    def interrupt(self, job: Job, interrupt: Interrupt, reason: str) -> None:
        """Raise `interrupt` in a running handler. Never switches."""
        emit(HandlerInterrupted(self._life.name, job.message.delivery_tag, reason, False))
        gevent.get_hub().loop.run_callback(job.raise_inside, interrupt)

    def kill(self, job: Job, reason: str) -> None:
        """Kill a handler that did not end; its message is left to the broker. Never switches."""
        emit(HandlerInterrupted(self._life.name, job.message.delivery_tag, reason, True))
        job.kill()


def handling_of(consumer: Any) -> Handling:
    """Return the consumer's handling, made on first use from its attributes and its runtime's defaults."""
    life = lifecycle_of(consumer)
    if life.handling is None:
        size = _setting(consumer, "concurrency", None)
        pool = None if size is None else HandlerPool(life.name, size, life.defaults.get("slots"))
        partition = _partition(_setting(consumer, "partition_by", None))
        if partition is not None and pool is None:
            raise InvalidConsumerError(
                f"{life.name} has partition_by but no concurrency: inline everything is in order anyway"
            )
        settings = Settings(
            on_error=_setting(consumer, "on_error", Requeue()),
            handler_timeout=_setting(consumer, "handler_timeout", None),
            drain_timeout=_setting(consumer, "drain_timeout", 30.0),
            cancel_timeout=_setting(consumer, "cancel_timeout", 5.0),
            auto_settle=bool(_setting(consumer, "auto_settle", False)),
        )
        life.handling = Handling(life, settings, pool, partition)
    handling: Handling = life.handling
    return handling


def _setting(consumer: Any, name: str, default: Any) -> Any:
    own = getattr(consumer, name, None)
    return lifecycle_of(consumer).defaults.get(name, default) if own is None else own


def _partition(by: Any) -> Callable[[Any], Hashable] | None:
    if by is None or callable(by):
        return by  # type: ignore[no-any-return]  # the user's
    if by == "routing_key":
        return lambda message: message.delivery_info.get("routing_key")
    return lambda message: message.headers.get(by)


class _Climber:
    """The drain ladder of one consumer's handlers: wait, interrupt, kill."""

    def __init__(self, handling: Handling) -> None:
        self._handling = handling
        self.inline_done = Event()
        self.greenlet: Any = None

    def climb(self) -> None:
        handling, rungs = self._handling, self._handling._life.rungs
        started = len(handling.running())
        handling.return_unstarted()
        settings = handling.settings
        if not self._wait(Deadline(settings.drain_timeout), rungs.cancel):
            why = rungs.cancel.reason or f"drain_timeout of {settings.drain_timeout:g} s is over"
            for job in handling.running():
                handling.interrupt(job, Shutdown(why), why)
            if not self._wait(Deadline(settings.cancel_timeout), rungs.kill):
                why = (
                    rungs.kill.reason or f"cancel_timeout of {settings.cancel_timeout:g} s is over"
                )
                for job in handling.running():
                    handling.killed += 1
                    handling.kill(job, why)
                self._wait(Deadline(1.0), None)
        handling.finished += started - handling.cancelled - handling.killed

    def _wait(self, deadline: Deadline, hurry: Any) -> bool:
        pool = self._handling.pool
        gate = self.inline_done if pool is None else pool.idle
        return not self._handling.busy or wait_open(gate, deadline, hurry)


class _Alarm:
    """Interrupts one handler at its `handler_timeout`, and kills it where it goes on all the same."""

    __slots__ = ("_handling", "_job", "_message", "_timer")

    def __init__(self, handling: Handling, job: Job) -> None:
        self._handling, self._job, self._message = handling, job, job.message
        self._start(handling.settings.handler_timeout or 0.0, self._time_out)

    def _start(self, seconds: float, action: Callable[[], None]) -> None:
        self._timer = gevent.get_hub().loop.timer(seconds)
        self._timer.start(action)

    def _time_out(self) -> None:
        self.stop()
        seconds = self._handling.settings.handler_timeout or 0.0
        self._start(self._handling.settings.cancel_timeout, self._kill)
        self._handling.interrupt(
            self._job, HandlerTimeout(seconds), f"handler_timeout of {seconds:g} s is over"
        )

    def _kill(self) -> None:
        self.stop()
        self._handling.kill(self._job, "it went on after its handler_timeout")

    def stop(self) -> None:
        self._timer.stop()
        self._timer.close()
