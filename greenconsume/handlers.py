"""Owns the boundary around the user's callback, and what becomes of a message whose callback failed.

Whatever a callback raises stays here (law 5): it is never taken for the broker's error. The consumer
lives on, the failure is told once with its traceback, and the message meets the consumer's policy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

import gevent
from kombu import serialization
from kombu.utils import json as kombu_json

from greenconsume.deliveries import DelayedRequeues, is_settleable
from greenconsume.events import HandlerFailed, emit


class FailurePolicy(Protocol):
    """What becomes of a message whose handler failed; `Requeue` and `Reject` are two."""

    def apply(self, message: Any, requeues: DelayedRequeues) -> str:
        """Settle `message`, which is not settled yet, and return in words what was done."""


@dataclass(frozen=True, slots=True)
class Requeue:
    """Put the message back into its queue after `delay` seconds; the default: nothing is lost.

    The delay keeps a poison message from spinning. The message stays unsettled meanwhile.

    Args:
        delay: Seconds; 0 requeues at once.

    Raises:
        ValueError: `delay` is negative.
    """

    delay: float = 1.0

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ValueError(f"Requeue(delay) must not be negative, not {self.delay!r}")

    def apply(self, message: Any, requeues: DelayedRequeues) -> str:
        """See `FailurePolicy.apply`."""
        if self.delay:
            requeues.add(message, self.delay)
            return f"requeued in {self.delay:g} s"
        message.requeue()
        return "requeued"


@dataclass(frozen=True, slots=True)
class Reject:
    """Reject the message: to its queue's dead-letter exchange, or dropped where the queue has none."""

    def apply(self, message: Any, requeues: DelayedRequeues) -> str:
        """See `FailurePolicy.apply`."""
        message.reject()
        return "rejected"


def decode(message: Any) -> Any:
    """Return the decoded body, as `message.decode()` does, sooner for plain JSON.

    kombu builds a decoder for each message, and calls a Python function for each object in it, to bring
    back types that it marks with "__type__". A text without that mark, nor an escape that could
    hide it, needs neither.
    """
    body = message.body
    if (
        message.content_type != "application/json"
        or type(body) is not str
        or not body
        or "__type__" in body
        or "\\" in body
        or (message.accept is not None and "application/json" not in message.accept)
        or serialization.registry._decoders.get("application/json") is not kombu_json.loads
        or "application/json" in serialization.registry._disabled_content_types
    ):
        return message.decode()
    try:
        decoded = message._decoded_cache = json.loads(body)
    except ValueError:
        return message.decode()  # which says what is wrong with it in kombu's words
    return decoded


class Handler:
    """What a kombu `Consumer` calls with each delivery, in the place of its own `_receive_callback`.

    Decodes and dispatches as kombu does, and lets nothing out that the callbacks raise.

    Args:
        consumer: The `kombu.Consumer` whose callbacks are run.
        name: The name of the greenconsume consumer, for the log.
        policy: What becomes of a message whose callback failed.
        requeues: Where the messages wait that go back after a delay.
        owned: Whether the greenlet is greenconsume's own. In somebody else's, what is no `Exception` (a
            kill, a `gevent.Timeout`, `SystemExit`) may be meant for their code, and passes.
    """

    __slots__ = ("_consumer", "_name", "_owned", "_policy", "_requeues")

    #: A green channel hands over its deliveries as they came.
    takes_deliveries = True

    def __init__(
        self,
        consumer: Any,
        name: str,
        policy: FailurePolicy,
        requeues: DelayedRequeues,
        owned: bool,
    ) -> None:
        self._consumer = consumer
        self._name = name
        self._policy = policy
        self._requeues = requeues
        self._owned = owned

    def __call__(self, raw: Any) -> None:
        """Handle one delivery. Switches: as the user's callbacks do."""
        to_python = getattr(self._consumer.channel, "message_to_python", None)
        message = to_python(raw) if to_python is not None else raw
        try:
            self._receive(message)
        except Exception as exc:  # the boundary: whatever the user's code raises ends here
            self._failed(message, exc)
        except BaseException as exc:
            if not self._is_the_handlers_own(exc):
                raise
            self._failed(message, exc)

    def _receive(self, message: Any) -> None:
        consumer = self._consumer
        if consumer.accept is not None:
            message.accept = consumer.accept
        if message.errors:
            message._reraise_error(consumer.on_decode_error)
            return
        if consumer.on_message:
            consumer.on_message(message)
            return
        try:
            body = decode(message)
        except Exception as exc:  # as kombu: whatever a serializer raises is a decode error
            if not consumer.on_decode_error:
                raise
            consumer.on_decode_error(message, exc)
            return
        consumer.receive(body, message)

    def _is_the_handlers_own(self, exc: BaseException) -> bool:
        if not self._owned or isinstance(exc, (KeyboardInterrupt, GeneratorExit)):
            return False
        return not getattr(gevent.getcurrent(), "killed", False)

    def _failed(self, message: Any, exc: BaseException) -> None:
        outcome = "left as the handler settled it"
        if is_settleable(message):
            outcome = self._policy.apply(message, self._requeues)
        elif not message.acknowledged:
            outcome = "lost: its consumer takes messages without acknowledging them"
        routing_key = str(message.delivery_info.get("routing_key", ""))
        emit(HandlerFailed(self._name, message.delivery_tag, routing_key, exc, outcome))
