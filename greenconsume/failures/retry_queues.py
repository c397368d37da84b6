"""Owns the queues that retries need in the broker: their names, their arguments, their declaration.

Called by `recoverer`. Holds no message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import amqp
from gevent.event import Event
from kombu import Connection, Queue

from greenconsume.amqp.channel import Channel
from greenconsume.amqp.transport import Session
from greenconsume.errors import InvalidConsumerError
from greenconsume.failures.delivery_limits import version_of
from greenconsume.failures.queue_names import retry_prefix

#: Of the delay queues of a quorum queue. A classic one dead-letters what expired while the broker was down
#: before the quorum queue has a leader again, and so into nothing (RabbitMQ 3.10, seen). From 3.10 on.
_AT_LEAST_ONCE: dict[str, Any] = {
    "x-queue-type": "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


#: The first RabbitMQ whose virtual hosts have a default type of queue.
_DEFAULT_TYPES = (3, 11)


def delay_queue(queue: str, delay: float) -> str:
    """Return the name of the queue in which messages of a queue wait for `delay` seconds."""
    return f"{retry_prefix(queue)}{_milliseconds(delay)}"


def delay_queues(
    queue: Queue, delays: Iterable[float], quorum: bool | None = None
) -> dict[str, dict[str, Any]]:
    """Return the queues that messages of a queue wait in, by name, with their arguments.

    Args:
        queue: The queue that they go back to.
        delays: For how many seconds each.
        quorum: True if it is a quorum queue; by default its arguments decide.
    """
    if quorum is None:
        quorum = _type_of(queue) == "quorum"
    return {
        delay_queue(queue.name, delay): {
            "x-message-ttl": _milliseconds(delay),
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue.name,
            **(_AT_LEAST_ONCE if quorum else {}),
        }
        for delay in delays
    }


def _type_of(queue: Queue) -> str | None:
    kind: str | None = (queue.queue_arguments or {}).get("x-queue-type")
    return kind


def is_quorum(queue: Queue, session: Session) -> bool:
    """Return whether a declared queue is a quorum queue, by its arguments or its virtual host's default.

    Switches: yes, where only the broker knows.
    """
    kind = _type_of(queue)
    if kind is not None or version_of(session.link.server_properties) < _DEFAULT_TYPES:
        return kind == "quorum"
    known = _declared_over(session).quorum
    if queue.name not in known:
        known[queue.name] = _proves_quorum(queue, session)
    return known[queue.name]


def _proves_quorum(queue: Queue, session: Session) -> bool:
    """Declare a queue, which is there, as a classic one: what the broker complains of tells its type."""
    channel = session.channel()
    try:
        channel.queue_declare(queue.name, passive=True)  # what is not there must not come to be
        arguments = channel.prepare_queue_arguments(
            {**(queue.queue_arguments or {}), "x-queue-type": "classic"},
            expires=queue.expires,
            message_ttl=queue.message_ttl,
            max_length=queue.max_length,
            max_length_bytes=queue.max_length_bytes,
            max_priority=queue.max_priority,
        )
        channel.queue_declare(
            queue.name, durable=queue.durable, auto_delete=False, arguments=arguments
        )
    except amqp.ChannelError as exc:
        return "x-queue-type" in str(exc) and "current is 'quorum'" in str(exc)
    finally:
        channel.close()
    return False


def lasts(queue: Queue) -> bool:
    """Return whether the queue is there when a delay is over, even if its consumer is not."""
    return not (queue.auto_delete or queue.exclusive or queue.name.startswith("amq."))


class _Declared:
    """The queues that were declared over one link: ten thousand replicas declare theirs once."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.quorum: dict[str, bool] = {}  # of queues that do not say their type
        self.pending: dict[str, Event] = {}

    @contextmanager
    def declaring(self, name: str) -> Iterator[None]:
        """Let others who need the queue wait for it."""
        self.pending[name] = done = Event()
        try:
            yield
            self.names.add(name)
        finally:
            del self.pending[name]
            done.set()


_declared: WeakKeyDictionary[Any, _Declared] = WeakKeyDictionary()


def declare_queues(
    source: Session | Connection, wanted: Mapping[str, dict[str, Any] | None], anew: bool = False
) -> None:
    """Declare durable queues, by name and arguments; with None, one that is there may have any arguments.

    Args:
        source: Gives the channel to declare on.
        wanted: The queues.
        anew: They may have been deleted since they were declared.

    Raises:
        InvalidConsumerError: The broker refuses it.
        StoppedError: The consumer stops.

    Switches: yes, unless all were declared over this link before, and not `anew`.
    """
    declared = _declared_over(source)
    if anew:
        declared.names.difference_update(wanted)
    channel = None
    try:
        for name, arguments in wanted.items():
            while name in declared.pending:
                _wait_for(declared.pending[name], source)
            if name not in declared.names:
                with declared.declaring(name):  # from here on, for all that follows may switch
                    channel = channel or source.channel()
                    _declare_queue(channel, name, arguments)
    finally:
        if channel is not None:
            channel.close()


def _declared_over(source: Session | Connection) -> _Declared:
    if not isinstance(source, Session):
        return _Declared()
    return _declared.setdefault(source.link, _Declared())


def _wait_for(declared: Event, source: Session | Connection) -> None:
    if isinstance(source, Session):
        source.wait_for(declared)  # another consumer's declare, which has a deadline of its own


def _declare_queue(channel: Channel, name: str, arguments: dict[str, Any] | None) -> None:
    try:
        Queue(name, queue_arguments=arguments).queue_declare(channel=channel)
    except (amqp.PreconditionFailed, amqp.AccessRefused) as exc:
        try:
            channel.queue_declare(name, passive=True)  # a green channel opens itself again
        except amqp.ChannelError:
            raise InvalidConsumerError(
                f"the broker does not let the queue {name!r} be declared, and it is not there: {exc}"
            ) from exc
        if arguments is not None and isinstance(exc, amqp.PreconditionFailed):
            raise InvalidConsumerError(
                f"there is a queue {name!r} with other properties than Retry needs, delete it: {exc}"
            ) from exc


def _milliseconds(delay: float) -> int:
    return round(delay * 1000)
