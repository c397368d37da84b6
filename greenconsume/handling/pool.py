"""Owns the greenlets that handlers run in: how many at once, in which order, and how they are interrupted.

A `HandlerPool` serves one consumer. Its greenlets are kept and used again: to start one for each message
costs more than all the rest of a delivery. What a job does, `handlers` gives; it must not raise, save for
what is meant to end the greenlet itself. Nothing here waits but `submit`.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import greenlet  # type: ignore[import-untyped]  # its stubs are a package of their own
from gevent import GreenletExit
from gevent.event import Event

from greenconsume.errors import Interrupt
from greenconsume.stopping import Deadline, StopSignal, wait

#: The key of a job that waits for no other.
ALONE = object()
#: Jobs that may wait for their key's turn in one pool, where the broker's prefetch sets no lower limit.
MAX_WAITING = 10_000


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
        """Take a place, waiting for one; return False, without one, if `stop` is set by then.

        Switches: only if none is free.
        """
        if stop.is_set():
            return False
        if self.free and not self._queue:
            self.free -= 1
            return True
        turn = Event()
        self._queue.append(turn)
        try:
            wait(turn, Deadline(None), stop)
        except BaseException:  # a kill: whoever waits behind it is not to wait for ever
            self._decline(turn)
            raise
        if stop.is_set():
            self._decline(turn)
            return False
        return True

    def _decline(self, turn: Event) -> None:
        if turn in self._queue:
            self._queue.remove(turn)
        else:  # its turn had come
            self.release()

    def release(self) -> None:
        """Give a place back, to whoever has waited longest. Never switches."""
        if self._queue:
            self._queue.popleft().set()
        else:
            self.free += 1


class Job:
    """One handler at work: for which message, in which context, and how it is interrupted.

    Attributes:
        key: Jobs with the same key run one after the other.
        context: The context variables of the consumer's greenlet, when the message came.
        greenlet: Where it runs; None before it started and after it ended.
        began: When it began (`time.monotonic`), where somebody watches; else 0.
        interrupted: What was raised in it, if something was.
        killed: It was told to end for good; what it leaves unsettled is the broker's.
        outer: The jobs that drain in their handlers, and so run this one: what shields it shields them.
        shields: While it is not 0, interrupts wait.
    """

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
        "shields",
    )

    def __init__(self, message: Any, consumer: Any = None, key: Hashable = ALONE) -> None:
        self.message = message
        self.consumer = consumer
        self.key = key
        self.context = contextvars.copy_context()
        self.greenlet: Any = None
        self.began = 0.0
        self.interrupted: Interrupt | None = None
        self.killed = False
        self.shields = 0
        self.outer: tuple[Job, ...] = ()
        self._pending: BaseException | None = None

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

    def interrupt(self, interrupt: Interrupt) -> None:
        """Raise `interrupt` in the handler at the hub's next turn, if it still runs then. Never switches.

        One that is shielded, because it is in the middle of writing to a broker, finishes that first.
        """
        gevent.get_hub().loop.run_callback(self._raise_inside, interrupt)

    def kill(self, by_force: bool) -> None:
        """Raise `GreenletExit` in the handler at the hub's next turn. Never switches.

        Args:
            by_force: Also in the middle of a write to a broker, whose connection is of no use after it.
        """
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


class HandlerGreenlet(gevent.Greenlet):  # type: ignore[misc]  # gevent is untyped
    """Runs one job after another, parked in between."""

    def __init__(self, pool: HandlerPool, job: Job) -> None:
        super().__init__()
        self._pool = pool
        self.job: Job | None = job
        self.parked = False

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
            try:
                job.run(pool.work)
            except BaseException:  # somebody kills the greenlet: its partition goes on in another
                pool.end(job, dying=True)
                raise
            self.job = pool.end(job)
            if self.job is None:
                pool.park(self)


class HandlerPool:
    """Runs up to `size` jobs of one consumer at once, in greenlets that it keeps.

    Args:
        name: The consumer's, for the names of the greenlets.
        size: How many jobs run at once.
        work: What a job does.
        limit: Places that other pools share, too.

    Attributes:
        jobs: Those that run.
        idle: Set while none does.
    """

    def __init__(
        self, name: str, size: int, work: Callable[[Job], None], limit: Slots | None = None
    ) -> None:
        self.name = name
        self.work = work
        self.jobs: set[Job] = set()
        self.idle = Event()
        self.idle.set()
        self._slots = Slots(size)
        self._limit = limit
        self._room = Slots(max(MAX_WAITING, 2 * size))
        self._waiting: dict[Hashable, deque[Job]] = {}
        self._parked: list[HandlerGreenlet] = []
        self._closed = False

    @property
    def size(self) -> int:
        """How many jobs run at once."""
        return self._slots.count

    def submit(self, job: Job, stop: StopSignal, wanted: Callable[[Job], bool]) -> bool:
        """Start `job` when there is room; one whose key is at work waits for its turn instead.

        Jobs with one key run one after the other, in the order in which they came.

        Args:
            job: What is to run.
            stop: Ends the wait.
            wanted: Whether to start it after all, asked after a wait.

        Returns:
            False if it was not started, because `stop` is set or it is no longer wanted.

        Switches: only while there is no room.
        """
        if job.key in self._waiting:
            if not self._room.acquire(stop):
                return False
            if job.key in self._waiting:  # else its turn came while there was no room
                self._waiting[job.key].append(job)
                return True
            self._room.release()
        if job.key is not ALONE:
            self._waiting[job.key] = deque()
        if self._acquire(stop):
            if wanted(job):
                self._start(job)
                return True
            self._release()
        self._skip(job)
        return False

    def _acquire(self, stop: StopSignal) -> bool:
        if not self._slots.acquire(stop):
            return False
        try:
            if self._limit is None or self._limit.acquire(stop):
                return True
        except BaseException:  # a kill
            self._slots.release()
            raise
        self._slots.release()
        return False

    def _release(self) -> None:
        self._slots.release()
        if self._limit is not None:
            self._limit.release()

    def _skip(self, job: Job) -> None:
        """Forget a job that did not start, and what lined up behind it: their channel closes."""
        for _ in self._waiting.pop(job.key, ()):
            self._room.release()

    def _start(self, job: Job) -> None:
        self.jobs.add(job)
        self.idle.clear()
        if self._parked:
            worker = self._parked.pop()
            worker.job, worker.parked = job, False
            gevent.get_hub().loop.run_callback(worker.switch)
        else:
            HandlerGreenlet(self, job).start()

    def end(self, done: Job, dying: bool = False) -> Job | None:
        """Take note that a job has ended; return the next of its partition, or free its place.

        Args:
            done: The job.
            dying: Its greenlet cannot run another.
        """
        self.jobs.discard(done)
        following = self._following(done)
        if following is None:
            self._release()
            if not self.jobs:
                self.idle.set()
        elif dying:
            self._start(following)
        else:
            self.jobs.add(following)
        return following

    def _following(self, done: Job) -> Job | None:
        if done.key is ALONE:
            return None
        queue = self._waiting[done.key]
        if queue:
            self._room.release()
            return queue.popleft()
        del self._waiting[done.key]
        return None

    def park(self, worker: HandlerGreenlet) -> None:
        """Wait, in a greenlet of the pool, for its next job; it ends without one if the pool is closed."""
        if self._closed:
            return
        self._parked.append(worker)
        worker.parked = True
        try:
            while worker.parked:  # a handler may have left something behind that wakes it
                gevent.get_hub().switch()
        except BaseException:  # or that kills it
            if worker.parked:
                self._parked.remove(worker)
            elif worker.job is not None:
                self._start(worker.job)
            raise

    def unstarted(self) -> Iterator[Job]:
        """Yield, and forget, the jobs that wait for their partition's turn, the last first."""
        for queue in self._waiting.values():
            while queue:
                self._room.release()
                yield queue.pop()

    def open(self) -> None:
        """Keep greenlets for later, from now on. Never switches."""
        self._closed = False

    def close(self) -> None:
        """Let the greenlets end that have nothing to do, and the others after their job. Never switches."""
        self._closed = True
        parked, self._parked = self._parked, []
        for worker in parked:
            worker.parked = False
            gevent.get_hub().loop.run_callback(worker.switch)
