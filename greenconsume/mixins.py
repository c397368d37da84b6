"""Owns the kombu interface: `ConsumerMixin` and `ConsumerProducerMixin`, names and order of calls as kombu's.

A class written for `kombu.mixins` runs unchanged. Where kombu polls, swallows or blocks, this waits: for a
delivery, the stop signal or a deadline, whichever comes first. Users subclass it; `runtime.greenlet` runs it.
What connects, receives and drains is `consuming`: on these classes stand kombu's names and `options`.

`error`, `warn` and `sleep` are module-level names that are looked up when they are called, as kombu's are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kombu import Connection, Message, Producer
from kombu import mixins as kombu_mixins
from kombu.common import ignore_errors
from kombu.utils.compat import nested
from kombu.utils.encoding import safe_repr

from greenconsume.amqp import blame
from greenconsume.amqp.transport import LinkLostError
from greenconsume.consuming.connecting import Attempt
from greenconsume.consuming.engine import ensure_engine, ensure_lifecycle
from greenconsume.consuming.lighter import Alone, RestartLimit
from greenconsume.consuming.receiving import Loop
from greenconsume.handling.options import ConsumerOptions
from greenconsume.stopping import StopCheck, StopSignal
from greenconsume.transports import registry

if TYPE_CHECKING:
    # kombu's are untyped, and ours have all that is in them.
    class _KombuConsumer: ...

    class _KombuConsumerProducer: ...
else:
    _KombuConsumer = kombu_mixins.ConsumerMixin
    _KombuConsumerProducer = kombu_mixins.ConsumerProducerMixin

logger = logging.getLogger(__name__)
debug, info, warn, error = logger.debug, logger.info, logger.warning, logger.error

_NO_CONTEXT = nullcontext()  # one for all: it keeps nothing

W_CONN_LOST = "Connection to broker lost, trying to re-establish connection..."
W_CONN_ERROR = "Broker connection error, trying again in %s seconds: %r."


def sleep(seconds: float, stop: StopSignal) -> None:
    """Wait for `seconds`, or until `stop` is set."""
    stop.wait(seconds)


# Subclasses of kombu's, of which they override all: so each takes the place of kombu's in a class that was
# derived from that one (`runtime.adapter`), and `isinstance` finds them wherever kombu's are expected.
class ConsumerMixin(_KombuConsumer):
    """A consumer: give it a `connection` and `get_consumers`, then `spawn` it or call `run`.

    Names, signatures, defaults and the order of calls are those of `kombu.mixins.ConsumerMixin` 5.7. The
    hooks (`get_consumers`, `extra_context`, `on_…`) are called in the consumer's own greenlet; each may
    switch, and what it raises ends the consumer. With `concurrency` callbacks run in greenlets of their own.

    Attributes:
        connection: A `kombu.Connection`; it is cloned, never used itself.
        connect_max_retries: Failed attempts to connect that are followed by another; None: all.
        should_stop: Assign True, from any greenlet or thread, to stop.
        options: How its messages are handled: `ConsumerOptions(…)`. It counts only where it is one.
    """

    connection: Any
    connect_max_retries: int | None = None
    # Typed by no more than this, for a class that calls something of its own so.
    options: Any = ConsumerOptions()

    # -- what users define or override ------------------------------------------------------------

    def get_consumers(self, Consumer: Any, channel: Any) -> Sequence[Any]:
        """Return the `kombu.Consumer`s to consume with; called anew after every reconnect.

        Their callbacks are called with `body` and `message`: the body as its content type says (of JSON a
        dict, list, str, number, bool or None; `bytes` where it has none), and the `kombu.Message`, with
        `headers` and `properties` (dicts), `delivery_info` (`exchange`, `routing_key`, `redelivered`), and
        `ack`, `reject`, `requeue`, which switch over polled transports alone. With `batch_size` they are
        called with a `Batch`.

        Args:
            Consumer: `kombu.Consumer`, bound to `channel` and to `on_decode_error`.
            channel: The consumer's default channel. `channel.connection.client.channel()` opens
                further ones, which live and die with the consumer.
        """
        raise NotImplementedError("Subclass responsibility")

    def on_connection_revived(self) -> None:
        """Do nothing; called when a connection is established, also the first one."""

    def on_consume_ready(
        self, connection: Connection, channel: Any, consumers: Sequence[Any], **kwargs: object
    ) -> None:
        """Do nothing; called when the consumers have begun to consume; `kwargs` are those of `consume`."""

    def on_consume_end(self, connection: Connection, channel: Any) -> None:
        """Do nothing; called after the consumers were cancelled."""

    def on_iteration(self) -> None:
        """Do nothing; called before each message, and every `safety_interval` seconds while there is none."""

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Log a message whose body cannot be decoded, and acknowledge it, as kombu does.

        That loses it. With `on_decode_error = None` in its place, such a message meets the `on_error` of
        the options.
        """
        error(
            "Can't decode message body: %r (type:%r encoding:%r raw:%r')",
            exc,
            message.content_type,
            message.content_encoding,
            safe_repr(message.body),
        )
        message.ack()

    def on_connection_error(self, exc: BaseException, interval: float) -> None:
        """Log a failed attempt to connect; the next one follows in `interval` seconds.

        Not overridden it is not called for what a link already logged once for all its consumers.
        """
        warn(W_CONN_ERROR, interval, exc, exc_info=True)

    def extra_context(self, connection: Connection, channel: Any) -> AbstractContextManager[Any]:
        """Return what is entered around consuming, after the consumers were set up: here, nothing."""
        return _NO_CONTEXT

    # -- stopping -------------------------------------------------------------------------------

    @property
    def should_stop(self) -> bool:
        """True if the consumer stops; assigning True wakes whatever it waits in. Never switches."""
        return ensure_lifecycle(self).stop.is_set()

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        stop = ensure_lifecycle(self).stop
        if value:
            stop.set("should_stop")
        else:
            stop.clear()

    # -- running --------------------------------------------------------------------------------

    def run(self, _tokens: int = 1, **kwargs: Any) -> None:
        """Consume until `should_stop`, coming back after connection and channel errors.

        Coming back costs a token of `restart_limit`, one a second by default.

        Args:
            _tokens: What one start costs.
            **kwargs: Passed to `consume`.

        Raises:
            NotPatchedError: The process is not patched by gevent.
            kombu.exceptions.OperationalError: `connect_max_retries` is used up.
            TimeoutError: As `consume`.
            Exception: What `get_consumers` or another hook raised; never what a callback raised.

        Switches: yes. From any greenlet, one at a time.
        """
        registry.register()  # before kombu looks up the transport of our own connection, for good
        restart_limit = self.restart_limit
        channel_errors = self.connection.channel_errors
        errors = (*self.connection.connection_errors, *channel_errors)
        engine, stopping = ensure_engine(self), _stop_check(self)
        with engine.running() as switch:
            while not stopping.is_set():
                try:
                    if restart_limit.can_consume(_tokens):
                        for _ in self.consume(limit=switch.limit, **kwargs):
                            pass
                        switch.wait_out(stopping)
                    else:
                        sleep(restart_limit.expected_time(_tokens), engine.life.stop)
                except LinkLostError as exc:
                    debug("%s: %s", engine.life.name, exc)  # its link said so, for all
                    if exc.is_suspect:
                        engine.keep_apart(exc.group)
                except errors as exc:
                    if isinstance(exc, channel_errors):
                        engine.wait_out(exc, stopping)
                    elif blame.is_accusation(exc):  # it lost the link for all
                        engine.answer_for(exc, stopping)
                    else:
                        warn(W_CONN_LOST, exc_info=True)

    def consume(
        self,
        limit: int | None = None,
        timeout: float | None = None,
        safety_interval: float = 1,
        **kwargs: object,
    ) -> Iterator[None]:
        """Connect and consume; yield after each message.

        Args:
            limit: Messages to handle before it returns; None: no limit.
            timeout: Seconds without a message after which it raises; None: waits for ever.
            safety_interval: The longest time in seconds between two calls of `on_iteration`. A consumer
                that does not override it, nor shadows `should_stop`, is not woken for it.
            **kwargs: Passed to `on_consume_ready`.

        Raises:
            TimeoutError: No message came for `timeout` seconds (`socket.timeout` is its old name).
            OSError: The link was lost, among others of `connection_errors`.

        Switches: yes, while it is iterated over.
        """
        engine, stopping = ensure_engine(self), _stop_check(self)
        iterates = _is_overridden(self, "on_iteration")
        loop = Loop(
            limit,
            timeout,
            safety_interval,
            engine.leaving(stopping),
            self.on_iteration if iterates else None,
            ticks=iterates or not stopping.signalled,
        )
        return engine.consume(loop, stopping, kwargs)

    # -- connecting -----------------------------------------------------------------------------

    @contextmanager
    def consumer_context(self, **kwargs: object) -> Iterator[tuple[Any, Any, Any]]:
        """Connect and set up the consumers; yield connection, channel and consumers. Switches: yes."""
        with self.Consumer() as (connection, channel, consumers):
            with self.extra_context(connection, channel):
                self.on_consume_ready(connection, channel, consumers, **kwargs)
                yield connection, channel, consumers

    def Consumer(self) -> AbstractContextManager[tuple[Any, Any, Any]]:
        """Connect, and cancel and close in the end, which `close_timeout` (seconds) bounds. Switches: yes."""
        return ensure_engine(self).consumers()

    def _consume_from(
        self, *consumers: AbstractContextManager[object]
    ) -> AbstractContextManager[Any]:
        if len(consumers) == 1:  # nearly always, and kombu's takes six times the memory
            return Alone(consumers[0])
        entered: AbstractContextManager[Any] = nested(*consumers)
        return entered

    def establish_connection(self) -> AbstractContextManager[Any]:
        """Connect, trying until it succeeds, `connect_max_retries` is used up, or a stop. Switches: yes."""
        return ensure_engine(self).connection(_attempt(self))

    def create_connection(self) -> Any:
        """Return the connection to consume with: a clone of `connection`. Never switches."""
        return self.connection.clone()

    def maybe_conn_error(self, fun: Callable[[], object]) -> Any:
        """Call `fun`, ignoring connection and channel errors. Switches: as `fun` does."""
        return ignore_errors(self, fun)

    @cached_property
    def restart_limit(self) -> Any:
        """The token bucket that `run` draws from; one token a second."""
        return RestartLimit(1)

    @cached_property
    def connection_errors(self) -> tuple[type[BaseException], ...]:
        """The connection's errors."""
        errors: tuple[type[BaseException], ...] = self.connection.connection_errors
        return errors

    @cached_property
    def channel_errors(self) -> tuple[type[BaseException], ...]:
        """The channel's errors."""
        errors: tuple[type[BaseException], ...] = self.connection.channel_errors
        return errors


class ConsumerProducerMixin(_KombuConsumerProducer, ConsumerMixin):
    """A consumer that also publishes, over another link: a consuming link publishes nothing.

    RabbitMQ blocks publishers by blocking their connection, and a consumer's acks would wait along.
    """

    _producer_connection: Any = None

    def run(self, _tokens: int = 1, **kwargs: Any) -> None:
        """Consume as `ConsumerMixin.run`; in the end the producer's connection is closed. Switches: yes."""
        try:
            super().run(_tokens, **kwargs)
        finally:
            _close_producer(self)

    def on_consume_end(self, connection: Connection, channel: Any) -> None:
        """Close the producer's connection. Switches: yes."""
        _close_producer(self)

    @property
    def producer(self) -> Any:
        """A `kombu.Producer` on `producer_connection`. Switches: as that."""
        return Producer(self.producer_connection)

    @property
    def producer_connection(self) -> Any:
        """The connection to publish with, made when it is first asked for. Switches: to connect."""
        engine = ensure_engine(self)
        if self._producer_connection is None:
            conn = self.connection.clone()
            engine.connect_to_publish(conn, _attempt(self))
            if self._producer_connection is None:
                self._producer_connection = conn
            else:  # another greenlet of this consumer was faster
                conn.close()
        elif not self._producer_connection.connected:
            # Not left to kombu, which would wait for the broker deaf to a stop.
            engine.connect_to_publish(self._producer_connection, _attempt(self))
        return self._producer_connection


def request_stop(consumer: ConsumerMixin, reason: str = "stop") -> None:
    """Ask `consumer` to stop, also one that shadows `should_stop`. Never switches; from anywhere."""
    ensure_lifecycle(consumer).stop.set(reason)
    if _shadows_should_stop(consumer):
        try:
            consumer.should_stop = True
        except AttributeError:
            pass  # a property without a setter; the signal is heard all the same


# -- outside the classes, whose names are kombu's and their users' ----------------------------------


def _close_producer(consumer: ConsumerProducerMixin) -> None:
    conn = consumer._producer_connection
    if conn is not None:
        consumer._producer_connection = None
        conn.close()


def _attempt(consumer: ConsumerMixin) -> Attempt:
    told = _is_overridden(consumer, "on_connection_error")
    on_failed = consumer.on_connection_error if told else None
    return Attempt(consumer.connect_max_retries, on_failed, _stop_check(consumer))


def _stop_check(consumer: ConsumerMixin) -> StopCheck:
    stop = ensure_lifecycle(consumer).stop
    if _shadows_should_stop(consumer):
        return StopCheck(lambda: stop.is_set() or bool(consumer.should_stop), signalled=False)
    return StopCheck(stop.is_set, signalled=True)


def _is_overridden(consumer: object, name: str) -> bool:
    if name in vars(consumer):
        return True
    return getattr(type(consumer), name) is not getattr(ConsumerMixin, name)


def _shadows_should_stop(consumer: object) -> bool:
    return getattr(type(consumer), "should_stop", None) is not ConsumerMixin.should_stop
