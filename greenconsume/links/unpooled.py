"""Owns connecting over transports that have no links to share: each connection by itself, with backoff.

It must never hold up a stop, though such a transport is deaf to one. Called by `pool`.
"""

from __future__ import annotations

from collections.abc import Callable

import gevent
from gevent.event import Event
from kombu import Connection
from kombu.exceptions import OperationalError

from greenconsume.links import backoff
from greenconsume.links.backoff import FailedAttempts, OnFailedAttempt, OnRefused
from greenconsume.stopping import Deadline, StopSignal, wait


def connect_unpooled(
    connection: Connection,
    stop: StopSignal,
    on_failed_attempt: OnFailedAttempt | None,
    max_retries: int | None,
    on_refused: OnRefused | None = None,
) -> None:
    """Connect a connection of its own, trying until it succeeds; see `LinkPool.connect`."""
    failed = FailedAttempts(connection, on_refused)
    for retries, delay in enumerate(backoff.delays()):
        stop.check()
        try:
            _run_until_stopped(lambda: connection.ensure_connection(max_retries=0), stop)
            return
        except (OperationalError, *backoff.connect_errors(connection)) as exc:
            error = exc.__cause__ if isinstance(exc, OperationalError) and exc.__cause__ else exc
        backoff.raise_after(max_retries, retries, error)
        if not connection.completes_cycle(retries):
            delay = 0.0  # the next of the failover URLs is tried at once
        failed.tell(connection, error, delay)
        if on_failed_attempt is not None:
            on_failed_attempt(error, delay)
        connection.maybe_switch_next()
        stop.wait(delay)


def _run_until_stopped(action: Callable[[], object], stop: StopSignal) -> None:
    """Run `action` in a greenlet; a stop leaves it behind, killed: nobody uses what it was making."""
    greenlet = gevent.spawn(_outcome_of, action)
    done = Event()
    greenlet.rawlink(lambda _greenlet: done.set())
    try:
        wait(done, Deadline(None), stop)
    finally:
        if not greenlet.ready():
            greenlet.kill(block=False)
    if not greenlet.ready():
        stop.check()
    if greenlet.value is not None:
        raise greenlet.value


def _outcome_of(action: Callable[[], object]) -> BaseException | None:
    try:
        action()
    except Exception as exc:  # handed to the waiter, which raises it
        return exc
    return None
