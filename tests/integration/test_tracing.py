"""Tests spans and messaging metrics with OpenTelemetry's own SDK, over a real broker."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import flask
import pytest
from amqp.exceptions import ChannelError
from kombu import Connection, Producer, Queue
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from greenconsume import (
    ConsumerMixin,
    ConsumerOptions,
    DeadLetters,
    Publisher,
    Reject,
    Retry,
    Runtime,
)
from greenconsume.around import PlainPublication
from greenconsume.around import around_producers as chosen_around
from greenconsume.otel import Tracing
from tests.waiting import wait_until


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
def provider(spans):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider


@pytest.fixture
def reader():
    return InMemoryMetricReader()


@pytest.fixture
def tracing(provider, reader):
    def make(**options):
        return Tracing(provider, MeterProvider([reader]), **options)

    return make


@pytest.fixture
def run(amqp_url, queue_name):
    yield from runner(amqp_url, queue_name)


def runner(url, queue_name):
    runtimes = []

    def start(work, around, **options):
        class Orders(ConsumerMixin):
            def __init__(self, connection):
                self.connection = connection

            def get_consumers(self, Consumer, channel):
                return [Consumer([Queue(queue_name)], callbacks=[work])]

        Orders.options = ConsumerOptions(**{"on_error": Reject(), **options})
        runtime = Runtime(url, around=around)
        runtime.spawn(Orders)
        runtime.start()
        runtimes.append(runtime)
        return runtime.children[0].tally

    yield start
    for runtime in runtimes:
        runtime.stop()
        runtime.join()


def of_kind(spans, kind):
    return [span for span in spans.get_finished_spans() if span.kind is kind]


def test_one_trace_from_a_request_to_the_replay_of_its_dead_letter(
    run, amqp_url, queue_name, spans, provider, tracing
):
    trace = tracing(parent=True)
    mended = []

    def work(body, message):
        if not mended:
            raise ConnectionError("the bank is away")
        message.ack()

    app = flask.Flask(__name__)

    @app.post("/orders")
    def order():
        with provider.get_tracer("web").start_as_current_span("POST /orders"):
            publisher.publish({"order": 7})
        return "ok"

    tally = run(work, [trace.process], on_error=Retry(delays=[0.05, 0.05]))
    with Publisher(amqp_url, routing_key=queue_name, around=[trace.send]) as publisher:
        assert app.test_client().post("/orders").status_code == 200
    wait_until(lambda: tally.dead_letters == 1)
    mended.append(True)
    with DeadLetters(amqp_url, f"{queue_name}.dead") as letters:
        for letter in letters:
            letters.replay(letter)
    wait_until(lambda: tally.ok == 1)
    (web,) = of_kind(spans, SpanKind.INTERNAL)
    (sent,) = of_kind(spans, SpanKind.PRODUCER)
    handled = of_kind(spans, SpanKind.CONSUMER)
    assert [span.status.status_code for span in handled] == [StatusCode.ERROR] * 3 + [
        StatusCode.UNSET
    ]
    assert {span.context.trace_id for span in spans.get_finished_spans()} == {web.context.trace_id}
    assert {span.parent.span_id for span in handled} == {sent.context.span_id}
    assert sent.parent.span_id == web.context.span_id


def test_spans_are_named_and_described_by_the_conventions(
    run, amqp_url, queue_name, spans, tracing
):
    trace = tracing()
    tally = run(lambda body, message: message.ack(), [trace.process])
    with Publisher(amqp_url, routing_key=queue_name, around=[trace.send]) as publisher:
        publisher.publish({"order": 7}, message_id="m-1", correlation_id="c-1")
    wait_until(lambda: tally.ok == 1)
    (sent,), (handled,) = of_kind(spans, SpanKind.PRODUCER), of_kind(spans, SpanKind.CONSUMER)
    assert (sent.name, handled.name) == (f"send {queue_name}", f"process {queue_name}")
    assert sent.attributes["messaging.operation.type"] == "send"
    assert dict(handled.attributes) == {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": queue_name,
        "messaging.rabbitmq.destination.routing_key": queue_name,
        "messaging.message.id": "m-1",
        "messaging.message.conversation_id": "c-1",
        "messaging.rabbitmq.message.delivery_tag": 1,
    }
    # Not parent, so a trace of its own with a link.
    assert handled.parent is None
    assert [link.context.span_id for link in handled.links] == [sent.context.span_id]


def test_what_is_rabbitmqs_own_is_said_of_rabbitmq_alone(run, amqp_url, queue_name, spans, tracing):
    """The conventions have no routing key, and no delivery tag, for other brokers."""
    trace = tracing(system="redis")
    tally = run(lambda body, message: message.ack(), [trace.process])
    with Publisher(amqp_url, routing_key=queue_name, around=[trace.send]) as publisher:
        publisher.publish({})
    wait_until(lambda: tally.ok == 1)
    for kind in (SpanKind.PRODUCER, SpanKind.CONSUMER):
        (span,) = of_kind(spans, kind)
        assert span.attributes["messaging.destination.name"] == queue_name
        assert not [name for name in span.attributes if "rabbitmq" in name]


@pytest.mark.parametrize("odd", [7, b"00-1", ["00-1"], {"a": 1}, True, "", "00-1"])
def test_headers_that_are_no_context_fail_no_message(spans, tracing, odd):
    """A publisher says what is in them: a number there must not have every message of it fail."""
    headers = {"traceparent": odd, "tracestate": odd, "baggage": odd}
    message = SimpleNamespace(headers=headers, delivery_info={}, properties={}, delivery_tag=1)
    with tracing(parent=True).process(message):
        pass
    (handled,) = spans.get_finished_spans()
    assert (handled.parent, handled.links) == (None, ())


def test_without_a_routing_key_a_span_has_none(spans, tracing):
    trace = tracing()
    with trace.send(PlainPublication("news", "", "", {})):
        pass
    (sent,) = spans.get_finished_spans()
    assert sent.attributes["messaging.destination.name"] == "news"
    assert "messaging.rabbitmq.destination.routing_key" not in sent.attributes
    assert "messaging.message.id" not in sent.attributes


def test_a_batch_links_all_its_messages(run, amqp_url, queue_name, spans, tracing):
    trace = tracing(parent=True)
    options = {"batch_size": 3, "batch_timeout": 60}
    tally = run(lambda batch: batch.ack(), [trace.process], **options)
    with Publisher(amqp_url, routing_key=queue_name, around=[trace.send]) as publisher:
        for number in range(3):
            publisher.publish(number)
    wait_until(lambda: tally.ok == 3)
    (handled,) = of_kind(spans, SpanKind.CONSUMER)
    sent = {span.context.span_id for span in of_kind(spans, SpanKind.PRODUCER)}
    assert {link.context.span_id for link in handled.links} == sent
    assert len(sent) == handled.attributes["messaging.batch.message_count"] == 3


def test_a_plain_kombu_producer_takes_the_context_along_by_choice(
    run, amqp_url, queue_name, spans, provider, tracing
):
    trace = tracing(parent=True)
    tally = run(lambda body, message: message.ack(), [trace.process])
    with Connection(amqp_url) as connection:
        with provider.get_tracer("web").start_as_current_span("request") as web:
            headers = trace.headers({"tenant": "acme"})
            Producer(connection).publish({}, routing_key=queue_name, headers=headers)
    wait_until(lambda: tally.ok == 1)
    (handled,) = of_kind(spans, SpanKind.CONSUMER)
    assert handled.parent.span_id == web.get_span_context().span_id


@pytest.fixture(params=["amqp", "redis", "memory"])
def url(request):
    if request.param == "memory":
        return "memory://"
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def run_at(url, queue_name):
    yield from runner(url, queue_name)


@pytest.fixture
def around_producers(tracing):
    trace = tracing(parent=True)
    end = trace.around_producers()
    yield trace
    end()


def test_one_trace_from_a_plain_producer_to_the_replay_of_its_dead_letter(
    run_at, url, queue_name, spans, provider, around_producers
):
    mended = []

    def work(body, message):
        assert message.headers["tenant"] == "acme"
        if not mended:
            raise ConnectionError("the bank is away")
        message.ack()

    app, own = flask.Flask(__name__), {"tenant": "acme"}

    @app.post("/orders")
    def order():
        with provider.get_tracer("web").start_as_current_span("POST /orders"):
            with Connection(url) as connection:
                Producer(connection).publish({"order": 7}, routing_key=queue_name, headers=own)
        return "ok"

    tally = run_at(work, [around_producers.process], on_error=Retry(delays=[0.05, 0.05]))
    assert app.test_client().post("/orders").status_code == 200
    wait_until(lambda: tally.dead_letters == 1)
    mended.append(True)
    with DeadLetters(url, f"{queue_name}.dead") as letters:
        for letter in letters:
            letters.replay(letter)
    wait_until(lambda: tally.ok == 1)
    (web,) = of_kind(spans, SpanKind.INTERNAL)
    (sent,) = of_kind(spans, SpanKind.PRODUCER)  # no copy is one
    handled = of_kind(spans, SpanKind.CONSUMER)
    assert len(handled) == 4
    assert sent.parent.span_id == web.context.span_id
    assert {span.parent.span_id for span in handled} == {sent.context.span_id}
    assert {span.context.trace_id for span in spans.get_finished_spans()} == {web.context.trace_id}
    assert own == {"tenant": "acme"}


def test_a_plain_producer_is_traced_by_choice_alone(url, queue_name, spans, tracing):
    def publish():
        with Connection(url) as connection, connection.SimpleQueue(queue_name) as queue:
            queue.put(1)
            message = queue.get(timeout=30)
            message.ack()
            return message.headers

    assert "traceparent" not in publish()
    end = tracing().around_producers()
    assert "traceparent" in publish()
    end()
    assert "traceparent" not in publish()
    (sent,) = spans.get_finished_spans()
    assert sent.kind is SpanKind.PRODUCER


def test_what_is_around_a_plain_producer_may_publish_plainly_itself(url, queue_name):
    entered = []

    @contextmanager
    def audited(publication):
        entered.append(publication.routing_key)
        with Connection(url) as connection:
            Producer(connection).publish("audit", routing_key=queue_name)
        yield

    end = chosen_around([audited])
    try:
        with Connection(url) as connection, connection.SimpleQueue(queue_name) as queue:
            queue.put("order")
            bodies = [queue.get(timeout=30).payload for _ in range(2)]
    finally:
        end()
    assert bodies == ["audit", "order"]
    assert entered == [queue_name]


def test_a_confirmed_publish_of_a_plain_producer_is_traced_with_its_failure(
    amqp_url, spans, around_producers
):
    with Connection(amqp_url, transport_options={"confirm_publish": True}) as connection:
        with pytest.raises(ChannelError):
            Producer(connection).publish(1, routing_key="nowhere", mandatory=True)
    (sent,) = spans.get_finished_spans()
    assert sent.status.status_code is StatusCode.ERROR


def test_a_timeout_is_an_error_and_a_drain_is_none(run, amqp_url, queue_name, spans, tracing):
    import gevent

    trace = tracing()
    options = {"concurrency": 2, "drain_timeout": 0.0, "handler_timeout": 0.2}
    tally = run(lambda body, message: gevent.sleep(60), [trace.process], **options)
    with Publisher(amqp_url, routing_key=queue_name) as publisher:
        publisher.publish(1)
    wait_until(lambda: tally.timed_out == 1)
    (handled,) = wait_until(lambda: of_kind(spans, SpanKind.CONSUMER))
    assert handled.attributes["error.type"] == "HandlerTimeout"
    assert handled.status.status_code is StatusCode.ERROR


def test_the_four_messaging_metrics_are_measured(run, amqp_url, queue_name, reader, tracing):
    trace = tracing()

    def work(body, message):
        if body:
            raise ValueError("no such order")
        message.ack()

    tally = run(work, [trace.process])
    with Publisher(amqp_url, routing_key=queue_name, around=[trace.send]) as publisher:
        publisher.publish(0)
        publisher.publish(1)
    wait_until(lambda: tally.ok + tally.failed == 2)
    data = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    points = {metric.name: list(metric.data.data_points) for metric in data}
    assert points.keys() == {
        "messaging.process.duration",
        "messaging.client.operation.duration",
        "messaging.client.consumed.messages",
        "messaging.client.sent.messages",
    }
    assert [point.value for point in points["messaging.client.sent.messages"]] == [2]
    assert [point.value for point in points["messaging.client.consumed.messages"]] == [2]
    durations = points["messaging.process.duration"]
    assert sorted(point.attributes.get("error.type", "") for point in durations) == [
        "",
        "ValueError",
    ]
    assert all(point.attributes["messaging.destination.name"] == queue_name for point in durations)
