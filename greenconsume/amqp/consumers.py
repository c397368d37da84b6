"""Owns which consumers one channel has, and what became of the others.

Does no I/O and knows no channel, so that a model can be held against it. The channel says what it told the
broker, and what the broker told it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from greenconsume.amqp.frames import Delivery

#: Most channels need no set of their own, which takes 216 bytes.
_NO_TAGS: frozenset[str] = frozenset()

#: What `Basic.Consume` is sent with: ticket, queue, tag, no-local, no-ack, exclusive, nowait, arguments.
ConsumeArgs = tuple[int, str, str, bool, bool, bool, bool, Any]


class ChannelConsumer:
    """One consumer that the broker knows.

    Attributes:
        callback: Takes a `Delivery`.
        no_ack: The broker counts what it sends as settled.
        on_cancel: Called with the tag when the broker cancels it.
        consume_args: Those that consume again; None where it cannot be paused.
        is_paused: A stand-in consumes in its place, one message after the other.
        is_stream: It reads a stream, which knows acks only.
        ask: Asks the broker whether it does, where that is not known; None where it is.
        held: What came while the broker is asked; None while it is not.
    """

    __slots__ = (
        "ask",
        "callback",
        "consume_args",
        "held",
        "is_paused",
        "is_stream",
        "no_ack",
        "on_cancel",
    )

    def __init__(
        self,
        callback: Callable[[Delivery], object],
        no_ack: bool,
        on_cancel: Callable[[str], object] | None,
        consume_args: ConsumeArgs | None,
        is_stream: bool = False,
        ask: Callable[[], bool] | None = None,
    ) -> None:
        self.callback = callback
        self.no_ack = no_ack
        self.on_cancel = on_cancel
        self.consume_args = consume_args
        self.is_paused = False
        self.is_stream = is_stream
        self.ask = ask
        self.held: list[Delivery] | None = None

    def learn(self, is_stream: bool) -> list[Delivery]:
        """Note whether it reads a stream; return what was held until that is known."""
        held, self.held, self.ask = self.held or [], None, None
        self.is_stream = is_stream
        return held

    def forget_held(self) -> None:
        """Forget what is held: it is the broker's again."""
        if self.held:
            self.held.clear()

    @property
    def can_pause(self) -> bool:
        """True if it may be paused now."""
        return self.consume_args is not None and not self.is_paused

    def pause(self) -> ConsumeArgs:
        """Note that it is paused; return the arguments of its stand-in, which needs acks to be held back."""
        assert self.consume_args is not None
        self.is_paused = True
        ticket, queue, tag, no_local, _, exclusive, nowait, arguments = self.consume_args
        return (ticket, queue, stand_in_of(tag), no_local, False, exclusive, nowait, arguments)

    def resume(self) -> ConsumeArgs:
        """Note that it consumes again; return the arguments that it consumes with."""
        assert self.consume_args is not None
        self.is_paused = False
        return self.consume_args

    def end_stand_in(self) -> bool:
        """Return whether a stand-in is to be cancelled, as the consumer ends; it is asked for once."""
        was_paused, self.is_paused = self.is_paused, False
        return was_paused


def stand_in_of(tag: str) -> str:
    """Return the tag of the consumer that stands in for a paused one."""
    return f"{tag}.paused"


class Consumers:
    """The consumers of one channel by tag, in the order they were started.

    Attributes:
        running: Those whose deliveries are dispatched.
        no_ack_tags: The tags of consumers whose deliveries need no settle. They stay when the consumer is
            stopped: what it has in hand is still handled.
        stream_tags: Those of consumers that read, or did read, a stream.
    """

    __slots__ = ("_announced", "_stand_ins", "_unsure", "no_ack_tags", "running", "stream_tags")

    def __init__(self) -> None:
        self.running: dict[str, ChannelConsumer] = {}
        self.no_ack_tags = self.stream_tags = _NO_TAGS
        self._announced = _NO_TAGS
        self._stand_ins: dict[str, str] | None = None
        self._unsure: dict[str, ChannelConsumer] | None = None

    @property
    def has_running(self) -> bool:
        """True if any consumer runs."""
        return bool(self.running)

    def start(self, tag: str, consumer: ChannelConsumer) -> None:
        """Note that the broker has started a consumer."""
        self.running[tag] = consumer
        if self._unsure is not None:
            self._unsure.pop(tag, None)
        if consumer.is_stream:
            self.stream_tags |= {tag}
        elif tag in self.stream_tags:
            self.stream_tags -= {tag}
        if tag in self._announced:
            self._announced -= {tag}
        if consumer.no_ack:
            self.keep_settled(tag)
        elif tag in self.no_ack_tags:
            self.no_ack_tags -= {tag}

    def keep_streamed(self, tag: str, consumer: ChannelConsumer) -> None:
        """Note that this consumer reads a stream, or did, if its tag is not another's by now."""
        if self.running.get(tag, consumer) is consumer:
            self.stream_tags |= {tag}

    def keep_settled(self, tag: str) -> None:
        """Note that what this consumer was sent, and still is, needs no settle."""
        self.no_ack_tags |= {tag}

    def stop(self, tag: str) -> ChannelConsumer | None:
        """Forget a consumer, and return it if it ran: what comes for it is not dispatched any more."""
        consumer = self.running.pop(tag, None)
        if consumer is not None and consumer.ask is not None:
            if self._unsure is None:
                self._unsure = {}
            self._unsure[tag] = consumer
        return consumer

    def unsure(self, tag: str) -> ChannelConsumer | None:
        """Return a consumer that was stopped before it was known if it reads a stream; else None."""
        consumer = None if self._unsure is None else self._unsure.get(tag)
        return None if consumer is None or consumer.ask is None else consumer

    def forget_stopped(self, tag: str) -> None:
        """Note that the broker sends nothing more to a consumer that was stopped."""
        if self._unsure is not None and tag in self._unsure and self._unsure[tag].held is None:
            del self._unsure[tag]

    def forget_held(self) -> None:
        """Forget what is held: it is the broker's again."""
        for consumer in (*self.running.values(), *(self._unsure or {}).values()):
            consumer.forget_held()

    def stand_in(self, tag: str) -> None:
        """Note that a consumer has a stand-in: the messages that it is sent are the consumer's."""
        if self._stand_ins is None:
            self._stand_ins = {}
        self._stand_ins[stand_in_of(tag)] = tag

    def stood_in_for(self, tag: str) -> str | None:
        """Return the tag of the consumer that a stand-in stands for; None if it is none."""
        return None if self._stand_ins is None else self._stand_ins.get(tag)

    def announce(self) -> list[str]:
        """Return the tags of all that run: the broker is told now that they end."""
        tags = list(self.running)
        self._announced |= set(tags)
        return tags

    def was_announced(self, tag: str) -> bool:
        """Return whether the broker was told that this consumer ends, and it was not started again."""
        return tag in self._announced

    def needs_settle(self, tag: str) -> bool:
        """Return whether a delivery to this consumer has to be settled."""
        return tag not in self.no_ack_tags

    def clear(self) -> None:
        """Forget all, for the channel's life is over; only what needs no settle is remembered."""
        self.running.clear()
        self._announced = _NO_TAGS
        self._stand_ins = self._unsure = None
