"""The kill switch on RabbitMQ: what stays in the queue, what is tried, and how it comes back."""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytest
from gevent.event import Event

from greenconsume import KillSwitch, Reject, Requeue, Retry, Runtime
from greenconsume.events import ConsumerState, KillSwitchReset, KillSwitchTripped
from tests.integration.consumers import SOON, Recorder, consuming, observed, pause_for
from tests.messages import publish, queue_depth
from tests.options import say
from tests.waiting import AT_ONCE, wait_until

WINDOW = 10


class Dependent(Recorder):
    """Handles messages while what it depends on is `up`."""

    def __init__(self, broker: Any, queue: str, policy: Any, pause: float, **options: Any) -> None:
        super().__init__(broker, queue, self.depend, **options)
        say(self, on_error=policy)
        say(self, kill_switch=KillSwitch(0.5, WINDOW, pause))
        self.restart_limit.fill_rate = self.restart_limit.capacity = 1000
        self.up = False
        self.tried = 0

    def depend(self, _body: Any, _message: Any) -> None:
        self.tried += 1
        if not self.up:
            raise ConnectionError("the database is down")


@pytest.mark.parametrize("concurrency", [None, 1, 8])
@pytest.mark.parametrize("policy", [Requeue(0), Requeue(1.0), Retry(delays=[0.05]), Reject()])
def test_the_backlog_waits_in_its_queue_and_is_then_handled(
    rabbitmq, amqp_url, queue_name, policy, concurrency
):
    consumer = Dependent(amqp_url, queue_name, policy, 0.2, prefetch_count=50)
    say(consumer, concurrency=concurrency)
    slack = 2 * (concurrency or 1)
    with observed(KillSwitchTripped) as tripped, observed(KillSwitchReset) as reset:
        with consuming(consumer) as (greenlet,):
            publish(amqp_url, queue_name, 200)
            wait_until(lambda: tripped, SOON)
            assert consumer.tried <= WINDOW + slack
            wait_until(lambda: len(tripped) == 4, SOON)  # three times it tried one, in vain
            assert consumer.tried <= WINDOW + slack + 3
            assert queue_depth(amqp_url, queue_name) >= 200 - consumer.tried
            assert not reset
            consumer.up = True
            settled = consumer.tried if isinstance(policy, Reject) else 0
            consumer.wait_for(200 - settled)
            wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name)[:2] == (0, 0))
            assert greenlet.state is ConsumerState.CONSUMING
    assert len(reset) == 1
    assert tripped[0].failed_count > WINDOW / 2
    assert (tripped[1].failed_count, tripped[1].count) == (1, 1)


def test_prefetched_messages_go_back_although_a_handler_still_runs(rabbitmq, amqp_url, queue_name):
    consumer = Dependent(amqp_url, queue_name, Reject(), 60.0, prefetch_count=100)
    say(consumer, concurrency=2)
    go, slow = Event(), Event()

    def depend(body: Any, _message: Any) -> None:
        if body == 0:
            slow.set()
            go.wait()
        else:
            raise ConnectionError

    consumer.handle = depend
    with observed(KillSwitchTripped) as tripped, consuming(consumer):
        publish(amqp_url, queue_name, 100)
        wait_until(lambda: tripped, SOON)
        assert slow.is_set()
        wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name).unacked == 1)
        go.set()
        assert consumer.wait_for(1) == [0]  # it was waited for, and acked
        wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
        # What was rejected went to no dead-letter exchange; all the rest is there.
        assert queue_depth(amqp_url, queue_name) == 100 - len(consumer.redelivered)


def test_while_it_waits_it_has_no_connection_to_the_broker(rabbitmq, amqp_url, queue_name):
    consumer = Dependent(amqp_url, queue_name, Reject(), 60.0)
    with observed(KillSwitchTripped) as tripped, consuming(consumer) as (greenlet,):
        publish(amqp_url, queue_name, 20)
        wait_until(lambda: tripped, SOON)
        wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
        assert not greenlet.ready.is_set()


def test_a_stop_does_not_wait_for_the_end_of_a_pause(amqp_url, queue_name):
    consumer = Dependent(amqp_url, queue_name, Reject(), 60.0)
    with observed(KillSwitchTripped) as tripped, consuming(consumer) as (greenlet,):
        publish(amqp_url, queue_name, 20)
        wait_until(lambda: tripped, SOON)
        wait_until(lambda: greenlet.state is ConsumerState.CONNECTING)
        began = monotonic()
        greenlet.stop()
        assert greenlet.join(SOON)
        assert monotonic() - began < AT_ONCE


def test_the_pause_is_kept(amqp_url, queue_name):
    consumer = Dependent(amqp_url, queue_name, Requeue(0), 0.5)
    with observed(KillSwitchTripped) as tripped, consuming(consumer):
        publish(amqp_url, queue_name, 20)
        wait_until(lambda: tripped, SOON)
        began = monotonic()
        wait_until(lambda: len(tripped) == 3, SOON)
        assert 1.0 <= monotonic() - began < AT_ONCE  # twice, each up to a tenth longer


def test_a_lost_link_does_not_reset_it(proxy, amqp_url, queue_name):
    consumer = Dependent(proxy.url, queue_name, Requeue(0), 0.5)
    with observed(KillSwitchTripped) as tripped, observed(KillSwitchReset) as reset:
        with consuming(consumer):
            publish(amqp_url, queue_name, 20)
            wait_until(lambda: tripped, SOON)
            tried = consumer.tried
            proxy.refuse()
            pause_for(1.0)  # it comes back to a broker that is away
            proxy.accept()
            wait_until(lambda: len(tripped) == 2, 20)
            assert consumer.tried == tried + 1
            assert not reset


def test_it_goes_by_consumer(amqp_url, queue_name):
    runtime = Runtime(amqp_url)
    bad, good = f"{queue_name}-bad", f"{queue_name}-good"
    down = Dependent(runtime.connection, bad, Reject(), 60.0)
    up = Dependent(runtime.connection, good, Reject(), 60.0)
    up.up = True
    runtime.spawn(down)
    runtime.spawn(up)
    with observed(KillSwitchTripped) as tripped, runtime:
        publish(amqp_url, bad, 50)
        publish(amqp_url, good, 50)
        wait_until(lambda: tripped, SOON)
        up.wait_for(50)
        wait_until(lambda: queue_depth(amqp_url, bad) == 50 - down.tried)
    assert [event.consumer for event in tripped] == [runtime.children[0].name]
    assert runtime.children[0].error is None
