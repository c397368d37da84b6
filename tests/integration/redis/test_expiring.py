"""Queues that expire: what keeps them, and what becomes of the bindings of those that are gone."""

from __future__ import annotations

from typing import Any

import pytest
from gevent.event import Event
from kombu import Exchange, Producer, Queue

from greenconsume.redis import keeper
from tests.integration.consumers import Recorder, consuming, green_connection
from tests.integration.redis.payloads import put
from tests.waiting import wait_until

pytestmark = pytest.mark.every_redis

DEADLINES = "_kombu.binding_deadlines"


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Look often at what expires."""
    for name in ("BEAT_INTERVAL", "BINDING_INTERVAL", "SWEEP_INTERVAL"):
        monkeypatch.setattr(keeper, name, 0.05)


def expiring(name: str, **options: Any) -> Queue:
    return Queue(name, Exchange(f"{name}.exchange", "topic"), "a.#", expires=60, **options)


def table_of(name: str) -> str:
    return f"_kombu.binding.{name}.exchange"


def make_overdue(server: Any, name: str) -> None:
    """Have it be an hour later, as far as the bindings are concerned."""
    server.zadd(DEADLINES, {f"{name}.exchange": 0})


def test_what_waits_in_a_queue_does_not_expire_while_its_consumer_has_no_room(
    redis_url, server, queue_name
):
    """As RabbitMQ has it: a queue that somebody consumes is in use."""
    put(server, queue_name, *range(3))
    gate = Event()
    queue = Queue(queue_name, expires=3)
    handle = Recorder(redis_url, queue, lambda _body, _message: gate.wait(), prefetch_count=1)
    with consuming(handle):
        wait_until(lambda: server.llen(queue_name) == 2)
        for _ in range(2):
            server.pexpire(queue_name, 10**7)  # as only the consumer shortens it
            wait_until(lambda: 0 < server.pttl(queue_name) <= 3000)
        gate.set()
        assert handle.wait_for(3) == [0, 1, 2]


def test_the_bindings_of_a_queue_that_is_consumed_are_kept_as_they_were_bound(
    redis_url, server, queue_name
):
    with consuming(Recorder(redis_url, expiring(queue_name))):
        bound = server.smembers(table_of(queue_name))
        assert len(bound) == 1
        assert server.ttl(table_of(queue_name)) == -1  # an eviction policy may take what has one
        server.delete(table_of(queue_name))
        server.zadd(DEADLINES, {f"{queue_name}.exchange": 1})
        wait_until(lambda: server.smembers(table_of(queue_name)) == bound)
        wait_until(lambda: server.zscore(DEADLINES, f"{queue_name}.exchange") > 1)


def test_the_bindings_of_a_queue_that_nobody_consumes_are_swept_away(redis_url, server, queue_name):
    """Else what is published to its exchange would pile up where nobody looks."""
    with consuming(Recorder(redis_url, expiring(queue_name))):
        pass
    assert server.exists(table_of(queue_name))
    make_overdue(server, queue_name)
    with consuming(Recorder(redis_url, f"{queue_name}.other")):
        wait_until(lambda: not server.exists(table_of(queue_name), DEADLINES))


def test_a_lasting_queue_keeps_the_bindings_of_its_exchange(redis_url, server, queue_name):
    lasting = Queue(f"{queue_name}.lasting", Exchange(f"{queue_name}.exchange", "topic"), "b")
    with green_connection(redis_url) as connection:
        expiring(queue_name)(connection.default_channel).declare()
        lasting(connection.default_channel).declare()
    make_overdue(server, queue_name)
    with consuming(Recorder(redis_url, f"{queue_name}.other")):
        wait_until(lambda: not server.exists(DEADLINES))  # so that nobody has to look again
    assert server.scard(table_of(queue_name)) == 2


def test_what_is_only_declared_here_is_not_kept_for_ever(redis_url, server, queue_name):
    """A publisher declares the queues of consumers, which may all have gone."""
    with green_connection(redis_url) as connection:
        Producer(connection).publish(1, declare=[expiring(queue_name)])
        make_overdue(server, queue_name)
        with consuming(Recorder(redis_url, f"{queue_name}.other")):
            wait_until(lambda: not server.exists(table_of(queue_name)))


def test_the_binding_of_a_deleted_queue_does_not_come_back(redis_url, server, queue_name):
    queue = expiring(queue_name)
    with consuming(consumer := Recorder(redis_url, queue)):
        with green_connection(redis_url) as connection:
            other = Queue(f"{queue_name}.other", queue.exchange, "b", expires=60)
            with connection.Consumer(other, callbacks=[print]) as theirs:
                assert server.scard(table_of(queue_name)) == 2
                theirs.channel.queue_delete(other.name)
                make_overdue(server, queue_name)
                # It is swept, or refreshed before; then what is in use is there again.
                wait_until(lambda: server.zscore(DEADLINES, f"{queue_name}.exchange"))
                assert server.scard(table_of(queue_name)) == 1
            Producer(connection).publish("x", exchange=queue.exchange, routing_key="a.b")
        assert consumer.wait_for(1) == ["x"]
