"""Owns what one channel of a green link consumes: which consumers take it, and how it is settled.

A delivery goes to the session's inbox, or back where nobody wants it; it is settled once, in the life of the
channel that it came in (law 4). Called by the reader, by the channel, and by messages; never switches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gevent
from amqp import spec
from amqp.exceptions import RecoverableConnectionError
from amqp.serialization import dumps

from greenconsume.amqp.calls import Calls, Life
from greenconsume.amqp.consumers import ChannelConsumer, ConsumeArgs, Consumers, stand_in_of
from greenconsume.amqp.frames import Delivery
from greenconsume.amqp.inbox import Inbox
from greenconsume.amqp.ledger import ACK, GIVE_BACK, Ledger, encode
from greenconsume.amqp.stream_probe import OFFSET
from greenconsume.events import StaleSettle, emit

#: An enum's member takes longer to look up, and this is looked at for every message.
_OPEN = Life.OPEN


class Deliveries:
    """The deliveries of one channel, from the reader to their settle.

    Attributes:
        consumers: Its consumers.
        epoch: Counts the lives of the channel, and its recovers; a message belongs to one of them.
        has_settles: True if `flush` has something to send; the link's writer then calls it.
        prefetch_count: How many unsettled deliveries a consumer that is started next may have.
        stale_count: How many messages were settled after their channel was gone.
    """

    __slots__ = (
        "_calls",
        "_inbox",
        "_ledger",
        "_recovering",
        "_streamed",
        "consumers",
        "epoch",
        "has_settles",
        "prefetch_count",
        "stale_count",
    )

    def __init__(self, calls: Calls, inbox: Inbox) -> None:
        self.consumers = Consumers()
        self.epoch = self.stale_count = self.prefetch_count = 0
        self.has_settles = False
        self._calls = calls
        self._inbox = inbox
        self._ledger = Ledger()
        self._streamed: set[int] | None = None  # what came from a stream, and is not settled
        self._recovering = 0  # what comes before so many RecoverOks is the broker's again

    # -- arriving -------------------------------------------------------------------------------------

    def take(self, delivery: Delivery) -> None:
        """Take a delivery from the reader: into the inbox, or back where nobody wants it."""
        if self._calls.life is not _OPEN:
            return
        consumer = self.consumers.running.get(delivery[0])
        if consumer is None:
            self._take_late(delivery)
            return
        if not consumer.no_ack:
            if self._recovering:
                return
            self._ledger.deliver(delivery[1])
            if consumer.is_stream:
                self._note_stream(delivery[1])
            elif consumer.ask is not None and self._is_held(delivery, consumer):
                return
            screen = self._inbox.screen
            if delivery[2] and screen is not None and screen(delivery):
                return
        self._inbox.put(self, delivery, consumer.callback)
        if consumer.consume_args is not None and self._inbox.is_crowded and consumer.can_pause:
            self._pause(delivery[0], consumer)

    def _is_held(self, delivery: Delivery, consumer: ChannelConsumer) -> bool:
        """Return whether a delivery has to wait until it is known if it comes from a stream."""
        if consumer.held is None:
            if OFFSET not in delivery[5]:
                consumer.learn(False)
                return False
            consumer.held = []
            asking = gevent.spawn(self._ask, delivery[0], consumer, self._calls.lives)
            asking.name = f"asks of {delivery[0]}"
        consumer.held.append(delivery)
        return True

    def _ask(self, tag: str, consumer: ChannelConsumer, lives: int) -> None:
        try:
            is_stream = consumer.ask is not None and consumer.ask()
        except TimeoutError as exc:  # as itself it would say that no message came
            self._put_failure(RecoverableConnectionError(str(exc)), lives)
            return
        except Exception as exc:  # a stop or a lost link, too
            self._put_failure(exc, lives)
            return
        held = consumer.learn(is_stream)
        self.consumers.forget_stopped(tag)
        if lives != self._calls.lives:
            return  # the broker's again
        if is_stream:
            self.consumers.keep_streamed(tag, consumer)
        runs, screen = self.consumers.running.get(tag) is consumer, self._inbox.screen
        for delivery in held:
            if is_stream:
                self._note_stream(delivery[1])
            if not runs:
                self.give_back(delivery[1])
            elif not (delivery[2] and screen is not None and screen(delivery)):
                self._inbox.put(self, delivery, consumer.callback)

    def _put_failure(self, error: BaseException, lives: int) -> None:
        """Have an error raised that left messages held: they are the broker's as the channel closes."""
        if lives == self._calls.lives:
            self.put_error(error)

    def _take_late(self, delivery: Delivery) -> None:
        """Take what was sent to a stand-in, or to a consumer that has stopped."""
        tag = self.consumers.stood_in_for(delivery[0])
        if tag is None:
            self._refuse(delivery)
            return
        if self._recovering:
            return
        self.hold(delivery[1])
        consumer = self.consumers.running.get(tag)
        if consumer is None:
            self.give_back(delivery[1])
            return
        callback = self._acking(consumer.callback) if consumer.no_ack else consumer.callback
        self._inbox.put(self, (tag, *delivery[1:]), callback)

    def _acking(self, callback: Callable[[Delivery], object]) -> Callable[[Delivery], object]:
        """Return what takes a stand-in's delivery where the consumer itself wants no acks."""
        epoch = self.epoch

        def take(delivery: Delivery) -> None:
            if epoch == self.epoch:  # else it is the broker's again, and comes once more
                self.settle(delivery[1], ACK)
                callback(delivery)

        return take

    def _refuse(self, delivery: Delivery) -> None:
        if self._recovering or not self.consumers.needs_settle(delivery[0]):
            return
        self.hold(delivery[1])
        unsure = self.consumers.unsure(delivery[0])
        if unsure is not None and self._is_held(delivery, unsure):
            return  # a stream would close the link for a nack
        if delivery[0] in self.consumers.stream_tags:
            self._note_stream(delivery[1])
        self.give_back(delivery[1])

    def _note_stream(self, delivery_tag: int) -> None:
        if self._streamed is None:
            self._streamed = set()
        self._streamed.add(delivery_tag)

    def is_of_stream(self, delivery_tag: int) -> bool:
        """Return whether an unsettled delivery came from a stream."""
        return self._streamed is not None and delivery_tag in self._streamed

    def _as_streamed(self, delivery_tag: int, how: int) -> int:
        """Return how a message is settled at the broker: a stream closes the link for all but an ack."""
        if self._streamed is None or delivery_tag not in self._streamed:
            return how
        self._streamed.remove(delivery_tag)
        return ACK

    def hold(self, delivery_tag: int) -> None:
        """Note a message that was fetched, and has to be settled."""
        self._ledger.deliver(delivery_tag)

    def give_back(self, delivery_tag: int) -> None:
        """Return to its queue what nobody has started."""
        if self._calls.link.failure is None:
            self._inbox.count_given_back()
            self._ledger.settle(delivery_tag, self._as_streamed(delivery_tag, GIVE_BACK))
            self._flush_soon()

    def put_error(self, error: BaseException) -> None:
        """Have `error` raised where the session is drained."""
        self._inbox.put(self, error, _raise)

    # -- consumers ------------------------------------------------------------------------------------

    def start(self, consumer_tag: str, consumer: ChannelConsumer) -> None:
        """Note a consumer that the broker has started; whoever drains looks again who consumes."""
        self.consumers.start(consumer_tag, consumer)
        self._inbox.wake()

    def send_prefetch(self, count: int, for_all: bool = False) -> None:
        """Set how many unsettled deliveries a consumer that is started next may have; nobody waits."""
        self._calls.expect(spec.Basic.QosOk, _ignore)
        self._calls.write(spec.Basic.Qos, dumps("lBb", (0, count, for_all)))

    def undo_consume(self, consumer_tag: str) -> None:
        """End a consumer that was started for a caller who has given up."""
        self.stop(consumer_tag)
        self._send_cancel(consumer_tag)

    def note_end(self, _sig: object, consumer_tag: str) -> None:
        """Take `CancelOk`: nothing more comes for a consumer that was stopped."""
        self.consumers.forget_stopped(consumer_tag)

    def stop(self, consumer_tag: str) -> None:
        """Forget a consumer, and give its undispatched messages back."""
        self._cancel_stand_in(consumer_tag)
        self.consumers.stop(consumer_tag)
        self._inbox.forget_paused(self, consumer_tag)

        def undispatched(delivery: Delivery) -> bool:
            return delivery[0] == consumer_tag and self._can_go_back(delivery)

        for delivery in self._inbox.take_back(self, undispatched):
            self.give_back(delivery[1])

    def announce_stop(self) -> None:
        """Tell the broker to send no more; give back what was not started.

        In this order: the broker sends what it gets back to whoever still consumes.
        """
        tags = self.consumers.announce()
        for tag in tags:
            self._send_cancel(tag)
            self._cancel_stand_in(tag)
        for tag in tags:
            self.stop(tag)

    def _cancel_stand_in(self, consumer_tag: str) -> None:
        consumer = self.consumers.running.get(consumer_tag)
        if consumer is not None and consumer.end_stand_in():
            self._send_cancel(stand_in_of(consumer_tag))

    def cancelled(self, consumer_tag: str) -> bool:
        """Take the broker's cancel of a consumer; return whether its `on_cancel` will be called."""
        consumer_tag = self.consumers.stood_in_for(consumer_tag) or consumer_tag
        consumer = self.consumers.stop(consumer_tag)
        self.consumers.forget_stopped(consumer_tag)
        self._inbox.forget_paused(self, consumer_tag)
        if consumer is None or consumer.on_cancel is None:
            return False
        self._inbox.put(self, consumer_tag, consumer.on_cancel)
        return True

    def _pause(self, consumer_tag: str, consumer: ChannelConsumer) -> None:
        # Nothing else bounds what the broker sends to such a consumer, and the link is not only its own. Its
        # stand-in is sent one message at a time: a queue without any consumer may expire, by a policy that
        # nobody here can know.
        self._inbox.pause(self, consumer_tag, partial(self._resume, consumer_tag, consumer))
        self.consumers.stand_in(consumer_tag)
        self.send_prefetch(1)
        self._send_consume(consumer.pause())
        self.send_prefetch(self.prefetch_count)
        self._send_cancel(consumer_tag)

    def _resume(self, consumer_tag: str, consumer: ChannelConsumer) -> None:
        if self._calls.link.failure is None:
            self._send_consume(consumer.resume())
            self._send_cancel(stand_in_of(consumer_tag))

    def _send_consume(self, args: ConsumeArgs) -> None:
        self._calls.write(spec.Basic.Consume, dumps("BssbbbbF", args))

    def _send_cancel(self, consumer_tag: str) -> None:
        if self._calls.link.failure is None:
            self._calls.write(spec.Basic.Cancel, dumps("sb", (consumer_tag, True)))

    def _can_go_back(self, delivery: Delivery) -> bool:
        return self.consumers.needs_settle(delivery[0])

    # -- settling ---------------------------------------------------------------------------------------

    def settle(self, delivery_tag: int, how: int) -> bool:
        """Note a settle, to be sent at the hub's next turn; return False if it must go the long way."""
        calls = self._calls
        if calls.life is not _OPEN or calls.untold is not None:
            return False  # said the long way, which raises why it cannot
        if self._streamed is not None:
            how = self._as_streamed(delivery_tag, how)
        if not self._ledger.settle(delivery_tag, how):
            return False
        if not self.has_settles:
            self._flush_soon()
        return True

    def _flush_soon(self) -> None:
        if not self.has_settles:
            self.has_settles = True
            self._calls.link.flush_soon(self)

    def flush(self) -> None:
        """Queue the settles that were made since the last time, merged."""
        self.has_settles = False
        if self._ledger.pending and self._calls.link.failure is None:
            channel_id = self._calls.channel_id
            self._calls.link.write([encode(channel_id, each) for each in self._ledger.flush()])

    def settled_up_to(self, delivery_tag: int) -> None:
        """Note that the user settled everything up to this tag (0: all there is) by himself."""
        self._ledger.forget_up_to(delivery_tag)

    def recover(self) -> None:
        """Forget what is not settled: the broker was asked to take it all back.

        Settling what is in hand does nothing from now on but count.
        """
        self._recovering += 1
        self._forget()

    def recovered(self, _sig: object) -> None:
        """Take `RecoverOk`: what comes from now on was sent after it."""
        self._recovering -= 1

    def end(self) -> None:
        """End this life of the channel: what was not dispatched or settled is the broker's again."""
        self._forget()
        self._inbox.forget_paused(self)
        self.consumers.clear()
        self._recovering = 0

    def _forget(self) -> None:
        self.epoch += 1
        self.consumers.forget_held()
        self._inbox.take_back(self, self._can_go_back)
        self._ledger.clear()
        self._streamed = None

    @property
    def unsettled_count(self) -> int:
        """The number of deliveries that are not settled."""
        return len(self._ledger)

    @property
    def oldest_unsettled(self) -> tuple[int, float] | None:
        """The delivery tag that has been unsettled for longest, and when it came (`time.monotonic`)."""
        return self._ledger.oldest

    def holds(self, epoch: int) -> bool:
        """Return whether messages of this life of the channel can still be settled."""
        return epoch == self.epoch and self._calls.link.failure is None

    def count_stale(self, delivery_tag: int) -> None:
        """Count a settle that came after its channel was gone."""
        self.stale_count += 1
        emit(StaleSettle(delivery_tag, self.stale_count))


def _ignore(*_reply: object) -> None:
    """Take a reply that nobody waits for."""


def _raise(error: BaseException) -> None:
    raise error
