"""Stopping under load, on a real broker: nothing is lost or handled twice, and it is over in time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, Reject, Runtime, Shutdown
from greenconsume.consuming.engine import ensure_lifecycle
from greenconsume.events import ConsumerDrained, ConsumerState, DrainFinished, HandlerFailed
from greenconsume.handling.options import ConsumerOptions
from tests.integration.consumers import SOON, Recorder, consuming, observed
from tests.messages import channel, declare, publish, queue_depth
from tests.options import say
from tests.rounds import rounds
from tests.waiting import AT_ONCE, wait_until

#: How often a stop at a random moment is tried.
ROUNDS = rounds(15)
#: Handlers at once, and seconds that each takes.
CONCURRENCY, SECONDS = 500, 0.05


class Book:
    """A record of what all consumers together have started, finished and been interrupted in."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.finished: list[Any] = []
        self.interrupted: list[Any] = []
        self.after_stop: list[Any] = []


class Worker(ConsumerMixin):
    """Takes its time for each message, and acks it; for some it takes for ever."""

    options = ConsumerOptions(concurrency=CONCURRENCY)

    def __init__(self, connection: Connection, queue: Queue, book: Book, endless: Any = ()) -> None:
        self.connection = connection
        self.queue = queue
        self.book = book
        self.endless = endless

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([self.queue], callbacks=[self.on_task])]

    def on_task(self, body: Any, message: Any) -> None:
        self.book.started.append(body)
        if ensure_lifecycle(self).stop.is_set():
            self.book.after_stop.append(body)
        try:
            gevent.sleep(1000 if body in self.endless else SECONDS)
        except Shutdown:
            self.book.interrupted.append(body)
            raise
        self.book.finished.append(body)
        message.ack()


@pytest.fixture
def make_runtime(amqp_url: str, queue_name: str) -> Iterator[Callable[..., Any]]:
    """A runtime with one worker, and the greenlet that runs it."""
    made: list[tuple[Runtime, Any]] = []

    def make(book: Book, endless: Any = (), queue: Queue | None = None, **options: Any) -> Any:
        timeouts = {"drain_timeout": 10.0, "cancel_timeout": 10.0, **options}
        runtime = Runtime(amqp_url, options=ConsumerOptions(**timeouts))
        runtime.spawn(lambda conn: Worker(conn, queue or Queue(queue_name), book, endless))
        running = gevent.spawn(runtime.run)
        wait_until(lambda: runtime.children[0].started, within=SOON)
        made.append((runtime, running))
        return runtime, running

    yield make
    for runtime, _ in made:
        runtime.kill()
    gevent.joinall([running for _, running in made], timeout=SOON)


def outcome_of(events: list[DrainFinished]) -> tuple[int, int, int, int]:
    last = events[-1]
    return (
        last.finished_handlers,
        last.given_back,
        last.cancelled_handlers,
        last.killed_handlers,
    )


@pytest.mark.slow
def test_a_stop_at_any_moment_under_load_loses_and_doubles_nothing(
    amqp_url: str, queue_name: str, make_runtime: Callable[..., Any]
):
    """HAZARDS.md row 12: many times, with 500 handlers at work and as many messages at hand."""
    count, book, rng = 0, Book(), random.Random(3)
    given_back = 0
    for _ in range(ROUNDS):
        while count - len(book.finished) < 6000:  # more than it can do in a round
            publish(amqp_url, queue_name, list(range(count, count + 3000)))
            count += 3000
        runtime, running = make_runtime(book)
        gevent.sleep(rng.uniform(0.0, 0.3))
        with observed(DrainFinished) as events:
            runtime.stop()
            assert running.get(timeout=SOON) is True
        assert len(book.started) == len(book.finished)
        given_back += outcome_of(events)[1]
        assert book.after_stop == []
    print(f"{ROUNDS} stops; {len(book.finished)} handled, {given_back} given back")
    assert given_back > 0
    assert len(book.finished) < count
    wait_until(lambda: queue_depth(amqp_url, queue_name) == count - len(book.finished))
    runtime, running = make_runtime(book)
    wait_until(lambda: len(book.finished) >= count, within=60)
    runtime.stop()
    assert running.get(timeout=SOON) is True
    assert Counter(book.finished) == Counter(range(count))
    assert queue_depth(amqp_url, queue_name) == 0


@pytest.mark.parametrize(("drain", "cancel"), [(2.0, 0.5), (0.0, 0.5), (2.0, 0.0), (0.0, 0.0)])
def test_exactly_those_that_outlast_the_deadline_are_delivered_again(
    amqp_url: str, queue_name: str, make_runtime: Callable[..., Any], drain: float, cancel: float
):
    """Soon after both deadlines; the run has abandoned work, and says so."""
    publish(amqp_url, queue_name, 2000)
    book, endless = Book(), range(0, 2000, 20)
    runtime, running = make_runtime(book, endless, drain_timeout=drain, cancel_timeout=cancel)
    wait_until(lambda: len(book.finished) > 300, within=SOON)
    with observed(DrainFinished) as events, observed(ConsumerDrained) as drained:
        began = monotonic()
        runtime.stop()
        assert running.get(timeout=SOON) is False
        took = monotonic() - began
    abandoned = set(book.started) - set(book.finished)
    assert set(endless) & set(book.started) <= abandoned
    if drain:
        assert abandoned == set(endless) & set(book.started)
    assert took < drain + cancel + AT_ONCE
    finished, given_back, cancelled, killed = outcome_of(events)
    assert cancelled + killed == len(abandoned)
    assert set(book.interrupted) == abandoned
    assert killed == 0
    (one,) = drained
    assert (one.finished, one.given_back) == (finished, given_back)
    handled = Counter(book.finished)
    assert max(handled.values()) == 1
    if events[-1].killed:  # a busy broker let its goodbye be cut short
        wait_until(lambda: queue_depth(amqp_url, queue_name) >= 2000 - len(handled))
        return
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 2000 - len(handled))
    back = redelivered(amqp_url, queue_name)
    assert back >= abandoned
    assert not back & set(handled)


def redelivered(url: str, queue: str) -> set[Any]:
    """Look at what is in a queue, and return the bodies that were delivered before."""
    found = set()
    with channel(url) as lent:
        while (message := lent.basic_get(queue)) is not None:
            if message.delivery_info["redelivered"]:
                found.add(int(message.body))
    return found


def test_handlers_that_swallow_their_shutdown_are_killed_within_the_deadlines(
    amqp_url: str, queue_name: str
):
    """And even those that swallow that do not hold up the end."""
    release, stuck = Event(), []

    class Stubborn(Recorder):
        options = ConsumerOptions(concurrency=10)

        def on_task(self, body: Any, message: Any) -> None:
            stuck.append(body)
            while not release.is_set():
                try:
                    release.wait()
                except BaseException:
                    continue

    publish(amqp_url, queue_name, 5)
    runtime = Runtime(amqp_url, options=ConsumerOptions(drain_timeout=0.2, cancel_timeout=0.2))
    runtime.spawn(Stubborn(amqp_url, queue_name))
    running = gevent.spawn(runtime.run)
    wait_until(lambda: len(stuck) == 5, within=SOON)
    began = monotonic()
    runtime.stop()
    assert running.get(timeout=SOON) is False
    assert monotonic() - began < AT_ONCE
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 5)
    release.set()


def test_what_is_given_back_reaches_another_consumer_while_handlers_still_run(
    amqp_url: str, queue_name: str
):
    """It does not wait for the end of the drain."""
    publish(amqp_url, queue_name, 30)
    gate = Event()
    leaving = Recorder(amqp_url, queue_name, lambda body, message: gate.wait(30))
    staying = Recorder(amqp_url, queue_name)
    say(leaving, concurrency=10)
    leaving.consumer_options["prefetch_count"] = 30
    with consuming(leaving) as (greenlet,):
        wait_until(lambda: queue_depth(amqp_url, queue_name) == 0)
        with consuming(staying):
            greenlet.stop()
            staying.wait_for(20)
            assert greenlet.state is ConsumerState.DRAINING
            gate.set()
            assert greenlet.join(SOON)
        assert not set(staying.bodies) & set(leaving.bodies)
        assert sorted(staying.bodies + leaving.bodies) == list(range(30))


def test_what_comes_while_handlers_are_cancelled_is_not_started(
    amqp_url: str, queue_name: str, make_runtime: Callable[..., Any]
):
    """A queue that is published to all the time, and a drain that needs both of its deadlines."""
    declare(amqp_url, queue_name)
    book, more = Book(), Event()

    def feed() -> None:
        first = 0
        while not more.is_set():
            publish(amqp_url, queue_name, list(range(first, first + 50)))
            first += 50

    feeder = gevent.spawn(feed)
    runtime, running = make_runtime(book, range(0, 10**9, 7), drain_timeout=0.3, cancel_timeout=0.3)
    wait_until(lambda: len(book.started) > 100, within=SOON)
    runtime.stop()
    assert running.get(timeout=SOON) is False
    more.set()
    feeder.join()
    assert book.after_stop == []
    assert max(Counter(book.started).values()) == 1


def test_cancelled_messages_meet_no_policy(amqp_url: str, queue_name: str):
    """They go back as they were: no dead-lettering, no delay."""
    publish(amqp_url, queue_name, 10)
    consumer = Recorder(amqp_url, queue_name, lambda body, message: gevent.sleep(1000))
    say(consumer, concurrency=10, drain_timeout=0.1, on_error=Reject())
    with observed(HandlerFailed) as failed, consuming(consumer):
        wait_until(lambda: queue_depth(amqp_url, queue_name) == 0)
    assert failed == []
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 10)


class Watched(Recorder):
    """Shows how many deliveries wait for it in its session."""

    def on_consume_ready(self, connection: Any, channel: Any, *args: Any, **kwargs: Any) -> None:
        self.session = channel.connection


def test_a_drain_costs_a_message_of_a_quorum_queue_one_delivery_at_the_most(
    amqp_url: str, queue_name: str
):
    """RabbitMQ counts every return: what is given back comes to nobody who is about to leave."""
    arguments = {"x_queue_type": "quorum", "x_delivery_limit": 5}
    declare(amqp_url, queue_name, **arguments)
    publish(amqp_url, queue_name, 40)
    gate, queue = Event(), Queue(queue_name, no_declare=True)
    consumer = Watched(amqp_url, queue, lambda body, message: gate.wait(30))
    say(consumer, concurrency=10)
    consumer.consumer_options["prefetch_count"] = 40
    with consuming(consumer) as (greenlet,):
        wait_until(lambda: consumer.session.backlog == 29, within=SOON)  # and one waits for a place
        greenlet.stop()
        wait_until(lambda: consumer.session.backlog == 0)
        gate.set()
        assert greenlet.join(SOON)
    assert len(consumer.bodies) == 10
    counts: Counter[int] = Counter()
    with channel(amqp_url) as lent:

        def take() -> bool:
            message = lent.basic_get(queue_name)
            if message is not None:
                counts[(message.headers or {}).get("x-delivery-count", 0)] += 1
            return counts.total() == 30

        wait_until(take, within=SOON)
    assert counts == {1: 30}
