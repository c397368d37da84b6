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


class Inheritance:
    """Keeps whether a new session's drainer is still to be told of the link that it replaces.

    Attributes:
        pending: True until its drainer has been told, or has begun anew.
    """

    __slots__ = ("_client", "pending")

    def __init__(self, client: Connection) -> None:
        self._client = client
        self.pending = client in _untold

    def settle(self, has_consumers: bool, is_lost: bool) -> None:
        """Raise what is owed, once, unless the session is lost itself, or who drains it has begun anew.

        Raises:
            LinkLostError: The link was lost, and another greenlet has replaced it.
        """
        if self.pending:
            self.pending = False
            if not has_consumers:
                _tell(self._client)
        if is_lost:
            note_told(self._client)


def note_told(client: Connection) -> None:
    """Note that nobody is to be told of it any more: he was, or closed the connection himself."""
    _untold.pop(client, None)


def _tell(client: Connection) -> None:
    words = _untold.pop(client, None)
    if words is not None:
        raise LinkLostError(words)
