"""Owns what is done to the consumers that `get_consumers` returned: each is put behind the boundary.

It must never enter one. What is no consumer but a context of the user's stays as it is. Called by `engine`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kombu import Consumer

from greenconsume.consuming.streams import StreamPlaces
from greenconsume.errors import InvalidConsumerError
from greenconsume.handling.boundary import Handling
from greenconsume.handling.handler import Handler
from greenconsume.handling.kill_switch import Switch, fit_switch


def listed(consumers: Any, owner: object) -> list[Any]:
    """Return what `get_consumers` returned as a list; a generator is run to its end.

    Args:
        consumers: What it returned.
        owner: The consumer whose method it is.

    Raises:
        InvalidConsumerError: It is nothing to iterate over.
    """
    try:
        iterator = iter(consumers)
    except TypeError as exc:
        raise InvalidConsumerError(
            f"{type(owner).__name__}.get_consumers returned {consumers!r}: "
            "return a list of consumers, as in [Consumer(queues=[queue], callbacks=[self.on_task])]"
        ) from exc
    return list(iterator)


def guard(
    consumers: Iterable[Any], handling: Handling, streams: StreamPlaces, switch: Switch | None
) -> None:
    """Have each `kombu.Consumer` hand its messages to `handling`; it registers that when it is entered.

    Switches: yes, if a prefetch has to be set.
    """
    for consumer in consumers:
        if not hasattr(consumer, "_receive_callback"):
            continue  # a context of the user's, which kombu enters as well
        streams.mark(consumer)
        handle = handling.fitted(consumer)
        accept = streams.fit(consumer, handling.recoverer)
        consumer._receive_callback = Handler(consumer, handling, handle, accept)
        fit_switch(consumer, switch)


def queues_of(consumers: Iterable[Any]) -> dict[str, bool]:
    """Return the names of the queues that `kombu.Consumer`s consume from, and whether they are fleeting."""
    # Whatever else a test gives for a consumer may have anything by that name.
    queues = (queue for each in consumers if isinstance(each, Consumer) for queue in each.queues)
    return {
        str(getattr(queue, "name", queue)): bool(
            getattr(queue, "auto_delete", False) or getattr(queue, "exclusive", False)
        )
        for queue in queues
    }
