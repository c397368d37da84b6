from __future__ import annotations

import contextvars
from collections.abc import Iterator
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event

from greenconsume.consuming.engine import ensure_engine, ensure_lifecycle
from greenconsume.errors import InvalidConsumerError
from greenconsume.events import (
    ConsumerGivenUp,
    ConsumerRestarting,
    ConsumerState,
    DrainEscalated,
    DrainStarted,
)
from greenconsume.events import Event as AnyEvent
from greenconsume.handling.options import ConsumerOptions
from greenconsume.runtime import supervisor as supervisor_module
from greenconsume.runtime.child import Child
from greenconsume.runtime.restart_policy import RestartPolicy
from greenconsume.runtime.supervisor import Supervisor
from greenconsume.stopping import Rungs, StopSignal
from tests.options import say
from tests.unit.fakes import Idle, Scripted, Stubborn, failing, of_type
from tests.waiting import wait_until

AT_ONCE = RestartPolicy(backoff=0)
NEVER_DUE = RestartPolicy(backoff=1000, max_backoff=1000)
WHO: contextvars.ContextVar[str] = contextvars.ContextVar("WHO", default="nobody")
BROKEN = ValueError("broken")


class Nursery:
    """A supervisor in its greenlet, with children to watch."""

    def __init__(self) -> None:
        self.stop = StopSignal()
        self.supervisor = Supervisor(AT_ONCE, self.stop, "links")
        self.greenlet = gevent.Greenlet(self._run)

    def start(self, policy: RestartPolicy, *makes: Any) -> list[Child]:
        self.supervisor = Supervisor(policy, self.stop, "links")
        children = [Child(f"child-{n}", make) for n, make in enumerate(makes, 1)]
        self.greenlet.start()
        self.supervisor.add(children)
        return children

    def end(self) -> None:
        self.stop.set("test")
        assert self.greenlet.join(30) is None
        assert self.greenlet.ready()
        self.supervisor.drain(1.0, 1.0)

    def _run(self) -> None:
        self.supervisor.run()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.end()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that hangs is not given long to say goodbye."""
    monkeypatch.setattr(supervisor_module, "_GOODBYE", 0.01)
    monkeypatch.setattr(supervisor_module, "LAST", 0.01)


def again(consumer: Any) -> Any:
    """Return what makes the same instance each time."""
    return lambda: consumer


# -- restarts -------------------------------------------------------------------------------------


def test_an_instance_that_failed_is_run_again(nursery: Nursery, events: list[AnyEvent]):
    """transient: the same object goes on after an error, and the log's events tell which and why."""
    consumer = Scripted(BROKEN)
    (child,) = nursery.start(AT_ONCE, again(consumer))
    wait_until(lambda: child.started)
    assert consumer.runs == 2
    assert (child.consumer, child.restart_count, child.error) == (consumer, 1, None)
    assert child.state is ConsumerState.CONSUMING
    assert of_type(events, ConsumerRestarting) == [ConsumerRestarting("child-1", BROKEN, 1, 0.0)]
    assert of_type(events, ConsumerGivenUp) == []


def test_a_class_makes_a_fresh_instance_for_each_restart(nursery: Nursery):
    """Nothing of a failed instance is left, but its name, its links and its place."""
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted(BROKEN) if not made else Scripted("idle"))
        return made[-1]

    (child,) = nursery.start(AT_ONCE, make)
    wait_until(lambda: child.started)
    assert [consumer.runs for consumer in made] == [1, 1]
    assert child.consumer is made[1]
    engine = ensure_engine(made[1])
    assert (engine.life.name, engine.links) == ("child-1", "links")
    assert child.greenlet is not None
    assert child.greenlet.name == "child-1"


@pytest.mark.parametrize(("kind", "runs"), [("transient", 1), ("temporary", 1), ("permanent", 2)])
def test_a_consumer_that_returned_is_restarted_only_if_it_is_permanent(
    kind: Any, runs: int, nursery: Nursery
):
    """A normal end is an end, unless the policy says that there is none."""
    consumer = Scripted(None)
    (child,) = nursery.start(RestartPolicy(kind, backoff=0), again(consumer))
    wait_until(lambda: child.started)
    assert consumer.runs == runs
    assert child.ended is (runs == 1)
    assert not child.given_up


def test_a_temporary_consumer_that_failed_is_given_up(nursery: Nursery, events: list[AnyEvent]):
    """It is failed and told once, but it did not use up any restarts."""
    (child,) = nursery.start(RestartPolicy("temporary"), again(Scripted(BROKEN)))
    wait_until(lambda: child.ended)
    assert (child.given_up, child.error, child.state) == (True, BROKEN, ConsumerState.FAILED)
    assert of_type(events, ConsumerGivenUp) == [ConsumerGivenUp("child-1", BROKEN)]
    assert nursery.supervisor.failed == [child]
    assert nursery.supervisor.exhausted == []


def test_a_consumer_over_its_intensity_is_given_up_and_its_siblings_live_on(
    nursery: Nursery, events: list[AnyEvent]
):
    """More than max_restarts in a period is too often; nobody else is disturbed."""
    consumer, sibling = failing()(), Idle()
    policy = RestartPolicy(max_restarts=3, backoff=0)
    bad, good = nursery.start(policy, again(consumer), again(sibling))
    wait_until(lambda: bad.ended)
    assert consumer.runs == 4
    assert [event.attempt for event in of_type(events, ConsumerRestarting)] == [1, 2, 3]
    assert len(of_type(events, ConsumerGivenUp)) == 1
    assert (bad.given_up, bad.state) == (True, ConsumerState.FAILED)
    assert nursery.supervisor.exhausted == [bad]
    assert (good.state, good.restart_count, sibling.runs) == (ConsumerState.CONSUMING, 0, 1)
    assert not nursery.greenlet.ready()


def test_a_permanent_consumer_that_returns_too_often_is_given_up(nursery: Nursery):
    """Without any error it is failed all the same."""
    policy = RestartPolicy("permanent", max_restarts=2, backoff=0)
    (child,) = nursery.start(policy, again(Scripted(after=None)))
    wait_until(lambda: child.ended)
    assert (child.given_up, child.error, child.state) == (True, None, ConsumerState.FAILED)


def test_restarts_are_forgotten_after_their_period(nursery: Nursery):
    """A consumer that fails now and then is restarted for ever."""
    policy = RestartPolicy(max_restarts=1, period=0.001, backoff=0.002, jitter=0)
    (child,) = nursery.start(policy, failing())
    wait_until(lambda: child.restart_count >= 5)
    assert not child.given_up


def test_no_restarts_at_all_may_be_allowed(nursery: Nursery):
    """With max_restarts=0 the first failure is one too many."""
    (child,) = nursery.start(RestartPolicy(max_restarts=0), failing())
    wait_until(lambda: child.ended)
    assert child.consumer.runs == 1
    assert nursery.supervisor.exhausted == [child]


def test_restarts_wait_for_their_backoff_side_by_side(nursery: Nursery):
    """One that waits for long does not hold up one that waits for a moment."""
    policy = RestartPolicy(backoff=0.01, max_backoff=1000, jitter=0)
    slow, fast = nursery.start(policy, failing(), again(Scripted(BROKEN)))
    wait_until(lambda: fast.started)
    assert fast.restart_count == 1
    assert slow.restart_count >= 1


def test_what_makes_a_consumer_may_fail_at_a_restart(nursery: Nursery, events: list[AnyEvent]):
    """A class that raises counts as a failure of the consumer, and is tried again."""
    script: list[Any] = [Scripted(BROKEN), OSError("no database"), Scripted("idle")]

    def make() -> Any:
        step = script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    (child,) = nursery.start(AT_ONCE, make)
    wait_until(lambda: child.started)
    errors = [event.error for event in of_type(events, ConsumerRestarting)]
    assert [str(error) for error in errors] == ["broken", "no database"]


def test_what_makes_a_consumer_may_wait_without_holding_up_the_others(nursery: Nursery):
    """One factory that hangs at a restart keeps its own consumer only."""
    hang, made = Event(), []

    def make() -> Any:
        made.append(1)
        if len(made) > 1:
            hang.wait()
        return Scripted(BROKEN)

    _, other = nursery.start(AT_ONCE, make, again(Scripted(BROKEN, BROKEN)))
    wait_until(lambda: len(made) == 2 and other.started)
    assert other.restart_count == 2


def test_an_error_of_the_first_start_is_the_callers(nursery: Nursery):
    """Whoever adds a consumer is told at once that it cannot be made."""
    with pytest.raises(InvalidConsumerError, match="get_consumers"):
        nursery.start(AT_ONCE, again(object()))


def test_a_restarted_consumer_has_its_spawners_context_variables(nursery: Nursery):
    """HAZARDS 29: also one that the supervisor makes later, when its spawner is long gone."""
    seen: list[str] = []

    class Tracing(Idle):
        def run(self) -> None:
            seen.append(WHO.get())
            WHO.set("altered")
            raise BROKEN

    def spawner() -> None:
        WHO.set("spawner")
        nursery.start(RestartPolicy(max_restarts=2, backoff=0), Tracing)

    gevent.spawn(spawner).join()
    wait_until(lambda: len(seen) == 3)
    assert seen == ["spawner"] * 3


# -- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, BROKEN])
def test_a_consumer_that_was_asked_to_stop_is_not_restarted(
    error: BaseException | None, nursery: Nursery
):
    """`should_stop` of its own is a stop too; even permanent yields to it."""

    class Quitting(Idle):
        def run(self) -> None:
            self.runs += 1
            ensure_lifecycle(self).stop.set("should_stop")
            if error is not None:
                raise error

    (child,) = nursery.start(RestartPolicy("permanent", backoff=0), Quitting)
    wait_until(lambda: child.ended)
    assert (child.consumer.runs, child.restart_count) == (1, 0)
    assert child.given_up is (error is not None)


def test_a_class_that_shadows_should_stop_is_not_restarted_either(nursery: Nursery):
    """A plain attribute of that name stops a consumer as kombu's does."""

    class Shadowing(Idle):
        should_stop = False

        def run(self) -> None:
            self.runs += 1
            self.should_stop = True

    (child,) = nursery.start(RestartPolicy("permanent", backoff=0), Shadowing)
    wait_until(lambda: child.ended)
    assert (child.consumer.runs, child.restart_count) == (1, 0)


def test_a_stop_ends_the_supervisor_at_once_during_a_backoff(nursery: Nursery):
    """Law 3: a consumer that waits to be restarted is not waited for."""
    (child,) = nursery.start(NEVER_DUE, failing())
    wait_until(lambda: child.restart_count == 1)
    nursery.stop.set()
    nursery.greenlet.join(30)
    assert nursery.greenlet.ready()
    assert child.consumer.runs == 1


def test_the_supervisor_ends_when_every_consumer_has_ended_for_good(nursery: Nursery):
    """Nobody has to stop what stops by itself, at whatever point of its restarts."""
    policy = RestartPolicy(max_restarts=1, backoff=0)
    nursery.start(policy, failing(), again(Scripted(None)), again(Scripted(BROKEN, None)))
    nursery.greenlet.join(30)
    assert nursery.greenlet.ready()


def test_the_supervisor_ends_when_the_last_consumer_could_not_be_made(nursery: Nursery):
    """The others had ended by then: nothing else would wake it."""
    asked, go = Event(), Event()

    def slow() -> Any:
        asked.set()
        go.wait()
        raise LookupError("no configuration")

    adding = gevent.spawn(nursery.start, AT_ONCE, again(Scripted(None)), slow)
    asked.wait(30)
    gevent.idle()
    assert not nursery.greenlet.ready()
    go.set()
    with pytest.raises(LookupError):
        adding.get(timeout=30)
    nursery.greenlet.join(30)
    assert nursery.greenlet.ready()


def test_the_supervisor_waits_for_its_first_consumer(nursery: Nursery):
    """One that has had none yet is not at its end."""
    nursery.start(AT_ONCE)
    gevent.idle()
    assert not nursery.greenlet.ready()


def test_draining_stops_every_consumer_and_counts_them(events: list[AnyEvent]):
    """All are asked at once, and the reason goes along."""
    stop = StopSignal()
    supervisor = Supervisor(AT_ONCE, stop, None)
    children = [Child(f"child-{n}", Idle) for n in range(20)]
    supervisor.add(children)
    gevent.idle()
    stop.set("SIGTERM")
    assert supervisor.drain(5.0, 1.0, 5.0) == (20, 0)
    assert of_type(events, DrainStarted) == [DrainStarted(20, "SIGTERM", 5.0)]
    assert {ensure_lifecycle(child.consumer).stop.reason for child in children} == {"SIGTERM"}
    assert {child.state for child in children} == {ConsumerState.STOPPED}


def rungs_of(events: list[AnyEvent]) -> list[tuple[str, int, str]]:
    return [(e.rung, e.consumers, e.reason) for e in of_type(events, DrainEscalated)]


def test_what_does_not_end_within_both_timeouts_is_killed(events: list[AnyEvent], impatient: None):
    """Rung by rung: each is told, and the others are not touched."""
    stop = StopSignal()
    supervisor = Supervisor(AT_ONCE, stop, None)
    stubborn, willing = Child("stubborn", Stubborn), Child("willing", Idle)
    supervisor.add([stubborn, willing])
    gevent.idle()
    stop.set()
    assert supervisor.drain(0.01, 0.02) == (1, 1)
    assert stubborn.greenlet is not None
    assert willing.greenlet is not None
    assert (stubborn.greenlet.killed, willing.greenlet.killed) == (True, False)
    assert rungs_of(events) == [
        ("cancel the handlers that still run", 1, "drain_timeout of 0.01 s is over"),
        ("kill the handlers that still run", 1, "cancel_timeout of 0.02 s is over"),
        ("kill what is left", 1, "both timeouts of the drain are over"),
    ]


def test_a_drain_can_be_hurried_rung_by_rung(events: list[AnyEvent], impatient: None):
    """A further signal ends the wait of its rung at once, however long it would have been."""
    stop, rungs = StopSignal(), Rungs()
    supervisor = Supervisor(AT_ONCE, stop, None, rungs)
    supervisor.add([Child("stubborn", Stubborn)])
    gevent.idle()
    stop.set()
    draining = gevent.spawn(supervisor.drain, 1000.0, 1000.0)
    gevent.idle()
    assert rungs_of(events) == []
    rungs.cancel.set("SIGINT")
    wait_until(lambda: len(rungs_of(events)) == 1)
    gevent.idle()
    assert not draining.ready()
    rungs.kill.set("SIGTERM")
    assert draining.get(timeout=30) == (0, 1)
    assert [reason for _, _, reason in rungs_of(events)] == ["SIGINT", "SIGTERM", "SIGTERM"]


@pytest.mark.parametrize("name", ["drain_timeout", "cancel_timeout"])
def test_a_consumer_with_a_longer_timeout_of_its_own_is_left_it(
    name: str, events: list[AnyEvent], impatient: None
):
    """The supervisor is there for what hangs, not to cut the handlers' own ladder short."""
    stop, options = StopSignal(), ConsumerOptions(drain_timeout=0.0, cancel_timeout=0.0)
    supervisor = Supervisor(AT_ONCE, stop, None, options=options)
    slow, other = Child("slow", Stubborn), Child("other", Stubborn)
    supervisor.add([slow, other])
    gevent.idle()
    say(slow.consumer, **{name: 0.15})
    assert ensure_engine(slow.consumer).handlers()[0].settings
    stop.set()
    began = monotonic()
    assert supervisor.drain(0.0, 0.0) == (0, 2)
    assert monotonic() - began >= 0.15
    assert f"{name} of 0.15 s is over" in [reason for _, _, reason in rungs_of(events)]


def test_a_consumer_whose_settings_make_no_sense_is_not_started():
    """It is told where it was spawned, not by its restarts, after it has connected."""

    class Orders(Idle):
        options = ConsumerOptions(partition_by="customer")

    supervisor = Supervisor(AT_ONCE, StopSignal(), None)
    child = Child("orders", Orders)
    with pytest.raises(InvalidConsumerError, match="orders has partition_by but no concurrency"):
        supervisor.add([child])
    assert child.consumer.runs == 0


def test_the_wait_for_what_was_killed_is_bounded(impatient: None):
    """A consumer that swallows its kill is left behind."""
    release = Event()

    class Undead(Idle):
        def run(self) -> None:
            while not release.is_set():
                try:
                    release.wait()
                except gevent.GreenletExit:
                    continue

    stop = StopSignal()
    supervisor = Supervisor(AT_ONCE, stop, None)
    child = Child("undead", Undead)
    supervisor.add([child])
    gevent.idle()
    stop.set()
    with gevent.Timeout(30):
        assert supervisor.drain(0, 0.01) == (0, 1)
    assert child.running
    release.set()
    wait_until(lambda: not child.running)


def test_a_read_only_should_stop_does_not_keep_the_others_from_being_stopped():
    """One class that cannot be told must not spoil the stop of its siblings."""

    class ReadOnly(Idle):
        @property
        def should_stop(self) -> bool:
            return False

    stop = StopSignal()
    supervisor = Supervisor(AT_ONCE, stop, None)
    supervisor.add([Child("one", ReadOnly), Child("two", Idle)])
    gevent.idle()
    stop.set()
    assert supervisor.drain(1.0, 1.0) == (2, 0)
