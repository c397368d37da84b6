"""Owns what the options of a consumer come to, level by level: how its handlers are to run.

The class goes before what its `spawn` said, that before its runtime, that before the default; field by
field. Called for each connection; `supervisor` calls it before the consumer starts, to find mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

from greenconsume.around import Around
from greenconsume.errors import InvalidConsumerError
from greenconsume.failures.policies import ByError, FailurePolicy
from greenconsume.handling.declaring import UNSET
from greenconsume.handling.kill_switch import KillSwitch
from greenconsume.handling.options import APART, OPTIONS, ConsumerOptions, options_of
from greenconsume.handling.pace import Rate, rate_of
from greenconsume.handling.shared import NOTHING_SHARED, Shared


@dataclass(frozen=True, slots=True)
class Settings:
    """The options by which a consumer's handlers run, resolved; see `ConsumerOptions`.

    Attributes:
        partition: The key of a message, or None where it waits for no other.
        shared: What a runtime's consumers share.
    """

    on_error: FailurePolicy
    handler_timeout: float | None = OPTIONS["handler_timeout"].default
    drain_timeout: float = OPTIONS["drain_timeout"].default
    cancel_timeout: float = OPTIONS["cancel_timeout"].default
    auto_settle: bool = OPTIONS["auto_settle"].default
    settle_deadline: float | None = OPTIONS["settle_deadline"].default
    concurrency: int | None = OPTIONS["concurrency"].default
    partition: Callable[[Any], Hashable] | None = None
    batch_size: int | None = OPTIONS["batch_size"].default
    batch_timeout: float = OPTIONS["batch_timeout"].default
    kill_switch: KillSwitch | None = OPTIONS["kill_switch"].default
    rate: Rate | None = None
    around: tuple[Around, ...] = ()
    shared: Shared = NOTHING_SHARED


#: What was said last, and the settings that it came to.
_last: tuple[tuple[object, ...], Settings] = ((), Settings(OPTIONS["on_error"].default))


def settings_of(
    name: str,
    consumer: object,
    around: Sequence[ConsumerOptions] = (),
    shared: Shared | None = None,
) -> Settings:
    """Return what `resolve` does: the same object for all consumers of whom the same was said.

    It is asked for three times in each start, of thousands alike one after the other.
    """
    global _last
    said = (options_of(consumer), *around, shared)
    if len(said) == len(_last[0]) and all(map(is_, said, _last[0])):
        return _last[1]
    settings = resolve(name, consumer, around, shared)
    if settings.partition is None:  # else it may be bound to this consumer
        _last = (said, settings)
    return settings


def resolve(
    name: str,
    consumer: object,
    around: Sequence[ConsumerOptions] = (),
    shared: Shared | None = None,
) -> Settings:
    """Return the settings of a consumer.

    Args:
        name: The consumer's.
        consumer: Whose `options` go before all others, if it has some.
        around: What its `spawn` and its runtime said, in this order.
        shared: As in `Settings`.

    Raises:
        InvalidConsumerError: Two of the options cannot be combined.
    """
    own = options_of(consumer)
    levels = (own, *around) if own is not None else tuple(around)
    said = {option: _first(levels, option) for option in OPTIONS}
    batch_size, by = said["batch_size"], said.pop("partition_by")
    if batch_size is not None:
        said["concurrency"] = said["concurrency"] or 1
        if by is not None:
            raise InvalidConsumerError(f"{name}: {APART}")
    if by is not None and said["concurrency"] is None:
        raise InvalidConsumerError(
            f"{name} has partition_by but no concurrency: inline everything is in order anyway"
        )
    said["on_error"] = _policy(levels)
    said["around"] = _around(levels)
    said["rate"] = rate_of(said["rate"]) if said["rate"] is not None else None
    said["settle_deadline"] = said["settle_deadline"] or None
    return Settings(partition=_partition(by, consumer), shared=shared or NOTHING_SHARED, **said)


def _first(levels: Sequence[ConsumerOptions], option: str) -> Any:
    values = (getattr(level, option) for level in levels)
    said = (value for value in values if value is not UNSET)
    return next(said, OPTIONS[option].default)


def _policy(levels: Sequence[ConsumerOptions]) -> FailurePolicy:
    policy: FailurePolicy = OPTIONS["on_error"].default
    for level in reversed(levels):
        on_error = level.on_error
        if isinstance(on_error, Mapping):
            policy = ByError(on_error, policy)  # what the mapping lacks meets the next level's
        elif on_error is not UNSET:
            policy = on_error
    return policy


def _around(levels: Sequence[ConsumerOptions]) -> tuple[Around, ...]:
    """Return what all levels say, that of the most general outermost."""
    said = (level.around for level in reversed(levels))
    return tuple(each for around in said if around is not UNSET for each in around)


def _partition(by: Any, consumer: object) -> Callable[[Any], Hashable] | None:
    if by is None:
        return None
    if by == "routing_key":
        return lambda message: message.delivery_info.get("routing_key")
    if isinstance(by, str):
        return lambda message: message.headers.get(by)
    bound: Callable[[Any], Hashable] = by.__get__(consumer) if _is_method(by) else by
    return bound


def _is_method(by: Any) -> bool:
    """Return whether it is a function that was written as a method: it takes the consumer and the message."""
    code = getattr(by, "__code__", None)
    if code is None or hasattr(by, "__self__"):
        return False
    return bool(code.co_argcount - len(by.__defaults__ or ()) == 2)
