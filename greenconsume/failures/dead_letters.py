"""Owns a look into a dead-letter queue: what is in it, why, and its way back to where it came from.

Messages are taken one after the other and stay unsettled until they are removed; when the look ends, however
it ends, the broker puts the others back where they were. It must never remove what was not confirmed
elsewhere, unless it is told to. Called by `cli` and by users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

import amqp
from kombu import Connection

from greenconsume.amqp.transport import Transport
from greenconsume.errors import GreenconsumeError
from greenconsume.failures import message_copy
from greenconsume.failures.copy_publisher import CopyPublisher
from greenconsume.failures.message_copy import Copy, copy_of
from greenconsume.links.brokers import connection_to
from greenconsume.links.pool import LinkPool
from greenconsume.stopping import StopSignal
from greenconsume.virtual import publish_as_is

#: Seconds that a replayed message is waited for, however long the broker blocks its publishers.
_PATIENCE = 1440.0
#: What RabbitMQ notes about a message that it dead-lettered itself.
_DEATHS = "x-death"
_NOT_FOUND = "404"  # a number with AMQP, a text with kombu's virtual transports
_DEATH_PREFIXES = ("x-death", "x-first-death-", "x-last-death-")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message of a dead-letter queue, put there by `Retry` or by the broker.

    Attributes:
        number: Its place in the queue, from 1.
        tag: The delivery tag by which it is settled.
        headers: As they are, ours included.
        properties: The others, by their AMQP names.
        body: As it came, `bytes` or `str`; never decoded.
    """

    number: int
    tag: Any
    headers: dict[str, Any]
    properties: dict[str, Any]
    body: Any

    @property
    def time(self) -> str:
        """The time at which it was given up, in UTC, or an empty text."""
        at = self._death.get("time")
        if isinstance(at, datetime):
            return at.replace(tzinfo=timezone.utc).isoformat()
        return str(self.headers.get(message_copy.TIME, ""))

    @property
    def error_type(self) -> str:
        """The class of the exception, or the broker's reason (`rejected`, `expired`, …)."""
        return str(self.headers.get(message_copy.ERROR_TYPE) or self._death.get("reason", ""))

    @property
    def error(self) -> str:
        """The exception's text."""
        return str(self.headers.get(message_copy.ERROR, ""))

    @property
    def stack(self) -> str:
        """The traceback, or the end of it."""
        return str(self.headers.get(message_copy.STACK, ""))

    @property
    def host(self) -> str:
        """The host and the process in which the handler failed."""
        return str(self.headers.get(message_copy.HOST, ""))

    @property
    def retry_count(self) -> int:
        """The number of its retries."""
        return message_copy.retries_of(self.headers)

    @property
    def queue(self) -> str:
        """The queue that it came from, or an empty text."""
        return str(self.headers.get(message_copy.QUEUE) or self._death.get("queue", ""))

    @property
    def exchange(self) -> str:
        """The exchange that it was first published to."""
        return str(self.headers.get(message_copy.EXCHANGE) or self._death.get("exchange", ""))

    @property
    def routing_key(self) -> str:
        """The routing key that it was first published with."""
        keys = self._death.get("routing-keys") or [""]
        return str(self.headers.get(message_copy.ROUTING_KEY) or keys[0])

    @property
    def _death(self) -> dict[str, Any]:
        """The broker's note of the first time that it dead-lettered the message."""
        deaths = self.headers.get(_DEATHS)
        if message_copy.QUEUE in self.headers or not isinstance(deaths, list) or not deaths:
            return {}
        first: dict[str, Any] = deaths[-1]
        return first

    def revived(self) -> Copy:
        """Return the message as it was before it failed. Never switches."""
        copy = Copy(self.body, dict(self.headers), dict(self.properties))
        if message_copy.QUEUE not in copy.headers:
            for name in [n for n in copy.headers if n.startswith(_DEATH_PREFIXES)]:
                del copy.headers[name]
        copy.headers[message_copy.EXCHANGE] = self.exchange
        copy.headers[message_copy.ROUTING_KEY] = self.routing_key
        for name in message_copy.FAILURE:
            copy.headers.pop(name, None)
        copy.put_expiration_back()
        return copy


class DeadLetters:
    """The messages of a dead-letter queue, while it is looked into: a context manager to iterate over, once.

    Only what was in the queue at the beginning is shown, oldest first. A quorum queue counts each look as a
    delivery of each message that was shown.

    Args:
        broker: A kombu URL or `Connection`.
        queue: The name of the dead-letter queue.
        stop: Ends the iteration, and the wait for a connection, once it is set.

    Attributes:
        count: How many messages were in the queue at the beginning.
    """

    def __init__(
        self, broker: str | Connection, queue: str, stop: StopSignal | None = None
    ) -> None:
        self.count = 0
        self._queue = queue
        self._stop = stop or StopSignal()
        self._connection = connection_to(broker).clone()
        self._pool = LinkPool()
        self._publisher = CopyPublisher(self._pool, self._connection)
        self._channel: Any = None

    def __enter__(self) -> DeadLetters:
        """Connect, and see how many messages there are.

        Raises:
            GreenconsumeError: There is no such queue.
            kombu.exceptions.OperationalError: The broker cannot be reached, or refuses.

        Switches: yes.
        """
        try:
            self._pool.connect(self._connection, self._stop, max_retries=0)
            self._channel = self._connection.channel()
            self._channel.auto_decode = False
            declared = self._channel.queue_declare(self._queue, passive=True)
        except BaseException as exc:
            self._connection.close()
            if isinstance(exc, amqp.ChannelError) and str(exc.reply_code) == _NOT_FOUND:
                raise GreenconsumeError(f"there is no queue {self._queue!r}") from exc
            raise
        self.count = declared.message_count
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let the broker have back what was not removed. Switches: yes."""
        try:
            self._publisher.leave(self)
        finally:
            self._connection.close()

    def __iter__(self) -> Iterator[DeadLetter]:
        """Yield the messages, as the broker hands them out. Switches: yes."""
        for number in range(1, self.count + 1):
            if self._stop.is_set():
                return
            message = self._channel.basic_get(self._queue)
            if message is None:  # somebody else took them
                return
            copy = copy_of(message)
            yield DeadLetter(number, message.delivery_tag, copy.headers, copy.properties, copy.body)

    def replay(self, letter: DeadLetter) -> None:
        """Publish a message to the queue that it came from, and then remove it here.

        It has its retries before it again. Its consumer sees it in the queue, and not its exchange's others.

        Raises:
            GreenconsumeError: It does not say where it came from, or there is no such queue.
            Exception: It may not have arrived. In both cases it stays where it is.

        Switches: yes, until it is confirmed.
        """
        if not letter.queue:
            raise GreenconsumeError(f"message {letter.number} does not say where it came from")
        copy = letter.revived()
        if isinstance(self._connection.transport, Transport):
            copy.shorten_to(self._channel.connection.link.frame_max or 131072)
            if not self._publisher.publish(self, copy, letter.queue, self._stop, _PATIENCE):
                raise GreenconsumeError(f"there is no queue {letter.queue!r} to replay to")
        else:
            message = copy.to_virtual(self._channel)
            publish_as_is(self._channel, message, exchange="", routing_key=letter.queue)
        self.remove(letter)

    def remove(self, letter: DeadLetter) -> None:
        """Remove a message for good. Switches: over a polled transport alone."""
        self._channel.basic_ack(letter.tag)


def filter_of(conditions: Iterable[str]) -> Callable[[DeadLetter], bool]:
    """Return what tells whether a message meets every condition.

    Args:
        conditions: `name=value`, of a header (`greenconsume-` may be left out) or an AMQP property; or the
            type of the error, with or without its module.
    """
    tests = [_test_of(condition) for condition in conditions]
    return lambda letter: all(test(letter) for test in tests)


def _test_of(condition: str) -> Callable[[DeadLetter], bool]:
    name, equals, value = condition.partition("=")
    if not equals:
        return lambda letter: (
            condition
            in (
                letter.error_type,
                letter.error_type.rpartition(".")[2],
            )
        )

    def test(letter: DeadLetter) -> bool:
        places = ((letter.headers, name), (letter.headers, message_copy.PREFIX + name))
        for table, key in (*places, (letter.properties, name)):
            if key in table:
                return str(table[key]) == value
        return False

    return test
