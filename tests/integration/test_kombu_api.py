"""kombu's own interface over a green link: entities, messages, consumers."""

from __future__ import annotations

import socket
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import amqp
import pytest
from kombu import Consumer, Exchange, Producer, Queue, binding
from kombu.exceptions import ContentDisallowed

from tests.integration.consumers import SOON, Inbox, green_connection
from tests.messages import publish, queue_depth
from tests.waiting import wait_until

#: What kombu refuses unless it is told.
ACCEPT = ["json", "pickle", "text/plain", "application/data"]


def take(queue: Queue, within: float = SOON) -> Any:
    """Take the next message, acknowledged, and return it."""
    return wait_until(lambda: queue.get(no_ack=True, accept=ACCEPT), within)


# -- entities -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "routing_key", "arguments", "publish_options", "expected"),
    [
        ("direct", "a", None, [{"routing_key": "a"}, {"routing_key": "b"}], [0]),
        ("fanout", "", None, [{"routing_key": "a"}, {"routing_key": "b"}], [0, 1]),
        ("topic", "a.*", None, [{"routing_key": "a.b"}, {"routing_key": "b.a"}], [0]),
        ("headers", "", {"x-match": "all", "k": 1}, [{"headers": {"k": 1}}, {"headers": {}}], [0]),
    ],
)
def test_each_type_of_exchange_routes(
    channel, queue_name, kind, routing_key, arguments, publish_options, expected
):
    exchange = Exchange(f"{queue_name}-x", kind, durable=False)
    queue = Queue(queue_name, exchange, routing_key, binding_arguments=arguments)(channel)
    queue.declare()
    producer = Producer(channel, exchange)
    for number, options in enumerate(publish_options):
        producer.publish(number, **options)
    assert [take(queue).payload for _ in expected] == expected
    assert queue.get() is None


def test_entities_are_bound_unbound_purged_and_deleted(channel, queue_name):
    first = Exchange(f"{queue_name}-1", "fanout", durable=False)(channel)
    second = Exchange(f"{queue_name}-2", "fanout", durable=False)(channel)
    queue = Queue(queue_name, second, durable=False)(channel)
    first.declare()
    queue.declare()
    producer = Producer(channel, first)
    producer.publish("not yet bound")
    second.bind_to(first)
    producer.publish("bound")
    assert take(queue).payload == "bound"
    second.unbind_from(first)
    producer.publish("no longer bound")
    assert queue.get() is None
    Producer(channel).publish("x", routing_key=queue_name)
    assert queue.purge() == 1
    queue.unbind_from(second)
    assert queue.delete(if_unused=True) == 0
    first.delete()
    with pytest.raises(amqp.NotFound):
        channel.queue_declare(queue_name, passive=True)


def test_a_queue_with_several_bindings_gets_what_matches_any(channel, queue_name):
    exchange = Exchange(f"{queue_name}-x", "direct", durable=False)
    queue = Queue(queue_name, [binding(exchange, key) for key in "ab"], durable=False)(channel)
    queue.declare()
    producer = Producer(channel, exchange)
    for key in "abc":
        producer.publish(key, routing_key=key)
    assert [take(queue).payload for _ in range(2)] == ["a", "b"]
    assert queue.get() is None


def test_the_brokers_own_name_for_a_queue_is_returned(channel):
    declared = channel.queue_declare("", exclusive=True)
    assert declared.queue.startswith("amq.gen-")
    assert (declared.message_count, declared.consumer_count) == (0, 0)


# -- messages -------------------------------------------------------------------------------------

HEADERS = {
    "text": "grüße ☃ 🌱",
    "empty": "",
    "bytes": b"\x00\xff",
    "small": 1,
    "negative": -70_000,
    "large": 2**53,
    "float": 1.5,
    "true": True,
    "false": False,
    "none": None,
    "decimal": Decimal("3.14"),
    "time": datetime(2024, 2, 29, 12, 30, tzinfo=timezone.utc),
    "list": [1, "two", [3.0, None], {"four": True}],
    "table": {"nested": {"deep": [1, "text"]}},
    "nothing": [{}, []],
}


def test_every_type_of_header_comes_back(channel, queue, queue_name):
    Producer(channel).publish("x", routing_key=queue_name, headers=HEADERS)
    received = take(queue).headers
    expected = HEADERS | {"time": HEADERS["time"].replace(tzinfo=received["time"].tzinfo)}
    assert received == expected
    assert {name: type(value) for name, value in received.items()} == {
        name: type(value) for name, value in expected.items()
    }


def test_every_property_comes_back(channel, queue, queue_name):
    sent = {
        "priority": 7,
        "expiration": "60000",
        "correlation_id": "c",
        "reply_to": "r",
        "message_id": "m",
        "type": "t",
        "app_id": "a",
        "user_id": "guest",
        "delivery_mode": 1,
    }
    options = sent | {"expiration": 60}
    Producer(channel).publish({"a": 1}, routing_key=queue_name, timestamp=1_700_000_000, **options)
    message = take(queue)
    received = message.properties
    assert {name: received[name] for name in sent} == sent
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")


BODIES = {
    "text": "grüße ☃ 🌱",
    "empty text": "",
    "bytes": bytes(range(256)),
    "json": {"list": [1, None, "☃"], "nested": {"a": 1.5}},
    "null": None,
    "zero": 0,
    "megabytes": b"\xce" * 10_000_000,
    "large text": "☃" * 1_000_000,
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("frame_max", [4096, 131072])
def test_every_body_comes_back(amqp_url, queue_name, name, frame_max):
    body = BODIES[name]
    with green_connection(amqp_url, transport_options={"frame_max": frame_max}) as connection:
        queue = Queue(queue_name, durable=False)(connection.channel())
        queue.declare()
        Producer(connection).publish(body, routing_key=queue_name)
        assert take(queue).payload == body
        got: list[Any] = []
        options = {"no_ack": True, "accept": ACCEPT}
        with connection.Consumer([queue], callbacks=[lambda body, _: got.append(body)], **options):
            Producer(connection).publish(body, routing_key=queue_name)
            connection.drain_events(timeout=SOON)
        assert got == [body]


@pytest.mark.parametrize("compression", ["zlib", "bzip2", "lzma"])
@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_compressed_and_serialized_bodies_come_back(
    channel, queue, queue_name, compression, serializer
):
    body = {"text": "☃" * 1000}
    producer = Producer(channel, compression=compression, serializer=serializer)
    producer.publish(body, routing_key=queue_name)
    raw = wait_until(lambda: channel.basic_get(queue_name))
    assert raw.headers["compression"]
    assert len(raw.body) < 1000
    message = channel.message_to_python(raw)
    message.accept = {message.content_type}
    assert message.payload == body


def test_a_text_in_another_encoding_comes_back(channel, queue, queue_name):
    Producer(channel).publish(
        "grüße".encode("latin-1"),
        routing_key=queue_name,
        content_type="text/plain",
        content_encoding="latin-1",
    )
    assert take(queue).payload == "grüße"


def test_an_expired_message_goes_to_the_dead_letter_queue(channel, queue_name):
    dead = Queue(f"{queue_name}-dead", durable=False)(channel)
    dead.declare()
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead.name}
    Queue(queue_name, durable=False, queue_arguments=arguments)(channel).declare()
    Producer(channel).publish("late", routing_key=queue_name, expiration=0.05)
    message = take(dead)
    assert message.payload == "late"
    assert message.headers["x-death"][0]["reason"] == "expired"


def test_a_priority_queue_gives_the_highest_first(channel, queue_name):
    queue = Queue(queue_name, durable=False, max_priority=5)(channel)
    queue.declare()
    for priority in (1, 5, 3):
        Producer(channel).publish(priority, routing_key=queue_name, priority=priority)
    assert [take(queue).payload for _ in range(3)] == [5, 3, 1]


# -- consumers ------------------------------------------------------------------------------------


def test_all_callbacks_of_a_consumer_are_called_in_order(connection, channel, queue, queue_name):
    inbox, others = Inbox(connection), []
    consumer = Consumer(channel, [queue], callbacks=[lambda body, _: others.append(body)])
    consumer.register_callback(inbox)
    with consumer:
        Producer(channel).publish("x", routing_key=queue_name)
        assert inbox.drain(1) == others == ["x"]


def test_a_consumer_takes_on_and_cancels_queues(connection, channel, queue, queue_name):
    inbox = Inbox(connection)
    other = Queue(f"{queue_name}-other", durable=False)
    producer = Producer(channel)
    with Consumer(channel, [queue], callbacks=[inbox]) as consumer:
        consumer.add_queue(other)
        consumer.consume()
        assert consumer.consuming_from(other)
        producer.publish(["other"], routing_key=other.name)
        assert inbox.drain(1) == [["other"]]
        consumer.cancel_by_queue(queue_name)
        assert not consumer.consuming_from(queue)
        producer.publish("to nobody", routing_key=queue_name)
        assert inbox.is_quiet()
        producer.publish(["still"], routing_key=other.name)
        assert inbox.drain(2) == [["other"], ["still"]]
    assert take(queue).payload == "to nobody"


@pytest.mark.parametrize("no_ack", [False, True])
def test_a_cancelled_consumer_leaves_its_channel_to_the_others(
    amqp_url, connection, channel, queue_name, no_ack
):
    """Cancelled while messages pour in, of which none is taken amiss, and none is handled after."""
    publish(amqp_url, queue_name, 3000)
    other = Queue(f"{queue_name}-other", durable=False)
    inbox, steady = Inbox(connection, ack=not no_ack), Inbox(connection)
    with Consumer(channel, [other], callbacks=[steady]):
        consumer = Consumer(channel, [Queue(queue_name)], callbacks=[inbox], no_ack=no_ack)
        consumer.consume()
        inbox.drain(100)
        consumer.cancel()
        Producer(channel).publish("still here", routing_key=other.name)
        assert steady.drain(1) == ["still here"]
    if not no_ack:
        left = wait_until(lambda: queue_depth(amqp_url, queue_name))
        assert len(inbox.bodies) + left == 3000
    assert inbox.bodies == list(range(len(inbox.bodies)))


def test_what_a_cancelled_consumer_has_not_dispatched_goes_back_while_its_channel_lives(
    rabbitmq, amqp_url, connection, channel, queue_name
):
    """py-amqp keeps it until the channel closes."""
    publish(amqp_url, queue_name, 10)
    inbox = Inbox(connection, ack=False)
    consumer = Consumer(channel, [Queue(queue_name)], callbacks=[inbox], prefetch_count=8)
    consumer.consume()
    inbox.drain(1)
    wait_until(lambda: connection.connection.backlog == 7)
    consumer.cancel()
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name)[:2] == (9, 1))
    assert inbox.bodies == [0]
    inbox.messages[0].ack()
    wait_until(lambda: rabbitmq.queue_counts(amqp_url, queue_name)[:2] == (9, 0))


def test_prefetch_bounds_what_is_unacked(connection, channel, queue, queue_name):
    inbox = Inbox(connection, ack=False)
    for number in range(5):
        Producer(channel).publish(number, routing_key=queue_name)
    with Consumer(channel, [queue], callbacks=[inbox], prefetch_count=2) as consumer:
        inbox.drain(2)
        assert inbox.is_quiet()
        consumer.qos(prefetch_count=3)
        inbox.messages[1].ack(multiple=True)
        inbox.drain(4)
    assert inbox.bodies[:4] == [0, 1, 2, 3]


def test_recover_brings_back_what_is_unacked(connection, channel, queue, queue_name):
    inbox = Inbox(connection, ack=False)
    Producer(channel).publish("x", routing_key=queue_name)
    with Consumer(channel, [queue], callbacks=[inbox]) as consumer:
        inbox.drain(1)
        consumer.recover(requeue=True)
        assert inbox.drain(2) == ["x", "x"]
    assert [message.delivery_info["redelivered"] for message in inbox.messages] == [False, True]


@pytest.mark.parametrize(("settle", "comes_back"), [("requeue", True), ("reject", False)])
def test_a_message_is_requeued_or_rejected(
    connection, channel, queue, queue_name, settle, comes_back
):
    inbox = Inbox(connection, ack=False)
    Producer(channel).publish("x", routing_key=queue_name)
    with Consumer(channel, [queue], callbacks=[inbox]):
        inbox.drain(1)
        getattr(inbox.messages[0], settle)()
        assert inbox.drain(2) if comes_back else inbox.is_quiet()


def test_a_content_type_that_is_not_accepted_is_raised(connection, channel, queue, queue_name):
    Producer(channel, serializer="pickle").publish("x", routing_key=queue_name)
    with Consumer(channel, [queue], callbacks=[Inbox(connection)], accept=["json"]):
        with pytest.raises(ContentDisallowed):
            connection.drain_events(timeout=SOON)


def test_on_message_gets_what_is_not_decoded(connection, channel, queue, queue_name):
    seen: list[Any] = []
    Producer(channel).publish({"a": 1}, routing_key=queue_name)
    with Consumer(channel, [queue], on_message=seen.append, no_ack=True):
        connection.drain_events(timeout=SOON)
    assert seen[0].body == '{"a": 1}'
    assert seen[0].payload == {"a": 1}


def test_purge_tells_how_many_went(channel, queue, queue_name):
    for _ in range(3):
        Producer(channel).publish("x", routing_key=queue_name)
    assert Consumer(channel, [queue]).purge() == 3


def test_flow_raises_what_the_broker_says(channel, queue):
    """RabbitMQ closes the connection over it; who did it is told why, as no waiting mends it."""
    with pytest.raises(amqp.AMQPNotImplementedError, match="active=false"):
        Consumer(channel, [queue]).flow(False)


def test_a_timeout_leaves_no_trace(connection, channel, queue, queue_name):
    inbox = Inbox(connection)
    with Consumer(channel, [queue], callbacks=[inbox]):
        for timeout in (0, 0.001, 0.01):
            with pytest.raises(socket.timeout):
                connection.drain_events(timeout=timeout)
        Producer(channel).publish("x", routing_key=queue_name)
        assert inbox.drain(1) == ["x"]
