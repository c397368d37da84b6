"""The warning that something keeps every greenlet waiting."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from typing import Any

import gevent
import pytest
from gevent import monkey
from kombu import Connection, Producer, Queue

from greenconsume.events import HubBlocked
from greenconsume.mixins import ConsumerMixin
from greenconsume.runtime.hub_watch import BlockWatch, watched_hub
from greenconsume.runtime.runtime import Runtime
from tests.options import say
from tests.unit.fakes import of_type
from tests.waiting import wait_until

SECONDS = 0.05
LONG = 20 * SECONDS

native_sleep: Any = monkey.get_original("time", "sleep")


def compute(seconds: float) -> None:
    """Never wait, as far as gevent can see."""
    until = monotonic() + seconds
    while monotonic() < until:
        pass


@pytest.fixture
def watch() -> Iterator[BlockWatch]:
    watch = BlockWatch(SECONDS)
    yield watch
    watch.close()
    watch.close()


@pytest.mark.parametrize("block", [compute, native_sleep])
def test_a_blocked_hub_is_told_of_once_while_it_is_blocked(events, watch, block: Any):
    """Python that computes, and C that waits; with the stack of where it is."""
    gevent.sleep(0.01)
    block(LONG)
    wait_until(lambda: of_type(events, HubBlocked))
    (event,) = of_type(events, HubBlocked)
    assert SECONDS <= event.seconds < LONG
    assert event.consumer == ""
    assert "test_a_blocked_hub_is_told_of_once" in event.stack
    gevent.sleep(SECONDS)
    block(6 * SECONDS)
    wait_until(lambda: len(of_type(events, HubBlocked)) == 2)


def test_a_hub_that_waits_is_not_blocked(events, watch: BlockWatch):
    gevent.sleep(3 * SECONDS)
    for _ in range(100):
        gevent.sleep(0.0005)
    assert of_type(events, HubBlocked) == []


def test_nothing_is_told_after_the_end_of_the_watch(events):
    with watched_hub(SECONDS):
        gevent.sleep(0.01)
    compute(3 * SECONDS)
    assert of_type(events, HubBlocked) == []


def test_without_seconds_nobody_watches(events):
    with watched_hub(None):
        compute(3 * SECONDS)
    assert of_type(events, HubBlocked) == []


class Computing(ConsumerMixin):
    """A consumer whose callback never waits."""

    def __init__(self, queue: str, concurrency: int | None) -> None:
        self.connection = Connection("memory://localhost")
        self.queue = Queue(queue)
        say(self, concurrency=concurrency)

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer([self.queue], callbacks=[self.on_message])]

    def on_message(self, body: Any, message: Any) -> None:
        self.tag = message.delivery_tag
        compute(6 * SECONDS)
        message.ack()


@pytest.mark.parametrize("concurrency", [None, 2])
def test_a_handler_that_blocks_is_named_with_its_message(
    events, queue_name: str, concurrency: int | None, caplog: pytest.LogCaptureFixture
):
    """Wherever it runs; and it is in the log, which a thread can write to as well."""
    runtime = Runtime("memory://localhost", block_warning=SECONDS)
    (child,) = runtime.spawn(Computing(queue_name, concurrency))
    with runtime:
        with Connection("memory://localhost") as connection:
            Producer(connection.channel()).publish(1, routing_key=queue_name)
        wait_until(lambda: of_type(events, HubBlocked))
    event = of_type(events, HubBlocked)[0]
    assert (event.consumer, event.delivery_tag) == (child.name, child.consumer.tag)
    assert "in compute" in event.stack.splitlines()[-2]
    assert f"by consumer {child.name}, message {event.delivery_tag}" in caplog.text


def test_a_watch_of_no_time_is_refused():
    with pytest.raises(
        ValueError, match="block_warning must be more than 0 seconds, or None, not 0"
    ):
        Runtime("memory://localhost", block_warning=0)
