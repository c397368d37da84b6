"""Which transports a consumer may use, and kombu's own interface over the green memory transport."""

from __future__ import annotations

import gc
import multiprocessing.util
import runpy
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from amqp.exceptions import RecoverableConnectionError
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu import transport as kombu_transport
from kombu.transport import memory as kombu_memory
from kombu.transport import virtual

from greenconsume.errors import UnsupportedTransportError
from greenconsume.events import Event, PollingTransport, subscribe
from greenconsume.transports import memory, registry

GREEN = {
    "amqp": "greenconsume.amqp.transport:Transport",
    "amqps": "greenconsume.amqp.transport:SSLTransport",
    "pyamqp": "greenconsume.amqp.transport:Transport",
    "memory": "greenconsume.transports.memory:Transport",
}
KOMBUS = {
    "amqp": "kombu.transport.pyamqp:Transport",
    "amqps": "kombu.transport.pyamqp:SSLTransport",
    "pyamqp": "kombu.transport.pyamqp:Transport",
    "memory": "kombu.transport.memory:Transport",
}

Connect = Callable[[], Connection]


@pytest.fixture
def aliases(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """kombu's names for transports as kombu has them; afterwards they are as they were."""
    newest = {"gcpubsub": "kombu.transport.gcpubsub:Transport"}  # not in kombu 5.4 yet
    fresh = {**newest, **kombu_transport.TRANSPORT_ALIASES, **KOMBUS}
    cache: dict[str, type] = {}
    for module in kombu_transport, registry:
        monkeypatch.setattr(module, "TRANSPORT_ALIASES", fresh)
        monkeypatch.setattr(module, "_transport_cache", cache)
    return fresh


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Event]]:
    """Collect the events of a process that has told of no transport yet."""
    monkeypatch.setattr(registry, "_announced", set())
    events: list[Event] = []
    unsubscribe = subscribe(events.append)
    yield events
    unsubscribe()


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Make connections to an empty memory broker; they are closed afterwards."""
    registry.register()
    made: list[Connection] = []

    def make() -> Connection:
        made.append(Connection("memory://"))
        return made[-1]

    yield make
    for connection in made:
        connection.release()
    memory.Channel.queues.clear()
    memory.Transport.global_state.clear()


def keep(message: Any) -> None:
    """Do not settle it."""


def bodies_in(connection: Connection, queue: str = "q") -> list[str]:
    taken = iter(lambda: connection.default_channel.basic_get(queue, no_ack=True), None)
    return [message.body.decode() for message in taken]


def publish(connection: Connection, body: str, queue: str = "q") -> None:
    Producer(connection).publish(body, routing_key=queue, content_type="text/plain")


def test_importing_changes_nothing_in_kombu(aliases: dict[str, str]) -> None:
    """Law 8: whoever imports the package without using it keeps kombu as it was."""
    before = dict(aliases)
    for module in registry, memory:
        runpy.run_path(module.__file__)
    assert aliases == before


def test_register_puts_the_green_transports_under_kombus_names(aliases: dict[str, str]) -> None:
    """Those four names, and no other."""
    others = {name: path for name, path in aliases.items() if name not in GREEN}
    registry.register()
    assert aliases == {**others, **GREEN}


def test_register_makes_kombu_forget_what_it_had_resolved(aliases: dict[str, str]) -> None:
    """A connection that was made before gets the green transport when it connects."""
    connection = Connection("memory://")
    assert connection.get_transport_cls() is kombu_memory.Transport
    registry.register()
    assert connection.get_transport_cls() is memory.Transport


def test_registering_again_changes_nothing(aliases: dict[str, str]) -> None:
    """What kombu has resolved since stays resolved."""
    registry.register()
    found = kombu_transport.get_transport_cls("memory")
    registry.register()
    assert kombu_transport._transport_cache["memory"] is found


def test_register_leaves_a_users_own_transport_alone(aliases: dict[str, str]) -> None:
    """Somebody who gave kombu's name to a transport of their own meant it."""
    aliases["amqp"] = "acme.transport:Transport"
    registry.register()
    assert aliases["amqp"] == "acme.transport:Transport"


def test_green_transports_pass_without_a_word(aliases: dict[str, str], told: list[Event]) -> None:
    """There is nothing to say of a transport that wakes, registered yet or not."""
    registry.require_green(Connection("memory://"))
    assert told == []


def test_a_polled_transport_is_told_of_once(aliases: dict[str, str], told: list[Event]) -> None:
    """A thousand consumers of one polled transport are one event."""
    for _ in range(3):
        registry.require_green(Connection("filesystem://"))
    assert told == [PollingTransport("filesystem", 1.0)]


@pytest.mark.parametrize(
    ("attribute", "options", "interval"),
    [(0.25, {}, 0.25), (0.25, {"polling_interval": 3}, 3.0), (None, {}, 1.0)],
)
def test_the_interval_told_is_the_one_that_is_polled(
    aliases: dict[str, str],
    told: list[Event],
    attribute: float | None,
    options: dict[str, float],
    interval: float,
) -> None:
    """The connection's option, else the transport's own, else the safety interval."""

    class Polled(virtual.Transport):
        polling_interval = attribute

    registry.require_green(Connection(transport=Polled, transport_options=options))
    name = f"{__name__}:{Polled.__qualname__}"
    assert told == [PollingTransport(name, interval)]


@pytest.mark.parametrize("explicit", [KOMBUS["amqp"], "class"])
def test_kombus_own_transport_is_polled_if_asked_for(
    aliases: dict[str, str], told: list[Event], explicit: str
) -> None:
    """Who names kombu's AMQP transport by its path or class gets it, and is told."""
    wanted: Any = explicit
    if explicit == "class":
        wanted = kombu_transport.resolve_transport(KOMBUS["amqp"])
    registry.require_green(Connection("localhost", transport=wanted))
    assert told == [PollingTransport(KOMBUS["amqp"], 1.0)]


@pytest.mark.parametrize("name", ["librabbitmq", "confluentkafka", "kafka", "gcpubsub"])
def test_transports_that_wait_in_c_are_refused(aliases: dict[str, str], name: str) -> None:
    """HAZARDS row 26: one wait of theirs stops the whole hub; refused, installed or not."""
    path = aliases[name]
    connections = [Connection("localhost", transport=each) for each in (name, path)]
    for connection in connections:
        with pytest.raises(UnsupportedTransportError, match=r"waits in C.*: (write|run) "):
            registry.require_green(connection)
    with pytest.raises(UnsupportedTransportError, match=rf"'{name}' waits in C"):
        registry.require_known(f"{name}://localhost")


def test_a_subclass_of_what_waits_in_c_is_refused(aliases: dict[str, str]) -> None:
    """HAZARDS row 26: a name of one's own does not make it cooperative."""
    blocking = type("Transport", (virtual.Transport,), {"__module__": "kombu.transport.gcpubsub"})
    own = type("Own", (blocking,), {})
    with pytest.raises(UnsupportedTransportError, match="gRPC"):
        registry.require_green(Connection("localhost", transport=own))


def test_alternates_are_checked_too(aliases: dict[str, str]) -> None:
    """The broker that a connection fails over to has to be usable before it is needed."""
    connection = Connection("memory://;kafka://standby")
    with pytest.raises(UnsupportedTransportError, match="'kafka'"):
        registry.require_green(connection)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ampq://localhost", r"no transport is called 'ampq': did you mean amqp\?"),
        ("nonsense://localhost", r"no transport is called 'nonsense': there are .*amqp.*redis"),
        ("memory://;reddis://", r"did you mean redis\?"),
        ("os.path://localhost", r"no transport is called 'os.path'"),
    ],
)
def test_an_unknown_transport_is_named_with_the_remedy(
    aliases: dict[str, str], url: str, message: str
) -> None:
    """kombu raises KeyError or ValueError out of its Connection; here it is one line of words."""
    with pytest.raises(UnsupportedTransportError, match=message) as refused:
        registry.require_known(url)
    assert "\n" not in str(refused.value)


def test_passwords_are_not_told(aliases: dict[str, str]) -> None:
    """A message about a URL names its transport only."""
    with pytest.raises(UnsupportedTransportError) as refused:
        registry.require_known("ampq://user:secret@host")
    assert "secret" not in str(refused.value)


def test_urls_of_known_transports_pass(aliases: dict[str, str], told: list[Event]) -> None:
    """One URL, several, and a mere host name."""
    for url in "memory://", "memory://;memory://second", "localhost":
        registry.require_known(url)
    assert told == []


@pytest.mark.parametrize(
    ("explicit", "message"),
    [
        ("ampq", r"did you mean amqp\?"),
        ("kombu.transport.memory:Missing", "no class that can be imported"),
        ("acme_missing.transport:Transport", "No module named 'acme_missing'.*correct its name"),
    ],
)
def test_an_explicit_transport_that_cannot_be_had_is_explained(
    aliases: dict[str, str], explicit: str, message: str
) -> None:
    """The same for `Connection(transport=...)`, which kombu resolves no sooner than it connects."""
    with pytest.raises(UnsupportedTransportError, match=message):
        registry.require_green(Connection("localhost", transport=explicit))


def test_a_library_that_is_not_installed_is_named(
    aliases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy is the line to type, whether kombu misses it on import or when it is made."""
    monkeypatch.setitem(sys.modules, "kombu.transport.sqlalchemy", None)
    with pytest.raises(UnsupportedTransportError, match=r"pip install 'kombu\[sqlalchemy\]'"):
        registry.require_known("sqla+sqlite://")

    def fail(*args: object, **kwargs: object) -> None:
        raise ImportError("Missing redis library")

    monkeypatch.setattr("kombu.transport.filesystem.Transport.__init__", fail)
    with pytest.raises(UnsupportedTransportError, match="Missing redis library"):
        registry.require_green(Connection("localhost", transport="filesystem"))


def test_kombus_producer_and_consumer_work(connect: Connect) -> None:
    """Declared, published with headers and compression, decoded, and acknowledged."""
    received: list[tuple[object, object]] = []
    queue = Queue("q", Exchange("x", "topic"), routing_key="news.#")
    connection = connect()
    with Consumer(connection, [queue], accept=["json"]) as consumer:
        consumer.register_callback(lambda body, message: received.append((body, message.headers)))
        consumer.register_callback(lambda body, message: message.ack())
        Producer(connect()).publish(
            {"n": 1}, exchange="x", routing_key="news.de", headers={"h": 1}, compression="zlib"
        )
        connection.drain_events(timeout=0)
    assert received == [({"n": 1}, {"h": 1, "compression": "application/x-gzip"})]
    connection.release()
    assert bodies_in(connect()) == []


def test_binary_and_text_bodies_arrive_as_they_were(connect: Connect) -> None:
    """They need no base64 on a way that leads nowhere."""
    channel = connect().channel()
    producer = Producer(channel)
    producer.publish(b"\x00\xff", routing_key="q", content_type="application/octet-stream")
    producer.publish("schön", routing_key="q", content_type="text/plain")
    assert channel.basic_get("q").body == b"\x00\xff"
    assert channel.basic_get("q").decode() == "schön"


def test_a_simple_queue_waits_and_times_out(connect: Connect) -> None:
    """kombu's SimpleQueue: sizes, a get that is woken, and one that is not."""
    with connect().SimpleQueue("simple") as simple, connect().SimpleQueue("simple") as other:
        waiting = gevent.spawn(simple.get, timeout=30)
        gevent.idle()
        other.put({"n": 1})
        gevent.idle()
        assert waiting.value.payload == {"n": 1}
        waiting.value.ack()
        other.put({"n": 2})
        assert other.qsize() == 1
        assert other.get_nowait().payload == {"n": 2}
        with pytest.raises(simple.Empty):
            simple.get(timeout=0.01)


def test_fanout_reaches_every_queue(connect: Connect) -> None:
    """One message, two queues, two sleeping consumers, each woken."""
    received: list[str] = []
    channel = connect().channel()
    drainers = []
    for name in "a", "b":
        Queue(name, Exchange("x", "fanout"))(channel).declare()
        connection = connect()
        connection.default_channel.basic_consume(name, True, lambda m: received.append(m.body))
        drainers.append(gevent.spawn(connection.drain_events))
    gevent.idle()
    Producer(channel).publish("news", exchange="x", content_type="text/plain")
    gevent.joinall(drainers, timeout=30, raise_error=True)
    assert received == [b"news", b"news"]


def test_connections_of_kombus_own_transport_share_the_queues(connect: Connect) -> None:
    """What was put before the transport was registered is there, and a later put wakes."""
    received: list[bytes] = []
    with Connection("localhost", transport=kombu_memory.Transport) as older:
        publish(older, "before")
        connection = connect()
        connection.default_channel.basic_consume("q", True, lambda m: received.append(m.body))
        connection.drain_events(timeout=0)
        drainer = gevent.spawn(connection.drain_events)
        gevent.idle()
        publish(older, "after")
        gevent.idle()
        assert drainer.ready()
    assert received == [b"before", b"after"]


def test_a_closed_channel_refuses_to_publish_and_to_consume(connect: Connect) -> None:
    """kombu's puts what is published on it into a queue that nobody sees."""
    channel = connect().channel()
    message = channel.prepare_message("lost?")
    channel.close()
    channel.close()
    with pytest.raises(RecoverableConnectionError):
        channel.basic_publish(message, "", "q")
    with pytest.raises(RecoverableConnectionError):
        channel.basic_consume("q", True, keep)
    assert bodies_in(connect()) == []


def test_an_ack_of_multiple_settles_all_that_came_before(connect: Connect) -> None:
    """kombu's virtual transports settle the one message only and leave the others for ever."""
    connection = connect()
    channel = connection.channel()
    for body in "1", "2", "3":
        publish(connection, body)
    _, second, _ = (channel.basic_get("q") for _ in range(3))
    second.ack(multiple=True)
    channel.close()
    assert bodies_in(connection) == ["3"]


def test_a_consumer_tag_names_one_consumer(connect: Connect) -> None:
    """Consuming again under a tag that is in use ends what it stood for."""
    connection = connect()
    for name in "old", "new":
        publish(connection, name, queue=name)
        connection.default_channel.basic_consume(name, False, keep, consumer_tag="tag")
    connection.drain_events(timeout=0)
    assert bodies_in(connection, "old") == ["old"]


def test_recovering_puts_everything_back(connect: Connect) -> None:
    """basic.recover gives back what the channel holds, and frees its prefetch."""
    received: list[Any] = []
    connection = connect()
    for body in "1", "2":
        publish(connection, body)
    connection.default_channel.basic_qos(0, 1, False)
    connection.default_channel.basic_consume("q", False, received.append)
    connection.drain_events(timeout=0)
    connection.default_channel.basic_recover(requeue=True)
    connection.drain_events(timeout=0)
    assert [message.body for message in received] == [b"1", b"1"]


def test_a_thousand_channels_leave_nothing_behind(connect: Connect) -> None:
    """HAZARDS row 22: kombu's QoS registers a finalizer, for as long as its channel is not closed."""
    connection, finalizers = connect(), len(multiprocessing.util._finalizer_registry)
    connection.ensure_connection()
    channels: weakref.WeakSet[memory.Channel] = weakref.WeakSet()
    for number in range(1000):
        channel = connection.channel()
        channel.basic_qos(0, 1, False)
        channel.basic_consume("q", False, keep)
        if number % 2 == 0:
            with pytest.raises(socket.timeout):
                connection.drain_events(timeout=0)
        assert len(multiprocessing.util._finalizer_registry) == finalizers
        channel.close()
        channels.add(channel)
    del channel
    gc.collect()
    assert len(channels) == 0


def test_collecting_a_connection_leaves_the_socket_timeout_alone(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HAZARDS row 21: kombu's collect changes it for every socket of the process meanwhile."""
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda _: pytest.fail("changed"))
    connection = connect()
    publish(connection, "1")
    connection.default_channel.basic_consume("q", False, keep)
    connection.drain_events()
    connection.collect()
    assert not connection.connected
    assert bodies_in(connect()) == ["1"]
