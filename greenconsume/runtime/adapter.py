"""Owns how a plain `kombu.mixins` consumer becomes one of ours: its class is replaced, in place.

Called by `greenlets` for everything that is spawned. A class of ours passes unchanged.
"""

from __future__ import annotations

from typing import Any

from kombu import mixins as kombu_mixins

from greenconsume.errors import InvalidConsumerError
from greenconsume.lifecycle import lifecycle_of
from greenconsume.mixins import ConsumerMixin, ConsumerProducerMixin


def adapt(consumer: object) -> Any:
    """Make a plain `kombu.mixins` instance behave as ours, in place; return it.

    What its class took from kombu is replaced, what it defines itself stays.

    Raises:
        InvalidConsumerError: It is no consumer.
    """
    if isinstance(consumer, (ConsumerMixin, _Consumer)):
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


def _in_place_of(theirs: type, ours: type) -> type:
    """Return a subclass of kombu's mixin with all that ours has.

    As a further base of the user's class it comes after it and before kombu's, also for `super()`.
    """
    skipped = {"__dict__", "__weakref__", "__module__", "__doc__", "__annotations__"}
    names = {name: value for name, value in vars(ours).items() if name not in skipped}
    return type(ours.__name__, (theirs,), names)


_Consumer = _in_place_of(kombu_mixins.ConsumerMixin, ConsumerMixin)
_ConsumerProducer = _in_place_of(kombu_mixins.ConsumerProducerMixin, ConsumerProducerMixin)

_adapted_classes: dict[type, type] = {}


def _adapted(cls: type) -> type:
    """Return a subclass of `cls` that takes from us what `cls` takes from kombu."""
    if cls not in _adapted_classes:
        produces = issubclass(cls, kombu_mixins.ConsumerProducerMixin)
        ours = (_ConsumerProducer, _Consumer) if produces else (_Consumer,)
        _adapted_classes[cls] = type(cls.__name__, (cls, *ours), {"__module__": cls.__module__})
    return _adapted_classes[cls]
