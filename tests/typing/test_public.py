"""Type-checked by mypy, never run: what a user's type checker sees of the public names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kombu import Connection, Queue
from typing_extensions import assert_type

import greenconsume
from greenconsume import (
    ConsumerGreenlet,
    ConsumerMixin,
    ConsumerProducerMixin,
    Reject,
    Requeue,
    RestartPolicy,
    Runtime,
    patch_all,
    require_patched,
    spawn,
)
from greenconsume.events import ConsumerState, Event, subscribe


class Orders(ConsumerMixin):
    on_error = Requeue(delay=5.0)

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def get_consumers(self, Consumer: Any, channel: Any) -> Sequence[Any]:
        return [Consumer([Queue("orders")], callbacks=[self.on_order])]

    def on_order(self, body: Any, message: Any) -> None:
        message.ack()


class Replies(ConsumerProducerMixin):
    on_error = Reject()

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
    spawn(Replies(connection))


def make_replies(connection: Connection) -> Replies:
    return Replies(connection)


def many_consumers() -> None:
    runtime = Runtime(
        "amqp://",
        links=2,
        drain_timeout=30.0,
        cancel_timeout=5.0,
        restart=RestartPolicy("permanent", max_restarts=3),
    )
    runtime.spawn(Orders, replicas=20)
    runtime.spawn(make_replies)
    with runtime:
        pass
    runtime.start()
    runtime.stop()
    assert_type(runtime.join(timeout=1.0), bool)
    runtime.kill()
    Runtime("amqp://", links="two")  # type: ignore[arg-type]  # a count
    RestartPolicy("sometimes")  # type: ignore[arg-type]  # one of three kinds


def events() -> None:
    def observe(event: Event) -> None:
        print(event)

    unsubscribe = subscribe(observe)
    unsubscribe()
    subscribe(print)
