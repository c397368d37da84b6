"""Promises that hold over every transport which can be run here; docs/transports.md has the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest
from gevent.event import Event
from kombu import Connection, Producer, Queue

from greenconsume import Retry
from tests.integration.consumers import Recorder, consuming, pause_for
from tests.options import say
from tests.waiting import AT_ONCE, NEVER, wait_until

pytestmark = pytest.mark.leaks_ok("kombu's polled transports leave files to the garbage collector")

Connect = Callable[[], Connection]


class Desk:
    """One queue of one broker: publishes to it, and makes consumers of it."""

    def __init__(self, connect: Connect, queue: str, interval: float | None) -> None:
        self.queue = queue
        self._connect = connect
        self.interval = interval

    def put(self, *bodies: Any) -> None:
        with self._connect() as connection, connection.channel() as channel:
            producer = Producer(channel)
            for body in bodies:
                producer.publish(body, routing_key=self.queue, declare=[Queue(self.queue)])

    def consumer(self, handle: Any = None, **options: Any) -> Recorder:
        consumer = Recorder(self._connect(), self.queue, handle, **options)
        if self.interval is not None:
            run = consumer.run
            consumer.run = lambda *args, **kwargs: run(  # type: ignore[method-assign]
                *args, safety_interval=self.interval, **kwargs
            )
        return consumer

    def left(self) -> list[Any]:
        """Take what is in the queue."""
        with self._connect() as connection, connection.channel() as channel:
            bound = Queue(self.queue)(channel)
            found = []
            while (message := bound.get(no_ack=True)) is not None:
                found.append(message.decode())
            return found


@pytest.fixture
def desk(connect: Connect, queue_name: str, is_polled: bool) -> Iterator[Desk]:
    made = Desk(connect, queue_name, 0.1 if is_polled else None)
    made.put()
    return made


def test_what_is_published_is_consumed_in_order_and_gone_once_it_is_acked(desk):
    desk.put(*range(20))
    with consuming(consumer := desk.consumer()):
        consumer.wait_for(20)
    assert sorted(consumer.bodies) == list(range(20))
    assert desk.left() == []


def test_a_rejected_message_does_not_come_again(desk):
    desk.put("x", "y")
    with consuming(consumer := desk.consumer(lambda _body, message: message.reject())):
        consumer.wait_for(2)
    assert desk.left() == []


def test_a_requeued_message_comes_again(desk):
    desk.put("x")
    seen: list[Any] = []

    def handle(body: Any, message: Any) -> None:
        seen.append(body)
        if len(seen) < 3:
            message.requeue()

    with consuming(desk.consumer(handle)):
        wait_until(lambda: len(seen) == 3)
    assert seen == ["x"] * 3
    assert desk.left() == []


def test_no_more_is_handled_at_once_than_the_prefetch_lets(desk):
    desk.put(*range(6))
    gate, running = Event(), Counter[str]()

    def handle(_body: Any, _message: Any) -> None:
        running["now"] += 1
        running["most"] = max(running["most"], running["now"])
        gate.wait()
        running["now"] -= 1

    consumer = desk.consumer(handle, prefetch_count=2)
    say(consumer, concurrency=2)
    with consuming(consumer):
        wait_until(lambda: running["now"] == 2)
        gate.set()
        consumer.wait_for(6)
    assert running["most"] == 2


def test_a_stop_while_idle_is_heard_within_the_interval(desk, is_polled):
    if not is_polled:
        desk.interval = NEVER  # no tick helps it
    desk.put("the only one")
    with consuming(consumer := desk.consumer()) as [greenlet]:
        consumer.wait_for(1)
        began = monotonic()
        greenlet.stop()
        assert greenlet.join(30)
        assert monotonic() - began < AT_ONCE


def test_a_stop_while_busy_lets_the_handler_finish_and_leaves_the_rest(desk):
    desk.put(*range(5))
    begun = Event()

    def handle(_body: Any, _message: Any) -> None:
        begun.set()
        pause_for(0.2)

    consumer = desk.consumer(handle, prefetch_count=3)
    with consuming(consumer) as [greenlet]:
        assert begun.wait(30)
        greenlet.stop()
        assert greenlet.join(30)
    assert sorted([*consumer.bodies, *desk.left()]) == list(range(5))
    assert len(consumer.bodies) < 5


def test_handlers_run_side_by_side(desk):
    desk.put(*range(40))
    consumer = desk.consumer(lambda _body, _message: pause_for(0.5))
    say(consumer, concurrency=40)
    consumer.consumer_options["prefetch_count"] = 40
    with consuming(consumer):
        began = monotonic()
        consumer.wait_for(40)
        assert monotonic() - began < AT_ONCE  # one after the other they take 20 s
    assert desk.left() == []


def test_two_consumers_of_one_queue_handle_each_message_once(desk):
    consumers = [desk.consumer(lambda _b, _m: pause_for(0.01), prefetch_count=1) for _ in "ab"]
    with consuming(*consumers):
        desk.put(*range(30))
        wait_until(lambda: sum(len(each.bodies) for each in consumers) == 30)
    assert sorted(consumers[0].bodies + consumers[1].bodies) == list(range(30))
    assert all(each.bodies for each in consumers)


def test_a_failed_message_is_tried_again_and_set_aside_at_last(desk):
    desk.put("x")
    tried: list[Any] = []

    def handle(body: Any, _message: Any) -> None:
        tried.append(body)
        raise ValueError("always")

    consumer = desk.consumer(handle)
    say(consumer, on_error=Retry(delays=[0.05, 0.05]))
    dead = Desk(desk._connect, f"{desk.queue}.dead", None)
    found: list[Any] = []
    with consuming(consumer):
        wait_until(lambda: found.extend(dead.left()) or found)
    assert tried == ["x"] * 3
    assert found == ["x"]


def test_batches_are_given_together(desk):
    desk.put(*range(10))
    sizes: list[int] = []

    class Batched(Recorder):
        def on_task(self, batch: Any) -> None:  # type: ignore[override]
            sizes.append(len(batch))
            self.bodies += [body for body, _message in batch]
            batch.ack()

    consumer = desk.consumer()
    consumer.__class__ = Batched
    say(consumer, batch_size=4, batch_timeout=0.5)
    del consumer.consumer_options["prefetch_count"]
    with consuming(consumer):
        consumer.wait_for(10)
    assert sorted(consumer.bodies) == list(range(10))
    assert max(sizes) == 4
    assert desk.left() == []
