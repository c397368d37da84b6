"""The class is the user's, however it is built: each consumes with kombu's mixins, adapted, and with ours.

The first of the ways runs without greenconsume's mixins, and shows that kombu takes such a class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from uuid import uuid4

import gevent
import kombu
import pytest
from kombu import Connection, Producer, Queue
from kombu import mixins as kombu_mixins
from kombu.utils.limits import TokenBucket

import greenconsume.mixins
from greenconsume import Runtime, spawn
from tests.waiting import wait_until

Shape = Callable[[Any], Any]
SHAPES: list[Shape] = []
T = TypeVar("T")


def shape(make: Shape) -> Shape:
    SHAPES.append(make)
    return make


class Work:
    """The work of each of the consumers; a base that knows nothing of kombu."""

    def prepare(self) -> None:
        """Set the attributes past whatever the class makes of an assignment."""
        vars(self)["connection"] = Connection("memory://")
        vars(self)["queue"] = Queue(f"q-{uuid4().hex[:10]}")
        vars(self)["bodies"] = []

    def get_consumers(self, Consumer: Any, channel: Any) -> Any:
        return [Consumer([vars(self)["queue"]], callbacks=[self.on_task])]

    def on_task(self, body: Any, message: Any) -> None:
        vars(self)["bodies"].append(body)
        message.ack()


def prepared(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
    consumer = cls(*args, **kwargs)
    Work.prepare(consumer)
    return consumer


@shape
def a_class_with_slots(mixin: Any) -> Any:
    class Slotted(Work, mixin):
        __slots__ = ("engine", "tally")

    return prepared(Slotted)


@shape
def a_dataclass_that_cannot_be_hashed(mixin: Any) -> Any:
    @dataclasses.dataclass
    class Data(Work, mixin):
        name: str = "orders"
        options: dict[str, int] = dataclasses.field(default_factory=dict)

    return prepared(Data)


@shape
def a_frozen_dataclass(mixin: Any) -> Any:
    @dataclasses.dataclass(frozen=True)
    class Frozen(Work, mixin):
        name: str = "orders"

    return prepared(Frozen)


@shape
def one_that_computes_what_it_lacks(mixin: Any) -> Any:
    class Computed(Work, mixin):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return f"the {name} of everything"

    return prepared(Computed)


@shape
def one_that_refuses_new_attributes(mixin: Any) -> Any:
    class Closed(Work, mixin):
        def __setattr__(self, name: str, value: object) -> None:
            if name != "should_stop":
                raise TypeError(f"{name} is not to be set")
            super().__setattr__(name, value)

    return prepared(Closed)


@shape
def one_that_equals_nothing_and_everything(mixin: Any) -> Any:
    class Odd(Work, mixin):
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        def __hash__(self) -> int:
            raise AssertionError("hashed")

        def __bool__(self) -> bool:
            raise AssertionError("asked whether it is true")

        def __repr__(self) -> str:
            raise AssertionError("shown")

    return prepared(Odd)


@shape
def an_empty_container(mixin: Any) -> Any:
    class Basket(Work, mixin):
        def __len__(self) -> int:
            return 0

        def __iter__(self) -> Iterator[object]:
            return iter(())

        def __contains__(self, item: object) -> bool:
            return False

        def __call__(self, *args: object) -> object:
            raise AssertionError("called")

    return prepared(Basket)


@shape
def a_list_that_consumes(mixin: Any) -> Any:
    class Items(Work, mixin, list):  # type: ignore[type-arg]
        pass

    return prepared(Items)


@shape
def a_thread_that_consumes(mixin: Any) -> Any:
    class Worker(Work, mixin, threading.Thread):
        def __init__(self) -> None:
            threading.Thread.__init__(self, name="orders", daemon=True)

    return prepared(Worker)


@shape
def a_thread_whose_init_was_never_called(mixin: Any) -> Any:
    class Worker(Work, mixin, threading.Thread):
        def __init__(self) -> None:
            self.name_of_mine = "orders"

    return prepared(Worker)


@shape
def an_abstract_base(mixin: Any) -> Any:
    class Base(mixin, ABC):
        @abstractmethod
        def handle(self, body: Any) -> None: ...

    class Concrete(Work, Base):
        def handle(self, body: Any) -> None:
            pass

    return prepared(Concrete)


@shape
def a_generic_class(mixin: Any) -> Any:
    class Typed(Work, mixin, Generic[T]):
        pass

    return prepared(Typed[int])


@shape
def a_class_whose_subclasses_have_to_say_something(mixin: Any) -> Any:
    class Base(Work, mixin):
        known: dict[str, type] = {}

        def __init_subclass__(cls, *, topic: str, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            assert topic not in cls.known
            cls.known[topic] = cls

    class Orders(Base, topic="orders"):
        pass

    return prepared(Orders)


@shape
def a_class_with_a_metaclass_of_its_own(mixin: Any) -> Any:
    known: set[str] = set()

    class Meta(type):
        def __new__(mcs, name: str, *rest: Any) -> Any:
            assert name not in known, "as in a registry of plugins"
            known.add(name)
            return super().__new__(mcs, name, *rest)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().__call__(*args, **kwargs)
            vars(made)["made_by"] = cls
            return made

    class Orders(Work, mixin, metaclass=Meta):
        pass

    return prepared(Orders)


@shape
def one_that_looks_at_its_own_class(mixin: Any) -> Any:
    class Orders(Work, mixin):
        def on_task(self, body: Any, message: Any) -> None:
            assert type(self).__name__ == "Orders"
            assert type(self).__qualname__.endswith("<locals>.Orders")
            assert type(self).__module__ == __name__
            assert isinstance(self, Orders)
            super().on_task(body, message)

    return prepared(Orders)


@shape
def one_that_cooperates(mixin: Any) -> Any:
    class Loud:
        def __init__(self, *, volume: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.volume = volume

        def run(self, *args: Any, **kwargs: Any) -> Any:
            return super().run(*args, **kwargs)  # type: ignore[misc]

        def consume(self, *args: Any, **kwargs: Any) -> Any:
            return super().consume(*args, **kwargs)  # type: ignore[misc]

        @contextlib.contextmanager
        def extra_context(self, *args: Any) -> Iterator[Any]:
            with super().extra_context(*args) as found:  # type: ignore[misc]
                yield found

    class Orders(Loud, Work, mixin):
        pass

    return prepared(Orders, volume=3)


@shape
def generated_consumers(mixin: Any) -> Any:
    class Lazy(Work, mixin):
        def get_consumers(self, Consumer: Any, channel: Any) -> Any:
            yield from super().get_consumers(Consumer, channel)

    return prepared(Lazy)


@shape
def a_tuple_of_consumers(mixin: Any) -> Any:
    class Fixed(Work, mixin):
        def get_consumers(self, *both: Any) -> Any:
            return tuple(super().get_consumers(*both))

    return prepared(Fixed)


@shape
def consumers_by_name(mixin: Any) -> Any:
    class Named(Work, mixin):
        def get_consumers(self, *both: Any) -> Any:
            return dict(zip(["orders"], super().get_consumers(*both), strict=True)).values()

    return prepared(Named)


class Sequenced:
    """Has items by their number, and no `__iter__`: Python iterates over it all the same."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __getitem__(self, at: int) -> Any:
        return self._items[at]


@shape
def a_sequence_without_iter(mixin: Any) -> Any:
    class Old(Work, mixin):
        def get_consumers(self, *both: Any) -> Any:
            return Sequenced(super().get_consumers(*both))

    return prepared(Old)


@shape
def a_context_beside_the_consumer(mixin: Any) -> Any:
    class Watched(Work, mixin):
        def get_consumers(self, *both: Any) -> Any:
            return [contextlib.nullcontext("a lock"), *super().get_consumers(*both)]

    return prepared(Watched)


@shape
def a_context_around_the_consumer(mixin: Any) -> Any:
    class Around(Work, mixin):
        def get_consumers(self, *both: Any) -> Any:
            (consumer,) = super().get_consumers(*both)

            @contextlib.contextmanager
            def around() -> Iterator[Any]:
                with consumer:
                    yield consumer

            return [around()]

    return prepared(Around)


@shape
def a_consumer_of_a_class_of_its_own(mixin: Any) -> Any:
    class Checking(kombu.Consumer):
        def receive(self, body: Any, message: Any) -> None:
            super().receive(body, message)

    class Own(Work, mixin):
        def get_consumers(self, Consumer: Any, channel: Any) -> Any:
            return [Checking(channel, [vars(self)["queue"]], callbacks=[self.on_task])]

    return prepared(Own)


@shape
def a_consumer_that_looks_at_raw_messages(mixin: Any) -> Any:
    class Raw(kombu.Consumer):
        def _receive_callback(self, message: Any) -> None:
            super()._receive_callback(message)
            seen.append(message)

    seen: list[Any] = []

    class Own(Work, mixin):
        def get_consumers(self, Consumer: Any, channel: Any) -> Any:
            return [Raw(channel, [vars(self)["queue"]], callbacks=[self.on_task])]

        def on_consume_end(self, connection: Any, channel: Any) -> None:
            assert len(seen) >= 2

    return prepared(Own)


@shape
def hooks_with_other_parameters(mixin: Any) -> Any:
    class Hooked(Work, mixin):
        def on_consume_ready(self, conn: Any, chan: Any, *rest: Any, wakeup: bool = False) -> None:
            assert wakeup is False

        def on_consume_end(self, *args: Any) -> None:
            assert len(args) == 2

        def on_connection_error(self, error: Any, seconds: Any = None, *more: Any) -> None:
            pass

        def on_connection_revived(self, attempt: int = 1) -> None:
            assert attempt == 1

        def on_decode_error(self, m: Any, e: Any) -> None:
            pass

        def extra_context(self, conn: Any, chan: Any, more: Any = None) -> Any:
            return contextlib.nullcontext()

        @staticmethod
        def on_iteration() -> None:
            pass

        @classmethod
        def create_connection(cls) -> Any:
            return Connection("memory://")

    return prepared(Hooked)


@shape
def a_stop_that_is_computed(mixin: Any) -> Any:
    class Computed(Work, mixin):
        stopped = False

        @property
        def should_stop(self) -> bool:
            return self.stopped

        @should_stop.setter
        def should_stop(self, value: bool) -> None:
            vars(self)["stopped"] = value

    return prepared(Computed)


class Stage(enum.Enum):
    RUNS = 0
    ENDS = 1

    def __bool__(self) -> bool:
        return self is Stage.ENDS


@shape
def a_stop_that_is_no_bool(mixin: Any) -> Any:
    class Staged(Work, mixin):
        should_stop = Stage.RUNS

    return prepared(Staged)


@shape
def a_connection_made_each_time(mixin: Any) -> Any:
    class Fresh(Work, mixin):
        @property
        def connection(self) -> Any:
            return Connection("memory://")

    return prepared(Fresh)


@shape
def limits_and_errors_of_its_own(mixin: Any) -> Any:
    class Own(Work, mixin):
        restart_limit = TokenBucket(100)
        connection_errors = (OSError,)
        channel_errors = ()
        connect_max_retries = 3

    return prepared(Own)


def publish(consumer: Any, *bodies: Any) -> None:
    with Connection("memory://") as connection:
        channel = connection.channel()
        queue = vars(consumer)["queue"]
        queue(channel).declare()
        for body in bodies:
            Producer(channel).publish(body, routing_key=queue.name)


def run_by_kombu(consumer: Any) -> Callable[[], bool]:
    """Run a consumer without greenconsume; return what stops it, and tells whether it ended well."""
    greenlet = gevent.spawn(consumer.run)

    def stop() -> bool:
        try:
            consumer.should_stop = True
        except AttributeError:  # frozen
            object.__setattr__(consumer, "should_stop", True)
        publish(consumer, "for kombu to look whether it stops")
        greenlet.join(30)
        return bool(greenlet.successful())

    return stop


def run_by_us(consumer: Any) -> Callable[[], bool]:
    greenlet = spawn(consumer)

    def stop() -> bool:
        greenlet.stop()
        return greenlet.join(30) and greenlet.exception is None

    return stop


def run_by_a_runtime(consumer: Any) -> Callable[[], bool]:
    runtime = Runtime()
    (child,) = runtime.spawn(consumer)
    runtime.start()

    def stop() -> bool:
        runtime.control.status()
        runtime.stop()
        return runtime.join(30) and child.error is None

    return stop


WAYS = {
    "kombu": (kombu_mixins, run_by_kombu),
    "adapted": (kombu_mixins, run_by_us),
    "ours": (greenconsume.mixins, run_by_us),
    "runtime": (greenconsume.mixins, run_by_a_runtime),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
def test_a_class_consumes_however_it_is_built(make: Shape, way: str) -> None:
    module, run = WAYS[way]
    consumer = make(module.ConsumerProducerMixin)
    bodies = vars(consumer)["bodies"]
    publish(consumer, 1, 2)
    stop = run(consumer)
    wait_until(lambda: bodies[:2] == [1, 2], 30)
    assert stop()
