"""Secrets that expire: asked for before their end, and handed to the broker on a live link."""

from __future__ import annotations

import base64
import json
import time
from itertools import chain, count, repeat

import pytest
from kombu import Connection
from kombu.utils.url import parse_url

from greenconsume.amqp import secret
from greenconsume.amqp.secret import SecretSource, end_of
from greenconsume.events import SecretUpdated
from greenconsume.transports import registry
from tests.unit.fakes import of_type, recording
from tests.waiting import AT_ONCE, wait_until


def token(life, **claims):
    """A JWT that ends in so many seconds; nobody has signed it."""
    parts = [{"alg": "none"}, {"exp": time.time() + life, **claims}]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode() for part in parts]
    return ".".join(part.rstrip("=") for part in [*encoded, "signature"])


@pytest.fixture
def connect(peer):
    """Connect to a peer with a password that is asked for."""
    opened = []

    def open_connection(ask=None, provider=None, **options):
        registry.register()
        parts = parse_url(peer.url) | ({"password": ask} if ask else {})
        opened.append(Connection(**parts, transport_options=options))
        opened[-1].credential_provider = provider
        opened[-1].connect()
        return opened[-1]

    yield open_connection
    for connection in opened:
        connection.release()


def updates(peer):
    return [frame.args[0] for frame in peer.frames("connection.update-secret")]


def test_a_token_is_replaced_before_its_end(connect, peer):
    tokens = [token(0.2), token(0.2, n=1), token(3600)]
    asked = iter(tokens)
    began = time.monotonic()
    connection = connect(lambda: next(asked))
    wait_until(lambda: updates(peer) == tokens[1:])
    assert time.monotonic() - began < AT_ONCE
    assert connection.connected
    assert peer.connection_count == 1
    # A token says when it ends: a text and a flag of the second kind do not.
    assert peer.frames("connection.start-ok")[0].args[2] == f"\0guest\0{tokens[0]}"


def test_a_secret_that_does_not_say_its_end_is_replaced_by_the_users_interval(connect, peer):
    numbers = count()
    connect(lambda: f"secret-{next(numbers)}", secret_interval=0.02)
    wait_until(lambda: updates(peer)[:2] == ["secret-1", "secret-2"])


def test_a_provider_is_asked_as_well(connect, peer):
    class Provider:
        numbers = count()

        def get_credentials(self):
            return "guest", f"secret-{next(self.numbers)}"

    connect(provider=Provider(), secret_interval=0.02)
    wait_until(lambda: "secret-2" in updates(peer))


def test_a_link_that_is_closed_waits_for_no_answer_to_its_secret(connect, peer):
    peer.silent.add("connection.update-secret")
    connection = connect(lambda: "secret", secret_interval=0.01)
    peer.wait_for("connection.update-secret")
    connection.release()  # nothing outlives the test, though the call timeout is long


@pytest.mark.parametrize(
    ("ask", "options"),
    [
        (lambda: "a secret that says nothing of its end", {}),
        (None, {"secret_interval": 0.01}),
    ],
)
def test_what_does_not_expire_or_change_is_left_alone(connect, peer, ask, options):
    connection = connect(ask, **options)
    for _ in range(3):
        connection.channel().close()
    assert connection.transport._secrets is None or connection.transport._secrets.interval is None
    assert updates(peer) == []


def test_a_provider_that_fails_is_asked_again_and_told(connect, peer, monkeypatch):
    monkeypatch.setattr(secret, "_RETRY", 0.01)
    last = token(3600)
    answers = chain([token(0.01)], [OSError("no answer from the issuer")] * 2, repeat(last))

    def ask():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with recording() as events:
        connection = connect(ask)
        wait_until(lambda: updates(peer) == [last])
        wait_until(lambda: len(of_type(events, SecretUpdated)) == 3)
    assert [bool(event.error) for event in of_type(events, SecretUpdated)] == [True, True, False]
    assert connection.connected


def test_a_provider_that_keeps_its_token_is_asked_again(connect, peer, monkeypatch):
    monkeypatch.setattr(secret, "_RETRY", 0.01)
    first, last = token(0.01), token(3600)
    answers = chain([first] * 3, repeat(last))
    connect(lambda: next(answers))
    wait_until(lambda: updates(peer))
    assert updates(peer) == [last]


def test_a_broker_that_does_not_answer_to_a_secret_loses_the_link(connect, peer):
    peer.silent.add("connection.update-secret")
    numbers = count()
    connection = connect(lambda: str(next(numbers)), secret_interval=0.01, call_timeout=0.05)
    link = connection.connection.link
    wait_until(lambda: not link.connected)
    assert "new secret" in str(link.failure)


def test_a_link_that_is_closed_asks_for_no_more(connect, peer):
    numbers = count()
    connection = connect(lambda: str(next(numbers)), secret_interval=0.02)
    wait_until(lambda: updates(peer))
    connection.release()
    asked = next(numbers)
    wait_until(lambda: peer.open_count == 0)
    assert next(numbers) == asked + 1


def test_an_interval_that_is_none_is_refused(connect):
    with pytest.raises(ValueError, match="secret_interval must be above 0"):
        connect(lambda: "s", secret_interval=0)


@pytest.mark.parametrize(
    "text",
    ["", "hunter2", "a.b", "a.b.c", "a.e30.c", "a.bnVsbA.c", "a.eyJleHAiOiAieCJ9.c", "é.é.é"],
)
def test_a_secret_that_is_no_token_has_no_end(text):
    assert end_of(text) is None
    assert SecretSource(text, str).delay_after(text) is None


def test_a_token_that_has_ended_is_replaced_at_once():
    assert SecretSource("", str).delay_after(token(-10)) == 0.0
