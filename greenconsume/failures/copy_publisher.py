"""Owns the way out for failed messages: copies are published, confirmed, over a link that consumes nothing.

All consumers of a link pool share one for each broker; it connects for the first message that one of them
has to publish, and lets go when the last of those consumers has left. A copy that may be on its way is waited
for, however long its broker blocks publishers: given up and published again it would be there twice.
Called by `recoverer` and `dead_letters`.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from uuid import uuid4
from weakref import WeakValueDictionary

from kombu import Connection

from greenconsume.amqp.link import DEFAULT_CLOSE_TIMEOUT
from greenconsume.errors import ReturnedError
from greenconsume.failures.message_copy import Copy
from greenconsume.links.pool import LinkPool
from greenconsume.publishing.outbox import Outbox
from greenconsume.publishing.publication import Publication
from greenconsume.stopping import StopSignal, wait_open

_NO_ROUTE = 312


class CopyPublisher:
    """Publishes copies of messages, each confirmed, for any number of greenlets.

    Args:
        pool: Where its link comes from.
        broker: Says which broker; never connected itself.
    """

    def __init__(self, pool: LinkPool, broker: Connection) -> None:
        self._pool = pool
        self._broker = broker
        self._outbox: Outbox | None = None
        self._users: set[object] = set()
        options = broker.transport_options or {}
        self._last_seconds: float = options.get("close_timeout", DEFAULT_CLOSE_TIMEOUT)

    def publish(
        self,
        user: object,
        copy: Copy,
        queue: str,
        stop: StopSignal,
        patience: float,
        is_wanted: Callable[[], bool] | None = None,
    ) -> bool:
        """Publish a copy to a queue; return whether there is that queue.

        Args:
            user: Who publishes; the link is kept until it has left.
            copy: The message; a `user_id` that the broker would refuse is put aside.
            queue: The name of the queue, for the default exchange.
            stop: Once it is set, the copy is waited for no longer than a close may take.
            patience: Seconds to wait for the confirm, however long the broker blocks or is away.
            is_wanted: Says whether to write the copy after all, where that had to wait.

        Raises:
            PublishError: It may not have arrived.

        Switches: yes.
        """
        copy.put_aside(self._broker.userid)
        outbox = self._outbox_for(user)
        publication = Publication(
            (copy.to_amqp(), "", queue, True, False),
            outbox.on_answer,
            message_id=str(copy.properties.get("message_id") or uuid4().hex),
            due=monotonic() + patience,
            is_wanted=is_wanted,
        )
        self._put_through(publication, outbox, stop)
        error = publication.error
        if isinstance(error, ReturnedError) and error.reply_code == _NO_ROUTE:
            return False
        if error is not None:
            raise error
        return True

    def _put_through(self, publication: Publication, outbox: Outbox, stop: StopSignal) -> None:
        publication.waiting_count = 1  # its failure is told to whoever publishes
        outbox.put_nowait(publication)
        try:
            wait_open(publication.event, publication.deadline, stop)
            if stop.is_set() and not publication.ready:
                publication.event.wait(self._last_seconds)
        finally:
            if not publication.ready:
                outbox.give_up(publication, "its consumer stops")

    def _outbox_for(self, user: object) -> Outbox:
        self._users.add(user)
        if self._outbox is None:
            self._outbox = Outbox(self._broker, self._pool)
        return self._outbox

    def leave(self, user: object) -> None:
        """Let go of the link if nobody else uses it. Switches: yes, if it is open."""
        self._users.discard(user)
        if not self._users and self._outbox is not None:
            outbox, self._outbox = self._outbox, None
            outbox.close()


#: One for each pool and broker, while somebody uses it. Weakly: it holds its pool, which goes with its users.
_publishers: WeakValueDictionary[tuple[LinkPool, str], CopyPublisher] = WeakValueDictionary()


def ensure_copy_publisher(pool: LinkPool, connection: Connection) -> CopyPublisher:
    """Return the pool's own for the broker of `connection`; the same one for all. Never switches."""
    info = connection.info()
    key = pool, repr(sorted((name, repr(value)) for name, value in info.items()))
    publisher = _publishers.get(key)
    if publisher is None:
        publisher = _publishers[key] = CopyPublisher(pool, connection.clone())
    return publisher
