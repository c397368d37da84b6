"""Credentials that a Redis server refuses, or lets in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from kombu import Consumer, Queue

from greenconsume import Runtime
from greenconsume.errors import BrokerRefusedError
from greenconsume.events import ConsumerState
from tests.integration.consumers import Inbox, Recorder, green_connection
from tests.integration.redis.payloads import bodies_in, held_count, put
from tests.redis_server import as_user

SECRET = "h0rse"


@pytest.fixture
def user(server: Any) -> Iterator[str]:
    """A user of the server who has a password."""
    server.acl_setuser(
        "orders", enabled=True, passwords=[f"+{SECRET}"], keys="*", channels="*", commands=["+@all"]
    )
    yield "orders"
    server.acl_deluser("orders")


def test_a_wrong_password_fails_the_start(redis_url, queue_name, user, caplog):
    """It used to be waited for, in silence."""
    runtime = Runtime(as_user(redis_url, user, "wrong"))
    children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=3)
    with pytest.raises(BrokerRefusedError, match="invalid username-password pair"):
        runtime.start()
    assert not any(child.running for child in children)
    assert "wrong@" not in caplog.text


def test_the_right_password_is_let_in(redis_url, queue_name, user):
    runtime = Runtime(as_user(redis_url, user, SECRET))
    (child,) = runtime.spawn(partial(Recorder, queue=queue_name))
    with runtime:
        assert child.state is ConsumerState.CONSUMING


def test_users_of_one_process_each_give_back_what_they_took_themselves(
    redis_url, server, queue_name
):
    """It went over the link of the other, who may not touch that queue, and so stayed where it was."""
    names = [f"{queue_name}.{each}" for each in ("one", "other")]
    for name in names:
        keys = [f"{name}*", "unacked*", "_kombu*", "_greenconsume*"]
        server.acl_setuser(
            name, enabled=True, passwords=[f"+{SECRET}"], keys=keys, commands=["+@all"]
        )
        put(server, name, 1, 2, 3)
    connections = [green_connection(as_user(redis_url, name, SECRET)) for name in names]
    for name, connection in zip(names, connections, strict=True):
        inbox = Inbox(connection)
        Consumer(connection, [Queue(name)], callbacks=[inbox]).consume()
        assert inbox.drain(1) == [1]
    for name, connection in reversed(list(zip(names, connections, strict=True))):
        connection.close()
        assert bodies_in(server, name) == [2, 3]
        server.acl_deluser(name)
    assert held_count(server) == 0
