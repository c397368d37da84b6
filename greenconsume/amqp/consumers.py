"""Owns which consumers one channel has, and what became of the others.

Does no I/O and knows no channel, so that a model can be held against it. The channel says what it told the
broker, and what the broker told it.
"""

from __future__ import annotations

from collections.abc import Callable

from greenconsume.amqp.frames import Delivery

#: Most channels need no set of their own, which takes 216 bytes.
_NO_TAGS: frozenset[str] = frozenset()


class ChannelConsumer:
    """One consumer that the broker knows.

    Attributes:
        callback: Takes a `Delivery`.
        no_ack: The broker counts what it sends as settled.
        on_cancel: Called with the tag when the broker cancels it.
        resume_args: The arguments that consume again; None where it cannot be paused, or is.
    """

    __slots__ = ("callback", "no_ack", "on_cancel", "resume_args")

    def __init__(
        self,
        callback: Callable[[Delivery], object],
        no_ack: bool,
        on_cancel: Callable[[str], object] | None,
        resume_args: bytes | None,
    ) -> None:
        self.callback = callback
        self.no_ack = no_ack
        self.on_cancel = on_cancel
        self.resume_args = resume_args

    def pause(self) -> bytes:
        """Return what resumes it; it cannot be paused again before."""
        args, self.resume_args = self.resume_args, None
        assert args is not None
        return args

    def resume(self, args: bytes) -> None:
        """Note that it consumes again."""
        self.resume_args = args


class Consumers:
    """The consumers of one channel by tag, in the order they were started.

    Attributes:
        running: Those whose deliveries are dispatched.
        no_ack_tags: The tags of consumers whose deliveries need no settle. They stay when the consumer is
            stopped: what it has in hand is still handled.
    """

    __slots__ = ("_announced", "no_ack_tags", "running")

    def __init__(self) -> None:
        self.running: dict[str, ChannelConsumer] = {}
        self.no_ack_tags = _NO_TAGS
        self._announced = _NO_TAGS

    @property
    def has_running(self) -> bool:
        """Whether any consumer runs."""
        return bool(self.running)

    def start(self, tag: str, consumer: ChannelConsumer) -> None:
        """Note that the broker has started a consumer."""
        self.running[tag] = consumer
        if tag in self._announced:
            self._announced -= {tag}
        if consumer.no_ack:
            self.keep_settled(tag)
        elif tag in self.no_ack_tags:
            self.no_ack_tags -= {tag}

    def keep_settled(self, tag: str) -> None:
        """Note that what this consumer was sent, and still is, needs no settle."""
        self.no_ack_tags |= {tag}

    def stop(self, tag: str) -> ChannelConsumer | None:
        """Forget a consumer, and return it if it ran: what comes for it is not dispatched any more."""
        return self.running.pop(tag, None)

    def announce(self) -> list[str]:
        """Return the tags of all that run: the broker is told now that they end."""
        tags = list(self.running)
        self._announced |= set(tags)
        return tags

    def was_announced(self, tag: str) -> bool:
        """Whether the broker was told that this consumer ends, and it was not started again."""
        return tag in self._announced

    def needs_settle(self, tag: str) -> bool:
        """Whether a delivery to this consumer has to be settled."""
        return tag not in self.no_ack_tags

    def clear(self) -> None:
        """Forget all, for the channel's life is over; only what needs no settle is remembered."""
        self.running.clear()
        self._announced = _NO_TAGS
