"""OAuth2 tokens on a RabbitMQ that checks them: handed over on a live link before they end."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from time import time
from typing import Any

import pytest
from amqp import AccessRefused
from kombu import Connection

from greenconsume.events import LinkDown, SecretUpdated
from greenconsume.transports import registry
from tests.brokers import RabbitMQ, chosen_release, fresh_vhost
from tests.integration.consumers import SOON, Recorder, consuming, observed
from tests.servers import HOST, MissingServerError, missing, need_patched
from tests.waiting import wait_until

KEY = b"0123456789abcdef0123456789abcdef"
SCOPES = ["rabbitmq.configure:*/*", "rabbitmq.read:*/*", "rabbitmq.write:*/*"]
ADVANCED = """
[{{rabbit, [{{auth_backends, [rabbit_auth_backend_oauth2, rabbit_auth_backend_internal]}}]}},
 {{rabbitmq_auth_backend_oauth2, [
   {{resource_server_id, <<"rabbitmq">>}},
   {{key_config, [
     {{default_key, <<"k1">>}},
     {{signing_keys, #{{<<"k1">> =>
       {{map, #{{<<"kty">> => <<"oct">>, <<"kid">> => <<"k1">>, <<"alg">> => <<"HS256">>,
                <<"k">> => <<"{key}">>}}}}}}}}]}}]}}].
"""


def encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def token(life: float) -> str:
    """A token that the broker takes for so many seconds."""
    claims = {"sub": "app", "aud": ["rabbitmq"], "scope": SCOPES, "exp": int(time() + life)}
    parts = [{"alg": "HS256", "typ": "JWT", "kid": "k1"}, claims]
    signed = ".".join(encoded(json.dumps(part).encode()) for part in parts)
    return f"{signed}.{encoded(hmac.digest(KEY, signed.encode(), hashlib.sha256))}"


@pytest.fixture(scope="module")
def oauth2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A RabbitMQ that takes tokens, beside the one that the other tests use."""
    need_patched()
    try:
        broker = RabbitMQ(
            tmp_path_factory.mktemp("oauth2"),
            chosen_release(),
            plugins=["rabbitmq_auth_backend_oauth2"],
            advanced=ADVANCED.format(key=encoded(KEY)),
        )
    except MissingServerError as exc:
        missing(exc)
    with closing(broker):
        broker.start()
        yield broker


@pytest.fixture
def connect(oauth2: RabbitMQ) -> Iterator[Any]:
    """Make connections that are given one token after the other."""
    registry.register()
    with fresh_vhost(oauth2) as vhost:

        def make(ask: Any, **options: Any) -> Connection:
            where = {"hostname": HOST, "port": oauth2.port, "virtual_host": vhost}
            return Connection(
                transport="amqp", userid="app", password=ask, transport_options=options, **where
            )

        yield make


def declare_another(connection: Connection, numbers: Iterator[int]) -> bool:
    """Declare a queue, for which the broker looks at the token: each channel asks anew."""
    with connection.channel() as channel:
        channel.queue_declare(f"queue-{next(numbers)}")
    return True


@pytest.mark.rabbitmq
@pytest.mark.slow
def test_a_link_outlives_its_tokens(connect):
    numbers = count()
    with observed(LinkDown) as lost, observed(SecretUpdated) as updates:
        with connect(lambda: token(life=3)) as connection:
            wait_until(
                lambda: declare_another(connection, numbers) and len(updates) >= 3,
                SOON,
                "three tokens were handed over, and every one was taken",
            )
            declare_another(connection, numbers)
    assert lost == []
    assert [update.error for update in updates] == [None] * len(updates)


@pytest.mark.rabbitmq
@pytest.mark.slow
def test_a_consumer_outlives_its_tokens(connect, queue_name):
    consumer = Recorder(connect(lambda: token(life=3)), queue_name)
    with observed(LinkDown) as lost, observed(SecretUpdated) as updates, consuming(consumer):
        wait_until(lambda: len(updates) >= 2, SOON)
        with connect(lambda: token(life=60)) as publishing, publishing.SimpleQueue(queue_name) as q:
            q.put("after both")
        assert consumer.wait_for(1) == ["after both"]
    assert lost == []


@pytest.mark.rabbitmq
@pytest.mark.slow
def test_without_another_token_the_broker_refuses_what_comes_after_its_end(connect):
    """This broker does check."""
    last, numbers = token(life=2), count()

    with connect(lambda: last) as connection:
        declare_another(connection, numbers)

        def is_refused() -> bool:
            try:
                declare_another(connection, numbers)
            except AccessRefused:
                return True
            return False

        wait_until(is_refused, SOON)
