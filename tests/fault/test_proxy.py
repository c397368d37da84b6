"""The fault proxy, held against plain sockets; once through a real broker."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from time import monotonic

import gevent
import pytest
from gevent.event import Event
from gevent.server import StreamServer
from kombu.utils.url import parse_url

from tests.messages import publish, queue_depth, stock_connection
from tests.proxy import Proxy
from tests.servers import HOST
from tests.waiting import wait_until


class Echo:
    """A server that sends back what it gets, and remembers how its connections ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self._server = StreamServer((HOST, 0), self._serve)
        self._server.start()
        self.url = f"amqp://{HOST}:{self._server.server_port}//"

    def _serve(self, sock: socket.socket, address: object) -> None:
        try:
            while data := sock.recv(65536):
                sock.sendall(data)
            self.ended.append("closed")
        except ConnectionResetError:
            self.ended.append("reset")

    def close(self) -> None:
        self._server.stop()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def echo_proxy(make_proxy, echo) -> Proxy:
    return make_proxy(echo.url)


@pytest.fixture
def client(echo_proxy) -> Iterator[socket.socket]:
    with connect(echo_proxy) as sock:
        sock.settimeout(2)
        yield sock


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), 2)


def asked(sock: socket.socket, data: bytes) -> bytes:
    sock.sendall(data)
    received = b""
    while len(received) < len(data):
        received += sock.recv(65536)
    return received


def nothing_comes(sock: socket.socket) -> bool:
    sock.settimeout(0.1)
    try:
        return sock.recv(1) is None
    except TimeoutError:
        return True
    finally:
        sock.settimeout(2)


def test_forwards_and_counts(echo_proxy, client, echo):
    assert asked(client, b"hello") == b"hello"
    assert (echo_proxy.bytes_to_server, echo_proxy.bytes_to_client) == (5, 5)
    assert (echo_proxy.connection_count, echo_proxy.open_count) == (1, 1)
    client.close()
    wait_until(lambda: echo.ended == ["closed"] and echo_proxy.open_count == 0)


def test_a_megabyte_passes_both_ways_at_once(client):
    body = bytes(1_000_000)
    sender = gevent.spawn(client.sendall, body)
    received = 0
    while received < len(body):
        received += len(client.recv(65536))
    sender.join()
    assert received == len(body)


def test_cut_resets_both_sides(echo_proxy, client, echo):
    assert asked(client, b"hello") == b"hello"
    echo_proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_until(lambda: echo.ended == ["reset"])
    assert echo_proxy.open_count == 0


def test_refuse_and_accept_leave_open_connections_alone(echo_proxy, client):
    assert asked(client, b"hello") == b"hello"
    echo_proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(echo_proxy)
    assert asked(client, b"still") == b"still"
    echo_proxy.accept()
    with connect(echo_proxy) as another:
        assert asked(another, b"again") == b"again"


def test_stall_holds_bytes_up_until_resume(echo_proxy, client):
    echo_proxy.stall()
    client.sendall(b"hello")
    assert nothing_comes(client)
    assert echo_proxy.bytes_to_server == 0
    echo_proxy.resume()
    assert client.recv(100) == b"hello"


def test_stall_in_one_direction_lets_the_other_flow(echo_proxy, client):
    echo_proxy.stall("to_client")
    client.sendall(b"hello")
    assert nothing_comes(client)
    assert (echo_proxy.bytes_to_server, echo_proxy.bytes_to_client) == (5, 0)
    echo_proxy.resume()
    assert client.recv(100) == b"hello"


def test_a_stalled_connection_blocks_its_writer_at_last(echo_proxy, client):
    echo_proxy.stall("to_server")
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.sendall(bytes(50_000_000))
    echo_proxy.cut()
    assert echo_proxy.open_count == 0


def test_half_open_is_silent_for_the_client(echo_proxy, client, echo):
    assert asked(client, b"hello") == b"hello"
    echo_proxy.half_open()
    wait_until(lambda: echo.ended == ["closed"])
    client.sendall(b"anybody there?")
    assert nothing_comes(client)
    assert echo_proxy.open_count == 1
    client.close()
    wait_until(lambda: echo_proxy.open_count == 0)


def test_latency_holds_back_each_way(echo_proxy, client):
    echo_proxy.latency(0.05)
    start = monotonic()
    assert asked(client, b"hello") == b"hello"
    assert monotonic() - start >= 0.1


@pytest.mark.parametrize("byte_count", [0, 1, 7, 19, 20])
def test_truncate_cuts_a_reply_at_the_byte(echo_proxy, client, byte_count):
    echo_proxy.truncate_at(byte_count)
    client.sendall(b"x" * 20)
    received = b""
    while data := client.recv(100):
        received += data
    assert received == b"x" * byte_count
    with connect(echo_proxy) as another:
        assert asked(another, b"y" * 30) == b"y" * 30


def test_close_drops_clients_whose_server_never_answers(make_proxy, black_hole_url):
    proxy = make_proxy(black_hole_url)
    with connect(proxy) as client:
        wait_until(lambda: proxy.connection_count == 1)
        proxy.close()
        assert client.recv(1) == b""


def test_a_black_hole_lets_a_connect_hang(black_hole_url):
    parts = parse_url(black_hole_url)
    for _ in range(3):
        start = monotonic()
        with pytest.raises(TimeoutError):
            socket.create_connection((parts["hostname"], parts["port"]), 0.2)
        assert monotonic() - start >= 0.2


def test_the_url_leads_to_the_same_virtual_host(proxy, amqp_url, queue_name):
    assert proxy.url != amqp_url
    assert publish(proxy.url, queue_name, ["through the proxy"]) == 1
    assert queue_depth(amqp_url, queue_name) == 1
    assert (proxy.connection_count, proxy.open_count) == (1, 0)


def test_a_cut_reaches_a_client_that_waits_for_messages(proxy):
    waiting = Event()

    def wait_for_messages() -> None:
        connection = stock_connection(proxy.url)
        connection.connect()
        waiting.set()
        try:
            connection.drain_events()
        finally:
            connection.collect()

    greenlet = gevent.spawn(wait_for_messages)
    waiting.wait(30)
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        greenlet.get(timeout=30)


def test_redis_is_reached_through_a_proxy(make_proxy, redis_url):
    proxy = make_proxy(redis_url)
    with connect(proxy) as client:
        client.sendall(b"PING\r\n")
        assert client.recv(100) == b"+PONG\r\n"
    assert proxy.url.rpartition("/")[2] == redis_url.rpartition("/")[2]
