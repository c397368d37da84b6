"""A stop on a real broker: how soon it is done, and what becomes of the messages in hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent import monkey
from gevent.event import Event
from kombu import Queue

from greenconsume import Runtime, spawn
from greenconsume.events import ConsumerState
from tests.integration.consumers import (
    SOON,
    Recorder,
    consuming,
    green_connection,
    pause_for,
)
from tests.messages import declare, publish, queue_depth
from tests.waiting import AT_ONCE, NEVER, wait_until


def in_this_greenlet(action: Callable[[], object]) -> None:
    action()


def in_another_greenlet(action: Callable[[], object]) -> None:
    gevent.spawn(action).join()


def in_a_pool_thread(action: Callable[[], object]) -> None:
    gevent.get_hub().threadpool.spawn(action)


def in_a_native_thread(action: Callable[[], object]) -> None:
    monkey.get_original("_thread", "start_new_thread")(action, ())


WAYS = [in_this_greenlet, in_another_greenlet, in_a_pool_thread, in_a_native_thread]


class Stopwatch:
    """Stops a consumer, somewhere, and takes the time until its greenlet has been joined."""

    def __init__(self, url: str, queue: str) -> None:
        self.consumer = Recorder(url, queue)
        self.greenlet = spawn(self.consumer)
        self.began = 0.0
        assert self.greenlet.ready.wait(SOON)

    def stop(self) -> None:
        self.began = monotonic()
        self.consumer.should_stop = True

    def measure(self, somewhere: Callable[[Callable[[], object]], None]) -> float:
        somewhere(self.stop)
        assert self.greenlet.join(SOON)
        ended = monotonic()
        assert self.greenlet.state is ConsumerState.STOPPED
        return ended - self.began


@pytest.mark.parametrize("somewhere", WAYS, ids=lambda way: way.__name__)
def test_should_stop_wakes_an_idle_consumer(amqp_url, queue_name, somewhere):
    """The target is 20 ms; a consumer that looks once a second would need 500."""
    times = [Stopwatch(amqp_url, queue_name).measure(somewhere) for _ in range(20)]
    assert median(times) < 0.25


def test_a_stop_in_the_middle_of_starting_ends_the_consumer(amqp_url, queue_name):
    """Whatever it waits for then: the connect, the handshake, the channel, a declare."""
    for turns in range(30):
        greenlet = spawn(Recorder(amqp_url, queue_name))
        for _ in range(turns):
            gevent.sleep(0)
        greenlet.stop()
        began = monotonic()
        assert greenlet.join(SOON)
        assert monotonic() - began < AT_ONCE
        assert greenlet.exception is None


def test_a_stop_wakes_a_consumer_that_overrides_on_iteration(amqp_url, queue_name):
    class Ticking(Recorder):
        def on_iteration(self) -> None:
            pass

        def run(self, *args: Any, **kwargs: Any) -> None:
            super().run(*args, safety_interval=NEVER, **kwargs)

    with consuming(Ticking(amqp_url, queue_name)) as [greenlet]:
        greenlet.stop()
        began = monotonic()
        assert greenlet.join(SOON)
        assert monotonic() - began < AT_ONCE


def test_a_consumer_runs_again_after_a_stop(amqp_url, queue_name):
    consumer = Recorder(amqp_url, queue_name)
    for body in ("first", "second"):
        consumer.should_stop = False
        with consuming(consumer):
            publish(amqp_url, queue_name, [body])
            wait_until(lambda body=body: body in consumer.bodies)
    assert consumer.bodies == ["first", "second"]


def test_a_stop_in_a_handler_lets_it_finish_and_handles_no_other(rabbitmq, amqp_url, queue_name):
    """HAZARDS row 12 and 17: what was prefetched is given back, and what was begun is acked."""
    publish(amqp_url, queue_name, 50)
    begun, finish = Event(), Event()

    def handle(_body: Any, _message: Any) -> None:
        begun.set()
        finish.wait(SOON)

    consumer = Recorder(amqp_url, queue_name, handle)
    with consuming(consumer) as [greenlet]:
        assert begun.wait(SOON)
        greenlet.stop()
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == (49, 1, 0))
        assert not greenlet.ready()
        finish.set()
        assert greenlet.join(SOON)
    assert consumer.bodies == [0]
    assert queue_depth(amqp_url, queue_name) == 49


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_orderly_stops_under_load_neither_lose_nor_repeat_a_message(amqp_url, queue_name, kind):
    """HAZARDS row 12 and 17: twenty stops, each with a prefetch full of messages."""
    queue = Queue(queue_name, queue_arguments={"x-queue-type": kind})
    declare(amqp_url, queue_name, x_queue_type=kind)
    total = publish(amqp_url, queue_name, 4000)
    handled: list[int] = []

    def handle(body: int, _message: Any) -> None:
        handled.append(body)
        gevent.sleep(0)

    for goal in range(50, 1050, 50):
        with consuming(Recorder(amqp_url, queue, handle, prefetch_count=100)):
            wait_until(lambda goal=goal: len(handled) >= goal, SOON)
    assert len(handled) < total
    assert len(set(handled)) == len(handled)
    if kind == "classic":  # the other kind has its own idea of where a message goes back to
        assert handled == list(range(len(handled)))
    wait_until(lambda: queue_depth(amqp_url, queue_name) == total - len(handled))


def test_consumers_of_one_link_stop_under_load_without_loss(amqp_url, queue_name):
    total = publish(amqp_url, queue_name, 3000)
    handled: list[int] = []

    def handle(body: int, _message: Any) -> None:
        if body % 7 == 0:
            pause_for(0.001)
        handled.append(body)

    while len(handled) < total:
        runtime = Runtime(amqp_url)
        runtime.spawn(partial(Recorder, queue=queue_name, handle=handle), replicas=10)
        with runtime:
            goal = min(total, len(handled) + 500)
            wait_until(lambda goal=goal: len(handled) >= goal, SOON)
    assert sorted(handled) == list(range(total))


def test_stopping_an_unacknowledged_consumer_closes_its_channel_in_order(amqp_url, queue_name):
    """What still comes for it after the cancel is not rejected, which the broker would take amiss."""
    publish(amqp_url, queue_name, 3000)
    seen: list[int] = []
    consumer = Recorder(amqp_url, queue_name, lambda body, _: seen.append(body), no_ack=True)
    with consuming(consumer) as [greenlet]:
        wait_until(lambda: seen)
    assert greenlet.exception is None
    assert seen == list(range(len(seen)))


def test_ten_greenlets_stop_the_same_consumer_at_once(amqp_url, queue_name):
    with consuming(Recorder(amqp_url, queue_name)) as [greenlet]:
        gevent.joinall([gevent.spawn(greenlet.stop, f"greenlet {n}") for n in range(10)])
        assert greenlet.join(SOON)
        assert greenlet.state is ConsumerState.STOPPED


@pytest.mark.parametrize("options", [{"no_ack": True}, {"prefetch_count": None}])
def test_a_consumer_that_was_paused_stops_without_loss(amqp_url, queue_name, options):
    """The broker knows nothing of it then, and its backlog goes back."""
    total = publish(amqp_url, queue_name, 5000)
    go_on = Event()
    consumer = Recorder(amqp_url, queue_name, lambda *_: go_on.wait(SOON), **options)
    with consuming(consumer) as [greenlet]:
        wait_until(lambda: queue_depth(amqp_url, queue_name) < total - 1000)
        consumer.should_stop = True
        go_on.set()
        assert greenlet.join(SOON)
    assert greenlet.exception is None
    assert consumer.bodies == [0]
    if not options.get("no_ack"):
        # The broker puts back what a closed channel held some time after it said so.
        wait_until(lambda: queue_depth(amqp_url, queue_name) == total - 1)


def test_a_handler_that_stops_its_consumer_still_acks(amqp_url, queue_name):
    publish(amqp_url, queue_name, 20)

    def stop(_body: Any, _message: Any) -> None:
        consumer.should_stop = True

    consumer = Recorder(amqp_url, queue_name, stop)
    greenlet = spawn(consumer)
    assert greenlet.join(SOON)
    assert consumer.bodies == [0]
    assert queue_depth(amqp_url, queue_name) == 19


def test_a_consumer_without_queues_waits_and_stops(rabbitmq, amqp_url, queue_name):
    class Empty(Recorder):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return []

        def run(self, *args: Any, **kwargs: Any) -> None:
            super().run(*args, safety_interval=NEVER, **kwargs)

    with consuming(Empty(amqp_url, queue_name)) as [greenlet]:
        assert rabbitmq.connection_count(amqp_url) == 1
        began = monotonic()
        greenlet.stop()
        assert greenlet.join(SOON)
        assert monotonic() - began < AT_ONCE


@pytest.mark.parametrize("step", ["get_consumers", "on_connection_revived", "on_consume_ready"])
def test_a_consumer_stops_itself_while_it_is_set_up(rabbitmq, amqp_url, queue_name, step):
    class Hasty(Recorder):
        pass

    def stop_here(self: Recorder, *args: Any, **kwargs: Any) -> Any:
        self.should_stop = True
        return getattr(Recorder, step)(self, *args, **kwargs)

    setattr(Hasty, step, stop_here)
    publish(amqp_url, queue_name, 3)
    consumer = Hasty(amqp_url, queue_name)
    greenlet = spawn(consumer)
    assert greenlet.join(SOON)
    assert (greenlet.exception, consumer.bodies) == (None, [])
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
    assert queue_depth(amqp_url, queue_name) == 3


@pytest.mark.parametrize("step", ["get_consumers", "on_connection_revived", "on_consume_ready"])
def test_a_consumer_that_fails_while_it_is_set_up_leaves_no_link(
    rabbitmq, amqp_url, queue_name, step
):
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise LookupError(step)

    consumer = Recorder(amqp_url, queue_name)
    setattr(consumer, step, fail)
    greenlet = spawn(consumer)
    assert greenlet.join(SOON)
    assert isinstance(greenlet.exception, LookupError)
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


@pytest.mark.slow
def test_a_thousand_consumers_over_shared_links_stop_together(amqp_url, queue_name):
    """The target is a second, see `stop s` of the benchmarks; by the deadlines it takes a minute."""
    numbers = iter(range(1000))

    def make(connection: Any) -> Recorder:
        queue = Queue(f"{queue_name}-{next(numbers) % 100}", durable=False)
        return Recorder(connection, queue)

    options = {"close_timeout": NEVER}
    runtime = Runtime(green_connection(amqp_url, transport_options=options), links=2)
    children = runtime.spawn(make, replicas=1000)
    with runtime:
        assert all(child.state is ConsumerState.CONSUMING for child in children)
        began = monotonic()
        runtime.stop()
        assert runtime.join(30)
        assert monotonic() - began < AT_ONCE
    assert all(child.state is ConsumerState.STOPPED for child in children)
