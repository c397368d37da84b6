"""Owns how a plain `kombu.mixins` consumer becomes one of ours: its class is replaced, in place.

Called by `greenlet` for everything that is spawned. A class of ours passes unchanged.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

from kombu import mixins as kombu_mixins

from greenconsume.consuming.engine import ensure_lifecycle
from greenconsume.errors import InvalidConsumerError
from greenconsume.mixins import ConsumerMixin, ConsumerProducerMixin

_adapted_classes: dict[type, type] = {}


class _Unannounced(kombu_mixins.ConsumerMixin):  # type: ignore[misc]  # kombu is untyped
    """Keeps the `__init_subclass__` of a class from being called for the one that is made of it here.

    It derives from kombu's, whose memory layout every adapted class has.
    """

    def __init_subclass__(cls, **_options: object) -> None:
        pass


def adapt(consumer: object) -> Any:
    """Make a plain `kombu.mixins` instance behave as ours, in place; return it.

    What its class took from kombu is replaced, what it defines itself stays.

    Raises:
        InvalidConsumerError: It is no consumer.
    """
    if isinstance(consumer, ConsumerMixin):
        return consumer
    if not callable(getattr(consumer, "get_consumers", None)) or not callable(
        getattr(consumer, "run", None)
    ):
        raise InvalidConsumerError(
            f"{consumer!r} is no consumer: subclass greenconsume.ConsumerMixin and define get_consumers"
        )
    if isinstance(consumer, kombu_mixins.ConsumerMixin):
        stopped = vars(consumer).pop("should_stop", False)
        # Not by a `__setattr__` of the class's own, which may refuse it.
        object.__setattr__(consumer, "__class__", _adapted(type(consumer)))
        if stopped:
            ensure_lifecycle(consumer).stop.set("should_stop")
    return consumer


def _adapted(cls: type) -> type:
    """Return a subclass of `cls` that takes from us what `cls` takes from kombu.

    Ours is a subclass of kombu's, and so comes before it and after `cls`, also for `super()`.
    """
    if cls not in _adapted_classes:
        produces = issubclass(cls, kombu_mixins.ConsumerProducerMixin)
        ours = ConsumerProducerMixin if produces else ConsumerMixin
        same = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        # By `type` itself: a metaclass of the user's would take it for one more class of his. An abstract
        # class keeps what `isinstance` was asked about it: one without a place of its own shares its base's.
        new: Any = ABCMeta.__new__ if isinstance(cls, ABCMeta) else type.__new__
        _adapted_classes[cls] = new(type(cls), cls.__name__, (_Unannounced, cls, ours), same)
    return _adapted_classes[cls]
