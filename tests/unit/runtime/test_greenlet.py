from __future__ import annotations

import contextvars
from typing import Any

import gevent
import kombu
import kombu.mixins
import pytest
from gevent.event import Event
from gevent.pool import Group

from greenconsume.consuming.engine import ensure_lifecycle
from greenconsume.errors import AlreadyRunningError, InvalidConsumerError, NotPatchedError
from greenconsume.events import ConsumerGivenUp, ConsumerState
from greenconsume.mixins import ConsumerMixin
from greenconsume.runtime import greenlet as greenlet_module
from greenconsume.runtime.greenlet import ConsumerGreenlet, spawn
from tests.unit.fakes import Idle, Scripted, Stubborn, failing, of_type, recording
from tests.waiting import wait_until

WHO: contextvars.ContextVar[str] = contextvars.ContextVar("WHO", default="nobody")


class Counting(ConsumerMixin):
    """A real consumer of a queue in memory."""

    def __init__(self, connection: kombu.Connection, queue: str) -> None:
        self.connection = connection
        self.queue = kombu.Queue(queue)
        self.handled = Event()

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([self.queue], callbacks=[self.on_message])]

    def on_message(self, body: Any, message: Any) -> None:
        message.ack()
        self.handled.set()


class Plain(kombu.mixins.ConsumerMixin):
    """The same, written for kombu."""

    __init__ = Counting.__init__
    get_consumers = Counting.get_consumers
    on_message = Counting.on_message


def test_options_that_are_none_are_refused_before_anything_starts():
    consumer = Idle()
    with pytest.raises(TypeError, match=r"options must be a ConsumerOptions, not \{'conc"):
        spawn(consumer, options={"concurrency": 3})  # type: ignore[arg-type]
    greenlet = spawn(consumer)  # it has no greenlet yet
    greenlet.stop()
    assert greenlet.join(10)


@pytest.mark.parametrize("kind", [Counting, Plain])
def test_a_spawned_consumer_consumes_until_it_is_stopped(kind: type[Any], queue_name: str):
    """The whole life of one consumer over the memory transport, written for greenconsume or kombu."""
    with kombu.Connection("memory://localhost") as connection:
        consumer = kind(connection, queue_name)
        greenlet = spawn(consumer)
        assert greenlet.ready.wait(30)
        with connection.Producer() as producer:
            producer.publish({"n": 1}, routing_key=queue_name)
        assert consumer.handled.wait(30)
        assert greenlet.state is ConsumerState.CONSUMING
        greenlet.stop()
        assert greenlet.join(30)
    assert greenlet.state is ConsumerState.STOPPED
    assert greenlet.consumer is consumer
    assert greenlet.successful()


def test_assigning_should_stop_ends_the_greenlet(queue_name: str):
    """kombu's own way to stop a consumer wakes it at once."""
    with kombu.Connection("memory://localhost") as connection:
        greenlet = spawn(Counting(connection, queue_name))
        greenlet.ready.wait(30)
        greenlet.consumer.should_stop = True
        assert greenlet.join(30)


def test_a_greenlet_is_named_after_its_consumer():
    """A dump of greenlets tells which consumer each is."""
    greenlet = ConsumerGreenlet(Idle())
    assert greenlet.name.startswith("Idle-")
    assert greenlet.name in repr(greenlet)


def test_a_stop_before_the_start_ends_the_greenlet_without_connecting():
    """A consumer that was stopped early never runs."""
    greenlet = ConsumerGreenlet(Idle())
    greenlet.stop("early")
    assert greenlet.join(30)
    assert greenlet.consumer.runs == 0
    assert greenlet.state is ConsumerState.STOPPED
    assert not greenlet.killed


def test_a_stop_right_after_spawn_ends_the_greenlet_without_connecting():
    """A stop that comes before the greenlet's first turn is one before the start."""
    greenlet = spawn(Idle())
    greenlet.stop()
    assert greenlet.join(30)
    assert greenlet.consumer.runs == 0


def test_stopping_is_idempotent_and_keeps_the_first_reason():
    """Any number of stops from any number of greenlets are one."""
    greenlet = spawn(Idle())
    greenlet.ready.wait(30)
    gevent.joinall([gevent.spawn(greenlet.stop, f"reason {n}") for n in range(10)])
    greenlet.stop("late")
    assert greenlet.join(30)
    greenlet.stop("too late")
    assert ensure_lifecycle(greenlet.consumer).stop.reason == "reason 0"


def test_a_foreign_thread_stops_a_greenlet():
    """`stop` may be called from another OS thread."""
    greenlet = spawn(Idle())
    greenlet.ready.wait(30)
    gevent.get_hub().threadpool.apply(greenlet.stop)
    assert greenlet.join(30)


def test_joining_tells_whether_the_greenlet_has_finished():
    """At the timeout it is false, at the end it is true."""
    greenlet = spawn(Idle())
    assert greenlet.join(0) is False
    assert greenlet.join(0.001) is False
    greenlet.stop()
    assert greenlet.join() is True
    assert greenlet.join(0) is True


def test_gevents_joinall_group_and_link_work():
    """A consumer is a greenlet like others in a gevent program."""
    linked: list[ConsumerGreenlet] = []
    one, two, three = spawn(Idle()), spawn(failing()()), ConsumerGreenlet(Idle())
    group = Group()
    group.add(one)
    group.start(three)
    two.link_exception(linked.append)
    three.link_value(linked.append)
    three.ready.wait(30)
    one.stop()
    three.stop()
    assert len(gevent.joinall([one, two, three], timeout=30)) == 3
    assert group.join(timeout=30)
    wait_until(lambda: len(linked) == 2)
    assert set(linked) == {two, three}


def test_readiness_ends_with_the_consumer():
    """Whoever waits for a consumer to consume is told when it never will, and has no need of a timeout."""
    greenlet = spawn(Scripted(None))
    assert greenlet.ready.wait(30) is False
    assert greenlet.ready() is True


def test_readiness_is_an_event_that_gevent_can_wait_for():
    """It is set while the consumer consumes and at no other time."""
    greenlet = spawn(Idle())
    assert not greenlet.ready.is_set()
    assert greenlet.ready.wait(30)
    assert greenlet.ready.is_set()
    assert not greenlet.ready()
    greenlet.stop()
    greenlet.join(30)
    assert not greenlet.ready.is_set()


@pytest.mark.parametrize(
    "error", [ValueError("broken"), SystemExit(3), gevent.GreenletExit("own"), gevent.Timeout(30)]
)
def test_an_error_ends_the_consumer_alone_and_is_told_once(
    error: BaseException, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    """The error is the greenlet's `exception` and one record: gevent prints nothing, siblings live on."""
    sibling = spawn(Idle())
    with recording() as events:
        greenlet = spawn(Scripted(error))
        assert greenlet.join(30)
    assert greenlet.state is ConsumerState.FAILED
    assert greenlet.exception is error
    assert greenlet.exc_info[:2] == (type(error), error)
    assert not greenlet.successful()
    assert of_type(events, ConsumerGivenUp) == [ConsumerGivenUp(greenlet.name, error)]
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert capsys.readouterr().err == ""
    sibling.ready.wait(30)
    sibling.stop()
    assert sibling.join(30)


def test_the_error_is_raised_where_the_result_is_asked_for():
    """`get` and `joinall(raise_error=True)` raise what ended the consumer, as gevent's do."""
    greenlet = spawn(failing()())
    with pytest.raises(ValueError, match="no such thing"):
        greenlet.get(timeout=30)
    with pytest.raises(ValueError, match="no such thing"):
        gevent.joinall([greenlet], raise_error=True)


def test_a_kill_is_told_from_a_greenletexit_of_the_consumers_own():
    """Only what was killed from outside is marked as killed, and that is no error."""
    killed, own = spawn(Stubborn()), spawn(Scripted(gevent.GreenletExit()))
    killed.ready.wait(30)
    own.join(30)
    killed.kill()
    assert (killed.killed, killed.exception, killed.state) == (True, None, ConsumerState.STOPPED)
    assert (own.killed, own.state) == (False, ConsumerState.FAILED)


@pytest.mark.parametrize("how", ["kill", "killall", "group"])
def test_every_way_to_kill_marks_the_greenlet(how: str):
    """gevent has several ways to kill a greenlet; each is seen."""
    greenlet = spawn(Stubborn())
    greenlet.ready.wait(30)
    if how == "kill":
        greenlet.kill(block=False)
    elif how == "killall":
        gevent.killall([greenlet])
    else:
        Group([greenlet]).kill()
    assert greenlet.join(30)
    assert greenlet.killed


def test_a_greenlet_killed_before_it_began_is_marked_and_frees_its_consumer():
    """A kill may come before the first turn; the consumer can be spawned again then."""
    consumer = Idle()
    for kill in (lambda g: g.kill(), lambda g: gevent.killall([g])):
        greenlet = spawn(consumer)
        kill(greenlet)
        assert greenlet.join(30)
        assert greenlet.killed
        wait_until(lambda: ensure_lifecycle(consumer).state is ConsumerState.STOPPED)
    assert consumer.runs == 0


def test_a_kill_of_a_finished_greenlet_marks_nothing():
    """What has ended by itself was not killed."""
    greenlet = spawn(Scripted(None))
    greenlet.join(30)
    greenlet.kill()
    assert not greenlet.killed


def test_a_consumer_begins_with_its_spawners_context_variables():
    """HAZARDS 29: a trace or log context goes along, and what the consumer sets stays its own."""
    seen: list[str] = []

    class Tracing(Idle):
        def run(self) -> None:
            seen.append(WHO.get())
            WHO.set("consumer")

    def spawner() -> None:
        WHO.set("spawner")
        spawn(Tracing()).join(30)
        seen.append(WHO.get())

    gevent.spawn(spawner).join()
    assert seen == ["spawner", "spawner"]


def test_what_is_no_consumer_is_refused():
    """The error comes at once, in the caller."""
    with pytest.raises(InvalidConsumerError, match="get_consumers"):
        spawn(object())


def test_a_consumer_has_one_greenlet_at_a_time():
    """A second greenlet would drain the same connection; after the first has ended it is welcome."""
    consumer = Scripted("idle", None)
    first = spawn(consumer)
    with pytest.raises(AlreadyRunningError, match="has a greenlet already"):
        spawn(consumer)
    first.ready.wait(30)
    first.stop()
    first.join(30)
    ensure_lifecycle(consumer).stop.clear()
    assert spawn(consumer).join(30)


def test_an_unpatched_process_is_refused(monkeypatch: pytest.MonkeyPatch):
    """HAZARDS 10: nothing is spawned where the first wait would block the hub."""

    def refuse() -> None:
        raise NotPatchedError("not patched")

    monkeypatch.setattr(greenlet_module, "require_patched", refuse)
    with pytest.raises(NotPatchedError):
        spawn(Idle())
