"""Owns what the green transports of kombu's virtual kind share: prefetch, settling once, closing all.

A base to build on; it knows no broker and sends nothing. Called by `redis` and `transports.memory`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from kombu.transport import virtual
from kombu.transport.base import StdChannel

from greenconsume.around import PlainPublication, plain_producers

_channel_ids = count(1)


class Unsettled(virtual.QoS):  # type: ignore[misc]  # kombu is untyped
    """Keeps what a channel has delivered and has yet to see settled, by delivery tag.

    A tag that is not there was settled already: settling it again does nothing to any message.
    """

    _dirty = ()  # kombu's keeps settled tags until the next delivery; here they are gone at once

    def __init__(self, channel: StdChannel, prefetch_count: int = 0) -> None:
        # Without kombu's __init__: it registers a finalizer with multiprocessing, which keeps every
        # QoS, and by it every channel, until the process ends.
        self.channel = channel
        self.prefetch_count = prefetch_count or 0
        self._delivered: OrderedDict[Any, Any] = OrderedDict()

    def append(self, message: object, delivery_tag: object) -> None:
        """Keep a message until it is settled."""
        self._delivered[delivery_tag] = message

    def up_to(self, delivery_tag: object) -> list[Any]:
        """Return the tags that `multiple` means: all up to one, or all if the tag is 0 or empty."""
        tags = list(self._delivered)
        if not delivery_tag:
            return tags
        return tags[: tags.index(delivery_tag) + 1] if delivery_tag in self._delivered else []


def next_channel_id() -> int:
    """Return a number that no other channel of this process has; kombu looks for a gap among all of them."""
    return next(_channel_ids)


def publish_plain(
    publish: Callable[..., object],
    message: dict[str, Any],
    exchange: str = "",
    routing_key: str = "",
    **options: object,
) -> None:
    """Publish for a plain `kombu.Producer`, within what was chosen to be entered around these.

    Args:
        publish: Publishes it, with the same arguments.
        message: As `prepare_message` returned it. Gets headers of its own, if something may add to them.
        exchange: The name of its exchange.
        routing_key: Its routing key.
        **options: Whatever else `publish` is given.
    """
    if not plain_producers.around:
        publish(message, exchange=exchange, routing_key=routing_key, **options)
        return
    headers = dict(message.get("headers") or {})
    known = str((message.get("properties") or {}).get("message_id") or "")
    publication = PlainPublication(exchange or "", routing_key or "", known, headers)
    with plain_producers.entered(publication):
        message = {**message, "headers": headers}
        publish(message, exchange=exchange, routing_key=routing_key, **options)


def publish_as_is(channel: Any, message: Any, **address: object) -> None:
    """Publish what is no plain producer's, on any channel of kombu's virtual kind. Switches: as that does."""
    publish = getattr(channel, "publish_as_is", None) or channel.basic_publish
    publish(message, **address)


def close_all(closes: Iterable[Callable[[], object]]) -> None:
    """Call each, also where one raises; the first error is raised once all were called."""
    errors: list[Exception] = []
    for close in closes:
        try:
            close()
        except Exception as exc:  # the others are closed all the same
            errors.append(exc)
    if errors:
        raise errors[0]
