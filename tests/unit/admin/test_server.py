"""Tests the admin as a server: real sockets, and clients that mean no good."""

from __future__ import annotations

import os
import socket
import stat

import pytest

from greenconsume.admin import server as servers
from greenconsume.admin.address import AddressError
from greenconsume.admin.server import Server
from greenconsume.events import AdminListening
from tests.unit.admin.fakes import TOKEN, FakeProcess
from tests.unit.fakes import of_type
from tests.waiting import wait_until


@pytest.fixture
def serve():
    started = []

    def start(where="127.0.0.1:0", token=None):
        server = Server(FakeProcess(), where, token)
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def connect(server):
    address = server.address
    if address.is_unix:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.path)
    else:
        sock = socket.create_connection((address.host, address.port))
    sock.settimeout(10)
    return sock


def answer(sock):
    with sock:
        received = b""
        while data := sock.recv(65536):
            received += data
    return received


def request(server, text):
    sock = connect(server)
    sock.sendall(text.replace("\n", "\r\n").encode())
    return answer(sock)


def get(server, path, host=None):
    host = host or str(server.address)
    return request(server, f"GET {path} HTTP/1.1\nHost: {host}\n\n")


def test_it_answers_on_loopback_and_says_where(serve, events):
    server = serve()
    assert get(server, "/livez").startswith(b"HTTP/1.1 200 OK")
    assert of_type(events, AdminListening)[0].address == f"127.0.0.1:{server.address.port}"


def test_a_unix_socket_is_its_owners_alone_and_goes_with_the_server(serve, tmp_path):
    path = tmp_path / "shop.sock"
    server = serve(f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    body = '{"consumer": "Orders-1"}'
    head = f"POST /pause HTTP/1.1\nContent-Type: application/json\nContent-Length: {len(body)}\n\n"
    assert b"202 Accepted" in request(server, head + body)
    server.stop()
    assert not path.exists()


def test_a_socket_that_a_dead_process_left_is_replaced_and_a_living_ones_is_not(serve, tmp_path):
    path = str(tmp_path / "shop.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    serve(f"unix:{path}")
    with pytest.raises(AddressError, match="another process listens there"):
        serve(f"unix:{path}")


def test_a_file_is_never_taken_for_an_old_socket(serve, tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(AddressError, match="a file of that name"):
        serve(f"unix:{path}")
    assert path.read_text() == "data"


def test_a_port_that_is_taken_is_told(serve):
    first = serve()
    with pytest.raises(AddressError, match="Address already in use"):
        serve(str(first.address))


def test_other_addresses_are_refused_without_a_token():
    with pytest.raises(AddressError, match="set an admin token"):
        Server(FakeProcess(), "0.0.0.0:0")
    Server(FakeProcess(), "0.0.0.0:0", TOKEN)


def test_a_rebound_name_and_a_foreign_page_are_refused(serve):
    server = serve()
    assert b"421 Misdirected" in get(server, "/status.json", host="evil.example:80")
    foreign = f"GET / HTTP/1.1\nHost: {server.address}\nOrigin: https://evil.example\n\n"
    assert b"403 Forbidden" in request(server, foreign)


def test_a_connection_ends_after_its_answer(serve):
    server = serve()
    twice = f"GET /livez HTTP/1.1\nHost: {server.address}\n\n" * 2
    assert request(server, twice).count(b"HTTP/1.1 200 OK") == 1


def test_a_client_that_dawdles_is_dropped_at_its_deadline(serve, monkeypatch):
    monkeypatch.setattr(servers, "CONNECTION_SECONDS", 0.05)
    server = serve(token=TOKEN)
    for sent in (
        "",
        "GET /liv",
        "GET / HTTP/1.1\nHost: 127.0.0.1\nX-A: ",
        f"POST /pause HTTP/1.1\nHost: {server.address}\nAuthorization: Bearer {TOKEN}\n"
        'Content-Type: application/json\nContent-Length: 100\n\n{"consumer"',
    ):
        reply = request(server, sent)
        assert not reply or b"400 Bad Request" in reply or b"500" in reply
    assert get(server, "/livez")  # the others are served


def test_a_thousand_idle_connections_keep_nobody_out(serve):
    server = serve()
    idle = [connect(server) for _ in range(300)]
    try:
        assert b"200 OK" in get(server, "/livez")
        wait_until(lambda: len(server._server._open) <= servers.MAX_CONNECTIONS)
    finally:
        for sock in idle:
            sock.close()


def test_long_heads_are_refused(serve):
    server = serve()
    assert b"414" in get(server, "/" + "a" * 10_000)
    many = "".join(f"X-{number}: a\n" for number in range(200))
    reply = request(server, f"GET / HTTP/1.1\nHost: {server.address}\n{many}\n")
    assert b" 200 " not in reply


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/..%2f..%2fetc/passwd", "/%00", "*", "//a"])
def test_no_path_leads_out(serve, path):
    assert b"404 Not Found" in get(serve(), path)


def test_what_is_no_http_ends_the_connection_and_nothing_else(serve):
    server = serve()
    for sent in ("\x00\x01\x02\n\n", "GET\n\n", "GET / HTTP/9.9\n\n", "AMQP\x00\x00\x09\x01\n\n"):
        assert b" 200 " not in request(server, sent)
    assert b"200 OK" in get(server, "/livez")


def test_a_stop_drops_what_is_open(serve):
    server = serve()
    sock = connect(server)
    wait_until(lambda: server._server._open)
    server.stop()
    assert answer(sock) == b""
    server.stop()


def test_a_fork_leaves_the_socket_to_its_parent(serve, tmp_path):
    path = tmp_path / "shop.sock"
    server = serve(f"unix:{path}")
    server._pid = os.getpid() + 1  # as if this were the child
    server.stop()
    assert path.exists()
