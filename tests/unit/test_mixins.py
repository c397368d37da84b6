"""The mixins: kombu's names, defaults and order of calls; stopping at once; errors that come back."""

from __future__ import annotations

import inspect
import logging
import socket
from abc import ABC
from contextlib import contextmanager
from time import monotonic
from uuid import uuid4

import amqp
import gevent
import pytest
from gevent import GreenletExit
from gevent.event import Event
from kombu import Connection, Exchange, Producer, Queue
from kombu import mixins as kombu_mixins
from kombu.exceptions import OperationalError
from kombu.utils.limits import TokenBucket

import greenconsume.mixins
from greenconsume.consuming.engine import ensure_lifecycle
from greenconsume.errors import InvalidConsumerError
from greenconsume.events import ConsumerChanged, ConsumerState, HandlerFailed, LinkUp
from greenconsume.failures.policies import Requeue
from greenconsume.handling.options import ConsumerOptions
from greenconsume.links import polled_stop
from greenconsume.mixins import ConsumerMixin, ConsumerProducerMixin, request_stop
from greenconsume.runtime.adapter import adapt
from greenconsume.runtime.greenlet import ConsumerGreenlet, spawn
from greenconsume.transports import registry
from tests import frames
from tests.servers import HOST, free_port
from tests.unit.fakes import of_type, recording
from tests.waiting import AT_ONCE, NEVER, wait_until

BOTH = [kombu_mixins.ConsumerMixin, ConsumerMixin]


@pytest.fixture(autouse=True)
def registered():
    registry.register()


@pytest.fixture
def queue_name():
    return f"q-{uuid4().hex[:10]}"


@pytest.fixture
def started():
    """Start consumers in greenlets; what is left of them is stopped, then killed, in the end."""
    greenlets = []

    def start(consumer):
        greenlets.append(spawn(consumer))
        return greenlets[-1]

    yield start
    for greenlet in greenlets:
        greenlet.stop()
    gevent.joinall(greenlets, timeout=30)
    gevent.killall(greenlets)


class Worker(ConsumerMixin):
    """Acks and keeps what it gets."""

    options = ConsumerOptions(on_error=Requeue(0))

    def __init__(self, url, queue="q", **options):
        options = {"close_timeout": NEVER, **options}
        self.connection = Connection(url, connect_timeout=NEVER, transport_options=options)
        self.queue = Queue(queue, Exchange("e"), "k")
        self.got = []

    def get_consumers(self, Consumer, channel):
        return [Consumer([self.queue], callbacks=[self.on_task], tag_prefix="w")]

    def on_task(self, body, message):
        self.got.append(body)
        message.ack()


def put(queue, *bodies):
    """Put messages into a queue of the memory transport."""
    with Connection("memory://") as connection:
        producer = Producer(connection.channel())
        for body in bodies:
            producer.publish(body, routing_key=queue, serializer="json", declare=[Queue(queue)])


def memory_worker(cls, queue, **attributes):
    """Make an instance of a class over memory, with its queue."""
    worker = cls()
    worker.connection = Connection("memory://")
    worker.queue = Queue(queue)
    for name, value in attributes.items():
        setattr(worker, name, value)
    return worker


def tag_of(peer):
    return peer.wait_for("basic.consume").args[2]


# -- the same as kombu's ------------------------------------------------------------------------------


def members(cls):
    return {name: value for name, value in vars(cls).items() if not name.startswith("__")}


def own_and_inherited(name):
    ours = getattr(greenconsume.mixins, name)
    found = {}
    for cls in reversed(ours.__mro__):
        if cls.__module__ == greenconsume.mixins.__name__:  # what it has from kombu's is not ours
            found.update(members(cls))
    return found


@pytest.mark.parametrize("name", kombu_mixins.__all__)
def test_every_name_of_kombus_is_here_with_its_signature(name):
    ours = own_and_inherited(name)
    for member, theirs in members(getattr(kombu_mixins, name)).items():
        assert member in ours, member
        if not callable(theirs):
            continue
        parameters = [
            [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
            for function in (ours[member], theirs)
        ]
        assert parameters[0] == parameters[1], member


@pytest.mark.parametrize("name", kombu_mixins.__all__)
def test_every_default_of_kombus_is_the_same(name):
    ours, theirs = (getattr(module, name)() for module in (greenconsume.mixins, kombu_mixins))
    for mixin in (ours, theirs):
        mixin.connection = Connection("memory://")
    for attribute in ("connect_max_retries", "should_stop", "connection_errors", "channel_errors"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert isinstance(ours.restart_limit, TokenBucket)
    assert ours.restart_limit.fill_rate == theirs.restart_limit.fill_rate == 1
    assert ours.restart_limit is ours.restart_limit


def test_the_modules_other_names_are_here():
    for name in ("debug", "info", "warn", "error", "sleep", "W_CONN_LOST", "W_CONN_ERROR"):
        assert hasattr(greenconsume.mixins, name)


HOOKS = [
    "create_connection",
    "on_connection_revived",
    "get_consumers",
    "on_consume_ready",
    "on_iteration",
    "on_decode_error",
    "on_consume_end",
]
CONTEXTS = ["establish_connection", "Consumer", "extra_context", "consumer_context"]


def recorder(base):
    """A consumer class on top of a mixin that records each call of each hook."""

    def recording_hook(name):
        def hook(self, *args, **kwargs):
            self.calls.append((name, len(args), sorted(kwargs)))
            return getattr(base, name)(self, *args, **kwargs)

        return hook

    def recording_context(name):
        @contextmanager
        def context(self, *args, **kwargs):
            self.calls.append((f"enter {name}", len(args), sorted(kwargs)))
            try:
                with getattr(base, name)(self, *args, **kwargs) as entered:
                    yield entered
            finally:
                self.calls.append((f"exit {name}", 0, []))

        return context

    def get_consumers(self, Consumer, channel):
        self.calls.append(("get_consumers", 2, []))
        return [Consumer([self.queue], callbacks=[self.on_task], accept=["json"])]

    def on_task(self, body, message):
        self.calls.append(("task", body, message.delivery_info["routing_key"] == self.queue.name))
        message.ack()
        if body == "last":
            self.should_stop = True

    attributes = {name: recording_hook(name) for name in HOOKS}
    attributes |= {name: recording_context(name) for name in CONTEXTS}
    attributes |= {"get_consumers": get_consumers, "on_task": on_task}
    attributes["__init__"] = lambda self: setattr(self, "calls", [])
    return type("Recorder", (base,), attributes)


def fill(queue):
    put(queue, "first")
    with Connection("memory://") as connection:
        Producer(connection.channel()).publish(b"\x80", queue, content_type="application/x-nothing")
    put(queue, "last")


def test_hooks_are_called_in_kombus_order(queue_name):
    calls = []
    for base in BOTH:
        queue = f"{queue_name}-{base.__module__}"
        fill(queue)
        worker = memory_worker(recorder(base), queue)
        worker.run(extra="argument")
        calls.append(worker.calls)
    assert calls[0] == calls[1]
    assert ("on_decode_error", 2, []) in calls[0]
    assert ("on_consume_ready", 3, ["extra"]) in calls[0]
    assert calls[0][-1] == ("exit consumer_context", 0, [])


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_consuming_a_number_of_messages_is_the_same_as_kombus(queue_name, limit):
    calls = []
    for base in BOTH:
        queue = f"{queue_name}-{base.__module__}"
        fill(queue)
        worker = memory_worker(recorder(base), queue)
        yields = sum(1 for _ in worker.consume(limit=limit, timeout=1))
        calls.append((yields, worker.calls))
    assert calls[0] == calls[1]
    assert calls[0][0] == limit


def test_a_consumer_without_a_connection_of_kombus_is_driven_as_kombu_drives_it():
    """As tests do that hand a mixin a mock."""
    calls = []

    class Fake:
        connection_errors = channel_errors = ()

        def clone(self):
            return self

        def __enter__(self):
            return self

        def __exit__(self, *args):
            calls.append("exit")

        def ensure_connection(self, *args):
            calls.append(("ensure", args[1]))

        def as_uri(self):
            return "fake://"

        default_channel = object()

        def drain_events(self, timeout):
            calls.append(("drain", timeout))
            if len(calls) < 4:
                raise socket.timeout

        def heartbeat_check(self):
            calls.append("beat")

    class Idle(ConsumerMixin):
        connection = Fake()

        def get_consumers(self, Consumer, channel):
            return []

    assert len(list(Idle().consume(limit=1, safety_interval=7))) == 1
    assert calls == [("ensure", None), ("drain", 7), "beat", ("drain", 7), "exit"]


# -- limits and timeouts ------------------------------------------------------------------------------


def test_a_limit_counts_messages_and_not_idle_ticks(queue_name):
    """HAZARDS.md row 25."""

    class Ticking(Worker):
        ticks = 0

        def on_iteration(self):
            self.ticks += 1
            if self.ticks == 4:
                put(queue_name, "late", "not wanted")

    worker = Ticking("memory://", queue_name)
    put(queue_name, "early")
    assert len(list(worker.consume(limit=2, safety_interval=0.005))) == 2
    assert worker.got == ["early", "late"]
    assert worker.ticks >= 4
    another = Worker("memory://", queue_name)
    assert len(list(another.consume(limit=1, timeout=30))) == 1
    assert another.got == ["not wanted"]


def test_a_timeout_is_idle_time_and_no_multiple_of_the_safety_interval(queue_name):
    """HAZARDS.md row 25."""
    worker = Worker("memory://", queue_name)
    put(queue_name, 0, 1)
    handled = worker.consume(timeout=0.05, safety_interval=NEVER)
    next(handled)
    next(handled)
    begun = monotonic()
    with pytest.raises(socket.timeout):
        next(handled)
    assert 0.045 < monotonic() - begun < AT_ONCE
    assert worker.got == [0, 1]


def test_a_message_begins_the_idle_time_anew(queue_name):
    class Slow(Worker):
        def on_task(self, body, message):
            Event().wait(0.04)
            super().on_task(body, message)
            if len(self.got) < 3:
                gevent.spawn_later(0.02, put, queue_name, "next")

    worker = Slow("memory://", queue_name)
    put(queue_name, "first")
    with pytest.raises(socket.timeout):
        list(worker.consume(timeout=0.05))
    assert len(worker.got) == 3


def test_heartbeats_do_not_extend_the_idle_time(peer):
    """HAZARDS.md row 4."""
    worker = Worker(peer.url)

    def beat():
        ensure_lifecycle(worker).ready.wait(30)
        while True:
            peer.send(frames.heartbeat())
            Event().wait(0.01)

    beating = gevent.spawn(beat)
    begun = monotonic()
    with pytest.raises(socket.timeout):
        list(worker.consume(timeout=0.06))
    assert monotonic() - begun < AT_ONCE
    beating.kill()


def test_leaving_the_loop_ends_the_consumer_in_order(peer):
    worker = Worker(peer.url)
    consuming = worker.consume()
    delivering = gevent.spawn(lambda: peer.deliver(1, tag_of(peer), 1, b"1"))
    next(consuming)
    delivering.get()
    consuming.close()
    assert worker.got == [1]
    assert [n for n in peer.names if n in ("basic.ack", "basic.cancel", "connection.close")] == [
        "basic.ack",
        "basic.cancel",
        "connection.close",
    ]


# -- ticks --------------------------------------------------------------------------------------------


def drains_of(worker, monkeypatch, count=3):
    """With which timeouts a consumer waits, the first few times; then it stops."""
    timeouts = []
    kind = type(worker.connection.transport)
    original = kind.drain_events

    def drain_events(self, connection, timeout=None, **kwargs):
        timeouts.append(timeout)
        if len(timeouts) >= count or timeout is None:
            ensure_lifecycle(worker).stop.set()
        return original(self, connection, timeout=timeout, **kwargs)

    monkeypatch.setattr(kind, "drain_events", drain_events)
    worker.run(safety_interval=0.005)
    return timeouts


class Iterating(Worker):
    def on_iteration(self):
        """Called now and then."""


class Shadowing(Worker):
    should_stop = False


class Asking(Worker):
    @property
    def should_stop(self):
        return ensure_lifecycle(self).stop.is_set()


def test_a_consumer_that_needs_no_ticks_is_not_woken_for_them(queue_name, monkeypatch):
    """HAZARDS.md row 28."""
    assert drains_of(Worker("memory://", queue_name), monkeypatch) == [None]


@pytest.mark.parametrize("kind", [Iterating, Shadowing, Asking])
def test_a_consumer_that_needs_ticks_has_them(queue_name, monkeypatch, kind):
    assert drains_of(kind("memory://", queue_name), monkeypatch) == [0.005] * 3


def test_on_iteration_may_be_an_attribute_of_the_instance(queue_name, monkeypatch):
    worker, ticks = Worker("memory://", queue_name), []
    worker.on_iteration = lambda: ticks.append(1)
    assert drains_of(worker, monkeypatch) == [0.005] * 3
    assert len(ticks) == 3


# -- should_stop --------------------------------------------------------------------------------------


def test_should_stop_reads_and_assigns_without_init():
    class Bare(ConsumerMixin):
        def __init__(self):
            pass

    bare = Bare()
    assert bare.should_stop is False
    bare.should_stop = True
    assert bare.should_stop is True
    bare.should_stop = False
    assert bare.should_stop is False
    bare.should_stop = 1
    assert bare.should_stop is True


def test_should_stop_wakes_a_consumer_that_waits_for_messages(started, peer):
    worker = Worker(peer.url)
    greenlet = started(worker)
    assert greenlet.ready.wait(30)
    begun = monotonic()
    worker.should_stop = True
    assert greenlet.join(30)
    assert monotonic() - begun < AT_ONCE
    assert peer.names[-1] == "connection.close"


def test_should_stop_from_a_foreign_thread_wakes_it(started, peer):
    worker = Worker(peer.url)
    greenlet = started(worker)
    assert greenlet.ready.wait(30)
    gevent.get_hub().threadpool.apply(setattr, (worker, "should_stop", True))
    assert greenlet.join(30)


def test_a_stop_before_the_start_connects_to_nobody(peer):
    worker = Worker(peer.url)
    worker.should_stop = True
    worker.run()
    assert list(worker.consume()) == []
    assert peer.connection_count == 0


@pytest.mark.parametrize(
    "stage",
    [
        "connection.start-ok",
        "connection.open",
        "channel.open",
        "exchange.declare",
        "queue.declare",
        "queue.bind",
        "basic.consume",
    ],
)
@pytest.mark.parametrize("how", ["run", "consume"])
def test_a_stop_at_any_stage_of_setting_up_ends_it_and_no_error_leaks(make_peer, stage, how):
    """HAZARDS.md row 3."""
    peer = make_peer(
        silent={stage, "connection.open"} if stage == "connection.start-ok" else {stage}
    )
    worker = Worker(peer.url, close_timeout=0.05)
    greenlet = gevent.spawn(worker.run if how == "run" else lambda: list(worker.consume()))
    peer.wait_for(stage)
    begun = monotonic()
    worker.should_stop = True
    assert greenlet.get(timeout=30) in (None, [])
    assert monotonic() - begun < AT_ONCE
    wait_until(lambda: peer.open_count == 0)


@pytest.mark.usefixtures("long_backoff")
def test_a_stop_while_the_broker_is_away_ends_it(started):
    """HAZARDS.md row 3."""
    worker = Worker(f"amqp://guest:guest@{HOST}:{free_port()}//")
    greenlet = started(worker)
    with recording() as events:
        wait_until(lambda: events)
    begun = monotonic()
    worker.should_stop = True
    assert greenlet.join(30)
    assert monotonic() - begun < AT_ONCE


def test_a_stop_while_nobody_answers_ends_it(started, black_hole_url):
    """HAZARDS.md row 3."""
    worker = Worker(black_hole_url)
    greenlet = started(worker)
    assert not greenlet.join(0.02)
    begun = monotonic()
    worker.should_stop = True
    assert greenlet.join(30)
    assert monotonic() - begun < AT_ONCE


def test_a_stop_while_it_waits_for_a_restart_token_ends_it(started, peer):
    class Failing(Worker):
        restart_limit = TokenBucket(1 / 3600)

        def on_connection_revived(self):
            raise amqp.ConnectionError("again")

    worker = Failing(peer.url)
    greenlet = started(worker)
    wait_until(lambda: peer.connection_count == 1 and peer.open_count == 0)
    assert not greenlet.join(0.01)
    begun = monotonic()
    worker.should_stop = True
    assert greenlet.join(30)
    assert monotonic() - begun < AT_ONCE
    assert peer.connection_count == 1


class ReadOnly(Worker):
    """Decides by itself; nobody can assign."""

    @property
    def should_stop(self):
        return len(self.got) >= 2


@pytest.mark.parametrize("kind", [Shadowing, ReadOnly])
def test_a_shadowed_should_stop_ends_the_consumer_within_the_safety_interval(queue_name, kind):
    worker = kind("memory://", queue_name)
    greenlet = gevent.spawn(worker.run, safety_interval=0.02)
    put(queue_name, 1, 2)
    wait_until(lambda: len(worker.got) == 2)
    if kind is Shadowing:
        worker.should_stop = True
    begun = monotonic()
    greenlet.get(timeout=30)
    assert monotonic() - begun < AT_ONCE


@pytest.mark.parametrize("kind", [Shadowing, ReadOnly, Asking])
def test_a_request_to_stop_ends_a_consumer_that_shadows_should_stop(started, queue_name, kind):
    worker = kind("memory://", queue_name)
    greenlet = started(worker)
    assert greenlet.ready.wait(30)
    begun = monotonic()
    request_stop(worker, "enough")
    assert greenlet.join(30)
    assert monotonic() - begun < AT_ONCE
    assert ensure_lifecycle(worker).stop.reason == "enough"


@pytest.mark.parametrize("kind", [Shadowing, ReadOnly])
def test_a_shadowed_should_stop_ends_a_consumer_whose_broker_is_away(kind, monkeypatch):
    """HAZARDS.md row 3, for one that can only be asked."""
    monkeypatch.setattr(polled_stop, "ASK_INTERVAL", 0.02)
    worker = kind(f"amqp://guest:guest@{HOST}:{free_port()}//")
    greenlet = gevent.spawn(worker.run)
    with recording() as events:
        wait_until(lambda: events)
    if kind is Shadowing:
        worker.should_stop = True
    worker.got = [1, 2]
    greenlet.get(timeout=30)


# -- stopping at every byte ---------------------------------------------------------------------------


def test_a_stop_at_every_byte_of_a_delivery_is_clean_for_a_consumer(started, make_peer):
    """Issue 1 of 3, "what it must show", 3."""
    peer, handled = make_peer(), 0
    data = frames.deliver(1, "TAG", 1, b"[1]", routing_key="k")
    for cut in range(0, len(data) + 1, 2):
        del peer.received[:]
        worker = Worker(peer.url)
        late = []
        worker.on_task = lambda body, message, worker=worker, late=late: (
            late.append(worker.should_stop),
            worker.got.append(body),
            message.ack(),
        )
        greenlet = started(worker)
        assert greenlet.ready.wait(30)
        whole = data.replace(b"\x03TAG", _short(tag_of(peer)))
        whole = _resized(whole)
        at = cut if cut < len(data) - 1 else len(whole)
        peer.send(whole[:at])
        if at == len(whole):
            wait_until(lambda worker=worker: worker.got)
        worker.should_stop = True
        peer.send(whole[at:])
        begun = monotonic()
        assert greenlet.join(30)
        assert monotonic() - begun < AT_ONCE
        assert peer.names[-1] == "connection.close"
        assert late == [False] * len(worker.got)
        assert peer.names.count("basic.ack") == len(worker.got)
        assert not (worker.got and {"basic.reject", "basic.nack"} & set(peer.names))
        handled += len(worker.got)
    assert handled >= 1


def _short(text):
    return bytes([len(text)]) + text.encode()


def _resized(data):
    """Correct the length of the first frame, whose consumer tag was replaced."""
    end = data.index(b"\xce\x02")
    return data[:3] + (end - 7).to_bytes(4, "big") + data[7:]


# -- errors that end a connection or a channel --------------------------------------------------------


class Quick(Worker):
    restart_limit = TokenBucket(1000)


def test_a_lost_link_brings_the_consumer_back_and_is_no_line_of_its_own(started, peer, caplog):
    caplog.set_level(logging.WARNING, "greenconsume.mixins")
    worker = Quick(peer.url)
    greenlet = started(worker)
    assert greenlet.ready.wait(30)
    peer.hang_up()
    wait_until(lambda: peer.connection_count == 2)
    wait_until(greenlet.ready.is_set)
    peer.deliver(1, peer.frames("basic.consume")[-1].args[2], 1, b"1")
    wait_until(lambda: worker.got == [1])
    assert [r for r in caplog.records if r.name == "greenconsume.mixins"] == []


def test_a_channel_error_brings_the_consumer_back_and_is_told(started, peer, caplog, monkeypatch):
    monkeypatch.setattr("greenconsume.consuming.refusals.FIRST_DELAY", 0.01)
    worker = Quick(peer.url)
    greenlet = started(worker)
    assert greenlet.ready.wait(30)
    peer.send(
        frames.channel_close(1, 406, "PRECONDITION_FAILED - delivery acknowledgement timed out")
    )
    peer.wait_for("basic.consume", 2)
    wait_until(greenlet.ready.is_set)
    assert "delivery acknowledgement timed out" in caplog.text
    assert greenlet.state is ConsumerState.CONSUMING


def test_a_queue_deleted_under_a_consumer_brings_it_back(started, peer):
    worker = Quick(peer.url)
    greenlet = started(worker)
    assert greenlet.ready.wait(30)
    peer.send(frames.basic_cancel(1, tag_of(peer)))
    peer.wait_for("queue.declare", 2)
    peer.wait_for("basic.consume", 2)
    wait_until(greenlet.ready.is_set)


def test_a_restart_waits_for_its_token(started, peer, monkeypatch):
    monkeypatch.setattr(
        "greenconsume.consuming.refusals.FIRST_DELAY", 0.0
    )  # else it waits for that

    class Limited(Worker):
        restart_limit = TokenBucket(20)

    begun = monotonic()
    greenlet = started(Limited(peer.url))
    assert greenlet.ready.wait(30)
    peer.send(frames.channel_close(1, 406, "PRECONDITION_FAILED"))
    peer.wait_for("basic.consume", 2)
    assert monotonic() - begun > 0.045


def test_retries_that_are_used_up_end_the_run():
    class Impatient(Worker):
        connect_max_retries = 0

    with pytest.raises(OperationalError):
        Impatient(f"amqp://guest:guest@{HOST}:{free_port()}//").run()


def test_on_connection_error_is_called_with_the_error_and_the_delay(started, monkeypatch):
    told = []

    class Telling(Worker):
        def on_connection_error(self, exc, interval):
            told.append((exc, interval))

    started(Telling(f"amqp://guest:guest@{HOST}:{free_port()}//"))
    wait_until(lambda: told)
    assert isinstance(told[0][0], ConnectionRefusedError)
    assert told[0][1] > 0


def test_a_users_error_ends_the_run_and_leaves_nothing(peer):
    class Broken(Worker):
        def on_consume_ready(self, *args, **kwargs):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Broken(peer.url).run()
    wait_until(lambda: peer.open_count == 0)
    assert peer.names[-1] == "connection.close"


@pytest.mark.parametrize("returned", [None, 5])
def test_get_consumers_that_returns_no_list_is_named_so(peer, returned):
    class Forgetful(Worker):
        def get_consumers(self, Consumer, channel):
            return returned

    with pytest.raises(
        InvalidConsumerError, match=r"Forgetful.get_consumers returned .*return a list"
    ):
        Forgetful(peer.url).run()
    wait_until(lambda: peer.open_count == 0)


def test_a_kombu_consumer_in_place_of_a_list_is_named_so(peer):
    class Single(Worker):
        def get_consumers(self, Consumer, channel):
            return Consumer([self.queue])

    with pytest.raises(InvalidConsumerError, match="return a list"):
        Single(peer.url).run()


def test_get_consumers_may_be_a_generator_and_open_channels_of_its_own(started, peer):
    class Two(Worker):
        def get_consumers(self, Consumer, channel):
            yield Consumer([self.queue], callbacks=[self.on_task])
            other = channel.connection.client.channel()
            yield type(Consumer([]))(other, [Queue("r")], callbacks=[self.on_task])

    worker = Two(peer.url)
    greenlet = started(worker)
    assert greenlet.ready.wait(30)
    assert [f.channel for f in peer.frames("basic.consume")] == [1, 2]
    for channel in (1, 2):
        tag = peer.frames("basic.consume")[channel - 1].args[2]
        peer.deliver(channel, tag, 1, b"%d" % channel)
    wait_until(lambda: sorted(worker.got) == [1, 2])
    greenlet.stop()
    assert greenlet.join(30)
    assert sorted(f.channel for f in peer.frames("channel.close")) == [1, 2]


def test_a_callbacks_error_is_neither_the_brokers_nor_the_end(started, peer):
    """HAZARDS.md row 11."""

    class Failing(Worker):
        def on_task(self, body, message):
            self.got.append(body)
            raise {1: OSError, 2: TimeoutError, 3: KeyError, 4: SystemExit}[body]("mine")

    worker = Failing(peer.url)
    with recording() as events:
        greenlet = started(worker)
        assert greenlet.ready.wait(30)
        for n in (1, 2, 3, 4):
            peer.deliver(1, tag_of(peer), n, b"%d" % n)
        wait_until(lambda: len(worker.got) == 4)
        greenlet.stop()
        assert greenlet.join(30)
    assert len(of_type(events, HandlerFailed)) == 4
    assert peer.connection_count == 1
    assert greenlet.exception is None


def test_a_failed_message_is_requeued_after_a_second_where_nothing_else_is_said(started, peer):
    class Failing(ConsumerMixin):
        connection = Connection(peer.url, transport_options={"close_timeout": 2.0})

        def get_consumers(self, Consumer, channel):
            return [Consumer([Queue("q")], callbacks=[lambda body, message: 1 / 0])]

    with recording() as events:
        greenlet = started(Failing())
        assert greenlet.ready.wait(30)
        peer.deliver(1, tag_of(peer), 1)
        wait_until(lambda: of_type(events, HandlerFailed))
    (event,) = of_type(events, HandlerFailed)
    assert (event.outcome, type(event.error)) == ("requeued in 1 s", ZeroDivisionError)
    assert "basic.reject" not in peer.names


def test_a_kill_in_a_callback_that_somebody_else_runs_passes(peer):
    class Killed(Worker):
        def on_task(self, body, message):
            raise GreenletExit

    worker = Killed(peer.url)
    delivering = gevent.spawn(lambda: peer.deliver(1, tag_of(peer), 1))
    with pytest.raises(GreenletExit):
        worker.run()
    delivering.get()
    wait_until(lambda: peer.open_count == 0)
    assert "basic.ack" not in peer.names


def test_a_gevent_timeout_around_run_ends_it_clean(peer):
    worker = Worker(peer.url)
    with pytest.raises(gevent.Timeout):
        with gevent.Timeout(0.05):
            worker.run()
    wait_until(lambda: peer.open_count == 0)
    assert peer.names[-1] == "connection.close"


# -- states -------------------------------------------------------------------------------------------


def test_a_consumers_states_follow_each_other(started, peer):
    worker = Worker(peer.url)
    with recording() as events:
        greenlet = started(worker)
        assert greenlet.ready.wait(30)
        greenlet.stop()
        assert greenlet.join(30)
    states = [event.new for event in of_type(events, ConsumerChanged)]
    assert states == [
        ConsumerState.CONNECTING,
        ConsumerState.CONSUMING,
        ConsumerState.DRAINING,
        ConsumerState.STOPPED,
    ]


def test_a_consumer_that_lost_its_link_is_not_ready(started, peer):
    worker = Worker(peer.url)
    greenlet = started(worker)
    assert greenlet.ready.wait(30)
    peer.hang_up()
    wait_until(lambda: not greenlet.ready.is_set())
    assert greenlet.state is ConsumerState.CONNECTING


# -- the producer -------------------------------------------------------------------------------------


class Relay(ConsumerProducerMixin, Worker):
    """Publishes what it gets."""

    def on_task(self, body, message):
        self.producer.publish(body, exchange="", routing_key="out")
        super().on_task(body, message)


def test_a_producer_has_a_link_of_its_own_that_ends_with_the_consumer(started, peer):
    """A consuming link publishes nothing: the broker blocks publishers by link."""
    worker = Relay(peer.url)
    with recording() as events:
        greenlet = started(worker)
        assert greenlet.ready.wait(30)
        line = peer._line
        for n in (1, 2):
            line.send(frames.deliver(1, tag_of(peer), n, b"%d" % n))
        wait_until(lambda: worker.got == [1, 2])
        wait_until(lambda: len(peer.published) == 2)
        assert len(of_type(events, LinkUp)) == 2
        greenlet.stop()
        assert greenlet.join(30)
    assert peer.connection_count == 2
    wait_until(lambda: peer.open_count == 0)
    assert worker._producer_connection is None
    assert [m.body for m in peer.published] == [b"1", b"2"]


def test_a_producer_that_nobody_asks_for_is_not_made(started, peer):
    worker = Relay(peer.url)
    greenlet = started(worker)
    assert greenlet.ready.wait(30)
    greenlet.stop()
    assert greenlet.join(30)
    assert peer.connection_count == 1


def test_a_producer_is_let_go_of_when_the_run_fails(peer):
    class Broken(Relay):
        def on_consume_ready(self, *args, **kwargs):
            self.producer.publish({}, routing_key="out")
            raise KeyError("mine")

    with pytest.raises(KeyError):
        Broken(peer.url).run()
    wait_until(lambda: peer.open_count == 0)


# -- adapting kombu's ---------------------------------------------------------------------------------


class KombuWorker(kombu_mixins.ConsumerMixin):
    """As a user of kombu's wrote it."""

    options = ConsumerOptions(on_error=Requeue(0))

    def __init__(self, url, queue="q"):
        self.connection = Connection(url, transport_options={"close_timeout": NEVER})
        self.queue = Queue(queue)
        self.got = []

    def get_consumers(self, Consumer, channel):
        return [Consumer([self.queue], callbacks=[self.on_task])]

    def on_task(self, body, message):
        self.got.append(body)
        message.ack()


def stopped_quickly(greenlet):
    assert greenlet.ready.wait(30)
    begun = monotonic()
    greenlet.stop()
    assert greenlet.join(30)
    assert greenlet.exception is None
    assert monotonic() - begun < AT_ONCE


def test_a_consumer_of_kombus_behaves_as_ours(started, queue_name):
    worker = KombuWorker("memory://", queue_name)
    assert adapt(worker) is worker
    assert isinstance(worker, KombuWorker)
    assert type(worker).__name__ == "KombuWorker"
    put(queue_name, 1)
    greenlet = started(worker)
    wait_until(lambda: worker.got == [1])
    stopped_quickly(greenlet)


def test_adapting_twice_or_what_is_ours_changes_nothing(queue_name):
    worker, ours = KombuWorker("memory://", queue_name), Worker("memory://", queue_name)
    kind = type(adapt(worker))
    assert type(adapt(worker)) is kind
    assert type(adapt(KombuWorker("memory://", queue_name))) is kind
    assert type(adapt(ours)) is Worker


def test_an_abstract_class_knows_its_instances_whatever_the_adapted_one_is_asked():
    class Base(kombu_mixins.ConsumerMixin, ABC):
        def get_consumers(self, Consumer, channel):
            return []

    class Special(Base):
        pass

    adapted, plain = adapt(Base()), Special()
    assert not isinstance(plain, type(adapted))
    assert isinstance(plain, Base)
    assert isinstance(adapted, Base)


def test_a_stop_that_was_set_before_adapting_counts(queue_name):
    worker = KombuWorker("memory://", queue_name)
    worker.should_stop = True
    adapt(worker)
    assert worker.should_stop is True
    worker.run()


def test_hooks_of_an_adapted_consumer_are_called_in_kombus_order(queue_name):
    calls = []
    for change in (lambda worker: worker, adapt):
        queue = f"{queue_name}-{len(calls)}"
        fill(queue)
        worker = change(memory_worker(recorder(kombu_mixins.ConsumerMixin), queue))
        worker.run(extra="argument")
        calls.append(worker.calls)
    assert calls[0] == calls[1]


class Overriding(KombuWorker):
    """Overrides what it may, and calls what it overrode by `super()`."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = []

    def run(self, **kwargs):
        self.calls.append("run")
        super().run(**kwargs)

    def consume(self, *args, **kwargs):
        self.calls.append("consume")
        yield from super().consume(*args, **kwargs)

    @contextmanager
    def Consumer(self):
        self.calls.append("Consumer")
        with super().Consumer() as entered:
            yield entered

    @contextmanager
    def establish_connection(self):
        self.calls.append("establish_connection")
        with super().establish_connection() as connection:
            yield connection

    def on_connection_error(self, exc, interval):
        self.calls.append("on_connection_error")
        super().on_connection_error(exc, interval)


def test_what_an_adapted_consumer_calls_by_super_is_ours(started, queue_name):
    worker = Overriding("memory://", queue_name)
    put(queue_name, 1)
    greenlet = started(worker)
    wait_until(lambda: worker.got == [1])
    stopped_quickly(greenlet)
    assert worker.calls == ["run", "consume", "Consumer", "establish_connection"]


def test_an_adapted_consumers_callback_is_guarded_though_it_calls_super(started, queue_name):
    """HAZARDS.md row 11."""

    class Failing(Overriding):
        def on_task(self, body, message):
            self.got.append(body)
            if len(self.got) == 1:
                raise TimeoutError("mine")
            message.ack()

    worker = Failing("memory://", queue_name)
    put(queue_name, 1)
    with recording() as events:
        greenlet = started(worker)
        wait_until(lambda: worker.got == [1, 1])
        stopped_quickly(greenlet)
    assert len(of_type(events, HandlerFailed)) == 1


@pytest.mark.usefixtures("long_backoff")
def test_a_stop_of_an_adapted_consumer_whose_broker_is_away_though_it_calls_super(started):
    """HAZARDS.md row 3."""
    worker = Overriding(f"amqp://guest:guest@{HOST}:{free_port()}//")
    greenlet = started(worker)
    wait_until(lambda: "on_connection_error" in worker.calls)
    begun = monotonic()
    greenlet.stop()
    assert greenlet.join(30)
    assert monotonic() - begun < AT_ONCE


def test_an_adapted_consumer_with_a_producer_has_a_link_for_it(started, peer):
    class KombuRelay(kombu_mixins.ConsumerProducerMixin, KombuWorker):
        def on_task(self, body, message):
            self.producer.publish(body, exchange="", routing_key="out")
            super().on_task(body, message)

        def on_consume_end(self, connection, channel):
            self.got.append("end")
            super().on_consume_end(connection, channel)

    worker = KombuRelay(peer.url)
    greenlet = started(worker)
    assert greenlet.ready.wait(30)
    peer.deliver(1, tag_of(peer), 1, b"1")
    wait_until(lambda: len(peer.published) == 1)
    stopped_quickly(greenlet)
    assert worker.got == [1, "end"]
    assert peer.connection_count == 2
    wait_until(lambda: peer.open_count == 0)


def test_a_shadowed_should_stop_of_an_adapted_consumer_still_stops_it(started, queue_name):
    class Shadowed(KombuWorker):
        should_stop = False

    stopped_quickly(started(Shadowed("memory://", queue_name)))


def test_what_is_no_consumer_is_refused():
    class NoConsumer:
        pass

    for thing in (NoConsumer(), 5, None, Connection("memory://")):
        with pytest.raises(InvalidConsumerError, match="is no consumer"):
            adapt(thing)


def test_a_consumer_of_neither_kind_is_taken_as_it_is():
    class Own:
        def get_consumers(self, Consumer, channel):
            return []

        def run(self):
            pass

    own = Own()
    assert adapt(own) is own
    assert type(own) is Own
    assert ConsumerGreenlet(own).consumer is own
