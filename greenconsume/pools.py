"""Owns the greenlets that handlers run in: how many at once, in which order, and how they are ended.

A `HandlerPool` serves one consumer. Its greenlets are kept and used again: starting one for each message
costs more than all the rest of a delivery. Called by `handlers`; runs no user code but the jobs it is given.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import gevent
from gevent.event import Event

from greenconsume.errors import Interrupt
from greenconsume.stopping import Deadline, StopSignal, wait

#: The key of a job that waits for no other.
ALONE = object()


class Slots:
    """A number of places, given out in the order in which they were asked for.

    Args:
        count: How many there are.

    Raises:
        ValueError: `count` is less than one.
    """

    __slots__ = ("_queue", "count", "free")

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"there must be at least 1 slot, not {count!r}")
        self.count = self.free = count
        self._queue: deque[Event] = deque()

    def acquire(self, stop: StopSignal) -> bool:
        """Take a place, waiting for one; return False, without one, if `stop` came first.

        Switches: only if none is free.
        """
        if self.free and not self._queue:
            self.free -= 1
            return True
        turn = Event()
        self._queue.append(turn)
        wait(turn, Deadline(None), stop)
        if turn in self._queue:  # it was the stop that woke us
            self._queue.remove(turn)
            return False
        return True

    def release(self) -> None:
        """Give a place back, to whoever has waited longest. Never switches."""
        if self._queue:
            self._queue.popleft().set()
        else:
            self.free += 1


class Job:
    """One handler at work: what it runs, for which message, and how it is interrupted.

    Attributes:
        greenlet: Where it runs; None before it started and after it ended.
        killed: It was killed: whatever it raises now is no failure of the handler's.
    """

    __slots__ = (
        "consumer",
        "context",
        "greenlet",
        "interrupt",
        "key",
        "killed",
        "message",
        "run",
        "shields",
    )

    def __init__(self, run: Callable[[Job], None], message: Any, consumer: Any = None) -> None:
        self.run = run
        self.message = message
        self.consumer = consumer
        self.key: Hashable = ALONE
        self.context: contextvars.Context | None = None
        self.greenlet: Any = None
        self.interrupt: Interrupt | None = None
        self.shields = 0
        self.killed = False

    def raise_inside(self, interrupt: Interrupt) -> None:
        """Raise `interrupt` in the handler where it waits; in the hub, never in a greenlet.

        One that is shielded, because it is in the middle of writing to a broker, finishes that first.
        """
        if self.greenlet is None:
            return
        if self.shields:
            self.interrupt = interrupt
        else:
            self.greenlet.throw(interrupt)

    def kill(self) -> None:
        """Kill the handler where it waits. Never switches."""
        if self.greenlet is not None:
            self.killed = True
            self.greenlet.kill(block=False)


class HandlerGreenlet(gevent.Greenlet):  # type: ignore[misc]  # gevent is untyped
    """Runs one job after another, parked in between."""

    def __init__(self, pool: HandlerPool, job: Job) -> None:
        super().__init__()
        self._pool = pool
        self.job: Job | None = job

    @property
    def name(self) -> str:
        """Shows the consumer, and the message at work."""
        job = self.job
        tag = f" message {job.message.delivery_tag}" if job is not None else " idle"
        return f"handler of {self._pool.name}{tag}"

    def _run(self) -> None:
        pool = self._pool
        while self.job is not None:
            job = self.job
            job.greenlet = self
            try:
                assert job.context is not None
                job.context.run(job.run, job)
            except BaseException:  # a kill: this greenlet ends, its partition goes on in another
                pool.end(self, job, dying=True)
                raise
            self.job = pool.end(self, job)
            if self.job is None and pool.park(self):
                gevent.get_hub().switch()


class HandlerPool:
    """Runs up to `size` jobs of one consumer at once, in greenlets that it keeps.

    Args:
        name: The consumer's, for the names of the greenlets.
        size: How many jobs run at once.
        limit: Places that other pools share, too.
    """

    def __init__(self, name: str, size: int, limit: Slots | None = None) -> None:
        self.name = name
        self.jobs: set[Job] = set()
        self.idle = Event()
        self.idle.set()
        self._slots = Slots(size)
        self._limit = limit
        self._waiting: dict[Hashable, deque[Job]] = {}
        self._parked: list[HandlerGreenlet] = []
        self._closed = False

    @property
    def size(self) -> int:
        """How many jobs run at once."""
        return self._slots.count

    def submit(self, job: Job, stop: StopSignal) -> bool:
        """Start `job` when there is room, and its key's turn; return False if `stop` came first.

        Jobs with one key run one after the other, in the order in which they came.

        Switches: only while there is no room.
        """
        if job.key is not ALONE:
            if job.key in self._waiting:
                self._waiting[job.key].append(job)
                return True
            self._waiting[job.key] = deque()
        if not self._acquire(stop):
            self._waiting.pop(job.key, None)
            return False
        job.context = contextvars.copy_context()
        self._start(job)
        return True

    def _acquire(self, stop: StopSignal) -> bool:
        if not self._slots.acquire(stop):
            return False
        if self._limit is not None and not self._limit.acquire(stop):
            self._slots.release()
            return False
        return True

    def _start(self, job: Job) -> None:
        self.jobs.add(job)
        self.idle.clear()
        if self._parked:
            greenlet = self._parked.pop()
            greenlet.job = job
            gevent.get_hub().loop.run_callback(greenlet.switch)
        else:
            HandlerGreenlet(self, job).start()

    def end(self, greenlet: HandlerGreenlet, done: Job, dying: bool = False) -> Job | None:
        """Take note that a job has ended; return the next of its partition, or free its place."""
        done.greenlet = None
        self.jobs.discard(done)
        following = self._follow(done)
        if following is not None:
            if dying:
                self._start(following)
            else:
                self.jobs.add(following)
            return following
        self._slots.release()
        if self._limit is not None:
            self._limit.release()
        if not self.jobs:
            self.idle.set()
        return None

    def _follow(self, done: Job) -> Job | None:
        if done.key is ALONE:
            return None
        queue = self._waiting[done.key]
        if queue:
            following = queue.popleft()
            following.context = contextvars.copy_context()
            return following
        del self._waiting[done.key]
        return None

    def park(self, greenlet: HandlerGreenlet) -> bool:
        """Keep a greenlet for later; return False if it may end."""
        if self._closed:
            return False
        self._parked.append(greenlet)
        return True

    def unstarted(self) -> Iterator[Job]:
        """Yield, and forget, the jobs that wait for their partition's turn."""
        for queue in self._waiting.values():
            while queue:
                yield queue.popleft()

    def open(self) -> None:
        """Keep greenlets for later, from now on. Never switches."""
        self._closed = False

    def close(self) -> None:
        """Let the greenlets end that have nothing to do, and the others after their job. Never switches."""
        self._closed = True
        parked, self._parked = self._parked, []
        for greenlet in parked:
            gevent.get_hub().loop.run_callback(greenlet.switch)


def current_job() -> Job | None:
    """Return the job that runs in this greenlet."""
    return getattr(gevent.getcurrent(), "job", None)
