"""Owns publishing with confirms as an application sees it: kombu's options in, one answer for each message.

Serializing is left to a `kombu.Producer`, what is outstanding to an `Outbox`. It must never hold up
greenlets that publish for one that waits. Used by applications, from any number of greenlets at once.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Sequence
from itertools import count
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any
from uuid import uuid4

import amqp
import kombu
from gevent import get_hub
from kombu import Exchange, Producer, serialization
from kombu.transport import pyamqp
from kombu.utils import json as kombu_json

from greenconsume.amqp.transport import Transport
from greenconsume.around import Around, entered
from greenconsume.checks import is_count, is_list, is_seconds
from greenconsume.errors import ForeignThreadError, ForkedError, PublishError, StoppedError
from greenconsume.links.brokers import connection_to
from greenconsume.links.pool import LinkPool
from greenconsume.patching import require_patched
from greenconsume.publishing.outbox import Outbox
from greenconsume.publishing.publication import AddressedMessage, Publication
from greenconsume.stopping import Deadline

#: What kombu's `json.dumps` comes to, without an encoder made for each message.
_encode_json = kombu_json.JSONEncoder().encode


#: The publishers that have published, here or in a process that this one was forked from.
_used: weakref.WeakSet[Publisher] = weakref.WeakSet()
#: Seconds that the end of a process waits for what is not confirmed.
_AT_EXIT = 1.0


class Publisher:
    """Publishes from any number of greenlets over one channel; each `publish` returns with its own confirm.

    It connects when it is first used, and again whenever its link was lost. What was not confirmed by then
    is written again, with the same `message_id`: a message may arrive twice, and none is lost in silence.

    Only AMQP has confirms: with another transport a message counts as confirmed once the transport took
    it, and `mandatory` does nothing.

    It belongs to the process and thread that first publish with it: one that a fork finds only made is each
    child's own. Leaving `with` closes it, and so does the end of the process.

    Args:
        broker: A kombu URL (`;` between alternatives to fail over to), or a kombu `Connection`.
        exchange: Where to publish unless told otherwise. An `Exchange` is declared, a name is not.
        routing_key: The routing key unless told otherwise.
        serializer: As `kombu.Producer` takes it; JSON by default.
        compression: As `kombu.Producer` takes it.
        timeout: Seconds that a message has until its confirm, all told; None: as long as it takes.
        max_retries: How often a message is written again; None: until its timeout.
        max_unconfirmed: While this many messages are outstanding, publishing waits.
        links: Where its link comes from, to share it with others that publish.
        around: What is entered around each message until it is confirmed, or, with `publish_nowait`,
            until it is taken: callables that take the `Publication`, whose `headers` may be added to,
            and return a context manager.

    Attributes:
        uri: The broker's address, without its password.

    Raises:
        UnsupportedTransportError: The broker's transport is unknown, or blocks the whole process.
        TypeError: `broker` is neither a URL nor a connection, or another argument is of another kind.
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        broker: str | kombu.Connection = "memory://",
        *,
        exchange: str | Exchange | None = None,
        routing_key: str = "",
        serializer: str | None = None,
        compression: str | None = None,
        timeout: float | None = 30.0,
        max_retries: int | None = None,
        max_unconfirmed: int = 10_000,
        links: LinkPool | None = None,
        around: Sequence[Around] = (),
    ) -> None:
        _check_numbers(max_unconfirmed, timeout, max_retries)
        _check_kinds(exchange, links, around)
        connection = connection_to(broker)
        self.uri: str = connection.as_uri()
        self._timeout = timeout
        self._max_retries = max_retries
        self._around = tuple(around)
        self._declare = [exchange] if isinstance(exchange, Exchange) and exchange.name else []
        self._on_amqp = isinstance(connection.transport, Transport)
        self._in_process = getattr(connection.transport, "in_process", False)
        self._producer = Producer(
            _Taker() if self._on_amqp else _PlainTaker(),
            exchange=Exchange(exchange) if isinstance(exchange, str) else exchange,
            routing_key=routing_key,
            serializer=serializer,
            compression=compression,
            auto_declare=False,
        )
        self._outbox = Outbox(connection, links or LinkPool(), max_unconfirmed)
        self._id_prefix, self._id_numbers = "", count(1)
        self._pid: int | None = None  # of the process that publishes
        self._hub: Any = None  # of the thread that publishes
        self._closed = False

    def publish(self, body: object, routing_key: str | None = None, **options: object) -> None:
        """Publish, and wait until the broker has confirmed this very message.

        Args:
            body: Whatever the serializer takes.
            routing_key: By default the publisher's.
            **options: Those of `kombu.Producer.publish`: `exchange`, `declare`, `headers`, `priority`,
                `expiration`, `mandatory`, `serializer`, `message_id` and so on. `timeout` stands for the
                publisher's; `retry=False`, or `max_retries` in `retry_policy`, for its `max_retries`.

        Raises:
            PublishError: As `Publication.wait` and `publish_nowait`.
            kombu.exceptions.EncodeError: The body cannot be serialized.
            StoppedError: The publisher was stopped or closed.

        Switches: yes. From any greenlet of its hub, a consumer's handler too.
        """
        publication = self._make(body, routing_key, options)
        if self._around:
            with entered(self._around, publication):
                self._outbox.put(publication)
                publication.wait()
        else:
            self._outbox.put(publication)
            publication.wait()

    def publish_nowait(
        self, body: object, routing_key: str | None = None, **options: object
    ) -> Publication:
        """Publish as `publish` does, and return what its confirm may be waited for with.

        The failure of a message that nobody waits for is logged, and raised by the next `flush` or `close`.

        Raises:
            PublishTimeoutError: There was no room for it in time.
            BlockedError: The broker blocked its publishers for too long.
            PublishError: One of its properties cannot be encoded.
            kombu.exceptions.EncodeError: The body cannot be serialized.
            StoppedError: The publisher was stopped or closed.
            ForkedError: The publisher has published in another process.
            ForeignThreadError: It has published in another thread.
            NotPatchedError: The process is not patched by gevent.

        Switches: only while `max_unconfirmed` messages are outstanding, the broker blocks its publishers,
        or more is unsent than the link holds.
        """
        publication = self._make(body, routing_key, options)
        if self._around:
            with entered(self._around, publication):
                self._outbox.put(publication)
        else:
            self._outbox.put(publication)
        return publication

    def _make(self, body: object, routing_key: str | None, options: dict[str, Any]) -> Publication:
        if os.getpid() != self._pid or get_hub() is not self._hub:
            self._bind()
        if self._closed:
            raise StoppedError("close")
        self._outbox.stop.check()
        if self._around:  # they may add headers, and not to the caller's
            options["headers"] = dict(options.get("headers") or {})
        return self._serialize(body, routing_key, options)

    def _bind(self) -> None:
        """Make this process and thread its own; not sooner: a child that is forked later has its own."""
        if self._pid not in (None, os.getpid()):
            raise ForkedError("this Publisher")
        if self._hub is not None:
            raise ForeignThreadError(
                "this Publisher",
                "make a Publisher in this thread, or hand the message to that thread, as a queue does",
            )
        if not self._in_process:
            require_patched()
        self._pid, self._hub = os.getpid(), get_hub()
        self._id_prefix = uuid4().hex[:20]
        _used.add(self)

    def _serialize(
        self, body: object, routing_key: str | None, options: dict[str, Any]
    ) -> Publication:
        timeout, confirm_timeout = (
            options.pop("timeout", None),
            options.pop("confirm_timeout", None),
        )
        policy = options.pop("retry_policy", None) or {}
        retries = policy.get("max_retries", self._max_retries)
        if not options.pop("retry", True):
            retries = 0
        declare = options.pop("declare", None)
        if options.get("message_id") is None:
            options["message_id"] = f"{self._id_prefix}{next(self._id_numbers):012x}"
        if timeout is None:
            timeout = self._timeout if confirm_timeout is None else confirm_timeout
        if type(body) in (dict, list) and self._is_json(options):
            try:
                body = _encode_json(body)
                options |= {"content_type": "application/json", "content_encoding": "utf-8"}
            except Exception:  # whatever a value's own code raises: kombu tells it in its words
                pass
        address: AddressedMessage = self._producer.publish(body, routing_key, **options)
        return Publication(
            address,
            self._outbox.on_answer,
            message_id=options["message_id"],
            due=inf if timeout is None else monotonic() + timeout,
            max_retries=inf if retries is None else retries,
            declare=[*declare, *self._declare] if declare else self._declare,
        )

    def _is_json(self, options: dict[str, Any]) -> bool:
        """Return whether kombu would make plain JSON of a dict or list."""
        return (
            self._on_amqp
            and self._producer.serializer is None
            and options.keys().isdisjoint(("serializer", "content_type", "content_encoding"))
            and serialization.registry._default_encode is kombu_json.dumps
        )

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every message that is outstanding now is confirmed.

        Args:
            timeout: Seconds to wait at the most; each message ends by its own timeout, too.

        Raises:
            PublishTimeoutError: Some are still not confirmed.
            PublishError: Some that nobody waited for have failed since the last time.

        Switches: yes.
        """
        self._outbox.flush(Deadline(timeout))

    def stop(self, reason: str = "stop") -> None:
        """Have every wait end now: what is outstanding fails with `UnconfirmedError`. Only signals.

        Switches: never. From any greenlet, thread or signal handler. `close` is still to be called.
        """
        self._outbox.stop.set(reason)

    def close(self, timeout: float | None = None) -> None:
        """Take no more, flush, and let go of the link. Idempotent.

        Args:
            timeout: Seconds that the flush may take; what is not confirmed then fails.

        Raises:
            PublishError: As `flush`; the publisher is closed all the same.

        Switches: yes.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.flush(timeout)
        finally:
            self._outbox.close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except PublishError:
            if exc_type is None:  # else it would hide what went wrong first; it is in the log
                raise


@atexit.register
def _close_used() -> None:
    """Close what this process has published with, and nobody has closed: after its last request, for one."""
    for publisher in list(_used):
        if publisher._pid == os.getpid() and publisher._hub is get_hub():
            try:
                publisher.close(_AT_EXIT)
            except PublishError:  # the log has it
                pass


def _check_kinds(exchange: object, links: object, around: object) -> None:
    if not isinstance(exchange, str | Exchange | None):
        raise TypeError(f"exchange must be a name, an Exchange or None, not {exchange!r}")
    if not isinstance(links, LinkPool | None):
        raise TypeError(f"links must be a LinkPool or None, not {links!r}")
    if not (is_list(around) and all(map(callable, around))):
        raise TypeError(f"around must be a list of callables, not {around!r}")


def _check_numbers(max_unconfirmed: int, timeout: float | None, max_retries: int | None) -> None:
    if not is_count(max_unconfirmed):
        raise ValueError(f"max_unconfirmed must be 1 or more, not {max_unconfirmed!r}")
    if not (timeout is None or is_seconds(timeout, above_zero=True)):
        raise ValueError(f"timeout must be more than 0 seconds, or None, not {timeout!r}")
    if not (max_retries is None or is_count(max_retries, 0)):
        raise ValueError(f"max_retries must be 0 or more, or None, not {max_retries!r}")


class _Taker:
    """A stand-in for a `kombu.Producer`'s channel: it returns what is published, and where to."""

    prepare_message = pyamqp.Channel.prepare_message

    def basic_publish(
        self,
        message: amqp.Message,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        **_timeouts: float | None,
    ) -> AddressedMessage:
        return message, exchange, routing_key, mandatory, immediate


class _PlainTaker(_Taker):
    """The same for transports whose messages only a channel of theirs can prepare, once there is one."""

    def prepare_message(self, *message: object) -> tuple[Any, ...]:
        return message
