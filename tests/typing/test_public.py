"""Type-checked by mypy, never run: what a user's type checker sees of the public names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kombu import Connection, Exchange, Queue
from typing_extensions import assert_type

import greenconsume
from greenconsume import (
    Batch,
    BlockedError,
    ConsumerGreenlet,
    ConsumerMixin,
    ConsumerOptions,
    ConsumerProducerMixin,
    DeadLetter,
    DeadLetters,
    Publication,
    Publisher,
    PublishError,
    RefusedError,
    Reject,
    Requeue,
    RestartPolicy,
    Runtime,
    patch_all,
    require_patched,
    spawn,
)
from greenconsume.events import ConsumerState, Event, subscribe
from greenconsume.links.pool import LinkPool


class Orders(ConsumerMixin):
    options = ConsumerOptions(on_error=Requeue(delay=5.0))

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def get_consumers(self, Consumer: Any, channel: Any) -> Sequence[Any]:
        return [Consumer([Queue("orders")], callbacks=[self.on_order])]

    def on_order(self, body: Any, message: Any) -> None:
        message.ack()


class Readings(ConsumerMixin):
    options = ConsumerOptions(batch_size=100, batch_timeout=0.5)

    def get_consumers(self, Consumer: Any, channel: Any) -> Sequence[Any]:
        return [Consumer([Queue("readings")], callbacks=[self.on_batch])]

    def on_batch(self, batch: Batch) -> None:
        for body, message in batch:
            assert_type(body, Any)
            message.reject()
        assert_type(batch.unsettled, list[Any])
        assert_type(batch[:2], list[tuple[Any, Any]])
        assert_type(batch[0], tuple[Any, Any])
        batch.ack()
        batch.append(1)  # type: ignore[attr-defined]  # it is what it was handed over as


class Replies(ConsumerProducerMixin):
    options = ConsumerOptions(on_error={ValueError: Reject()})

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def get_consumers(self, Consumer: Any, channel: Any) -> Sequence[Any]:
        return [Consumer([Queue("calls")], on_message=self.on_call)]

    def on_call(self, message: Any) -> None:
        self.producer.publish({}, routing_key=message.properties["reply_to"])


def patching() -> None:
    patch_all()
    require_patched()
    greenconsume.patch_all()
    assert_type(greenconsume.__version__, str)
    print(greenconsume.Consumer)  # type: ignore[attr-defined]  # there is no such name


def one_consumer(connection: Connection) -> None:
    consumer = Orders(connection)
    greenlet = spawn(consumer)
    assert_type(greenlet, ConsumerGreenlet)
    assert_type(greenlet.state, ConsumerState)
    assert_type(greenlet.join(timeout=1.0), bool)
    assert_type(greenlet.ready.wait(timeout=1.0), bool)
    greenlet.stop()
    greenlet.stop("deploy")
    assert_type(consumer.should_stop, bool)
    consumer.should_stop = True
    spawn(Replies(connection), options=ConsumerOptions(partition_by=key_of, concurrency=2))
    ConsumerOptions(concurrency="4")  # type: ignore[arg-type]  # a count
    ConsumerOptions(20)  # type: ignore[call-arg]  # which option?
    ConsumerOptions(retries=3)  # type: ignore[call-arg]  # there is none of that name
    ConsumerOptions().concurrency = 5  # type: ignore[misc]  # it is frozen


class Legacy(ConsumerMixin):
    """Has names of its own that are options elsewhere."""

    options: dict[str, int] = {}
    batch_size = "large"
    concurrency = 0


def key_of(message: Any) -> str:
    return str(message.headers["customer"])


def make_replies(connection: Connection) -> Replies:
    return Replies(connection)


def many_consumers() -> None:
    runtime = Runtime(
        "amqp://",
        links=2,
        options=ConsumerOptions(drain_timeout=30.0, cancel_timeout=5.0),
        restart=RestartPolicy("permanent", max_restarts=3),
    )
    runtime.spawn(Orders, replicas=20, options=ConsumerOptions(concurrency=5))
    runtime.spawn(make_replies)
    with runtime:
        pass
    runtime.start()
    runtime.stop()
    assert_type(runtime.join(timeout=1.0), bool)
    runtime.kill()
    Runtime("amqp://", links="two")  # type: ignore[arg-type]  # a count
    RestartPolicy("sometimes")  # type: ignore[arg-type]  # one of three kinds


def publishing(connection: Connection) -> None:
    publisher = Publisher("amqp://", exchange=Exchange("orders"), timeout=5.0, max_unconfirmed=100)
    publisher.publish({"id": 1}, routing_key="new", mandatory=True, headers={"a": 1})
    publication = publisher.publish_nowait({"id": 1}, "new", message_id="1")
    publication.wait(timeout=1.0)
    assert_type(publication.ready, bool)
    assert_type(publication.message_id, str)
    publisher.flush(timeout=1.0)
    publisher.stop()
    publisher.close(timeout=1.0)
    with Publisher(connection, links=LinkPool(2)) as shared:
        shared.publish("text")
    Publisher("amqp://", timeout="soon")  # type: ignore[arg-type]  # seconds


def events() -> None:
    def observe(event: Event) -> None:
        print(event)

    unsubscribe = subscribe(observe)
    unsubscribe()
    subscribe(print)


def dead_letters() -> None:
    with DeadLetters("amqp://", "orders.dead") as letters:
        for letter in letters:
            assert_type(letter, DeadLetter)
            assert_type(letter.headers, dict[str, Any])
            letters.replay(letter)
        assert_type(letters.count, int)


def answers(publisher: Publisher) -> None:
    publication = publisher.publish_nowait({}, "orders")
    assert_type(publication, Publication)
    try:
        publication.wait(timeout=1.0)
    except RefusedError as exc:
        assert_type(exc.reply_code, int)
    except BlockedError as exc:
        assert_type(exc.message_id, str | None)
    except PublishError as exc:
        assert_type(exc.routing_key, str)
