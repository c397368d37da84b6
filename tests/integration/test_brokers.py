"""The private brokers, held against kombu's own transports."""

from __future__ import annotations

from contextlib import ExitStack, closing
from time import monotonic

import amqp
import psutil
import pytest
import redis

from tests.brokers import INSTALLED, QueueCounts, chosen_release, client_tls, vhost_of
from tests.erlang import ErlangError
from tests.messages import declare, delete_queue, publish, queue_depth, stock_connection
from tests.servers import HOST
from tests.waiting import AT_ONCE, wait_until


def test_each_test_has_a_virtual_host_of_its_own(rabbitmq, amqp_url, queue_name):
    other = rabbitmq.url(rabbitmq.add_vhost())
    publish(amqp_url, queue_name)
    with pytest.raises(amqp.NotFound):
        queue_depth(other, queue_name)
    rabbitmq.delete_vhost(vhost_of(other))
    with pytest.raises(amqp.NotAllowed):
        queue_depth(other, queue_name)


def test_what_is_published_is_counted(rabbitmq, amqp_url, queue_name):
    assert publish(amqp_url, queue_name, 1000) == 1000
    assert publish(amqp_url, queue_name, [{"n": 1}]) == 1
    assert publish(amqp_url, queue_name, []) == 0
    assert queue_depth(amqp_url, queue_name) == 1001
    assert rabbitmq.queue_counts(amqp_url, queue_name) == QueueCounts(1001, 0, 0)


def test_unacked_messages_and_consumers_are_seen(rabbitmq, amqp_url, queue_name):
    publish(amqp_url, queue_name, ["a", "b", "c"])
    got = []
    with stock_connection(amqp_url) as connection:
        channel = connection.channel()
        channel.basic_qos(0, 2, False)
        channel.basic_consume(queue_name, callback=got.append)
        while len(got) < 2:
            connection.drain_events(timeout=30)
        assert rabbitmq.queue_counts(amqp_url, queue_name) == QueueCounts(1, 2, 1)
        assert rabbitmq.connection_count(amqp_url) == 1
    assert [message.body for message in got] == ['"a"', '"b"']
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name) == QueueCounts(3, 0, 0))
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)


def test_a_queue_is_declared_with_arguments_and_deleted(amqp_url, queue_name):
    declare(amqp_url, queue_name, x_max_length=2)
    publish(amqp_url, queue_name, 5)
    assert queue_depth(amqp_url, queue_name) == 2
    delete_queue(amqp_url, queue_name)
    with pytest.raises(amqp.NotFound):
        queue_depth(amqp_url, queue_name)


def test_tls_is_served_to_those_who_trust_the_authority(rabbitmq, amqps_url):
    with stock_connection(amqps_url, ssl=client_tls(rabbitmq)) as connection:
        connection.connect()
        assert connection.connected
        assert connection.connection.transport.sock.version().startswith("TLSv1")


def test_the_server_closes_connections_when_told(rabbitmq, amqp_url):
    connection = stock_connection(amqp_url)
    connection.connect()
    rabbitmq.close_connections(amqp_url, "told so")
    with pytest.raises(amqp.ConnectionForced, match="told so"):
        connection.drain_events(timeout=30)
    connection.collect()


def test_an_alarm_blocks_publishers_until_it_is_cleared(rabbitmq_fault, amqp_url, queue_name):
    seen = []
    options = {
        "on_blocked": lambda *_: seen.append("blocked"),
        "on_unblocked": lambda *_: seen.append("unblocked"),
    }
    with stock_connection(amqp_url, transport_options=options) as connection:
        channel = connection.channel()
        channel.queue_declare(queue_name)
        rabbitmq_fault.block()
        channel.basic_publish(amqp.Message("{}"), routing_key=queue_name)
        connection.drain_events(timeout=30)
        rabbitmq_fault.unblock()
        connection.drain_events(timeout=30)
    assert seen == ["blocked", "unblocked"]


def test_eval_is_quick_and_tells_errors(rabbitmq):
    """A tenth of a second is usual; a program of its own for each would take a second."""
    start = monotonic()
    assert [rabbitmq.eval(f"{n} + 1.") for n in range(20)] == [str(n + 1) for n in range(20)]
    assert monotonic() - start < AT_ONCE
    with pytest.raises(ErlangError, match="badarith"):
        rabbitmq.eval("1 / 0")
    with pytest.raises(ErlangError, match="syntax error"):
        rabbitmq.eval("1 +")


@pytest.mark.slow
def test_rabbitmqctl_reaches_the_node(rabbitmq, amqp_url):
    assert vhost_of(amqp_url) in rabbitmq.rabbitmqctl("list_vhosts")


@pytest.mark.slow
def test_a_paused_and_killed_broker_keeps_what_is_durable_and_is_recovered(
    rabbitmq_fault, amqp_url, queue_name
):
    publish(amqp_url, queue_name, 500)
    rabbitmq_fault.eval("mnesia:sync_log()")
    rabbitmq_fault.pause()
    rabbitmq_fault.kill()
    assert not rabbitmq_fault.running
    with pytest.raises(ConnectionRefusedError):
        stock_connection(amqp_url).transport.establish_connection()
    rabbitmq_fault.recover()
    assert rabbitmq_fault.ready()
    assert queue_depth(amqp_url, queue_name) == 500


@pytest.mark.slow
def test_a_stopped_broker_tells_its_clients_and_comes_back(rabbitmq_fault, amqp_url, queue_name):
    publish(amqp_url, queue_name, 5)
    connection = stock_connection(amqp_url)
    connection.connect()
    rabbitmq_fault.stop()
    with pytest.raises((amqp.ConnectionForced, OSError)):
        connection.drain_events(timeout=30)
    connection.collect()
    rabbitmq_fault.start()
    assert queue_depth(amqp_url, queue_name) == 5


def test_a_paused_broker_accepts_and_does_not_answer(rabbitmq_fault, amqp_url):
    rabbitmq_fault.pause()
    assert not rabbitmq_fault.ready()
    with pytest.raises(TimeoutError):
        stock_connection(amqp_url, connect_timeout=0.2).transport.establish_connection()
    rabbitmq_fault.resume()
    rabbitmq_fault.wait_ready()
    with stock_connection(amqp_url) as connection:
        connection.connect()
        assert connection.connected


def test_two_databases_of_redis_are_apart_and_empty(redis_server, redis_url):
    other = redis_server.url(redis_server.fresh_database())
    with ExitStack() as stack:
        one, two = map(redis.Redis.from_url, (redis_url, other))
        stack.callback(one.connection_pool.disconnect)
        stack.callback(two.connection_pool.disconnect)
        assert (one.dbsize(), two.dbsize()) == (0, 0)
        one.set("key", "one")
        assert two.get("key") is None


@pytest.mark.every_redis
def test_every_redis_serves_and_tells_its_version(redis_server, redis_url):
    assert (
        redis_server.version
        >= {"redis": (6,), "redis8": (8, 0), "valkey8": (8, 1)}[redis_server.kind]
    )
    with closing(redis.Redis.from_url(redis_url)) as client:
        client.set("key", redis_server.kind)
        assert client.get("key") == redis_server.kind.encode()


def test_the_broker_that_was_asked_for_tells_its_version(rabbitmq):
    assert len(rabbitmq.version) == 3
    assert chosen_release() == INSTALLED or rabbitmq.version[:2] == (4, 0)


def test_servers_listen_on_loopback_only(rabbitmq, redis_server):
    servers = psutil.Process().children(recursive=True)
    assert {rabbitmq.pid, redis_server.pid} < {server.pid for server in servers}
    listening = {
        connection.laddr.ip
        for server in servers
        for connection in server.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {HOST} <= listening <= {HOST, "::1"}
