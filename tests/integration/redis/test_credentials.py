"""Credentials that a Redis server refuses, or lets in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest

from greenconsume import Runtime
from greenconsume.errors import BrokerRefusedError
from greenconsume.events import ConsumerState
from tests.integration.consumers import Recorder

SECRET = "h0rse"


@pytest.fixture
def user(server: Any) -> Iterator[str]:
    """A user of the server who has a password."""
    server.acl_setuser(
        "orders", enabled=True, passwords=[f"+{SECRET}"], keys="*", channels="*", commands=["+@all"]
    )
    yield "orders"
    server.acl_deluser("orders")


def as_user(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{user}:{password}@{parts.hostname}:{parts.port}").geturl()


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
