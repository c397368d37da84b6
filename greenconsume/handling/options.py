"""Owns how a consumer's handlers are to run: what its attributes say, else its runtime, else the defaults.

Read anew for each connection, and checked here, where they enter; `supervisor` has them checked before
the consumer starts. Called by `handlers` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from greenconsume.errors import InvalidConsumerError
from greenconsume.failures.policies import ByError, FailurePolicy, Requeue
from greenconsume.handling.pool import Slots
from greenconsume.lifecycle import lifecycle_of

DRAIN_TIMEOUT = 30.0
CANCEL_TIMEOUT = 5.0
BATCH_TIMEOUT = 1.0
#: The largest prefetch that AMQP can say; no more than that can be gathered.
MAX_PREFETCH = 65535
#: RabbitMQ's `consumer_timeout`: it closes the channel of a delivery that is unsettled for longer.
SETTLE_DEADLINE = 1800.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a consumer's handlers run; see `ConsumerMixin`.

    Attributes:
        partition: The key of a message, or None where it waits for no other.
        slots: The places that a runtime's consumers share, if it has `max_handlers`.
    """

    on_error: FailurePolicy
    handler_timeout: float | None = None
    drain_timeout: float = DRAIN_TIMEOUT
    cancel_timeout: float = CANCEL_TIMEOUT
    auto_settle: bool = False
    settle_deadline: float | None = SETTLE_DEADLINE
    concurrency: int | None = None
    partition: Callable[[Any], Hashable] | None = None
    batch_size: int | None = None
    batch_timeout: float = BATCH_TIMEOUT
    slots: Slots | None = None


def settings_of(consumer: Any) -> Settings:
    """Return the settings of `consumer`.

    Raises:
        InvalidConsumerError: An attribute makes no sense; the message says which, and what to write.
    """
    given = _Given(consumer)
    concurrency, batch_size = given.count("concurrency"), _batch_size(given)
    if batch_size is not None:
        concurrency = concurrency or 1
    return Settings(
        on_error=_policy(given),
        concurrency=concurrency,
        partition=_partition(given, concurrency),
        batch_size=batch_size,
        batch_timeout=given.seconds("batch_timeout", BATCH_TIMEOUT) or 0.0,
        handler_timeout=given.seconds("handler_timeout", None, positive=True),
        auto_settle=bool(given.value("auto_settle", False)),
        drain_timeout=given.seconds("drain_timeout", DRAIN_TIMEOUT) or 0.0,
        cancel_timeout=given.seconds("cancel_timeout", CANCEL_TIMEOUT) or 0.0,
        settle_deadline=given.seconds("settle_deadline", SETTLE_DEADLINE) or None,
        slots=given.defaults.get("slots"),
    )


def check_policy(on_error: Any, whose: str) -> None:
    """Refuse what can be no `on_error`.

    Raises:
        InvalidConsumerError: It is neither a policy nor a mapping from exception classes to policies.
    """
    if not isinstance(on_error, Mapping):
        _check_one(on_error, f"{whose}: on_error")
        return
    for kind, policy in on_error.items():
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise InvalidConsumerError(
                f"{whose}: on_error maps {kind!r}, which is no class of exceptions: "
                "write it as {ValueError: Reject()}"
            )
        _check_one(policy, f"{whose}: on_error for {kind.__name__}")


def _check_one(policy: Any, what: str) -> None:
    if isinstance(policy, type):
        name = policy.__name__
        raise InvalidConsumerError(f"{what} is the class {name}, not a policy: write {name}()")
    if not callable(getattr(policy, "apply", None)):
        raise InvalidConsumerError(
            f"{what} is {policy!r}, which is no policy: write Requeue(delay=1.0), Reject() or another"
        )


class _Given:
    """What a consumer's attributes say, and its runtime where they say nothing."""

    def __init__(self, consumer: Any) -> None:
        life = lifecycle_of(consumer)
        self.name, self.defaults = life.name, life.defaults
        self._consumer = consumer

    def own(self, name: str) -> Any:
        return getattr(self._consumer, name, None)

    def value(self, name: str, default: Any) -> Any:
        own = self.own(name)
        return self.defaults.get(name, default) if own is None else own

    def count(self, name: str) -> int | None:
        value = self.value(name, None)
        if value is None or (type(value) is int and value >= 1):
            return value
        raise InvalidConsumerError(
            f"{self.name}: {name} must be 1 or more, or None for callbacks that run inline, not {value!r}"
        )

    def seconds(self, name: str, default: float | None, positive: bool = False) -> float | None:
        value = self.value(name, default)
        if value is None:
            return None
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not (is_number and (value > 0 if positive else value >= 0)):
            bound = "more than 0 seconds, or None" if positive else "0 seconds or more"
            raise InvalidConsumerError(f"{self.name}: {name} must be {bound}, not {value!r}")
        return float(value)


def _policy(given: _Given) -> FailurePolicy:
    policy: FailurePolicy = Requeue()
    for on_error in (given.defaults.get("on_error"), given.own("on_error")):
        if on_error is not None:
            check_policy(on_error, given.name)
            policy = ByError(on_error, policy) if isinstance(on_error, Mapping) else on_error
    return policy


def _batch_size(given: _Given) -> int | None:
    size = given.value("batch_size", None)
    if size is None:
        return None
    if not (type(size) is int and 1 <= size <= MAX_PREFETCH):
        raise InvalidConsumerError(
            f"{given.name}: batch_size must be from 1 to {MAX_PREFETCH}, or None for callbacks that are "
            f"given one message, not {size!r}"
        )
    if given.value("partition_by", None) is not None:
        raise InvalidConsumerError(
            f"{given.name} has batch_size and partition_by, which do not go together: without partition_by "
            "and with concurrency = 1 batches are handled one after the other, in order"
        )
    return size


def _partition(given: _Given, concurrency: int | None) -> Callable[[Any], Hashable] | None:
    by = given.value("partition_by", None)
    if by is None:
        return None
    if concurrency is None:
        raise InvalidConsumerError(
            f"{given.name} has partition_by but no concurrency: inline everything is in order anyway"
        )
    if callable(by):
        return _unbound(by)
    if not isinstance(by, str):
        raise InvalidConsumerError(
            f"{given.name}: partition_by must be the name of a header, 'routing_key' or a callable, "
            f"not {by!r}"
        )
    if by == "routing_key":
        return lambda message: message.delivery_info.get("routing_key")
    return lambda message: message.headers.get(by)


def _unbound(by: Any) -> Callable[[Any], Hashable]:
    """Return what a class says: a method, or a function that takes the message alone."""
    function: Any = getattr(by, "__func__", None)
    code = getattr(function, "__code__", None)
    takes_message_alone = code is not None and code.co_argcount == 1
    chosen: Callable[[Any], Hashable] = function if takes_message_alone else by
    return chosen
