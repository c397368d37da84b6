"""Owns what a channel of a green link consumes: its consumers, their deliveries, their settling.

Deliveries go to the session's inbox, from where `drain_events` hands them to the callbacks. A message is
settled once, on the channel and in the life of the channel that it came from (law 4).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import amqp
from amqp import spec
from amqp.exceptions import ConsumerCancelled, RecoverableConnectionError
from amqp.serialization import dumps
from kombu import Consumer
from kombu.transport import base, pyamqp

from greenconsume.amqp.confirms import PublishingChannel
from greenconsume.amqp.frames import Delivery, decode_content
from greenconsume.amqp.ledger import ACK, REJECT, REQUEUE, Ledger, encode
from greenconsume.amqp.replies import Reply
from greenconsume.events import StaleSettle, emit


class Message(pyamqp.Message):  # type: ignore[misc]  # kombu is untyped
    """A received message, settled once and only on the channel that it came from.

    Settling it after that channel was closed or its link lost does nothing but count: the broker has
    requeued it already, and its delivery tag now means another message, or none.
    """

    __slots__ = ("epoch", "errors")
    _state: Any

    def __init__(self, msg: amqp.Message, channel: Channel, **kwargs: Any) -> None:
        undecodable = getattr(msg, "undecodable", None)
        self.errors: list[Any] = [undecodable] if undecodable else []
        super().__init__(msg, channel=channel, **kwargs)
        self.epoch = channel.epoch

    def ack(self, multiple: bool = False) -> None:
        """As `kombu.Message.ack`. Never switches."""
        if not multiple and self._state == "RECEIVED" and self._settled_at_once():
            self._state = "ACK"
        elif not self._settled_stale("ACK"):
            super().ack(multiple=multiple)

    def reject(self, requeue: bool = False) -> None:
        """As `kombu.Message.reject`. Never switches."""
        if not self._settled_stale("REJECTED"):
            super().reject(requeue=requeue)

    def requeue(self) -> None:
        """As `kombu.Message.requeue`. Never switches."""
        if not self._settled_stale("REQUEUED"):
            super().requeue()

    def _settled_at_once(self) -> bool:
        channel = self.channel
        if channel is None or self.epoch != channel.epoch:
            return False
        return bool(channel.settle(self.delivery_tag, ACK))

    def _settled_stale(self, state: str) -> bool:
        if self.channel is None or self.channel.holds(self.epoch) or self.acknowledged:
            return False
        self._state = state
        self.channel.count_stale(self.delivery_tag)
        return True


class Channel(PublishingChannel):
    """A whole channel, in the place of py-amqp's.

    Attributes:
        stale_count: How many messages were settled after their channel was gone.
    """

    Message = Message

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stale_count = 0
        self._consuming: set[str] = set()
        self._announced: set[str] = set()  # the broker was told already that these end
        self.prefetch_count = 0
        self._pausable: dict[str, bytes] = {}  # tag -> the arguments that consume again
        self._ledger = Ledger()
        self._flushing = False
        self._recovering = 0  # what comes before so many RecoverOks is the broker's again
        super().__init__(*args, **kwargs)

    @property
    def _is_consuming(self) -> bool:
        return bool(self._consuming)

    def _end_epoch(self) -> None:
        self._session.inbox.take_back(self, self._can_go_back)
        super()._end_epoch()
        self._session.inbox.forget_paused(self)
        self._recovering = 0
        self.callbacks.clear()
        self.cancel_callbacks.clear()
        self._consuming.clear()
        self._announced.clear()
        self._pausable.clear()
        self._ledger.clear()

    # -- consuming ------------------------------------------------------------------------------------

    def basic_consume(
        self,
        queue: str = "",
        consumer_tag: str = "",
        no_local: bool = False,
        no_ack: bool = False,
        exclusive: bool = False,
        nowait: bool = False,
        callback: Callable[[Any], object] | None = None,
        arguments: dict[str, Any] | None = None,
        on_cancel: Callable[[str], object] | None = None,
        argsig: str = "BssbbbbF",
    ) -> str:
        """As py-amqp's; deliveries that arrive together with `ConsumeOk` find their callback."""
        if nowait and not consumer_tag:
            raise ValueError("Consumer tag must be specified when nowait is True")

        def register(_sig: Any, tag: str) -> None:
            self.callbacks[tag] = self._taker_of(callback)
            self._consuming.add(tag)
            self._announced.discard(tag)
            if on_cancel:
                self.cancel_callbacks[tag] = on_cancel
            change = self.no_ack_consumers.add if no_ack else self.no_ack_consumers.discard
            change(tag)
            unbounded = no_ack or not self.prefetch_count
            if unbounded and not exclusive and queue in self._session.lasting_queues:
                again = (0, queue, tag, no_local, no_ack, exclusive, True, arguments)
                self._pausable[tag] = dumps(argsig, again)

        args = (0, queue, consumer_tag, no_local, no_ack, exclusive, nowait, arguments)
        self.send_method(spec.Basic.Consume, argsig, args)
        if nowait:
            register(None, consumer_tag)
            return consumer_tag
        undo = partial(self._unconsume, no_ack)
        return str(self.wait(spec.Basic.ConsumeOk, callback=register, undo=undo))

    def _unconsume(self, no_ack: bool, _sig: Any, tag: str) -> None:
        if no_ack:
            self.no_ack_consumers.add(tag)  # what still comes is settled already
        self.stop_dispatching(tag)
        self._send_cancel(tag)

    def queue_declare(self, queue: str = "", *args: Any, **kwargs: Any) -> Any:
        """As py-amqp's. Remembers which queues a consumer may be paused on, and finds as it left them."""
        declared = super().queue_declare(queue, *args, **kwargs)
        arguments = kwargs.get("arguments") or {}
        fleeting = kwargs.get("auto_delete", True) or "x-expires" in arguments
        handed_on = "x-single-active-consumer" in arguments  # to another, with messages still here
        if not (fleeting or handed_on or kwargs.get("passive")):
            self._session.lasting_queues.add(queue)
        return declared

    def basic_qos(self, prefetch_size: int, prefetch_count: int, a_global: bool) -> Any:
        """As py-amqp's; `prefetch_count` holds for the consumers that are started after it."""
        self.prefetch_count = prefetch_count
        return super().basic_qos(prefetch_size, prefetch_count, a_global)

    def _pause(self, consumer_tag: str) -> None:
        # Nothing else bounds what the broker sends to such a consumer, and the link is not only its own.
        args = self._pausable.pop(consumer_tag)
        self._session.inbox.pause(self, consumer_tag, partial(self.resume, consumer_tag, args))
        self._send_cancel(consumer_tag)

    def _send_cancel(self, consumer_tag: str) -> None:
        if self._link.failure is None:
            self._link._write_method(
                self.channel_id, spec.Basic.Cancel, dumps("sb", (consumer_tag, True))
            )

    def resume(self, consumer_tag: str, args: bytes) -> None:
        """Consume again with a consumer that was paused, unless it was stopped since. Never switches."""
        if consumer_tag in self._consuming and self._link.failure is None:
            self._pausable[consumer_tag] = args
            self._link._write_method(self.channel_id, spec.Basic.Consume, args)

    def basic_cancel(self, consumer_tag: str, nowait: bool = False, argsig: str = "sb") -> Any:
        """Stop a consumer: what it was sent and has not started goes back to the queue at once."""
        if self.connection is None or self.is_closing or consumer_tag in self._announced:
            return None
        self.send_method(spec.Basic.Cancel, argsig, (consumer_tag, nowait))
        self.stop_dispatching(consumer_tag)
        return None if nowait else self.wait(spec.Basic.CancelOk)

    def announce_stop(self) -> None:
        """Tell the broker to send no more, without waiting; give back what was not started.

        In this order: the broker sends what it gets back to whoever still consumes.
        """
        tags = list(self._consuming)
        self._announced.update(tags)
        for tag in tags:
            self._send_cancel(tag)
        for tag in tags:
            self.stop_dispatching(tag)

    def stop_dispatching(self, consumer_tag: str) -> None:
        """Forget a consumer's callback and give its undispatched messages back. Never switches."""
        self._remove_tag(consumer_tag)
        self._consuming.discard(consumer_tag)
        self._pausable.pop(consumer_tag, None)
        self._session.inbox.forget_paused(self, consumer_tag)

        def undispatched(delivery: Delivery) -> bool:
            return self._can_go_back(delivery) and delivery[0] == consumer_tag

        for delivery in self._session.inbox.take_back(self, undispatched):
            self._give_back(delivery[1])

    def _remove_tag(self, consumer_tag: str) -> Any:
        # no_ack_consumers keeps it: messages in hand that the broker has acked are still handled.
        self.callbacks.pop(consumer_tag, None)
        return self.cancel_callbacks.pop(consumer_tag, None)

    def _can_go_back(self, delivery: Delivery) -> bool:
        return delivery[0] not in self.no_ack_consumers

    def _give_back(self, delivery_tag: int) -> None:
        if self._link.failure is None:
            self._session.inbox.count_given_back()
            self._ledger.settle(delivery_tag, REQUEUE)
            self._link.flush_soon(self)

    def on_delivery(self, delivery: Delivery) -> None:
        """Take a delivery from the reader: into the session's inbox, or back where nobody wants it."""
        if not self.is_open:
            return
        consumer_tag = delivery[0]
        wants_settle = consumer_tag not in self.no_ack_consumers
        if wants_settle:
            if self._recovering:
                return
            self._ledger.deliver(delivery[1])
        callback = self.callbacks.get(consumer_tag)
        if callback is not None:
            self._session.inbox.put(self, delivery, callback)
            if consumer_tag in self._pausable and self._session.inbox.is_crowded:
                self._pause(consumer_tag)
        elif wants_settle:
            self._give_back(delivery[1])

    def _on_basic_deliver(self, *args: Any) -> None:
        *fields, msg = args
        self.on_delivery((*fields, msg.encoded, msg.body or b""))

    def _taker_of(self, callback: Any) -> Any:
        """Return what takes a `Delivery`: kombu's consumers and ours do, a user's callback does not."""
        takes = getattr(callback, "takes_deliveries", False)
        if takes or getattr(callback, "__func__", None) is Consumer._receive_callback:
            return callback
        return lambda delivery: callback(_raw_message(self, delivery))

    def _on_basic_cancel(self, consumer_tag: str) -> None:
        callback = self._remove_tag(consumer_tag)
        if callback is not None:
            self._session.inbox.put(self, consumer_tag, callback)
        else:
            text = f"the broker cancelled consumer {consumer_tag!r}: its queue was deleted or moved"
            self._tell(ConsumerCancelled(text, spec.Basic.Cancel))
        self._consuming.discard(consumer_tag)

    def _on_basic_cancel_ok(self, consumer_tag: str) -> None:
        """Nothing is left to do. `no_ack_consumers` keeps it for its messages that are in hand."""

    def message_to_python(self, raw_message: Any) -> Any:
        """Make a delivery a `Message`; one that is a message already stays as it is."""
        if type(raw_message) is tuple:
            return _message(self, raw_message)
        if isinstance(raw_message, base.Message):
            return raw_message
        return self.Message(raw_message, channel=self)

    # -- settling ---------------------------------------------------------------------------------------

    def basic_ack(self, delivery_tag: int, multiple: bool = False, argsig: str = "Lb") -> None:
        """Acknowledge; sent at the hub's next turn, merged with its neighbours. Never switches."""
        if multiple or not self.settle(delivery_tag, ACK):
            super().basic_ack(delivery_tag, multiple, argsig)
        if multiple:
            self._ledger.forget_up_to(delivery_tag)

    def basic_reject(self, delivery_tag: int, requeue: bool, argsig: str = "Lb") -> None:
        """Reject; sent as `basic_ack` is. Never switches."""
        if not self.settle(delivery_tag, REQUEUE if requeue else REJECT):
            super().basic_reject(delivery_tag, requeue, argsig)

    def settle(self, delivery_tag: int, how: int) -> bool:
        """Note a settle, to be sent at the hub's next turn; return False if it must go the long way."""
        if self.connection is None or self._link.failure is not None or self._error is not None:
            return False  # said the long way, which raises why it cannot
        if not self._ledger.settle(delivery_tag, how):
            return False
        if not self._flushing:
            self._flushing = True
            self._link.flush_soon(self)
        return True

    def flush(self) -> None:
        """Queue the settles that were made since the last time, merged. Never switches."""
        self._flushing = False
        if self._ledger.pending and self._link.failure is None:
            settles = self._ledger.flush()
            self._link.write([encode(self.channel_id, settle) for settle in settles])

    def basic_recover(self, requeue: bool = False) -> Any:
        """As py-amqp's: the broker takes back everything that is not settled."""
        self.send_method(spec.Basic.Recover, "b", (requeue,))
        self._recovering += 1
        self._session.inbox.take_back(self, self._can_go_back)
        self._ledger.clear()
        self.epoch += 1  # settling what is in hand does nothing but count

        def recovered(_sig: Any) -> None:
            self._recovering -= 1

        self._replies.append(Reply((spec.Basic.RecoverOk,), recovered))

    def basic_get(self, queue: str = "", no_ack: bool = False, argsig: str = "Bsb") -> Any:
        """As py-amqp's."""

        def register(sig: tuple[int, int], *args: Any) -> None:
            if sig == spec.Basic.GetOk and not no_ack:
                self._ledger.deliver(args[0])

        def undo(sig: tuple[int, int], *args: Any) -> None:
            register(sig, *args)
            if sig == spec.Basic.GetOk and not no_ack:
                self._give_back(args[0])

        self.send_method(spec.Basic.Get, argsig, (0, queue, no_ack))
        methods = [spec.Basic.GetOk, spec.Basic.GetEmpty]
        epoch = self.epoch
        found = self.wait(methods, callback=register, returns_tuple=True, undo=undo)
        if epoch != self.epoch:  # closed in the same read: the message is the broker's again
            raise RecoverableConnectionError("the channel was closed")
        return self._on_get_ok(*found) if len(found) > 1 else None

    @property
    def unsettled_count(self) -> int:
        """How many deliveries are not settled."""
        return len(self._ledger)

    @property
    def oldest_unsettled(self) -> tuple[int, float] | None:
        """The delivery tag that has been unsettled for longest, and when it came (`time.monotonic`)."""
        return self._ledger.oldest

    def holds(self, epoch: int) -> bool:
        """Whether messages of this life of the channel can still be settled."""
        return epoch == self.epoch and self._link.failure is None

    def count_stale(self, delivery_tag: int) -> None:
        """Count a settle that came after its channel was gone."""
        self.stale_count += 1
        emit(StaleSettle(delivery_tag, self.stale_count))


def _message(channel: Channel, delivery: Delivery) -> Message:
    """Return the delivery as kombu's message; what `Message.__init__` does, for the plain case."""
    consumer_tag, delivery_tag, redelivered, exchange, routing_key, properties, body = delivery
    errors: list[Any] = []
    if type(properties) is bytes:
        try:
            properties, body = decode_content(properties, body)
        except (
            Exception
        ):  # a publisher's fault, such as a date in the year 55000, is told as kombu does
            properties, errors = {}, [sys.exc_info()]
    headers = properties.get("application_headers") or {}
    if "compression" in headers or channel.Message is not Message:
        raw = _raw_message(channel, (*delivery[:5], properties, body))
        message: Message = channel.Message(raw, channel=channel)
        return message
    message = Message.__new__(Message)
    message.epoch = channel.epoch
    message.errors = errors
    message.channel = channel
    message.delivery_tag = delivery_tag
    message.content_type = properties.get("content_type")
    message.content_encoding = properties.get("content_encoding")
    message.delivery_info = {
        "consumer_tag": consumer_tag,
        "delivery_tag": delivery_tag,
        "redelivered": redelivered,
        "exchange": exchange,
        "routing_key": routing_key,
    }
    message.headers = headers
    message.properties = properties
    message.body = body
    message.accept = message._decoded_cache = None
    message._state = "RECEIVED"
    return message


def _raw_message(channel: Channel, delivery: Delivery) -> amqp.Message:
    """Return the delivery as py-amqp hands it to the callbacks of its own `basic_consume`."""
    consumer_tag, delivery_tag, redelivered, exchange, routing_key, properties, body = delivery
    if type(properties) is bytes:
        properties, body = decode_content(properties, body)
    message = amqp.Message(body, channel=channel)
    message.properties = properties
    message.delivery_info = {
        "consumer_tag": consumer_tag,
        "delivery_tag": delivery_tag,
        "redelivered": redelivered,
        "exchange": exchange,
        "routing_key": routing_key,
    }
    return message
