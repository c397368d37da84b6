"""Owns what wraps handlers: context managers of the user's, entered around each message or batch.

They are entered in the handler's own greenlet and context, outermost first, and left before its message
meets a policy: what they raise or swallow is the handler's outcome. A handler that nothing wraps is called as
if this module were not there. Called by `boundary`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kombu import Consumer, Message

from greenconsume.around import Around, entered
from greenconsume.handling.jobs import current_job

#: Takes the `kombu.Consumer` and the message, and calls the callbacks.
Receive = Callable[[Any, Any], None]


def wrapped(receive: Receive, around: Sequence[Around]) -> Receive:
    """Return `receive` within the context managers of `around`; itself, where there are none."""
    if not around:
        return receive

    def receive_within(consumer: Consumer, message: Message) -> None:
        with entered(around, message):
            receive(consumer, message)

    return receive_within


@dataclass(frozen=True, slots=True)
class CurrentHandler:
    """The handler that runs in a greenlet.

    Attributes:
        consumer: The name of its consumer, as logs and events have it.
        queue: The queue that its message came from; empty where that is not known.
        message: Its message, or its `Batch`.
    """

    consumer: str
    queue: str
    message: Any


def current_handler() -> CurrentHandler | None:
    """Return the handler that runs in this greenlet, if one does; one that it spawns has none.

    Switches: never. From any greenlet.
    """
    job = current_job()
    if job is None:
        return None
    return CurrentHandler(job.owner, _queue_of(job.consumer, job.message), job.message)


def _queue_of(consumer: Consumer, message: Message) -> str:
    """Return the queue of a message, by the consumer tag that it was delivered with."""
    tag = message.delivery_info.get("consumer_tag")
    tags: dict[str, str] = getattr(consumer, "_active_tags", None) or {}
    for queue, known in tags.items():
        if known == tag:
            return queue
    return next(iter(tags)) if len(tags) == 1 else ""
