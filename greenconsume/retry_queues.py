"""Owns the queues that retries need in the broker: their names, their arguments, their declaration.

Called by `retries`. Holds no message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import amqp
from kombu import Connection, Queue

from greenconsume.errors import InvalidConsumerError
from greenconsume.transports.amqp import Session

#: Of the delay queues of a quorum queue. A classic one dead-letters what expired while the broker was down
#: before the quorum queue has a leader again, and so into nothing (RabbitMQ 3.10, seen). From 3.10 on.
_AT_LEAST_ONCE = {
    "x-queue-type": "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


def delay_queue(queue: str, delay: float) -> str:
    """Return the name of the queue in which messages of a queue wait for `delay` seconds."""
    return f"{queue}.retry.{_milliseconds(delay)}"


def delay_queues(queue: Queue, delays: Iterable[float]) -> dict[str, dict[str, Any]]:
    """Return the queues that messages of a queue wait in, by name, with their arguments."""
    return {
        delay_queue(queue.name, delay): {
            "x-message-ttl": _milliseconds(delay),
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue.name,
            **(_AT_LEAST_ONCE if _is_quorum(queue) else {}),
        }
        for delay in delays
    }


def _is_quorum(queue: Queue) -> bool:
    return (queue.queue_arguments or {}).get("x-queue-type") == "quorum"


def lasts(queue: Queue) -> bool:
    """Whether the queue is there when a delay is over, even if its consumer is not."""
    return not (queue.auto_delete or queue.exclusive or queue.name.startswith("amq."))


#: By link, what was declared over it: ten thousand replicas declare their queues once.
_declared: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def declare_queues(
    connection: Connection, wanted: dict[str, dict[str, Any] | None], anew: bool = False
) -> None:
    """Declare durable queues, by name and arguments; with None, one that is there may have any arguments.

    Raises:
        InvalidConsumerError: The broker refuses it.

    Switches: yes, unless all were declared over this link before, and not `anew`.
    """
    session = connection.connection
    known = _declared.setdefault(session.link, set()) if isinstance(session, Session) else set()
    if anew:
        known.difference_update(wanted)
    for name, arguments in wanted.items():
        if name not in known:
            _declare_queue(connection, name, arguments)
            known.add(name)


def _declare_queue(connection: Connection, name: str, arguments: dict[str, Any] | None) -> None:
    try:
        _on_channel(connection, Queue(name, queue_arguments=arguments).queue_declare)
    except (amqp.PreconditionFailed, amqp.AccessRefused) as exc:
        try:
            _on_channel(connection, lambda channel: channel.queue_declare(name, passive=True))
        except amqp.ChannelError:
            raise InvalidConsumerError(
                f"the broker does not let the queue {name!r} be declared, and it is not there: {exc}"
            ) from exc
        if arguments is not None and isinstance(exc, amqp.PreconditionFailed):
            raise InvalidConsumerError(
                f"there is a queue {name!r} with other properties than Retry needs, delete it: {exc}"
            ) from exc


def _on_channel(connection: Connection, action: Callable[..., object]) -> None:
    """Call `action` with a channel of its own, which an error closes."""
    channel = connection.channel()
    try:
        action(channel=channel)
    finally:
        channel.close()


def _milliseconds(delay: float) -> int:
    return round(delay * 1000)
