"""Owns the engine of one consumer: it connects, receives, drains and closes, and keeps the consumer's state.

It calls the consumer by kombu's methods (`interface`), in kombu's order: connect, `on_connection_revived`,
`get_consumers`, consume, `extra_context`, `on_consume_ready`, `on_iteration` and a message again and again,
cancel, `on_consume_end`, close. Called by `mixins`; a runtime's supervisor reads what it keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any, cast

from gevent import GreenletExit
from kombu import Connection, Consumer

from greenconsume.consuming.connecting import (
    Attempt,
    Connected,
    bound_close,
    connect_to_publish,
    lost_errors,
)
from greenconsume.consuming.guarding import guard, listed, queues_of
from greenconsume.consuming.interface import Context, KombuConsumer
from greenconsume.consuming.receiving import Loop, receive, receive_from_double
from greenconsume.consuming.refusals import Refusals, remedy_of
from greenconsume.consuming.streams import StreamPlaces
from greenconsume.errors import LinkClosedError, StoppedError
from greenconsume.events import ConsumerState, Outcome
from greenconsume.handling.batches import Batching
from greenconsume.handling.boundary import Handling
from greenconsume.handling.drain import Drain
from greenconsume.handling.kill_switch import NoSwitch, Switch
from greenconsume.handling.options import ConsumerOptions
from greenconsume.handling.settings import Settings, settings_of
from greenconsume.handling.shared import Shared
from greenconsume.lifecycle import Lifecycle
from greenconsume.links.holding import holding_of
from greenconsume.links.pool import LinkPool
from greenconsume.links.session import Holding, session_of
from greenconsume.stopping import Rungs, StopCheck

logger = logging.getLogger(__name__)

#: The one attribute of a consumer that is ours.
ATTRIBUTE = "_greenconsume"
_numbers = count(1)


class Engine:
    """Connects one consumer, receives its messages, drains it and closes; made when it is first asked for.

    Attributes:
        life: The consumer's name, state and stop signal.
        owned: It runs in a `ConsumerGreenlet`: no foreign code is below it on the stack.
        links: The links that it connects over; None: one of its own, once it connects.
        handling: Its handlers, once it has connected.
        drain: How they end.
        queues: The names of the queues that it consumes from, or did last.
        fleeting_queues: Those of them that go, with their messages, when nobody consumes from them.
        holding: What its connection holds, while it consumes.
        refusals: The refusals that it met in a row.
    """

    __slots__ = (
        "_around",
        "_consumer",
        "_shared",
        "_streams",
        "_supervised",
        "_switch",
        "drain",
        "fleeting_queues",
        "handling",
        "holding",
        "life",
        "links",
        "owned",
        "queues",
        "refusals",
    )

    def __init__(self, consumer: object) -> None:
        self.life = Lifecycle(f"{type(consumer).__name__}-{next(_numbers)}")
        self.owned = False
        self.links: LinkPool | None = None
        self.handling: Handling | None = None
        self.drain: Drain | None = None
        self.queues: tuple[str, ...] = ()
        self.fleeting_queues: tuple[str, ...] = ()
        self.holding: Holding | None = None
        self._consumer = cast(KombuConsumer, consumer)
        self._around: tuple[ConsumerOptions, ...] = ()
        self._shared: Shared | None = None
        self._switch: Switch | None = None
        self.refusals = Refusals(self.life)
        self._streams = StreamPlaces()
        self._supervised = False

    # -- what surrounds it ----------------------------------------------------------------------

    def surround(self, *options: ConsumerOptions | None) -> None:
        """Set the options that count where the consumer's own do not say: its spawn's, its runtime's."""
        self._around = tuple(each for each in options if each is not None)

    def join_fleet(self, links: LinkPool, rungs: Rungs, shared: Shared) -> None:
        """Share what the consumers of a runtime share.

        Args:
            links: Over which it connects.
            rungs: What hurries its drain.
            shared: The limits for all of their handlers together.
        """
        self.links, self.life.rungs, self._shared = links, rungs, shared
        self._supervised = True

    def settings(self) -> Settings:
        """Return how its handlers are to run.

        Raises:
            InvalidConsumerError: Two of its options cannot be combined.
        """
        return settings_of(self.life.name, self._consumer, self._around, self._shared)

    def serves(self, consumer: object) -> bool:
        """Return whether it belongs to this consumer: a copy of a consumer has the engine of its original."""
        return self._consumer is consumer

    def link_pool(self) -> LinkPool:
        """Return the links that it connects over."""
        if self.links is None:
            self.links = LinkPool()
        return self.links

    @property
    def outcome(self) -> Outcome:
        """The numbers of messages that were in hand in its last drain, by what became of them."""
        return Outcome() if self.drain is None else self.drain.outcome

    @property
    def switched_off(self) -> bool:
        """True while its kill switch has it consume nothing, or one message to try."""
        return self._switch is not None and self._switch.tripped

    # -- a run ----------------------------------------------------------------------------------

    def running(self) -> Running:
        """Return a block that gives the consumer its kill switch, and in the end waits for its handlers.

        Switches: at its end, if a handler runs that a lost link left.
        """
        return Running(self)

    def begin_run(self) -> Switch | NoSwitch:
        """Make the kill switch of this run, if it is to have one."""
        kill_switch = self.settings().kill_switch
        self._switch = None if kill_switch is None else Switch(kill_switch, self.life)
        return self._switch or NoSwitch()

    def end_run(self, error: BaseException | None) -> None:
        """Wait for the handlers that a lost link left, or have them killed as the consumer was."""
        try:
            self._close_switch()
        except BaseException as exc:
            error = exc
            raise
        finally:
            if isinstance(error, GreenletExit):
                self._abandon()
            else:  # whatever ended the run, it goes on when the handlers have ended
                self._finish()

    def _close_switch(self) -> None:
        switch, self._switch = self._switch, None
        if switch is not None:
            switch.close()

    def _abandon(self) -> None:
        if self.drain is not None:
            self.drain.abandon()

    def _finish(self) -> None:
        if self.drain is not None:
            self.drain.finish()

    # -- consuming ------------------------------------------------------------------------------

    def consume(self, loop: Loop, stopping: StopCheck, kwargs: dict[str, Any]) -> Iterator[None]:
        """Connect and receive; yield after each message. See `ConsumerMixin.consume`.

        Switches: yes.
        """
        life = self.life
        if life.state is not ConsumerState.STANDBY:  # it looks again whether it may take over
            life.enter(ConsumerState.CONNECTING)
        try:
            with self._consumer.consumer_context(**kwargs) as (conn, _channel, _consumers):
                if not life.stop.is_set():
                    life.enter(ConsumerState.CONSUMING)
                    self.refusals.consumes()
                    self.link_pool().quarantine.note_consuming(life.name, True)
                if isinstance(conn, Connection):
                    yield from receive(conn, loop, life.consume_stop, self._attend)
                else:
                    yield from receive_from_double(conn, loop)
        except StoppedError:
            if not stopping.is_set():
                raise
        finally:
            self.link_pool().quarantine.note_consuming(life.name, False)
            if life.stop.is_set():
                self._finish()
        logger.debug("consume exiting")

    def _attend(self, is_consuming: bool) -> None:
        """Note whether any of its consumers runs: it may cancel them itself, and consume again later."""
        life = self.life
        if not is_consuming and self.queues and life.state is ConsumerState.CONSUMING:
            life.enter(ConsumerState.IDLE)  # one that has no queues waits, as with kombu
        elif is_consuming and life.state is ConsumerState.IDLE:
            life.enter(ConsumerState.CONSUMING)

    def wait_out(self, error: BaseException, stopping: StopCheck) -> None:
        """Tell that the broker refused the consumer, or closed its channel; wait until it is to ask again.

        Switches: yes.
        """
        self._streams.learn(error)
        stopping.wait(self.refusals.tell(error), self.life.stop)

    def keep_apart(self, group: str = "") -> None:
        """Have the consumer connect over a link of its own, or its group's, from now on. Switches: never."""
        self.link_pool().quarantine.put(self.life.name, group)

    def answer_for(self, error: BaseException, stopping: StopCheck) -> None:
        """Answer for a connection that the broker closed because of what the consumer did.

        Raises:
            LinkClosedError: For a runtime, whose restart policy says how it goes on.

        Switches: yes.
        """
        self.keep_apart()
        if self._supervised:
            raise LinkClosedError(self.life.name, error, remedy_of(error)) from error
        stopping.wait(self.refusals.tell(error), self.life.stop)

    def leaving(self, stopping: StopCheck) -> Callable[[], bool]:
        """Return what tells whether the consumer leaves its loop: it stops, or its switch has tripped."""
        switch, is_set = self._switch, stopping.is_set
        return is_set if switch is None else lambda: is_set() or switch.consume_stop.is_set()

    @contextmanager
    def consumers(self) -> Iterator[Context]:
        """Connect, have the consumers made and consume; cancel and close in the end.

        Switches: yes.
        """
        consumer = self._consumer
        with consumer.establish_connection() as conn:
            consumer.on_connection_revived()
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("Connected to %s", conn.as_uri())
            session = session_of(conn)
            if session is not None:
                session.heartbeat_tick()  # raises; kombu would connect again, deaf to a stop
            channel = conn.default_channel
            make = partial(Consumer, channel, on_decode_error=consumer.on_decode_error)
            handling, drain = self.handlers()
            consumers = self._guarded(consumer.get_consumers(make, channel), handling)
            with handling.recoverer.prepared(conn, consumers):
                with consumer._consume_from(*consumers) as used:
                    self.holding = holding_of(conn)
                    try:
                        with drain.consuming(session, lost_errors(conn)):
                            yield conn, channel, used
                    finally:
                        self._leave(conn)
            logger.debug("Consumers canceled")
            consumer.on_consume_end(conn, channel)
        logger.debug("Connection closed")

    def handlers(self) -> tuple[Handling, Drain]:
        """Return its handlers: new ones, or those that a lost link left running.

        These count towards the concurrency, and so keep theirs.
        """
        handling, drain = self.handling, self.drain
        if handling is None or drain is None or drain.is_over or not handling.busy:
            settings = self.settings()
            kind = Handling if settings.batch_size is None else Batching
            handling = kind(self.life, settings, self._switch, self.owned, self.link_pool)
            self.handling, self.drain = handling, Drain(self.life, handling)
        assert self.drain is not None
        return handling, self.drain

    def _guarded(self, consumers: object, handling: Handling) -> list[Any]:
        """Note what the consumers consume, and put the boundary around what they call."""
        guarded = listed(consumers, self._consumer)
        queues = queues_of(guarded)
        self.queues = tuple(queues)
        self.fleeting_queues = tuple(name for name, fleeting in queues.items() if fleeting)
        guard(guarded, handling, self._streams, self._switch)
        return guarded

    def _leave(self, conn: Connection) -> None:
        """Give every wait for the broker one deadline, once the handlers were drained."""
        self.holding = None
        stopped = self.life.stop.is_set()
        self.life.enter(ConsumerState.DRAINING if stopped else ConsumerState.CONNECTING)
        bound_close(conn)

    # -- connecting -----------------------------------------------------------------------------

    def connection(self, attempt: Attempt) -> Connected:
        """Return a block that connects, trying again until it succeeds, the retries are used up, or a stop.

        Switches: yes, as it is entered and left.
        """
        return Connected(self._consumer, self.link_pool, self.life, attempt)

    def connect_to_publish(self, conn: Connection, attempt: Attempt) -> None:
        """Connect what is to publish, over a link of its own. Switches: yes."""
        if isinstance(conn, Connection):
            connect_to_publish(conn, self.link_pool(), self.life, attempt)
        else:
            conn.ensure_connection(self._consumer.on_connection_error, attempt.max_retries)


class Running:
    """A block within which a consumer runs; a class, for thousands of consumers are in theirs."""

    __slots__ = ("_engine",)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __enter__(self) -> Switch | NoSwitch:
        return self._engine.begin_run()

    def __exit__(
        self, _kind: object, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._engine.end_run(error)


def ensure_engine(consumer: object) -> Engine:
    """Return the consumer's engine; the first call makes it and keeps it on the consumer.

    A user's `__init__` need not call ours, so there is no other moment at which to make it.
    """
    found = vars(consumer).get(ATTRIBUTE)
    if isinstance(found, Engine) and found.serves(consumer):
        return found
    made = vars(consumer)[ATTRIBUTE] = Engine(consumer)
    return made


def ensure_lifecycle(consumer: object) -> Lifecycle:
    """Return the life of the consumer's engine, which the first call makes."""
    return ensure_engine(consumer).life
