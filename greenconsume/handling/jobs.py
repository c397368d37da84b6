"""Owns a handler at work: its message, its context, and how it is interrupted, shielded or killed.

What runs where is known here alone. It must never decide when to interrupt: that is `alarm` for one that
takes too long, and `drain`. Called by `boundary` and `pool`; `shielded` by whatever writes to a broker.
"""

from __future__ import annotations

import contextvars
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import gevent
import greenlet  # type: ignore[import-untyped]  # its stubs are a package of their own
from gevent import GreenletExit
from kombu import Consumer

from greenconsume.errors import HandlerHung, Interrupt, Shutdown
from greenconsume.events import HandlerInterrupted, emit


class Handled(Protocol):
    """A handler's argument: a `kombu.Message`, or a `Batch` of them."""

    @property
    def delivery_tag(self) -> Any:
        """The delivery tag of the message; of a batch, that of its first message."""

    @property
    def delivery_info(self) -> Any:
        """The fields of its delivery, by name: `routing_key`, `consumer_tag`, …."""

    def ack(self) -> object:
        """Acknowledge it. Never switches on a green link."""


#: The key of a job that waits for no other.
ALONE = object()


class Job:
    """One handler at work: for which message, in which context, and how it is interrupted.

    Attributes:
        key: Jobs with the same key run one after the other.
        context: The context variables of the consumer's greenlet, when the message came.
        greenlet: Where it runs; None before it started and after it ended.
        began: When it began (`time.monotonic`), or when somebody looked first; 0: nobody has yet.
        interrupted: What was raised in it, if something was.
        killed: It was told to end for good; what it leaves unsettled is the broker's.
        owner: The name of the consumer whose handler it is.
        outer: The jobs that drain in their handlers, and so run this one: what shields it shields them.
        shields: While it is not 0, interrupts wait.
        size: The number of messages that the handler is given. No property: each message asks for it twice.
    """

    size = 1

    __slots__ = (
        "_pending",
        "began",
        "consumer",
        "context",
        "greenlet",
        "interrupted",
        "key",
        "killed",
        "message",
        "outer",
        "owner",
        "shields",
    )

    def __init__(
        self,
        message: Handled,
        consumer: Consumer | None = None,
        key: Hashable = ALONE,
        owner: str = "",
    ) -> None:
        self.message = message
        self.consumer = consumer
        self.key = key
        self.owner = owner
        self.context = contextvars.copy_context()
        self.greenlet: Any = None
        self.began = 0.0
        self.interrupted: Interrupt | None = None
        self.killed = False
        self.shields = 0
        self.outer: tuple[Job, ...] = ()
        self._pending: BaseException | None = None

    def look(self, now: float) -> None:
        """Count its seconds from now on, if it began while nobody looked. Never switches."""
        self.began = self.began or now

    def run(self, work: Callable[[Job], None]) -> None:
        """Call `work` with this job, in this greenlet and in the job's own context."""
        current = self.greenlet = gevent.getcurrent()
        outer = _running.get(current)
        if outer is not None:
            self.outer = (outer, *outer.outer)
        _running[current] = self
        try:
            self.context.run(work, self)
        finally:
            self.greenlet = None
            if outer is None:
                del _running[current]
            else:
                _running[current] = outer

    def interrupt(self, interrupt: Interrupt, reason: str) -> None:
        """Raise `interrupt` in the handler at the hub's next turn, if it still runs then. Never switches.

        One that is shielded, because it is in the middle of writing to a broker, finishes that first.
        """
        emit(HandlerInterrupted(self.owner, self.message.delivery_tag, reason, False))
        gevent.get_hub().loop.run_callback(self._raise_inside, interrupt)

    def kill(self, reason: str, by_force: bool) -> None:
        """Raise `GreenletExit` in the handler at the hub's next turn. Never switches.

        Args:
            reason: What the log says of it.
            by_force: Also in the middle of a write to a broker, whose connection is of no use after it.
        """
        emit(HandlerInterrupted(self.owner, self.message.delivery_tag, reason, True))
        if by_force:
            self.killed = True
        gevent.get_hub().loop.run_callback(self._raise_inside, GreenletExit())

    def _raise_inside(self, error: BaseException) -> None:
        # In the hub: the handler waits somewhere.
        if self.greenlet is None:
            return
        if self.shields and not self.killed:
            if self._pending is None or isinstance(error, Interrupt):  # a kill does not hide why
                self._pending = error
        else:
            if isinstance(error, Interrupt):
                self.interrupted = error
            # Not the greenlet's own `throw`: that of a consumer's means that it is killed itself.
            greenlet.greenlet.throw(self.greenlet, error)

    def end_shield(self) -> None:
        """Let interrupts through again; one that had to wait comes at the next switch. Never switches."""
        self.shields -= 1
        error = self._pending
        if error is not None and not self.shields:
            self._pending = None
            # Not raised here: whoever called what was shielded is to see how it ended.
            gevent.get_hub().loop.run_callback(self._raise_inside, error)


#: The job that runs in a greenlet. No context variable: that costs a message several objects for the garbage
#: collector, whose work grows with what thousands of waiting handlers hold.
_running: dict[Any, Job] = {}


def current_job() -> Job | None:
    """Return the job that runs in this greenlet; a greenlet that a handler spawns has none."""
    return _running.get(gevent.getcurrent())


def note_abort(frame: FrameType | None, silence: float | None) -> None:
    """Tell the job of this greenlet, if there is one, that an exception is about to end it, and why.

    Args:
        frame: The innermost one, as a signal handler finds it.
        silence: Seconds for which it has kept the whole process waiting, and fails with `HandlerHung`;
            None: it is ended by chance, and its message goes back.

    Switches: never. From a signal handler.
    """
    job = current_job()
    if job is None:
        return
    if silence is None:
        job.interrupted = Shutdown("its process was aborted")
    else:
        stack = "".join(traceback.format_stack(frame)).rstrip()
        job.interrupted = HandlerHung(job.owner, job.message.delivery_tag, silence, stack)


def job_on(thread_id: int) -> Job | None:
    """Return the job that runs on a thread now, in the place of its hub. From any thread.

    A greenlet that waits has a frame that is kept for it; the one that runs has none.
    """
    for greenlet_, job in list(_running.items()):
        if greenlet_.gr_frame is None and _thread_of(greenlet_) == thread_id:
            return job
    return None


def _thread_of(greenlet_: greenlet.greenlet) -> int:
    hub = greenlet_
    while not hasattr(
        hub, "thread_ident"
    ):  # only hubs have it; above a thread's main greenlet is none
        hub = hub.parent
        if hub is None:
            return threading.main_thread().ident or 0
    return int(hub.thread_ident)


@contextmanager
def shielded() -> Iterator[None]:
    """Keep interrupts from the handler of this greenlet, if it runs one, until the block has ended."""
    job = current_job()
    if job is None:
        yield
        return
    for each in (job, *job.outer):
        each.shields += 1
    try:
        yield
    finally:
        for each in (job, *job.outer):
            each.end_shield()
