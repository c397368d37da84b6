"""The greenlets that handlers run in: how many at once, in which order, in which context, how interrupted."""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent import GreenletExit
from gevent.event import Event
from hypothesis import given, settings
from hypothesis import strategies as st

from greenconsume.errors import HandlerTimeout, Shutdown
from greenconsume.handling import pool
from greenconsume.handling.jobs import Job, current_job, shielded
from greenconsume.handling.pool import HandlerGreenlet, HandlerPool
from greenconsume.handling.slots import Slots
from greenconsume.stopping import StopSignal
from tests.waiting import wait_until

WHO: contextvars.ContextVar[str] = contextvars.ContextVar("WHO", default="nobody")


class Message:
    """As much of a message as a pool looks at."""

    def __init__(self, tag: int) -> None:
        self.delivery_tag = tag


class Bench:
    """A pool whose jobs are callables, and what to submit to it."""

    def __init__(self, size: int = 2, limit: Slots | None = None) -> None:
        self.stop = StopSignal()
        self.pool = HandlerPool("bench", size, self._work, limit)
        self.done: list[Any] = []
        self.peak = 0

    def _work(self, job: Job) -> None:
        self.peak = max(self.peak, len(self.pool.jobs))
        job.consumer(job)
        self.done.append(job.message.delivery_tag)

    def job(self, tag: int, does: Callable[[Job], object] = id, key: Any = pool.ALONE) -> Job:
        return Job(Message(tag), does, key)

    def submit(self, job: Job, wanted: bool = True) -> bool:
        return self.pool.submit(job, self.stop, lambda job: wanted)

    def put(self, tag: int, does: Callable[[Job], object] = id, key: Any = pool.ALONE) -> Job:
        job = self.job(tag, does, key)
        assert self.submit(job)
        return job

    def settle(self) -> None:
        assert self.pool.idle.wait(30)

    @property
    def free(self) -> int:
        return self.pool._slots.free


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    """Make a bench; afterwards its places are all free again, and its greenlets end."""
    benches: list[Bench] = []

    def make(*args: Any, **kwargs: Any) -> Bench:
        benches.append(Bench(*args, **kwargs))
        return benches[-1]

    yield make
    for bench in benches:
        bench.stop.set()
        for job in bench.pool.jobs:
            job.kill("test", by_force=True)
        bench.settle()
        bench.pool.close()
        assert bench.free == bench.pool.size
        assert bench.pool._room.free == bench.pool._room.count


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


def blocked(gate: Event) -> Callable[[Job], object]:
    return lambda job: gate.wait()


# -- places ---------------------------------------------------------------------------------------


def test_there_must_be_a_place():
    with pytest.raises(ValueError, match="at least 1 slot, not 0"):
        Slots(0)


def test_places_are_given_in_the_order_in_which_they_were_asked_for():
    slots, stop, got = Slots(1), StopSignal(), []
    assert slots.acquire(stop)
    waiters = [gevent.spawn(lambda n=n: (slots.acquire(stop), got.append(n))) for n in range(5)]
    gevent.idle()
    assert got == []
    for _ in range(5):
        slots.release()
    gevent.joinall(waiters, timeout=30)
    assert got == [0, 1, 2, 3, 4]
    assert slots.free == 0


def test_a_stop_ends_the_wait_for_a_place_without_one():
    slots, stop = Slots(1), StopSignal()
    assert slots.acquire(stop)
    waiter = gevent.spawn(slots.acquire, stop)
    gevent.idle()
    stop.set()
    assert waiter.get(timeout=30) is False
    slots.release()
    assert slots.free == 1


def test_once_a_stop_is_set_there_is_no_place():
    slots, stop = Slots(1), StopSignal()
    stop.set()
    assert not slots.acquire(stop)
    assert slots.free == 1


def test_a_place_that_comes_together_with_the_stop_is_given_back():
    """The stop wins: nothing starts once it is set."""
    slots, stop = Slots(1), StopSignal()
    slots.acquire(stop)
    waiter = gevent.spawn(slots.acquire, stop)
    gevent.idle()
    slots.release()
    stop.set()
    assert waiter.get(timeout=30) is False
    assert slots.free == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_waiter_that_is_killed_leaves_its_place_to_the_next(first: bool):
    """One consumer's kill must not take a place of the whole process with it."""
    slots, stop = Slots(1), StopSignal()
    slots.acquire(stop)
    killed, patient = gevent.spawn(slots.acquire, stop), gevent.spawn(slots.acquire, stop)
    gevent.idle()
    killed.kill(block=first)  # if not, its turn comes before it has died
    slots.release()
    assert patient.get(timeout=30) is True
    assert slots.free == 0


# -- how many at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7])
def test_no_more_run_at_once_than_there_are_places(make_bench: Callable[..., Bench], size: int):
    bench = make_bench(size)
    for tag in range(30):
        bench.put(tag, lambda job: gevent.sleep(0))
    bench.settle()
    assert sorted(bench.done) == list(range(30))
    assert bench.peak == size


def test_one_at_a_time_is_in_order(make_bench: Callable[..., Bench]):
    bench = make_bench(1)
    for tag in range(20):
        bench.put(tag, lambda job: gevent.sleep(0.0001 * (job.message.delivery_tag % 3)))
    bench.settle()
    assert bench.done == list(range(20))


def test_a_limit_bounds_several_pools_together(make_bench: Callable[..., Bench]):
    limit, running, peak = Slots(3), set(), []

    def work(job: Job) -> None:
        running.add(job)
        peak.append(len(running))
        gevent.sleep(0)
        running.discard(job)

    benches = [make_bench(3, limit) for _ in range(3)]
    feeders = [
        gevent.spawn(lambda bench=bench: [bench.put(tag, work) for tag in range(10)])
        for bench in benches
    ]
    gevent.joinall(feeders, timeout=30)
    for bench in benches:
        bench.settle()
        assert len(bench.done) == 10
    assert max(peak) == 3
    assert limit.free == 3


def test_a_stop_ends_the_wait_for_the_limit_and_gives_the_pools_own_place_back(
    make_bench: Callable[..., Bench],
):
    limit = Slots(1)
    gate, busy, waiting = Event(), make_bench(2, limit), make_bench(2, limit)
    busy.put(1, blocked(gate))
    submitted = gevent.spawn(waiting.submit, waiting.job(2))
    gevent.idle()
    waiting.stop.set()
    assert submitted.get(timeout=30) is False
    gate.set()
    busy.settle()
    assert limit.free == 1


def test_a_consumer_killed_while_it_waits_for_the_limit_leaves_nothing_taken(
    make_bench: Callable[..., Bench],
):
    limit = Slots(1)
    gate, busy, waiting = Event(), make_bench(2, limit), make_bench(2, limit)
    busy.put(1, blocked(gate))
    submitted = gevent.spawn(waiting.submit, waiting.job(2, key="k"))
    gevent.idle()
    submitted.kill()
    assert waiting.free == 2
    gate.set()
    busy.settle()
    assert limit.free == 1


def test_what_nobody_wants_any_more_after_the_wait_does_not_run(bench: Bench):
    gate = Event()
    bench.put(1, blocked(gate))
    bench.put(2, blocked(gate))
    submitted = gevent.spawn(bench.submit, bench.job(3, key="k"), wanted=False)
    gevent.idle()
    gate.set()
    assert submitted.get(timeout=30) is False
    bench.put(4, key="k")
    bench.settle()
    assert sorted(bench.done) == [1, 2, 4]


def test_idle_is_set_while_nothing_runs(bench: Bench):
    assert bench.pool.idle.is_set()
    gate = Event()
    bench.put(1, blocked(gate))
    assert not bench.pool.idle.is_set()
    gate.set()
    bench.settle()
    assert bench.pool.jobs == set()


# -- greenlets ------------------------------------------------------------------------------------


def test_greenlets_are_used_again(bench: Bench):
    used = []
    for tag in range(10):
        bench.put(tag, lambda job: used.append(gevent.getcurrent()))
    bench.settle()
    assert len(set(used)) <= 2


def test_a_greenlets_name_shows_the_consumer_and_the_message(bench: Bench):
    names = []
    bench.put(7, lambda job: names.append(gevent.getcurrent().name))
    bench.settle()
    assert names == ["handler of bench message 7"]
    assert [worker.name for worker in bench.pool._parked] == ["handler of bench idle"]


def test_a_closed_pool_keeps_no_greenlets_and_opens_again(bench: Bench):
    workers: list[Any] = []
    bench.put(1, lambda job: workers.append(gevent.getcurrent()))
    bench.settle()
    bench.pool.close()
    wait_until(lambda: workers[0].dead)
    bench.put(2, lambda job: workers.append(gevent.getcurrent()))
    wait_until(lambda: len(workers) == 2 and workers[1].dead)
    bench.pool.open()
    bench.put(3, lambda job: workers.append(gevent.getcurrent()))
    bench.settle()
    gevent.idle()
    assert not workers[2].dead


def test_a_greenlet_killed_while_it_is_parked_is_not_used_again(bench: Bench):
    bench.put(1)
    bench.settle()
    gevent.idle()
    (parked,) = bench.pool._parked
    parked.kill()
    bench.put(2)
    bench.settle()
    assert bench.done == [1, 2]


def test_a_greenlet_killed_before_its_job_began_leaves_the_job_to_another(bench: Bench):
    bench.put(1)
    bench.settle()
    gevent.idle()
    (parked,) = bench.pool._parked
    killer = gevent.spawn(parked.kill)
    gevent.idle()
    bench.put(2)
    killer.join(30)
    bench.settle()
    assert bench.done == [1, 2]


def test_what_a_handler_leaves_to_wake_its_greenlet_does_no_harm(bench: Bench):
    """A stray switch, as of a callback that was not unlinked, finds it parked, and parks it again."""

    def careless(job: Job) -> None:
        worker = gevent.getcurrent()
        gevent.get_hub().loop.run_callback(lambda: worker.switch() and None)

    bench.put(1, careless)
    bench.settle()
    gevent.idle()
    (parked,) = bench.pool._parked
    bench.put(2)
    bench.settle()
    assert (bench.done, parked.dead) == ([1, 2], False)


def test_a_greenlet_that_somebody_kills_frees_its_place(bench: Bench):
    gate = Event()
    job = bench.put(1, blocked(gate))
    gevent.idle()
    assert isinstance(job.greenlet, HandlerGreenlet)
    job.greenlet.kill()
    bench.settle()
    assert bench.free == 2
    assert bench.done == []


# -- partitions -----------------------------------------------------------------------------------


def test_jobs_of_one_key_run_one_after_the_other(make_bench: Callable[..., Bench]):
    bench, running = make_bench(10), Counter()

    def alone(job: Job) -> None:
        running[job.key] += 1
        assert running[job.key] == 1
        gevent.sleep(0.0005)
        running[job.key] -= 1

    for tag in range(60):
        bench.put(tag, alone, key=tag % 4)
    bench.settle()
    for key in range(4):
        assert [tag for tag in bench.done if tag % 4 == key] == list(range(key, 60, 4))
    assert bench.peak == 4


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=40), st.integers(1, 5))
def test_the_order_within_a_key_holds_however_long_each_takes(
    jobs: list[tuple[int, int]], size: int
):
    bench = Bench(size)
    expected: dict[int, list[int]] = {}
    for tag, (key, turns) in enumerate(jobs):
        expected.setdefault(key, []).append(tag)
        bench.put(tag, lambda job, turns=turns: [gevent.sleep(0) for _ in range(turns)], key=key)
    bench.settle()
    bench.pool.close()
    for key, tags in expected.items():
        assert [tag for tag in bench.done if jobs[tag][0] == key] == tags
    assert bench.free == size
    assert bench.pool._waiting == {}


def test_different_keys_run_side_by_side(make_bench: Callable[..., Bench]):
    bench, gate = make_bench(3), Event()
    for key in "abc":
        bench.put(ord(key), blocked(gate), key=key)
    assert len(bench.pool.jobs) == 3
    gate.set()


def test_a_waiting_key_takes_no_place(make_bench: Callable[..., Bench]):
    """So a hot key does not keep the others from running."""
    bench, gate = make_bench(2), Event()
    for tag in range(5):
        bench.put(tag, blocked(gate), key="hot")
    bench.put(9, key="cold")
    wait_until(lambda: bench.done == [9])
    gate.set()
    bench.settle()
    assert bench.done == [9, 0, 1, 2, 3, 4]


def test_a_killed_greenlets_partition_goes_on_in_another(bench: Bench):
    gate = Event()
    first = bench.put(1, blocked(gate), key="k")
    bench.put(2, key="k")
    gevent.idle()
    first.greenlet.kill()
    bench.settle()
    assert bench.done == [2]


def test_how_many_wait_for_their_turn_is_bounded(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
):
    """HAZARDS.md row 20: without a prefetch nothing else bounds what a hot key holds in memory."""
    monkeypatch.setattr(pool, "MAX_WAITING", 3)
    bench, gate = make_bench(1), Event()
    for tag in range(4):
        bench.put(tag, blocked(gate), key="hot")
    fifth = gevent.spawn(bench.put, 4, id, "hot")
    gevent.idle()
    assert not fifth.ready()
    gate.set()
    fifth.get(timeout=30)
    bench.settle()
    assert bench.done == [0, 1, 2, 3, 4]


def test_a_stop_ends_the_wait_to_line_up(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pool, "MAX_WAITING", 2)
    bench, gate = make_bench(1), Event()
    for tag in range(3):
        bench.put(tag, blocked(gate), key="hot")
    late = gevent.spawn(bench.submit, bench.job(3, key="hot"))
    gevent.idle()
    bench.stop.set()
    assert late.get(timeout=30) is False
    assert [job.message.delivery_tag for job in bench.pool.unstarted()] == [2, 1]
    gate.set()


def test_what_waits_for_its_turn_is_given_out_once(make_bench: Callable[..., Bench]):
    bench, gate = make_bench(1), Event()
    for tag in range(4):
        bench.put(tag, blocked(gate), key=tag % 1)
    assert [job.message.delivery_tag for job in bench.pool.unstarted()] == [3, 2, 1]
    assert list(bench.pool.unstarted()) == []
    gate.set()
    bench.settle()
    assert bench.done == [0]


# -- context variables ----------------------------------------------------------------------------


def test_a_handler_has_a_copy_of_the_context_that_its_message_came_in(bench: Bench):
    """HAZARDS.md row 29: a new greenlet has none at all."""
    seen = []
    for name in ("alice", "bob"):
        WHO.set(name)
        bench.put(1, lambda job: seen.append(WHO.get()))
    bench.settle()
    assert seen == ["alice", "bob"]


def test_what_a_handler_sets_reaches_neither_the_next_nor_the_consumer(make_bench):
    """HAZARDS.md row 29: also within a partition, whose jobs follow each other in one greenlet."""
    bench, seen = make_bench(1), []

    def careless(job: Job) -> None:
        seen.append(WHO.get())
        WHO.set("somebody else")

    WHO.set("alice")
    for tag in range(3):
        bench.put(tag, careless, key="k" if tag else pool.ALONE)
    bench.settle()
    assert seen == ["alice"] * 3
    assert WHO.get() == "alice"


def test_a_job_that_waited_for_its_turn_has_the_context_it_came_in(make_bench):
    bench, gate, seen = make_bench(1), Event(), []
    bench.put(1, blocked(gate), key="k")
    WHO.set("carol")
    bench.put(2, lambda job: seen.append(WHO.get()), key="k")
    WHO.set("dave")
    gate.set()
    bench.settle()
    assert seen == ["carol"]


# -- interrupts -----------------------------------------------------------------------------------


def catching(caught: list[BaseException], gate: Event) -> Callable[[Job], object]:
    def work(job: Job) -> None:
        try:
            gate.wait()
        except BaseException as exc:
            caught.append(exc)

    return work


def test_an_interrupt_is_raised_where_the_handler_waits(bench: Bench):
    caught: list[BaseException] = []
    job = bench.put(1, catching(caught, Event()))
    gevent.idle()
    shutdown = Shutdown("enough")
    job.interrupt(shutdown, "test")
    bench.settle()
    assert caught == [shutdown]
    assert job.interrupted is shutdown


def test_an_interrupt_of_a_handler_that_has_ended_meets_nobody(make_bench):
    """Above all not the next one in the same greenlet."""
    bench, gate, caught = make_bench(1), Event(), []
    first = bench.put(1)
    bench.settle()
    bench.put(2, catching(caught, gate))
    gevent.idle()
    first.interrupt(Shutdown("late"), "test")
    first.kill("test", by_force=True)
    gevent.idle()
    gate.set()
    bench.settle()
    assert caught == []
    assert bench.done == [1, 2]


def test_an_interrupt_does_not_count_as_a_kill_of_the_greenlet():
    """A consumer's greenlet notes who is killed: an inline handler's timeout must not mark it."""
    marked = []

    class Marking(gevent.Greenlet):
        def throw(self, *args: Any) -> None:
            marked.append(args)
            super().throw(*args)

    caught: list[BaseException] = []
    job = Job(Message(1), None)
    worker = Marking(lambda: job.run(catching(caught, Event())))
    worker.start()
    gevent.idle()
    job.interrupt(HandlerTimeout(1.0), "test")
    worker.join(30)
    assert isinstance(caught[0], HandlerTimeout)
    assert marked == []


@pytest.mark.parametrize("by_force", [False, True])
def test_a_kill_raises_greenlet_exit_in_the_handler(bench: Bench, by_force: bool):
    caught: list[BaseException] = []
    job = bench.put(1, catching(caught, Event()))
    gevent.idle()
    job.kill("test", by_force)
    bench.settle()
    assert [type(exc) for exc in caught] == [GreenletExit]
    assert job.killed is by_force


def test_a_shielded_handler_finishes_what_it_writes_before_it_is_interrupted(bench: Bench):
    """HAZARDS.md row 1: nobody is interrupted inside of transport I/O."""
    written, steps = Event(), []

    def writes(job: Job) -> None:
        with shielded():
            written.wait()
            steps.append("written")
        steps.append("saw how it ended")
        Event().wait()

    job = bench.put(1, lambda job: guarded(job, writes, steps))
    gevent.idle()
    job.interrupt(Shutdown("enough"), "test")
    gevent.idle()
    assert steps == []
    written.set()
    bench.settle()
    assert steps == ["written", "saw how it ended", "Shutdown"]


def test_the_outermost_shield_counts(bench: Bench):
    written, steps = Event(), []

    def writes(job: Job) -> None:
        with shielded():
            with shielded():
                written.wait()
            gevent.sleep(0)
            steps.append("inner")
        gevent.sleep(0)
        steps.append("outer")

    job = bench.put(1, lambda job: guarded(job, writes, steps))
    gevent.idle()
    job.kill("test", by_force=False)
    gevent.idle()
    written.set()
    bench.settle()
    assert steps == ["inner", "GreenletExit"]


def test_a_kill_by_force_heeds_no_shield(bench: Bench):
    """The last rung: what it was writing to is closed, and never used again."""
    steps: list[str] = []

    def writes(job: Job) -> None:
        with shielded():
            Event().wait()

    job = bench.put(1, lambda job: guarded(job, writes, steps))
    gevent.idle()
    job.kill("test", by_force=True)
    bench.settle()
    assert steps == ["GreenletExit"]


def test_a_shield_outside_of_handlers_does_nothing():
    with shielded():
        assert current_job() is None


def test_a_greenlet_that_a_handler_spawns_is_no_handler(bench: Bench):
    jobs = []

    def spawns(job: Job) -> None:
        jobs.append(current_job())
        gevent.spawn(lambda: jobs.append(current_job())).join()

    job = bench.put(1, spawns)
    bench.settle()
    assert jobs == [job, None]


def test_a_handler_within_a_handler_is_the_current_one_until_it_ends(bench: Bench):
    jobs = []
    inner = bench.job(2)

    def nests(job: Job) -> None:
        inner.run(lambda inner: jobs.append(current_job()))
        jobs.append(current_job())

    outer = bench.put(1, nests)
    bench.settle()
    assert jobs == [inner, outer]
    assert current_job() is None


def guarded(job: Job, work: Callable[[Job], None], steps: list[str]) -> None:
    try:
        work(job)
    except BaseException as exc:
        steps.append(type(exc).__name__)
