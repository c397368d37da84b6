"""Owns how one greenlet drains several sessions in turn: it waits in none while another has news.

A loop such as that of a Celery worker drains the connection that consumes, and then waits 0.1 s on one that
only publishes. Such a wait ends, as timed out, when there is something on the session that was drained just
before; once, so that a loop which never goes back there does not spin. Called by `transport`.
"""

from __future__ import annotations

import socket
import weakref

from gevent.local import local

from greenconsume.amqp.session import Session
from greenconsume.errors import StoppedError
from greenconsume.stopping import StopSignal


class _Own(local):  # type: ignore[misc]  # gevent is untyped
    """The session that this greenlet drained last."""

    drained: weakref.ref[Session] | None = None


_own = _Own()


def drain(session: Session, timeout: float | None) -> None:
    """Drain as `Session.drain_events` does, but wait for no timeout while the session before has news.

    Only a session on which nothing can come, for it has no consumer and no handler of events, is cut short.
    What a callback drains while it runs waits in full.

    Switches: yes.
    """
    previous = _take_previous()
    try:
        idle = timeout is not None and session.expects_nothing
        # Of the same connection: that is lost, and this one has taken its place.
        if previous is None or previous.client is session.client or not idle:
            session.drain_events(timeout=timeout)
        else:
            _drain_until_news(session, timeout, previous)
    finally:
        _own.drained = weakref.ref(session)


def _take_previous() -> Session | None:
    noted, _own.drained = _own.drained, None
    return noted() if noted is not None else None


def _drain_until_news(session: Session, timeout: float | None, previous: Session) -> None:
    news = StopSignal()
    with previous.inbox.announced_to(news.set):
        if previous.has_news:
            news.set()
        try:
            session.drain_events(timeout=timeout, stop=news)
        except StoppedError as exc:
            raise socket.timeout("there is something on the connection drained before") from exc
