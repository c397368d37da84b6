"""Owns one consumer as a greenlet: what starts it, stops it, waits for it and tells how it ended.

It runs the mixin's `run()` and enters the two states that a mixin cannot: stopped and failed. It must
never restart a consumer (that is `supervisor`), nor let one's error reach the hub. Called by users and
`supervisor`.
"""

from __future__ import annotations

import contextvars
from typing import Any

import gevent
from gevent import GreenletExit
from gevent.event import Event

import greenconsume.logs  # noqa: F401  # for its hook: a consumer's errors belong in the log
from greenconsume.consuming.engine import ensure_engine
from greenconsume.errors import AlreadyRunningError
from greenconsume.events import ConsumerGivenUp, ConsumerState, emit
from greenconsume.handling.options import ConsumerOptions
from greenconsume.lifecycle import Lifecycle
from greenconsume.mixins import request_stop
from greenconsume.patching import require_patched
from greenconsume.runtime import forker
from greenconsume.runtime.adapter import adapt
from greenconsume.runtime.arguments import check_options
from greenconsume.stopping import FORK
from greenconsume.transports import registry

_ENDED = (ConsumerState.STOPPED, ConsumerState.FAILED)


def spawn(consumer: object, options: ConsumerOptions | None = None) -> ConsumerGreenlet:
    """Start `consumer` in a greenlet of its own, over a link of its own.

    Args:
        consumer: An instance of a `ConsumerMixin`, greenconsume's or kombu's.
        options: How its messages are handled, where its own `options` do not say.

    Raises:
        NotPatchedError: The process is not patched by gevent.
        InvalidConsumerError: `consumer` is none.
        TypeError: `options` are none.
        AlreadyRunningError: It has a greenlet already.
        ArbiterError: This process is gunicorn's arbiter.

    Switches: never. From any greenlet.
    """
    check_options(options)
    greenlet = ConsumerGreenlet(consumer)
    forker.enter(greenlet)
    ensure_engine(greenlet.consumer).surround(options)
    greenlet.start()
    return greenlet


class ConsumerGreenlet(gevent.Greenlet):  # type: ignore[misc]  # gevent is untyped
    """A `gevent.Greenlet` that runs one consumer; it begins with a copy of its maker's context variables.

    It works with `gevent.joinall`, `gevent.pool.Group` and `link`. An error that ends the consumer is its
    `exception` and is logged once; gevent's hub does not print it, and not even `SystemExit` ends the
    process.

    Attributes:
        consumer: The consumer, adapted if it was a plain kombu mixin.
        ready: Set while the consumer consumes. Called, it tells whether the greenlet has finished, as
            gevent's does.
        supervised: Somebody else logs the error that ends it.
    """

    def __init__(self, consumer: object, context: contextvars.Context | None = None) -> None:
        require_patched()
        # Now, as the caller may use the same `Connection`: it keeps the transport that it first finds.
        registry.register()
        adapted = adapt(consumer)
        engine = ensure_engine(adapted)
        lifecycle = engine.life
        if engine.owned:
            raise AlreadyRunningError(f"consumer {lifecycle.name} has a greenlet already")
        super().__init__()
        engine.owned = True
        self.consumer = adapted
        self.supervised = False
        self.name = lifecycle.name
        self.ready = Readiness(self, lifecycle)
        # gevent starts a greenlet with no context variables at all.
        self.gr_context = context or contextvars.copy_context()
        self._lifecycle = lifecycle
        self._error: BaseException | None = None
        self._killed = False
        self._began = False
        self.rawlink(_release)

    @property
    def state(self) -> ConsumerState:
        """The state of the consumer."""
        return self._lifecycle.state

    def start(self) -> None:
        """Start the greenlet. From here on, the copy that a fork makes of it does not consume.

        Switches: never. From any greenlet of the hub.
        """
        self._lifecycle.stop.engage()
        super().start()

    def stop(self, reason: str = "stop") -> None:
        """Ask the consumer to stop; before it began, it ends without connecting.

        Idempotent. Switches: never. From any greenlet or thread.
        """
        request_stop(self.consumer, reason)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the greenlet has finished.

        Args:
            timeout: Upper bound in seconds; `None` waits for ever.

        Returns:
            `False` if it had not finished by then.

        Switches: yes, unless it has finished.
        """
        if self._lifecycle.stop.is_set():
            self.start()  # one that was stopped before its start has yet to end; else no effect
        super().join(timeout)
        return self.ready()

    def kill(
        self, exception: object = GreenletExit, block: bool = True, timeout: float | None = None
    ) -> None:
        """End the greenlet wherever it waits: the last resort, its link cannot be used after it.

        Args:
            exception: What is raised in it.
            block: Wait until it has ended.
            timeout: Upper bound of that wait in seconds; `None` waits for ever.

        Switches: if `block`.
        """
        self._mark_killed()
        super().kill(exception, block, timeout)

    def throw(self, *args: object) -> None:
        """Raise an exception in the greenlet, as `gevent.Greenlet.throw`: every kill comes through here.

        Switches: yes, into it.
        """
        self._mark_killed()
        super().throw(*args)

    @property
    def killed(self) -> bool:
        """True if it was killed, before it began or since; a `GreenletExit` of its own is no kill."""
        return self._killed or (not self._began and self.ready())

    @property
    def exception(self) -> BaseException | None:
        """The error that ended the consumer; `None` while it runs, if it returned and if it was killed."""
        return self._error or super().exception

    @property
    def exc_info(self) -> Any:
        """The type, value and traceback of `exception`, or a false value."""
        error = self._error
        return (type(error), error, error.__traceback__) if error else super().exc_info

    def successful(self) -> bool:
        """Return whether it has finished without an error. Never switches."""
        return self._error is None and bool(super().successful())

    def _raise_exception(self) -> None:
        """Raise what ended the consumer: `get` and `gevent.joinall` call it."""
        if self._error is None:
            super()._raise_exception()
        else:
            raise self._error

    def _run(self) -> None:
        self._began = True
        try:
            if not self._lifecycle.stop.is_set():
                self.consumer.run()
        except KeyboardInterrupt:  # Ctrl-C, meant for the main greenlet: gevent takes it there
            self._lifecycle.enter(ConsumerState.FAILED)
            raise
        except BaseException as error:  # one's end must reach neither the hub nor its siblings
            self._fail(error)
            if isinstance(error, SystemExit) and self._lifecycle.stop.reason == FORK:
                raise  # a forked child that exits: gevent takes it to the main greenlet
        else:
            self._lifecycle.enter(ConsumerState.STOPPED)

    def _fail(self, error: BaseException) -> None:
        if self._killed and isinstance(error, GreenletExit):
            self._lifecycle.enter(ConsumerState.STOPPED)
            return
        self._error = error
        self._lifecycle.enter(ConsumerState.FAILED)
        if not self.supervised:
            emit(ConsumerGivenUp(self._lifecycle.name, error))

    def _mark_killed(self) -> None:
        self._killed = self._killed or not self.ready()


class Readiness:
    """An event that is set while a consumer consumes; called, it tells whether its greenlet has finished.

    gevent calls its greenlets' `ready()`, and this package has events of that name: this is both.
    """

    __slots__ = ("_event", "_greenlet")

    def __init__(self, greenlet: ConsumerGreenlet, lifecycle: Lifecycle) -> None:
        self._greenlet = greenlet
        self._event: Event = lifecycle.ready

    def __call__(self) -> bool:
        return bool(gevent.Greenlet.ready(self._greenlet))

    def is_set(self) -> bool:
        """Return whether the consumer consumes now. Never switches."""
        return bool(self._event.is_set())

    @property
    def stands_by(self) -> bool:
        """True while another consumer has the queue for itself, and this one waits to take over."""
        return self._greenlet.state is ConsumerState.STANDBY

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the consumer consumes, or has ended, or for `timeout` seconds.

        Args:
            timeout: Upper bound in seconds; `None` waits for ever.

        Returns:
            Whether it consumes now.

        Switches: yes, unless it does already.
        """
        gevent.wait([self._event, self._greenlet], timeout=timeout, count=1)
        return self.is_set()


def _release(greenlet: ConsumerGreenlet) -> None:
    """Let the consumer be spawned again; runs in the hub however the greenlet ended."""
    engine = ensure_engine(greenlet.consumer)
    engine.owned = False
    lifecycle = engine.life
    if lifecycle.state not in _ENDED:  # killed before it began
        lifecycle.enter(ConsumerState.STOPPED)
