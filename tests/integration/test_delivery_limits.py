"""Tests what a quorum queue counts towards its delivery limit, by broker: the table of docs/brokers.md."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import amqp
import pytest

from tests.messages import channel, declare, publish, queue_depth
from tests.waiting import wait_until

LIMIT = 3
#: Enough to see that a way back does not count.
TRIES = LIMIT + 4


def nack(chan: Any, tag: int, multiple: bool = False) -> None:
    """py-amqp knows no nack."""
    chan.send_method((60, 120), "Lbb", (tag, multiple, True))


def lose(chan: Any, _tag: int) -> None:
    chan.connection.transport.sock.shutdown(socket.SHUT_RDWR)


WAYS: dict[str, Callable[[Any, int], object]] = {
    "reject": lambda chan, tag: chan.basic_reject(tag, requeue=True),
    "nack": nack,
    "nack of several": lambda chan, tag: nack(chan, tag, multiple=True),
    "channel closed": lambda chan, tag: chan.close(),
    "connection closed": lambda chan, tag: chan.connection.close(),
    "connection lost": lose,
}


def counts_of(url: str, queue: str, way: Callable[[Any, int], object]) -> list[int]:
    """Take a queue's one message and give it back until it is gone: its `x-delivery-count` each time."""
    counts: list[int] = []
    while len(counts) < TRIES:
        with suppress(OSError), channel(url) as chan:
            got: list[Any] = []
            chan.basic_qos(0, 1, False)
            chan.basic_consume(queue, "t", callback=got.append)
            try:
                chan.connection.drain_events(timeout=1.0)
            except TimeoutError:
                return counts
            # A cancel gives nothing back; the way is the only one.
            chan.basic_cancel("t")
            counts.append((got[0].headers or {}).get("x-delivery-count", 0))
            way(chan, got[0].delivery_tag)
    return counts


@pytest.mark.by_broker
@pytest.mark.parametrize("way", WAYS)
def test_each_way_back_counts(amqp_url, queue_name, way):
    """On 3.10 and on 4.0 alike. From 4.3 on a nack does not, which no broker here can show."""
    declare(amqp_url, queue_name, x_queue_type="quorum", x_delivery_limit=LIMIT)
    publish(amqp_url, queue_name)
    assert counts_of(amqp_url, queue_name, WAYS[way]) == list(range(LIMIT + 1))
    assert queue_depth(amqp_url, queue_name) == 0


@pytest.mark.by_broker
def test_a_queue_without_a_limit_of_its_own_drops_from_rabbitmq_4_on(
    rabbitmq, amqp_url, queue_name
):
    declare(amqp_url, queue_name, x_queue_type="quorum")
    publish(amqp_url, queue_name)
    reject = WAYS["reject"]
    with channel(amqp_url) as chan:
        for count in range(21):
            message = chan.basic_get(queue_name)
            assert (message.headers or {}).get("x-delivery-count", 0) == count
            reject(chan, message.delivery_tag)
    kept = 0 if rabbitmq.version >= (4,) else 1
    wait_until(lambda: queue_depth(amqp_url, queue_name) == kept)


@pytest.mark.by_broker
def test_a_limit_of_minus_one_is_none_from_rabbitmq_4_on(rabbitmq, amqp_url, queue_name):
    """3.10 takes it, and drops what comes back once."""
    declare(amqp_url, queue_name, x_queue_type="quorum", x_delivery_limit=-1)
    publish(amqp_url, queue_name)
    got = 0
    with channel(amqp_url) as chan:
        while got < 30 and (message := chan.basic_get(queue_name)) is not None:
            got += 1
            chan.basic_reject(message.delivery_tag, requeue=True)
    assert got == (30 if rabbitmq.version >= (4,) else 1)


@pytest.mark.by_broker
def test_a_classic_queue_counts_nothing(amqp_url, queue_name):
    declare(amqp_url, queue_name)
    publish(amqp_url, queue_name)
    assert counts_of(amqp_url, queue_name, WAYS["reject"]) == [0] * TRIES
    assert queue_depth(amqp_url, queue_name) == 1


@pytest.mark.by_broker
@pytest.mark.parametrize("size", [16 << 20, (16 << 20) + 1])
def test_rabbitmq_4_takes_messages_up_to_16_mib(rabbitmq, amqp_url, queue_name, size):
    declare(amqp_url, queue_name)
    taken = size <= 16 << 20 or rabbitmq.version < (4,)
    with channel(amqp_url) as chan:
        chan.confirm_select()
        publishing = nullcontext() if taken else pytest.raises(amqp.PreconditionFailed)
        with publishing:
            chan.basic_publish_confirm(amqp.Message(bytes(size)), routing_key=queue_name)
    assert queue_depth(amqp_url, queue_name) == int(taken)
