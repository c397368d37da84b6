from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import kombu
import kombu.mixins
import pytest
from amqp.exceptions import AccessRefused
from gevent import monkey
from gevent.event import Event
from kombu.transport import TRANSPORT_ALIASES, _transport_cache

import greenconsume
from greenconsume.consuming.engine import ensure_engine, ensure_lifecycle
from greenconsume.errors import (
    AlreadyRunningError,
    BrokerRefusedError,
    ConsumerRefusedError,
    ForkedError,
    InvalidConsumerError,
    NotPatchedError,
    RestartLimitError,
    StoppedError,
    UnsupportedTransportError,
)
from greenconsume.events import (
    ConnectFailed,
    ConsumerState,
    DrainEscalated,
    DrainFinished,
    DrainStarted,
    emit,
)
from greenconsume.events import Event as AnyEvent
from greenconsume.failures.policies import Requeue
from greenconsume.handling.options import ConsumerOptions
from greenconsume.mixins import ConsumerMixin
from greenconsume.runtime import run as run_module
from greenconsume.runtime import runtime as runtime_module
from greenconsume.runtime import supervisor as supervisor_module
from greenconsume.runtime.restart_policy import RestartPolicy
from greenconsume.runtime.runtime import Runtime
from greenconsume.transports import memory
from tests.unit.fakes import (
    Connecting,
    Idle,
    Scripted,
    Stubborn,
    failing,
    of_type,
    recording,
    run,
)
from tests.waiting import AT_ONCE, NEVER, wait_until

ONCE = RestartPolicy(max_restarts=0)
SHARED = kombu.Connection("memory://localhost")


class Later(Event):
    """An answer that is given when the test sets it."""

    def __init__(self, answer: BaseException) -> None:
        super().__init__()
        self.answer = answer
        self.waiting = False


class Door(memory.Transport):
    """A broker that answers each login as the test says, by host and password."""

    refusals = (AccessRefused,)
    answers: dict[tuple[str, str | None], BaseException | Later]
    calls: list[tuple[str, str | None]]

    def establish_connection(self) -> memory.Transport:
        who = (self.client.hostname, self.client.password)
        self.calls.append(who)
        answer = self.answers.get(who)
        if isinstance(answer, Later):
            answer.waiting = True
            answer.wait()
            answer = answer.answer
        if answer is not None:
            raise answer
        return super().establish_connection()


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> type[Door]:
    monkeypatch.setitem(TRANSPORT_ALIASES, "door", "door:Door")
    monkeypatch.setitem(_transport_cache, "door", Door)
    Door.answers, Door.calls = {}, []
    monkeypatch.setattr(Door, "connection_errors", (*Door.connection_errors, OSError))
    return Door


class Calling(Idle):
    """Connects over the links of its runtime, then consumes."""

    def run(self) -> None:
        ensure_lifecycle(self).enter(ConsumerState.CONNECTING)
        with self.connection.clone() as connection:
            try:
                self.dial(connection)
            except StoppedError:
                return
            super().run()

    def dial(self, connection: kombu.Connection) -> None:
        engine = ensure_engine(self)
        engine.links.connect(connection, engine.life.stop)


class Counting(ConsumerMixin):
    """A real consumer of a queue in memory; all instances count together."""

    queue = "test_runtime"
    handled: list[Any]

    def __init__(self, connection: kombu.Connection) -> None:
        self.connection = connection

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([kombu.Queue(self.queue)], callbacks=[self.on_message])]

    def on_message(self, body: Any, message: Any) -> None:
        self.handled.append(body)
        message.ack()


class Plain(kombu.mixins.ConsumerMixin):
    """The same, written for kombu."""

    queue = Counting.queue
    __init__ = Counting.__init__
    get_consumers = Counting.get_consumers
    on_message = Counting.on_message


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    """A runtime that is stopped and joined when the test has ended."""
    runtime = Runtime(
        "memory://localhost", options=ConsumerOptions(drain_timeout=1.0, cancel_timeout=1.0)
    )
    yield runtime
    runtime.kill()
    assert runtime.join(30)


@pytest.fixture
def monkeypatch_signal() -> Iterator[Callable[..., None]]:
    """Set a handler of the process, for the time of the test."""
    before: dict[signal.Signals, Any] = {}

    def set_handler(signum: signal.Signals, handler: Any) -> None:
        before[signum] = signal.signal(signum, handler)

    yield set_handler
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that hangs is not given long to say goodbye."""
    monkeypatch.setattr(supervisor_module, "_GOODBYE", 0.01)
    monkeypatch.setattr(supervisor_module, "LAST", 0.01)


def rungs_of(events: list[AnyEvent]) -> list[str]:
    return [event.rung for event in of_type(events, DrainEscalated)]


def in_thread(function: Callable[..., Any], *args: Any) -> None:
    """Call from a foreign OS thread, without waiting for it."""
    gevent.get_hub().threadpool.spawn(function, *args)


# -- what may be spawned, and on which broker -----------------------------------------------------


@pytest.mark.parametrize("kind", [Counting, Plain])
def test_a_runtime_runs_many_consumers_to_a_clean_stop(kind: type[Any], queue_name: str):
    """The whole life of many consumers over the memory transport, written for greenconsume or kombu."""
    handled: list[Any] = []
    kind = type(kind.__name__, (kind,), {"queue": queue_name, "handled": handled})
    runtime = Runtime()
    children = runtime.spawn(kind, replicas=20)
    with runtime:
        assert {child.state for child in children} == {ConsumerState.CONSUMING}
        with SHARED.clone() as connection, connection.Producer() as producer:
            for n in range(100):
                producer.publish(n, routing_key=queue_name)
        wait_until(lambda: len(handled) == 100)
    assert sorted(handled) == list(range(100))
    assert {child.state for child in children} == {ConsumerState.STOPPED}


def test_each_replica_is_an_instance_with_a_name_and_the_runtimes_connection(runtime: Runtime):
    """A class is called with the connection, as often as there are replicas."""
    children = runtime.spawn(Idle, replicas=3)
    runtime.start()
    assert [child.name for child in children] == ["Idle-1", "Idle-2", "Idle-3"]
    assert len({child.consumer for child in children}) == 3
    assert {child.consumer.connection for child in children} == {runtime.connection}
    assert len({id(ensure_engine(child.consumer).links) for child in children}) == 1


def test_a_factory_makes_a_consumer_from_the_connection(runtime: Runtime):
    """Any callable will do, such as a partial of a class with more arguments."""

    class Tuned(Idle):
        def __init__(self, connection: Any, prefetch: int) -> None:
            super().__init__(connection)
            self.prefetch = prefetch

    (child,) = runtime.spawn(partial(Tuned, prefetch=5))
    runtime.start()
    assert (child.consumer.prefetch, child.consumer.connection) == (5, runtime.connection)


def test_an_instance_without_a_connection_is_given_the_runtimes(runtime: Runtime):
    """An instance is run as it is; one that has a connection keeps it."""
    bare, own = Idle(), Idle(SHARED)
    children = [*runtime.spawn(bare), *runtime.spawn(own)]
    runtime.start()
    assert [child.consumer for child in children] == [bare, own]
    assert (bare.connection, own.connection) == (runtime.connection, SHARED)


class Closed:
    """A consumer that takes no connection."""

    __slots__ = ()

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return []

    def run(self) -> None: ...


@pytest.mark.parametrize(
    ("target", "replicas", "error", "message"),
    [
        (dict, 1, InvalidConsumerError, "dict has no get_consumers: subclass"),
        (42, 1, InvalidConsumerError, "42 is no consumer: it has no get_consumers"),
        (lambda: None, 1, InvalidConsumerError, "cannot be called with the connection alone: "),
        (ConsumerMixin, 1, InvalidConsumerError, r"give it an __init__\(self, connection\)"),
        (Idle(), 2, InvalidConsumerError, "an instance of Idle cannot have 2 replicas"),
        (Closed(), 1, InvalidConsumerError, "Closed has no connection and takes none"),
        (Idle, 0, ValueError, "replicas must be 1 or more, not 0"),
        (Idle, "3", ValueError, "replicas must be 1 or more, not '3'"),
    ],
)
def test_what_cannot_be_spawned_is_refused_at_once(
    target: Any, replicas: Any, error: type[Exception], message: str, runtime: Runtime
):
    """The error comes from `spawn`, before anything starts, and is one line with the remedy."""
    with pytest.raises(error, match=message) as caught:
        runtime.spawn(target, replicas)
    assert "\n" not in str(caught.value)
    assert runtime.children == []


def test_options_of_a_spawn_that_are_none_are_refused_at_once(runtime: Runtime):
    with pytest.raises(TypeError, match=r"options must be a ConsumerOptions, not \{'conc"):
        runtime.spawn(Idle, options={"concurrency": 3})  # type: ignore[arg-type]
    assert runtime.children == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"broker": "carrier-pigeon://"}, UnsupportedTransportError, "carrier-pigeon"),
        ({"broker": "amqp://a;carrier-pigeon://b"}, UnsupportedTransportError, "carrier-pigeon"),
        ({"broker": 5672}, TypeError, "broker must be a URL or a kombu Connection, not 5672"),
        ({"broker": ""}, ValueError, "broker must be a URL such as amqp:// or memory://"),
        ({"broker": "amqp://me:s3/cr@host"}, ValueError, "the broker URL cannot be parsed"),
        ({"links": 0}, ValueError, "links must be 1 or more, not 0"),
        ({"max_handlers": 0}, ValueError, "max_handlers must be 1 or more, or None, not 0"),
        (
            {"stall_after": -1},
            ValueError,
            "stall_after must be more than 0 seconds, or None, not -1",
        ),
        ({"links": "2"}, ValueError, "links must be 1 or more, not '2'"),
        ({"max_handlers": 1.5}, ValueError, "max_handlers must be 1 or more, or None, not 1.5"),
        ({"block_warning": "2"}, ValueError, "must be more than 0 seconds, or None, not '2'"),
        ({"around": 3}, ValueError, "around must be a list of callables"),
        ({"restart": 3}, TypeError, "restart must be a RestartPolicy, not 3: write restart="),
        ({"options": {"concurrency": 3}}, TypeError, "must be a ConsumerOptions, not {'concurr"),
        ({"options": {}}, TypeError, r"not {}: write options=ConsumerOptions\("),
    ],
)
def test_a_runtime_that_makes_no_sense_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
):
    """Bad arguments are told where they enter, and no password with them."""
    with pytest.raises(error, match=message) as caught:
        Runtime(**arguments)
    assert "\n" not in str(caught.value)
    assert "s3" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"drain_timeout": -1}, ValueError, "must be 0 seconds or more, not -1"),
        ({"cancel_timeout": -1}, ValueError, "must be 0 seconds or more"),
        ({"concurrency": 0}, ValueError, "concurrency must be 1 or more, or None .*, not 0"),
        (
            {"on_error": Requeue},
            InvalidConsumerError,
            r"on_error is the class Requeue.*: write Requeue\(\)",
        ),
    ],
)
def test_options_of_a_runtime_that_make_no_sense_are_refused(
    said: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message) as caught:
        Runtime(options=ConsumerOptions(**said))
    assert "\n" not in str(caught.value)


def test_a_kombu_connection_is_used_as_it_is():
    """Whoever has a connection with options of its own can give it."""
    connection = kombu.Connection("memory://localhost", transport_options={"a": 1})
    assert Runtime(connection).connection is connection


def test_a_url_without_a_host_is_not_told_of_by_kombu(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
):
    """kombu warns of a default host for each connection: a thousand lines for a thousand consumers."""
    runtime = Runtime("memory://")
    runtime.spawn(partial(Counting), replicas=5)
    with runtime:
        pass
    assert not [record for record in caplog.records if "hostname" in record.getMessage()]


# -- the start ------------------------------------------------------------------------------------


def test_start_returns_when_all_consume(runtime: Runtime):
    """A consumer that is slow to connect is waited for."""
    go = Event()

    class Slow(Idle):
        def run(self) -> None:
            go.wait()
            super().run()

    runtime.spawn(Idle)
    runtime.spawn(Slow)
    starting = gevent.spawn(runtime.start)
    gevent.idle()
    assert not starting.ready()
    go.set()
    starting.get(timeout=30)
    assert {child.state for child in runtime.children} == {ConsumerState.CONSUMING}


def test_thousands_are_set_up_some_hundred_at_a_time(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor_module, "_AT_ONCE", 4)
    go, begun = Event(), []

    class Slow(Idle):
        def run(self) -> None:
            begun.append(self)
            go.wait()
            super().run()

    runtime.spawn(Slow, replicas=20)
    starting = gevent.spawn(runtime.start)
    wait_until(lambda: len(begun) == 4)
    gevent.idle()
    assert len(begun) == 4
    go.set()
    starting.get(timeout=30)
    assert len(begun) == 20


def test_those_that_take_long_to_set_up_do_not_hold_up_the_others(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor_module, "_AT_ONCE", 4)
    monkeypatch.setattr(supervisor_module, "_PATIENCE", 0.01)
    go, begun = Event(), []

    class Slow(Idle):
        def run(self) -> None:
            begun.append(self)
            go.wait()
            super().run()

    runtime.spawn(Slow, replicas=20)
    starting = gevent.spawn(runtime.start)
    wait_until(lambda: len(begun) == 20)
    go.set()
    starting.get(timeout=30)


def test_a_consumer_that_ends_by_itself_does_not_hold_up_the_start(runtime: Runtime):
    """One that has nothing to do has started all the same."""
    runtime.spawn(Scripted(None))
    runtime.spawn(Idle)
    with gevent.Timeout(30):
        runtime.start()


def test_a_consumer_that_fails_at_first_is_waited_for(events: list[AnyEvent]):
    """The restart policy holds during the start, too."""
    runtime = Runtime("memory://localhost", restart=RestartPolicy(backoff=0))
    (child,) = runtime.spawn(Scripted(OSError("once")))
    with runtime:
        assert (child.state, child.restart_count) == (ConsumerState.CONSUMING, 1)


def test_a_consumer_that_is_given_up_fails_the_start():
    """`start` raises the consumer's own error, and leaves nothing behind."""
    runtime = Runtime("memory://localhost", restart=ONCE)
    sibling, bad = runtime.spawn(Idle) + runtime.spawn(failing())
    with pytest.raises(ValueError, match="no such thing"):
        runtime.start()
    assert bad.given_up
    assert sibling.state is ConsumerState.STOPPED
    assert not sibling.running


def test_a_class_that_cannot_be_made_fails_the_start(runtime: Runtime):
    """What its `__init__` raised comes out as it is; its siblings are stopped."""

    def broken(connection: Any) -> Any:
        raise LookupError("no configuration")

    (sibling,) = runtime.spawn(Idle)
    runtime.spawn(broken)
    with pytest.raises(LookupError, match="no configuration"):
        runtime.start()
    assert not sibling.running


def test_a_factory_that_makes_no_consumer_fails_the_start(runtime: Runtime):
    """It can only be known once it was called."""
    runtime.spawn(lambda connection: None)
    with pytest.raises(InvalidConsumerError, match="None is no consumer"):
        runtime.start()


def test_a_start_that_failed_after_it_was_stopped_and_joined_leaves_no_stop_behind(
    runtime: Runtime,
):
    """The next start is a start."""
    asked, go = Event(), Event()

    def broken(connection: Any) -> Idle:
        asked.set()
        go.wait()
        raise LookupError("no configuration")

    (child,) = runtime.spawn(broken)
    starting = gevent.spawn(runtime.start)
    asked.wait(30)
    runtime.stop()
    assert runtime.join(30)
    go.set()
    starting.join(30)
    assert isinstance(starting.exception, LookupError)
    runtime.children.remove(child)
    runtime.spawn(Idle)
    runtime.start()
    assert runtime.children[0].running


def test_a_broker_that_refuses_fails_the_start(door: type[Door]):
    """Wrong credentials do not come right by waiting: the error names the broker and its words."""
    runtime = Runtime("door://localhost//")
    runtime.spawn(Calling)
    error = door.answers["localhost", None] = AccessRefused("ACCESS_REFUSED - Login was refused")
    starting = run(runtime.start)
    starting.join(30)
    assert isinstance(starting.value, BrokerRefusedError)
    assert "ACCESS_REFUSED" in str(starting.value)
    assert starting.value.uri == runtime.connection.as_uri()
    assert starting.value.__cause__ is error
    assert runtime.children[0].running is False


def test_a_refusal_that_fails_the_start_is_raised_and_not_logged(
    door: type[Door], events: list[AnyEvent], caplog: pytest.LogCaptureFixture
):
    """One error is told in one place; observers see it, and that it is raised."""
    door.answers["localhost", None] = AccessRefused("no")
    runtime = Runtime("door://localhost//")
    runtime.spawn(Calling, replicas=3)
    with caplog.at_level("INFO"), pytest.raises(BrokerRefusedError):
        runtime.start()
    assert caplog.text == ""
    assert {failure.raised for failure in of_type(events, ConnectFailed)} == {True}


@pytest.mark.parametrize(
    ("uri", "refused"),
    [
        ("memory://elsewhere//", True),
        ("memory://localhost//", True),
        ("memory://:**@localhost//", False),
    ],
)
def test_a_broker_that_is_away_or_not_ours_is_waited_for(uri: str, refused: bool, runtime: Runtime):
    """Only this runtime's own links end its start, whatever is told of others, be it of the same broker."""
    runtime.spawn(Connecting)
    starting = gevent.spawn(runtime.start)
    gevent.idle()
    emit(ConnectFailed(uri, OSError(), 1, 1.0, refused=refused))
    gevent.idle()
    assert not starting.ready()
    runtime.stop()
    starting.get(timeout=30)


@pytest.mark.parametrize("publishing", [True, False])
def test_a_broker_that_refuses_only_to_be_published_to_fails_no_start(
    publishing: bool, door: type[Door]
):
    """A consumer's producer connects on its own, and its failure is its handler's."""
    door.answers["localhost", None] = AccessRefused("no")

    class Publishing(Calling):
        def dial(self, connection: kombu.Connection) -> None:
            engine = ensure_engine(self)
            engine.links.connect(connection, engine.life.stop, publishing=publishing)

    runtime = Runtime("door://localhost//")
    runtime.spawn(Publishing)
    starting = run(runtime.start)
    wait_until(lambda: door.calls)
    gevent.idle()
    assert starting.ready() is not publishing
    runtime.stop()
    starting.get(timeout=30)


@pytest.mark.parametrize("other", ["door://a:2@two", "door://a:2@one"])
def test_all_brokers_of_a_failover_url_must_refuse_before_the_start_fails(
    other: str, door: type[Door]
):
    """One alternative that refuses leaves the others to be tried, be it but another password."""
    door.answers["one", "1"] = AccessRefused("no")
    door.answers[other[-3:], "2"] = answer = Later(AccessRefused("no"))
    runtime = Runtime(f"door://a:1@one;{other}")
    runtime.spawn(Calling, replicas=2)
    starting = run(runtime.start)
    wait_until(lambda: answer.waiting)
    gevent.idle()
    assert not starting.ready()
    answer.set()
    assert isinstance(starting.get(timeout=30), BrokerRefusedError)


def test_a_refusal_and_an_absence_in_turn_are_waited_for(
    door: type[Door], monkeypatch: pytest.MonkeyPatch
):
    """A broker that is away may let this user in when it is back."""
    monkeypatch.setattr("greenconsume.links.backoff.FIRST_DELAY", 0.01)
    door.answers["one", "1"] = AccessRefused("no")
    door.answers["two", "2"] = ConnectionRefusedError("away")
    runtime = Runtime("door://a:1@one;door://a:2@two")
    runtime.spawn(Calling)
    starting = run(runtime.start)
    wait_until(lambda: len(door.calls) >= 3)
    assert not starting.ready()
    runtime.stop()
    assert starting.get(timeout=30) is None


class StandingBy(Idle):
    """Another consumer has its queue for itself."""

    def run(self) -> None:
        self.runs += 1
        life = ensure_lifecycle(self)
        life.enter(ConsumerState.CONNECTING)
        gevent.idle()
        life.enter(ConsumerState.STANDBY)
        life.stop.wait()


def test_a_start_does_not_wait_for_who_stands_by(runtime: Runtime):
    """It may stand by for ever: that is what a spare is for."""
    active, spare = runtime.spawn(Idle) + runtime.spawn(StandingBy)
    with gevent.Timeout(30):
        runtime.start()
    assert (active.state, spare.state) == (ConsumerState.CONSUMING, ConsumerState.STANDBY)
    assert spare.greenlet is not None
    assert not spare.greenlet.ready.is_set()
    assert spare.greenlet.ready.stands_by
    assert spare.started


def test_what_the_broker_refuses_for_good_fails_the_start(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
):
    """As a queue that is there with other properties: the error names consumer, cause and remedy."""
    error = ValueError("PRECONDITION_FAILED")

    class Refused(Idle):
        def run(self) -> None:
            life = ensure_lifecycle(self)
            assert life.refuse(error, "delete it")
            life.stop.wait()

    (sibling,) = runtime.spawn(Idle)
    runtime.spawn(Refused)
    with pytest.raises(
        ConsumerRefusedError, match=r"Refused-1 .*PRECONDITION_FAILED.*delete it"
    ) as e:
        runtime.start()
    assert (e.value.consumer, e.value.__cause__) == ("Refused-1", error)
    assert not sibling.running
    assert caplog.text == ""


def test_a_consumer_that_is_spawned_later_fails_nothing(runtime: Runtime):
    """Nobody waits for its start: it tries again, and says so in the log."""
    told: list[bool] = []

    class Refused(Idle):
        def run(self) -> None:
            life = ensure_lifecycle(self)
            told.append(life.refuse(ValueError("PRECONDITION_FAILED"), "delete it"))
            life.stop.wait()

    runtime.start()
    (child,) = runtime.spawn(Refused)
    wait_until(lambda: told)
    assert told == [False]
    assert child.running


def test_a_start_that_is_interrupted_leaves_nothing_running(runtime: Runtime):
    """A timeout around `start` stops what was started, then goes on its way."""
    (child,) = runtime.spawn(Connecting)
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
        runtime.start()
    assert not child.running
    runtime.spawn(Idle)
    runtime.children.remove(child)
    runtime.start()


def test_a_running_runtime_cannot_be_started(runtime: Runtime):
    """A second start is refused with the remedy, and disturbs nothing."""
    (child,) = runtime.spawn(Idle)
    runtime.start()
    with pytest.raises(AlreadyRunningError, match=r"stop\(\) and join\(\) it first"):
        runtime.start()
    assert child.state is ConsumerState.CONSUMING


def test_consumers_spawned_while_it_runs_start_at_once(runtime: Runtime):
    """Also into a runtime that has had none so far."""
    runtime.start()
    assert not runtime.join(0.001)
    (child,) = runtime.spawn(Idle)
    assert child.greenlet is not None
    assert child.greenlet.ready.wait(30)


def test_a_consumer_that_cannot_be_made_while_it_runs_is_the_spawners_to_know(runtime: Runtime):
    """The error is raised by `spawn`, and nothing of it stays in the runtime."""

    def broken(connection: Any) -> Any:
        raise LookupError("no configuration")

    (child,) = runtime.spawn(Idle)
    runtime.start()
    with pytest.raises(LookupError):
        runtime.spawn(broken, replicas=3)
    assert runtime.children == [child]
    assert child.running


def test_an_unpatched_process_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch):
    """HAZARDS 10: nothing starts where the first wait would block the hub."""

    def refuse() -> None:
        raise NotPatchedError("not patched")

    monkeypatch.setattr(runtime_module, "require_patched", refuse)
    for use in (runtime.start, runtime.run):
        with pytest.raises(NotPatchedError):
            use()


# -- the stop -------------------------------------------------------------------------------------


def test_a_stop_before_the_start_makes_it_return_at_once(runtime: Runtime):
    """Nothing is made, nothing connects; `run` and `start` alike."""
    (child,) = runtime.spawn(Idle)
    runtime.stop()
    runtime.start()
    assert child.consumer is None
    assert runtime.run() is True
    assert child.consumer is None


def test_a_second_stop_changes_nothing(runtime: Runtime, events: list[AnyEvent]):
    """However often it is stopped, it drains once and for the first reason."""
    runtime.spawn(Idle)
    runtime.start()
    runtime.stop("first")
    runtime.stop("second")
    assert runtime.join(30)
    assert of_type(events, DrainStarted) == [DrainStarted(1, "first", 1.0)]
    assert [(e.drained, e.killed) for e in of_type(events, DrainFinished)] == [(1, 0)]


def test_a_stop_while_connecting_ends_the_start(runtime: Runtime):
    """HAZARDS 3: a broker that is away keeps nobody from stopping."""
    (child,) = runtime.spawn(Connecting)
    starting = gevent.spawn(runtime.start)
    gevent.idle()
    runtime.stop()
    starting.get(timeout=30)
    assert runtime.join(30)
    assert not child.running


def test_a_stop_while_a_factory_waits_ends_the_start(runtime: Runtime):
    """What it makes too late is never run, even if the stop was joined by somebody else meanwhile."""
    asked, go = Event(), Event()

    def slow(connection: Any) -> Idle:
        asked.set()
        go.wait()
        return Idle(connection)

    class Sulking(Idle):
        def run(self) -> None:
            super().run()
            raise ValueError("stopped")

    _, late, never = runtime.spawn(Sulking) + runtime.spawn(slow) + runtime.spawn(Idle)
    starting = gevent.spawn(runtime.start)
    asked.wait(30)
    runtime.stop()
    assert runtime.join(30)
    go.set()
    starting.get(timeout=30)
    wait_until(lambda: not late.running)
    assert late.consumer.runs == 0
    assert never.consumer is None


def test_a_stop_during_a_restarts_backoff_ends_at_once():
    """Law 3: nobody waits for a restart that will not come."""
    policy = RestartPolicy(backoff=1000, max_backoff=1000)
    runtime = Runtime("memory://localhost", restart=policy)
    (child,) = runtime.spawn(failing())
    starting = gevent.spawn(runtime.start)
    wait_until(lambda: child.restart_count == 1)
    runtime.stop()
    starting.get(timeout=30)
    assert runtime.join(30)


def test_a_foreign_thread_stops_a_runtime(runtime: Runtime):
    """`stop` may come from another OS thread, whatever the runtime waits in."""
    runtime.spawn(Idle, replicas=10)
    runtime.start()
    in_thread(runtime.stop, "thread")
    assert runtime.join(30)


def test_a_stop_asks_a_thousand_consumers_at_once(runtime: Runtime):
    """They end side by side, not one after the other."""
    children = runtime.spawn(Idle, replicas=1000)
    runtime.start()
    runtime.stop()
    assert runtime.join(30)
    assert {child.state for child in children} == {ConsumerState.STOPPED}


def test_a_stopped_runtime_can_be_started_again(runtime: Runtime):
    """Classes make fresh instances; an instance is run again."""
    instance = Idle()
    fresh, same = runtime.spawn(Idle) + runtime.spawn(instance)
    with runtime:
        first = fresh.consumer
    with runtime:
        assert fresh.consumer is not first
        assert same.consumer is instance
        assert same.state is fresh.state is ConsumerState.CONSUMING
    assert instance.runs == 2


def test_an_instance_with_a_should_stop_of_its_own_can_be_started_again(runtime: Runtime):
    """What the runtime asked for, it takes back."""

    class Shadowing(Idle):
        should_stop = False

    instance = Shadowing()
    runtime.spawn(instance)
    for _ in range(2):
        with runtime:
            assert instance.should_stop is False
        assert instance.should_stop is True


def test_an_instance_that_was_stopped_early_is_not_run(runtime: Runtime):
    """Its own stop is honoured: only the runtime's is taken back."""
    instance = Idle()
    ensure_lifecycle(instance).stop.set("mine")
    runtime.spawn(instance)
    with runtime:
        pass
    assert instance.runs == 0


def test_a_stop_holds_until_it_was_joined(runtime: Runtime):
    """Between a stop and its join a start is none."""
    (child,) = runtime.spawn(Idle)
    runtime.start()
    runtime.stop()
    wait_until(lambda: not child.running)
    with gevent.Timeout(30):
        while True:
            try:
                runtime.start()
                break
            except AlreadyRunningError:
                gevent.sleep(0)
    assert not child.running
    runtime.join(30)
    runtime.start()
    assert child.running


def test_start_stop_and_join_may_be_called_at_the_same_time(runtime: Runtime):
    """The contract of River's services: 10 greenlets, 50 rounds of calls each, in any order."""
    runtime.spawn(Idle, replicas=3)
    refused: list[BaseException] = []

    def abuse(number: int) -> None:
        calls = [runtime.start, runtime.stop, partial(runtime.join, 1)]
        for turn in range(50):
            try:
                calls[(turn + number) % 3]()
            except AlreadyRunningError as exc:
                refused.append(exc)

    greenlets = [gevent.spawn(abuse, number) for number in range(10)]
    assert len(gevent.joinall(greenlets, timeout=30, raise_error=True)) == 10
    runtime.stop()
    assert runtime.join(30)
    assert not any(child.running for child in runtime.children)
    with runtime:
        assert {child.state for child in runtime.children} == {ConsumerState.CONSUMING}


def test_ten_greenlets_may_stop_at_the_same_time(runtime: Runtime):
    """All of them stop it, and all of them may wait for it."""
    runtime.spawn(Idle, replicas=5)
    runtime.start()

    def stop_and_join() -> bool:
        runtime.stop()
        return runtime.join(30)

    stoppers = [gevent.spawn(stop_and_join) for _ in range(10)]
    gevent.joinall(stoppers, timeout=30)
    assert [stopper.value for stopper in stoppers] == [True] * 10


def test_a_native_thread_stops_a_runtime_that_nothing_else_could_wake(runtime: Runtime):
    """gevent would take a hub without anything to watch for a deadlock."""
    sleep = monkey.get_original("time", "sleep")
    start_new_thread = monkey.get_original("_thread", "start_new_thread")
    runtime.spawn(Idle)
    start_new_thread(lambda: (sleep(0.02), runtime.stop("thread")), ())
    assert runtime.run() is True


# -- the end --------------------------------------------------------------------------------------


def test_join_tells_whether_everything_has_ended(runtime: Runtime):
    """At its timeout it is false; before any start there is nothing to wait for."""
    assert runtime.join() is True
    runtime.spawn(Idle)
    runtime.start()
    assert runtime.join(0) is False
    runtime.stop()
    assert runtime.join() is True


def test_join_ends_when_all_consumers_have_ended_by_themselves(
    runtime: Runtime, events: list[AnyEvent]
):
    """Nobody asked for a stop, so nothing is said of a drain; what was open is closed."""
    runtime.spawn(Scripted(None))
    runtime.start()
    assert runtime.join(30)
    assert of_type(events, DrainStarted) == []
    assert len(of_type(events, DrainFinished)) == 1


def test_what_does_not_stop_in_time_is_killed_and_told(events: list[AnyEvent], impatient: None):
    """The ladder's last rung: `run` returns False, for work was abandoned."""
    runtime = Runtime(
        "memory://localhost", options=ConsumerOptions(drain_timeout=0.01, cancel_timeout=0.01)
    )
    (child,) = runtime.spawn(Stubborn)
    running = gevent.spawn(runtime.run)
    wait_until(lambda: child.started)
    runtime.stop()
    assert running.get(timeout=30) is False
    assert rungs_of(events) == [
        "cancel the handlers that still run",
        "kill the handlers that still run",
        "kill what is left",
    ]
    assert [(e.drained, e.killed) for e in of_type(events, DrainFinished)] == [(0, 1)]


def test_one_stop_can_be_given_less_time_than_the_runtime_allows(
    events: list[AnyEvent], impatient: None
):
    """As a server does whose own patience ends: both rungs come sooner, once."""
    timeouts = ConsumerOptions(drain_timeout=1000.0, cancel_timeout=1000.0)
    runtime = Runtime("memory://localhost", options=timeouts)
    (child,) = runtime.spawn(Stubborn)
    for _ in range(2):
        began = monotonic()
        runtime.start()
        runtime.stop(within=0.2)
        runtime.stop(within=1000.0)  # the first counts
        assert runtime.join(30)
        assert monotonic() - began < AT_ONCE
        assert not child.running
    reasons = [event.reason for event in of_type(events, DrainEscalated)]
    assert reasons == ["the drain has 0.2 s in all"] * 6


def test_a_bound_leaves_a_sooner_drain_alone(events: list[AnyEvent]):
    """It is no wait."""
    runtime = Runtime("memory://localhost")
    runtime.spawn(Idle)
    runtime.start()
    runtime.stop(within=1000.0)
    assert runtime.join(1.0)
    assert of_type(events, DrainEscalated) == []


def test_a_bound_below_zero_is_refused(runtime: Runtime):
    with pytest.raises(ValueError, match="within must be 0 seconds or more, not -1"):
        runtime.stop(within=-1)
    with pytest.raises(ValueError, match="within must be 0 seconds or more, not '1s'"):
        runtime.stop(within="1s")  # type: ignore[arg-type]


@pytest.mark.parametrize(("rung", "cancel_timeout"), [("cancel", 0.2), ("kill", NEVER)])
def test_cancel_and_kill_skip_the_wait(
    rung: str, cancel_timeout: float, events: list[AnyEvent], impatient: None
):
    """Also while the drain is under way, from a foreign thread."""
    runtime = Runtime(
        "memory://localhost",
        options=ConsumerOptions(drain_timeout=1000.0, cancel_timeout=cancel_timeout),
    )
    stubborn, willing = runtime.spawn(Stubborn) + runtime.spawn(Idle)
    runtime.start()
    runtime.stop()
    wait_until(lambda: not willing.running)
    began = monotonic()
    in_thread(getattr(runtime, rung), "enough")
    assert runtime.join(30)
    took = monotonic() - began
    assert took < AT_ONCE if rung == "kill" else 0.2 <= took < AT_ONCE
    assert not stubborn.running
    first = of_type(events, DrainEscalated)[0]
    assert (first.consumers, first.reason) == (1, "enough")


@pytest.mark.parametrize(("end", "timeout"), [("stop", 1.0), ("kill", 0.0)])
def test_the_links_are_closed_at_the_end(
    end: str, timeout: float, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
):
    """After the consumers, bounded by `cancel_timeout`; a kill does not wait for the broker's answer."""
    closed: list[tuple[float | None, bool]] = []

    class Links:
        def __init__(self, links: int, on_refused: object) -> None: ...

        def close(self, timeout: float | None = None) -> None:
            closed.append((timeout, child.running))

    monkeypatch.setattr(run_module, "LinkPool", Links)
    (child,) = runtime.spawn(Idle)
    runtime.start()
    getattr(runtime, end)()
    assert runtime.join(30)
    assert closed == [(timeout, False)]


def test_killing_an_idle_runtime_is_a_stop(runtime: Runtime):
    """There is nothing to kill, and a start that follows returns at once."""
    (child,) = runtime.spawn(Idle)
    runtime.kill()
    runtime.start()
    assert child.consumer is None


def test_a_consumer_over_its_restarts_is_told_at_the_end():
    """`join` and `run` raise it once everything has ended; until then its siblings go on."""
    policy = RestartPolicy(max_restarts=1, backoff=0)
    runtime = Runtime("memory://localhost", restart=policy)
    good, bad = runtime.spawn(Idle) + runtime.spawn(Scripted("idle", after=None))
    runtime.start()
    bad.consumer.script = [ValueError("one"), ValueError("two")]
    assert bad.greenlet is not None
    gevent.kill(bad.greenlet, KeyError("zero"))
    wait_until(lambda: bad.ended)
    assert good.state is ConsumerState.CONSUMING
    runtime.stop()
    with pytest.raises(RestartLimitError, match="given up after 1 restarts in 60 s: ") as caught:
        runtime.join(30)
    assert caught.value.consumers == (bad.name,)
    assert not good.running
    assert runtime.join(30) is True


def test_run_raises_what_start_raises():
    """A runtime that cannot start is no success; signals are as they were."""
    before = signal.getsignal(signal.SIGTERM)
    runtime = Runtime("memory://localhost", restart=ONCE)
    runtime.spawn(failing())
    with pytest.raises(ValueError, match="no such thing"):
        runtime.run()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_blocks_own_error_is_not_hidden_by_the_restart_limit():
    """What the `with` block raised comes out of it."""
    runtime = Runtime("memory://localhost", restart=ONCE)
    (child,) = runtime.spawn(Scripted("idle"))

    def block() -> None:
        with runtime:
            gevent.kill(child.greenlet, ValueError("broken"))
            wait_until(lambda: child.ended)
            raise KeyError("mine")

    with pytest.raises(KeyError):
        block()


# -- signals and forks ----------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_the_handlers_are_restored(
    signum: signal.Signals,
    runtime: Runtime,
    events: list[AnyEvent],
    monkeypatch_signal: Callable[..., None],
):
    """`run` returns True after a clean drain, and what the process did on the signal it does again."""
    heard: list[int] = []
    monkeypatch_signal(signum, lambda number, frame: heard.append(number))
    (child,) = runtime.spawn(Idle)
    running = gevent.spawn(runtime.run)
    wait_until(lambda: child.started)
    os.kill(os.getpid(), signum)
    assert running.get(timeout=30) is True
    assert [event.reason for event in of_type(events, DrainStarted)] == [signum.name]
    assert heard == []
    os.kill(os.getpid(), signum)
    wait_until(lambda: heard == [signum])


def test_each_further_signal_goes_a_rung_down(events: list[AnyEvent], impatient: None):
    """The second cancels, the third kills: each skips the rest of a wait, and says so."""
    runtime = Runtime(
        "memory://localhost", options=ConsumerOptions(drain_timeout=1000.0, cancel_timeout=1000.0)
    )
    (child,) = runtime.spawn(Stubborn)
    running = gevent.spawn(runtime.run)
    wait_until(lambda: child.started)
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: of_type(events, DrainStarted))
    os.kill(os.getpid(), signal.SIGINT)
    wait_until(lambda: of_type(events, DrainEscalated))
    assert not running.ready()
    os.kill(os.getpid(), signal.SIGTERM)
    assert running.get(timeout=30) is False
    assert [(e.rung, e.reason) for e in of_type(events, DrainEscalated)] == [
        ("cancel the handlers that still run", "SIGINT"),
        ("kill the handlers that still run", "SIGTERM"),
        ("kill what is left", "SIGTERM"),
    ]


def test_a_signal_while_connecting_ends_the_run(runtime: Runtime):
    """Ctrl-C ends waiting for a broker at once."""
    runtime.spawn(Connecting)
    running = gevent.spawn(runtime.run)
    wait_until(lambda: runtime.children[0].state is ConsumerState.CONNECTING)
    os.kill(os.getpid(), signal.SIGINT)
    assert running.get(timeout=30) is True


FOUR_SIGNALS = """
from gevent import monkey
monkey.patch_all()

import os, signal
import gevent
from greenconsume import ConsumerOptions, Runtime
from greenconsume.events import ConsumerState, subscribe
from greenconsume.consuming.engine import ensure_engine, ensure_lifecycle

class Undead:
    connection = None

    def get_consumers(self, Consumer, channel):
        return []

    def run(self):
        ensure_lifecycle(self).enter(ConsumerState.CONSUMING)
        while True:
            try:
                gevent.sleep(1000)
            except gevent.GreenletExit:
                pass

def go_down(event):
    if getattr(event, "rung", None) != "exit at once" and "Drain" in type(event).__name__:
        os.kill(os.getpid(), signal.SIGTERM)

subscribe(go_down)
timeouts = ConsumerOptions(drain_timeout=1000, cancel_timeout=1000)
runtime = Runtime("memory://localhost", options=timeouts)
runtime.spawn(Undead())
gevent.spawn_later(0.01, os.kill, os.getpid(), signal.SIGINT)
runtime.run()
"""


def test_a_fourth_signal_exits_the_process():
    """When even a kill does not end a consumer, the process ends with code 1, without a traceback."""
    home = str(Path(greenconsume.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", FOUR_SIGNALS],
        env={**os.environ, "PYTHONPATH": home},
        timeout=20,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "drain: cancel the handlers that still run; consumers still running: 1 (SIGTERM)",
        "drain: kill the handlers that still run; consumers still running: 1 (SIGTERM)",
        "drain: exit at once; consumers still running: 1 (SIGTERM)",
    ]


def test_a_runtime_refuses_to_be_used_across_a_fork(runtime: Runtime):
    """HAZARDS 23: every method says so in the child, with the remedy; the parent goes on."""
    (child,) = runtime.spawn(Idle)
    runtime.start()
    pid = os.fork()
    if pid == 0:
        os._exit(_refusals(runtime))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert child.state is ConsumerState.CONSUMING


def _refusals(runtime: Runtime) -> int:
    uses: list[Callable[[], Any]] = [
        partial(runtime.spawn, Idle),
        runtime.start,
        runtime.stop,
        runtime.join,
        runtime.run,
        runtime.kill,
        runtime.__enter__,
    ]
    count = 0
    for use in uses:
        try:
            use()
        except ForkedError as exc:
            count += "in the child, after the fork" in str(exc)
    return count


@pytest.mark.parametrize("make", [lambda: Idle, Idle], ids=["a class", "an instance"])
def test_a_runtime_that_was_only_made_before_a_fork_works_in_each_child(make: Callable[[], Any]):
    """HAZARDS 23: it binds to its process when it first starts."""
    runtime = Runtime("memory://localhost")
    (child,) = runtime.spawn(make())
    pid = os.fork()
    if pid == 0:
        runtime.start()
        consumes = child.state is ConsumerState.CONSUMING
        runtime.stop()
        os._exit(0 if consumes and runtime.join(30) else 1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    with runtime:
        assert child.state is ConsumerState.CONSUMING


def test_a_fork_ends_the_childs_copy_of_a_run_without_touching_the_links():
    """The child's copy of whoever waits is told; nothing is drained twice."""
    runtime = Runtime("memory://localhost")
    (child,) = runtime.spawn(Idle)
    with recording() as events:
        running = gevent.spawn(runtime.run)
        wait_until(lambda: child.started)
        pid = os.fork()
        if pid == 0:
            running.join(30)
            told = isinstance(running.exception, ForkedError)
            os._exit(0 if told and not of_type(events, DrainFinished) else 1)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert child.running
    runtime.stop()
    assert running.get(timeout=30) is True
