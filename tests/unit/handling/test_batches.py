"""Batches over memory: when they are handed over, how they are settled, and what they do not go with."""

from __future__ import annotations

import gc
import json
import logging
import socket
import weakref
from contextlib import contextmanager
from time import monotonic
from uuid import uuid4

import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Consumer, Producer, Queue, serialization
from kombu import mixins as kombu_mixins
from kombu.exceptions import DecodeError
from kombu.utils.limits import TokenBucket

from greenconsume import Batch, ConsumerMixin, Reject, Requeue, spawn
from greenconsume.consuming.engine import ensure_engine, ensure_lifecycle
from greenconsume.errors import HandlerTimeout, InvalidConsumerError, Shutdown
from greenconsume.events import (
    ConsumerDrained,
    HandlerFailed,
    HandlerInterrupted,
    KillSwitchReset,
    KillSwitchTripped,
    LinkDown,
    PrefetchTooSmall,
    StaleSettle,
)
from greenconsume.handling.batches import Batching
from greenconsume.handling.declaring import UNSET
from greenconsume.handling.kill_switch import KillSwitch
from greenconsume.handling.options import ConsumerOptions
from greenconsume.lifecycle import Lifecycle
from greenconsume.transports import registry
from tests.options import say, settings_of
from tests.unit.fakes import of_type, recording
from tests.waiting import AT_ONCE, NEVER, wait_until


class Gatherer(ConsumerMixin):
    """Keeps the bodies of each batch, and acks it; `handle` is called with the batch before."""

    options = ConsumerOptions(batch_size=3, batch_timeout=NEVER, on_error=Requeue(0.01))

    def __init__(self, handle=None, consumer=None, **options):
        self.connection = Connection("memory://localhost")
        self.queue = Queue(f"q-{uuid4().hex[:10]}")
        self.handle = handle
        self.consumer_options = consumer or {}
        self.batches = []
        say(self, **options)

    def get_consumers(self, Consumer, channel):
        return [Consumer([self.queue], callbacks=[self.on_batch], **self.consumer_options)]

    def on_batch(self, batch):
        self.batches.append([body for body, _ in batch])
        if self.handle is not None:
            self.handle(batch)
        if not self.options.value_of("auto_settle"):
            batch.ack()

    def wait_for(self, *batches):
        wait_until(lambda: len(self.batches) >= len(batches))
        assert self.batches == list(batches)


@pytest.fixture(autouse=True)
def registered():
    registry.register()


@pytest.fixture
def channel():
    """A channel of the memory transport, to put messages and to look into queues."""
    with Connection("memory://localhost") as connection:
        yield connection.channel()


@pytest.fixture
def put(channel):
    def put(consumer, *bodies, **options):
        for body in bodies:
            Producer(channel).publish(body, routing_key=consumer.queue.name, **options)

    return put


@pytest.fixture
def depth(channel):
    """Return how many messages wait in a consumer's queue."""
    return lambda consumer: channel._size(consumer.queue.name)


@pytest.fixture
def started():
    """Start a consumer in a greenlet; in the end it stops."""
    greenlets = []

    def start(consumer):
        greenlets.append(spawn(consumer))
        assert greenlets[-1].ready.wait(30), greenlets[-1].exception
        return greenlets[-1]

    yield start
    for greenlet in greenlets:
        greenlet.stop()
    for greenlet in greenlets:
        assert greenlet.join(30)


class Gate:
    """A handler that waits until it is let go; says how many are in it."""

    def __init__(self):
        self.opened = Event()
        self.inside = self.most = 0

    def __call__(self, batch):
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            self.opened.wait()
        finally:
            self.inside -= 1


def raising(error):
    def handle(batch):
        raise error

    return handle


def refusal(**options):
    """Return what options that make no sense say."""
    with pytest.raises(InvalidConsumerError) as refused:
        Gatherer(**options)
    return str(refused.value)


def refusal_of(consumer):
    """Return what a consumer that makes no sense says when it is run."""
    with pytest.raises(InvalidConsumerError) as refused:
        consumer.run()
    return str(refused.value)


# -- a batch ------------------------------------------------------------------------------------------


def received(channel, *bodies, no_ack=False):
    """A batch of messages that came over memory, and their queue."""
    queue, got = Queue(f"q-{uuid4().hex[:8]}"), []
    consumer = Consumer(channel, [queue], no_ack=no_ack)
    consumer.register_callback(lambda body, message: got.append((body, message)))
    consumer.consume()
    for body in bodies:
        Producer(channel).publish(body, routing_key=queue.name)
        channel.connection.client.drain_events(timeout=30)
    consumer.cancel()
    return Batch(got), queue


def test_a_batch_reads_as_a_list_of_pairs(channel):
    batch, _ = received(channel, "a", "b", "c")
    assert [body for body, _ in batch] == ["a", "b", "c"]
    assert [message.payload for _, message in batch] == ["a", "b", "c"]
    assert len(batch) == 3
    assert batch[-1] == list(batch)[2]
    assert batch[:2] == list(batch)[:2]
    assert batch[1] in batch


def test_the_log_sees_no_body_of_a_batch(channel):
    batch, _ = received(channel, "secret", "secret")
    assert repr(batch) == "<Batch of 2 messages>"


@pytest.mark.parametrize(("settle", "left"), [("ack", 0), ("reject", 0), ("requeue", 3)])
def test_a_batch_is_settled_as_one(channel, settle, left):
    batch, queue = received(channel, 1, 2, 3)
    getattr(batch, settle)()
    assert all(message.acknowledged for _, message in batch)
    assert channel._size(queue.name) == left
    assert batch.unsettled == []


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue"])
def test_what_is_settled_already_is_left_alone(channel, settle):
    batch, queue = received(channel, 1, 2, 3)
    batch[0][1].ack()
    batch[2][1].reject()
    assert batch.unsettled == [batch[1][1]]
    getattr(batch, settle)()
    getattr(batch, settle)()  # once more: nothing is left to settle
    assert channel._size(queue.name) == (1 if settle == "requeue" else 0)
    assert batch.unsettled == []


def test_what_was_requeued_as_one_keeps_its_order(channel):
    batch, queue = received(channel, "a", "b", "c")
    batch.requeue()
    got = [queue(channel).get(no_ack=True).payload for _ in range(3)]
    assert got == ["a", "b", "c"]


def test_of_messages_without_acks_nothing_is_settled(channel):
    batch, _ = received(channel, 1, 2, no_ack=True)
    assert batch.unsettled == []
    batch.ack()
    assert not batch[0][1].acknowledged


def test_a_batch_on_amqp_is_acked_in_one_frame(peer, started):
    consumer = over_peer(peer, batch_size=5)
    started(consumer)
    deliver = deliverer(peer)
    for tag in range(1, 6):
        deliver(tag, tag)
    frame = peer.wait_for("basic.ack")
    assert frame.args == [5, True]
    assert consumer.batches == [[1, 2, 3, 4, 5]]


def deliverer(peer, count=1):
    """Return what has a peer deliver to the consumer that was the `count`-th to say basic.consume."""
    consumer_tag = peer.wait_for("basic.consume", count=count).args[2]
    return lambda tag, body: peer.deliver(1, consumer_tag, tag, json.dumps(body).encode())


# -- when it is handed over ----------------------------------------------------------------------------


def test_a_full_batch_is_handed_over_at_once(started, put):
    consumer = Gatherer()
    started(consumer)
    put(consumer, *range(7))
    consumer.wait_for([0, 1, 2], [3, 4, 5])


def test_an_incomplete_batch_is_handed_over_when_its_time_is_up(started, put):
    consumer = Gatherer(batch_timeout=0.05)
    started(consumer)
    began = monotonic()
    put(consumer, 1, 2)
    consumer.wait_for([1, 2])
    assert monotonic() - began > 0.049


def test_the_time_begins_with_the_first_message(started, put):
    consumer = Gatherer(batch_timeout=0.06, batch_size=100)
    started(consumer)
    ended, began = [], monotonic()
    consumer.handle = lambda batch: ended.append(monotonic())
    while not ended:  # the later messages do not put it off
        put(consumer, "next")
        Event().wait(0.02)
    assert 0.059 < ended[0] - began < AT_ONCE
    assert len(consumer.batches[0]) >= 2


def test_a_full_batch_takes_its_timer_with_it(started, put):
    consumer = Gatherer(batch_timeout=0.06)
    ended = []
    consumer.handle = lambda batch: ended.append(monotonic())
    started(consumer)
    put(consumer, 1, 2, 3)
    consumer.wait_for([1, 2, 3])
    Event().wait(0.04)
    began = monotonic()
    put(consumer, 4)
    consumer.wait_for([1, 2, 3], [4])
    assert ended[1] - began > 0.059


def test_without_a_wait_a_batch_is_what_is_at_hand(started, put):
    consumer = Gatherer(batch_timeout=0, batch_size=100)
    gate = consumer.handle = Gate()
    started(consumer)
    put(consumer, "first")
    wait_until(lambda: gate.inside)
    put(consumer, *range(5))  # they come while it runs
    wait_until(lambda: not consumer_depth(consumer))
    gate.opened.set()
    consumer.wait_for(["first"], [0, 1, 2, 3, 4])


def consumer_depth(consumer):
    with Connection("memory://localhost") as connection:
        return connection.channel()._size(consumer.queue.name)


def queued(consumer):
    """Take the bodies that wait in a consumer's queue."""
    with Connection("memory://localhost") as connection:
        queue = consumer.queue(connection.channel())
        return [queue.get(no_ack=True).payload for _ in range(consumer_depth(consumer))]


def test_a_batch_that_waits_for_a_place_goes_on_filling_up_to_its_size(started, put):
    consumer = Gatherer(batch_timeout=0.01, consumer={"prefetch_count": 100})
    gate = consumer.handle = Gate()
    started(consumer)
    put(consumer, 0)
    wait_until(lambda: gate.inside)
    put(consumer, 1)
    Event().wait(0.03)  # its time is up
    put(consumer, 2, 3, 4)
    wait_until(lambda: not consumer_depth(consumer))
    gate.opened.set()
    consumer.wait_for([0], [1, 2, 3], [4])


def test_a_batch_whose_time_is_up_keeps_its_turn(started, put, channel):
    """Also where more messages come in the very moment in which its timer fires."""
    consumer, life = Gatherer(), Lifecycle("in order")
    handled = []
    consumer.on_batch = lambda batch: handled.append([body for body, _ in batch])
    source = Consumer(channel, [consumer.queue], callbacks=[consumer.on_batch])
    batch, _ = received(channel, *range(6))
    batching = Batching(life, settings_of(consumer))
    messages = [message for _, message in batch]
    batching.submit(source, messages[0])
    batching._time_is_up(batching._open[source])
    for message in messages[1:]:
        batching.submit(source, message)
    wait_until(lambda: len(handled) == 2)
    batching.retire()
    assert handled == [[0, 1, 2], [3, 4, 5]]


def test_batches_are_handled_one_after_the_other_unless_told_otherwise(started, put):
    consumer = Gatherer(consumer={"prefetch_count": 100})
    gate = consumer.handle = Gate()
    started(consumer)
    put(consumer, *range(9))
    wait_until(lambda: gate.inside)
    gate.opened.set()
    consumer.wait_for([0, 1, 2], [3, 4, 5], [6, 7, 8])
    assert gate.most == 1


def test_concurrency_counts_batches(started, put):
    consumer = Gatherer(concurrency=2)
    gate = consumer.handle = Gate()
    started(consumer)
    put(consumer, *range(9))
    wait_until(lambda: gate.inside == 2)
    gate.opened.set()
    consumer.wait_for([0, 1, 2], [3, 4, 5], [6, 7, 8])
    assert gate.most == 2


def test_a_batch_runs_off_the_consumers_greenlet(started, put):
    consumer = Gatherer()
    seen = []
    consumer.handle = lambda batch: seen.append(gevent.getcurrent())
    greenlet = started(consumer)
    put(consumer, 1, 2, 3)
    consumer.wait_for([1, 2, 3])
    assert seen[0] is not greenlet


def test_each_kombu_consumer_gathers_its_own(started, put):
    consumer, others = Gatherer(), []
    other = Queue(f"{consumer.queue.name}-other")

    def get_consumers(Consumer, channel):
        return [
            Consumer([consumer.queue], callbacks=[consumer.on_batch]),
            Consumer([other], callbacks=[others.append]),
        ]

    consumer.get_consumers = get_consumers
    started(consumer)
    put(consumer, 1, 2)
    Producer(consumer.connection.clone().channel()).publish("other", routing_key=other.name)
    put(consumer, 3)
    consumer.wait_for([1, 2, 3])
    assert others == []


def test_every_callback_is_given_the_batch(started, put):
    consumer, seen = Gatherer(), []
    consumer.get_consumers = lambda Consumer, channel: [
        Consumer([consumer.queue], callbacks=[seen.append, consumer.on_batch])
    ]
    started(consumer)
    put(consumer, 1, 2, 3)
    consumer.wait_for([1, 2, 3])
    assert [len(batch) for batch in seen] == [3]


def test_a_plain_kombu_mixin_may_have_batches(started, put):
    class Plain(kombu_mixins.ConsumerMixin):
        options = ConsumerOptions(batch_size=2)
        get_consumers = Gatherer.get_consumers

        def __init__(self):
            self.connection = Connection("memory://localhost")
            self.queue = Queue(f"q-{uuid4().hex[:10]}")
            self.consumer_options, self.batches = {}, []

        def on_batch(self, batch):
            self.batches.append(len(batch))
            batch.ack()

    consumer = Plain()
    started(consumer)
    put(consumer, 1, 2)
    wait_until(lambda: consumer.batches == [2])


# -- prefetch -----------------------------------------------------------------------------------------


def prefetch_of(consumer):
    """The prefetch of a consumer's channel while it consumes, and what was said of it."""
    seen = []
    consumer.on_consume_ready = lambda connection, channel, *_, **__: seen.append(channel.qos)
    with recording() as events:
        greenlet = spawn(consumer)
        assert greenlet.ready.wait(30)
        greenlet.stop()
        assert greenlet.join(30)
    return seen[0].prefetch_count, of_type(events, PrefetchTooSmall)


@pytest.mark.parametrize(
    ("size", "concurrency", "prefetch"),
    [(10, None, 20), (10, 1, 20), (10, 4, 50), (60000, 2, 65535)],
)
def test_the_prefetch_holds_the_batches_that_run_and_one_more(size, concurrency, prefetch):
    assert prefetch_of(Gatherer(batch_size=size, concurrency=concurrency)) == (prefetch, [])


@pytest.mark.parametrize("chosen", [0, 20, 100])
def test_a_prefetch_of_the_consumers_own_is_kept(chosen):
    consumer = Gatherer(batch_size=10, concurrency=2, consumer={"prefetch_count": chosen})
    assert prefetch_of(consumer) == (chosen, [])


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (9, "a prefetch of 9 never fills a batch of 10: each is handed over by its timeout"),
        (19, "a prefetch of 19 leaves handlers idle: concurrency is 2, each with a batch of 10"),
    ],
)
def test_a_prefetch_that_is_too_small_is_told(caplog, chosen, words):
    consumer = Gatherer(batch_size=10, concurrency=2, consumer={"prefetch_count": chosen})
    _, [event] = prefetch_of(consumer)
    assert (event.prefetch, event.concurrency, event.batch_size) == (chosen, 2, 10)
    [record] = [each for each in caplog.records if "prefetch" in each.getMessage()]
    assert record.levelno == logging.WARNING
    assert words in record.getMessage()


# -- what makes no sense ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 65536, 2.5, "10", True])
def test_a_size_that_is_none_is_refused(size):
    said = refusal(batch_size=size)
    assert "batch_size must be from 1 to 65535" in said
    assert said.endswith(f"not {size!r}")


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", True])
def test_a_timeout_that_is_none_is_refused(timeout):
    said = refusal(batch_timeout=timeout)
    assert "batch_timeout must be 0 seconds or more" in said


def test_a_batch_may_wait_for_ever_to_be_full():
    assert settings_of(Gatherer(batch_timeout=float("inf"))).batch_timeout == float("inf")
    assert settings_of(Gatherer(batch_timeout=UNSET)).batch_timeout == 1.0


def test_on_message_is_refused_with_what_to_write_instead():
    consumer = Gatherer()
    consumer.get_consumers = lambda Consumer, channel: [
        Consumer([consumer.queue], on_message=print)
    ]
    assert "use callbacks, which are given a Batch" in refusal_of(consumer)


def test_partition_by_is_refused_with_what_to_do_instead():
    said = refusal(partition_by="routing_key", concurrency=2)
    assert "batch_size and partition_by do not go together" in said
    assert "concurrency=1" in said


# -- failures -----------------------------------------------------------------------------------------


def test_a_failure_concerns_the_whole_batch_and_is_told_once(started, put, caplog):
    consumer = Gatherer()
    failures = [LookupError("no such thing")]

    def handle(batch):
        if failures:
            raise failures.pop()

    consumer.handle = handle
    started(consumer)
    with recording() as events:
        put(consumer, 1, 2, 3)
        wait_until(lambda: len(consumer.batches) == 2)
    assert sorted(consumer.batches[1]) == [1, 2, 3]
    (event,) = of_type(events, HandlerFailed)
    assert (event.message_count, event.outcome) == (3, "3 requeued in 0.01 s")
    assert event.routing_key == consumer.queue.name
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "failed on a batch of 3 messages that begins with" in record.getMessage()
    assert record.exc_info[1] is event.error


def test_only_what_is_not_settled_meets_the_policy(started, put, depth):
    consumer = Gatherer(on_error=Reject())

    def handle(batch):
        batch[0][1].ack()
        batch[1][1].requeue()
        raise ValueError

    consumer.handle = handle
    started(consumer)
    with recording() as events:
        put(consumer, 1, 2, 3)
        wait_until(lambda: of_type(events, HandlerFailed))
        wait_until(lambda: depth(consumer) == 0)  # the second is gathered again
    (event,) = of_type(events, HandlerFailed)
    assert event.outcome == "2 left as the handler settled it, 1 rejected"


def test_each_error_has_its_policy(started, put, depth):
    consumer = Gatherer(on_error={ValueError: Reject()})
    consumer.handle = raising(ValueError("bad"))
    started(consumer)
    with recording() as events:
        put(consumer, 1, 2, 3)
        wait_until(lambda: of_type(events, HandlerFailed))
    assert of_type(events, HandlerFailed)[0].outcome == "3 rejected"
    assert depth(consumer) == 0


def test_a_policy_that_cannot_act_loses_nothing(started, put):
    class Broken:
        def apply(self, message, error, requeues):
            raise RuntimeError("no way out")

    consumer = Gatherer(raising(ValueError("bad")), on_error=Broken())
    greenlet = started(consumer)
    with recording() as events:
        put(consumer, 1, 2, 3)
        wait_until(lambda: of_type(events, HandlerFailed))
        greenlet.stop()
        assert greenlet.join(30)
    assert of_type(events, HandlerFailed)[0].outcome.startswith("3 requeued in 1 s, because")
    assert consumer_depth(consumer) == 3


def test_without_callbacks_a_batch_fails(started, put):
    consumer = Gatherer(on_error=Reject())
    consumer.get_consumers = lambda Consumer, channel: [Consumer([consumer.queue])]
    started(consumer)
    with recording() as events:
        put(consumer, 1, 2, 3)
        wait_until(lambda: of_type(events, HandlerFailed))
    assert isinstance(of_type(events, HandlerFailed)[0].error, NotImplementedError)


def test_a_failed_batch_without_acks_is_told_to_be_lost(started, put):
    consumer = Gatherer(raising(ValueError("bad")), consumer={"no_ack": True})
    started(consumer)
    with recording() as events:
        put(consumer, 1, 2, 3)
        wait_until(lambda: of_type(events, HandlerFailed))
    assert of_type(events, HandlerFailed)[0].outcome.startswith("3 lost: ")


def test_what_a_successful_batch_leaves_is_acked_where_that_is_asked_for(started, put):
    kept = []

    def handle(batch):
        kept.extend(batch)
        batch[1][1].reject()

    consumer = Gatherer(handle, auto_settle=True)
    started(consumer)
    put(consumer, 1, 2, 3)
    wait_until(lambda: len(kept) == 3 and kept[0][1].acknowledged)
    assert [message._state for _, message in kept] == ["ACK", "REJECTED", "ACK"]


def test_without_auto_settle_a_batch_may_be_settled_later(started, put):
    kept = []
    consumer = Gatherer()
    consumer.on_batch = kept.append
    started(consumer)
    put(consumer, 1, 2, 3, 4, 5, 6)
    wait_until(lambda: len(kept) == 2)
    assert [len(batch.unsettled) for batch in kept] == [3, 3]
    kept[0].ack()
    assert [len(batch.unsettled) for batch in kept] == [0, 3]


def test_a_kill_switch_tries_a_batch_of_one(started, put):
    consumer = Gatherer(raising(LookupError()), on_error=Requeue(0), batch_timeout=0.03)
    say(consumer, kill_switch=KillSwitch(window=2, pause=0.03))
    consumer.restart_limit = TokenBucket(1000, 1000)
    with recording() as events:
        started(consumer)
        put(consumer, *range(8))
        wait_until(lambda: len(of_type(events, HandlerFailed)) == 3)
        consumer.handle = None
        wait_until(lambda: of_type(events, KillSwitchReset))
        wait_until(lambda: sum(map(len, consumer.batches[3:])) == 8)
    assert [event.message_count for event in of_type(events, HandlerFailed)] == [3, 3, 1]
    assert len(of_type(events, KillSwitchTripped)) == 2
    assert consumer_depth(consumer) == 0


# -- what cannot be decoded ------------------------------------------------------------------------------


def put_garbage(consumer):
    with Connection("memory://localhost") as connection:
        producer = Producer(connection.channel())
        producer.publish(
            "{no json",
            routing_key=consumer.queue.name,
            content_type="application/json",
            content_encoding="utf-8",
        )


def test_what_cannot_be_decoded_is_in_no_batch(started, put):
    seen = []
    consumer = Gatherer()
    consumer.on_decode_error = lambda message, exc: (seen.append((message, exc)), message.ack())
    started(consumer)
    put(consumer, 1, 2)
    put_garbage(consumer)
    put(consumer, 3)
    consumer.wait_for([1, 2, 3])
    wait_until(lambda: seen)
    [(message, exc)] = seen
    assert message.acknowledged
    assert isinstance(exc, DecodeError)


def test_an_error_in_on_decode_error_concerns_its_message_alone(started, put):
    seen = []

    def on_decode_error(message, exc):
        seen.append(message)
        if len(seen) == 1:
            raise LookupError
        message.ack()

    consumer = Gatherer()
    consumer.on_decode_error = on_decode_error
    started(consumer)
    with recording() as events:
        put(consumer, 1)
        put_garbage(consumer)
        put(consumer, 2, 3)
        consumer.wait_for([1, 2, 3])
        wait_until(lambda: len(seen) == 2)
    (event,) = of_type(events, HandlerFailed)
    assert isinstance(event.error, LookupError)
    assert event.message_count == 1


def test_what_a_consumer_does_not_accept_is_in_no_batch(started, put):
    seen = []
    consumer = Gatherer(consumer={"accept": ["json"]})
    consumer.on_decode_error = lambda message, exc: (seen.append(exc), message.ack())
    started(consumer)
    put(consumer, "a", serializer="pickle")
    put(consumer, 1, 2, 3)
    consumer.wait_for([1, 2, 3])
    wait_until(lambda: seen)
    assert type(seen[0]).__name__ == "ContentDisallowed"


def test_nothing_is_decoded_twice(started, put):
    decoded = []

    def decode(data):
        decoded.append(bytes(data).decode())
        if decoded[-1] == "bad":
            raise ValueError
        return decoded[-1]

    serialization.register("counting", str, decode, "application/x-counting", "utf-8")
    try:
        consumer = Gatherer(consumer={"accept": ["counting"]})
        seen = []
        consumer.on_decode_error = lambda message, exc: (seen.append(exc), message.ack())
        started(consumer)
        put(consumer, "bad", "a", "b", "c", serializer="counting")
        consumer.wait_for(["a", "b", "c"])
        wait_until(lambda: seen)
        assert decoded == ["bad", "a", "b", "c"]
    finally:
        serialization.unregister("counting")


# -- timeouts and ends ------------------------------------------------------------------------------------


def test_a_batch_that_takes_too_long_is_interrupted_and_meets_the_policy(started, put):
    consumer = Gatherer(Gate(), handler_timeout=0.03, on_error=Reject())
    started(consumer)
    with recording() as events:
        put(consumer, 1, 2, 3)
        wait_until(lambda: of_type(events, HandlerFailed))
    (event,) = of_type(events, HandlerFailed)
    assert isinstance(event.error, HandlerTimeout)
    assert event.outcome == "3 rejected"
    assert len(of_type(events, HandlerInterrupted)) == 1


def test_a_timeout_that_is_swallowed_counts_while_something_is_unsettled(started, put):
    def handle(batch):
        try:
            Event().wait()
        except HandlerTimeout:
            batch[0][1].ack()

    consumer = Gatherer(handler_timeout=0.03, on_error=Reject())
    consumer.on_batch = handle
    started(consumer)
    with recording() as events:
        put(consumer, 1, 2, 3)
        wait_until(lambda: of_type(events, HandlerFailed))
    assert (
        of_type(events, HandlerFailed)[0].outcome == "1 left as the handler settled it, 2 rejected"
    )


def test_a_stop_gives_an_incomplete_batch_back_at_once(started, put, depth):
    consumer = Gatherer()
    greenlet = started(consumer)
    put(consumer, "a", "b")
    wait_until(lambda: depth(consumer) == 0)
    with recording() as events:
        greenlet.stop()
        assert greenlet.join(30)
    assert consumer.batches == []
    assert queued(consumer) == ["a", "b"]
    (event,) = of_type(events, ConsumerDrained)
    assert (event.finished, event.given_back, event.cancelled, event.killed) == (0, 2, 0, 0)


def test_a_stopped_consumer_leaves_no_timer_behind(put):
    def stopped():
        consumer = Gatherer()
        greenlet = spawn(consumer)
        assert greenlet.ready.wait(30)
        put(consumer, 1)
        wait_until(lambda: consumer_depth(consumer) == 0)
        greenlet.stop()
        assert greenlet.join(30)
        return weakref.ref(ensure_engine(consumer).handling)

    handling = stopped()
    wait_until(lambda: gc.collect() >= 0 and handling() is None)


def test_a_stop_gives_back_what_waits_for_a_place_and_waits_for_what_runs(started, put, depth):
    consumer = Gatherer(batch_timeout=0.01, consumer={"prefetch_count": 100})
    gate = consumer.handle = Gate()
    greenlet = started(consumer)
    put(consumer, 0)
    wait_until(lambda: gate.inside)
    put(consumer, 1)
    Event().wait(0.03)
    put(consumer, *range(2, 9))  # a full one whose time was up, a full one, and what is left
    Event().wait(0.01)
    with recording() as events:
        greenlet.stop()
        wait_until(lambda: depth(consumer) == 8 or ensure_lifecycle(consumer).state == "draining")
        assert not greenlet.join(0.02)
        gate.opened.set()
        assert greenlet.join(30)
    assert consumer.batches == [[0]]
    assert queued(consumer) == [*range(1, 9)]
    (event,) = of_type(events, ConsumerDrained)
    assert (event.finished, event.cancelled, event.killed) == (1, 0, 0)


def test_a_batch_that_outlasts_the_drain_goes_back_unaltered(started, put, depth):
    ended = []

    def handle(batch):
        batch[1][1].ack()
        try:
            Event().wait()
        except Shutdown as exc:
            ended.append(exc)
            raise

    consumer = Gatherer(handle, drain_timeout=0.02)
    greenlet = started(consumer)
    put(consumer, "a", "b", "c")
    wait_until(lambda: consumer.batches)
    with recording() as events:
        greenlet.stop()
        assert greenlet.join(30)
    assert len(ended) == 1
    assert depth(consumer) == 2
    assert of_type(events, HandlerFailed) == []
    (event,) = of_type(events, ConsumerDrained)
    assert (event.finished, event.given_back, event.cancelled, event.killed) == (0, 0, 1, 0)


@contextmanager
def ending_with(error):
    if error is None:
        yield
    else:
        with pytest.raises(error):
            yield


@pytest.mark.parametrize(
    ("options", "error"), [({"limit": 5}, None), ({"timeout": 0.05}, socket.timeout)]
)
def test_what_ends_by_itself_handles_what_it_has_gathered(put, options, error):
    consumer = Gatherer()
    consumer.queue(consumer.connection.channel()).declare()
    put(consumer, *range(5))
    with ending_with(error):
        for _ in consumer.consume(**options):
            pass
    assert consumer.batches == [[0, 1, 2], [3, 4]]
    assert consumer_depth(consumer) == 0


def test_what_ends_by_itself_waits_for_a_place_for_what_it_has_gathered(put):
    consumer = Gatherer(batch_timeout=0.01, consumer={"prefetch_count": 100})
    gate = consumer.handle = Gate()
    consumer.queue(consumer.connection.channel()).declare()
    put(consumer, *range(4))
    messages = consumer.consume(limit=6)
    for _ in range(4):
        next(messages)
    Event().wait(0.03)  # the time of the fourth is up, and it waits
    put(consumer, 4, 5)
    gevent.spawn_later(0.03, gate.opened.set)
    assert len(list(messages)) == 2
    assert consumer.batches == [[0, 1, 2], [3, 4, 5]]


def test_a_loop_that_is_left_gives_back_what_was_gathered(put):
    consumer = Gatherer()
    consumer.queue(consumer.connection.channel()).declare()
    put(consumer, 1, 2)
    messages = consumer.consume()
    next(messages)
    next(messages)
    assert consumer_depth(consumer) == 0
    messages.close()
    assert consumer.batches == []
    assert consumer_depth(consumer) == 2


def test_what_was_given_back_does_not_start_after_all(put):
    consumer = Gatherer(batch_timeout=0.01, consumer={"prefetch_count": 100})
    gate = consumer.handle = Gate()
    consumer.queue(consumer.connection.channel()).declare()
    put(consumer, *range(4))
    messages = consumer.consume()
    for _ in range(4):
        next(messages)
    Event().wait(0.03)  # the time of the fourth is up, and it waits for the others' place
    gevent.spawn_later(0.02, gate.opened.set)
    messages.close()
    assert consumer.batches == [[0, 1, 2]]
    assert queued(consumer) == [3]


def test_once_it_is_stopped_nothing_is_gathered(channel):
    """A transport that is polled may deliver one message more."""
    consumer, life = Gatherer(), Lifecycle("stopped")
    batch, queue = received(channel, "late")
    batching = Batching(life, settings_of(consumer))
    life.stop.set()
    batching.submit(Consumer(channel, [queue]), batch[0][1])
    assert batching.given_back == 1
    assert list(batching.unstarted()) == []
    assert channel._size(queue.name) == 1


def test_a_kill_leaves_what_was_gathered_to_the_broker(started, put, depth):
    consumer = Gatherer()
    greenlet = started(consumer)
    put(consumer, 1, 2)
    wait_until(lambda: depth(consumer) == 0)
    greenlet.kill()
    assert depth(consumer) == 2
    assert consumer.batches == []


def over_peer(peer, **attributes):
    """A consumer that is told its messages by a scripted peer, and comes back at once."""
    consumer = Gatherer(**attributes)
    consumer.connection = Connection(peer.url, transport_options={"close_timeout": 0.2})
    consumer.restart_limit = TokenBucket(1000, 1000)
    return consumer


def test_a_lost_link_forgets_what_was_gathered_and_the_next_one_begins_anew(peer, started):
    consumer = over_peer(peer)
    started(consumer)
    deliver = deliverer(peer)
    deliver(1, "old")
    wait_until(lambda: ensure_engine(consumer).handling.gathered == 1)
    peer.hang_up()
    deliver = deliverer(peer, count=2)
    for tag in range(1, 4):
        deliver(tag, "new")
    consumer.wait_for(["new"] * 3)
    assert peer.wait_for("basic.ack").args == [3, True]
    assert peer.frames("basic.reject") == peer.frames("basic.nack") == []


@pytest.mark.parametrize(
    "waiting", [pytest.param(["waits"], id="incomplete"), pytest.param(["waits"] * 3, id="full")]
)
def test_a_batch_whose_link_is_lost_while_it_waits_for_a_place_is_not_started(
    peer, started, waiting
):
    consumer = over_peer(peer, batch_timeout=0.01)
    gate = consumer.handle = Gate()
    started(consumer)
    deliver = deliverer(peer)
    for tag, body in enumerate(["runs"] * 3 + waiting, 1):
        deliver(tag, body)
    wait_until(lambda: gate.inside)
    Event().wait(0.03)
    with recording() as events:
        peer.hang_up()
        wait_until(lambda: of_type(events, LinkDown))
        gate.opened.set()
        deliver = deliverer(peer, count=2)
        deliver(1, "comes again")
        consumer.wait_for(["runs"] * 3, ["comes again"])
    assert peer.wait_for("basic.ack").args == [1, False]
    assert len(of_type(events, StaleSettle)) == 3  # of the one that ran
    assert ensure_engine(consumer).handling.given_back == 0


# -- as they are counted ------------------------------------------------------------------------------


def test_a_batch_counts_as_its_messages_and_its_time_once(started, put):
    consumer = Gatherer(on_error={KeyError: Reject(), Exception: Requeue(0.01)})
    tally = ensure_lifecycle(consumer).tally
    tally.watch()
    started(consumer)
    put(consumer, 1, 2, 3, 4, 5, 6)
    wait_until(lambda: tally.ok == 6)
    assert tally.received == 6
    assert (tally.timings.count, tally.timings.messages) == (2, 6)
    minute = tally.timings.last_minute()
    assert (minute.count, minute.messages) == (2, 6)

    def fail(batch):
        raise KeyError("no such order")

    consumer.handle = fail
    put(consumer, 7, 8, 9)
    wait_until(lambda: tally.failed == 3)
    assert tally.errors == {"KeyError": 3}
    assert tally.outcomes["ok"] == 6


def test_a_batch_that_times_out_or_is_cancelled_counts_as_its_messages(started, put):
    began = Event()

    def hang(batch):
        began.set()
        Event().wait()

    consumer = Gatherer(hang, handler_timeout=0.01, on_error=Reject())
    tally = ensure_lifecycle(consumer).tally
    started(consumer)
    put(consumer, 1, 2, 3)
    wait_until(lambda: tally.timed_out == 3)

    began.clear()
    consumer = Gatherer(hang, drain_timeout=0.0, cancel_timeout=10.0)
    tally = ensure_lifecycle(consumer).tally
    greenlet = started(consumer)
    put(consumer, 1, 2, 3)
    assert began.wait(30)
    greenlet.stop()
    assert greenlet.join(30)
    assert tally.cancelled == 3
