"""Transports that are not AMQP: the one in memory, which wakes, and those that are polled as kombu does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from statistics import median
from time import monotonic
from typing import Any

import gevent
import kombu
import pytest
from kombu import Connection, Producer, Queue
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import filesystem as kombu_filesystem

from greenconsume import Runtime, spawn
from greenconsume.events import PollingTransport
from tests.integration.consumers import (
    SOON,
    Answerer,
    Plain,
    Recorder,
    consuming,
    green_connection,
    observed,
    pause_for,
)
from tests.waiting import AT_ONCE, NEVER, wait_until

MEMORY = "memory://"


def put(connection: Connection, queue: str, *bodies: Any, **options: Any) -> None:
    """Publish over whatever transport a connection has."""
    with connection.clone() as clone, clone.channel() as channel:
        producer = Producer(channel)
        for body in bodies:
            producer.publish(body, routing_key=queue, declare=[Queue(queue)], **options)


# -- in memory ------------------------------------------------------------------------------------


def test_a_consumer_in_memory_wakes_at_once(queue_name):
    """HAZARDS row 27: kombu looks once a second. The target is 10 ms."""
    times: list[float] = []
    consumer = Recorder(MEMORY, queue_name, lambda sent, _: times.append(monotonic() - sent))
    with consuming(consumer), green_connection(MEMORY) as connection:
        producer = Producer(connection.channel())
        for count in range(1, 21):
            pause_for(random.uniform(0, 0.01))
            producer.publish(monotonic(), routing_key=queue_name)
            consumer.wait_for(count)
    assert median(times) < 0.25


def test_a_consumer_in_memory_stops_at_once(queue_name):
    """The target is 20 ms; one that looks once a second would need 500."""
    times: list[float] = []
    for _ in range(20):
        with consuming(Recorder(MEMORY, queue_name)) as [greenlet]:
            began = monotonic()
            greenlet.stop()
            assert greenlet.join(SOON)
            times.append(monotonic() - began)
    assert median(times) < 0.25


def test_a_question_in_memory_is_answered(queue_name):
    answers = f"{queue_name}-answers"
    seen: dict[str, Any] = {}

    def note(body: Any, message: Any) -> None:
        seen[message.properties["correlation_id"]] = body["answer"]

    with consuming(Answerer(MEMORY, queue_name), Recorder(MEMORY, answers, note)):
        for n in range(20):
            put(green_connection(MEMORY), queue_name, n, reply_to=answers, correlation_id=str(n))
        wait_until(lambda: len(seen) == 20)
    assert seen == {str(n): n for n in range(20)}


def test_a_kombu_mixin_runs_in_memory(queue_name):
    consumer = Plain(green_connection(MEMORY), queue_name)
    with consuming(consumer):
        put(green_connection(MEMORY), queue_name, ["x"])
        wait_until(lambda: consumer.bodies == [["x"]])


def test_orderly_stops_in_memory_neither_lose_nor_repeat_a_message(queue_name):
    put(green_connection(MEMORY), queue_name, *range(2000))
    handled: list[int] = []

    def handle(body: int, _message: Any) -> None:
        handled.append(body)
        gevent.sleep(0)

    while len(handled) < 2000:
        goal = min(2000, len(handled) + 90)
        with consuming(Recorder(MEMORY, queue_name, handle, prefetch_count=50)):
            wait_until(lambda goal=goal: len(handled) >= goal)
    assert handled == list(range(2000))


# -- polled ---------------------------------------------------------------------------------------


class Quick(Recorder):
    """Looks whether it is to stop ten times a second."""

    def run(self, *args: Any, **kwargs: Any) -> None:
        super().run(*args, safety_interval=0.1, **kwargs)


@pytest.fixture
def folder_connection(tmp_path) -> Connection:
    """kombu's `filesystem://`, in a folder of this test's."""
    folder = tmp_path / "queues"
    folder.mkdir()
    options = {
        "data_folder_in": str(folder),
        "data_folder_out": str(folder),
        "control_folder": str(tmp_path / "control"),
        "polling_interval": 0.05,
    }
    return green_connection("filesystem://", transport_options=options)


@pytest.fixture
def redis_connection(redis_url) -> Connection:
    return green_connection(redis_url, transport_options={"polling_interval": 0.05})


@pytest.fixture
def sql_connection(tmp_path) -> Connection:
    pytest.importorskip("sqlalchemy")
    url = f"sqla+sqlite:///{tmp_path}/queues.db"
    return green_connection(url)  # SQLAlchemy refuses an option that is not its own


@pytest.fixture(params=["folder", "redis", "sql"])
def polled(request: pytest.FixtureRequest) -> Connection:
    connection: Connection = request.getfixturevalue(f"{request.param}_connection")
    return connection


leaks_ok = pytest.mark.leaks_ok("kombu's transport leaves sockets to the garbage collector")


@leaks_ok
def test_a_polled_transport_is_consumed_and_stops_within_its_interval(polled, queue_name):
    consumer = Quick(polled, queue_name)
    with consuming(consumer) as [greenlet]:
        put(polled, queue_name, *range(50))
        assert sorted(consumer.wait_for(50)) == list(range(50))
        began = monotonic()
        greenlet.stop()
        assert greenlet.join(SOON)
        assert monotonic() - began < AT_ONCE


@leaks_ok
def test_many_consumers_of_a_polled_transport_share_its_queue(polled, queue_name):
    runtime = Runtime(polled)
    children = runtime.spawn(partial(Quick, queue=queue_name), replicas=5)
    with runtime:
        put(polled, queue_name, *range(40))
        wait_until(lambda: sum(len(child.consumer.bodies) for child in children) == 40, SOON)
    handled = chain.from_iterable(child.consumer.bodies for child in children)
    assert sorted(handled) == list(range(40))


@leaks_ok
def test_what_a_polled_consumer_had_in_hand_goes_back(polled, queue_name):
    put(polled, queue_name, *range(20))
    first = Quick(polled, queue_name, lambda *_: pause_for(0.01), prefetch_count=5)
    with consuming(first):
        first.wait_for(3)
    second = Quick(polled, queue_name)
    with consuming(second):
        second.wait_for(20 - len(first.bodies))
    assert sorted(first.bodies + second.bodies) == list(range(20))


@leaks_ok
def test_a_timeout_on_a_polled_transport_is_idle_time(polled, queue_name):
    consumer = Recorder(polled, queue_name)
    began = monotonic()
    with pytest.raises(TimeoutError):
        list(consumer.consume(timeout=0.3, safety_interval=NEVER))
    assert 0.3 <= monotonic() - began < AT_ONCE


@pytest.fixture
def looks(monkeypatch) -> list[float]:
    """Return when kombu's file transport looked into a queue."""
    times: list[float] = []
    get: Callable[..., Any] = kombu_filesystem.Channel._get

    def note(self: Any, queue: str) -> Any:
        times.append(monotonic())
        return get(self, queue)

    monkeypatch.setattr(kombu_filesystem.Channel, "_get", note)
    return times


@pytest.mark.parametrize("safety_interval", [0.05, 1.0])
def test_polling_is_no_faster_than_kombus(folder_connection, queue_name, looks, safety_interval):
    """Held against kombu's own mixin, with the same interval, in turns: a busy machine makes looks fewer."""
    folder_connection.transport_options["polling_interval"] = 0.1

    def looks_of(consumer: Any) -> int:
        greenlet = gevent.spawn(consumer.run, safety_interval=safety_interval)
        wait_until(lambda: looks)
        del looks[:]
        pause_for(0.65)
        seen = len(looks)
        consumer.should_stop = True
        greenlet.join(SOON)
        del looks[:]
        return seen

    pairs = [
        (
            looks_of(Recorder(folder_connection, queue_name)),
            looks_of(Plain(folder_connection, queue_name)),
        )
        for _ in range(3)
    ]
    assert all(ours for ours, _kombus in pairs)
    assert min(ours - kombus for ours, kombus in pairs) <= 1


@pytest.fixture
def renamed() -> Iterator[str]:
    """A name for kombu's file transport under which nobody has consumed yet."""
    name = f"files-{random.getrandbits(32):x}"
    TRANSPORT_ALIASES[name] = "kombu.transport.filesystem:Transport"
    yield name
    del TRANSPORT_ALIASES[name]


def test_polling_is_told_once_for_all(folder_connection, queue_name, renamed, caplog):
    options = folder_connection.transport_options
    connection = kombu.Connection(transport=renamed, transport_options=options)
    caplog.set_level("INFO")
    with observed(PollingTransport) as told:
        runtime = Runtime(connection)
        runtime.spawn(partial(Quick, queue=queue_name), replicas=5)
        with runtime:
            pass
        greenlet = spawn(Quick(connection, queue_name))
        assert greenlet.ready.wait(SOON)
        greenlet.stop()
        assert greenlet.join(SOON)
    assert [(event.transport, event.interval) for event in told] == [(renamed, 0.05)]
    assert caplog.text.count(renamed) == 1
