"""Credentials: refused ones are told as such, and those that a callable makes are asked for each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat
from typing import Any

import amqp
import kombu
import pytest
from kombu.exceptions import OperationalError
from kombu.utils.url import parse_url

from greenconsume import Runtime, spawn
from greenconsume.errors import BrokerRefusedError
from greenconsume.events import ConnectFailed, LinkUp
from greenconsume.transports import registry
from tests.brokers import vhost_of
from tests.integration.consumers import SOON, Recorder, consuming, green_connection, observed
from tests.messages import publish
from tests.waiting import AT_ONCE, wait_until

# A broker that somebody gave us has other users than guest.
pytestmark = pytest.mark.usefixtures("rabbitmq")

SECRET = "hunter2-hunter2"


def with_password(url: str, password: str) -> str:
    return url.replace("guest:guest@", f"guest:{password}@")


class Passwords:
    """Gives one password after the other, the last one for ever; remembers how often it was asked."""

    def __init__(self, *passwords: str) -> None:
        self.count = 0
        self._passwords: Iterator[str] = chain(passwords, repeat(passwords[-1]))

    def __call__(self) -> str:
        self.count += 1
        return next(self._passwords)


def asking_for(password: Callable[[], str], url: str) -> kombu.Connection:
    """A connection with a callable password, which kombu takes as an argument only."""
    parts = parse_url(url) | {"password": password}
    registry.register()
    return kombu.Connection(**parts)


def test_a_runtime_refuses_to_start_with_a_wrong_password(amqp_url, queue_name, caplog):
    runtime = Runtime(with_password(amqp_url, SECRET))
    children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=5)
    with pytest.raises(BrokerRefusedError, match="ACCESS_REFUSED") as caught:
        runtime.start()
    assert SECRET not in str(caught.value) + caught.value.uri + caplog.text
    assert not any(child.running for child in children)
    assert runtime.join(30)


def test_a_runtime_refuses_to_start_with_a_wrong_virtual_host(amqp_url, queue_name):
    url = amqp_url.replace(vhost_of(amqp_url), "there-is-no-such-vhost")
    runtime = Runtime(url)
    runtime.spawn(partial(Recorder, queue=queue_name))
    with pytest.raises(BrokerRefusedError, match="there-is-no-such-vhost"):
        runtime.start()


@pytest.mark.usefixtures("long_backoff")
def test_a_spawned_consumer_tries_again_after_a_refusal(amqp_url, queue_name, caplog):
    """What is refused may be put right at the broker, and a consumer by itself has nobody to tell."""
    greenlet = spawn(Recorder(with_password(amqp_url, SECRET), queue_name))
    with observed(ConnectFailed) as failures:
        wait_until(lambda: failures, SOON)
    assert failures[0].refused
    assert SECRET not in repr(failures[0]) + caplog.text
    greenlet.stop()
    assert greenlet.join(AT_ONCE)


def test_a_limited_number_of_refusals_ends_the_consumer(amqp_url, queue_name):
    consumer = Recorder(with_password(amqp_url, SECRET), queue_name)
    consumer.connect_max_retries = 0
    greenlet = spawn(consumer)
    assert greenlet.join(SOON)
    assert isinstance(greenlet.exception, OperationalError)
    assert SECRET not in str(greenlet.exception)


def test_a_callable_password_is_asked_for_each_attempt(amqp_url, queue_name):
    passwords = Passwords("wrong", "guest")
    consumer = Recorder(asking_for(passwords, amqp_url), queue_name)
    with observed(ConnectFailed) as failures, consuming(consumer):
        assert [failure.refused for failure in failures] == [True]
        assert passwords.count == 2


def test_a_callable_password_is_asked_for_each_reconnect(proxy, queue_name):
    passwords = Passwords("guest")
    runtime = Runtime(asking_for(passwords, proxy.url))
    children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=10)
    with observed(LinkUp) as links, runtime:
        assert (passwords.count, len(links)) == (1, 1)
        proxy.cut()
        wait_until(lambda: all(child.consumer.ready_count == 2 for child in children), SOON)
        assert (passwords.count, len(links)) == (2, 2)


class Provider:
    """A credential provider, as redis-py has it and kombu takes it."""

    def __init__(self, *credentials: str) -> None:
        self.credentials = credentials
        self.count = 0

    def get_credentials(self) -> tuple[str, ...]:
        self.count += 1
        return self.credentials


@pytest.mark.parametrize("credentials", [("guest", "guest"), ("guest",)])
def test_a_credential_provider_is_asked_for_each_link(proxy, queue_name, credentials):
    provider = Provider(*credentials)
    url = with_password(proxy.url, "wrong")
    runtime = Runtime(green_connection(url, credential_provider=provider))
    [child] = runtime.spawn(partial(Recorder, queue=queue_name))
    with runtime:
        assert provider.count == 1
        proxy.cut()
        wait_until(lambda: child.consumer.ready_count == 2, SOON)
        assert provider.count == 2


class GuestProvider(Provider):
    """One that is named by its path, and made when it is needed."""

    def __init__(self) -> None:
        super().__init__("guest", "guest")


def test_a_credential_provider_may_be_named(amqp_url):
    path = f"{GuestProvider.__module__}:{GuestProvider.__name__}"
    url = with_password(amqp_url, "wrong")
    with green_connection(url, credential_provider=path) as connection:
        connection.connect()
        assert connection.connected


def test_a_queue_that_may_not_be_read_is_no_refused_connection(
    rabbitmq, amqp_url, queue_name, caplog
):
    """Permissions are the channel's affair: the consumer waits for them, its neighbour consumes."""
    publish(amqp_url, queue_name, 1)
    set_permissions(rabbitmq, amqp_url, read="^allowed$")
    runtime = Runtime(amqp_url)
    [allowed] = runtime.spawn(partial(Recorder, queue="allowed"))
    with runtime:
        [refused] = runtime.spawn(partial(Recorder, queue=queue_name))
        wait_until(lambda: "ACCESS_REFUSED" in caplog.text, SOON)
        publish(amqp_url, "allowed", ["body"])
        assert allowed.consumer.wait_for(1) == ["body"]
        set_permissions(rabbitmq, amqp_url, read=".*")
        assert refused.consumer.wait_for(1) == [0]
    assert allowed.consumer.ready_count == 1


def set_permissions(rabbitmq: Any, url: str, read: str) -> None:
    rabbitmq.eval(
        "rabbit_auth_backend_internal:set_permissions("
        f'<<"guest">>, <<"{vhost_of(url)}">>, <<".*">>, <<".*">>, <<"{read}">>, <<"test">>)'
    )


def test_a_plain_connection_is_told_of_the_refusal(amqp_url):
    with kombu.Connection(with_password(amqp_url, SECRET)) as connection:
        with pytest.raises(amqp.AccessRefused, match="ACCESS_REFUSED"):
            connection.ensure_connection(max_retries=0)
