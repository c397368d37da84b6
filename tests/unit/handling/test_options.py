"""Tests options: a consumer's own, else its runtime's, else the defaults; and how they are checked."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from types import SimpleNamespace
from typing import Any

import pytest

from greenconsume.consuming.engine import ensure_engine
from greenconsume.errors import HandlerTimeout, InvalidConsumerError, InvalidOptionsError
from greenconsume.failures.policies import ByError, FailurePolicy, Reject, Requeue, each_policy
from greenconsume.handling import settings
from greenconsume.handling.declaring import UNSET
from greenconsume.handling.options import OPTIONS, ConsumerOptions
from greenconsume.handling.settings import Settings, resolve
from greenconsume.handling.shared import Shared
from greenconsume.handling.slots import Slots
from greenconsume.links.pool import LinkPool
from greenconsume.mixins import ConsumerMixin
from greenconsume.stopping import Rungs
from tests.options import settings_of


def consumer(around: dict[str, Any] | None = None, **options: Any) -> Any:
    """An instance of a class that has these options, in a runtime that has others."""
    kind = type("Orders", (ConsumerMixin,), {"options": ConsumerOptions(**options)})
    made = kind()
    engine = ensure_engine(made)
    engine.life.name = "orders"
    engine.surround(ConsumerOptions(**(around or {})))
    return made


def test_the_defaults_are_kombus_where_kombu_has_them():
    """Callbacks run inline, without a timeout, and settle their messages themselves."""
    found = settings_of(consumer())
    assert (found.concurrency, found.partition, found.handler_timeout) == (None, None, None)
    assert found.auto_settle is False
    assert found.on_error == Requeue(1.0)
    assert (found.drain_timeout, found.cancel_timeout) == (30.0, 5.0)
    assert found.settle_deadline == 1800.0


def test_a_consumer_goes_before_its_runtime_and_that_before_the_defaults():
    shared = Shared(slots=Slots(5))
    made = consumer({"concurrency": 10, "drain_timeout": 1.0, "on_error": Reject()}, concurrency=3)
    ensure_engine(made).join_fleet(LinkPool(), Rungs(), shared)
    found = settings_of(made)
    assert (found.concurrency, found.drain_timeout, found.cancel_timeout) == (3, 1.0, 5.0)
    assert (found.on_error, found.shared) == (Reject(), shared)


def test_a_spawn_goes_before_its_runtime_and_after_the_class():
    class Orders:
        options = ConsumerOptions(concurrency=3)

    spawn = ConsumerOptions(concurrency=4, drain_timeout=2.0, on_error={KeyError: Reject()})
    runtime = ConsumerOptions(drain_timeout=5.0, cancel_timeout=5.5, on_error=Requeue(9))
    found = resolve("orders", Orders(), (spawn, runtime))
    assert (found.concurrency, found.drain_timeout, found.cancel_timeout) == (3, 2.0, 5.5)
    assert met_by(found.on_error, KeyError()) == Reject()
    assert met_by(found.on_error, ValueError()) == Requeue(9)


def test_consumers_of_whom_the_same_was_said_share_their_settings():
    class Orders:
        options = ConsumerOptions(concurrency=3)

    around = ConsumerOptions(drain_timeout=2.0)
    found = [settings.settings_of("orders", Orders(), (around,)) for _ in range(2)]
    assert found[0] is found[1]
    assert settings.settings_of("orders", Orders()).drain_timeout != 2.0


def test_consumers_with_a_partition_of_their_own_do_not():
    class Orders:
        def key(self, message):
            return self

        options = ConsumerOptions(concurrency=3, partition_by=key)

    orders = Orders(), Orders()
    found = [settings.settings_of("orders", each) for each in orders]
    assert [each.partition(None) for each in found] == list(orders)


def test_none_is_said():
    """So a consumer may be inline in a runtime whose others are not."""
    assert settings_of(consumer({"concurrency": 10}, concurrency=None)).concurrency is None
    assert (
        settings_of(consumer({"handler_timeout": 1.0}, handler_timeout=None)).handler_timeout
        is None
    )


def test_an_instance_may_say_otherwise_than_its_class():
    made = consumer(concurrency=3)
    made.options = ConsumerOptions(concurrency=4)
    assert settings_of(made).concurrency == 4


def test_a_plain_object_has_the_defaults():
    """What is spawned need not be a mixin."""
    assert settings_of(SimpleNamespace()) == Settings(Requeue())


class Loaded:
    @property
    def options(self) -> Any:
        raise AssertionError("a property of the user's is not to be run")


@pytest.mark.parametrize("own", [{"concurrency": 5}, None, [], "concurrency=5", 7])
def test_what_is_called_options_and_is_none_is_the_users_own(own: Any):
    assert settings_of(SimpleNamespace(options=own)) == Settings(Requeue())


def test_a_property_that_is_called_options_is_not_run():
    assert settings_of(Loaded()) == Settings(Requeue())


def test_no_settle_deadline_is_zero():
    assert settings_of(consumer(settle_deadline=0)).settle_deadline is None
    assert settings_of(consumer(settle_deadline=60)).settle_deadline == 60.0


def test_options_show_what_was_said_and_no_more():
    assert repr(ConsumerOptions(concurrency=5)) == "ConsumerOptions(concurrency=5)"
    assert ConsumerOptions(concurrency=5).said() == {"concurrency": 5}
    assert ConsumerOptions().concurrency is UNSET
    assert ConsumerOptions().value_of("drain_timeout") == 30.0


def test_options_do_not_change():
    with pytest.raises(FrozenInstanceError):
        ConsumerOptions().concurrency = 5  # type: ignore[misc]


def test_every_option_is_declared_once_with_all_that_is_said_of_it():
    assert list(OPTIONS) == [field.name for field in fields(ConsumerOptions)]
    for name, declared in OPTIONS.items():
        assert declared.name == name
        declared.kind.check(name, declared.default)
        assert f"{name}: {declared.doc}" in " ".join((ConsumerOptions.__doc__ or "").split())
        assert declared.default_text


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"concurrency": 0}, "concurrency must be 1 or more, or None .* inline, not 0"),
        ({"concurrency": "5"}, "concurrency must be 1 or more, .* not '5'"),
        ({"concurrency": 2.5}, "concurrency must be 1 or more, .* not 2.5"),
        ({"concurrency": True}, "concurrency must be 1 or more, .* not True"),
        ({"handler_timeout": 0}, "handler_timeout must be more than 0 seconds, or None, not 0"),
        ({"handler_timeout": "1"}, "handler_timeout must be more than 0 seconds, or None, not '1'"),
        ({"handler_timeout": float("nan")}, "handler_timeout must be more than 0 seconds"),
        ({"drain_timeout": -1}, "drain_timeout must be 0 seconds or more, not -1"),
        ({"cancel_timeout": True}, "cancel_timeout must be 0 seconds or more, not True"),
        ({"settle_deadline": -1}, "settle_deadline must be 0 seconds or more, not -1"),
        (
            {"partition_by": 7, "concurrency": 2},
            "partition_by must be the name of a header, .* not 7",
        ),
        ({"on_error": Reject}, r"on_error is the class Reject, not a policy: write Reject\(\)"),
        ({"on_error": "reject"}, "on_error is 'reject', which is no policy: write Requeue"),
        ({"on_error": lambda self, exc: None}, "on_error is <function .*>, which is no policy"),
        ({"auto_settle": "yes"}, "auto_settle must be True or False, not 'yes'"),
        ({"kill_switch": True}, r"kill_switch must be KillSwitch\(…\), or None, not True"),
        ({"batch_size": 0}, "batch_size must be from 1 to 65535, or None .*, not 0"),
        ({"batch_size": 5, "partition_by": "a"}, "batch_size and partition_by do not go together"),
        ({"drain_timeout": None}, "drain_timeout must be 0 seconds or more, not None"),
        (
            {"on_error": {ValueError: Reject}},
            r"on_error for ValueError is the class Reject.*Reject\(\)",
        ),
        ({"on_error": {ValueError: 5}}, "on_error for ValueError is 5, which is no policy"),
        (
            {"on_error": {"ValueError": Reject()}},
            "on_error maps 'ValueError', which is no class of exc",
        ),
        (
            {"on_error": {ValueError(): Reject()}},
            r"on_error maps ValueError\(\), which is no class",
        ),
        (
            {"on_error": {int: Reject()}},
            "on_error maps <class 'int'>, which is no class of exceptions",
        ),
    ],
)
def test_what_makes_no_sense_is_told_where_it_is_said_with_the_option_and_the_remedy(
    attributes: dict[str, Any], message: str
):
    with pytest.raises(InvalidConsumerError, match=f"^{message}") as caught:
        ConsumerOptions(**attributes)
    assert isinstance(caught.value, InvalidOptionsError)
    assert caught.value.field in attributes
    assert caught.value.value is attributes[caught.value.field]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("around", "attributes", "message"),
    [
        ({}, {"partition_by": "customer"}, "has partition_by but no concurrency"),
        (
            {"batch_size": 5},
            {"partition_by": "a"},
            "batch_size and partition_by do not go together",
        ),
    ],
)
def test_what_makes_no_sense_together_is_told_with_the_consumer(
    around: dict[str, Any], attributes: dict[str, Any], message: str
):
    with pytest.raises(InvalidConsumerError, match=f"^orders:? .*{message}") as caught:
        settings_of(consumer(around, **attributes))
    assert "\n" not in str(caught.value)


# -- policies ---------------------------------------------------------------------------------------


class Shop(Exception):
    pass


class SoldOut(Shop):
    pass


class SoldOutForGood(SoldOut):
    pass


def met_by(policy: FailurePolicy, error: BaseException) -> FailurePolicy:
    assert isinstance(policy, ByError)
    found = policy.policy_for(error)
    return met_by(found, error) if isinstance(found, ByError) else found


def test_the_most_specific_class_of_an_error_decides():
    policy = settings_of(
        consumer(on_error={Exception: Requeue(3), Shop: Requeue(2), SoldOut: Reject()})
    ).on_error
    assert met_by(policy, SoldOutForGood()) == met_by(policy, SoldOut()) == Reject()
    assert met_by(policy, Shop()) == Requeue(2)
    assert met_by(policy, KeyError()) == Requeue(3)


def test_what_the_mapping_lacks_meets_the_default():
    policy = settings_of(consumer(on_error={Shop: Reject()})).on_error
    assert met_by(policy, KeyError()) == Requeue(1.0)
    assert met_by(policy, HandlerTimeout(1.0)) == Requeue(1.0)


def test_a_timeout_may_have_a_policy_of_its_own():
    """It is no `Exception`, so that a handler does not swallow it; a mapping may name it all the same."""
    policy = settings_of(consumer(on_error={HandlerTimeout: Reject()})).on_error
    assert met_by(policy, HandlerTimeout(1.0)) == Reject()


@pytest.mark.parametrize(
    ("error", "expected"), [(SoldOut(), Reject()), (Shop(), Requeue(2)), (KeyError(), Requeue(1.0))]
)
def test_a_consumers_mapping_falls_back_to_its_runtimes(error: Exception, expected: FailurePolicy):
    defaults = {"on_error": {Shop: Requeue(2), SoldOut: Requeue(3)}}
    assert met_by(
        settings_of(consumer(defaults, on_error={SoldOut: Reject()})).on_error, error
    ) == (expected)


def test_a_consumers_policy_goes_before_its_runtimes_mapping():
    assert settings_of(consumer({"on_error": {Shop: Reject()}}, on_error=Requeue(5))).on_error == (
        Requeue(5)
    )


def test_every_policy_of_a_mapping_is_found():
    """For what must be set up before the consumer consumes, such as queues."""
    policy = settings_of(consumer({"on_error": Reject()}, on_error={Shop: Requeue(2)})).on_error
    assert list(each_policy(policy)) == [Requeue(2), Reject()]
    assert list(each_policy(Reject())) == [Reject()]


def test_a_negative_delay_is_refused():
    with pytest.raises(ValueError, match="0 seconds or more, not -1"):
        Requeue(-1)
    with pytest.raises(ValueError, match="0 seconds or more, not nan"):
        Requeue(float("nan"))
    with pytest.raises(ValueError, match="0 seconds or more, not '1s'"):
        Requeue("1s")  # type: ignore[arg-type]


# -- partitions ---------------------------------------------------------------------------------------

MESSAGE = SimpleNamespace(delivery_info={"routing_key": "eu.de"}, headers={"customer": 7})


def second_part(message: Any) -> str:
    return str(message.delivery_info["routing_key"].split(".")[1])


def by_method(self: Any, message: Any) -> tuple[Any, ...]:
    return (type(self).__name__, message.headers["customer"])


@pytest.mark.parametrize(
    ("by", "key"),
    [
        ("routing_key", "eu.de"),
        ("customer", 7),
        ("no such header", None),
        (second_part, "de"),
        (staticmethod(second_part), "de"),
        (by_method, ("Orders", 7)),
    ],
)
def test_a_key_is_a_header_the_routing_key_or_what_a_callable_says(by: Any, key: Any):
    """A function in the class is a method, unless it takes the message alone."""
    partition = settings_of(consumer(concurrency=2, partition_by=by)).partition
    assert partition is not None
    assert partition(MESSAGE) == key
