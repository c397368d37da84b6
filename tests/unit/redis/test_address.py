"""Tests where a server is, as a URL says it, and what is verified of it."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
from kombu import Connection
from redis.connection import Connection as TCP
from redis.connection import SSLConnection, UnixDomainSocketConnection

from greenconsume.redis import address
from greenconsume.redis.address import database_of, dialler_of, sentinel_dialler_of
from greenconsume.transports import registry


@pytest.fixture(autouse=True)
def registered() -> None:
    registry.register()


def dialled(url: str, **options: Any) -> Any:
    """A redis-py connection, not connected."""
    return Connection(url, **options).transport.dialler()(3)


def test_a_plain_url_is_tcp():
    made = dialled("redis://user:secret@box:6380/5")
    assert type(made) is TCP
    assert (made.host, made.port, made.db) == ("box", 6380, 5)
    assert (made.username, made.password) == ("user", "secret")


def test_a_url_without_anything_is_the_local_server():
    made = dialled("redis://")
    assert (made.host, made.port, made.db) == ("127.0.0.1", 6379, 0)


def test_a_unix_socket_is_a_path():
    made = dialled("redis+socket:///tmp/redis.sock?virtual_host=4")
    assert type(made) is UnixDomainSocketConnection
    assert (made.path, made.db) == ("/tmp/redis.sock", 4)


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_host_names_are_verified_by_default(scheme):
    """HAZARDS row 41's kin: kombu's rediss:// verifies nothing unless it is told to."""
    made = dialled(f"{scheme}://box")
    assert type(made) is SSLConnection
    assert made.cert_reqs == ssl.CERT_REQUIRED
    assert made.check_hostname


def test_a_clone_verifies_as_well():
    client = Connection("rediss://box").clone()
    made = dialler_of(client, client.transport_options)(3)
    assert made.cert_reqs == ssl.CERT_REQUIRED


def test_who_means_it_can_do_without():
    made = dialled("rediss://box?ssl_cert_reqs=none&ssl_check_hostname=false")
    assert made.cert_reqs == ssl.CERT_NONE
    assert not made.check_hostname


def test_a_certificate_of_ones_own_is_passed_on():
    made = dialled("rediss://box?ssl_ca_certs=/etc/ca.pem&ssl_cert_reqs=required")
    assert made.ca_certs == "/etc/ca.pem"
    assert made.check_hostname


def test_a_database_that_is_none_is_refused():
    with pytest.raises(ValueError, match="not orders"):
        database_of(Connection("redis://box", virtual_host="orders"))


def test_a_sentinel_needs_the_name_of_its_master():
    client = Connection("sentinel://box:26379")
    with pytest.raises(ValueError, match="master_name"):
        sentinel_dialler_of(client, {})


@pytest.mark.parametrize(
    ("url", "nodes"),
    [
        ("sentinel://one", [("one", 26379)]),
        ("sentinel://one/3", [("one", 26379)]),
        ("sentinel://one:5000/3", [("one", 5000)]),
        ("sentinel://one;sentinel://two:5000", [("one", 26379), ("two", 5000)]),
        ("sentinel://one:1/0;sentinel://two:2/0", [("one", 1), ("two", 2)]),
    ],
)
def test_sentinels_are_where_kombu_looks_for_them(url, nodes, monkeypatch):
    """kombu's default port is 26379, for each of them."""
    asked: list[Any] = []

    class Sentinel:
        sentinels = ()

        def __init__(self, nodes: Any, **options: Any) -> None:
            asked.extend(nodes)

        def discover_master(self, name: str) -> tuple[str, int]:
            return f"{name}.example", 6379

    monkeypatch.setattr(address, "_Sentinel", Sentinel)
    made = dialled(url, transport_options={"master_name": "main"})
    assert asked == nodes
    assert (made.host, made.port) == ("main.example", 6379)
