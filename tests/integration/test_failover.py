"""Several brokers in one URL: the next is tried at once, and the first again when a link is lost."""

from __future__ import annotations

from functools import partial
from time import monotonic

import gevent
import pytest
from kombu import Producer
from kombu.exceptions import OperationalError

from greenconsume import Runtime, spawn
from greenconsume.events import ConnectFailed, LinkUp
from greenconsume.links import backoff
from tests.integration.consumers import SOON, Recorder, consuming, green_connection, observed
from tests.messages import declare, publish, queue_depth
from tests.servers import HOST, free_port
from tests.waiting import AT_ONCE, NEVER, wait_until


@pytest.fixture
def down_url() -> str:
    """An address where nobody listens."""
    return f"amqp://guest:guest@{HOST}:{free_port()}//"


@pytest.mark.usefixtures("long_backoff")
def test_a_runtime_consumes_from_the_first_that_is_up(amqp_url, queue_name, down_url):
    began = monotonic()
    runtime = Runtime(f"{down_url};{amqp_url}")
    children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=10)
    with observed(ConnectFailed) as failures, observed(LinkUp) as links, runtime:
        assert monotonic() - began < AT_ONCE
        publish(amqp_url, queue_name, 50)
        wait_until(lambda: sum(len(child.consumer.bodies) for child in children) == 50)
    assert [failure.delay for failure in failures] == [0.0]
    assert len(links) == 1
    assert links[0].uri.rpartition("@")[2] == amqp_url.rpartition("@")[2]


def test_a_spawned_consumer_fails_over(amqp_url, queue_name, down_url):
    consumer = Recorder(f"{down_url};{down_url};{amqp_url}", queue_name)
    with consuming(consumer):
        publish(amqp_url, queue_name, 3)
        assert consumer.wait_for(3) == [0, 1, 2]


def test_a_plain_connection_fails_over(amqp_url, queue_name, down_url):
    declare(amqp_url, queue_name)
    with green_connection(f"{down_url};{amqp_url}") as connection:
        connection.ensure_connection(max_retries=3, interval_start=0.01)
        Producer(connection).publish("over", routing_key=queue_name)
    wait_until(lambda: queue_depth(amqp_url, queue_name) == 1)


def test_a_lost_link_is_dialled_at_the_other_broker_and_back(make_proxy, amqp_url, queue_name):
    first, second = make_proxy(amqp_url), make_proxy(amqp_url)
    runtime = Runtime(f"{first.url};{second.url}")
    children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=10)

    def all_are_back(times: int) -> bool:
        return all(child.consumer.ready_count == times for child in children)

    with runtime:
        assert (first.open_count, second.open_count) == (1, 0)
        first.refuse()
        first.cut()
        wait_until(lambda: all_are_back(2), SOON)
        assert (first.open_count, second.open_count) == (0, 1)
        first.accept()
        second.cut()
        wait_until(lambda: all_are_back(3), SOON)
        assert first.open_count + second.open_count == 1
        publish(amqp_url, queue_name, 50)
        wait_until(lambda: sum(len(child.consumer.bodies) for child in children) == 50)


def test_with_all_down_each_round_is_followed_by_a_wait(queue_name, down_url, monkeypatch):
    monkeypatch.setattr(backoff, "delays", lambda *_: iter([0.6, 0.6, 0.6, NEVER]))
    greenlet = spawn(Recorder(f"{down_url};{down_url}", queue_name))
    with observed(ConnectFailed) as failures:
        wait_until(lambda: len(failures) >= 4, SOON)
        greenlet.stop()
        began = monotonic()
        assert greenlet.join(SOON)
        assert monotonic() - began < AT_ONCE
    delays = [failure.delay for failure in failures[:4]]
    assert [delay > 0.5 for delay in delays] == [False, True, False, True]
    assert [failure.attempt for failure in failures[:4]] == [1, 2, 3, 4]


def test_the_one_that_comes_up_is_found(make_proxy, amqp_url, queue_name, down_url):
    proxy = make_proxy(amqp_url)
    proxy.refuse()
    consumer = Recorder(f"{down_url};{proxy.url}", queue_name)
    greenlet = spawn(consumer)
    with observed(ConnectFailed) as failures:
        wait_until(lambda: len(failures) >= 2, SOON)
    proxy.accept()
    assert greenlet.ready.wait(SOON)
    publish(amqp_url, queue_name, 1)
    consumer.wait_for(1)
    greenlet.stop()
    assert greenlet.join(SOON)


def test_retries_count_attempts_at_each_url(queue_name, down_url):
    consumer = Recorder(f"{down_url};{down_url}", queue_name)
    consumer.connect_max_retries = 1
    with observed(ConnectFailed) as failures:
        greenlet = spawn(consumer)
        gevent.joinall([greenlet], timeout=SOON)
    assert isinstance(greenlet.exception, OperationalError)
    assert len(failures) == 2
