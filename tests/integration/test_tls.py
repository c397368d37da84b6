"""TLS: consuming and publishing through it, what it refuses, and its ends."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from typing import Any

import gevent
import pytest
import trustme
from amqp import RecoverableConnectionError
from gevent.event import Event
from gevent.server import StreamServer
from kombu import Connection, Consumer, Producer, Queue

from greenconsume import Runtime, spawn
from greenconsume.events import ConnectFailed, LinkDown
from tests.brokers import client_tls
from tests.integration.consumers import SOON, Recorder, consuming, green_connection, observed
from tests.messages import publish
from tests.servers import HOST
from tests.waiting import AT_ONCE, NEVER, wait_until

STRANGER = "broker.example.org"


@pytest.fixture
def tls(rabbitmq) -> dict[str, Any]:
    return client_tls(rabbitmq)


def test_many_consumers_share_a_link_with_tls(rabbitmq, amqps_url, amqp_url, queue_name, tls):
    options = {"close_timeout": NEVER}
    runtime = Runtime(green_connection(amqps_url, ssl=tls, transport_options=options))
    children = runtime.spawn(partial(Recorder, queue=queue_name), replicas=20)
    with runtime:
        publish(amqp_url, queue_name, 1000)
        wait_until(lambda: sum(len(c.consumer.bodies) for c in children) == 1000, SOON)
        assert rabbitmq.connection_count(amqp_url) == 1
        began = monotonic()
        runtime.stop()
        assert runtime.join(SOON)
        assert monotonic() - began < AT_ONCE


def test_large_messages_pass_both_ways_at_once(amqps_url, queue_name, tls):
    bodies = [bytes([n]) * 3_000_000 for n in range(10)]
    got: list[bytes] = []

    def receive(body: Any, message: Any) -> None:
        got.append(bytes(body))
        message.ack()

    with green_connection(amqps_url, ssl=tls) as connection:
        producer = Producer(connection.channel())
        queue = Queue(queue_name, durable=False)(connection.channel())
        queue.declare()
        with Consumer(connection.channel(), [queue], callbacks=[receive], prefetch_count=2):
            sending = [
                gevent.spawn(producer.publish, body, routing_key=queue_name) for body in bodies
            ]
            while len(got) < len(bodies):
                connection.drain_events(timeout=SOON)
            gevent.joinall(sending, raise_error=True)
    assert sorted(got) == bodies


def test_a_certificate_of_an_unknown_authority_is_refused(amqps_url, tmp_path, tls):
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    options = tls | {"ca_certs": str(tmp_path / "other.pem")}
    with green_connection(amqps_url, ssl=options) as connection:
        with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
            connection.transport.establish_connection()


def test_a_certificate_for_another_name_is_refused(amqps_url, tls):
    with green_connection(amqps_url, ssl=tls | {"server_hostname": "example.org"}) as connection:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"example\.org"):
            connection.transport.establish_connection()


# -- the name in the certificate ------------------------------------------------------------------


@pytest.fixture
def trusting(rabbitmq) -> dict[str, Any]:
    """Trusts the broker's authority, and says nothing of names."""
    return {"ca_certs": str(rabbitmq.ca_path)}


@pytest.fixture
def stranger_url(amqps_url, tmp_path, monkeypatch) -> str:
    """The broker by a name of this machine that its certificate does not have."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **kw: resolve(HOST if host == STRANGER else host, *args, **kw),
    )
    return amqps_url.replace("localhost", STRANGER)


@pytest.mark.parametrize(
    "options", [{}, {"server_hostname": None}, {"cert_reqs": ssl.CERT_REQUIRED}]
)
def test_a_trusted_certificate_of_another_host_is_refused_in_words(
    rabbitmq, stranger_url, trusting, options
):
    """It is given no password."""
    with green_connection(stranger_url, ssl=trusting | options) as connection:
        with pytest.raises(ssl.SSLCertVerificationError) as refused:
            connection.transport.establish_connection()
    words = str(refused.value)
    assert f"is for localhost, {HOST}, and {STRANGER} was expected" in words
    assert "check_hostname" in words


@pytest.mark.parametrize("named", ["localhost", HOST])
def test_a_certificate_of_the_brokers_name_is_taken(amqps_url, trusting, named):
    url = amqps_url.replace("localhost", named)
    with green_connection(url, ssl=trusting) as connection:
        for _ in range(2):  # kombu takes localhost for an address, the second time
            connection.transport.dial().close()


@pytest.mark.parametrize(
    "options",
    [
        {"check_hostname": False},
        {"check_hostname": False, "server_hostname": "sni.example.org"},
        {"server_hostname": "localhost"},
        {"cert_reqs": ssl.CERT_NONE},
    ],
)
def test_who_says_so_takes_any_name_or_expects_another(stranger_url, trusting, options):
    with green_connection(stranger_url, ssl=trusting | options) as connection:
        connection.transport.dial().close()


def test_a_context_of_options_verifies_names_as_well(stranger_url, amqps_url, rabbitmq):
    options = {"context": {"cafile": str(rabbitmq.ca_path)}}
    with green_connection(stranger_url, ssl=options) as connection:
        with pytest.raises(ssl.SSLCertVerificationError, match=STRANGER):
            connection.transport.dial()
    for taken in (
        {"check_hostname": False},
        {"context": options["context"] | {"check_hostname": False}},
    ):
        with green_connection(stranger_url, ssl=options | taken) as connection:
            connection.transport.dial().close()


def test_each_url_that_is_failed_over_to_has_its_own_name(
    stranger_url, amqps_url, trusting, queue_name
):
    """One of them is a stranger's; the other is used."""
    consumer = Recorder(green_connection(f"{stranger_url};{amqps_url}", ssl=trusting), queue_name)
    with observed(ConnectFailed) as failures, consuming(consumer):
        wait_until(lambda: failures, SOON)
    assert all(STRANGER in str(failure.error) for failure in failures)
    assert failures


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
def test_the_other_kind_of_port_is_a_failure_to_connect(rabbitmq, queue_name, scheme):
    url = rabbitmq.tls_url("/") if scheme == "amqp" else rabbitmq.url("/")
    consumer = Recorder(f"{scheme}://{url.partition('://')[2]}", queue_name)
    with observed(ConnectFailed) as failures:
        greenlet = spawn(consumer)
        wait_until(lambda: failures, SOON)
        greenlet.stop()
        assert greenlet.join(30)
    assert isinstance(failures[0].error, OSError)
    assert not failures[0].refused


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port that accepts, and never says a word."""
    accepted: list[Any] = []
    over = Event()

    def serve(sock: Any, address: object) -> None:
        accepted.append(sock)
        over.wait()
        sock.close()

    server = StreamServer((HOST, 0), serve)
    server.start()
    yield server.server_port
    over.set()
    server.stop()


def test_a_stop_in_the_handshake_ends_it(mute_port, queue_name):
    """HAZARDS row 3."""
    url = f"amqps://guest:guest@{HOST}:{mute_port}//"
    greenlet = spawn(Recorder(green_connection(url, connect_timeout=NEVER), queue_name))
    assert not greenlet.join(0.2)
    greenlet.stop()
    began = monotonic()
    assert greenlet.join(SOON)
    assert monotonic() - began < AT_ONCE


def test_a_handshake_that_gets_no_answer_times_out(mute_port):
    url = f"amqps://guest:guest@{HOST}:{mute_port}//"
    with green_connection(url, connect_timeout=0.2) as connection:
        began = monotonic()
        with pytest.raises(OSError, match="timed out"):
            connection.transport.establish_connection()
        assert monotonic() - began < AT_ONCE


class Remembering(Recorder):
    """Knows the link that it consumes over."""

    def on_consume_ready(self, connection: Any, *args: Any, **kwargs: Any) -> None:
        self.link = connection.connection.link


@pytest.mark.parametrize("fault", ["cut", "truncate", "give up"])
def test_the_loss_of_a_link_with_tls_is_met_as_any(
    make_proxy, amqps_url, amqp_url, queue_name, tls, capfd, fault
):
    proxy = make_proxy(amqps_url)
    consumer = Remembering(green_connection(proxy.url, ssl=tls), queue_name)
    with observed(LinkDown) as lost, consuming(consumer):
        if fault == "cut":
            proxy.cut()
        elif fault == "truncate":
            proxy.truncate_at(50)
        else:
            consumer.link.fail(ConnectionResetError("no heartbeat, say"))
        publish(amqp_url, queue_name, ["after"])
        assert consumer.wait_for(1) == ["after"]
    assert len(lost) == 1
    assert "Traceback" not in capfd.readouterr().err


def error_of(action: Callable[..., object], *args: Any, **kwargs: Any) -> Exception | None:
    try:
        action(*args, **kwargs)
    except Exception as exc:  # whatever it is, the test looks at it
        return exc
    return None


@pytest.mark.parametrize("end", ["fail", "close"])
def test_a_link_ends_while_its_writer_waits_for_the_broker(
    make_proxy, amqps_url, tls, capfd, queue_name, end
):
    """What waits in the TLS layer is let go without a word on stderr."""
    proxy = make_proxy(amqps_url)
    options = {"close_timeout": 0.2}
    connection = green_connection(proxy.url, ssl=tls, transport_options=options)
    producer = Producer(connection.channel())
    proxy.stall("to_server")
    producer.publish(b"x" * 10_000_000, routing_key=queue_name)
    waiting = gevent.spawn(error_of, producer.publish, b"more", routing_key=queue_name)
    waiting.join(0.05)
    assert not waiting.ready()
    if end == "fail":
        connection.connection.link.fail(ConnectionResetError("no heartbeat, say"))
    began = monotonic()
    connection.release()
    assert monotonic() - began < AT_ONCE
    proxy.resume()
    wait_until(lambda: proxy.open_count == 0)
    assert isinstance(waiting.get(timeout=SOON), RecoverableConnectionError)
    assert "Traceback" not in capfd.readouterr().err


def test_a_link_with_tls_closes_in_order(rabbitmq, amqps_url, amqp_url, tls):
    options = {"close_timeout": NEVER}
    with Connection(amqps_url, ssl=tls, transport_options=options) as connection:
        connection.connect()
        assert connection.connection.transport.sock.version().startswith("TLSv1")
        assert rabbitmq.connection_count(amqp_url) == 1
        began = monotonic()
    assert monotonic() - began < AT_ONCE
    wait_until(lambda: rabbitmq.connection_count(amqp_url) == 0)
