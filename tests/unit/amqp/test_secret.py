"""Secrets that expire: asked for before their end, and handed to the broker on a live link."""

from __future__ import annotations

import base64
import json
import time
from itertools import chain, count, repeat

import amqp
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


@pytest.mark.parametrize("repeats", [True, False])
def test_a_token_larger_than_a_frame_is_told_once_and_the_link_lives(
    connect, peer, monkeypatch, repeats
):
    """The one that the broker has is good until its end, and the next may fit again."""
    monkeypatch.setattr(secret, "_RETRY", 0.01)
    first, last, large = token(0.01), token(3600), "x" * 200_000
    huge = [token(3600, large=large, n=0 if repeats else n) for n in range(3)]
    answers = chain([first], huge, repeat(last))
    with recording() as events:
        connection = connect(lambda: next(answers))
        wait_until(lambda: updates(peer))
        wait_until(lambda: len(of_type(events, SecretUpdated)) == 2)
    assert updates(peer) == [last]
    told, taken = of_type(events, SecretUpdated)
    assert "more than fit into a frame" in str(told.error)
    assert taken.error is None
    assert connection.connected


def test_a_broker_that_ends_a_handshake_with_large_credentials_is_explained(make_peer):
    """RabbitMQ says nothing where a frame is larger than it takes before one is agreed."""

    def hang_up(_frame):
        peer.hang_up()
        return b""

    peer = make_peer(answers={"connection.start-ok": hang_up})
    with pytest.raises(ConnectionResetError, match=r"take 5,\d+ bytes.*initial_frame_max"):
        shake_hands(peer, "x" * 5000, connect_timeout=30.0)


def test_a_broker_that_is_silent_after_large_credentials_is_explained(make_peer):
    """RabbitMQ waits for eight seconds before it ends the connection; a user may wait less."""
    peer = make_peer(silent=["connection.start-ok"])
    with pytest.raises(TimeoutError, match=r"take 5,\d+ bytes.*initial_frame_max"):
        shake_hands(peer, "x" * 5000, connect_timeout=0.3)


def shake_hands(peer, password, **options):
    registry.register()
    with Connection(**parse_url(peer.url) | {"password": password}, **options) as connection:
        connection.connect()


def test_a_handshake_with_small_credentials_is_not_explained(make_peer):
    peer = make_peer(silent=["connection.start-ok"])
    with pytest.raises(TimeoutError) as raised:
        shake_hands(peer, "small", connect_timeout=0.1)
    assert "initial_frame_max" not in str(raised.value)


def test_credentials_that_no_frame_holds_are_refused_in_words(peer):
    with pytest.raises(amqp.AccessRefused, match=r"200,\d+ bytes.* more than fit into a frame"):
        shake_hands(peer, "x" * 200_000)
    assert "connection.start-ok" not in peer.names
