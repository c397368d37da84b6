"""Owns the kombu interface: `ConsumerMixin` and `ConsumerProducerMixin`, names and order of calls as kombu's.

A class written for `kombu.mixins` runs unchanged. Where kombu polls, swallows or blocks, this waits: for a
delivery, the stop signal or a deadline, whichever comes first. Users subclass it; `greenlets` runs it.

`error`, `warn` and `sleep` are module-level names that are looked up when they are called, as kombu's are.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Any

from kombu import Connection, Consumer, Producer
from kombu.common import ignore_errors
from kombu.utils.compat import nested
from kombu.utils.encoding import safe_repr
from kombu.utils.limits import TokenBucket

from greenconsume.amqp.transport import LinkLostError, Session
from greenconsume.errors import InvalidConsumerError, StoppedError
from greenconsume.events import ConsumerState
from greenconsume.failures.retry import prepared
from greenconsume.handling.boundary import Handler, Handling
from greenconsume.handling.drain import Drain, drain_of, seen_off
from greenconsume.handling.kill_switch import fit_switch, leaving, switched
from greenconsume.handling.options import ConsumerOptions
from greenconsume.handling.settings import settings_of
from greenconsume.handling.shield import shield_channels
from greenconsume.lifecycle import lifecycle_of
from greenconsume.links.pool import LinkPool
from greenconsume.stopping import Deadline, StopSignal
from greenconsume.transports import registry

logger = logging.getLogger(__name__)
debug, info, warn, error = logger.debug, logger.info, logger.warning, logger.error

W_CONN_LOST = "Connection to broker lost, trying to re-establish connection..."
W_CONN_ERROR = "Broker connection error, trying again in %s seconds: %r."


def sleep(seconds: float, stop: StopSignal) -> None:
    """Wait for `seconds`, or until `stop` is set."""
    stop.wait(seconds)


class ConsumerMixin:
    """A consumer: give it a `connection` and `get_consumers`, then `spawn` it or call `run`.

    The interface is that of `kombu.mixins.ConsumerMixin` 5.7. Everything below `run` may switch.

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

        Args:
            Consumer: `kombu.Consumer`, bound to `channel` and to `on_decode_error`.
            channel: The consumer's default channel. `channel.connection.client.channel()` opens
                further ones, which live and die with the consumer.
        """
        raise NotImplementedError("Subclass responsibility")

    def on_connection_revived(self) -> None:
        """Called when a connection is established, also for the first time."""

    def on_consume_ready(
        self, connection: Any, channel: Any, consumers: Sequence[Any], **kwargs: Any
    ) -> None:
        """Called when the consumers consume; `kwargs` are those of `consume`."""

    def on_consume_end(self, connection: Any, channel: Any) -> None:
        """Called after the consumers were cancelled."""

    def on_iteration(self) -> None:
        """Called before each message, and every `safety_interval` seconds while there is none."""

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Called for a message whose body cannot be decoded; logs and acknowledges it, as kombu does.

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
        """Called after each failed attempt to connect; the next follows in `interval` seconds.

        Not overridden it is not called for what a link already logged once for all its consumers.
        """
        warn(W_CONN_ERROR, interval, exc, exc_info=True)

    @contextmanager
    def extra_context(self, connection: Any, channel: Any) -> Iterator[None]:
        """Entered around consuming, after the consumers were set up."""
        yield

    # -- stopping -------------------------------------------------------------------------------

    @property
    def should_stop(self) -> bool:
        """Whether the consumer stops; assigning True wakes whatever it waits in. Never switches."""
        return lifecycle_of(self).stop.is_set()

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        stop = lifecycle_of(self).stop
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
        """
        registry.register()  # before kombu looks up the transport of our own connection, for good
        restart_limit = self.restart_limit
        errors = (*self.connection.connection_errors, *self.connection.channel_errors)
        stopping = self._stopping()
        try:
            kill_switch = settings_of(self).kill_switch
            with seen_off(self), switched(lifecycle_of(self), kill_switch) as switch:
                while not stopping():
                    try:
                        if restart_limit.can_consume(_tokens):
                            for _ in self.consume(limit=switch.limit, **kwargs):
                                pass
                            switch.wait_out(stopping)
                        else:
                            sleep(restart_limit.expected_time(_tokens), lifecycle_of(self).stop)
                    except LinkLostError as exc:
                        debug("%s: %s", lifecycle_of(self).name, exc)  # its link said so, for all
                    except errors:
                        warn(W_CONN_LOST, exc_info=True)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Called when `run` ends, however it does."""

    def consume(
        self,
        limit: int | None = None,
        timeout: float | None = None,
        safety_interval: float = 1,
        **kwargs: Any,
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
        """
        life = lifecycle_of(self)
        life.enter(ConsumerState.CONNECTING)
        try:
            with self.consumer_context(**kwargs) as (conn, _channel, _consumers):
                if not life.stop.is_set():
                    life.enter(ConsumerState.CONSUMING)
                if isinstance(conn, Connection):
                    yield from self._consume(conn, limit, timeout, safety_interval)
                else:
                    yield from self._consume_plain(conn, limit, timeout, safety_interval)
        except StoppedError:
            if not self._stopping()():
                raise
        finally:
            if life.drain is not None and life.stop.is_set():
                life.drain.finish()
        debug("consume exiting")

    def _consume(
        self, conn: Connection, limit: int | None, timeout: float | None, safety_interval: float
    ) -> Iterator[None]:
        drain, waits = self._drain_of(conn)
        tick = safety_interval if self._needs_ticks() or not waits else None
        on_iteration = self.on_iteration if _is_overridden(self, "on_iteration") else int
        stopping = leaving(self._stopping(), lifecycle_of(self).switch)
        handled, idle = 0, Deadline(timeout or None)
        while not stopping() and not (limit and handled >= limit):
            on_iteration()  # int, which does nothing, where there is none
            try:
                drain(_least(tick, idle.remaining) if timeout else tick)
            except socket.timeout:
                if not waits:
                    conn.heartbeat_check()
                if idle.expired:
                    raise
            except (OSError, StoppedError):
                if not stopping():  # else an orderly end: `on_consume_end` is yet to be called
                    raise
            else:
                handled += 1
                yield
                if timeout:
                    idle = Deadline(timeout)

    def _stopping(self) -> Callable[[], bool]:
        """Return what tells whether to stop: for each message, so without detours."""
        stop = lifecycle_of(self).stop
        if _shadows_should_stop(self):
            return lambda: stop.is_set() or bool(self.should_stop)
        return stop.is_set

    def _drain_of(self, conn: Connection) -> tuple[Callable[..., object], bool]:
        """Return what waits for one message, and whether it is woken (or polls)."""
        if not getattr(conn.transport, "wakes", False):
            return lambda seconds: conn.drain_events(timeout=seconds), False
        stop = lifecycle_of(self).leave
        session = _session_of(conn)
        if session is None:
            return lambda seconds: conn.drain_events(timeout=seconds, stop=stop), True
        session.begin_consuming()
        # Not kombu's: where a link was lost it would connect again, and wait without any consumer.
        return partial(session.drain_events, stop=stop), True

    def _consume_plain(
        self, conn: Any, limit: int | None, timeout: float | None, safety_interval: float
    ) -> Iterator[None]:
        """The path for what is no kombu connection (a test's mock): as kombu drives it."""
        handled, elapsed, stopping = 0, 0.0, self._stopping()
        while not stopping() and not (limit and handled >= limit):
            self.on_iteration()
            try:
                conn.drain_events(timeout=safety_interval)
            except socket.timeout:
                conn.heartbeat_check()
                elapsed += safety_interval
                if timeout and elapsed >= timeout:
                    raise
            except OSError:
                if not stopping():
                    raise
            else:
                handled += 1
                yield
                elapsed = 0.0

    def _needs_ticks(self) -> bool:
        return _is_overridden(self, "on_iteration") or _shadows_should_stop(self)

    # -- connecting -----------------------------------------------------------------------------

    @contextmanager
    def consumer_context(self, **kwargs: Any) -> Iterator[tuple[Any, Any, Any]]:
        """Connect and set up the consumers; yields connection, channel and consumers."""
        with self.Consumer() as (connection, channel, consumers):
            with self.extra_context(connection, channel):
                self.on_consume_ready(connection, channel, consumers, **kwargs)
                yield connection, channel, consumers

    @contextmanager
    def Consumer(self) -> Iterator[tuple[Any, Any, Any]]:
        """Connect, and cancel and close in the end, which `close_timeout` bounds."""
        with self.establish_connection() as conn:
            self.on_connection_revived()
            if logger.isEnabledFor(logging.DEBUG):
                debug("Connected to %s", conn.as_uri())
            session = _session_of(conn)
            if session is not None:
                session.heartbeat_tick()  # raises; kombu would connect again, deaf to a stop
            channel = conn.default_channel
            cls = partial(Consumer, channel, on_decode_error=self.on_decode_error)
            drain = drain_of(self)
            consumers = self._guarded(self.get_consumers(cls, channel), drain.handling)
            with prepared(drain.handling, conn, consumers), self._consume_from(*consumers) as used:
                with self._ending(conn, drain):
                    yield conn, channel, used
            debug("Consumers canceled")
            self.on_consume_end(conn, channel)
        debug("Connection closed")

    def _guarded(self, consumers: Any, handling: Handling) -> list[Any]:
        """Put the boundary around what the consumers call; they register it when they are entered."""
        if not isinstance(consumers, (list, tuple)) and not hasattr(consumers, "__iter__"):
            raise InvalidConsumerError(
                f"{type(self).__name__}.get_consumers returned {consumers!r}: "
                "return a list of consumers, as in [Consumer(queues=[queue], callbacks=[self.on_task])]"
            )
        guarded = list(consumers)
        lifecycle_of(self).queues = _queues_of(guarded)
        for consumer in guarded:
            consumer._receive_callback = Handler(consumer, handling)
            handling.fit_prefetch(consumer)
            fit_switch(consumer, lifecycle_of(self).switch)
        return guarded

    @contextmanager
    def _ending(self, conn: Any, drain: Drain) -> Iterator[None]:
        """From its exit on handlers are drained, then every wait for the broker has one deadline."""
        life = lifecycle_of(self)
        try:
            with drain.consuming(_session_of(conn), _errors_of(conn)):
                yield
        finally:
            life.enter(ConsumerState.DRAINING if life.stop.is_set() else ConsumerState.CONNECTING)
            _bound_close(conn)

    def _consume_from(self, *consumers: Any) -> AbstractContextManager[Any]:
        entered: AbstractContextManager[Any] = nested(*consumers)
        return entered

    @contextmanager
    def establish_connection(self) -> Iterator[Any]:
        """Connect, trying again until it succeeds, `connect_max_retries` is used up, or a stop."""
        session: Session | None = None
        try:
            with self.create_connection() as conn:
                self._connect(conn)
                session = _session_of(conn)
                try:
                    yield conn
                finally:
                    _bound_close(conn)
        finally:
            if session is not None and not session.left:
                session.collect()  # a kill cut its close short, in kombu's code

    def create_connection(self) -> Any:
        """Return the connection to consume with: a clone of `connection`."""
        return self.connection.clone()

    def _connect(self, conn: Any, publishing: bool = False) -> None:
        if not isinstance(conn, Connection):
            conn.ensure_connection(self.on_connection_error, self.connect_max_retries)
            return
        life = lifecycle_of(self)
        if life.links is None:
            life.links = LinkPool()
        tell = self.on_connection_error if _is_overridden(self, "on_connection_error") else None
        stop, retries = life.stop, self.connect_max_retries
        if publishing and stop.is_set():
            stop, retries = StopSignal(), 0  # for a handler that finishes: one attempt
        ask = (lambda: self.should_stop) if _shadows_should_stop(self) else None
        life.links.connect(conn, stop, tell, retries, publishing, ask)
        shield_channels(conn)
        session = _session_of(conn)
        if session is not None and publishing:
            session.begin_publishing(life.stop)  # a broker may block its publishers for hours
        elif session is not None:
            session.begin_setup(life.stop)  # until it consumes, a stop ends its calls

    def maybe_conn_error(self, fun: Callable[[], object]) -> Any:
        """Call `fun`, ignoring connection and channel errors."""
        return ignore_errors(self, fun)

    @cached_property
    def restart_limit(self) -> Any:
        """The token bucket that `run` draws from; one token a second."""
        return TokenBucket(1)

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


class ConsumerProducerMixin(ConsumerMixin):
    """A consumer that also publishes, over another link: a consuming link publishes nothing."""

    _producer_connection: Any = None

    def on_consume_end(self, connection: Any, channel: Any) -> None:
        """Close the producer's connection."""
        self._let_go()

    def _let_go(self) -> None:
        conn, self._producer_connection = self._producer_connection, None
        if conn is not None:
            conn.close()

    @property
    def producer(self) -> Any:
        """A `kombu.Producer` on `producer_connection`."""
        return Producer(self.producer_connection)

    @property
    def producer_connection(self) -> Any:
        """The connection to publish with, made when it is first asked for."""
        if self._producer_connection is None:
            conn = self.connection.clone()
            self._connect(conn, publishing=True)
            if self._producer_connection is None:
                self._producer_connection = conn
            else:  # another greenlet of this consumer was faster
                conn.close()
        elif not self._producer_connection.connected:
            # Not left to kombu, which would wait for the broker deaf to a stop.
            self._connect(self._producer_connection, publishing=True)
        return self._producer_connection


def request_stop(consumer: Any, reason: str = "stop") -> None:
    """Ask `consumer` to stop, also one that shadows `should_stop`. Never switches; from anywhere."""
    lifecycle_of(consumer).stop.set(reason)
    if _shadows_should_stop(consumer):
        try:
            consumer.should_stop = True
        except AttributeError:
            pass  # a property without a setter; the signal is heard all the same


def _session_of(conn: Any) -> Session | None:
    """Return what an AMQP connection holds; unlike `conn.connection`, never a new one."""
    session = conn._connection if isinstance(conn, Connection) else None
    return session if isinstance(session, Session) else None


def _bound_close(conn: Any) -> None:
    """Give all that is still to be said to the broker one deadline; the first call counts."""
    session = _session_of(conn)
    if session is not None:
        session.begin_close()


def _queues_of(consumers: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of the queues that `kombu.Consumer`s consume from."""
    queues = (queue for each in consumers for queue in getattr(each, "queues", None) or ())
    return tuple(dict.fromkeys(str(getattr(queue, "name", queue)) for queue in queues))


def _errors_of(conn: Any) -> tuple[type[BaseException], ...]:
    if not isinstance(conn, Connection):
        return ()
    return (*conn.connection_errors, *conn.channel_errors)


def _is_overridden(consumer: Any, name: str) -> bool:
    if name in vars(consumer):
        return True
    return getattr(type(consumer), name) is not getattr(ConsumerMixin, name)


def _shadows_should_stop(consumer: Any) -> bool:
    return getattr(type(consumer), "should_stop", None) is not ConsumerMixin.should_stop


def _least(*seconds: float | None) -> float | None:
    return min((s for s in seconds if s is not None), default=None)
