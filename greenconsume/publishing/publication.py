"""Owns one message that is published with confirms: what is to be written, until when, what became of it.

It does no I/O and knows no channel: whoever has it written is told of the answer by a callable. Made by
`publisher` and by what publishes copies of failed messages; an application waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import Any

import amqp
from kombu import Exchange, Queue

from greenconsume.amqp.confirms import Confirm
from greenconsume.errors import PublishError, PublishTimeoutError, RefusedError, ReturnedError
from greenconsume.stopping import Deadline

#: The message, its exchange and routing key, and whether it is mandatory and immediate.
AddressedMessage = tuple[amqp.Message, str, str, bool, bool]


class Publication(Confirm):
    """A message that was given to a `Publisher`, until the broker confirmed it or it failed.

    Users wait for it, and read `message_id`, `ready` and `error`; the rest is the publisher's.

    Attributes:
        message_id: The message's `message_id` property; the same each time that it is written.
        ready: True once it was confirmed or has failed.
        error: Why it failed, a `PublishError`.
        due: When it is given up, in monotonic time.
        max_retries: How often it is written again after its link was lost.
        declare: What is to be declared before it is written.
        is_wanted: Says whether to write it after all; None: yes.
        alone: It may have closed a channel or a link: no other is on its way while it is.
        waiting_count: How many greenlets wait for it.
        written_count: How often it was written.
        seen: Its error was raised to somebody.
    """

    __slots__ = (
        "_on_answer",
        "alone",
        "declare",
        "due",
        "is_wanted",
        "max_retries",
        "message_id",
        "put_at",
        "seen",
        "waiting_count",
        "written_count",
    )

    def __init__(
        self,
        address: AddressedMessage,
        on_answer: Callable[[Publication, BaseException | None], object],
        *,
        message_id: str = "",
        due: float = inf,
        max_retries: float = inf,
        declare: Sequence[Exchange | Queue] = (),
        is_wanted: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__(*address)
        self.message_id = message_id
        self.due = due
        self.max_retries = max_retries
        self.declare = declare
        self.is_wanted = is_wanted
        self.alone = self.seen = False
        self.waiting_count = self.written_count = 0
        self.put_at = 0.0  # when it was taken, where somebody watches
        self._on_answer = on_answer

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the broker has confirmed the message.

        Args:
            timeout: Seconds to wait now; the message goes on. By default it is waited for until its own
                timeout, and given up then.

        Raises:
            NackedError: The broker could not take it.
            ReturnedError: It was mandatory, and no queue is bound for it.
            RefusedError: The broker closed the channel or the connection for it, as where its exchange
                does not exist.
            BlockedError: The broker blocked its publishers for too long.
            PublishTimeoutError: It was not confirmed in time.
            UnconfirmedError: Its link was lost and it was not to be written again, or its publisher stopped.

        Switches: yes, unless it is `ready`. From any greenlet of its hub.
        """
        if not self.ready:
            self.waiting_count += 1
            try:
                if not self.event.wait(timeout):
                    raise self.failed(PublishTimeoutError, f"is not confirmed after {timeout} s")
            finally:
                self.waiting_count -= 1
        if self.error is not None:
            self.seen = True
            raise self.error

    @property
    def headers(self) -> dict[str, Any]:
        """The message's headers; what is around its publishing may add to them."""
        message: Any = self.message
        if isinstance(message, tuple):  # as `kombu` hands it to a channel's `prepare_message`
            plain: dict[str, Any] = message[4]
            return plain
        headers: dict[str, Any] = message.properties.setdefault("application_headers", {})
        return headers

    @property
    def deadline(self) -> Deadline:
        """The time at which it is given up."""
        return Deadline(None if self.due == inf else max(0.0, self.due - monotonic()))

    def answer(self, error: BaseException | None) -> None:
        """Take the channel's answer, and hand it on. Never switches."""
        self._on_answer(self, error)

    @property
    def fate(self) -> str:
        """The words for it while it is not confirmed."""
        return "it may or may not have arrived" if self.written_count else "it was never sent"

    def finish(self, error: PublishError | None) -> None:
        """Wake who waits: it is confirmed, or has failed. Never switches."""
        super().answer(error)

    def failed(
        self, kind: type[PublishError], what: str, cause: BaseException | None = None
    ) -> PublishError:
        """Return a new error that says what became of this message. Never switches."""
        text = f"message {self.message_id} to exchange {self.exchange!r}, routing key {self.routing_key!r}"
        error = kind(f"{text}, {what}", self.exchange, self.routing_key, self.message_id)
        error.__cause__ = cause
        if isinstance(error, (RefusedError, ReturnedError)):
            error.reply_code = getattr(cause, "reply_code", None) or 0
            error.reply_text = getattr(cause, "reply_text", None) or str(cause)
        return error
