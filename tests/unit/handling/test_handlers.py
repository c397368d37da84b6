"""Handlers in a consumer: their pool, their settling, their timeouts, and the drain that ends them."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent import GreenletExit
from gevent.event import Event
from kombu import Connection, Producer, Queue

from greenconsume.consuming.engine import ensure_engine, ensure_lifecycle
from greenconsume.errors import HandlerTimeout, InvalidConsumerError, Shutdown, StoppedError
from greenconsume.events import (
    ConsumerDrained,
    ConsumerState,
    DrainFinished,
    HandlerFailed,
    HandlerInterrupted,
    PrefetchTooSmall,
)
from greenconsume.events import Event as AnyEvent
from greenconsume.failures.policies import Reject, Requeue
from greenconsume.handling import alarm, drain
from greenconsume.handling.jobs import shielded
from greenconsume.handling.kill_switch import KillSwitch
from greenconsume.handling.options import ConsumerOptions
from greenconsume.mixins import ConsumerMixin
from greenconsume.runtime.child import Child
from greenconsume.runtime.greenlet import ConsumerGreenlet, spawn
from greenconsume.runtime.runtime import Runtime
from tests import frames
from tests.options import say
from tests.peer import Peer
from tests.unit.fakes import of_type
from tests.waiting import AT_ONCE, wait_until

WHO: contextvars.ContextVar[str] = contextvars.ContextVar("WHO", default="nobody")
Handle = Callable[[Any, Any], object]
#: Where handlers run: inline, or in a pool.
PLACES = [None, 3]


class Worker(ConsumerMixin):
    """Calls a function for each message of its queue; options of the mixin may be given."""

    def __init__(
        self,
        queue: str,
        handle: Handle,
        url: str = "memory://",
        consumer: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        bounded = {"close_timeout": 0.2} if url.startswith("amqp") else {}
        self.connection = Connection(url, transport_options=bounded)
        self.queue = Queue(queue)
        self.handle = handle
        self.consumer_options = consumer or {}
        self.consumers: list[Any] = []
        self.options = ConsumerOptions(**options)

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        self.consumers = [
            Consumer([self.queue], callbacks=[self.on_message], **self.consumer_options)
        ]
        return self.consumers

    def on_message(self, body: Any, message: Any) -> None:
        self.handle(body, message)


class Desk:
    """A runtime with one worker over memory, and its queue."""

    def __init__(self, queue: str, handle: Handle, **attributes: Any) -> None:
        own = {"drain_timeout": 1.0, "cancel_timeout": 1.0}
        timeouts = {name: attributes.pop(name, seconds) for name, seconds in own.items()}
        given = {name: attributes.pop(name) for name in ("max_handlers",) if name in attributes}
        self.runtime = Runtime("memory://", options=ConsumerOptions(**timeouts), **given)
        self.worker = Worker(queue, handle, **attributes)
        self.child: Child = self.runtime.spawn(self.worker)[0]
        self.connection = Connection("memory://")
        self.channel = self.connection.channel()
        self.queue = Queue(queue)(self.channel)
        self.queue.declare()

    def put(self, *bodies: Any, **options: Any) -> None:
        producer = Producer(self.channel)
        for body in bodies:
            producer.publish(body, routing_key=self.queue.name, **options)

    @property
    def depth(self) -> int:
        """The number of messages that wait in the queue."""
        return int(self.channel._size(self.queue.name))

    @property
    def unsettled(self) -> int:
        """The number of messages that were delivered to the worker, and are not settled."""
        return len(self.worker.consumers[0].channel.qos._delivered)

    @property
    def greenlet(self) -> ConsumerGreenlet:
        assert self.child.greenlet is not None
        return self.child.greenlet

    def run(self) -> gevent.Greenlet[..., bool]:
        """Run until somebody stops the runtime."""
        running = gevent.spawn(self.runtime.run)
        wait_until(lambda: self.child.started)
        return running


@pytest.fixture
def make_desk(queue_name: str) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(handle: Handle, **attributes: Any) -> Desk:
        desks.append(Desk(f"{queue_name}-{len(desks)}", handle, **attributes))
        return desks[-1]

    yield make
    for desk in desks:
        desk.runtime.kill()
        assert desk.runtime.join(30)
        desk.connection.release()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that swallows even its kill is not waited for long."""
    monkeypatch.setattr(drain, "LAST", 0.02)
    monkeypatch.setattr(alarm, "PATIENCE", 0.02)


class Gate:
    """A handler that waits until it is let through, and notes who came, how each ended and who is in it."""

    def __init__(self, settle: bool = True) -> None:
        self.came: list[Any] = []
        self.ended: list[Any] = []
        self.inside = 0
        self.opened = Event()
        self._settle = settle

    def __call__(self, body: Any, message: Any) -> None:
        self.came.append(body)
        self.inside += 1
        try:
            self.opened.wait()
            if self._settle:
                message.ack()
        except BaseException as exc:
            self.ended.append(exc)
            raise
        else:
            self.ended.append(body)
        finally:
            self.inside -= 1

    def wait(self, count: int) -> None:
        wait_until(lambda: len(self.came) == count)


def drained(events: list[AnyEvent]) -> list[tuple[int, int, int, int]]:
    found = of_type(events, ConsumerDrained)
    return [(e.finished, e.given_back, e.cancelled, e.killed) for e in found]


# -- the pool -----------------------------------------------------------------------------------------


def test_as_many_callbacks_run_at_once_as_concurrency_says(make_desk: Callable[..., Desk]):
    gate = Gate()
    desk = make_desk(gate, concurrency=3)
    desk.put(*range(5))
    with desk.runtime:
        gate.wait(3)
        gevent.idle()
        assert gate.inside == 3
        gate.opened.set()
        wait_until(lambda: sorted(gate.ended) == [0, 1, 2, 3, 4])
        assert (desk.depth, desk.unsettled) == (0, 0)


def test_callbacks_run_inline_without_a_concurrency(make_desk: Callable[..., Desk]):
    gate, where = Gate(), []
    desk = make_desk(lambda *args: (where.append(gevent.getcurrent()), gate(*args)))
    desk.put(1, 2)
    with desk.runtime:
        gate.wait(1)
        gevent.idle()
        assert gate.inside == 1
        gate.opened.set()
        wait_until(lambda: gate.ended == [1, 2])
        assert set(where) == {desk.greenlet}


def test_a_concurrency_of_one_is_in_order_and_off_the_consumers_greenlet(make_desk):
    got, where = [], []

    def handle(body: Any, message: Any) -> None:
        where.append(gevent.getcurrent())
        gevent.sleep(0.0005 * (body % 3))
        got.append(body)
        message.ack()

    desk = make_desk(handle, concurrency=1)
    desk.put(*range(10))
    with desk.runtime:
        wait_until(lambda: got == list(range(10)))
        assert desk.greenlet not in where


def test_the_runtime_gives_a_concurrency_to_those_that_have_none(queue_name: str):
    runtime = Runtime("memory://", options=ConsumerOptions(concurrency=4))
    runtime.spawn(Worker(queue_name, Gate()))
    runtime.spawn(Worker(queue_name, Gate(), concurrency=2))
    with runtime:
        used = [ensure_engine(child.consumer).handling for child in runtime.children]
        assert [handling.pool.size for handling in used] == [4, 2]


def test_max_handlers_bounds_all_consumers_of_a_runtime_together(queue_name: str, make_desk):
    gate = Gate()
    desk = make_desk(gate, concurrency=3, max_handlers=4)
    desk.runtime.spawn(Worker(desk.queue.name, gate, concurrency=3))
    desk.put(*range(10))
    with desk.runtime:
        gate.wait(4)
        gevent.idle()
        assert gate.inside == 4
        gate.opened.set()
        wait_until(lambda: sorted(gate.ended) == list(range(10)))


def test_the_prefetch_follows_the_concurrency(make_desk: Callable[..., Desk]):
    """HAZARDS.md row 20: bounded, and with as much again at hand as runs."""
    gate = Gate()
    desk = make_desk(gate, concurrency=3)
    desk.put(*range(20))
    with desk.runtime:
        wait_until(lambda: desk.unsettled > 3)
        gevent.idle()
        assert gate.inside == 3
        assert desk.worker.consumers[0].channel.qos.prefetch_count == 6
        assert desk.unsettled <= 6
        gate.opened.set()
        wait_until(lambda: len(gate.ended) == 20)


@pytest.mark.parametrize(("prefetch", "warned"), [(5, [5]), (10, []), (50, [])])
def test_a_prefetch_of_the_consumers_own_stays_and_a_smaller_one_is_told(
    make_desk, events: list[AnyEvent], prefetch: int, warned: list[int]
):
    desk = make_desk(Gate(), concurrency=10, consumer={"prefetch_count": prefetch})
    with desk.runtime:
        assert desk.worker.consumers[0].channel.qos.prefetch_count == prefetch
    told = of_type(events, PrefetchTooSmall)
    assert [(e.prefetch, e.concurrency) for e in told] == [(each, 10) for each in warned]


def test_messages_of_one_key_are_handled_in_order(make_desk: Callable[..., Desk]):
    got: list[tuple[str, int]] = []

    def handle(body: Any, message: Any) -> None:
        gevent.sleep(0.0005 * ((body * 7) % 4))
        got.append((message.headers["customer"], body))
        message.ack()

    desk = make_desk(handle, concurrency=5, partition_by="customer")
    for number in range(30):
        desk.put(number, headers={"customer": "abc"[number % 3]})
    with desk.runtime:
        wait_until(lambda: len(got) == 30)
    for customer in "abc":
        numbers = [number for who, number in got if who == customer]
        assert numbers == sorted(numbers)
    assert got != sorted(got, key=lambda each: each[1])


def test_messages_without_a_key_wait_for_none(make_desk: Callable[..., Desk]):
    gate = Gate()
    desk = make_desk(gate, concurrency=3, partition_by="customer")
    desk.put(1, 2, 3)
    with desk.runtime:
        gate.wait(3)
        gate.opened.set()


@pytest.mark.parametrize("by", [lambda message: 1 / 0, lambda message: []])
def test_a_partition_that_cannot_be_told_meets_the_policy(
    make_desk, events: list[AnyEvent], by: Any
):
    desk = make_desk(Gate(), concurrency=2, partition_by=by, on_error=Reject())
    desk.put(1)
    with desk.runtime:
        wait_until(lambda: of_type(events, HandlerFailed))
        assert desk.unsettled == 0
        assert desk.child.state is ConsumerState.CONSUMING


@pytest.mark.parametrize("concurrency", PLACES)
def test_the_consumers_context_goes_with_the_message(make_desk, concurrency: int | None):
    """HAZARDS.md row 29: what a handler sets does not reach the next, wherever it runs."""
    seen: list[str] = []

    def handle(body: Any, message: Any) -> None:
        seen.append(WHO.get())
        WHO.set("a handler")
        message.ack()

    WHO.set("the consumer")
    desk = make_desk(handle, concurrency=concurrency)
    WHO.set("somebody else")
    desk.put(1, 2, 3)
    with desk.runtime:
        wait_until(lambda: len(seen) == 3)
    assert seen == ["the consumer"] * 3


# -- settling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", PLACES)
@pytest.mark.parametrize(("auto_settle", "unsettled"), [(False, 1), (True, 0)])
def test_a_message_that_its_handler_left_unsettled_is_acked_if_the_consumer_says_so(
    make_desk, concurrency: int | None, auto_settle: bool, unsettled: int
):
    handled = Event()
    desk = make_desk(
        lambda body, message: handled.set(), auto_settle=auto_settle, concurrency=concurrency
    )
    desk.put(1)
    with desk.runtime:
        assert handled.wait(30)
        gevent.idle()
        assert (desk.depth, desk.unsettled) == (0, unsettled)
    assert desk.depth == unsettled


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue"])
def test_what_a_handler_settled_itself_is_left_at_that(make_desk, settle: str):
    times: list[Any] = []

    def handle(body: Any, message: Any) -> None:
        times.append(body)
        if len(times) == 1:
            getattr(message, settle)()

    desk = make_desk(handle, auto_settle=True, concurrency=2)
    desk.put(1)
    with desk.runtime:
        wait_until(lambda: len(times) == (2 if settle == "requeue" else 1))
        wait_until(lambda: desk.unsettled == 0)
    assert desk.depth == 0


def test_a_failed_message_is_not_acked(make_desk: Callable[..., Desk]):
    failed = Event()

    def handle(body: Any, message: Any) -> None:
        failed.set()
        raise ValueError("no such thing")

    desk = make_desk(handle, auto_settle=True, concurrency=2, on_error=Requeue(60))
    desk.put(1)
    with desk.runtime:
        assert failed.wait(30)
        gevent.idle()
        assert desk.unsettled == 1
    assert desk.depth == 1


def test_each_error_meets_its_own_policy(make_desk: Callable[..., Desk], events: list[AnyEvent]):
    def handle(body: Any, message: Any) -> None:
        raise {"key": KeyError, "index": IndexError, "value": ValueError}[body]()

    policies = {LookupError: Requeue(60), KeyError: Reject()}
    desk = make_desk(handle, concurrency=3, on_error=policies)
    desk.put("key", "index", "value")
    with desk.runtime:
        wait_until(lambda: len(of_type(events, HandlerFailed)) == 3)
    outcomes = {type(e.error).__name__: e.outcome for e in of_type(events, HandlerFailed)}
    assert outcomes == {
        "KeyError": "rejected",
        "IndexError": "requeued in 60 s",
        "ValueError": "requeued in 1 s",
    }


@pytest.mark.parametrize(("kept", "acked"), [(True, 0), (False, 1)])
def test_a_body_that_cannot_be_decoded_is_acked_as_by_kombu_or_meets_the_policy(
    make_desk, events: list[AnyEvent], kept: bool, acked: int
):
    """With `on_decode_error = None` a poisoned body is not lost."""
    desk = make_desk(Gate(), concurrency=2, on_error=Requeue(60))
    if kept:
        desk.worker.on_decode_error = None
    desk.put("{nonsense", content_type="application/json", content_encoding="utf-8")
    with desk.runtime:
        wait_until(lambda: desk.depth == 0)
        wait_until(lambda: desk.unsettled == 1 - acked)
    assert desk.depth == 1 - acked
    assert len(of_type(events, HandlerFailed)) == 1 - acked


# -- timeouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", PLACES)
def test_a_handler_that_takes_too_long_is_interrupted_and_its_message_meets_the_policy(
    make_desk, events: list[AnyEvent], concurrency: int | None
):
    """And the consumer goes on."""
    gate = Gate()
    desk = make_desk(gate, concurrency=concurrency, handler_timeout=0.02, on_error=Reject())
    desk.put("slow")
    with desk.runtime:
        wait_until(lambda: len(gate.ended) == 1)
        assert isinstance(gate.ended[0], HandlerTimeout)
        assert gate.ended[0].seconds == 0.02
        (failed,) = of_type(events, HandlerFailed)
        assert (failed.error, failed.outcome) == (gate.ended[0], "rejected")
        gate.opened.set()
        desk.put("quick")
        wait_until(lambda: gate.ended[1:] == ["quick"])
        assert not desk.greenlet.killed
        assert desk.unsettled == 0


@pytest.mark.parametrize("concurrency", [None, 1])
def test_a_timeout_meets_its_own_message_alone(make_desk, events, concurrency: int | None):
    """Quick handlers follow each other in one greenlet: what was meant for one must not reach the next."""
    got: list[int] = []

    def handle(body: Any, message: Any) -> None:
        gevent.sleep(0.002)
        got.append(body)
        message.ack()

    desk = make_desk(handle, concurrency=concurrency, handler_timeout=0.05)
    desk.put(*range(50))
    with desk.runtime:
        wait_until(lambda: len(got) == 50)
    assert of_type(events, HandlerInterrupted) == []


def swallows(message: Any, *also: type[BaseException], settle: bool = False) -> None:
    """Wait, and go on when told to end."""
    try:
        Event().wait()
    except (HandlerTimeout, Shutdown, *also):
        if settle:
            message.ack()


@pytest.mark.parametrize("concurrency", PLACES)
def test_a_timeout_that_is_swallowed_counts_while_the_message_is_unsettled(
    make_desk, events: list[AnyEvent], concurrency: int | None
):
    """Its work is not done: `auto_settle` must not take it for success."""
    desk = make_desk(
        lambda body, message: swallows(message),
        concurrency=concurrency,
        handler_timeout=0.01,
        auto_settle=True,
        on_error=Requeue(60),
    )
    desk.put(1)
    with desk.runtime:
        wait_until(lambda: of_type(events, HandlerFailed))
        assert isinstance(of_type(events, HandlerFailed)[0].error, HandlerTimeout)
        assert desk.unsettled == 1


def test_a_handler_that_settles_when_its_time_is_up_has_not_failed(make_desk, events):
    desk = make_desk(
        lambda body, message: swallows(message, settle=True), concurrency=1, handler_timeout=0.01
    )
    desk.put(1, 2)
    with desk.runtime:
        wait_until(lambda: len(of_type(events, HandlerInterrupted)) == 2)
        wait_until(lambda: desk.unsettled == 0)
    assert of_type(events, HandlerFailed) == []


@pytest.mark.parametrize("concurrency", PLACES)
def test_a_handler_that_goes_on_after_its_timeout_is_killed(
    make_desk, events: list[AnyEvent], concurrency: int | None
):
    """The message meets the policy, and the consumer lives, in whose greenlet it may have been."""
    ended: list[type[BaseException]] = []

    def handle(body: Any, message: Any) -> None:
        if body == "good":
            message.ack()
            return
        swallows(message)
        try:
            Event().wait()
        except BaseException as exc:
            ended.append(type(exc))
            raise

    desk = make_desk(
        handle,
        concurrency=concurrency,
        handler_timeout=0.01,
        cancel_timeout=0.02,
        on_error={HandlerTimeout: Reject()},
    )
    desk.put("bad", "good")
    with desk.runtime:
        wait_until(lambda: (desk.depth, desk.unsettled, ended) == (0, 0, [GreenletExit]))
        assert desk.child.state is ConsumerState.CONSUMING
        assert not desk.greenlet.killed
    assert [e.killed for e in of_type(events, HandlerInterrupted)] == [False, True]
    assert [e.outcome for e in of_type(events, HandlerFailed)] == ["rejected"]


def test_a_handler_that_swallows_its_kill_is_killed_again_and_told_of(make_desk, events, impatient):
    release = Event()

    def undead(body: Any, message: Any) -> None:
        while not release.is_set():
            try:
                release.wait()
            except BaseException:
                continue
        message.ack()

    desk = make_desk(undead, concurrency=1, handler_timeout=0.01, cancel_timeout=0.01)
    desk.put(1)
    with desk.runtime:
        wait_until(lambda: len([e for e in of_type(events, HandlerInterrupted) if e.killed]) >= 3)
        release.set()
        wait_until(lambda: desk.unsettled == 0)


# -- the drain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", PLACES)
def test_a_stop_waits_for_running_handlers_and_lets_no_other_start(
    make_desk, events: list[AnyEvent], concurrency: int | None
):
    """HAZARDS.md row 12: what they have done is acked before the channel closes."""
    gate, places = Gate(), concurrency or 1
    desk = make_desk(gate, concurrency=concurrency, drain_timeout=1000)
    desk.put(*range(10))
    running = desk.run()
    gate.wait(places)
    desk.runtime.stop()
    wait_until(lambda: desk.child.state is ConsumerState.DRAINING)
    assert not desk.greenlet.ready.is_set()
    gate.opened.set()
    assert running.get(timeout=30) is True
    assert gate.ended == gate.came == list(range(places))
    assert desk.depth == 10 - places
    (told,) = of_type(events, DrainFinished)
    assert (told.finished_handlers, told.cancelled_handlers, told.killed_handlers) == (places, 0, 0)


def test_what_waits_for_its_partition_goes_back_at_once(make_desk, events: list[AnyEvent]):
    gate = Gate()
    desk = make_desk(gate, concurrency=2, partition_by=lambda message: 1, drain_timeout=1000)
    desk.put(*range(4))
    running = desk.run()
    wait_until(lambda: desk.unsettled == 4)
    desk.runtime.stop()
    wait_until(lambda: desk.depth == 3)
    assert gate.inside == 1
    gate.opened.set()
    assert running.get(timeout=30) is True
    assert gate.came == [0]
    assert drained(events) == [(1, 3, 0, 0)]


def test_what_waits_for_a_place_goes_back_at_once(make_desk, events: list[AnyEvent]):
    gate = Gate()
    desk = make_desk(gate, concurrency=1, drain_timeout=1000)
    desk.put(1, 2)
    running = desk.run()
    wait_until(lambda: desk.unsettled == 2)
    desk.runtime.stop()
    wait_until(lambda: desk.depth == 1)
    gate.opened.set()
    assert running.get(timeout=30) is True
    assert drained(events) == [(1, 1, 0, 0)]


@pytest.mark.parametrize("concurrency", PLACES)
def test_handlers_that_outlast_the_drain_timeout_are_cancelled_and_their_messages_go_back(
    make_desk, events: list[AnyEvent], concurrency: int | None
):
    """A cancelled handler is not a failed one: no policy touches its message."""
    gate, places = Gate(), concurrency or 1
    desk = make_desk(
        gate, concurrency=concurrency, drain_timeout=0.02, cancel_timeout=1000, on_error=Reject()
    )
    desk.put(*range(places))
    running = desk.run()
    gate.wait(places)
    desk.runtime.stop()
    assert running.get(timeout=30) is False
    assert [type(end) for end in gate.ended] == [Shutdown] * places
    assert "drain_timeout of 0.02 s is over" in str(gate.ended[0])
    assert desk.depth == places
    assert of_type(events, HandlerFailed) == []
    assert drained(events) == [(0, 0, places, 0)]
    assert [e.killed for e in of_type(events, HandlerInterrupted)] == [False] * places
    assert not desk.greenlet.killed


@pytest.mark.parametrize("concurrency", PLACES)
@pytest.mark.parametrize("auto_settle", [False, True])
def test_whatever_a_handler_makes_of_its_shutdown_its_message_goes_back(
    make_desk, events: list[AnyEvent], concurrency: int | None, auto_settle: bool
):
    """One swallows it and returns, one raises something else: neither has done its work, or failed."""

    def handle(body: Any, message: Any) -> None:
        try:
            Event().wait()
        except Shutdown as exc:
            if body:
                raise ValueError("lost the connection") from exc

    for body in (0, 1):
        desk = make_desk(
            handle,
            concurrency=concurrency,
            drain_timeout=0.01,
            auto_settle=auto_settle,
            on_error=Reject(),
        )
        desk.put(body)
        running = desk.run()
        wait_until(lambda desk=desk: desk.unsettled == 1)
        desk.runtime.stop()
        assert running.get(timeout=30) is False
        assert desk.depth == 1
    assert of_type(events, HandlerFailed) == []
    assert drained(events) == [(0, 0, 1, 0)] * 2


def test_a_handler_that_acks_when_it_is_told_to_end_has_finished(make_desk, events: list[AnyEvent]):
    desk = make_desk(
        lambda body, message: swallows(message, settle=True), concurrency=1, drain_timeout=0.01
    )
    desk.put(1)
    running = desk.run()
    wait_until(lambda: desk.unsettled == 1)
    desk.runtime.stop()
    assert running.get(timeout=30) is True
    assert (desk.depth, drained(events)) == (0, [(1, 0, 0, 0)])


def test_a_handler_that_acked_before_it_was_cancelled_is_not_given_back(make_desk, events):
    def handle(body: Any, message: Any) -> None:
        message.ack()
        Event().wait()

    desk = make_desk(handle, concurrency=1, drain_timeout=0.01)
    desk.put(1)
    running = desk.run()
    wait_until(lambda: ensure_engine(desk.worker).handling.busy)
    desk.runtime.stop()
    assert running.get(timeout=30) is False
    assert (desk.depth, drained(events)) == (0, [(0, 0, 1, 0)])


@pytest.mark.parametrize("concurrency", PLACES)
def test_a_handler_that_goes_on_after_its_shutdown_is_killed_and_its_message_left_to_the_broker(
    make_desk, events: list[AnyEvent], concurrency: int | None
):
    ended: list[type[BaseException]] = []

    def handle(body: Any, message: Any) -> None:
        swallows(message)
        try:
            Event().wait()
        except BaseException as exc:
            ended.append(type(exc))
            raise

    desk = make_desk(
        handle, concurrency=concurrency, drain_timeout=0.01, cancel_timeout=0.02, on_error=Reject()
    )
    desk.put(1)
    running = desk.run()
    wait_until(lambda: desk.unsettled == 1)
    desk.runtime.stop()
    assert running.get(timeout=30) is False
    assert ended == [GreenletExit]
    assert desk.depth == 1
    assert of_type(events, HandlerFailed) == []
    assert drained(events) == [(0, 0, 0, 1)]
    assert [e.killed for e in of_type(events, HandlerInterrupted)] == [False, True]
    assert (desk.child.state, desk.greenlet.killed) == (ConsumerState.STOPPED, False)


def test_a_handler_that_swallows_even_its_kill_is_left_behind_and_told_of(
    make_desk, events: list[AnyEvent], impatient: None
):
    release = Event()

    def undead(body: Any, message: Any) -> None:
        while not release.is_set():
            try:
                release.wait()
            except BaseException:
                continue

    desk = make_desk(undead, concurrency=1, drain_timeout=0.01, cancel_timeout=0.01)
    desk.put(1)
    running = desk.run()
    wait_until(lambda: desk.unsettled == 1)
    desk.runtime.stop()
    assert running.get(timeout=30) is False
    assert desk.depth == 1
    assert of_type(events, HandlerInterrupted)[-1].reason == "it goes on although it was killed"
    assert drained(events) == [(0, 0, 0, 1)]
    release.set()


def test_a_wait_of_the_packages_own_that_the_stop_ended_is_no_failure(make_desk, events):
    """As of a publish that the broker blocks: it ends with StoppedError, in the midst of a handler."""

    def handle(body: Any, message: Any) -> None:
        stop = ensure_lifecycle(desk.worker).stop
        stop.wait()
        stop.check()

    desk = make_desk(handle, concurrency=1, on_error=Reject())
    desk.put(1)
    running = desk.run()
    wait_until(lambda: desk.unsettled == 1)
    desk.runtime.stop()
    running.join(30)
    assert (desk.depth, drained(events)) == (1, [(0, 0, 1, 0)])
    assert of_type(events, HandlerFailed) == []


def test_a_stopped_error_without_a_stop_is_a_failure_like_any_other(make_desk, events):
    def handle(body: Any, message: Any) -> None:
        raise StoppedError("somebody else")

    desk = make_desk(handle, concurrency=1, on_error=Reject())
    desk.put(1)
    with desk.runtime:
        wait_until(lambda: of_type(events, HandlerFailed))


@pytest.mark.parametrize("rung", ["cancel", "kill"])
@pytest.mark.parametrize("concurrency", PLACES)
def test_a_runtimes_cancel_and_kill_hurry_the_ladder(
    make_desk, events: list[AnyEvent], rung: str, concurrency: int | None
):
    ended: list[type[BaseException]] = []

    def handle(body: Any, message: Any) -> None:
        for _ in range(2 if rung == "kill" else 1):
            try:
                Event().wait()
            except BaseException as exc:
                ended.append(type(exc))

    desk = make_desk(handle, concurrency=concurrency, drain_timeout=1000, cancel_timeout=1000)
    desk.put(1)
    running = desk.run()
    wait_until(lambda: desk.unsettled == 1)
    desk.runtime.stop()
    gevent.idle()
    getattr(desk.runtime, rung)("hurry up")
    assert running.get(timeout=30) is False
    assert ended == ([Shutdown, GreenletExit] if rung == "kill" else [Shutdown])
    assert {e.reason for e in of_type(events, HandlerInterrupted)} == {"hurry up"}
    assert desk.depth == 1


def test_a_timeout_of_the_consumers_own_goes_before_the_runtimes(make_desk):
    """Longer than the runtime's, too."""
    gate = Gate()
    desk = make_desk(gate, concurrency=1, drain_timeout=0.0, cancel_timeout=0.0)
    say(desk.worker, drain_timeout=1000.0)
    desk.put(1)
    running = desk.run()
    gate.wait(1)
    desk.runtime.stop()
    wait_until(lambda: desk.child.state is ConsumerState.DRAINING)
    gevent.idle()
    gate.opened.set()
    assert running.get(timeout=30) is True
    assert gate.ended == [1]


def test_a_consumer_that_stops_itself_in_a_handler_waits_for_it(make_desk, events):
    def handle(body: Any, message: Any) -> None:
        desk.worker.should_stop = True
        gevent.sleep(0.01)
        message.ack()

    desk = make_desk(handle, concurrency=2)
    desk.put(1)
    assert desk.run().get(timeout=30) is True
    assert (desk.depth, drained(events)) == (0, [(1, 0, 0, 0)])


def test_a_limit_waits_for_what_it_has_started(make_desk: Callable[..., Desk]):
    """Without a stop: the generator ends when its handlers have."""
    done: list[int] = []

    def handle(body: Any, message: Any) -> None:
        gevent.sleep(0.002)
        done.append(body)
        message.ack()

    desk = make_desk(handle, concurrency=5)
    desk.put(*range(6))
    assert list(desk.worker.consume(limit=3)) == [None] * 3
    assert sorted(done) == [0, 1, 2]
    assert desk.depth == 3


def test_a_timeout_of_the_loop_waits_for_its_handlers(make_desk: Callable[..., Desk]):
    """It is an OSError, as a lost link's is; but here the link is well, and they can still settle."""
    gate = Gate()
    desk = make_desk(gate, concurrency=5)
    desk.put(1)
    gevent.spawn_later(0.05, gate.opened.set)
    with pytest.raises(TimeoutError):
        list(desk.worker.consume(timeout=0.01))
    assert (gate.ended, desk.depth) == ([1], 0)


def test_a_killed_consumer_takes_its_handlers_along(make_desk, events: list[AnyEvent]):
    gate = Gate()
    desk = make_desk(gate, concurrency=3)
    desk.put(1, 2)
    with desk.runtime:
        gate.wait(2)
        desk.greenlet.kill()
        wait_until(lambda: len(gate.ended) == 2)
        assert {type(end) for end in gate.ended} == {GreenletExit}
        assert desk.depth == 2
    assert of_type(events, HandlerFailed) == []


def test_a_consumer_killed_while_it_drains_takes_its_handlers_along(make_desk):
    gate = Gate()
    desk = make_desk(gate, concurrency=3, drain_timeout=1000)
    desk.put(1, 2)
    running = desk.run()
    gate.wait(2)
    desk.runtime.stop()
    wait_until(lambda: desk.child.state is ConsumerState.DRAINING)
    gevent.idle()
    desk.greenlet.kill()
    running.join(30)
    assert {type(end) for end in gate.ended} == {GreenletExit}
    assert desk.depth == 2


def test_an_instance_that_runs_again_counts_anew(make_desk, events: list[AnyEvent]):
    gate = Gate()
    desk = make_desk(gate, concurrency=1)
    for number in (1, 2):
        gate.opened.clear()
        desk.put(number)
        running = desk.run()
        gate.wait(number)
        desk.runtime.stop()
        wait_until(lambda: desk.child.state is ConsumerState.DRAINING)
        gevent.idle()
        gate.opened.set()
        assert running.get(timeout=30) is True
    assert drained(events) == [(1, 0, 0, 0)] * 2


# -- a lost link ----------------------------------------------------------------------------------------


class Linked(Worker):
    """Over a scripted peer, and back at once after a lost link."""

    @property
    def restart_limit(self) -> Any:
        return self

    def can_consume(self, tokens: int = 1) -> bool:
        return True


@contextmanager
def over(peer: Peer, handle: Handle, **attributes: Any) -> Iterator[Linked]:
    worker = Linked("q", handle, peer.url, **attributes)
    greenlet = spawn(worker)
    try:
        assert greenlet.ready.wait(30)
        yield worker
    finally:
        greenlet.stop()
        assert greenlet.join(30)


def deliver(peer: Peer, *tags: int, body: bytes = b"1") -> None:
    """Deliver messages to the consumer that came last."""
    consumer_tag = peer.frames("basic.consume")[-1].args[2]
    for tag in tags:
        peer.deliver(1, consumer_tag, tag, body)


def test_handlers_that_a_lost_link_left_running_end_by_themselves_and_settle_nothing(peer: Peer):
    """HAZARDS.md row 13: their late acks reach no message of the new link."""
    gate = Gate()
    with over(peer, gate, concurrency=2) as worker:
        deliver(peer, 1)
        gate.wait(1)
        peer.hang_up()
        peer.wait_for("basic.consume", 2)
        deliver(peer, 1)
        gate.wait(2)
        gate.opened.set()
        wait_until(lambda: gate.ended == [1, 1])
        peer.wait_for("basic.ack")
        assert ensure_lifecycle(worker).state is ConsumerState.CONSUMING
    assert len(peer.frames("basic.ack")) == 1


def test_what_waited_for_its_partition_when_the_link_was_lost_does_not_run(peer: Peer):
    """HAZARDS.md row 12: the broker delivers it again."""
    gate = Gate()
    with over(peer, gate, concurrency=2, partition_by=lambda message: 1) as worker:
        deliver(peer, 1, 2)
        gate.wait(1)
        pool = ensure_engine(worker).handling.pool
        wait_until(lambda: pool._room.free < pool._room.count)
        peer.hang_up()
        peer.wait_for("basic.consume", 2)
        gate.opened.set()
        wait_until(lambda: not pool.jobs)
    assert gate.came == [1]


def test_what_waited_for_a_place_when_the_link_was_lost_does_not_run(peer: Peer):
    """HAZARDS.md row 12: the broker delivers it again."""
    gate = Gate()
    with over(peer, gate, concurrency=1) as worker:
        deliver(peer, 1, 2)
        gate.wait(1)
        wait_until(lambda: ensure_engine(worker).handling.pool._slots._queue)
        peer.hang_up()
        wait_until(lambda: peer.open_count == 0)
        gate.opened.set()
        peer.wait_for("basic.consume", 2)
        deliver(peer, 1)
        gate.wait(2)
    assert gate.came == gate.ended == [1, 1]


def test_handlers_of_a_lost_link_count_towards_the_concurrency(peer: Peer):
    """HAZARDS.md row 20: a broker that comes and goes does not multiply them."""
    gate = Gate()
    with over(peer, gate, concurrency=1):
        deliver(peer, 1)
        gate.wait(1)
        peer.hang_up()
        peer.wait_for("basic.consume", 2)
        deliver(peer, 1)
        gevent.sleep(0.02)
        assert gate.inside == 1
        gate.opened.set()
        gate.wait(2)


@pytest.mark.parametrize("stage", ["connecting", "token"])
def test_a_stop_while_the_broker_is_away_waits_for_handlers_too(
    peer: Peer, events: list[AnyEvent], stage: str
):
    """Their side effects are worth an orderly end, though their acks come too late."""
    gate = Gate()
    worker = Linked("q", gate, peer.url, concurrency=2)
    greenlet = spawn(worker)
    assert greenlet.ready.wait(30)
    deliver(peer, 1)
    gate.wait(1)
    if stage == "token":
        worker.can_consume = lambda tokens=1: False
        worker.expected_time = lambda tokens=1: 1000.0
    else:
        peer.silent = {"connection.open"}
    peer.hang_up()
    wait_until(lambda: not greenlet.ready.is_set())
    gevent.sleep(0.02)
    greenlet.stop()
    gevent.sleep(0.02)
    assert not greenlet.ready()
    gate.opened.set()
    assert greenlet.join(30)
    assert gate.ended == [1]
    assert drained(events) == [(1, 0, 0, 0)]


def test_a_consumer_killed_while_the_broker_is_away_takes_its_handlers_along(peer: Peer):
    gate = Gate()
    worker = Linked("q", gate, peer.url, concurrency=2)
    greenlet = spawn(worker)
    assert greenlet.ready.wait(30)
    deliver(peer, 1)
    gate.wait(1)
    peer.silent = {"connection.open"}
    peer.hang_up()
    wait_until(lambda: not greenlet.ready.is_set())
    greenlet.kill()
    wait_until(lambda: len(gate.ended) == 1)
    assert isinstance(gate.ended[0], GreenletExit)


def test_a_channel_that_the_broker_closed_is_rebuilt_alone(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
):
    """HAZARDS.md row 19: its own link lives on, with everything else on it."""
    monkeypatch.setattr("greenconsume.consuming.refusals.FIRST_DELAY", 0.01)
    gate = Gate()
    runtime = Runtime(peer.url)
    one, other = (Linked(name, gate, peer.url, concurrency=2) for name in ("one", "other"))
    runtime.spawn(one)
    runtime.spawn(other)
    with runtime:
        peer.send(frames.channel_close(1, 406, "PRECONDITION_FAILED - timed out"))
        peer.wait_for("basic.consume", 3)
        wait_until(lambda: all(child.started for child in runtime.children))
    assert peer.connection_count == 1
    assert len(peer.frames("basic.consume")) == 3


def test_a_message_handled_quickly_takes_no_longer_with_a_pool(make_desk: Callable[..., Desk]):
    """A handler starts at the hub's next turn, not at a tick, of which there is one a second."""
    handled = Event()
    desk = make_desk(lambda body, message: (message.ack(), handled.set()), concurrency=2)
    with desk.runtime:
        began = monotonic()
        for number in range(2 * int(AT_ONCE)):
            handled.clear()
            desk.put(number)
            assert handled.wait(30)
        assert monotonic() - began < AT_ONCE


# -- what a drain meets --------------------------------------------------------------------------------


def test_a_stop_while_the_kill_switch_drains_cancels_a_handler_once(make_desk, events):
    interrupts: list[str] = []

    def handle(body: Any, message: Any) -> None:
        if body == "bad":
            raise ValueError(body)
        try:
            gevent.sleep(30)
        except Shutdown:
            interrupts.append("first")
            try:
                gevent.sleep(0.3)
            except Shutdown:
                interrupts.append("second")
                raise
            raise

    switch = KillSwitch(0, 1, 60)
    desk = make_desk(
        handle, concurrency=2, kill_switch=switch, on_error=Reject(), drain_timeout=0.05
    )
    say(desk.worker, drain_timeout=0.05)
    desk.put("long", "bad")
    desk.run()
    wait_until(lambda: interrupts)
    desk.runtime.stop()
    assert desk.runtime.join(30)
    assert interrupts == ["first"]
    assert drained(events) == [(0, 0, 1, 0)]


def test_what_is_given_back_keeps_its_order(make_desk):
    gate = Gate()
    desk = make_desk(gate, concurrency=3, partition_by=lambda message: "same")
    desk.put(*range(1, 6))
    desk.run()
    gate.wait(1)
    wait_until(lambda: desk.unsettled == 5)
    gevent.idle()
    desk.runtime.stop()
    gevent.idle()
    gate.opened.set()
    assert desk.runtime.join(30)
    assert gate.ended == [1]
    left = [desk.channel.basic_get(desk.queue.name) for _ in range(4)]
    assert [message.decode() for message in left] == [2, 3, 4, 5]


def test_a_limit_counts_what_waits_behind_its_key(make_desk):
    gate = Gate()
    gate.opened.set()
    desk = make_desk(
        lambda *args: (gevent.sleep(0.01), gate(*args)),
        concurrency=2,
        partition_by=lambda message: "same",
    )
    desk.put(1, 2, 3)
    assert len(list(desk.worker.consume(limit=3))) == 3
    assert gate.ended == [1, 2, 3]


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_does_not_hide_the_timeout_that_waits_for_a_write(make_desk, events, place):
    def handle(_body: Any, message: Any) -> None:
        with shielded():
            gevent.sleep(0.1)
        gevent.sleep(30)

    policy = {HandlerTimeout: Reject(), BaseException: Requeue(60)}
    desk = make_desk(
        handle, concurrency=place, handler_timeout=0.02, cancel_timeout=0.02, on_error=policy
    )
    say(desk.worker, cancel_timeout=0.02)
    desk.put("x")
    with desk.runtime:
        wait_until(lambda: of_type(events, HandlerFailed))
        assert desk.greenlet.state is ConsumerState.CONSUMING
    (failure,) = of_type(events, HandlerFailed)
    assert isinstance(failure.error, HandlerTimeout)
    assert failure.outcome == "rejected"


def test_a_handler_that_drains_by_itself_is_not_interrupted_in_what_it_runs(make_desk):
    """Law 2: the write of the inner message is as much on the transport as one of its own."""
    ended: list[str] = []

    def handle(body: Any, message: Any) -> None:
        if body == "outer":
            desk.worker.consumers[0].channel.connection.client.drain_events(timeout=30)
            return
        try:
            with shielded():
                gevent.sleep(0.1)
                ended.append("written")
        except BaseException as exc:
            ended.append(f"interrupted by {exc!r}")
            raise

    desk = make_desk(handle, handler_timeout=0.02)
    desk.put("outer", "inner")
    with desk.runtime:
        wait_until(lambda: ended)
    assert ended == ["written"]


def test_a_give_back_that_fails_does_not_end_the_drain(make_desk):
    gate = Gate()
    desk = make_desk(gate, concurrency=3, partition_by=lambda message: "same", drain_timeout=30)
    say(desk.worker, drain_timeout=30)
    desk.put(1, 2)
    desk.run()
    gate.wait(1)
    wait_until(lambda: desk.unsettled == 2)

    def fail(*_args: Any, **_options: Any) -> None:
        raise OSError("the store is full")

    desk.worker.consumers[0].channel.basic_reject = fail
    desk.runtime.stop()
    gevent.sleep(0.05)
    gate.opened.set()
    assert desk.runtime.join(30)
    assert gate.ended == [1]
    assert desk.depth == 1  # the other, which came back with the end of the channel


def test_what_a_polled_transport_brings_after_the_stop_is_given_back(make_desk):
    gate = Gate()
    desk = make_desk(gate)
    other = Queue(f"{desk.queue.name}-other")(desk.channel)
    other.declare()
    Producer(desk.channel).publish("late", routing_key=other.name)
    message = other.get()
    with desk.runtime:
        handling = ensure_engine(desk.worker).handling
        desk.worker.should_stop = True
        handling.handle(desk.worker.consumers[0], message)
    assert gate.came == []
    assert desk.channel._size(other.name) == 1


def test_a_consumer_that_stopped_itself_counts_in_the_runtimes_outcome(make_desk, events):
    def handle(_body: Any, _message: Any) -> None:
        desk.worker.should_stop = True
        while True:
            with suppress(Shutdown):
                gevent.sleep(30)

    desk = make_desk(handle, concurrency=1)
    say(desk.worker, drain_timeout=0.02, cancel_timeout=0.02)
    desk.put(1)
    assert desk.runtime.run() is False
    (finished,) = of_type(events, DrainFinished)
    assert finished.killed_handlers == 1


def test_an_instance_whose_setting_was_mended_can_be_started(make_desk):
    gate = Gate()
    gate.opened.set()
    desk = make_desk(gate, partition_by="customer")
    desk.put(1)
    with pytest.raises(InvalidConsumerError):
        desk.runtime.start()
    say(desk.worker, concurrency=2)
    with desk.runtime:
        wait_until(lambda: gate.ended == [1])
