"""The green memory transport: who is woken by what, and where messages are meanwhile."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import gevent
import greenlet
import pytest
from amqp.exceptions import RecoverableConnectionError
from gevent import monkey
from gevent.event import Event
from kombu import Connection, Exchange, Producer, Queue
from kombu.exceptions import ChannelError

from greenconsume.errors import StoppedError
from greenconsume.stopping import StopSignal
from greenconsume.transports import registry
from greenconsume.transports.memory import Channel, Transport
from tests.waiting import AT_ONCE

Connect = Callable[[], Connection]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Make connections to an empty broker; they are closed afterwards."""
    registry.register()
    made: list[Connection] = []

    def make() -> Connection:
        made.append(Connection("memory://"))
        return made[-1]

    yield make
    for connection in made:
        connection.release()
    Channel.queues.clear()
    Transport.global_state.clear()


class Listener:
    """One consumer of one queue, on a channel of its own, and what it was given."""

    def __init__(
        self,
        connection: Connection,
        queue: str = "q",
        prefetch: int = 0,
        on_message: Callable[[Any], object] | None = None,
    ) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.channel.basic_qos(0, prefetch, False)
        self.on_message = on_message or (lambda message: message.ack())
        self.messages: list[Any] = []
        self.tag = self.channel.basic_consume(queue, no_ack=False, callback=self._receive)

    def _receive(self, message: Any) -> None:
        self.messages.append(message)
        self.on_message(message)

    @property
    def bodies(self) -> list[str]:
        return [message.body.decode() for message in self.messages]

    def drain(self, **options: Any) -> gevent.Greenlet:
        """Drain in a greenlet, whose value is what was raised, and return it when it sleeps."""
        spawned = gevent.spawn(drain_once, self.connection, **options)
        gevent.idle()
        return spawned


def drain_once(connection: Connection, **options: Any) -> BaseException | None:
    try:
        connection.drain_events(**options)
    except Exception as exc:
        return exc
    return None


def put(connection: Connection, *bodies: str, queue: str = "q", exchange: str = "") -> None:
    for body in bodies:
        message = connection.default_channel.prepare_message(body)
        connection.default_channel.basic_publish(message, exchange, queue)


def bodies_in(connection: Connection, queue: str = "q") -> list[str]:
    taken = iter(lambda: connection.default_channel.basic_get(queue, no_ack=True), None)
    return [message.body.decode() for message in taken]


def keep(message: Any) -> None:
    """Do not settle it."""


def test_a_put_wakes_the_waiting_consumer_at_once(connect: Connect) -> None:
    """HAZARDS row 27: kombu's polls once a second; here one turn of the hub brings the message."""
    listener = Listener(connect())
    drainer = listener.drain()
    put(connect(), "hello")
    gevent.idle()
    assert drainer.ready()
    assert listener.bodies == ["hello"]


def test_waiting_never_uses_kombus_polling(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HAZARDS row 27: no sleep of kombu's is between a consumer and its message."""
    monkeypatch.setattr("kombu.transport.virtual.base.sleep", lambda _: pytest.fail("polled"))
    listener = Listener(connect())
    assert isinstance(drain_once(listener.connection, timeout=0.01), socket.timeout)


def test_messages_are_handed_over_in_their_order(connect: Connect) -> None:
    """One consumer sees what was put in the order in which it was put."""
    listener = Listener(connect())
    put(connect(), "1", "2", "3")
    for _ in range(3):
        listener.connection.drain_events()
    assert listener.bodies == ["1", "2", "3"]


def test_a_stop_wakes_the_drain(connect: Connect) -> None:
    """A stop ends the wait at once, by StoppedError with its reason."""
    listener, stop = Listener(connect()), StopSignal()
    drainer = listener.drain(stop=stop)
    stop.set("enough")
    gevent.idle()
    assert isinstance(drainer.value, StoppedError)
    assert drainer.value.reason == "enough"


def test_nothing_is_delivered_once_stopped(connect: Connect) -> None:
    """A message that is there already stays in its queue."""
    listener, stop = Listener(connect()), StopSignal()
    put(connect(), "left")
    stop.set()
    assert isinstance(drain_once(listener.connection, stop=stop), StoppedError)
    assert listener.messages == []
    assert bodies_in(listener.connection) == ["left"]


def test_a_stop_from_a_thread_finds_a_hub_with_nothing_else_to_do(connect: Connect) -> None:
    """gevent ends a loop that watches nothing (LoopExit); a sleeping consumer is something."""
    listener, stop = Listener(connect()), StopSignal()
    never = monkey.get_original("_thread", "allocate_lock")()
    never.acquire()

    def stop_when_asleep() -> None:
        never.acquire(timeout=0.02)  # by then the hub waits, or has given up
        stop.set("thread")

    monkey.get_original("_thread", "start_new_thread")(stop_when_asleep, ())
    with pytest.raises(StoppedError, match="thread"):
        listener.connection.drain_events(stop=stop)


def test_the_timeout_is_not_restarted_by_wake_ups(connect: Connect) -> None:
    """HAZARDS row 4: what wakes a drainer without a message does not move its deadline."""
    listener = Listener(connect())
    began = monotonic()
    drainer = listener.drain(timeout=0.04)
    while not drainer.ready() and monotonic() < began + AT_ONCE:
        listener.channel.basic_cancel(listener.channel.basic_consume("other", True, keep))
        drainer.join(0.005)
    assert isinstance(drainer.value, socket.timeout)
    assert 0.04 <= monotonic() - began < AT_ONCE


def test_a_timeout_of_zero_takes_what_is_there_and_waits_for_nothing(connect: Connect) -> None:
    """kombu's own loops drain with a timeout of 0."""
    listener = Listener(connect())
    put(connect(), "there")
    assert drain_once(listener.connection, timeout=0) is None
    assert isinstance(drain_once(listener.connection, timeout=0), socket.timeout)
    assert listener.bodies == ["there"]


def test_the_prefetch_is_kept_and_an_ack_wakes(connect: Connect) -> None:
    """A consumer with its hands full sleeps until an ack, from whichever greenlet, frees one."""
    listener = Listener(connect(), prefetch=1, on_message=keep)
    put(connect(), "1", "2")
    listener.connection.drain_events()
    drainer = listener.drain()
    assert not drainer.ready()
    gevent.spawn(listener.messages[0].ack)
    gevent.idle()
    assert drainer.ready()
    assert listener.bodies == ["1", "2"]


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue"])
def test_every_way_to_settle_frees_the_prefetch(connect: Connect, settle: str) -> None:
    """A reject and a requeue count as an ack does."""
    listener = Listener(connect(), prefetch=1, on_message=keep)
    put(connect(), "1", "2")
    listener.connection.drain_events()
    getattr(listener.messages[0], settle)()
    listener.connection.drain_events(timeout=0)
    assert listener.bodies == ["1", "1" if settle == "requeue" else "2"]


def test_a_higher_prefetch_wakes(connect: Connect) -> None:
    """A changed prefetch holds from now on, for a consumer that sleeps too."""
    listener = Listener(connect(), prefetch=1, on_message=keep)
    put(connect(), "1", "2")
    listener.connection.drain_events()
    drainer = listener.drain()
    listener.channel.basic_qos(0, 2, False)
    gevent.idle()
    assert drainer.ready()
    assert listener.bodies == ["1", "2"]


def test_closing_a_channel_gives_back_what_it_has_not_settled(connect: Connect) -> None:
    """What was delivered returns in its order, before what came later, and says so."""
    listener = Listener(connect(), on_message=keep)
    put(connect(), "1", "2")
    listener.connection.drain_events()
    listener.connection.drain_events()
    put(connect(), "3")
    listener.channel.close()
    other = Listener(connect())
    for _ in range(3):
        other.connection.drain_events(timeout=0)
    assert other.bodies == ["1", "2", "3"]
    assert [m.delivery_info["redelivered"] for m in other.messages] == [True, True, False]


def test_what_a_closed_channel_gives_back_wakes_others(connect: Connect) -> None:
    """A message that one consumer leaves is the next one's at once."""
    leaving, waiting = Listener(connect(), on_message=keep), Listener(connect())
    put(connect(), "1")
    leaving.connection.drain_events()
    drainer = waiting.drain()
    leaving.connection.release()
    gevent.idle()
    assert drainer.ready()
    assert waiting.bodies == ["1"]


def test_a_message_in_two_queues_of_one_channel_is_two_messages(connect: Connect) -> None:
    """kombu's gives both the same delivery tag, and so loses one of them."""
    channel = connect().channel()
    for name in "a", "b":
        Queue(name, Exchange("x", "fanout"))(channel).declare()
    put(connect(), "1", exchange="x")
    first, second = channel.basic_get("a"), channel.basic_get("b")
    first.ack()
    assert first.delivery_tag != second.delivery_tag
    channel.close()
    assert (bodies_in(connect(), "a"), bodies_in(connect(), "b")) == ([], ["1"])


@pytest.mark.parametrize("kind", ["direct", "topic", "fanout"])
def test_a_requeue_returns_to_the_one_queue_it_came_from(connect: Connect, kind: str) -> None:
    """kombu's publishes it again, to every queue of the exchange."""
    channel = connect().channel()
    for name in "a", "b":
        Queue(name, Exchange("x", kind), routing_key="key")(channel).declare()
    put(connect(), "1", queue="key", exchange="x")
    channel.basic_get("a").requeue()
    assert (bodies_in(connect(), "a"), bodies_in(connect(), "b")) == (["1"], ["1"])


def test_a_requeued_message_is_as_it_was_published(connect: Connect) -> None:
    """Neither the publisher's later changes to its headers nor the handler's reach the next one."""
    channel, headers = connect().channel(), {"attempts": [1]}
    Producer(channel).publish("body", routing_key="q", headers=headers)
    headers["attempts"].append(2)
    message = channel.basic_get("q")
    message.headers["attempts"].append(3)
    message.properties["correlation_id"] = "changed"
    message.requeue()
    again = channel.basic_get("q")
    assert again.headers == {"attempts": [1]}
    assert "correlation_id" not in again.properties


def test_a_message_is_settled_once(connect: Connect) -> None:
    """Settling again, or after the channel closed, neither raises nor touches another message."""
    connection = connect()
    put(connection, "1", "2")
    channel = connection.channel()
    first, second = channel.basic_get("q"), channel.basic_get("q")
    first.ack()
    channel.basic_reject(first.delivery_tag, requeue=True)
    channel.close()
    second.requeue()
    assert bodies_in(connection) == ["2"]


def test_one_put_wakes_one_of_a_thousand(connect: Connect) -> None:
    """No herd: of 1,000 sleeping consumers of a queue, one greenlet runs for one message."""
    listeners = [Listener(connection) for connection in [connect() for _ in range(10)] * 100]
    drainers = [gevent.spawn(drain_once, listener.connection) for listener in listeners]
    gevent.idle()
    switched: set[greenlet.greenlet] = set()
    previous = greenlet.settrace(lambda _event, args: switched.add(args[1]))
    put(connect(), "1")
    gevent.idle()
    greenlet.settrace(previous)
    assert len(switched.intersection(drainers)) == 1
    assert sum(len(listener.messages) for listener in listeners) == 1
    gevent.killall(drainers)


def test_waiting_consumers_take_turns(connect: Connect) -> None:
    """Three that wait for one queue share what comes."""
    listeners = [Listener(connect()) for _ in range(3)]
    drainers = [listener.drain() for listener in listeners]
    publisher = connect()
    for number in range(9):
        put(publisher, str(number))
        gevent.idle()
        for index, drainer in enumerate(drainers):
            if drainer.ready():
                drainers[index] = listeners[index].drain()
    assert [len(listener.messages) for listener in listeners] == [3, 3, 3]
    gevent.killall(drainers)


@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda one, stop: stop.set(), id="stopped"),
        pytest.param(lambda one, stop: one.channel.basic_cancel(one.tag), id="cancelled"),
        pytest.param(lambda one, stop: one.channel.close(), id="channel closed"),
        pytest.param(lambda one, stop: one.connection.release(), id="connection closed"),
        pytest.param(lambda one, stop: one.channel.basic_get("held"), id="hands full"),
    ],
)
def test_a_wake_up_that_is_not_used_is_passed_on(
    connect: Connect, leave: Callable[[Listener, StopSignal], object]
) -> None:
    """Between its wake-up and its turn a consumer may go; the message is the next one's."""
    put(connect(), "held", queue="held")
    one, other, stop = Listener(connect(), prefetch=1), Listener(connect()), StopSignal()
    drainer, waiting = one.drain(stop=stop), other.drain()
    put(connect(), "1")
    leave(one, stop)
    gevent.idle()
    assert waiting.ready()
    assert (one.bodies, other.bodies) == ([], ["1"])
    drainer.kill()


def test_a_killed_consumer_passes_its_wake_up_on(connect: Connect) -> None:
    """A kill that arrives before the wake-up loses neither the message nor the next consumer."""
    one, other = Listener(connect()), Listener(connect())
    drainer, waiting = one.drain(), other.drain()
    drainer.kill(block=False)
    put(connect(), "1")
    gevent.idle()
    assert waiting.ready()
    assert (one.bodies, other.bodies) == ([], ["1"])


def test_a_wake_up_is_passed_on_within_a_connection(connect: Connect) -> None:
    """When one channel has its hands full, another one of the same connection takes the message."""
    put(connect(), "held", queue="held")
    connection = connect()
    full, free = Listener(connection, prefetch=1), Listener(connection)
    drainer = free.drain()
    put(connect(), "1")
    full.channel.basic_get("held")
    gevent.idle()
    assert drainer.ready()
    assert (full.bodies, free.bodies) == ([], ["1"])


def test_a_wake_up_is_passed_on_to_another_greenlet(connect: Connect) -> None:
    """Of two that drain one connection, the one that stays takes what woke the one that goes."""
    listener, stop = Listener(connect()), StopSignal()
    going, staying = listener.drain(stop=stop), listener.drain()
    put(connect(), "1")
    stop.set()
    gevent.idle()
    assert isinstance(going.value, StoppedError)
    assert staying.ready()
    assert listener.bodies == ["1"]


def test_a_wake_up_for_one_queue_is_not_spent_on_another(connect: Connect) -> None:
    """Who was woken for one queue and serves another has the next one in line look at the first."""
    one, stop = Listener(connect(), "a"), StopSignal()
    two, free = Listener(one.connection, "b"), Listener(connect(), "b")
    going, staying, waiting = one.drain(stop=stop), two.drain(), free.drain()
    put(connect(), "1", queue="a")
    put(connect(), "2", queue="b")
    stop.set()  # so that the greenlet that was woken for b finds the message in a first
    gevent.idle()
    assert isinstance(going.value, StoppedError)
    assert staying.ready()
    assert waiting.ready()
    assert (one.bodies, two.bodies, free.bodies) == (["1"], [], ["2"])


def test_queues_of_one_channel_take_turns(connect: Connect) -> None:
    """A queue that always has a message does not keep the channel from its other queues."""
    channel, received = connect().channel(), []
    for name in "a", "b":
        channel.basic_consume(name, True, lambda message: received.append(message.body))
    put(connect(), "1", "2", "3", queue="a")
    put(connect(), "4", queue="b")
    for _ in range(4):
        channel.connection.client.drain_events(timeout=0)
    assert received == [b"1", b"4", b"2", b"3"]


def test_several_greenlets_may_drain_one_connection(connect: Connect) -> None:
    """HAZARDS row 6: while one handles a message, the next one is handed to another."""
    hold = Event()
    listener = Listener(connect(), on_message=lambda message: hold.wait())
    drainers = [listener.drain() for _ in range(3)]
    put(connect(), "1", "2", "3")
    gevent.idle()
    assert listener.bodies == ["1", "2", "3"]
    hold.set()
    gevent.joinall(drainers, raise_error=True)


def test_two_consumers_of_a_connection_may_share_a_queue(connect: Connect) -> None:
    """kombu's hands everything to the later one, and nothing to anybody once one is cancelled."""
    one = Listener(connect())
    other = Listener(one.connection)
    put(connect(), "1", "2")
    one.connection.drain_events()
    one.connection.drain_events()
    assert (len(one.messages), len(other.messages)) == (1, 1)
    other.channel.basic_cancel(other.tag)
    put(connect(), "3")
    one.connection.drain_events(timeout=0)
    assert one.bodies[-1] == "3"


def test_a_consumer_that_requeues_for_ever_leaves_the_hub_alive(connect: Connect) -> None:
    """Draining that never has to wait yields by itself, so that others run and can stop it."""
    listener, stop = Listener(connect(), on_message=lambda m: m.requeue()), StopSignal()
    put(connect(), "poison")
    gevent.spawn(stop.set, "another greenlet ran")
    began, raised = monotonic(), None
    while raised is None and monotonic() < began + 2:
        raised = drain_once(listener.connection, stop=stop)
    assert isinstance(raised, StoppedError)
    assert bodies_in(connect()) == ["poison"]


def test_a_handlers_error_reaches_the_caller_and_keeps_the_message(connect: Connect) -> None:
    """What a callback raises is neither swallowed nor a settlement."""

    def fail(message: Any) -> None:
        raise LookupError("broken handler")

    listener = Listener(connect(), on_message=fail)
    put(connect(), "1")
    with pytest.raises(LookupError):
        listener.connection.drain_events()
    listener.connection.release()
    assert bodies_in(connect()) == ["1"]


def test_closing_a_connection_ends_its_drains(connect: Connect) -> None:
    """Nobody sleeps on a closed connection; the error is one of its connection errors."""
    listener = Listener(connect())
    drainer = listener.drain()
    listener.connection.release()
    gevent.idle()
    assert isinstance(drainer.value, RecoverableConnectionError)
    assert isinstance(drainer.value, listener.connection.connection_errors)


def test_a_deleted_queue_stays_away_until_it_is_declared_again(connect: Connect) -> None:
    """A consumer that it had waits, a requeue does not bring it back, and it can be declared anew."""
    listener = Listener(connect(), on_message=keep)
    channel = connect().channel()
    Queue("q", Exchange("x", "topic"), routing_key="#")(channel).declare()
    put(connect(), "1")
    listener.connection.drain_events()
    channel.queue_delete("q")
    listener.messages[0].requeue()
    put(connect(), "2", queue="any.key", exchange="x")
    assert channel.basic_get("q") is None
    with pytest.raises(ChannelError, match="404"):
        channel.queue_declare("q", passive=True)
    drainer = listener.drain()
    channel.queue_declare("q")
    put(connect(), "3")
    gevent.idle()
    assert drainer.ready()
    assert listener.bodies == ["1", "3"]


def test_closing_goes_on_where_one_channel_raises(connect: Connect) -> None:
    connection = connect()
    channels = [connection.channel() for _ in range(3)]

    def fail() -> None:
        raise ValueError("this channel's own")

    channels[1].qos.restore_unacked_once = fail
    with pytest.raises(ValueError, match="own"):
        connection.transport.close_connection(connection.connection)
    assert all(channel.closed for channel in channels)
