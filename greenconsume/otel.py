"""Owns tracing and messaging metrics by OpenTelemetry: the extra `greenconsume[otel]`.

What to put around handlers and publications (`Tracing.process`, `Tracing.send`), by the semantic conventions
for messaging and for RabbitMQ. The context travels in the message's headers, and so goes with its retries,
its dead letter and its replay. It must never fail a message. Called by users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from kombu import Message
from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Link, Span, SpanKind, StatusCode

from greenconsume.around import PlainPublication, around_producers
from greenconsume.errors import Shutdown
from greenconsume.handling.batches import Batch
from greenconsume.handling.wrapping import current_handler
from greenconsume.publishing.publication import Publication

_NAME = "greenconsume"
#: Bounds that the conventions advise for durations, in seconds.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)

Attributes = dict[str, Any]


class _Headers(Getter[Mapping[str, Any]]):
    """Reads a context from a message's headers, which may be anything: what is no text is none."""

    def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
        """Return the values of a header. Never switches."""
        value = carrier.get(key)
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Mapping[str, Any]) -> list[str]:
        """Return the names of all headers. Never switches."""
        return list(carrier)


_headers = _Headers()


class Tracing:
    """Makes a span for each message that is handled or published, and measures both.

    Example:
        tracing = Tracing()
        runtime = Runtime("amqp://", around=[tracing.process])
        publisher = Publisher("amqp://", around=[tracing.send])

    Args:
        tracer_provider: By default the global one.
        meter_provider: By default the global one.
        parent: A handler's span is a child of its producer's, in one trace. Otherwise it begins a trace of
            its own, with a link to the producer's. A batch has links alone.
        system: What the conventions call the broker: `rabbitmq`, `redis`.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        parent: bool = False,
        system: str = "rabbitmq",
    ) -> None:
        self._tracer = trace.get_tracer(_NAME, tracer_provider=tracer_provider)
        self._parent, self._system = parent, system
        meter = metrics.get_meter(_NAME, meter_provider=meter_provider)
        advised = {"explicit_bucket_boundaries_advisory": _BUCKETS}
        self._process_seconds = meter.create_histogram(
            "messaging.process.duration", "s", "Duration of processing", **advised
        )
        self._send_seconds = meter.create_histogram(
            "messaging.client.operation.duration", "s", "Duration of sending", **advised
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Messages given to handlers"
        )
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Messages published"
        )

    @contextmanager
    def process(self, message: Message | Batch) -> Iterator[None]:
        """Enter a span around a handler: what goes into a consumer's or a runtime's `around`.

        Args:
            message: A `kombu.Message`, whose `headers` may have the context of who published it, or a
                `Batch` of them.

        Switches: never by itself. In the handler's greenlet.
        """
        subject = [each for _, each in message] if isinstance(message, Batch) else [message]
        handler = current_handler()
        queue = handler.queue if handler is not None else ""
        contexts = [propagate.extract(each.headers or {}, getter=_headers) for each in subject]
        attributes = self._common("process") | self._known(_consumed_from(subject, queue))
        measured = _measured(attributes, queue)
        self._consumed.add(len(subject), measured)
        began = perf_counter()
        with self._tracer.start_as_current_span(
            f"process {queue or attributes['messaging.destination.name']}",
            context=self._context_of(contexts),
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=[] if self._is_child(contexts) else _links_to(contexts),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as exc:
                _note(span, exc, measured)
                raise
            finally:
                self._process_seconds.record(perf_counter() - began, measured)

    @contextmanager
    def send(self, publication: Publication | PlainPublication) -> Iterator[None]:
        """Enter a span around a publication, with its context in the headers: for a publisher's `around`.

        Args:
            publication: Its `headers`, a dict, are added to (`traceparent` and what else is propagated).

        Switches: never by itself. In the greenlet that publishes.
        """
        address = (publication.exchange, publication.routing_key)
        destination = _destination(*address)
        attributes = self._common("send") | self._known(
            {
                "messaging.destination.name": destination,
                "messaging.rabbitmq.destination.routing_key": publication.routing_key,
                "messaging.message.id": publication.message_id,
            }
        )
        measured = _measured(attributes, publication.exchange or publication.routing_key)
        began = perf_counter()
        with self._tracer.start_as_current_span(
            f"send {destination}",
            kind=SpanKind.PRODUCER,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            propagate.inject(publication.headers)
            try:
                yield
            except BaseException as exc:
                _note(span, exc, measured)
                raise
            finally:
                self._sent.add(1, measured)
                self._send_seconds.record(perf_counter() - began, measured)

    def around_producers(self) -> Callable[[], None]:
        """Enter `send` around each message that a plain `kombu.Producer` publishes over a green transport.

        For the whole process, from now on. A `Publisher` says its own `around`; copies of failed messages
        keep their context.

        Returns:
            What ends it.

        Switches: never. From any greenlet.
        """
        return around_producers([self.send])

    @staticmethod
    def headers(headers: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return headers with the present context in them, for what `around_producers` does not reach.

        Args:
            headers: What else is in them; it is not changed.

        Switches: never. From any greenlet.
        """
        carrier = dict(headers or {})
        propagate.inject(carrier)
        return carrier

    def _common(self, operation: str) -> Attributes:
        return {
            "messaging.system": self._system,
            "messaging.operation.name": operation,
            "messaging.operation.type": operation,
        }

    def _known(self, attributes: Attributes) -> Attributes:
        """Return the attributes that say something, and of RabbitMQ's own only for RabbitMQ."""
        foreign = () if self._system == "rabbitmq" else ("messaging.rabbitmq.",)
        return {
            name: value
            for name, value in attributes.items()
            if value not in (None, "") and not name.startswith(foreign)
        }

    def _is_child(self, contexts: Sequence[Context]) -> bool:
        return self._parent and len(contexts) == 1

    def _context_of(self, contexts: Sequence[Context]) -> Context:
        return contexts[0] if self._is_child(contexts) else Context()


def _consumed_from(messages: Sequence[Any], queue: str) -> Attributes:
    first = messages[0]
    info = first.delivery_info or {}
    key = str(info.get("routing_key") or "")
    found: Attributes = {
        "messaging.destination.name": _destination(str(info.get("exchange") or ""), key, queue),
        "messaging.rabbitmq.destination.routing_key": key,
    }
    if len(messages) > 1:
        return {**found, "messaging.batch.message_count": len(messages)}
    properties = first.properties or {}
    return {
        **found,
        "messaging.message.id": properties.get("message_id"),
        "messaging.message.conversation_id": properties.get("correlation_id"),
        "messaging.rabbitmq.message.delivery_tag": first.delivery_tag,
    }


def _destination(exchange: str, key: str, queue: str = "") -> str:
    """Return a destination as the conventions name it for RabbitMQ: exchange, routing key and queue."""
    names = [exchange, key, "" if queue == key else queue]
    return ":".join(filter(None, names)) or "amq.default"


def _measured(attributes: Attributes, destination: str) -> Attributes:
    """Return the attributes whose values are few: no routing key, which a publisher makes up."""
    kept = {name: attributes[name] for name in ("messaging.system", "messaging.operation.name")}
    return {**kept, "messaging.destination.name": destination}


def _links_to(contexts: Sequence[Context]) -> list[Link]:
    spans = (trace.get_current_span(each).get_span_context() for each in contexts)
    return [Link(span) for span in spans if span.is_valid]


def _note(span: Span, error: BaseException, measured: Attributes) -> None:
    """Note how a message failed. One that is cancelled has not failed: it goes back unaltered."""
    if isinstance(error, Shutdown):
        span.add_event("cancelled by a drain")
        return
    kind = type(error).__qualname__
    span.record_exception(error)
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, str(error)[:200])
    measured["error.type"] = kind
