"""Many consumers in one process: few sockets, next to no work while idle, and channels within bounds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from time import process_time
from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Queue

from greenconsume import Runtime
from greenconsume.events import ConsumerState, LinkDown, LinkUp
from tests.integration.consumers import (
    SOON,
    Recorder,
    channel_count,
    green_connection,
    observed,
)
from tests.messages import publish
from tests.waiting import wait_until


def one_of(prefix: str, queues: int, **options: Any) -> Callable[[Any], Recorder]:
    """Make consumers that share a few queues."""
    numbers = count()

    def make(connection: Any) -> Recorder:
        return Recorder(connection, Queue(f"{prefix}-{next(numbers) % queues}"), **options)

    return make


@pytest.mark.slow
def test_a_thousand_idle_consumers_use_one_socket_and_next_to_no_cpu(
    rabbitmq, amqp_url, queue_name
):
    """HAZARDS row 28: with kombu, 1,000 sockets and 1,000 wake-ups a second, 3.6 % of a CPU."""
    runtime = Runtime(amqp_url)
    children = runtime.spawn(one_of(queue_name, 100), replicas=1000)
    with observed(LinkUp) as links, runtime:
        assert all(child.state is ConsumerState.CONSUMING for child in children)
        assert (rabbitmq.connection_count(amqp_url), len(links)) == (1, 1)
        shares = []
        while len(shares) < 5 and min(shares, default=1.0) >= 0.005:
            shares.append(cpu_share_while_idle(1.0))
        assert min(shares) < 0.005
        publish(amqp_url, f"{queue_name}-7", 20)
        wait_until(lambda: sum(len(child.consumer.bodies) for child in children) == 20)


def cpu_share_while_idle(seconds: float) -> float:
    before = process_time()
    Event().wait(seconds)
    return (process_time() - before) / seconds


def test_idle_consumers_are_not_woken(amqp_url, queue_name):
    """Law 7: in half a second, the hub has no more turns than the few of other timers."""
    runtime = Runtime(amqp_url)
    runtime.spawn(one_of(queue_name, 10), replicas=100)
    with runtime:
        turns: list[None] = []
        watcher = gevent.get_hub().loop.prepare()
        watcher.start(turns.append, None)
        try:
            Event().wait(0.5)
        finally:
            watcher.stop()
            watcher.close()
    assert len(turns) < 20


@pytest.mark.parametrize("links", [1, 2, 3])
def test_consumers_are_spread_over_as_many_links_as_are_asked_for(
    rabbitmq, amqp_url, queue_name, links
):
    runtime = Runtime(amqp_url, links=links)
    children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=12)
    with runtime:
        assert rabbitmq.connection_count(amqp_url) == links
        channels = rabbitmq.eval(
            "lists:sort([{N} || P <- rabbit_networking:connections(),"
            " {channels, N} <- rabbit_networking:connection_info(P, [channels])])"
        )
        assert channels == f"[{','.join([f'{{{12 // links}}}'] * links)}]"
        publish(amqp_url, queue_name, 240)
        wait_until(lambda: sum(len(child.consumer.bodies) for child in children) == 240)
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


def test_a_link_without_room_is_followed_by_a_further_one(rabbitmq, amqp_url, queue_name):
    broker = green_connection(amqp_url, transport_options={"channel_max": 5})
    runtime = Runtime(broker)
    children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=12)
    with observed(LinkDown) as lost, runtime:
        assert rabbitmq.connection_count(amqp_url) == 3
        assert channel_count(rabbitmq, amqp_url) == 12
        publish(amqp_url, queue_name, 240)
        wait_until(lambda: sum(len(child.consumer.bodies) for child in children) == 240)
        assert all(child.consumer.ready_count == 1 for child in children)
        runtime.spawn(partial(Recorder, queue=queue_name), replicas=4)
        wait_until(lambda: channel_count(rabbitmq, amqp_url) == 16, SOON)
        assert rabbitmq.connection_count(amqp_url) == 4
    assert lost == []


class Wide(Recorder):
    """Needs three channels."""

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        client = channel.connection.client
        self.others = [client.channel(), client.channel()]
        return super().get_consumers(Consumer, channel)


def test_consumers_that_open_more_channels_than_a_link_has_find_their_room(
    rabbitmq, amqp_url, queue_name
):
    """Some find their link full when they open their own, and come back over another."""
    broker = green_connection(amqp_url, transport_options={"channel_max": 7})
    runtime = Runtime(broker)
    with observed(LinkDown) as lost:
        runtime.spawn(partial(Wide, queue=queue_name), replicas=6)
        with runtime:
            assert channel_count(rabbitmq, amqp_url) == 18
    assert lost == []
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


def test_consumers_of_two_brokers_share_no_link(rabbitmq, amqp_url, queue_name):
    other_url = rabbitmq.url(rabbitmq.add_vhost())
    runtime = Runtime(amqp_url)
    runtime.spawn(partial(Recorder, queue=queue_name), replicas=5)
    others = [Recorder(other_url, queue_name) for _ in range(5)]
    for other in others:
        runtime.spawn(other)
    with runtime:
        assert rabbitmq.connection_count(amqp_url) == 1
        assert rabbitmq.connection_count(other_url) == 1
        publish(other_url, queue_name, 20)
        wait_until(lambda: sum(len(other.bodies) for other in others) == 20)
    rabbitmq.delete_vhost(other_url.rpartition("/")[2])


def test_a_link_closes_with_the_last_that_uses_it(rabbitmq, amqp_url, queue_name):
    runtime = Runtime(amqp_url)
    first, second = runtime.spawn(partial(Recorder, queue=queue_name), replicas=2)
    with runtime:
        first.consumer.should_stop = True
        assert first.greenlet.join(SOON)
        assert rabbitmq.connection_count(amqp_url) == 1
        second.consumer.should_stop = True
        assert second.greenlet.join(SOON)
        wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


def test_the_loss_of_one_link_brings_back_its_own_consumers_alone(rabbitmq, amqp_url, queue_name):
    runtime = Runtime(amqp_url, links=2)
    children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=10)
    with observed(LinkDown) as lost, runtime:
        rabbitmq.eval(
            'rabbit_networking:close_connection(hd(rabbit_networking:connections()), "by a test")'
        )
        wait_until(lambda: sum(child.consumer.ready_count for child in children) == 15, SOON)
        assert sorted(child.consumer.ready_count for child in children) == [1] * 5 + [2] * 5
        assert rabbitmq.connection_count(amqp_url) == 2
    assert [event.consumers for event in lost] == [5]


def test_two_runtimes_in_one_process_are_apart(rabbitmq, amqp_url, queue_name):
    runtimes = [Runtime(amqp_url), Runtime(amqp_url)]
    children = [each.spawn(partial(Recorder, queue=queue_name), replicas=3) for each in runtimes]
    with runtimes[0]:
        with runtimes[1]:
            assert rabbitmq.connection_count(amqp_url) == 2
        assert {child.state for child in children[1]} == {ConsumerState.STOPPED}
        assert {child.state for child in children[0]} == {ConsumerState.CONSUMING}
        publish(amqp_url, queue_name, 10)
        wait_until(lambda: sum(len(child.consumer.bodies) for child in children[0]) == 10)


def test_a_runtime_starts_again_after_it_was_stopped(rabbitmq, amqp_url, queue_name):
    runtime = Runtime(amqp_url)
    children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=10)
    for round_ in range(3):
        with runtime:
            publish(amqp_url, queue_name, [round_] * 20)
            wait_until(lambda: sum(len(child.consumer.bodies) for child in children) == 20)
        wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
    assert rabbitmq.queue_counts(amqp_url, queue_name) == (0, 0, 0)


def test_consumers_that_come_and_go_leave_no_channel(rabbitmq, amqp_url, queue_name):
    """A hundred short lives on one link, whose channel ids are given back."""
    runtime = Runtime(green_connection(amqp_url, transport_options={"channel_max": 10}))
    runtime.spawn(partial(Recorder, queue=queue_name))
    with observed(LinkUp) as links, runtime:
        for _ in range(20):
            children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=5)
            for child in children:
                assert child.greenlet.ready.wait(SOON)
                child.consumer.should_stop = True
            gevent.joinall([child.greenlet for child in children], timeout=SOON)
        assert channel_count(rabbitmq, amqp_url) == 1
    assert len(links) == 1
