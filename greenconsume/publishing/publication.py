"""Owns one message of a publisher: what is to be written, until when, and what became of it.

Its outbox writes and finishes it; an application waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from greenconsume.amqp.confirms import Confirm
from greenconsume.errors import PublishError, RefusedError, ReturnedError
from greenconsume.stopping import Deadline

if TYPE_CHECKING:
    from greenconsume.publishing.outbox import Outbox


class Publication(Confirm):
    """A message that was given to a `Publisher`, until the broker confirmed it or it failed.

    Attributes:
        message_id: The message's `message_id` property; the same each time that it is written.
        ready: Whether it was confirmed or has failed.
        error: Why it failed, a `PublishError`.
    """

    __slots__ = (
        "alone",
        "declare",
        "due",
        "max_retries",
        "message_id",
        "outbox",
        "waiting_count",
        "written_count",
    )

    outbox: Outbox
    declare: Sequence[Any]
    due: float  # in monotonic time, when it is given up
    message_id: str
    max_retries: float

    def __init__(self, *address: Any) -> None:
        super().__init__(*address)
        self.alone = False  # it may have closed a channel: to be written with no other on its way
        self.waiting_count = self.written_count = 0

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the broker has confirmed the message.

        Args:
            timeout: Seconds to wait now; the message goes on. By default it is waited for until its own
                timeout, and given up then.

        Raises:
            NackedError: The broker could not take it.
            ReturnedError: It was mandatory, and no queue is bound for it.
            RefusedError: The broker closed the channel for it, as where its exchange does not exist.
            BlockedError: The broker blocked its publishers for too long.
            PublishTimeoutError: It was not confirmed in time.
            UnconfirmedError: Its link was lost and it was not to be written again, or its publisher stopped.

        Switches: yes, unless it is `ready`. From any greenlet of its hub.
        """
        if not self.ready:
            self.waiting_count += 1
            try:
                self.outbox.wait_for(self, timeout)
            finally:
                self.waiting_count -= 1
        if self.error is not None:
            self.outbox.unseen.pop(self, None)
            raise self.error

    @property
    def deadline(self) -> Deadline:
        """When it is given up."""
        return Deadline(None if self.due == inf else max(0.0, self.due - monotonic()))

    def answer(self, error: BaseException | None) -> None:
        """Take the channel's answer. Never switches."""
        self.outbox.on_answer(self, error)

    @property
    def fate(self) -> str:
        """What can be said of a message that was not confirmed."""
        return "it may or may not have arrived" if self.written_count else "it was never sent"

    def finish(self, error: PublishError | None) -> None:
        """Wake who waits: it is confirmed, or has failed. Never switches."""
        super().answer(error)

    def failed(
        self, kind: type[PublishError], what: str, cause: BaseException | None = None
    ) -> PublishError:
        """Return a new error that says what became of this message."""
        text = f"message {self.message_id} to exchange {self.exchange!r}, routing key {self.routing_key!r}"
        error = kind(f"{text}, {what}", self.exchange, self.routing_key, self.message_id)
        error.__cause__ = cause
        if isinstance(error, (RefusedError, ReturnedError)):
            error.reply_code = getattr(cause, "reply_code", None) or 0
            error.reply_text = getattr(cause, "reply_text", None) or str(cause)
        return error
