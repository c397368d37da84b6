"""Owns who is still to be told of a lost link: who drains a kombu connection that another has replaced.

A greenlet that publishes with `retry=True` has kombu open a new connection, without the consumers of the old
one; who drains it would wait for ever, with everything that used to come. It keeps words, never a link or an
error: these hold the connection that they would be kept for. Called by the sessions, AMQP's and Redis's.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from kombu import Connection

from greenconsume.amqp.blame import LinkLostError

_untold: WeakKeyDictionary[Connection, str] = WeakKeyDictionary()


def owe(client: Connection, loss: BaseException) -> None:
    """Note that a link was lost over which consumers of `client` ran."""
    _untold[client] = str(loss)


def is_owed(client: Connection) -> bool:
    """Return whether who drains `client` is still to be told of a loss."""
    return client in _untold


def note_told(client: Connection) -> None:
    """Note that nobody is to be told of it any more: he was, or closed the connection himself."""
    _untold.pop(client, None)


def tell(client: Connection) -> None:
    """Raise what is owed, once.

    Raises:
        LinkLostError: The link was lost, and another greenlet has replaced it.
    """
    words = _untold.pop(client, None)
    if words is not None:
        raise LinkLostError(words)
