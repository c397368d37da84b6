"""Owns kombu's and py-amqp's interface of a green channel, for any number of greenlets at once.

Here are their names and signatures; what a channel does is `channel_core`'s. What is declared or bound is
encoded by py-amqp. A method of py-amqp's that waits parks its greenlet until the link's reader has the reply.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import amqp
from amqp import spec
from amqp.exceptions import RecoverableConnectionError
from kombu.transport import base, pyamqp
from vine import promise

from greenconsume.amqp.calls import Life
from greenconsume.amqp.channel_core import ChannelCore, ChannelOwner, Handlers
from greenconsume.amqp.channel_publisher import ChannelPublisher
from greenconsume.amqp.consumers import ChannelConsumer
from greenconsume.amqp.fields import write_arguments
from greenconsume.amqp.frames import Sig
from greenconsume.amqp.ledger import ACK, REJECT, REQUEUE
from greenconsume.amqp.message import Message, message_of, taker_of
from greenconsume.amqp.stream_probe import is_stream as probe
from greenconsume.stopping import Deadline

_Table = dict[str, Any]


class Channel(pyamqp.Channel):  # type: ignore[misc]  # kombu is untyped
    """A channel that any number of greenlets may call at once.

    A channel that the broker closed raises that error where it is waited for, and opens itself again
    at its next use, as py-amqp's does; its consumers do not come back by themselves.

    Attributes:
        connection: The session that it belongs to; None once it is closed.
        channel_id: Its number on the link.
        core: What the link knows of it.
        deliveries: What it consumes, and settles.
    """

    Message = Message
    returned_messages = None  # nothing reads it, and py-amqp's thread-safe queue takes much memory
    connection: ChannelOwner | None
    __slots__ = ("_calls", "_session", "channel_id", "connection", "core", "deliveries")

    def __init__(
        self,
        connection: ChannelOwner,
        channel_id: int | None = None,
        auto_decode: bool = True,
        on_open: Callable[[Channel], object] | None = None,
    ) -> None:
        # Not py-amqp's, which makes much that is not used here: a process may have 10,000 channels.
        self._session = self.connection = connection
        self.channel_id = connection.allocate(channel_id)
        self.core = ChannelCore(connection, self.channel_id, auto_decode)
        self._calls, self.deliveries = self.core.calls, self.core.deliveries
        if on_open is not None:
            self.then(on_open)
        if connection.link.confirm_publish:
            self.basic_publish = self.basic_publish_confirm  # type: ignore[method-assign]  # as py-amqp's
        connection.channels[self.channel_id] = self

    # -- what it is -----------------------------------------------------------------------------------

    @property
    def publisher(self) -> ChannelPublisher:
        """The part that publishes, for those who need nothing else."""
        return self.core.publisher

    @property
    def is_open(self) -> bool:
        """True if the broker has opened it, and nobody closed it."""
        return self._calls.life is Life.OPEN

    @property
    def is_closing(self) -> bool:
        """True if it was closed from here."""
        return self._calls.is_closing

    @property
    def active(self) -> bool:
        """True if the broker lets it publish, by AMQP's flow control."""
        return self.core.is_active

    @property
    def auto_decode(self) -> bool:
        """True if bodies are decoded where they name an encoding."""
        return self.core.auto_decode

    @auto_decode.setter
    def auto_decode(self, value: bool) -> None:
        self.core.auto_decode = value

    @property
    def events(self) -> Handlers:
        """The callables that are told of `basic_return`, `basic_ack` and `basic_nack`, in greenlets."""
        return self.core.events

    @property
    def on_open(self) -> promise:
        """A promise, as py-amqp has it, that is fulfilled when the channel is open."""
        opened = promise()
        self.core.call_when_open(partial(opened, self))
        return opened

    @property
    def no_ack_consumers(self) -> frozenset[str]:
        """The tags of the consumers whose messages need no settle."""
        return self.deliveries.consumers.no_ack_tags

    @property
    def prefetch_count(self) -> int:
        """The number of unsettled deliveries that a consumer that is started next may have."""
        return self.deliveries.prefetch_count

    @property
    def epoch(self) -> int:
        """The number of this life of the channel; a message belongs to one of them."""
        return self.deliveries.epoch

    @property
    def stale_count(self) -> int:
        """The number of messages that were settled after their channel was gone."""
        return self.deliveries.stale_count

    @property
    def unsettled_count(self) -> int:
        """The number of deliveries that are not settled."""
        return self.deliveries.unsettled_count

    @property
    def oldest_unsettled(self) -> tuple[int, float] | None:
        """The delivery tag that has been unsettled for longest, and when it came (`time.monotonic`)."""
        return self.deliveries.oldest_unsettled

    # -- opening and closing --------------------------------------------------------------------------

    def open(self) -> None:
        """Open the channel, and wait until it is. Switches: yes."""
        if not self.is_open:
            self._calls.write(spec.Channel.Open, b"\0")
            self.wait(spec.Channel.OpenOk)

    def close(self, *_args: object, **_kwargs: object) -> None:
        """Close the channel; what it has not settled goes back to its queues. Idempotent.

        Switches: yes, for `close_timeout` at the most. Never raises for what the broker does.
        """
        if self._calls.life is not Life.CLOSED:
            self.core.close_from_here()
            self.await_closed(self._session.waits.close_deadline)

    def await_closed(self, deadline: Deadline) -> None:
        """Wait for `CloseOk` up to `deadline`; its id stays taken until the broker has answered."""
        self._calls.await_closed(deadline)
        self.collect()

    def collect(self) -> None:
        """Leave the session. Never switches."""
        self.core.collect()
        if self._session.channels.get(self.channel_id) is self:  # else its id has another owner
            del self._session.channels[self.channel_id]
        self.connection = None

    # -- calls --------------------------------------------------------------------------------------

    def send_method(
        self,
        sig: Sig,
        format: str | None = None,
        args: tuple[object, ...] | None = None,
        content: amqp.Message | None = None,
        wait: Sig | list[Sig] | None = None,
        callback: Callable[[], object] | None = None,
        returns_tuple: bool = False,
    ) -> Any:
        """Send one method; with `wait`, park until its reply. Switches only with `wait`.

        Raises:
            RecoverableConnectionError: The channel was closed, or its link is gone (`LinkLostError`).
            amqp.exceptions.ChannelError: The broker closed the channel.
        """
        self._calls.begin()
        self.deliveries.flush()
        self._calls.write(sig, write_arguments(format, args or ()) if format else b"", content)
        if callback is not None:
            callback()
        return self.wait(wait, returns_tuple=returns_tuple) if wait else None

    def wait(
        self,
        method: Sig | list[Sig],
        callback: Callable[..., object] | None = None,
        timeout: float | None = None,
        returns_tuple: bool = False,
        undo: Callable[..., object] | None = None,
    ) -> Any:
        """Park until the reader brings one of the replies `method`; see `send_method`.

        Args:
            method: A method, or a list of them.
            callback: Called by the reader with the reply; must not switch.
            timeout: Seconds; by default the link's `call_timeout`.
            returns_tuple: Return all arguments of the reply, not the first.
            undo: As `callback`, for a reply whose caller gave up.

        Raises:
            TimeoutError: No reply in time. One that comes later is dropped.
            StoppedError: The session's stop signal was set while it was set up.
        """
        methods = tuple(method) if isinstance(method, list) else (method,)
        args = self._calls.wait(methods, callback, timeout, undo).args
        if returns_tuple:
            return args
        return args[0] if args else None

    # -- consuming ------------------------------------------------------------------------------------

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: _Table | None = None,
        argsig: str = "BsbbbbbF",
    ) -> Any:
        """Declare a queue; remember what matters to its consumers, as `DeclaredQueues` has it."""
        declared = super().queue_declare(
            queue, passive, durable, exclusive, auto_delete, nowait, arguments, argsig
        )
        if not passive:
            self._calls.link.declared.note(queue, auto_delete, arguments or {})
        return declared

    def basic_qos(self, prefetch_size: int, prefetch_count: int, a_global: bool) -> Any:
        """Set the prefetch; `prefetch_count` holds for the consumers that are started after it."""
        self.deliveries.prefetch_count = prefetch_count
        if prefetch_size or not self._session.waits.is_setting_up:
            return super().basic_qos(prefetch_size, prefetch_count, a_global)
        self._calls.begin()
        return self.deliveries.send_prefetch(prefetch_count, a_global)  # as `Session.channel`

    def basic_consume(
        self,
        queue: str = "",
        consumer_tag: str = "",
        no_local: bool = False,
        no_ack: bool = False,
        exclusive: bool = False,
        nowait: bool = False,
        callback: Callable[..., object] | None = None,
        arguments: _Table | None = None,
        on_cancel: Callable[[str], object] | None = None,
        argsig: str = "BssbbbbF",
    ) -> str:
        """Consume, as py-amqp's; deliveries that arrive together with `ConsumeOk` find their callback."""
        if nowait and not consumer_tag:
            raise ValueError("Consumer tag must be specified when nowait is True")
        is_bounded = self.deliveries.prefetch_count and not no_ack
        known = self._calls.link.declared
        can_pause = not (is_bounded or exclusive) and queue in known.lasting
        is_stream = "x-stream-offset" in (arguments or {}) or queue in known.streams
        is_known = is_stream or not is_bounded or queue in known.lasting
        ask = None if is_known else partial(probe, self._session, queue)

        def register(_sig: object, tag: str) -> None:
            again = (0, queue, tag, no_local, no_ack, exclusive, True, arguments)
            taker, args = taker_of(self, callback), again if can_pause else None
            consumer = ChannelConsumer(taker, no_ack, on_cancel, args, is_stream, ask)
            self.deliveries.start(tag, consumer)

        def undo(sig: object, tag: str) -> None:
            register(sig, tag)  # what still comes is settled as its queue wants it
            self.deliveries.undo_consume(tag)

        self._session.note_consumer()
        args = (0, queue, consumer_tag, no_local, no_ack, exclusive, nowait, arguments)
        self.send_method(spec.Basic.Consume, argsig, args)
        if nowait:
            register(None, consumer_tag)
            return consumer_tag
        return str(self.wait(spec.Basic.ConsumeOk, callback=register, undo=undo))

    def basic_cancel(self, consumer_tag: str, nowait: bool = False, argsig: str = "sb") -> Any:
        """Stop a consumer: what it was sent and has not started goes back to the queue at once."""
        if self._calls.is_over or self.deliveries.consumers.was_announced(consumer_tag):
            return None  # the broker has stopped it
        self.send_method(spec.Basic.Cancel, argsig, (consumer_tag, nowait))
        self.deliveries.stop(consumer_tag)
        return None if nowait else self.wait(spec.Basic.CancelOk, self.deliveries.note_end)

    def basic_get(self, queue: str = "", no_ack: bool = False, argsig: str = "Bsb") -> Any:
        """Take one message, as py-amqp's."""

        def register(sig: Sig, *args: Any) -> None:
            if sig == spec.Basic.GetOk and not no_ack:
                self.deliveries.hold(args[0])

        def undo(sig: Sig, *args: Any) -> None:
            register(sig, *args)
            if sig == spec.Basic.GetOk and not no_ack:
                self.deliveries.give_back(args[0])

        self.send_method(spec.Basic.Get, argsig, (0, queue, no_ack))
        methods, epoch = [spec.Basic.GetOk, spec.Basic.GetEmpty], self.epoch
        found = self.wait(methods, callback=register, returns_tuple=True, undo=undo)
        if epoch != self.epoch:  # closed in the same read: the message is the broker's again
            raise RecoverableConnectionError("the channel was closed")
        return self._on_get_ok(*found) if len(found) > 1 else None

    def message_to_python(self, raw_message: Any) -> Any:
        """Make a delivery a `Message`; one that is a message already stays as it is."""
        if type(raw_message) is tuple:
            return message_of(self, raw_message, self.Message)
        if isinstance(raw_message, base.Message):
            return raw_message
        return self.Message(raw_message, channel=self)

    # -- settling ---------------------------------------------------------------------------------------

    def basic_ack(self, delivery_tag: int, multiple: bool = False, argsig: str = "Lb") -> None:
        """Acknowledge; sent at the hub's next turn, merged with its neighbours. Never switches."""
        if multiple or not self.deliveries.settle(delivery_tag, ACK):
            super().basic_ack(delivery_tag, multiple, argsig)
        if multiple:
            self.deliveries.settled_up_to(delivery_tag)

    def basic_reject(self, delivery_tag: int, requeue: bool, argsig: str = "Lb") -> None:
        """Reject; sent as `basic_ack` is. Never switches."""
        if not self.deliveries.settle(delivery_tag, REQUEUE if requeue else REJECT):
            super().basic_reject(delivery_tag, requeue, argsig)

    def basic_recover(self, requeue: bool = False) -> None:
        """Have the broker take back everything that is not settled."""
        self.send_method(spec.Basic.Recover, "b", (requeue,))
        self.deliveries.recover()
        self._calls.expect(spec.Basic.RecoverOk, self.deliveries.recovered)

    def holds(self, epoch: int) -> bool:
        """Return whether messages of this life of the channel can still be settled."""
        return self.deliveries.holds(epoch)

    # -- publishing -------------------------------------------------------------------------------------

    def _basic_publish(
        self,
        msg: amqp.Message,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        *,
        confirmed: bool = False,
    ) -> None:
        """Publish; wait only while the broker blocks, or `HIGH_WATER` is unsent.

        Args:
            msg: An `amqp.Message`.
            exchange: Its exchange, by name.
            routing_key: Its routing key.
            mandatory: Have the broker return it where no queue is bound for it.
            immediate: As AMQP 0-9-1; RabbitMQ refuses it.
            timeout: Seconds to wait at the most; None: for as long as the broker blocks.
            confirm_timeout: Seconds to wait for a confirm; None: `timeout`.
            confirmed: Wait for its confirm, as `basic_publish_confirm` does.
        """
        address = exchange, routing_key, mandatory, immediate
        self.publisher.publish_plain(msg, address, timeout, confirmed, confirm_timeout or timeout)

    basic_publish = _basic_publish

    def basic_publish_confirm(self, *args: Any, **kwargs: Any) -> None:
        """Publish as `basic_publish`, and wait for the confirm of this very message, by its delivery tag.

        Raises:
            MessageNacked: The broker could not take it.
            amqp.exceptions.ChannelError: It was mandatory and came back, and nobody listens for returns.
            TimeoutError: No confirm in time: it may or may not have arrived.

        Switches: yes. Any number of greenlets at once.
        """
        self._basic_publish(*args, confirmed=True, **kwargs)

    def confirm_select(self, nowait: bool = False) -> Any:
        """Put the channel into confirm mode; its publishes are counted from here."""
        self.publisher.select(nowait)
        return None if nowait else self.wait(spec.Confirm.SelectOk)
