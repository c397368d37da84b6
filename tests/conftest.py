"""Owns the fixtures: brokers, proxies and peers that a test is lent, and the leak check.

Brokers start when the first test asks for one and serve the whole run; each test has a virtual
host or a database of its own. The suite runs patched: python -m gevent.monkey --module pytest.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any
from uuid import uuid4

import pytest
from gevent import monkey

from greenconsume.links import backoff, dialer
from tests.brokers import RELEASE_VARIABLE, RabbitMQ, chosen_release, fresh_vhost, vhost_of
from tests.leaks import LeakWatch
from tests.peer import Peer
from tests.proxy import Proxy
from tests.redis_server import INSTALLED, PROGRAMS, RedisServer, RedisServers
from tests.servers import HOST, MissingServerError, missing, need_patched
from tests.waiting import NEVER

AMQP_URL_VARIABLE = "GREENCONSUME_TEST_AMQP_URL"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaks_ok(reason): what outlives this test is not checked")


def pytest_report_header() -> list[str]:
    patched = "patched" if monkey.is_module_patched("socket") else "not patched"
    return [f"gevent: {patched}", f"RabbitMQ: {chosen_release()} (see {RELEASE_VARIABLE})"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked = metafunc.definition.get_closest_marker("every_redis")
    if marked and "redis_server" in metafunc.fixturenames:
        metafunc.parametrize("redis_server", list(PROGRAMS), indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "private_rabbitmq" in names:
            item.add_marker("rabbitmq")
        if "redis_servers" in names:
            item.add_marker("redis")


@pytest.fixture
def long_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait longer after a failed attempt to connect than any test lives."""
    monkeypatch.setattr(backoff, "FIRST_DELAY", NEVER)


@pytest.fixture
def every_link_has_lived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dial again at once after each loss, as after that of a link which has lived for a while."""
    monkeypatch.setattr(dialer, "MIN_LIFE", 0.0)


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test if a greenlet, socket or thread outlives it."""
    if request.node.get_closest_marker("leaks_ok"):
        yield
        return
    watch = LeakWatch()
    yield
    watch.verify()


@pytest.fixture(scope="session")
def private_rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ | None]:
    """The RabbitMQ of this run; ``None`` if one is given to use instead."""
    need_patched()
    if AMQP_URL_VARIABLE in os.environ:
        yield None
        return
    try:
        broker = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"), chosen_release())
    except MissingServerError as exc:
        missing(exc)
    with closing(broker):
        broker.start()
        yield broker


@pytest.fixture
def rabbitmq(private_rabbitmq: RabbitMQ | None) -> RabbitMQ:
    """The private RabbitMQ, to ask; skips the test if a broker is given. See `rabbitmq_fault`."""
    if private_rabbitmq is None:
        pytest.skip(f"needs a private broker, not {AMQP_URL_VARIABLE}")
    return private_rabbitmq


@pytest.fixture
def amqp_url(private_rabbitmq: RabbitMQ | None) -> Iterator[str]:
    """The address of a fresh virtual host; the only one there is, on a broker that was given."""
    if private_rabbitmq is None:
        yield os.environ[AMQP_URL_VARIABLE]
        return
    with fresh_vhost(private_rabbitmq) as vhost:
        yield private_rabbitmq.url(vhost)


@pytest.fixture
def amqps_url(rabbitmq: RabbitMQ, amqp_url: str) -> str:
    """The TLS address of the virtual host of `amqp_url`; see `tests.brokers.client_tls`."""
    return rabbitmq.tls_url(vhost_of(amqp_url))


@pytest.fixture
def rabbitmq_fault(rabbitmq: RabbitMQ, amqp_url: str) -> Iterator[RabbitMQ]:
    """The broker of `amqp_url` to stop, kill, pause or block; afterwards it serves again."""
    rabbitmq.recover()
    yield rabbitmq
    rabbitmq.recover()


@pytest.fixture
def queue_name() -> str:
    """A queue name that no other test has, for a broker that was given has one virtual host."""
    return f"greenconsume-{uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def redis_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServers]:
    """The private Redis servers of this run. Use `redis_url` for an address."""
    need_patched()
    with closing(RedisServers(tmp_path_factory.mktemp)) as servers:
        yield servers


@pytest.fixture
def redis_server(request: pytest.FixtureRequest, redis_servers: RedisServers) -> RedisServer:
    """The installed Redis; with the marker ``every_redis`` once each: it, Redis 8 and Valkey 8."""
    try:
        return redis_servers.get(getattr(request, "param", INSTALLED))
    except MissingServerError as exc:
        missing(exc)


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The address of an empty database."""
    return redis_server.url(redis_server.fresh_database())


@pytest.fixture
def make_proxy() -> Iterator[Callable[[str], Proxy]]:
    """Make a fault proxy before the server of a URL; its own `url` leads through it."""
    need_patched()
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(closing(Proxy(url)))


@pytest.fixture
def proxy(make_proxy: Callable[[str], Proxy], amqp_url: str) -> Proxy:
    """A fault proxy before RabbitMQ; `proxy.url` has the virtual host of `amqp_url`."""
    return make_proxy(amqp_url)


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    """Make a scripted AMQP peer with options; bytes that are no frame fail the test at its end."""
    need_patched()
    peers: list[Peer] = []

    def make(**options: Any) -> Peer:
        peers.append(Peer(**options))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()
    assert [error for peer in peers for error in peer.errors] == []


@pytest.fixture
def peer(make_peer: Callable[..., Peer]) -> Peer:
    """A scripted AMQP peer without options."""
    return make_peer()


@pytest.fixture
def black_hole_url() -> Iterator[str]:
    """An AMQP address on loopback to which a connect is never answered, nor refused."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((HOST, 0))
        listener.listen(0)
        # Nobody accepts: these fill the queue, and the kernel drops every further SYN.
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"amqp://guest:guest@{HOST}:{listener.getsockname()[1]}//"
