"""A server that answers, and says no: without memory, a replica now, or one that forgot scripts and data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from gevent.event import Event
from kombu import Producer, Queue

from tests.integration.consumers import Recorder, consuming, green_connection
from tests.integration.redis.conftest import Start
from tests.integration.redis.payloads import bodies_in, held_count, put, refreshed_at
from tests.options import say
from tests.servers import HOST
from tests.waiting import wait_until


@pytest.fixture
def own(start: Start) -> Iterator[Any]:
    """A client of a server of the test's own, which may be treated badly."""
    with redis.Redis(HOST, start()) as client:
        yield client


@pytest.fixture
def url(own: Any) -> str:
    return f"redis://{HOST}:{own.connection_pool.connection_kwargs['port']}/0"


def test_a_server_that_forgot_its_scripts_is_told_them_again(own, url, queue_name):
    with consuming(consumer := Recorder(url, queue_name)):
        for n in range(3):
            own.script_flush()
            put(own, queue_name, n)
            consumer.wait_for(n + 1)
        wait_until(lambda: held_count(own) == 0)
        own.script_flush()
    assert consumer.bodies == [0, 1, 2]


def test_what_was_not_started_goes_back_to_a_server_that_forgot_its_scripts(own, url, queue_name):
    put(own, queue_name, *range(5))
    begun, gate = Event(), Event()
    consumer = Recorder(url, queue_name, lambda _b, _m: begun.set() or gate.wait())
    say(consumer, concurrency=1)
    with consuming(consumer):
        begun.wait()
        own.script_flush()
        consumer.should_stop = True
        wait_until(lambda: own.llen(queue_name) == 4)
        gate.set()
    assert bodies_in(own, queue_name) == [1, 2, 3, 4]
    assert held_count(own) == 0


def test_a_server_that_became_a_replica_is_left_and_nothing_is_lost_when_it_is_master_again(
    own, url, queue_name
):
    put(own, queue_name, *range(20))
    gate = Event()
    consumer = Recorder(url, queue_name, lambda _b, _m: gate.wait(), prefetch_count=2)
    say(consumer, concurrency=2)
    with consuming(consumer):
        wait_until(lambda: held_count(own) == 2)
        own.replicaof(HOST, "1")
        gate.set()  # their acks are refused
        wait_until(lambda: len(consumer.bodies) >= 2)
        own.replicaof("NO", "ONE")
        consumer.wait_for(20)
        wait_until(lambda: held_count(own) == 0)
    assert sorted(consumer.bodies) == list(range(20))


def test_a_server_without_memory_gives_out_what_it_has(own, url, queue_name):
    """What is taken and settled needs no more of it."""
    put(own, queue_name, *range(5))
    own.config_set("maxmemory", 1)
    with consuming(consumer := Recorder(url, queue_name, prefetch_count=2)):
        consumer.wait_for(5)
        wait_until(lambda: held_count(own) == 0)
    assert consumer.bodies == [0, 1, 2, 3, 4]


def test_a_server_without_memory_hears_of_who_lives_and_what_is_at_work(
    own, url, queue_name, quick
):
    """Else a message that takes long was done twice, once there was memory again."""
    put(own, queue_name, "long")
    done = Event()
    connection = green_connection(url, transport_options={"visibility_timeout": 1.0})
    consumer = Recorder(connection, queue_name, lambda _b, _m: done.wait())
    say(consumer, concurrency=1)
    with consuming(consumer):
        wait_until(lambda: held_count(own) == 1)
        own.config_set("maxmemory", 1)
        taken_at = refreshed_at(own)
        wait_until(lambda: refreshed_at(own) > taken_at + 2.0)
        [beat_at] = own.hvals("_greenconsume.owners")
        wait_until(lambda: own.hvals("_greenconsume.owners") != [beat_at])
        done.set()
        wait_until(lambda: held_count(own) == 0)
    assert consumer.bodies == ["long"]


def test_a_requeue_that_finds_no_memory_is_made_when_there_is_some(own, url, queue_name, quick):
    put(own, queue_name, "x")
    with green_connection(url) as connection:
        message = connection.default_channel.basic_get(queue_name)
        own.config_set("maxmemory", 1)
        message.requeue()
        wait_until(lambda: own.info("stats")["total_error_replies"] > 0)
        own.config_set("maxmemory", 0)
        wait_until(lambda: bodies_in(own, queue_name) == ["x"])
        wait_until(lambda: held_count(own) == 0)


def test_a_database_that_is_emptied_goes_on_with_what_comes(own, url, queue_name):
    put(own, queue_name, "x")
    with consuming(consumer := Recorder(url, queue_name)):
        consumer.wait_for(1)
        own.flushall()
        put(own, queue_name, "y")
        consumer.wait_for(2)
        wait_until(lambda: held_count(own) == 0)
    assert consumer.bodies == ["x", "y"]


def test_a_publisher_is_told_that_there_is_no_memory(own, url, queue_name):
    own.config_set("maxmemory", 1)
    with green_connection(url) as connection, pytest.raises(redis.ResponseError, match="OOM"):
        Producer(connection).publish("x", routing_key=queue_name, declare=[Queue(queue_name)])


@pytest.mark.parametrize("concurrency", [None, 5])
def test_a_handler_that_closes_its_messages_connection_is_told_of(
    own, url, queue_name, caplog, concurrency
):
    """Without a word, a handler that does so for each message would connect anew for each."""
    closed: list[Any] = []

    def handle(body: Any, message: Any) -> None:
        if not closed:
            closed.append(body)
            message.channel.session.client.release()

    consumer = Recorder(url, queue_name, handle)
    say(consumer, concurrency=concurrency)
    with consuming(consumer):
        put(own, queue_name, *range(5))
        wait_until(lambda: consumer.ready_count == 2)
        wait_until(lambda: set(consumer.bodies) == set(range(5)))
    assert "a handler, or a library that it uses, closed the connection" in caplog.text
    assert "Traceback" not in caplog.text
