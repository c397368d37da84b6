"""Owns the greenlets that handlers run in: how many at once, and in which order.

A `HandlerPool` serves one consumer. Its greenlets are kept and used again: to start one for each message
costs more than all the rest of a delivery. What a job does, `boundary` gives; it must not raise, save for
what is meant to end the greenlet itself. Nothing here waits but `submit`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator

import gevent
from gevent.event import Event

from greenconsume.handling.jobs import ALONE, Job
from greenconsume.handling.slots import Slots
from greenconsume.stopping import StopSignal

#: Jobs that may wait for their key's turn in one pool, where the broker's prefetch sets no lower limit.
MAX_WAITING = 10_000


class HandlerGreenlet(gevent.Greenlet):  # type: ignore[misc]  # gevent is untyped
    """Runs one job after another, parked in between."""

    def __init__(self, pool: HandlerPool, job: Job) -> None:
        super().__init__()
        self._pool = pool
        self.job: Job | None = job
        self.parked = False

    @property
    def name(self) -> str:
        """The name that gevent shows: the consumer, and the message at work."""
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
        """The number of jobs that run at once."""
        return self._slots.count

    def submit(self, job: Job, stop: StopSignal, wanted: Callable[[Job], bool]) -> bool:
        """Start `job` when there is room; one whose key is at work waits for its turn instead.

        Jobs with one key run one after the other, in the order in which they came.

        Args:
            job: What is to run.
            stop: Ends the wait.
            wanted: Called after a wait; returns whether the job is still to be started.

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
