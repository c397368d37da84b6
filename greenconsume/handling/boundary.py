"""Owns the boundary around the user's callback: where it runs, what ends it, what its failure means.

Whatever a callback raises stays here (law 5): it is never taken for the broker's error. The consumer
lives on, the failure is told once with its traceback, and the message meets the consumer's policy. A
callback that was interrupted has not failed: its message goes back unaltered.

Callbacks run inline in the consumer's greenlet, or in a `HandlerPool`; either way in a copy of the
consumer's context variables. Called by `consuming`; `drain` ends what runs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any

import gevent
from gevent import GreenletExit
from gevent.event import Event
from kombu import Consumer, Message

from greenconsume.errors import HandlerHung, HandlerTimeout, Interrupt, Shutdown, StoppedError
from greenconsume.events import HandlerFailed, PrefetchTooSmall, emit
from greenconsume.failures.requeues import DelayedRequeues, give_back, is_live, is_settleable
from greenconsume.failures.retry import make_recoverer
from greenconsume.handling.advice import advise
from greenconsume.handling.alarm import Alarm
from greenconsume.handling.decoding import receive
from greenconsume.handling.intake import Fitted, can_be_fitted
from greenconsume.handling.jobs import ALONE, Job, current_job
from greenconsume.handling.kill_switch import Switch
from greenconsume.handling.pace import Pace
from greenconsume.handling.pool import HandlerPool
from greenconsume.handling.prefetch import wanted_prefetch
from greenconsume.handling.settings import Settings
from greenconsume.handling.trial import handle_alone, sentence_on
from greenconsume.handling.wrapping import wrapped
from greenconsume.lifecycle import Lifecycle
from greenconsume.links.pool import LinkPool
from greenconsume.stopping import FORK, Deadline, wait_open


class Handling:
    """One consumer's handlers: where they run, and what becomes of their messages.

    Args:
        life: The consumer's lifecycle.
        settings: How they run.
        switch: The consumer's kill switch, which is told how each message fared.
        owned: They run in a greenlet of greenconsume's own. In another's, what is no `Exception` (a kill, a
            `gevent.Timeout`, `SystemExit`) may be meant for somebody else's code, and passes.
        links: Returns the links that copies of failed messages are published over.

    Attributes:
        pool: Where they run; None: inline.
        idle: Set while none runs.
        requeues: The failed messages that wait to go back.
        recoverer: What its failure policies need to publish copies.
        given_back: How many messages were given back that no handler had started.
        cancelled: How many handlers a shutdown ended.
        tally: What becomes of its messages, in all its lives.
    """

    __slots__ = (
        "__weakref__",
        "_inline",
        "_life",
        "_links",
        "_owned",
        "_paces",
        "_receive_wrapped",
        "_switch",
        "cancelled",
        "given_back",
        "idle",
        "pool",
        "recoverer",
        "requeues",
        "settings",
        "tally",
    )

    def __init__(
        self,
        life: Lifecycle,
        settings: Settings,
        switch: Switch | None = None,
        owned: bool = False,
        links: Callable[[], LinkPool] = LinkPool,
    ) -> None:
        self.settings = settings
        self.requeues = DelayedRequeues()
        self.given_back = self.cancelled = 0
        self.tally = life.tally
        self.pool: HandlerPool | None = None
        self.recoverer = make_recoverer(
            settings.on_error, life, links, self.requeues, settings.settle_deadline
        )
        self._life, self._switch, self._owned, self._links = life, switch, owned, links
        own = () if settings.rate is None else (Pace(settings.rate),)
        both = settings.shared.pace
        self._paces = own if both is None else (*own, both)
        self._inline: dict[Job, None] = {}  # an empty set takes 216 bytes
        self._receive_wrapped = wrapped(self._receive, settings.around)
        if settings.concurrency is None:
            self.idle = Event()
            self.idle.set()
        else:
            self.pool = HandlerPool(
                life.name, settings.concurrency, self._work_unless_stopped, settings.shared.slots
            )
            self.idle = self.pool.idle

    # -- where it runs --------------------------------------------------------------------------

    def submit(self, consumer: Consumer, message: Message) -> None:
        """Handle `message` in the pool; one that the stop overtakes is given back."""
        assert self.pool is not None
        job = Job(message, consumer, ALONE, self._life.name)
        if self.settings.partition is not None:
            try:
                key = self.settings.partition(message)
                hash(key)
            except Exception as exc:  # the user's code, as much as the handler is
                self._failed(job, exc)
                return
            job.key = ALONE if key is None else key
        if not self.pool.submit(job, self._life.consume_stop, self._is_wanted):
            self.give_back(message)

    def _is_wanted(self, job: Job) -> bool:
        # What a lost link had delivered comes again; what needs no ack does not.
        return getattr(job.consumer, "no_ack", False) or is_live(job.message)

    def handle(self, consumer: Consumer, message: Message) -> None:
        """Handle `message` here and now; one that a polled transport brings after the stop is given back."""
        life = self._life
        if life.consume_stop.reason is not None and self._is_unsettled(message):
            self.give_back(message)
            return
        job = Job(message, consumer, ALONE, life.name)
        self._inline[job] = None
        self.idle.clear()
        try:
            job.run(self._work)
        finally:
            self._inline.pop(job, None)
            if not self._inline:
                self.idle.set()

    def handle_again(self, consumer: Any, message: Any, handle: Callable[..., None]) -> None:
        """Handle a message that came before by `handle`, but alone if one of them closed the link.

        Switches: as `handle`, and while others run.
        """
        quarantine = self._links().quarantine
        failure = sentence_on(message, self._life.name, quarantine)
        if failure is not None:
            self._failed(Job(message, consumer, ALONE, self._life.name), failure)
        elif not (self.settings.batch_size or current_job()) and quarantine.holds(self._life.name):
            # Of a batch nobody can tell which message it was; who drains in a handler cannot wait for that.
            wait_open(self.idle, Deadline(None), self._life.consume_stop)
            handle_alone(message, quarantine, lambda: self.handle(consumer, message))
        else:
            handle(consumer, message)

    def _paced(self) -> Callable[[Any, Any], None]:
        """Return what handles a message, at the consumer's rate and its runtime's, if there is one."""
        handle = self.handle if self.pool is None else self.submit
        paces, stop = self._paces, self._life.consume_stop
        if not paces:
            return handle

        def handle_in_time(consumer: Consumer, message: Message) -> None:
            if all(pace.wait(stop) for pace in paces):
                handle(consumer, message)
            else:
                self.give_back(message)

        return handle_in_time

    def fitted(self, consumer: Consumer) -> Callable[[Any, Any], None]:
        """Have the broker send enough to keep the pool busy, and no more than a rate, or a late hub, allows.

        Returns:
            What handles each message, at the rate, and fits the prefetch again where that changes.

        Switches: yes, if the prefetch is not the consumer's own.
        """
        wanted, chosen = wanted_prefetch(consumer, self.settings, self._paces)
        size = self.settings.batch_size
        if wanted != chosen:
            consumer.qos(prefetch_count=wanted)
        elif chosen and self.pool is not None and chosen < self.pool.size * (size or 1):
            emit(PrefetchTooSmall(self._life.name, chosen, self.pool.size, size))
        intake = self.settings.shared.intake
        if intake is None or not can_be_fitted(consumer):
            return self._paced()
        return Fitted(consumer, wanted, intake).handler(self._paced())

    # -- one message ----------------------------------------------------------------------------

    _receive = staticmethod(receive)

    def _work_unless_stopped(self, job: Job) -> None:
        # What ends consuming may have come after it was given a greenlet, and before that had its turn.
        if self._life.consume_stop.reason is not None and self._is_unsettled(job.message):
            self.give_back(job.message)
        elif job.key is ALONE or self._is_wanted(job):  # else its link was lost meanwhile
            self._work(job)

    def _work(self, job: Job) -> None:
        timings = self.tally.timings
        if timings is not None:
            job.began = monotonic()
        try:
            if self.settings.handler_timeout is None:
                self._receive_wrapped(job.consumer, job.message)
            else:
                with Alarm(job, self.settings.handler_timeout, self.settings.cancel_timeout):
                    self._receive_wrapped(job.consumer, job.message)
            if job.interrupted is not None and self._is_unsettled(job.message):
                raise job.interrupted  # it was swallowed, and the work is not done
            if self.settings.auto_settle and self._is_unsettled(job.message):
                job.message.ack()
            self.tally.ok += job.size
            if self._switch is not None:
                self._switch.note(failed=False)
        except BaseException as exc:  # the boundary: what the user's code raises ends here
            job.shields += 1  # what follows is not the handler's any more
            if not self._ends_here(job, exc):
                raise
        finally:
            if timings is not None:
                now = monotonic()
                timings.note(now, now - job.began, job.size)

    def _is_unsettled(self, message: Message) -> bool:
        return is_settleable(message)

    def _ends_here(self, job: Job, exc: BaseException) -> bool:
        """Settle what a handler that raised leaves behind; return whether its exception goes no further."""
        if self._is_foreign(job, exc):
            return False
        if job.killed:
            self.tally.killed += job.size
            return True  # the message is the broker's: the channel closes
        if self._is_cancelled(job, exc):
            self.cancelled += 1
            self.tally.cancelled += job.size
            self.give_back(job.message, started=True)
        elif isinstance(job.interrupted, HandlerHung):
            if not isinstance(job.message, Sequence):
                self.recoverer.take_on(job.consumer, job.message)
            self._failed(job, job.interrupted)  # whatever it made of the exception that ended it
        elif isinstance(exc, GreenletExit) and job.interrupted is not None:
            self._failed(job, job.interrupted)  # it swallowed its timeout, and was killed
        else:
            self._failed(job, exc)
        return True

    def _is_foreign(self, job: Job, exc: BaseException) -> bool:
        """Return whether `exc` is meant for the greenlet itself, or for the whole process."""
        if isinstance(exc, (Exception, Interrupt)):
            return False
        if isinstance(exc, (KeyboardInterrupt, GeneratorExit)):
            return True
        if isinstance(exc, SystemExit) and self._life.stop.reason == FORK:
            return True  # a forked child that exits, in a copy of the handler
        if job.killed or job.interrupted is not None or job not in self._inline:
            return False
        return not self._owned or getattr(gevent.getcurrent(), "killed", False)

    def _is_cancelled(self, job: Job, exc: BaseException) -> bool:
        # Whatever a handler makes of its Shutdown: it has not failed by itself.
        if isinstance(exc, StoppedError):
            return self._life.stop.is_set()  # a wait of this package's own that the stop ended
        return isinstance(exc, Shutdown) or isinstance(job.interrupted, Shutdown)

    def _failed(self, job: Job, exc: BaseException) -> None:
        message = job.message
        self.tally.count_failure(exc, isinstance(exc, HandlerTimeout), job.size)
        outcome = self._outcome_of(message, exc)
        routing_key = str(message.delivery_info.get("routing_key", ""))
        name, tag = self._life.name, message.delivery_tag
        emit(HandlerFailed(name, tag, routing_key, exc, outcome, job.size))
        advise(name, message, exc)
        if self._switch is not None:
            self._switch.note(failed=True)

    def _outcome_of(self, message: Message, exc: BaseException) -> str:
        """Have a failed message meet the policy, and return in words what became of it."""
        if is_settleable(message):
            return self._settle_failed(message, exc)
        if message.acknowledged:
            return "left as the handler settled it"
        return "lost: its consumer takes messages without acknowledging them"

    def _settle_failed(self, message: Message, exc: BaseException) -> str:
        try:
            return self.settings.on_error.apply(message, exc, self.requeues)
        except Exception as error:  # a policy that cannot act must not lose the message
            if is_settleable(message):
                self.requeues.add(message, 1.0)
            return f"requeued in 1 s, because its policy failed: {error!r}"

    def give_back(self, message: Message, started: bool = False) -> None:
        """Put a message back into its queue, unaltered; the broker has those of a lost link already."""
        if is_settleable(message) and is_live(message):
            self.given_back += not started
            self.tally.given_back += not started
            give_back(message)

    def complete(self) -> None:
        """Do nothing: only batches wait for more. Called when a consumer ends that was not stopped."""

    # -- ending handlers --------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """True if a handler runs."""
        return bool(self._inline) or (self.pool is not None and bool(self.pool.jobs))

    @property
    def holds_live(self) -> bool:
        """True if a handler runs whose message can still be settled."""
        messages = [job.message for job in self.running()]
        return any(is_live(each[0][1] if isinstance(each, Sequence) else each) for each in messages)

    def unstarted(self) -> Iterator[Job]:
        """Yield, and forget, the jobs that wait for their turn, the last first."""
        if self.pool is not None:
            yield from self.pool.unstarted()

    def running(self) -> list[Job]:
        """Return the jobs that run now."""
        return [*self._inline, *(self.pool.jobs if self.pool is not None else ())]

    def retire(self) -> None:
        """Let go of what waits and of idle greenlets: the channel closes. Never switches.

        What has not started is the broker's again; handlers that run end by themselves.
        """
        self.requeues.cancel()
        for _ in self.unstarted():
            pass  # forgotten
        if self.pool is not None:
            self.pool.close()
