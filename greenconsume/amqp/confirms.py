"""Owns what the broker has yet to answer for of what one channel published: confirms, returned messages.

Does no I/O and knows no channel, so that a model can be held against it. Any number of greenlets publish on
one channel at once; each waits for the confirm of its own message, by its delivery tag.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import amqp
from gevent.event import Event

from greenconsume.amqp.frames import Address

#: Where a message went, and its id: what the broker repeats when it returns one.
_Key = tuple[str, str, object]


class Confirm:
    """A published message, until the broker has answered for it: confirmed, nacked or returned it.

    Any number of greenlets may wait for it, at any time.

    Attributes:
        message: The `amqp.Message`, and where it went: `exchange`, `routing_key`, `mandatory`, `immediate`.
        ready: True once there is an answer.
        error: The answer, if the message was not confirmed.
        returned: Why the broker returned it; its confirm still follows.
    """

    __slots__ = (
        "_event",
        "error",
        "exchange",
        "immediate",
        "mandatory",
        "message",
        "ready",
        "returned",
        "routing_key",
    )

    def __init__(
        self,
        message: amqp.Message,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
    ) -> None:
        self.message = message
        self.exchange = exchange
        self.routing_key = routing_key
        self.mandatory = mandatory
        self.immediate = immediate
        self.ready = False
        self.error: BaseException | None = None
        self.returned: BaseException | None = None
        self._event: Event | None = None

    @property
    def address(self) -> Address:
        """The exchange, the routing key, whether it is mandatory, and whether it is immediate."""
        return self.exchange, self.routing_key, self.mandatory, self.immediate

    @property
    def event(self) -> Event:
        """The event that is set when there is an answer."""
        if self._event is None:  # made for those who wait alone: most are confirmed in flight
            self._event = Event()
            if self.ready:
                self._event.set()
        return self._event

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the broker's answer.

        Raises:
            MessageNacked: The broker could not take it.
            amqp.exceptions.ChannelError: It was mandatory and came back, or its channel was closed.
            LinkLostError: The link is gone: it may or may not have arrived.
            TimeoutError: No answer within `timeout` seconds; it may still come.

        Switches: yes, unless there is an answer.
        """
        if not self.ready and not self.event.wait(timeout):
            raise TimeoutError(f"the broker has not confirmed a message within {timeout} s")
        if self.error is not None:
            raise self.error

    def note_return(self, error: BaseException | None) -> None:
        """Note why the broker returned the message; None: it is written again. Never switches."""
        self.returned = error

    def answer(self, error: BaseException | None) -> None:
        """Take the answer, from the channel; called once, by the reader. Never switches."""
        self.ready = True
        self.error = error
        if self._event is not None:
            self._event.set()


class Confirms:
    """The published messages of a channel in confirm mode, by delivery tag, until they are answered.

    Attributes:
        published: How many were published since the mode was chosen: the last delivery tag.
    """

    __slots__ = ("_answered", "_mandatory", "_waiting", "published")

    def __init__(self) -> None:
        self.published = 0
        self._answered = 0  # the tag up to which every one has its answer
        self._waiting: dict[int, Confirm] = {}
        self._mandatory: dict[_Key, list[Confirm]] = {}

    def count(self) -> None:
        """Count a message that nobody waits for."""
        self.published += 1

    def put(self, confirm: Confirm) -> int:
        """Note a message that was just published, and return its delivery tag."""
        self.published += 1
        confirm.note_return(None)  # whatever became of it when it was written before
        self._waiting[self.published] = confirm
        if confirm.mandatory or confirm.immediate:
            self._mandatory.setdefault(_key_of(confirm), []).append(confirm)
        return self.published

    def abandon(self, tag: int, confirm: Confirm) -> None:
        """Forget a message that nobody waits for any more.

        A mandatory one stays until its answer, so that its return meets nobody else.
        """
        if self._waiting.get(tag) is confirm and not (confirm.mandatory or confirm.immediate):
            self._forget(tag)

    def answer(
        self, delivery_tag: int, multiple: bool, error: type[BaseException] | None = None
    ) -> None:
        """Take what the broker says of one message, or of all up to one (0: all there are)."""
        tags = range(delivery_tag, delivery_tag + 1)
        if multiple:
            # Each tag is looked at once in its life, however many are open and in whatever order they come.
            last = min(delivery_tag or self.published, self.published)
            tags = range(self._answered + 1, last + 1)
            self._answered = max(self._answered, last)
        for tag in tags:
            confirm = self._forget(tag)
            if confirm is not None:
                confirm.answer(confirm.returned or (error() if error else None))

    def find_returned(
        self, exchange: str, routing_key: str, message: amqp.Message
    ) -> Confirm | None:
        """Return which message came back, and forget that it might; its confirm still follows."""
        key = (exchange, routing_key, message.properties.get("message_id"))
        confirm = _sent_as(message, self._mandatory.get(key, ()))
        if confirm is not None:
            self._drop_mandatory(key, confirm)
        return confirm

    def fail(self, error: Callable[[], BaseException]) -> bool:
        """Answer all with an error, each with one of its own; return whether there were any."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        self._mandatory.clear()
        for confirm in waiting:
            confirm.answer(error())
        return bool(waiting)

    def _forget(self, tag: int) -> Confirm | None:
        confirm = self._waiting.pop(tag, None)
        if confirm is not None and (confirm.mandatory or confirm.immediate):
            self._drop_mandatory(_key_of(confirm), confirm)
        return confirm

    def _drop_mandatory(self, key: _Key, confirm: Confirm) -> None:
        waiting = self._mandatory.get(key, [])
        if confirm in waiting:
            waiting.remove(confirm)
        if not waiting:
            self._mandatory.pop(key, None)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def holds_immediate(self) -> bool:
        """True if one of them was published with `immediate`."""
        return any(confirm.immediate for confirm in self._waiting.values())


def _key_of(confirm: Confirm) -> _Key:
    message_id = confirm.message.properties.get("message_id")
    return confirm.exchange, confirm.routing_key, message_id


def _sent_as(returned: amqp.Message, candidates: Sequence[Confirm]) -> Confirm | None:
    """Return which of the messages to one address came back: the first with its body, else the first."""
    body = _body_of(returned)
    same = (confirm for confirm in candidates if _body_of(confirm.message) == body)
    return next(same, next(iter(candidates), None))


def _body_of(message: amqp.Message) -> object:
    if not isinstance(message.body, str):
        return message.body
    return message.body.encode(message.properties.get("content_encoding") or "utf-8", "replace")
