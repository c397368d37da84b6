"""Owns the queues of `memory://`, and which consumer is woken for a message.

How a message finds a greenlet. A subscription (one consumer of one queue) is *in line* for its queue
when it has seen it empty, and otherwise *ready*: to be looked at by whoever drains its connection. A put
takes subscriptions from the head of the line until one wakes a drainer; those whose drainers are busy
or whose prefetch is used up become ready instead, and join the line again when they next find the queue
empty. So a put is one wake-up and, spread over all puts, a constant cost, with one consumer or 10,000.
The woken drainer owes the queue a look: if it leaves without taking a message of that queue (stopped,
killed, cancelled, served by another queue), it passes the wake-up on. Nothing switches between taking a
message and calling back with it.

It must never call a consumer itself. Called by `memory`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty
from typing import Any, Protocol

from kombu.transport import memory as kombu_memory
from kombu.transport import virtual

#: A message as it lies in a queue.
Payload = dict[str, Any]


class Wakeable(Protocol):
    """A channel, as a queue sees it."""

    def make_ready(self, subscription: Subscription) -> bool:
        """Have `subscription` looked at; return whether that woke a drainer."""


@dataclass(eq=False, slots=True)
class Subscription:
    """One consumer of one queue."""

    channel: Wakeable
    queue: str
    tag: str
    no_ack: bool
    callback: Callable[[virtual.Message], object]


@dataclass(eq=False, slots=True)
class Queue:
    """A queue's messages; a put wakes a consumer. Has as much of `queue.Queue` as kombu uses."""

    name: str
    queue: deque[Payload]

    def put(self, message: Payload) -> None:
        """Add a message at the end."""
        self.queue.append(message)
        wake_for(self.name)

    def get(self, block: bool = False) -> Payload:
        """Take the first message, without waiting.

        Raises:
            queue.Empty: There is none.
        """
        if not self.queue:
            raise Empty
        return self.queue.popleft()

    def qsize(self) -> int:
        """Return the number of messages."""
        return len(self.queue)

    def empty(self) -> bool:
        """Return whether there is no message."""
        return not self.queue


# By queue, who found it empty. An ordered dict, for first in, first out, and out of the middle; its values
# mean nothing.
_lines: dict[str, OrderedDict[Subscription, None]] = {}


def line_up(subscription: Subscription) -> None:
    """Put a subscription that found its queue empty at the end of the line."""
    _lines.setdefault(subscription.queue, OrderedDict())[subscription] = None


def leave_line(subscription: Subscription) -> None:
    """Take a subscription out of the line; harmless if it is not in it."""
    line = _lines.get(subscription.queue)
    if line is not None:
        line.pop(subscription, None)
        if not line:
            del _lines[subscription.queue]


def wake_for(queue: str) -> None:
    """Wake a drainer for `queue`: of the first in line that has one asleep and may take a message."""
    line = _lines.get(queue)
    if line is None:
        return
    while line:
        subscription, _ = line.popitem(last=False)
        if subscription.channel.make_ready(subscription):
            break
    if not line:
        _lines.pop(queue, None)


def has_message(queue: str) -> bool:
    """Return whether a message lies in `queue`."""
    found = kombu_memory.Channel.queues.get(queue)
    return found is not None and not found.empty()


def copied(value: Any) -> Any:
    """Copy what JSON could hold; other values are shared."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value
