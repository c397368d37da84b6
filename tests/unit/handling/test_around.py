"""Tests what is entered around callbacks and publications: in which order, where, and what its exit means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gevent
import pytest
from kombu import Connection, Queue

from greenconsume import (
    Batch,
    ConsumerMixin,
    ConsumerOptions,
    HandlerTimeout,
    Publisher,
    Reject,
    Runtime,
    Shutdown,
    current_handler,
)
from greenconsume.around import around_producers
from greenconsume.errors import InvalidOptionsError
from greenconsume.handling.wrapping import wrapped
from tests.waiting import wait_until


class Noted:
    """Makes context managers that note when they are entered and left, and what with."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def __call__(self, name, swallow=False, fail=None):
        @contextmanager
        def around(message) -> Iterator[None]:
            self.said.append(f"enter {name}")
            try:
                yield
            except BaseException as exc:
                self.said.append((name, type(exc)))
                if not swallow:
                    raise
            finally:
                self.said.append(f"leave {name}")
            if fail is not None:
                raise fail

        return around


@pytest.fixture
def noted():
    return Noted()


@pytest.fixture
def run(queue_name):
    """Run a consumer of a queue in memory; its callback is `work`."""
    runtimes = []

    def start(work, runtime_around=(), spawn_around=(), **options):
        class Orders(ConsumerMixin):
            def __init__(self, connection):
                self.connection = connection

            def get_consumers(self, Consumer, channel):
                return [Consumer([Queue(queue_name)], callbacks=[work])]

        Orders.options = ConsumerOptions(**{"on_error": Reject(), **options})
        runtime = Runtime(around=runtime_around)
        runtime.spawn(Orders, options=ConsumerOptions(around=spawn_around))
        runtime.start()
        runtimes.append(runtime)
        return runtime

    yield start
    for runtime in runtimes:
        runtime.stop()
        runtime.join()


@pytest.fixture
def publish(queue_name):
    def send(*bodies):
        with Connection("memory://") as connection:
            queue = connection.SimpleQueue(queue_name)
            for body in bodies:
                queue.put(body)

    return send


def tally(runtime):
    return runtime.children[0].tally


@pytest.mark.parametrize("concurrency", [None, 3])
def test_the_runtimes_are_outermost_and_the_classes_innermost(run, publish, noted, concurrency):
    def work(body, message):
        noted.said.append("work")
        message.ack()

    around = [noted("third"), noted("fourth")]
    runtime = run(work, [noted("first")], [noted("second")], around=around, concurrency=concurrency)
    publish(1)
    wait_until(lambda: tally(runtime).ok == 1)
    names = ["first", "second", "third", "fourth"]
    expected = [f"enter {name}" for name in names] + ["work"]
    assert noted.said == expected + [f"leave {name}" for name in reversed(names)]


def test_they_see_what_a_callback_raises_and_its_message_meets_the_policy(run, publish, noted):
    def work(body, message):
        raise ValueError(body)

    runtime = run(work, around=[noted("outer"), noted("inner")])
    publish("no such order")
    wait_until(lambda: tally(runtime).failed == 1)
    assert [each for each in noted.said if isinstance(each, tuple)] == [
        ("inner", ValueError),
        ("outer", ValueError),
    ]


def test_what_is_swallowed_is_a_success_and_is_acknowledged_if_wanted(run, publish, noted):
    seen = []

    def work(body, message):
        seen.append(message)
        raise ValueError(body)

    runtime = run(work, around=[noted("it", swallow=True)], auto_settle=True)
    publish(1)
    wait_until(lambda: tally(runtime).ok == 1)
    assert seen[0].acknowledged
    assert tally(runtime).failed == 0


def test_what_an_exit_raises_is_a_failure(run, publish, noted):
    runtime = run(lambda body, message: None, around=[noted("it", fail=RuntimeError("rollback"))])
    publish(1)
    wait_until(lambda: tally(runtime).failed == 1)
    assert tally(runtime).errors == {"RuntimeError": 1}


def test_what_cannot_be_entered_is_a_failure_and_the_callback_is_not_called(run, publish):
    called = []

    def broken(message):
        raise ConnectionError("no database")

    runtime = run(lambda body, message: called.append(body), around=[broken])
    publish(1)
    wait_until(lambda: tally(runtime).errors == {"ConnectionError": 1})
    assert called == []


def test_they_see_a_timeout_and_a_shutdown_pass_through(run, publish, noted):
    def work(body, message):
        gevent.sleep(60)

    options = {"drain_timeout": 0.0, "cancel_timeout": 5.0, "concurrency": 2}
    runtime = run(work, around=[noted("it")], handler_timeout=0.05, **options)
    publish(1)
    wait_until(lambda: tally(runtime).timed_out == 1)
    assert ("it", HandlerTimeout) in noted.said
    runtime.stop()
    runtime.join()
    runtime = run(work, around=[noted("it")], **options)
    publish(2)
    wait_until(lambda: noted.said.count("enter it") == 2)
    runtime.stop()
    runtime.join()
    assert ("it", Shutdown) in noted.said


def test_a_batch_is_one_subject(run, publish):
    subjects = []

    @contextmanager
    def around(subject):
        subjects.append(subject)
        yield

    runtime = run(lambda batch: batch.ack(), around=[around], batch_size=3, batch_timeout=60)
    publish(1, 2, 3)
    wait_until(lambda: tally(runtime).ok == 3)  # its messages
    (batch,) = subjects
    assert isinstance(batch, Batch)
    assert [body for body, _ in batch] == [1, 2, 3]


def test_the_current_handler_is_known_within_and_nowhere_else(run, publish, queue_name):
    found = []

    @contextmanager
    def around(message):
        found.append((current_handler(), message))
        yield

    def work(body, message):
        found.append((current_handler(), message))
        message.ack()

    runtime = run(work, around=[around])
    publish(1)
    wait_until(lambda: tally(runtime).ok == 1)
    for handler, message in found:
        assert (handler.consumer, handler.queue) == ("Orders-1", queue_name)
        assert handler.message is message
    assert current_handler() is None


def test_without_any_a_callback_is_called_as_ever():
    def receive(consumer, message):
        raise AssertionError("not called")

    assert wrapped(receive, ()) is receive


@pytest.mark.parametrize("around", [5, "name", [5], contextmanager])
def test_what_can_wrap_nothing_is_refused_where_it_is_said(around):
    with pytest.raises(InvalidOptionsError, match="a list of callables"):
        ConsumerOptions(around=around)


@pytest.mark.parametrize("nowait", [False, True])
def test_around_a_publication_headers_may_be_added_and_not_to_the_callers(nowait):
    received = []

    @contextmanager
    def traced(publication):
        publication.headers["traceparent"] = "00-abc"
        yield

    own = {"tenant": "acme"}
    with Publisher("memory://", routing_key="traced", around=[traced]) as publisher:
        if nowait:
            publisher.publish_nowait({"a": 1}, headers=own)
            publisher.flush()
        else:
            publisher.publish({"a": 1}, headers=own)
        publisher.publish({"a": 2})
    with Connection("memory://") as connection:
        queue = connection.SimpleQueue("traced")
        received += [queue.get(timeout=30).headers for _ in range(2)]
    assert received == [{"tenant": "acme", "traceparent": "00-abc"}, {"traceparent": "00-abc"}]
    assert own == {"tenant": "acme"}


def test_what_two_chose_around_plain_producers_is_theirs_to_end(queue_name):
    entered = []

    @contextmanager
    def noted(publication):
        entered.append(publication.routing_key)
        yield

    def publish():
        entered.clear()
        with Connection("memory://") as connection:
            connection.Producer().publish(1, routing_key=queue_name)
        return entered.count(queue_name)

    end_mine, end_yours = around_producers([noted]), around_producers([noted])
    try:
        assert publish() == 2
        end_mine()
        assert publish() == 1
        end_mine()
        assert publish() == 1
    finally:
        end_mine()
        end_yours()
    assert publish() == 0


def test_what_is_around_plain_producers_may_publish_plainly_itself(queue_name):
    """Nothing is around that message; there was no end to it."""
    entered = []

    @contextmanager
    def audited(publication):
        entered.append(publication.routing_key)
        with Connection("memory://") as connection:
            connection.Producer().publish("before", routing_key=f"{queue_name}.audit")
            yield
            connection.Producer().publish("after", routing_key=f"{queue_name}.audit")

    end = around_producers([audited])
    try:
        for _ in range(2):
            with Connection("memory://") as connection:
                connection.Producer().publish(1, routing_key=queue_name)
    finally:
        end()
    assert entered == [queue_name] * 2
