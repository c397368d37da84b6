"""Streams: which know acks only, and give nothing back (HAZARDS rows 36, 37)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gevent.event import Event
from kombu import Consumer, Queue

from greenconsume import ConsumerOptions, Reject, Requeue, Retry, Runtime, spawn
from greenconsume.errors import InvalidConsumerError
from greenconsume.events import HandlerFailed, LinkDown
from tests.brokers import vhost_of
from tests.integration.consumers import SOON, Recorder, consuming, green_connection, observed
from tests.messages import declare, publish, queue_depth
from tests.waiting import wait_until


class Reader(Recorder):
    """Reads a stream; fails on what is `bad`."""

    def __init__(self, broker: Any, name: str, offset: Any = "first", **attributes: Any) -> None:
        arguments = {} if offset is None else {"x-stream-offset": offset}
        queue = Queue(
            name, queue_arguments={"x-queue-type": "stream"}, consumer_arguments=arguments
        )
        super().__init__(broker, queue, self.read)
        self.options = ConsumerOptions(**attributes)

    def read(self, body: Any, _message: Any) -> None:
        if body == "bad":
            raise LookupError("no such hat")


@pytest.fixture
def stream(amqp_url, queue_name) -> str:
    declare(amqp_url, queue_name, x_queue_type="stream")
    return queue_name


@pytest.mark.parametrize("concurrency", [None, 3])
def test_a_failed_message_is_kept_beside_its_stream_and_the_link_lives(
    amqp_url, stream, concurrency
):
    publish(amqp_url, stream, ["a", "bad", "b"])
    reader = Reader(amqp_url, stream, on_error=Requeue(), concurrency=concurrency)
    with observed(LinkDown) as lost, observed(HandlerFailed) as failures, consuming(reader):
        wait_until(lambda: failures and {"a", "b"} <= set(reader.bodies), SOON)
    assert lost == []
    assert [failure.outcome for failure in failures] == [f"put into {stream}.dead"]
    assert queue_depth(amqp_url, f"{stream}.dead") == 1


def test_a_rejected_message_is_passed_over(amqp_url, stream):
    publish(amqp_url, stream, ["a", "bad", "b"])
    reader = Reader(amqp_url, stream, on_error=Reject())
    with observed(LinkDown) as lost, consuming(reader):
        wait_until(lambda: {"a", "b"} <= set(reader.bodies), SOON)
    assert lost == []


@pytest.mark.parametrize("how", ["reject", "requeue"])
def test_a_handler_that_settles_as_on_a_queue_closes_no_link(amqp_url, stream, how):
    publish(amqp_url, stream, 3)
    reader = Reader(amqp_url, stream)
    reader.handle = lambda _body, message: getattr(message, how)()
    with observed(LinkDown) as lost, consuming(reader):
        reader.wait_for(3)
    assert lost == []


def test_a_stop_with_messages_at_hand_costs_no_neighbour_its_link(amqp_url, stream, queue_name):
    publish(amqp_url, stream, 200)
    declare(amqp_url, f"{queue_name}-other")
    runtime, gate = Runtime(amqp_url), Event()

    def reading(connection: Any) -> Reader:
        reader = Reader(connection, stream, concurrency=5)
        reader.consumer_options = {"prefetch_count": 100}
        reader.handle = lambda _body, _message: gate.wait()
        return reader

    [stopping] = runtime.spawn(reading)
    [neighbour] = runtime.spawn(lambda connection: Recorder(connection, f"{queue_name}-other"))
    with observed(LinkDown) as lost, runtime:
        wait_until(lambda: stopping.consumer._greenconsume.handling.busy, SOON)
        stopping.stop("a test")
        gate.set()
        wait_until(lambda: not stopping.running, SOON)
        publish(amqp_url, f"{queue_name}-other", ["still here"])
        assert neighbour.consumer.wait_for(1) == ["still here"]
        assert lost == []
    assert 5 <= len(stopping.consumer.bodies) < 100


@pytest.mark.parametrize("offset", ["first", 0, "next", None])
@pytest.mark.parametrize("concurrency", [None, 4])
def test_a_reader_goes_on_behind_what_it_has_settled(
    rabbitmq, amqp_url, stream, offset, concurrency
):
    goes_on(rabbitmq, Reader(amqp_url, stream, offset, concurrency=concurrency), amqp_url, stream)


def goes_on(rabbitmq, reader, amqp_url, stream):
    """See it read everything once, while its connection is closed twice."""
    with observed(LinkDown) as lost, consuming(reader):
        publish(amqp_url, stream, range(10))
        reader.wait_for(10)
        for start in (10, 20):
            rabbitmq.close_connections(amqp_url)
            publish(amqp_url, stream, range(start, start + 10))
            reader.wait_for(start + 10)
        wait_until(lambda: len(lost) == 2, SOON)
    assert sorted(reader.bodies) == list(range(30))


@pytest.mark.parametrize("offset", ["next", None])
def test_a_reader_that_has_got_nothing_skips_no_outage(proxy, amqp_url, stream, offset):
    """HAZARDS row 37: `next` is what comes from the first subscription on, not from the latest."""
    reader = Reader(proxy.url, stream, offset)
    with observed(LinkDown) as lost, consuming(reader):
        proxy.refuse()
        proxy.cut()
        wait_until(lambda: lost, SOON)
        publish(amqp_url, stream, ["while it was away"])
        proxy.accept()
        reader.wait_for(1)
    assert set(reader.bodies) == {"while it was away"}


def test_what_was_not_settled_comes_again(rabbitmq, amqp_url, stream):
    class Forgetful(Reader):
        def on_task(self, body: Any, message: Any) -> None:
            self.bodies.append(body)
            if body != 4 or self.bodies.count(4) > 1:
                message.ack()

    publish(amqp_url, stream, range(10))
    reader = Forgetful(amqp_url, stream)
    with consuming(reader):
        wait_until(lambda: 9 in reader.bodies, SOON)
        rabbitmq.close_connections(amqp_url)
        wait_until(lambda: reader.bodies.count(9) == 2, SOON)
    assert reader.bodies == [*range(10), *range(4, 10)]


def test_a_retry_is_refused_at_the_start_in_words(amqp_url, stream):
    greenlet = spawn(Reader(amqp_url, stream, on_error={LookupError: Retry(delays=[1])}))
    greenlet.join(SOON)
    assert isinstance(greenlet.exception, InvalidConsumerError)
    assert "is a stream" in str(greenlet.exception)


def test_a_prefetch_is_set_where_the_user_sets_none(amqp_url, stream):
    """Without one the broker refuses to let anybody consume from a stream."""
    publish(amqp_url, stream, 500)
    reader = Reader(amqp_url, stream)
    reader.consumer_options = {}
    with consuming(reader):
        assert reader.wait_for(500) == list(range(500))


def test_the_prefetch_that_was_set_is_said(amqp_url, stream, caplog):
    caplog.set_level("INFO", "greenconsume")
    reader = Reader(amqp_url, stream)
    reader.consumer_options = {}
    publish(amqp_url, stream, 1)
    with consuming(reader):
        reader.wait_for(1)
    assert f"reads the stream {stream} from first on, with a prefetch of 10" in caplog.messages


@pytest.mark.parametrize("how", ["reject", "requeue"])
def test_a_plain_consumer_of_a_stream_loses_no_link(amqp_url, stream, how):
    """HAZARDS row 36: what was declared as a stream is one, also where no offset is said."""
    queue = Queue(stream, queue_arguments={"x-queue-type": "stream"})
    with green_connection(amqp_url) as connection:
        got = []
        with connection.Consumer([queue], on_message=got.append, prefetch_count=10):
            publish(amqp_url, stream, 3)
            while len(got) < 3:
                connection.drain_events(timeout=SOON)
                getattr(got[-1], how)()
        connection.default_channel.queue_declare(stream, passive=True)
        assert connection.connection.connected


@pytest.mark.parametrize(
    "limits",
    [
        {"x_max_length_bytes": 2_000_000},
        {"x_max_age": "1D"},
        {
            "x_max_length_bytes": 2_000_000,
            "x_max_age": "1D",
            "x_stream_max_segment_size_bytes": 500_000,
        },
    ],
    ids=["bytes", "age", "all"],
)
def test_a_stream_with_limits_that_was_declared_elsewhere_is_known_as_well(
    amqp_url, queue_name, limits
):
    """The broker names the first argument that differs, and this may be a limit of the stream's."""
    declare(amqp_url, queue_name, x_queue_type="stream", **limits)
    got: list[Any] = []
    with green_connection(amqp_url) as connection:
        queue = Queue(queue_name, no_declare=True)
        with connection.Consumer([queue], on_message=got.append, prefetch_count=5):
            publish(amqp_url, queue_name, 20)
            while len(got) < 20:
                connection.drain_events(timeout=SOON)
                got[-1].requeue()
        connection.default_channel.queue_declare(queue_name, passive=True)
        assert connection.connection.connected


def declared_nowhere(channel: Any, _name: str) -> None:
    """Leave it to others to declare a stream."""


def declared_passively(channel: Any, name: str) -> None:
    channel.queue_declare(name, passive=True)


@pytest.mark.parametrize("declares", [declared_nowhere, declared_passively])
@pytest.mark.parametrize("how", ["reject", "requeue", "ack"])
def test_a_stream_that_was_declared_elsewhere_is_known_by_its_first_message(
    amqp_url, stream, how, declares
):
    """HAZARDS row 36: no link is lost, however its messages are settled."""
    got: list[Any] = []
    with green_connection(amqp_url) as connection:
        channel = connection.default_channel
        declares(channel, stream)
        channel.basic_qos(0, 5, False)
        queue = Queue(stream, no_declare=True)
        with connection.Consumer([queue], on_message=got.append, auto_declare=False):
            publish(amqp_url, stream, 20)
            while len(got) < 20:
                connection.drain_events(timeout=SOON)
                getattr(got[-1], how)()
        channel.queue_declare(stream, passive=True)
        assert connection.connection.connected
    assert [message.payload for message in got] == list(range(20))


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_copy_of_a_streams_message_in_a_queue_goes_back_to_it(amqp_url, queue_name, kind):
    """It tells of an offset, too; an ack in the place of a requeue would lose it."""
    declare(amqp_url, queue_name, x_queue_type=kind)
    got: list[Any] = []
    with green_connection(amqp_url) as connection:
        producer = connection.Producer()
        for number in range(3):
            headers = {"x-stream-offset": number}
            producer.publish(number, routing_key=queue_name, headers=headers)
        queue = Queue(queue_name, no_declare=True)
        with connection.Consumer([queue], on_message=got.append, prefetch_count=3):
            while len(got) < 6:
                connection.drain_events(timeout=SOON)
                got[-1].requeue() if len(got) <= 3 else got[-1].ack()
    assert sorted(message.payload for message in got) == [0, 0, 1, 1, 2, 2]


class Stranger(Recorder):
    """Reads a stream without saying so; fails on what is `bad`."""

    def __init__(self, broker: Any, name: str, **attributes: Any) -> None:
        super().__init__(broker, Queue(name, no_declare=True), self.read)
        self.options = ConsumerOptions(**attributes)

    def read(self, body: Any, _message: Any) -> None:
        if body == "bad":
            raise LookupError("no such hat")


@pytest.mark.parametrize("policy", [Requeue(), Retry(delays=[0.1])], ids=["requeue", "retry"])
def test_what_fails_of_a_stream_declared_elsewhere_is_kept_beside_it(amqp_url, stream, policy):
    reader = Stranger(amqp_url, stream, on_error={LookupError: policy})
    with observed(LinkDown) as lost, observed(HandlerFailed) as failures, consuming(reader):
        publish(amqp_url, stream, ["a", "bad", "b"])
        wait_until(lambda: failures and {"a", "b"} <= set(reader.bodies), SOON)
    assert lost == []
    assert queue_depth(amqp_url, f"{stream}.dead") == 1


def test_a_reader_of_a_stream_declared_elsewhere_goes_on_behind_what_it_has_settled(
    rabbitmq, amqp_url, stream
):
    goes_on(rabbitmq, Stranger(amqp_url, stream), amqp_url, stream)


def test_a_stream_declared_elsewhere_gets_the_prefetch_that_it_wants(amqp_url, stream):
    reader = Stranger(amqp_url, stream)
    reader.consumer_options = {}
    with observed(LinkDown) as lost, consuming(reader):
        publish(amqp_url, stream, range(10))
        reader.wait_for(10)
    assert lost == []


@pytest.mark.parametrize("goodbye", ["cancel", "announce_stop"])
def test_who_leaves_a_stream_declared_elsewhere_before_its_first_message_loses_no_link(
    proxy, amqp_url, stream, goodbye
):
    """What the broker sends before it has the cancel comes while nobody knows what the queue is."""
    with green_connection(proxy.url) as connection:

        def leave_early() -> int:
            channel = connection.channel()
            channel.basic_qos(0, 20, False)
            channel.basic_consume(stream, "early", callback=print)
            proxy.stall("to_client")
            publish(amqp_url, stream, 20)
            if goodbye == "cancel":
                channel.basic_cancel("early", nowait=True)
            else:
                connection.connection.announce_stop()
            proxy.resume()
            channel.queue_declare(stream, passive=True)  # all that was sent has come
            wait_until(lambda: not channel.unsettled_count, SOON)
            channel.queue_declare(stream, passive=True)  # and has gone back
            channel.close()
            return int(connection.connection.given_back_count)

        wait_until(leave_early, SOON)
        assert connection.connection.connected


@pytest.fixture
def reader_url(rabbitmq, amqp_url) -> Iterator[str]:
    """The address of a virtual host for a user who may read and write there, and declare nothing."""
    vhost = vhost_of(amqp_url)
    rabbitmq.eval(
        'rabbit_auth_backend_internal:add_user(<<"reader">>, <<"reader">>, <<"test">>),'
        f'rabbit_auth_backend_internal:set_permissions(<<"reader">>, <<"{vhost}">>, '
        '<<"^$">>, <<".*">>, <<".*">>, <<"test">>)'
    )
    yield amqp_url.replace("guest:guest", "reader:reader")
    rabbitmq.eval('rabbit_auth_backend_internal:delete_user(<<"reader">>, <<"test">>)')


@pytest.mark.parametrize("kind", ["classic", "quorum", "stream"])
@pytest.mark.parametrize("how", ["requeue", "give_back"])
def test_who_may_not_declare_is_told_all_the_same_what_the_queue_is(
    amqp_url, reader_url, queue_name, kind, how
):
    """An ack in the place of a requeue would lose a message; a requeue would close a stream's link."""
    declare(amqp_url, queue_name, x_queue_type=kind)
    got: list[Any] = []
    with green_connection(reader_url) as connection:
        headers = {} if kind == "stream" else {"x-stream-offset": 1}
        connection.Producer().publish("kept", routing_key=queue_name, headers=headers)
        channel = connection.channel()
        channel.basic_qos(0, 1, False)
        queue = Queue(queue_name, no_declare=True, consumer_arguments={})
        with Consumer(channel, [queue], on_message=got.append, auto_declare=False) as consumer:
            if kind == "stream":
                publish(amqp_url, queue_name, ["kept"])
            connection.drain_events(timeout=SOON)
            consumer.cancel()
            getattr(got[0], how)()
        channel.queue_declare(queue_name, passive=True)  # it is flushed before, and the link lives
    if kind != "stream":
        assert queue_depth(amqp_url, queue_name) == 1
