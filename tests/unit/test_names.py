"""The class is the user's: whatever it calls its own attributes and methods, it consumes as with kombu."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from kombu import Connection, Producer, Queue
from kombu import mixins as kombu_mixins

import greenconsume.mixins
from greenconsume import ConsumerOptions, Runtime, spawn
from greenconsume.events import ConsumerState
from tests.waiting import wait_until

MIXINS = ["ConsumerMixin", "ConsumerProducerMixin"]
#: Names that a consumer of somebody's may well have, with a value that could be taken for something else.
OWN: dict[str, Any] = {
    "name": "orders",
    "state": "new",
    "stop": False,
    "start": 0,
    "close": True,
    "ready": False,
    "links": ["https://example.org"],
    "session": {"user": 7},
    "channel": "email",
    "channels": ["email", "sms"],
    "queues": {},
    "consumers": 5,
    "drain": True,
    "switch": "on",
    "options": {},
    "settings": {"debug": True},
    "life": 3,
    "engine": "v8",
    "handling": "with care",
    "handler": None,
    "handlers": [],
    "logger": "log",
    "events": [],
    "pool": 10,
    "producers": {},
    "message": "hello",
    "messages": [],
    "rungs": 4,
    "owned": False,
    "timeout": "30s",
    "retry": "never",
    "on_error": "ignore",
    "on_message": "print",
    "concurrency": "4",
    "partition_by": "customer",
    "batch_size": 500,
    "batch_timeout": "1s",
    "handler_timeout": 0,
    "drain_timeout": "30s",
    "cancel_timeout": -1,
    "kill_switch": True,
    "auto_settle": "no",
    "settle_deadline": "soon",
    "max_handlers": 0,
    "restart": "always",
    "_connect": "eagerly",
    "_consume": "all",
    "_consume_plain": 1,
    "_stopping": True,
    "_let_go": None,
    "_drain_of": "swamp",
    "_needs_ticks": True,
    "_guarded": "yes",
    "_ending": "happy",
    "_engine": None,
    "_lifecycle": "born",
    "_state": "new",
    "_stop": True,
    "_options": {},
    "_links": 0,
    "_name": "orders",
}
#: Names that kombu itself has on its mixin that publishes.
OF_NO_PRODUCER = {"_producer_connection": "cable", "producer": "a farm"}


def shapes_of(name: str) -> list[dict[str, Any]]:
    """The name as an attribute, set in `__init__`, as a method, and as a property that must not be read."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name} is not greenconsume's to call")

    own = {**OWN, **OF_NO_PRODUCER}[name]
    return [{name: own}, {"set_in_init": {name: own}}, {name: method}]


def consumer_of(mixin: type[Any], attributes: dict[str, Any]) -> Any:
    """A consumer of a queue of its own, with attributes of its own."""

    class Own(mixin):
        set_in_init: dict[str, Any] = {}

        def __init__(self) -> None:
            self.connection = Connection("memory://")
            self.queue = Queue(f"q-{uuid4().hex[:10]}")
            self.bodies: list[Any] = []
            vars(self).update(self.set_in_init)

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return [Consumer([self.queue], callbacks=[self.on_task])]

        def on_task(self, body: Any, message: Any) -> None:
            self.bodies.append(body)
            message.ack()

    return type("Orders", (Own,), attributes)()


def consumes(consumer: Any) -> None:
    """See it receive two messages, and stop."""
    greenlet = spawn(consumer)
    try:
        assert greenlet.ready.wait(30), greenlet.exception
        with Connection("memory://") as connection:
            for body in (1, 2):
                Producer(connection.channel()).publish(body, routing_key=consumer.queue.name)
        wait_until(lambda: consumer.bodies == [1, 2], 30)
    finally:
        greenlet.stop()
        assert greenlet.join(30)
    assert greenlet.exception is None


@pytest.mark.parametrize("name", MIXINS)
def test_a_mixin_has_kombus_names_and_two_of_ours(name):
    ours, theirs = (getattr(module, name) for module in (greenconsume.mixins, kombu_mixins))
    added = set(dir(ours)) - set(dir(theirs)) - {"__annotations__"}  # which the language adds
    assert added <= {"options", "_greenconsume"}


@pytest.mark.parametrize("mixin", MIXINS)
def test_a_consumer_that_runs_has_one_attribute_of_ours(mixin):
    ours = consumer_of(getattr(greenconsume.mixins, mixin), {})
    own = set(vars(ours))
    consumes(ours)
    # kombu's cached properties are kept on an instance as well.
    assert set(vars(ours)) - own == {"_greenconsume", "restart_limit"}


@pytest.mark.parametrize("name", [*OWN, *OF_NO_PRODUCER])
@pytest.mark.parametrize("module", [greenconsume.mixins, kombu_mixins], ids=["ours", "adapted"])
def test_a_name_of_the_users_means_nothing_to_us(module, name):
    """HAZARDS row 32: such a class failed, or silently received nothing."""
    for attributes in shapes_of(name):
        consumes(consumer_of(module.ConsumerMixin, dict(attributes)))


@pytest.mark.parametrize("module", [greenconsume.mixins, kombu_mixins], ids=["ours", "adapted"])
@pytest.mark.parametrize("mixin", MIXINS)
def test_all_names_at_once_mean_nothing_to_us(module, mixin):
    consumes(consumer_of(getattr(module, mixin), dict(OWN)))
    consumes(consumer_of(getattr(module, mixin), {"set_in_init": dict(OWN)}))


@pytest.mark.parametrize("module", [greenconsume.mixins, kombu_mixins], ids=["ours", "adapted"])
def test_all_names_at_once_mean_nothing_to_a_runtime_that_shows_and_steers(module):
    consumer = consumer_of(module.ConsumerMixin, {**OWN, **OF_NO_PRODUCER})
    runtime = Runtime("memory://")
    (child,) = runtime.spawn(consumer)
    with runtime:
        control = runtime.control
        control.watch()
        control.pause(child.name)
        wait_until(lambda: child.state is ConsumerState.PAUSED)
        assert [str(each.state) for each in control.status().consumers] == ["paused"]
        control.resume(child.name)
        wait_until(lambda: child.state is ConsumerState.CONSUMING)
        control.restart_consumer(child.name)
        wait_until(lambda: child.restart_count == 1 and child.state is ConsumerState.CONSUMING)
        assert control.handlers_of(child.name) == ()
        with Connection("memory://") as connection:
            Producer(connection.channel()).publish(1, routing_key=consumer.queue.name)
        wait_until(lambda: consumer.bodies == [1])


@pytest.mark.parametrize("concurrency", ["4", 0, -1, None])
def test_a_concurrency_of_the_users_is_his(concurrency):
    consumes(consumer_of(greenconsume.mixins.ConsumerMixin, {"concurrency": concurrency}))


@pytest.mark.parametrize("module", [greenconsume.mixins, kombu_mixins], ids=["ours", "adapted"])
def test_options_of_ours_count_on_a_class_of_kombus_as_well(module):
    options = ConsumerOptions(auto_settle=True, concurrency=2)
    consumer = consumer_of(module.ConsumerMixin, {"options": options})
    settled = []
    type(consumer).on_task = lambda self, body, message: settled.append((body, message))
    greenlet = spawn(consumer)
    assert greenlet.ready.wait(30)
    with Connection("memory://") as connection:
        Producer(connection.channel()).publish(1, routing_key=consumer.queue.name)
    wait_until(lambda: settled and settled[0][1].acknowledged)
    greenlet.stop()
    assert greenlet.join(30)
