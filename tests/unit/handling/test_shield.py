"""Calls on channels whose transport does its I/O in the caller: one at a time, whole, and not when closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Queue
from kombu.transport import virtual

from greenconsume.errors import HandlerTimeout, Shutdown
from greenconsume.events import Event as AnyEvent
from greenconsume.events import HandlerFailed, HandlerInterrupted, StaleSettle
from greenconsume.failures import requeues
from greenconsume.failures.policies import Reject, Requeue
from greenconsume.handling.options import ConsumerOptions
from greenconsume.handling.shield import shield_channels
from greenconsume.mixins import ConsumerProducerMixin
from greenconsume.runtime.runtime import Runtime
from tests.unit.fakes import of_type
from tests.waiting import wait_until


class Wire:
    """A stand-in for the wire of a transport: it waits while it is held up, and sees who is in it."""

    def __init__(self) -> None:
        self.open = Event()
        self.open.set()
        self.begun: list[str] = []
        self.done: list[str] = []
        self.inside = self.peak = 0

    def pass_through(self, what: str) -> None:
        self.begun.append(what)
        self.inside += 1
        self.peak = max(self.peak, self.inside)
        try:
            gevent.sleep(0)
            self.open.wait()
            self.done.append(what)
        finally:
            self.inside -= 1


class QoS(virtual.QoS):
    def ack(self, delivery_tag: Any) -> None:
        self.channel.wire.pass_through("ack")
        super().ack(delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        self.channel.wire.pass_through("reject")
        super().reject(delivery_tag, requeue)


class Channel(virtual.Channel):
    """A store in memory, reached over a wire."""

    QoS = QoS
    queues: dict[str, list[Any]] = {}
    wire = Wire()
    do_restore = False

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        return queue in self.queues

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        self.queues.setdefault(queue, [])

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        self.wire.pass_through("put")
        self.queues[queue].append(message)

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        if not self.queues.get(queue):
            raise virtual.base.Empty
        return self.queues[queue].pop(0)

    def _size(self, queue: str) -> int:
        return len(self.queues.get(queue, ()))

    def _purge(self, queue: str) -> int:
        return 0


class Transport(virtual.Transport):
    """Polled, as kombu's own are."""

    Channel = Channel
    polling_interval = 0.001
    state = virtual.BrokerState()


def connection() -> Connection:
    return Connection("polled://", transport=Transport)


class Worker(ConsumerProducerMixin):
    """Calls a function for each message."""

    def __init__(self, handle: Callable[[Any, Any, Any], object], **options: Any) -> None:
        self.connection = connection()
        self.handle = handle
        self.options = ConsumerOptions(**options)

    def consume(self, *args: Any, **kwargs: Any) -> Any:
        return super().consume(*args, **{**kwargs, "safety_interval": 0.05})  # a stop is heard soon

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([Queue("q")], callbacks=[self.on_message])]

    def on_message(self, body: Any, message: Any) -> None:
        self.handle(self, body, message)


@pytest.fixture
def wire() -> Iterator[Wire]:
    Channel.wire = Wire()
    Channel.queues = {}
    yield Channel.wire
    Channel.wire.open.set()


def put(*bodies: Any) -> None:
    with connection() as conn:
        producer = conn.Producer()
        for body in bodies:
            producer.publish(body, routing_key="q", declare=[Queue("q")])


def running(worker: Worker) -> Runtime:
    runtime = Runtime(connection(), options=ConsumerOptions(drain_timeout=0.0, cancel_timeout=1.0))
    runtime.spawn(worker)
    runtime.start()
    return runtime


def writing(what: str, ended: list[BaseException]) -> Callable[[Any, Any, Any], None]:
    """A handler that writes, and then waits; and what ends it."""

    def handle(worker: Worker, body: Any, message: Any) -> None:
        do: dict[str, Callable[[], object]] = {
            "ack": message.ack,
            "reject": message.reject,
            "put": lambda: worker.producer.publish("answer", routing_key="q"),
        }
        try:
            do[what]()
            Event().wait()
        except BaseException as exc:
            ended.append(exc)
            raise

    return handle


@pytest.fixture(params=["ack", "reject", "put"])
def what(request: pytest.FixtureRequest, wire: Wire) -> str:
    """The write that a handler is in the midst of, with the wire held up."""
    put(1)
    wire.begun.clear()
    wire.done.clear()
    wire.open.clear()
    return str(request.param)


@pytest.mark.parametrize("concurrency", [None, 3])
def test_a_timeout_waits_for_the_end_of_a_write(
    wire: Wire, events: list[AnyEvent], what: str, concurrency: int | None
):
    """HAZARDS.md rows 1 and 2; and what was settled is settled."""
    ended: list[BaseException] = []
    attributes = {"handler_timeout": 0.02, "on_error": Reject()}
    runtime = running(Worker(writing(what, ended), concurrency=concurrency, **attributes))
    wait_until(lambda: of_type(events, HandlerInterrupted))
    gevent.sleep(0.01)
    assert (wire.begun, wire.done, ended) == ([what], [], [])
    wire.open.set()
    wait_until(lambda: of_type(events, HandlerFailed))
    assert isinstance(ended[0], HandlerTimeout)
    outcome = "rejected" if what == "put" else "left as the handler settled it"
    assert of_type(events, HandlerFailed)[0].outcome == outcome
    runtime.stop()
    assert runtime.join(30)
    assert wire.done[0] == what


@pytest.mark.parametrize("concurrency", [None, 3])
def test_a_shutdown_waits_for_the_end_of_a_write(
    wire: Wire, events: list[AnyEvent], what: str, concurrency: int | None
):
    """HAZARDS.md rows 1 and 2; and what was settled is not given back."""
    ended: list[BaseException] = []
    runtime = running(Worker(writing(what, ended), concurrency=concurrency))
    wait_until(lambda: wire.begun == [what])
    runtime.stop()
    wait_until(lambda: of_type(events, HandlerInterrupted))
    gevent.sleep(0.01)
    assert (wire.done, ended) == ([], [])
    wire.open.set()
    assert runtime.join(30)
    assert isinstance(ended[0], Shutdown)
    assert of_type(events, HandlerFailed) == []
    assert wire.done[0] == what
    assert len(Channel.queues["q"]) == (2 if what == "put" else 0)  # the answer, and the message


def test_a_kill_at_the_last_rung_heeds_no_write(wire: Wire):
    """A broker that hangs must not hold up the end: the connection is closed after it."""
    put(1)
    wire.open.clear()
    worker = Worker(lambda worker, body, message: message.ack(), concurrency=1)
    runtime = running(worker)
    wait_until(lambda: wire.inside == 1)
    runtime.kill()
    wait_until(lambda: wire.inside == 0)
    assert wire.done[1:] == []
    wire.open.set()
    assert runtime.join(30)


def test_writes_on_one_channel_go_one_at_a_time(wire: Wire):
    """HAZARDS.md row 14: many handlers ack at once, and a client's pool of connections is small."""
    put(*range(30))
    runtime = running(Worker(lambda worker, body, message: message.ack(), concurrency=30))
    wire.peak = 0
    wait_until(lambda: wire.done.count("ack") == 30)
    assert wire.peak == 1
    runtime.stop()
    assert runtime.join(30)


def test_a_settle_after_its_channel_was_closed_is_counted(wire: Wire, events: list[AnyEvent]):
    """HAZARDS.md row 13: the store has restored the message, or will."""
    conn = connection()
    conn.ensure_connection(max_retries=0)
    shield_channels(conn)
    channel = conn.channel()
    queue = Queue("q")(channel)
    queue.declare()
    conn.Producer(channel).publish(1, routing_key="q")
    conn.Producer(channel).publish(2, routing_key="q")
    one, two = queue.get(), queue.get()
    channel.close()
    wire.done.clear()
    one.ack()
    two.requeue()
    assert [(e.delivery_tag, e.count) for e in of_type(events, StaleSettle)] == [
        (one.delivery_tag, 1),
        (two.delivery_tag, 2),
    ]
    assert wire.done == []
    conn.release()


def test_a_requeue_that_the_store_refuses_is_tried_again(
    wire: Wire, events: list[AnyEvent], monkeypatch: pytest.MonkeyPatch
):
    """It does no harm to anybody else meanwhile, and nothing is lost."""
    monkeypatch.setattr(requeues, "_AGAIN", 0.01)
    refused: list[Any] = []

    def reject(self: QoS, delivery_tag: Any, requeue: bool = False) -> None:
        refused.append(delivery_tag)
        if len(refused) < 3:
            raise ConnectionError("try again")
        virtual.QoS.reject(self, delivery_tag, requeue)

    def handle(worker: Worker, body: Any, message: Any) -> None:
        handled.append(body)
        if len(handled) == 1:
            raise ValueError("no such thing")
        message.ack()

    handled: list[Any] = []
    monkeypatch.setattr(QoS, "reject", reject)
    put(1)
    runtime = running(Worker(handle, concurrency=1, on_error=Requeue(0.01)))
    wait_until(lambda: handled == [1, 1])
    assert len(refused) == 3
    runtime.stop()
    assert runtime.join(30)


def test_a_requeue_under_way_is_not_cut_in_two_by_the_end(wire: Wire, events: list[AnyEvent]):
    """HAZARDS.md row 2: what waits is forgotten, what is being written is not."""

    def handle(worker: Worker, body: Any, message: Any) -> None:
        raise ValueError("no such thing")

    put(1)
    worker = Worker(handle, concurrency=1, on_error=Requeue(0.01))
    runtime = running(worker)
    wait_until(lambda: of_type(events, HandlerFailed))
    wire.open.clear()
    wait_until(lambda: "reject" in wire.begun)
    runtime.stop()
    gevent.sleep(0.02)
    wire.open.set()
    assert runtime.join(30)
    wait_until(lambda: "reject" in wire.done)


def test_a_channel_is_shielded_once(wire: Wire):
    """A transport hands out again the one that it connected with."""
    conn = connection()
    conn.ensure_connection(max_retries=0)
    shield_channels(conn)
    channel = conn.transport.create_channel(conn.connection)
    guard = channel.basic_ack
    conn.transport._avail_channels.append(channel)
    assert conn.transport.create_channel(conn.connection).basic_ack is guard
    conn.release()


def test_a_green_transport_needs_no_shield():
    conn = Connection("memory://localhost")
    conn.ensure_connection(max_retries=0)
    create = conn.transport.create_channel
    shield_channels(conn)
    assert conn.transport.create_channel == create
    conn.release()
