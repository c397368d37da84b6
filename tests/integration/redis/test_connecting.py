"""Getting into a Redis: passwords, TLS, unix sockets, and servers that cannot be used."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import redis
import trustme
from gevent.monkey import get_original
from gevent.server import StreamServer
from kombu import Connection, Consumer, Exchange, Producer, Queue

from greenconsume import Runtime
from greenconsume.errors import BrokerRefusedError
from greenconsume.events import PollingTransport
from greenconsume.redis.ledger import ACK_COUNT
from tests.integration.consumers import Inbox, Recorder, consuming, green_connection, observed
from tests.integration.redis.conftest import Start
from tests.integration.redis.payloads import put
from tests.servers import HOST, free_port
from tests.waiting import AT_ONCE, wait_until


def test_a_wrong_password_and_none_are_refusals_told_at_once_and_the_right_one_opens(
    start, queue_name
):
    port = start("--requirepass", "right")
    for login in (":wrong@", ""):
        with pytest.raises(BrokerRefusedError):
            _run(f"redis://{login}{HOST}:{port}/0", queue_name)
    with consuming(consumer := Recorder(f"redis://:right@{HOST}:{port}/3", queue_name)):
        with redis.Redis(HOST, port, db=3, password="right") as server:
            put(server, queue_name, "x")
        assert consumer.wait_for(1) == ["x"]


def test_a_part_of_a_cluster_is_refused_with_a_reason(start, queue_name):
    port = start("--cluster-enabled", "yes")
    with pytest.raises(BrokerRefusedError, match="cluster"):
        _run(f"redis://{HOST}:{port}/0", queue_name)


@pytest.mark.parametrize("command", ["CLIENT", "HELLO"])
def test_a_server_without_a_command_is_polled_and_that_is_said_once(start, queue_name, command):
    """Without HELLO there is the older protocol alone, as through some proxies."""
    url = f"redis://{HOST}:{start('--rename-command', command, '')}/0"
    options = {"polling_interval": 0.05}
    consumers = [
        Recorder(green_connection(url, transport_options=options), queue_name) for _ in "ab"
    ]
    with observed(PollingTransport) as told, consuming(*consumers):
        with green_connection(url) as connection:
            for n in range(5):
                Producer(connection).publish(n, routing_key=queue_name)
                wait_until(lambda n=n: sum(len(each.bodies) for each in consumers) == n + 1)
    assert [event.interval for event in told] == [0.05]
    assert "refuses CLIENT TRACKING" in told[0].transport


def test_who_asks_for_the_older_protocol_gets_it_without_an_error(start, queue_name):
    """A server or proxy without HELLO is then not found out by its error at each connect."""
    port = start()
    options = {"protocol": 2, "polling_interval": 0.05}
    url = f"redis://{HOST}:{port}/0"
    consumer = Recorder(green_connection(url, transport_options=options), queue_name)
    heard = Queue(f"{queue_name}.heard", Exchange(f"{queue_name}.said", "fanout"))
    listener = Recorder(green_connection(url, transport_options=options), heard)
    with observed(PollingTransport) as told, consuming(consumer, listener):
        with redis.Redis(HOST, port, protocol=2) as server:
            put(server, queue_name, "x")
            assert consumer.wait_for(1) == ["x"]
            with green_connection(url, transport_options=options) as connection:
                Producer(connection, heard.exchange).publish("heard")
            assert listener.wait_for(1) == ["heard"]
            assert "cmdstat_hello" not in server.info("commandstats")
    assert [event.interval for event in told] == [0.05]
    assert "protocol=2" in told[0].transport


@pytest.mark.parametrize("protocol", [1, 4, "two"])
def test_a_protocol_that_is_none_is_refused(protocol):
    connection = green_connection("redis://", transport_options={"protocol": protocol})
    with pytest.raises(ValueError, match="protocol must be 2 or 3"):
        connection.connect()


# What a Redis of some age answers to HELLO, and to INFO.
OLD_SERVERS = {
    "5.0": (
        b"-ERR unknown command `HELLO`, with args beginning with: `3`\r\n",
        b"redis_version:5.0.14\r\nredis_mode:standalone\r\n",
    ),
    "6.0": (
        b"%7\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$6\r\n6.0.16\r\n$5\r\nproto\r\n:3\r\n"
        b"$2\r\nid\r\n:7\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n$4\r\nrole\r\n$6\r\nmaster\r\n"
        b"$7\r\nmodules\r\n*0\r\n",
        b"redis_version:6.0.16\r\nredis_mode:standalone\r\n",
    ),
}


@pytest.fixture
def old_server(request: Any) -> Iterator[str]:
    """The address of a server that says of itself that it is of some age."""
    hello, info = OLD_SERVERS[request.param]

    def serve(sock: Any, _address: object) -> None:
        with sock, sock.makefile("rb") as asked:
            while line := asked.readline():
                words = [
                    asked.read(int(asked.readline()[1:]) + 2)[:-2] for _ in range(int(line[1:]))
                ]
                sock.sendall(answer(words[0].upper()))

    def answer(command: bytes) -> bytes:
        if command == b"HELLO":
            return hello
        return b"$%d\r\n%s\r\n" % (len(info), info) if command == b"INFO" else b"+OK\r\n"

    server = StreamServer((HOST, 0), serve)
    server.start()
    yield f"redis://{HOST}:{server.server_port}/0"
    server.stop(timeout=1.0)


@pytest.mark.parametrize("old_server", OLD_SERVERS, indirect=True)
def test_a_server_that_is_too_old_is_told_so(old_server, queue_name):
    with pytest.raises(BrokerRefusedError, match=r"version [56]\.0\.\d+: .* needs 6\.2 or later"):
        _run(old_server, queue_name)


def test_a_unix_socket_is_connected_to(start, queue_name, tmp_path):
    path = tmp_path / "redis.sock"
    start("--unixsocket", str(path))
    with consuming(consumer := Recorder(f"redis+socket://{path}?virtual_host=2", queue_name)):
        with redis.Redis(unix_socket_path=str(path), db=2) as server:
            put(server, queue_name, "x")
        assert consumer.wait_for(1) == ["x"]


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    return made


@pytest.fixture
def tls_port(start: Start, authority: trustme.CA, tmp_path: Path, request: Any) -> int:
    """The port of a Redis whose certificate is for one name."""
    certificate = authority.issue_cert(getattr(request, "param", "localhost"))
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(tmp_path / "cert.pem", append=True)
    port = free_port()
    start(
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *(
            "--tls-cert-file",
            str(tmp_path / "cert.pem"),
            "--tls-key-file",
            str(tmp_path / "key.pem"),
        ),
        *("--tls-ca-cert-file", str(tmp_path / "ca.pem")),
    )
    return port


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_tls_is_spoken_to_the_host_of_the_certificate(tls_port, queue_name, tmp_path, scheme):
    url = f"{scheme}://localhost:{tls_port}/0?ssl_ca_certs={tmp_path / 'ca.pem'}"
    with consuming(consumer := Recorder(url, queue_name, prefetch_count=30)):
        with green_connection(url) as connection:
            producer = connection.Producer()
            for n in range(100):
                producer.publish(n, routing_key=queue_name)
        assert sorted(consumer.wait_for(100)) == list(range(100))


@pytest.mark.parametrize("tls_port", ["another.example"], indirect=True)
def test_a_certificate_of_another_host_is_not_taken(tls_port, tmp_path):
    """HAZARDS row 41's kin."""
    url = f"rediss://localhost:{tls_port}/0?ssl_ca_certs={tmp_path / 'ca.pem'}"
    with pytest.raises(Connection(url).connection_errors, match="localhost"):
        green_connection(url).connect()


def test_a_certificate_that_nobody_vouches_for_is_not_taken(tls_port):
    """kombu's `rediss://` takes any."""
    with pytest.raises(
        Connection("rediss://").connection_errors, match="certificate verify failed"
    ):
        green_connection(f"rediss://localhost:{tls_port}/0").connect()


def test_who_says_so_twice_takes_any(tls_port):
    options = {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}
    with green_connection(f"rediss://localhost:{tls_port}/0", ssl=options) as connection:
        assert connection.connect() is not None


def test_acks_reach_the_server_though_the_hub_has_no_turn_over_tls_too(
    tls_port, queue_name, tmp_path
):
    """Whoever was killed in a long turn had handled a whole prefetch that was not acknowledged."""
    url = f"rediss://localhost:{tls_port}/0?ssl_ca_certs={tmp_path / 'ca.pem'}"
    with green_connection(url) as connection:
        server = connection.default_channel.client
        port = server.info("server")["tcp_port"]
        put(server, queue_name, *range(ACK_COUNT))
        inbox = Inbox(connection, ack=False)
        with Consumer(connection, [Queue(queue_name)], callbacks=[inbox], prefetch_count=100):
            inbox.drain(ACK_COUNT)
            for message in inbox.messages:
                message.ack()
            _keep_the_hub_until(lambda: _held_count(port) == 0)


def _keep_the_hub_until(predicate: Callable[[], bool]) -> None:
    deadline = monotonic() + AT_ONCE
    while not predicate():
        assert monotonic() < deadline
        get_original("time", "sleep")(0.01)


def _held_count(port: int) -> int:
    with get_original("socket", "socket")() as plain:
        plain.connect((HOST, port))
        plain.sendall(b"HLEN unacked\r\n")
        return int(plain.recv(100).strip(b":\r\n"))


def _run(url: str, queue: str) -> None:
    runtime = Runtime(url)
    runtime.spawn(lambda connection: Recorder(connection, queue))
    runtime.start()
