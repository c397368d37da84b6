"""Tests what cannot be restored: it is for another user, its key is no list, or nobody can read it."""

from __future__ import annotations

from time import time
from typing import Any

import pytest
from gevent.event import Event
from kombu import Consumer, Exchange, Queue

from greenconsume.redis import keeper
from greenconsume.redis.link import Link
from greenconsume.redis.restore import restore
from greenconsume.redis.scripts import MOVE
from tests.integration.consumers import Inbox, Recorder, consuming, green_connection
from tests.integration.redis.payloads import (
    abandon,
    bodies_in,
    held_count,
    payload,
    put,
    refreshed_at,
)
from tests.options import say
from tests.waiting import wait_until

pytestmark = pytest.mark.every_redis


def test_what_nobody_can_restore_is_not_in_the_way_of_others(
    redis_url, server, queue_name, quick, caplog
):
    for number in range(keeper.LOOK + 1):
        server.hset("unacked", f"alien.{number}", "no entry")
        server.zadd("unacked_index", {f"alien.{number}": 1})
    abandon(server, queue_name, "x")
    with consuming(consumer := Recorder(redis_url, queue_name)):
        consumer.wait_for(1)
        wait_until(lambda: server.zcount("unacked_index", 0, 10) == 0)
    assert server.hlen("unacked") == keeper.LOOK + 1
    assert caplog.text.count("cannot be restored") == keeper.LOOK + 1


def test_what_a_user_may_not_restore_is_not_in_the_way_of_his_own(
    server, queue_name, restricted, quick
):
    """Users of one database who may each use their own queues restored nothing, if both had something."""
    abandon(server, "others", "y", age=9000.0, owner="theirs.")
    abandon(server, queue_name, "x")
    with consuming(consumer := Recorder(restricted, queue_name)):
        assert consumer.wait_for(1) == ["x"]
        wait_until(lambda: server.hkeys("unacked") == [b"theirs.1"])
    assert bodies_in(server, "others") == []


def test_a_retry_of_another_user_is_not_in_the_way_of_ones_own(
    server, queue_name, restricted, quick
):
    """What came before the refused one was put back, and nobody told of it; what came after it was not."""
    queues = (f"{queue_name}.first", "others", f"{queue_name}.last")
    for number, queue in enumerate(queues, 1):
        server.hset("_greenconsume.delayed", number, f"{queue}\n".encode() + payload(number))
        server.zadd("_greenconsume.delayed_index", {number: number})
    consumers = [Recorder(restricted, queue) for queue in (queues[0], queues[2])]
    with consuming(*consumers):
        assert [consumer.wait_for(1) for consumer in consumers] == [[1], [3]]
    assert server.hkeys("_greenconsume.delayed") == [b"2"]
    assert server.zrange("_greenconsume.delayed_index", 0, -1, withscores=True) == [(b"2", 2.0)]


def test_what_plain_kombu_restores_into_two_queues_wakes_the_consumers_of_both(
    connection, server, queue_name, quick
):
    """The server tells nobody of his own changes."""
    exchange = Exchange(f"{queue_name}.exchange", "direct")
    queues = [Queue(f"{queue_name}.{n}", exchange, "k") for n in range(2)]
    inbox = Inbox(connection)
    consumers = [Consumer(connection.channel(), [queue], callbacks=[inbox]) for queue in queues]
    for consumer in consumers:
        consumer.consume()
    server.hset("unacked", "kombus", f'[{payload("x").decode()}, "{exchange.name}", "k"]')
    server.zadd("unacked_index", {"kombus": 1})
    assert inbox.drain(2) == ["x", "x"]


def hold_for_two_queues(connection: Any, server: Any, queue_name: str) -> list[str]:
    """Leave a message unsettled, as kombu does, that was bound for two queues; return their names."""
    exchange = Exchange(f"{queue_name}.exchange", "direct")
    names = [f"{queue_name}.{n}" for n in range(2)]
    for name in names:
        Queue(name, exchange, "k")(connection.channel()).declare()
    server.hset("unacked", "kombus", f'[{payload("x").decode()}, "{exchange.name}", "k"]')
    server.zadd("unacked_index", {"kombus": 1})
    return names


def test_a_race_lost_by_who_restores_into_two_queues_doubles_nothing(
    connection, server, queue_name, monkeypatch
):
    """What was put into the further queues before the compare stayed there."""
    names = hold_for_two_queues(connection, server, queue_name)
    run = Link.run

    def late(link: Link, script: Any, *args: Any, **kwargs: Any) -> None:
        if script is MOVE:
            server.zadd("unacked_index", {"kombus": time()})  # its holder refreshed it
        run(link, script, *args, **kwargs)

    monkeypatch.setattr(Link, "run", late)
    channel = connection.default_channel
    assert restore(channel.link, channel.keyspace, [b"kombus"], untouched_for=60.0).touched == set()
    assert [bodies_in(server, name) for name in names] == [[], []]
    assert server.hkeys("unacked") == [b"kombus"]


def test_what_one_of_two_queues_refuses_is_put_into_neither(connection, server, queue_name):
    names = hold_for_two_queues(connection, server, queue_name)
    server.set(names[1], "no list")
    channel = connection.default_channel
    back = restore(channel.link, channel.keyspace, [b"kombus"])
    assert (back.touched, [field for field, _ in back.refused]) == (set(), [b"kombus"])
    assert bodies_in(server, names[0]) == []
    assert server.zrange("unacked_index", 0, -1, withscores=True) == [(b"kombus", 1.0)]


def test_a_requeue_that_the_server_refuses_keeps_nobody_from_his_lease(
    redis_url, server, queue_name, quick, caplog
):
    """Nothing was refreshed any more, and whatever took long was done twice."""
    put(server, queue_name, "long")
    put(server, f"{queue_name}.other", "refused")
    done = Event()
    options = {"visibility_timeout": 1.0}
    consumer = Recorder(
        green_connection(redis_url, transport_options=options),
        queue_name,
        lambda _b, _m: done.wait(),
    )
    say(consumer, concurrency=1)
    with (
        green_connection(redis_url, transport_options=options) as other,
        consuming(consumer),
    ):
        wait_until(lambda: held_count(server) == 1)
        taken_at = refreshed_at(server)
        message = other.default_channel.basic_get(f"{queue_name}.other")
        server.set(f"{queue_name}.other", "no list")
        message.requeue()
        wait_until(lambda: "cannot be restored" in caplog.text)
        wait_until(lambda: leases(server)[-1] > taken_at + 2.0)  # twice the timeout
        server.delete(f"{queue_name}.other")
        wait_until(lambda: bodies_in(server, f"{queue_name}.other") == ["refused"])
        done.set()
        consumer.wait_for(1)
    assert consumer.bodies == ["long"]
    assert held_count(server) == 0


def leases(server: Any) -> list[float]:
    """Return when what is held was last said to be at work, the oldest first."""
    return [at for _, at in server.zrange("unacked_index", 0, -1, withscores=True)]


def test_more_of_others_than_one_look_names_do_not_hide_what_is_ours(
    server, queue_name, restricted, quick
):
    """What is overdue for longer comes first, and was all that was ever looked at."""
    count = keeper.LOOK + 1
    abandon(server, "others", *range(count), age=9000.0, owner="theirs.")
    abandon(server, queue_name, "x")
    with consuming(consumer := Recorder(restricted, queue_name)):
        assert consumer.wait_for(1) == ["x"]
        wait_until(lambda: held_count(server) == count)
    assert bodies_in(server, "others") == []


def test_what_is_refused_is_told_once_and_not_at_every_look(
    server, queue_name, restricted, quick, caplog
):
    abandon(server, "others", "y", age=9000.0, owner="theirs.")
    with consuming(consumer := Recorder(restricted, queue_name)):
        for n in range(5):
            abandon(server, queue_name, n)
            consumer.wait_for(n + 1)
    assert caplog.text.count("cannot be restored") == 1


def test_a_dead_process_of_another_user_is_left_to_its_own(server, queue_name, restricted, quick):
    """It kept all who died after it from being inherited."""
    owners = ("greenconsume.theirs.", "greenconsume.ours.")
    for owner, queue in zip(owners, ("others", queue_name), strict=True):
        abandon(server, queue, "x", age=1.0, owner=owner)
        server.hset("_greenconsume.owners", owner, f"{time() - 60} 999999")
    with consuming(consumer := Recorder(restricted, queue_name)):
        assert consumer.wait_for(1) == ["x"]
        wait_until(lambda: not server.hexists("_greenconsume.owners", owners[1]))
        wait_until(lambda: held_count(server) == 1)
    assert server.hexists("_greenconsume.owners", owners[0])
