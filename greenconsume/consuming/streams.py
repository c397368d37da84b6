"""Owns where one consumer stands in the streams that it reads, over all its connections.

A stream gives nothing back, so what was not settled when a link was lost has to be asked for: the consumer
goes on at its first unsettled message, not where the user had it begin; one that has got nothing yet goes on
at the time at which it began. It sends nothing. Called by `engine`.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from kombu import Consumer, Message

from greenconsume.failures.message_copy import keep_wire_form
from greenconsume.failures.recoverer import Recoverer
from greenconsume.failures.streams import OFFSET, is_stream

logger = logging.getLogger("greenconsume.consuming")

Accept = Callable[[Any, Any, Any], bool]

#: RabbitMQ begins here where nothing is said: at what is published from now on.
_NEXT = "next"
#: The states of a kombu message that is dealt with; one that was given back comes again.
_SETTLED = frozenset({"ACK", "REJECTED"})
#: RabbitMQ's refusal of a consumer, with the queue's name.
_WANTS_PREFETCH = re.compile(r"prefetch count is not set for .*?queue '(.+?)' in vhost")


class StreamPlaces:
    """The place of one consumer in each of its streams."""

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}

    def fit(self, consumer: Consumer, recoverer: Recoverer) -> Accept | None:
        """Have a consumer resume at its place; return what sees its messages; None: it reads no stream.

        Args:
            consumer: A `kombu.Consumer` that does not consume yet.
            recoverer: What sees them next.
        """
        queues = consumer.queues if isinstance(consumer, Consumer) else ()  # not a test's mock
        streams = [queue for queue in queues if is_stream(queue)]
        elsewhere = queues and (
            not consumer.auto_declare or any(getattr(each, "no_declare", None) for each in queues)
        )
        for queue in streams:
            arguments = dict(queue.consumer_arguments or {})
            place = self._places.setdefault(queue.name, _Place())
            arguments[OFFSET] = place.resume(arguments.get(OFFSET, _NEXT))
            queue.consumer_arguments = arguments
            logger.info(
                "reads the stream %s from %s on, with a prefetch of %s",
                queue.name,
                arguments[OFFSET],
                getattr(consumer.channel, "prefetch_count", None),
            )
        return self._accepting(recoverer) if streams or elsewhere else None

    def mark(self, consumer: Consumer) -> None:
        """Mark as streams those queues of a consumer that were found to be streams meanwhile."""
        for queue in consumer.queues if isinstance(consumer, Consumer) else ():
            if queue.name in self._places and not is_stream(queue):
                queue.consumer_arguments = {**(queue.consumer_arguments or {}), OFFSET: _NEXT}

    def learn(self, error: BaseException) -> None:
        """Note what the broker says of a stream that was declared elsewhere: that it wants a prefetch."""
        found = _WANTS_PREFETCH.search(str(error))
        if found is not None:
            self._places.setdefault(found[1], _Place())

    def _accepting(self, recoverer: Recoverer) -> Accept:
        def accept(consumer: Consumer, message: Message, raw: object) -> bool:
            offset = message.headers.get(OFFSET)
            place = self._place_of(consumer, message) if offset is not None else None
            if place is not None and isinstance(offset, int):
                place.note(offset, message)
                recoverer.take_on(consumer, message)  # its policies cannot put it back
                keep_wire_form(message, raw)
            return recoverer.accept(consumer, message, raw)

        return accept

    def _place_of(self, consumer: Consumer, message: Message) -> _Place | None:
        tag = message.delivery_info.get("consumer_tag")
        for name, own in consumer._active_tags.items():
            if own == tag:
                return self._places.get(name) or self._found(consumer, message, name)
        return None

    def _found(self, consumer: Consumer, message: Message, name: str) -> _Place | None:
        """Return the place in what the channel has found to be a stream; None where it is none."""
        deliveries = getattr(message.channel, "deliveries", None)
        if deliveries is None or not deliveries.is_of_stream(message.delivery_tag):
            return None
        place = self._places[name] = _Place()
        self.mark(consumer)
        logger.info("the queue %s, declared elsewhere, is a stream", name)
        return place


class _Place:
    """The messages of one stream that are in hand, in their order, and what lies behind them."""

    __slots__ = ("_began", "_in_hand", "_next")

    def __init__(self) -> None:
        self._in_hand: deque[tuple[int, Any]] = deque()
        self._next: int | None = None
        self._began: datetime | None = None

    def note(self, offset: int, message: Message) -> None:
        """Note a message that has come."""
        self._leave_behind()
        self._in_hand.append((offset, message))

    def resume(self, begins: object) -> Any:
        """Return the offset to consume from; `begins` where no message has come yet."""
        self._leave_behind()
        if self._in_hand:
            self._next = self._in_hand[0][0]
            self._in_hand.clear()  # they come again
        if self._next is not None:
            return self._next
        if begins != _NEXT:
            return begins
        # By then the broker would skip what came while the link was away. Its clock has whole seconds, and
        # its chunks several messages: one or the other may come that is older, and none is missed.
        began, self._began = self._began, self._began or datetime.now(timezone.utc)
        return began or begins

    def _leave_behind(self) -> None:
        while self._in_hand and self._in_hand[0][1]._state in _SETTLED:
            self._next = self._in_hand.popleft()[0] + 1
