"""Owns the way out for failed messages: confirmed publishing, over a link that consumes nothing.

All consumers of a link pool share one channel for each broker; it is opened by the first message that one
of them has to publish, and closed when the last of those consumers ends. Called by `retries` and
`dead_letters`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import amqp
from gevent.lock import BoundedSemaphore
from kombu import Connection

from greenconsume.errors import GreenconsumeError
from greenconsume.failures.message_copy import Copy
from greenconsume.links.pool import LinkPool
from greenconsume.stopping import StopSignal

#: Seconds for the broker to take a message, and as many again to confirm it.
CONFIRM_TIMEOUT = 30.0
#: How many failed attempts to connect are followed by another, before the message is put back instead.
_RETRIES = 3

_NO_ROUTE = 312


class Republisher:
    """Publishes copies, each confirmed, for any number of greenlets.

    Args:
        pool: Where its link comes from.
        connection: Says which broker; never connected itself.
    """

    def __init__(self, pool: LinkPool, connection: Connection) -> None:
        self._pool = pool
        self._template = connection
        self._opening = BoundedSemaphore(1)
        self._connection: Connection | None = None
        self._channel: Any = None
        self._users: set[object] = set()

    def publish(self, user: object, copy: Copy, queue: str, stop: StopSignal) -> bool:
        """Publish a copy to a queue; return whether there is that queue.

        Args:
            user: Who publishes; it stays connected until it has left.
            copy: The message; a `user_id` that the broker would refuse is put aside.
            queue: The name of the queue, for the default exchange.
            stop: Ends the wait for a connection.

        Raises:
            Exception: It may not have arrived: the broker did not confirm it, or cannot be reached.

        Switches: yes.
        """
        self._users.add(user)
        channel = self._open(stop)
        if (
            user not in self._users
        ):  # its consumer ended meanwhile, and closed what was open by then
            self.leave(user)
            raise GreenconsumeError("the consumer has ended")
        copy.put_aside(self._template.userid)
        link = channel.connection.link
        copy.shorten_to(link.frame_max or 131072)
        timeout = link.close_timeout if stop.is_set() else CONFIRM_TIMEOUT
        try:
            channel.basic_publish_confirm(
                copy.to_amqp(), "", queue, mandatory=True, timeout=timeout
            )
        except amqp.ChannelError as exc:
            if exc.reply_code != _NO_ROUTE:
                raise
            return False
        return True

    def declare(self, declare: Callable[[Connection], object]) -> None:
        """Have queues declared over its link, which is open. Switches: yes."""
        declare(self._connection)

    def leave(self, user: object) -> None:
        """Close it if nobody else uses it. Switches: yes, if it is open."""
        self._users.discard(user)
        if not self._users:
            self._close()

    def _open(self, stop: StopSignal) -> Any:
        with self._opening:
            if self._channel is None or not self._channel._session.connected:
                self._close()
                self._channel = self._connect(stop).channel()
            return self._channel

    def _connect(self, stop: StopSignal) -> Connection:
        connection, retries = self._template.clone(), _RETRIES
        if stop.is_set():  # a handler that finishes while its consumer stops: one attempt
            stop, retries = StopSignal(), 0
        self._pool.connect(connection, stop, None, retries, publishing=True)
        self._connection = connection
        return connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        channel, self._channel = self._channel, None
        if connection is None:
            return
        try:
            connection.close()
        finally:
            if channel is not None and not channel._session.left:
                channel._session.collect()  # a kill cut the close short


#: One for each pool and broker, while somebody uses it. Weakly: it holds its pool, which goes with its users.
_republishers: WeakValueDictionary[tuple[LinkPool, str], Republisher] = WeakValueDictionary()


def republisher_of(pool: LinkPool, connection: Connection) -> Republisher:
    """Return the pool's republisher for the broker of `connection`; the same one for all. Never switches."""
    info = connection.info()
    key = pool, repr(sorted((name, repr(value)) for name, value in info.items()))
    republisher = _republishers.get(key)
    if republisher is None:
        republisher = _republishers[key] = Republisher(pool, connection.clone())
    return republisher
