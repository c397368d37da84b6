"""Owns how a plain `kombu.mixins` consumer becomes one of ours: its class is replaced, in place.

Called by `greenlets` for everything that is spawned. A class of ours passes unchanged.
"""

from __future__ import annotations

from typing import Any

from kombu import mixins as kombu_mixins

from greenconsume.errors import InvalidConsumerError
from greenconsume.lifecycle import lifecycle_of
from greenconsume.mixins import ConsumerMixin, ConsumerProducerMixin


def adapt(consumer: Any) -> Any:
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
        consumer.__class__ = _adapted(type(consumer))
        if stopped:
            lifecycle_of(consumer).stop.set("should_stop")
    return consumer


_adapted_classes: dict[type, type] = {}


def _adapted(cls: type) -> type:
    """Return a subclass of `cls` that takes from us what `cls` takes from kombu."""
    if cls not in _adapted_classes:
        ours: dict[str, Any] = {}
        for mixin in (ConsumerMixin, ConsumerProducerMixin):
            kombus = getattr(kombu_mixins, mixin.__name__)
            if issubclass(cls, kombus):
                ours.update(_replacements(cls, vars(mixin)))
        _adapted_classes[cls] = type(cls.__name__, (cls,), {**ours, "__module__": cls.__module__})
    return _adapted_classes[cls]


def _replacements(cls: type, names: Any) -> dict[str, Any]:
    skipped = {"__dict__", "__weakref__", "__module__", "__doc__", "__annotations__"}
    return {
        name: value
        for name, value in names.items()
        if name not in skipped and _owner_of(cls, name) in _KOMBUS
    }


#: Where a name comes from that a user's class did not define.
_KOMBUS = (None, kombu_mixins.ConsumerMixin, kombu_mixins.ConsumerProducerMixin)


def _owner_of(cls: type, name: str) -> type | None:
    return next((base for base in cls.__mro__ if name in vars(base)), None)
