"""Consumers that fail while they are set up, in a runtime on a real broker: one fails, the others live on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import gevent
import pytest

from greenconsume import RestartPolicy, Runtime
from greenconsume.errors import RestartLimitError
from greenconsume.events import (
    ConsumerChanged,
    ConsumerGivenUp,
    ConsumerRestarting,
    LinkDown,
    LinkUp,
)
from tests.fault.consumers import Collector, connection_to, everything, observing
from tests.messages import delete_queue, publish
from tests.waiting import wait_until

QUICK = RestartPolicy(max_restarts=3, period=60.0, backoff=0.01, jitter=0.0)


def failing_in(step: str, times: int) -> type[Collector]:
    """A consumer class whose instances, all together, raise `times` times in a method."""
    left = iter(range(times))

    def fail(*_args: Any, **_kwargs: Any) -> None:
        if next(left, None) is not None:
            raise LookupError(f"no luck in {step}")

    class Failing(Collector):
        pass

    if step == "get_consumers":
        Failing.get_consumers = lambda self, *args: fail() or Collector.get_consumers(self, *args)
    else:
        setattr(Failing, step, fail)
    return Failing


STEPS = ("get_consumers", "on_connection_revived", "on_consume_ready", "on_iteration")


@pytest.mark.parametrize("step", STEPS)
def test_a_consumer_that_fails_comes_back_over_the_same_link(rabbitmq, amqp_url, queue_name, step):
    """Its failure costs its neighbours nothing: neither their channel nor the link."""
    failing = failing_in(step, times=2)
    with observing(ConsumerRestarting, LinkUp, LinkDown) as events:
        runtime = Runtime(connection_to(amqp_url), restart=QUICK)
        steady = Collector(connection_to(amqp_url), f"{queue_name}-steady")
        runtime.spawn(steady)
        (child,) = runtime.spawn(lambda c: failing(c, queue_name))
        with runtime:
            wait_until(lambda: child.restart_count == 2 and child.started)
            publish(amqp_url, queue_name, 20)
            publish(amqp_url, f"{queue_name}-steady", 20)
            wait_until(lambda: len(child.consumer.handled) == 20)
            wait_until(everything(steady.handled, 20))
            wait_until(lambda: rabbitmq.connection_count(amqp_url) == 1)
    assert [event.attempt for event in events if isinstance(event, ConsumerRestarting)] == [1, 2]
    assert [type(event) for event in events if not isinstance(event, ConsumerRestarting)] == [
        LinkUp
    ]


@pytest.mark.parametrize("step", STEPS)
def test_a_consumer_over_its_intensity_is_failed_and_its_siblings_live_on(
    amqp_url, queue_name, step
):
    failing = failing_in(step, times=10**6)
    runtime = Runtime(connection_to(amqp_url), restart=QUICK)
    siblings = runtime.spawn(lambda c: Collector(c, queue_name), replicas=3)
    with observing(ConsumerGivenUp) as given_up:
        runtime.start()
        (child,) = runtime.spawn(lambda c: failing(c, queue_name))
        wait_until(lambda: given_up)
        assert str(child.state) == "failed"
        assert isinstance(child.error, LookupError)
        publish(amqp_url, queue_name, 50)
        wait_until(lambda: sum(len(s.consumer.handled) for s in siblings) == 50)
        runtime.stop()
        with pytest.raises(
            RestartLimitError, match=r"given up after 3 restarts in 60 s: <lambda>-4"
        ):
            runtime.join(30)
    assert [event.consumer for event in given_up] == [child.name]


def test_run_tells_of_a_consumer_that_was_given_up(amqp_url, queue_name):
    failing = failing_in("on_consume_ready", times=10**6)
    runtime = Runtime(connection_to(amqp_url), restart=QUICK)
    runtime.spawn(lambda c: Collector(c, queue_name))
    with observing(ConsumerGivenUp) as given_up:
        running = gevent.spawn(runtime.run)
        wait_until(lambda: all(child.started for child in runtime.children))
        runtime.spawn(lambda c: failing(c, queue_name))
        wait_until(lambda: given_up)
        assert not running.ready()
        runtime.stop()
        with pytest.raises(RestartLimitError):
            running.get(timeout=30)


def test_a_deleted_queue_brings_its_consumer_back_and_no_other(amqp_url, queue_name):
    """The server's basic.cancel: the consumer declares its queue anew instead of sitting silent."""
    with observing(LinkUp, LinkDown) as links, Runtime(connection_to(amqp_url)) as runtime:
        runtime.spawn(lambda c: Collector(c, queue_name))
        (other,) = runtime.spawn(lambda c: Collector(c, f"{queue_name}-other"))
        ready = other.greenlet.ready
        wait_until(lambda: all(child.started for child in runtime.children))
        with observing(ConsumerChanged) as changes:
            delete_queue(amqp_url, queue_name)
            wait_until(lambda: [c for c in changes if str(c.new) == "consuming"])
        assert ready.is_set()
        publish(amqp_url, queue_name, 10)
        wait_until(lambda: len(runtime.children[0].consumer.handled) == 10)
        assert runtime.children[0].restart_count == 0
    assert [type(each) for each in links] == [LinkUp]


def test_a_hundred_consumers_that_fail_at_once_come_back_without_harm(amqp_url, queue_name):
    """HAZARDS row 28: restarts share the link, and do not come in step."""
    handled: Counter[Any] = Counter()
    failing = failing_in("on_consume_ready", times=100)
    restart = RestartPolicy(max_restarts=20, backoff=0.1)
    with observing(LinkUp, LinkDown, ConsumerRestarting) as events:
        runtime = Runtime(connection_to(amqp_url), restart=restart)
        runtime.spawn(lambda c: Collector(c, queue_name, handled))  # a link ends with its last user
        runtime.spawn(lambda c: failing(c, queue_name, handled), replicas=100)
        with runtime:
            publish(amqp_url, queue_name, 1000)
            wait_until(everything(handled, 1000))
    assert [type(each) for each in events if not isinstance(each, ConsumerRestarting)] == [LinkUp]
    delays = [each.delay for each in events if isinstance(each, ConsumerRestarting)]
    assert len(delays) == 100
    assert len(set(delays)) > 90
