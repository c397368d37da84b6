"""The boundary around the user's callback: whatever it raises stays there, and its message is not lost."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from decimal import Decimal
from uuid import UUID, uuid4

import gevent
import pytest
from gevent import GreenletExit
from gevent.event import Event
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu import Connection, Message, Producer, Queue, serialization
from kombu import Consumer as KombuConsumer
from kombu.exceptions import ContentDisallowed, DecodeError

from greenconsume.consuming.engine import ensure_engine, ensure_lifecycle
from greenconsume.errors import HandlerTimeout, Shutdown
from greenconsume.events import HandlerFailed
from greenconsume.failures.policies import Reject, Requeue
from greenconsume.handling.decoding import decode
from greenconsume.mixins import ConsumerMixin
from greenconsume.runtime.greenlet import spawn
from greenconsume.transports import registry
from tests.options import say
from tests.unit.fakes import of_type, recording
from tests.waiting import wait_until

ERRORS = [OSError, TimeoutError, ConnectionResetError, KeyError, ValueError]
NO_ERRORS = [GreenletExit, SystemExit, gevent.Timeout]


class Desk(ConsumerMixin):
    """A consumer over memory that is driven one message at a time."""

    def __init__(self, *callbacks, owned=True, consumer=None, **options):
        self.connection = Connection("memory://")
        self.queue = Queue(f"q-{uuid4().hex[:8]}")
        self.callbacks = list(callbacks)
        self.consumer_options = consumer or {}
        say(self, **{"on_error": Requeue(0.01), **options})
        self.life = ensure_lifecycle(self)
        ensure_engine(self).owned = owned
        self._loop = self.consume(timeout=1)

    def get_consumers(self, Consumer, channel):
        self.channel = channel
        options = {"callbacks": self.callbacks, **self.consumer_options}
        return [KombuConsumer(channel, [self.queue], **options)]

    def put(self, *bodies, **options):
        with Connection("memory://") as connection:
            for body in bodies:
                Producer(connection.channel()).publish(
                    body, routing_key=self.queue.name, declare=[self.queue], **options
                )

    def drain(self, times=1):
        for _ in range(times):
            next(self._loop)

    def drain_inside(self):
        """As a callback may that waits for an answer of its own."""
        self.channel.connection.client.drain_events(timeout=30)

    @property
    def depth(self):
        """The number of messages that wait in the queue."""
        return self.channel._size(self.queue.name)

    @property
    def unsettled(self):
        """The number of messages that were delivered and not settled."""
        return len(self.channel.qos._delivered)

    def close(self):
        self._loop.close()


@pytest.fixture
def make_desk():
    desks = []

    def make(*callbacks, **options):
        registry.register()
        desks.append(Desk(*callbacks, **options))
        return desks[-1]

    yield make
    for desk in desks:
        desk.close()


class FailsFirst:
    """A callback that raises for the first message it gets, and acks the others."""

    def __init__(self, error):
        self.error = error
        self.got = []

    def __call__(self, body, message):
        self.got.append(body)
        if len(self.got) == 1:
            raise self.error
        message.ack()


# -- what a callback raises ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*ERRORS, *NO_ERRORS])
def test_what_a_callback_raises_requeues_its_message_and_the_next_is_handled(make_desk, kind):
    """HAZARDS.md row 11: kombu takes an OSError for the broker's, and a timeout for an idle tick."""
    callback = FailsFirst(kind("mine") if kind is not gevent.Timeout else gevent.Timeout(30))
    desk = make_desk(callback)
    with recording() as events:
        desk.put("bad", "good")
        desk.drain(2)
        assert callback.got == ["bad", "good"]
        assert desk.depth == 0
        desk.drain()
    assert callback.got == ["bad", "good", "bad"]
    (event,) = of_type(events, HandlerFailed)
    assert event.error is callback.error
    assert (event.consumer, event.routing_key) == (desk.life.name, desk.queue.name)
    assert event.outcome == "requeued in 0.01 s"
    assert desk.unsettled == 0


def test_a_callback_that_exits_does_not_end_the_process(make_desk):
    desk = make_desk(lambda body, message: sys.exit(3))
    with recording() as events:
        desk.put(1)
        desk.drain()
    assert isinstance(of_type(events, HandlerFailed)[0].error, SystemExit)


@pytest.mark.parametrize("kind", NO_ERRORS)
def test_what_may_be_meant_for_somebody_elses_code_passes_in_his_greenlet(make_desk, kind):
    desk = make_desk(FailsFirst(kind()), owned=False)
    with recording() as events:
        desk.put(1)
        with pytest.raises(kind):
            desk.drain()
    assert of_type(events, HandlerFailed) == []
    assert desk.depth == 1  # it went back when the channel was closed


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit])
def test_what_ends_the_program_passes_everywhere(make_desk, kind, owned):
    desk = make_desk(FailsFirst(kind()), owned=owned)
    desk.put(1)
    with pytest.raises(kind):
        desk.drain()


def test_a_kill_of_the_greenlet_is_not_taken_for_the_handlers_own(make_desk):
    started = Event()

    def callback(body, message):
        started.set()
        Event().wait()

    desk = make_desk(callback, owned=False)
    desk.put(1)
    with recording() as events:
        greenlet = spawn(desk)
        assert started.wait(30)
        greenlet.kill()
    assert greenlet.ready()
    assert of_type(events, HandlerFailed) == []
    wait_until(lambda: desk.depth == 1)


def test_a_shutdown_gives_the_message_back_and_is_no_failure(make_desk):
    callback = FailsFirst(Shutdown("enough"))
    desk = make_desk(callback, on_error=Reject())
    with recording() as events:
        desk.put(1)
        desk.drain(2)
    assert callback.got == [1, 1]
    assert of_type(events, HandlerFailed) == []


def test_a_handlers_timeout_is_a_failure(make_desk):
    desk = make_desk(FailsFirst(HandlerTimeout(1.0)), on_error=Requeue(0))
    with recording() as events:
        desk.put(1)
        desk.drain(2)
    assert len(of_type(events, HandlerFailed)) == 1


# -- what becomes of the message ----------------------------------------------------------------------


def test_a_failed_message_is_requeued_at_once_where_no_delay_is_wanted(make_desk):
    desk = make_desk(FailsFirst(ValueError()), on_error=Requeue(0))
    with recording() as events:
        desk.put(1)
        desk.drain()
    assert desk.depth == 1
    assert of_type(events, HandlerFailed)[0].outcome == "requeued"


def test_a_failed_message_is_rejected_where_that_is_wanted(make_desk):
    desk = make_desk(FailsFirst(ValueError()), on_error=Reject())
    with recording() as events:
        desk.put(1)
        desk.drain()
    assert (desk.depth, desk.unsettled) == (0, 0)
    assert of_type(events, HandlerFailed)[0].outcome == "rejected"


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue"])
def test_a_message_that_the_handler_settled_is_left_alone(make_desk, settle):
    def callback(body, message):
        getattr(message, settle)()
        raise ValueError("after that")

    desk = make_desk(callback, on_error=Requeue(0))
    with recording() as events:
        desk.put(1)
        desk.drain()
    assert of_type(events, HandlerFailed)[0].outcome == "left as the handler settled it"
    assert desk.depth == (settle == "requeue")


def test_a_message_without_acks_is_lost_and_said_to_be(make_desk):
    desk = make_desk(FailsFirst(ValueError()), consumer={"no_ack": True})
    with recording() as events:
        desk.put(1)
        desk.drain()
    assert of_type(events, HandlerFailed)[0].outcome.startswith("lost: ")
    assert desk.depth == 0


def test_a_handler_that_returns_without_settling_is_left_to_the_user(make_desk):
    desk = make_desk(lambda body, message: None)
    desk.put(1)
    desk.drain()
    assert desk.unsettled == 1


def test_a_handler_that_returns_may_be_settled_for_it(make_desk):
    kept = []
    desk = make_desk(lambda body, message: kept.append(message), auto_settle=True)
    desk.put(1)
    desk.drain()
    assert desk.unsettled == 0
    assert kept[0].acknowledged


def test_a_policy_that_fails_loses_nothing_and_is_no_error_of_the_brokers(make_desk):
    class Broken:
        def apply(self, message, error, requeues):
            raise OSError("the policy's own")

    desk = make_desk(FailsFirst(ValueError()), on_error=Broken())
    with recording() as events:
        desk.put(1)
        desk.drain()
    assert "its policy failed: OSError" in of_type(events, HandlerFailed)[0].outcome
    assert (desk.depth, desk.unsettled) == (0, 1)


@pytest.mark.parametrize("delay", [-1, -0.001, float("nan")])
def test_a_delay_that_makes_no_sense_is_refused(delay):
    with pytest.raises(ValueError, match="delay"):
        Requeue(delay)


def test_a_hook_sees_the_error_and_never_the_body(make_desk):
    desk = make_desk(FailsFirst(ValueError("oops")))
    with recording() as events:
        desk.put("s3cret")
        desk.drain()
    assert "oops" in repr(events)
    assert "s3cret" not in repr(events)


# -- the ways to be called ----------------------------------------------------------------------------


def test_on_message_is_called_with_the_message_alone(make_desk):
    got = []
    desk = make_desk(consumer={"on_message": lambda message: got.append(message) or message.ack()})
    desk.put({"n": 1})
    desk.drain()
    assert got[0].payload == {"n": 1}


def test_what_on_message_raises_stays_there(make_desk):
    def on_message(message):
        raise TimeoutError("mine")

    desk = make_desk(consumer={"on_message": on_message})
    with recording() as events:
        desk.put(1)
        desk.drain()
    assert len(of_type(events, HandlerFailed)) == 1


def test_all_callbacks_are_called_in_their_order(make_desk):
    got = []
    desk = make_desk(
        lambda body, message: got.append(("first", body)),
        lambda body, message: got.append(("second", body)) or message.ack(),
    )
    desk.put(1)
    desk.drain()
    assert got == [("first", 1), ("second", 1)]


def test_a_consumer_without_callbacks_fails_its_messages(make_desk):
    desk = make_desk()
    with recording() as events:
        desk.put(1)
        desk.drain()
    assert isinstance(of_type(events, HandlerFailed)[0].error, NotImplementedError)
    assert desk.unsettled == 1


def test_a_handler_that_drains_by_itself_keeps_its_own_message(make_desk):
    """What is nested in it settles and fails by itself."""
    desk, got = None, []

    def callback(body, message):
        got.append(body)
        if body == "outer":
            desk.drain_inside()
            raise ValueError("after the inner one")
        message.ack()

    desk = make_desk(callback, on_error=Requeue(0))
    with recording() as events:
        desk.put("outer", "inner")
        desk.drain()
    assert got == ["outer", "inner"]
    (event,) = of_type(events, HandlerFailed)
    assert event.outcome == "requeued"
    assert (desk.depth, desk.unsettled) == (1, 0)


def test_a_handler_that_drains_by_itself_is_settled_for_by_itself(make_desk):
    desk, kept = None, []

    def callback(body, message):
        kept.append(message)
        if body == "outer":
            desk.drain_inside()

    desk = make_desk(callback, auto_settle=True)
    desk.put("outer", "inner")
    desk.drain()
    assert [message.acknowledged for message in kept] == [True, True]


# -- decoding -----------------------------------------------------------------------------------------


def test_what_cannot_be_decoded_goes_to_on_decode_error(make_desk):
    errors, got = [], []
    desk = make_desk(
        lambda body, message: got.append(body),
        consumer={"on_decode_error": lambda message, exc: errors.append(exc) or message.reject()},
    )
    with recording() as events:
        desk.put("{nonsense", content_type="application/json", content_encoding="utf-8")
        desk.drain()
    assert [type(error) for error in errors] == [DecodeError]
    assert got == of_type(events, HandlerFailed) == []
    assert desk.unsettled == 0


def test_what_cannot_be_decoded_meets_the_policy_where_nobody_asks_for_it(make_desk):
    desk = make_desk(lambda body, message: None, on_error=Reject())
    with recording() as events:
        desk.put("{nonsense", content_type="application/json", content_encoding="utf-8")
        desk.drain()
    assert isinstance(of_type(events, HandlerFailed)[0].error, DecodeError)
    assert desk.unsettled == 0


def test_what_on_decode_error_raises_meets_the_policy(make_desk):
    calls = []

    def on_decode_error(message, exc):
        calls.append(exc)
        raise OSError("mine")

    desk = make_desk(consumer={"on_decode_error": on_decode_error}, on_error=Reject())
    with recording() as events:
        desk.put("{nonsense", content_type="application/json", content_encoding="utf-8")
        desk.drain()
    assert len(calls) == 1
    assert isinstance(of_type(events, HandlerFailed)[0].error, OSError)


def test_what_cannot_be_decompressed_goes_to_on_decode_error(make_desk):
    errors = []
    desk = make_desk(
        consumer={"on_decode_error": lambda message, exc: errors.append(exc) or message.ack()}
    )
    desk.put("x", headers={"compression": "zlib"}, content_type="text/plain")
    desk.drain()
    assert len(errors) == 1


def test_content_that_is_not_accepted_goes_to_on_decode_error(make_desk):
    errors = []
    desk = make_desk(
        consumer={
            "accept": ["json"],
            "on_decode_error": lambda message, exc: errors.append(exc) or message.ack(),
        }
    )
    desk.put({"n": 1}, serializer="pickle")
    desk.drain()
    assert [type(error) for error in errors] == [ContentDisallowed]


def test_a_compressed_body_arrives_as_it_was(make_desk):
    got = []
    desk = make_desk(lambda body, message: got.append(body) or message.ack())
    desk.put({"n": [1, 2, 3]}, compression="zlib")
    desk.drain()
    assert got == [{"n": [1, 2, 3]}]


def message_of(body, content_type="application/json", encoding="utf-8", accept=None):
    return Message(body, content_type=content_type, content_encoding=encoding, accept=accept)


def outcome_of(function, message):
    try:
        return function(message)
    except Exception as exc:  # compared by the test
        return type(exc), str(exc)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100)
@given(json_values, st.booleans())
def test_json_is_decoded_as_kombu_does(value, as_text):
    text = json.dumps(value, ensure_ascii=as_text)
    ours, theirs = message_of(text), message_of(text)
    assert repr(outcome_of(decode, ours)) == repr(outcome_of(Message.decode, theirs))
    assert repr(ours._decoded_cache) == repr(theirs._decoded_cache)


@pytest.mark.parametrize(
    "body",
    [
        "",
        " ",
        " 1",
        "1 ",
        "\n[1]\n",
        "1 2",
        "{}{}",
        "nonsense",
        '{"a": 1, "a": 2}',
        "NaN",
        "[Infinity, -Infinity]",
        "1e999",
        "123456789012345678901234567890",
        '"\\ud800"',
        '"\ud800"',
        '"\x00"',
        "\ufeff{}",
        b'{"a": 1}',
        b"\xff",
        bytearray(b"[1]"),
        '{"__type__": "datetime", "__value__": "2024-01-01T00:00:00"}',
        '{"__type__": "uuid", "__value__": "nonsense"}',
        '{"\\u005f_type__": "decimal", "__value__": "1.5"}',
        '["__type__"]',
        "[" * 2000,
    ],
)
def test_odd_json_is_decoded_as_kombu_does(body):
    assert repr(outcome_of(decode, message_of(body))) == repr(
        outcome_of(Message.decode, message_of(body))
    )


@pytest.mark.parametrize(
    "value",
    [
        datetime(2024, 5, 6, 7, 8, 9, tzinfo=timezone.utc),
        Decimal("1.25"),
        UUID(int=7),
        {"when": [datetime(2024, 5, 6)], "n": 1},
    ],
)
def test_types_that_kombu_marks_come_back(make_desk, value):
    got = []
    desk = make_desk(lambda body, message: got.append(body) or message.ack())
    desk.put(value)
    desk.drain()
    assert got == [value]


@pytest.mark.parametrize("accept", [None, {"application/json"}, {"text/plain"}, set()])
def test_what_is_accepted_is_what_kombu_accepts(accept):
    ours, theirs = message_of("[1]", accept=accept), message_of("[1]", accept=accept)
    assert repr(outcome_of(decode, ours)) == repr(outcome_of(Message.decode, theirs))


def test_a_decoder_of_the_users_own_is_used():
    registered = serialization.registry._decoders["application/json"]
    serialization.register("json", json.dumps, lambda text: "mine", "application/json", "utf-8")
    try:
        assert decode(message_of("[1]")) == "mine"
    finally:
        serialization.registry._decoders["application/json"] = registered
        serialization.register_json()


def test_a_content_type_that_was_disabled_is_refused():
    serialization.registry.disable("application/json")
    try:
        with pytest.raises(ContentDisallowed):
            decode(message_of("[1]"))
    finally:
        serialization.registry.enable("application/json")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/data", None, "application/JSON"]
)
def test_other_content_is_decoded_as_kombu_does(content_type):
    assert repr(outcome_of(decode, message_of("[1]", content_type))) == repr(
        outcome_of(Message.decode, message_of("[1]", content_type))
    )


def test_messages_that_wait_to_be_requeued_do_not_outlive_their_channel(make_desk):
    desk = make_desk(FailsFirst(ValueError()), on_error=Requeue(60))
    desk.put(1)
    desk.drain()
    assert (desk.depth, desk.unsettled) == (0, 1)
    desk.close()
    assert desk.depth == 1
