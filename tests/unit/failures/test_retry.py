"""Tests what `Retry` makes of its arguments, what a copy keeps, and retries where the broker cannot delay."""

from __future__ import annotations

import string
from time import time
from types import SimpleNamespace
from typing import Any

import amqp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu import Connection, Exchange, Queue

from greenconsume import ConsumerMixin, HandlerTimeout, Reject, Requeue, Retry
from greenconsume.errors import GreenconsumeError
from greenconsume.failures import message_copy
from greenconsume.failures.message_copy import Copy, copy_of, keep_wire_form, tail_of
from greenconsume.failures.requeues import DelayedRequeues
from greenconsume.failures.retry_queues import delay_queues, lasts
from greenconsume.handling.options import ConsumerOptions
from tests.integration.consumers import Recorder, consuming, green_connection
from tests.options import say
from tests.waiting import AT_ONCE, wait_until

# -- what it is given -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry", "delays", "count"),
    [
        (Retry(), (1.0, 2.0, 4.0, 8.0, 16.0), 5),
        (Retry(8, initial=2.0, factor=3.0, max_delay=20.0), (2.0, 6.0, 18.0, 20.0), 8),
        (Retry(3, factor=1.0), (1.0,), 3),
        (Retry(delays=[1, 5, 30]), (1, 5, 30), 3),
        (Retry(10, [1, 5]), (1, 5), 10),
        (Retry(0), (), 0),
    ],
)
def test_delays_are_given_or_grow(retry, delays, count):
    assert (retry.delays, retry.max_retries) == (delays, count)


def test_the_last_delay_goes_for_all_that_follow():
    retry = Retry(4, [1, 5])
    error = ValueError()
    assert [retry.delay_after(n, error) for n in range(6)] == [1, 5, 5, 5, None, None]


def test_only_what_is_to_be_retried_is_retried():
    retry = Retry(retry_on=OSError, give_up_on=(PermissionError, FileNotFoundError))
    assert retry.delay_after(0, TimeoutError()) == 1.0
    assert retry.delay_after(0, PermissionError()) is None
    assert retry.delay_after(0, ValueError()) is None


def test_a_handler_timeout_is_retried_by_default():
    assert Retry().delay_after(0, HandlerTimeout(1.0)) == 1.0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"max_retries": -1}, "max_retries"),
        ({"max_retries": 1.5}, "max_retries"),
        ({"max_retries": True}, "max_retries"),
        ({"delays": [1, -1]}, "-1 is not between 0"),
        ({"delays": [5_000_000]}, "5000000 is not between 0"),
        ({"delays": [float("nan")]}, "nan is not between"),
        ({"initial": -1}, "initial"),
        ({"factor": 0.5}, "factor"),
        ({"dead_letter": ""}, "another queue"),
        ({"dead_letter": "{queue}"}, "another queue"),
        ({"dead_letter": 3}, "another queue, not 3"),
        ({"delays": ["1s"]}, "'1s' is not between 0"),
        ({"delays": 5}, "a list of seconds, not 5"),
        ({"initial": "1s"}, "initial"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Retry(**arguments)


@pytest.mark.parametrize("name", ["retry_on", "give_up_on"])
@pytest.mark.parametrize("value", ["ValueError", (ValueError, "x"), [ValueError], 1])
def test_what_is_no_exception_class_is_refused(name, value):
    with pytest.raises(TypeError, match=name):
        Retry(**{name: value})


def test_a_policy_can_be_shared_compared_and_hashed():
    assert Retry(delays=[1, 2]) == Retry(2, (1, 2))
    assert len({Retry(), Retry(), Requeue()}) == 2


def test_it_says_so_when_it_is_applied_to_a_message_of_nobody():
    with pytest.raises(GreenconsumeError, match="on_error"):
        Retry().apply(SimpleNamespace(), ValueError(), DelayedRequeues())


# -- the queues -----------------------------------------------------------------------------------


def test_there_is_a_queue_for_each_delay_that_leads_back():
    assert delay_queues(Queue("orders"), [1, 0.25, 1]) == {
        "orders.retry.1000": {
            "x-message-ttl": 1000,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": "orders",
        },
        "orders.retry.250": {
            "x-message-ttl": 250,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": "orders",
        },
    }


def test_the_delay_queues_of_a_quorum_queue_wait_for_it_too():
    queue = Queue("orders", queue_arguments={"x-queue-type": "quorum"})
    (arguments,) = delay_queues(queue, [1]).values()
    assert arguments["x-queue-type"] == "quorum"
    assert arguments["x-dead-letter-strategy"] == "at-least-once"


@pytest.mark.parametrize(
    ("queue", "lasting"),
    [
        (Queue("orders"), True),
        (Queue("orders", durable=False), True),
        (Queue("orders", auto_delete=True), False),
        (Queue("orders", exclusive=True), False),
        (Queue("amq.gen-x"), False),
    ],
)
def test_a_queue_that_may_be_gone_when_the_delay_is_over_gets_no_delay_queues(queue, lasting):
    assert lasts(queue) is lasting


# -- copies ---------------------------------------------------------------------------------------

names = st.text(string.ascii_letters + "-é", min_size=1, max_size=20)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=50)
    | st.decimals(-100, 100, places=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


def delivered(body: bytes, **properties: Any) -> Any:
    """A message as a green channel delivers it, with all that it was delivered as."""
    encoded = amqp.Message(body, **properties)._serialize_properties()
    message = SimpleNamespace(
        delivery_info={"exchange": "shop", "routing_key": "order.new"}, headers={}
    )
    keep_wire_form(message, ("tag", 1, False, "shop", "order.new", encoded, body))
    return message


@given(st.dictionaries(names, values, max_size=4), st.binary(max_size=200))
def test_a_copy_has_the_headers_and_the_body_that_came(headers, body):
    message = delivered(body, application_headers=headers, content_encoding="utf-8")
    published = copy_of(message).to_amqp()
    encoded = published._serialize_properties()
    back = amqp.Message()
    back._load_properties(amqp.Message.CLASS_ID, encoded, 0)
    original = amqp.Message()
    original._load_properties(amqp.Message.CLASS_ID, message.wire_form[0], 0)
    assert back.properties.get("application_headers") == original.properties.get(
        "application_headers"
    )
    assert published.body == body


def test_a_copy_keeps_every_property_and_is_persistent():
    given = {
        "content_type": "application/x-own",
        "content_encoding": "utf-16",
        "priority": 7,
        "correlation_id": "c-1",
        "reply_to": "answers",
        "message_id": "m-1",
        "timestamp": 1_700_000_000,
        "type": "order",
        "app_id": "shop",
        "cluster_id": "west",
        "delivery_mode": 1,
    }
    published = copy_of(delivered("é".encode("utf-16"), **given)).to_amqp()
    assert published.properties == {**given, "delivery_mode": 2, "application_headers": {}}
    assert published.body == "é".encode("utf-16")


def test_what_a_handler_does_to_the_headers_is_not_copied():
    message = delivered(b"", application_headers={"tenant": "acme"})
    message.headers["tenant"] = "other"
    assert copy_of(message).headers == {"tenant": "acme"}


def test_texts_that_are_no_utf8_stay_what_they_were():
    encoded = b"\xa0\x00\x04t\xff/x\x00\x00\x00\x0a\x01a" + b"S\x00\x00\x00\x03x\xfey"
    message = SimpleNamespace()
    keep_wire_form(message, ("tag", 1, False, "", "q", encoded, b""))
    again = copy_of(message).to_amqp()._serialize_properties()
    assert b"t\xff/x" in again
    assert b"x\xfey" in again


def test_what_the_broker_would_act_on_waits_in_headers():
    copy = copy_of(
        delivered(b"", expiration="5000", user_id="ann", application_headers={"CC": ["audit"]})
    )
    copy.put_aside("bob")
    copy.put_expiration_aside()
    assert copy.properties == {}
    assert copy.headers == {
        "greenconsume-expiration": "5000",
        "greenconsume-user-id": "ann",
        "greenconsume-cc": ["audit"],
    }
    copy.put_expiration_back()
    assert copy.properties == {"expiration": "5000"}


def test_the_publisher_may_keep_its_own_user_id():
    copy = copy_of(delivered(b"", user_id="bob"))
    copy.put_aside("bob")
    assert copy.properties == {"user_id": "bob"}


def test_no_header_of_ours_begins_as_those_that_rabbitmq_ignores():
    ours = [value for value in vars(message_copy).values() if isinstance(value, str)]
    assert not [name for name in ours if name.startswith("x-")]


def test_the_passage_through_retry_queues_is_forgotten_and_other_deaths_are_not():
    own = {"queue": "orders.retry.1000", "reason": "expired"}
    other = {"queue": "inbox", "reason": "rejected"}
    copy = Copy(b"", {"x-death": [own, other], "x-first-death-queue": "inbox"}, {})
    copy.headers |= {"x-last-death-queue": "orders.retry.1000", "x-last-death-reason": "expired"}
    copy.headers |= {"x-delivery-count": 2}
    copy.forget_passage("orders")
    assert copy.headers == {"x-death": [other], "x-first-death-queue": "inbox"}


def test_our_own_words_are_cut_to_fit_into_a_frame():
    copy = Copy(
        b"", {"theirs": "x" * 2000, message_copy.STACK: "é" * 5000, message_copy.ERROR: "boom"}, {}
    )
    copy.shorten_to(4096)
    assert len(copy.to_amqp()._serialize_properties()) <= 4096
    assert copy.headers[message_copy.STACK].startswith("…é")
    assert copy.headers[message_copy.ERROR] == "boom"
    assert copy.headers["theirs"] == "x" * 2000


def test_headers_that_cannot_fit_are_not_published():
    with pytest.raises(GreenconsumeError, match="4096 bytes"):
        Copy(b"", {"theirs": "x" * 5000, message_copy.STACK: "boom"}, {}).shorten_to(4096)


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("abc", 3, "abc"),
        ("abcd", 3, "…bcd"),
        ("aéé", 3, "…é"),
        ("abc", -5, "…"),
        ("\ud800", 9, "?"),
    ],
)
def test_a_text_is_cut_at_its_beginning(text, limit, cut):
    assert tail_of(text, limit) == cut


@pytest.mark.parametrize(("count", "retries"), [(2, 2), (None, 0), ("2", 0), (-1, 0), (True, 0)])
def test_a_count_that_is_none_is_zero(count, retries):
    assert message_copy.retries_of({message_copy.RETRIES: count}) == retries


# -- where the broker cannot delay ----------------------------------------------------------------


class Failing(Recorder):
    """Fails on every message, and remembers with which headers and address it came."""

    def __init__(self, broker: Any, queue: Any, **options: Any) -> None:
        super().__init__(broker, queue, self.fail, **options)
        self.seen: list[tuple[float, dict[str, Any], dict[str, Any]]] = []

    def fail(self, body: Any, message: Any) -> None:
        self.seen.append((time(), dict(message.headers), dict(message.delivery_info)))
        raise LookupError(f"no {body}")


@pytest.fixture
def memory() -> Any:
    with green_connection("memory://") as connection:
        yield connection


def taken(connection: Connection, queue: str) -> Any:
    """The next message of a queue, which it must have soon."""
    message = wait_until(lambda: connection.default_channel.basic_get(queue))
    message.ack()
    return message


def test_attempts_are_counted_and_delays_kept_in_memory(memory, queue_name):
    consumer = Failing("memory://", queue_name)
    say(consumer, on_error=Retry(delays=[0.02, 0.04]))
    with consuming(consumer):
        memory.Producer().publish("hat", routing_key=queue_name, headers={"tenant": "acme"})
        wait_until(lambda: len(consumer.seen) == 3)
        dead = taken(memory, f"{queue_name}.dead")
    times = [at for at, _, _ in consumer.seen]
    assert [h.get(message_copy.RETRIES) for _, h, _ in consumer.seen] == [None, 1, 2]
    assert 0.02 <= times[1] - times[0] < AT_ONCE
    assert 0.04 <= times[2] - times[1] < AT_ONCE
    assert dead.decode() == "hat"
    assert dead.headers["tenant"] == "acme"
    assert dead.headers[message_copy.ERROR] == "no hat"
    assert message_copy.NOT_BEFORE not in dead.headers


def test_a_retry_reaches_no_other_queue_and_keeps_its_address_in_memory(memory, queue_name):
    exchange = Exchange(f"{queue_name}-x", "topic")
    other = Queue(f"{queue_name}-other", exchange, "order.*")
    other(memory.default_channel).declare()
    consumer = Failing("memory://", Queue(queue_name, exchange, "order.*"))
    say(consumer, on_error=Retry(delays=[0]))
    with consuming(consumer):
        memory.Producer(exchange=exchange).publish(1, routing_key="order.new")
        taken(memory, f"{queue_name}.dead")
    assert [info["routing_key"] for _, _, info in consumer.seen] == ["order.new", "order.new"]
    assert [info["exchange"] for _, _, info in consumer.seen] == [exchange.name, exchange.name]
    taken(memory, other.name)
    assert memory.default_channel.basic_get(other.name) is None


def test_a_restart_of_the_consumer_neither_loses_a_count_nor_a_delay(memory, queue_name):
    first, second = Failing("memory://", queue_name), Failing("memory://", queue_name)
    say(first, on_error=Retry(delays=[0.06]))
    say(second, on_error=Retry(delays=[0.06]))
    with consuming(first):
        memory.Producer().publish(1, routing_key=queue_name)
        wait_until(lambda: first.seen)
    with consuming(second):
        wait_until(lambda: second.seen)
    at, headers, _ = second.seen[0]
    assert headers[message_copy.RETRIES] == 1
    assert 0.06 <= at - first.seen[0][0] < AT_ONCE


def test_a_message_that_says_it_is_due_in_years_is_handled_now(memory, queue_name):
    consumer = Failing("memory://", queue_name)
    say(consumer, on_error=Retry(0))
    headers = {
        message_copy.EXCHANGE: "",
        message_copy.ROUTING_KEY: "",
        message_copy.NOT_BEFORE: time() + 1e9,
    }
    with consuming(consumer):
        memory.Producer().publish(1, routing_key=queue_name, headers=headers)
        wait_until(lambda: consumer.seen)


def test_a_compressed_body_stays_as_it_was(memory, queue_name):
    consumer = Failing("memory://", queue_name)
    say(consumer, on_error=Retry(0))
    with consuming(consumer):
        memory.Producer().publish({"a": "x" * 99}, routing_key=queue_name, compression="zlib")
        dead = taken(memory, f"{queue_name}.dead")
    assert dead.decode() == {"a": "x" * 99}
    assert dead.headers["compression"] == "application/x-gzip"


def test_each_error_may_have_its_own_policy(memory, queue_name):
    consumer = Failing("memory://", queue_name)
    say(consumer, on_error={LookupError: Retry(0, dead_letter="{queue}.lost"), OSError: Reject()})
    with consuming(consumer):
        memory.Producer().publish(1, routing_key=queue_name)
        assert taken(memory, f"{queue_name}.lost").headers[message_copy.ERROR_TYPE] == "LookupError"


def test_a_test_double_of_a_connection_needs_no_queues():
    class Doubled(ConsumerMixin):
        options = ConsumerOptions(on_error=Retry())

        def create_connection(self) -> Any:
            return _Double()

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return []

    consumer = Doubled()
    with consumer.consumer_context() as (_connection, _channel, consumers):
        assert list(consumers) == []


class _Double:
    """As much of a connection as the plain path uses."""

    default_channel = None

    def __enter__(self) -> _Double:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def ensure_connection(self, *_args: Any) -> None:
        pass

    def as_uri(self) -> str:
        return "double://"


def test_a_header_of_ours_that_somebody_else_wrote_harms_nobody(memory, queue_name):
    """Law 5: whatever a message brings, its consumer lives on."""
    consumer = Failing("memory://", queue_name)
    say(consumer, on_error=Retry(0))
    with consuming(consumer):
        producer = memory.Producer()
        producer.publish("poison", routing_key=queue_name, headers={message_copy.EXCHANGE: ""})
        producer.publish("good", routing_key=queue_name)
        wait_until(lambda: len(consumer.seen) == 2)


def test_a_retry_goes_to_the_queue_of_the_callback_that_failed(tmp_path, queue_name):
    """Also on a polled transport, which does not say from which queue a message comes."""
    folder = str(tmp_path)
    folders: dict[str, Any] = dict.fromkeys(("data_folder_in", "data_folder_out"), folder)
    folders |= {"control_folder": str(tmp_path / "control"), "polling_interval": 0.01}
    exchange, came = Exchange(f"{queue_name}-x"), []
    queues = [Queue(f"{queue_name}-{name}", exchange, "order") for name in ("mail", "bill")]

    class Two(ConsumerMixin):
        options = ConsumerOptions(on_error=Retry(delays=[0]))
        connection = Connection("filesystem://", transport_options=folders)

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            calls = (self.on_mail, self.on_bill)
            return [
                Consumer([queue], callbacks=[call])
                for queue, call in zip(queues, calls, strict=True)
            ]

        def on_mail(self, _body: Any, message: Any) -> None:
            came.append("mail")
            message.ack()

        def on_bill(self, _body: Any, message: Any) -> None:
            came.append("bill")
            if came.count("bill") == 1:
                raise LookupError
            message.ack()

    with consuming(Two()), Connection("filesystem://", transport_options=folders) as connection:
        connection.Producer(exchange=exchange).publish(1, routing_key="order")
        wait_until(lambda: came.count("bill") == 2)
    assert sorted(came) == ["bill", "bill", "mail"]
