"""Getting into a Redis: passwords, TLS, unix sockets, and servers that cannot be used."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from kombu import Connection

from greenconsume import Runtime
from greenconsume.errors import BrokerRefusedError
from tests.integration.consumers import Recorder, consuming, green_connection
from tests.integration.redis.payloads import put
from tests.servers import HOST, MissingServerError, end, find_program, free_port, launch, missing
from tests.waiting import wait_until

Start = Callable[..., int]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a Redis with options of a test's own; returns its port."""
    with ExitStack() as stack:

        def started(*options: str) -> int:
            port = free_port()
            try:
                program = find_program("redis-server")
            except MissingServerError as exc:
                missing(exc)
            process = launch(
                program,
                *("--port", str(port), "--bind", HOST, "--dir", tmp_path, "--save", "", *options),
                log=tmp_path / "redis.out",
            )
            stack.callback(end, process)
            wait_until(lambda: _answers(port))
            return port

        yield started


def _answers(port: int) -> bool:
    with redis.Redis(HOST, port) as client:
        try:
            client.ping()
        except redis.exceptions.AuthenticationError:
            return True
        except redis.exceptions.ConnectionError:
            return False
    return True


def test_a_wrong_password_is_a_refusal_and_told_at_once(start, queue_name):
    port = start("--requirepass", "right")
    with pytest.raises(BrokerRefusedError):
        _run(f"redis://:wrong@{HOST}:{port}/0", queue_name)


def test_no_password_is_a_refusal_as_well(start, queue_name):
    port = start("--requirepass", "right")
    with pytest.raises(BrokerRefusedError):
        _run(f"redis://{HOST}:{port}/0", queue_name)


def test_the_right_password_opens(start, queue_name):
    port = start("--requirepass", "right")
    with consuming(consumer := Recorder(f"redis://:right@{HOST}:{port}/3", queue_name)):
        with redis.Redis(HOST, port, db=3, password="right") as server:
            put(server, queue_name, "x")
        assert consumer.wait_for(1) == ["x"]


def test_a_part_of_a_cluster_is_refused_with_a_reason(start, queue_name):
    port = start("--cluster-enabled", "yes")
    with pytest.raises(BrokerRefusedError, match="cluster"):
        _run(f"redis://{HOST}:{port}/0", queue_name)


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


def _run(url: str, queue: str) -> None:
    runtime = Runtime(url)
    runtime.spawn(lambda connection: Recorder(connection, queue))
    runtime.start()
