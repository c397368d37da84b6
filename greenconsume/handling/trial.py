"""Owns how a message is found that has the broker close its consumer's connection, and what is known of it.

Its handler may have ended before the broker answers: it publishes what no broker takes, acknowledges, and
returns. The broker delivers the message again, as its ack came too late. So while a consumer is kept apart,
each message that comes again is handled alone, and then each channel is asked for a sign of life: if the
broker has closed the connection, it was this message. It must never settle anything. Called by `boundary`.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import amqp
from kombu import Message

from greenconsume.amqp.blame import LinkLostError, is_accusation
from greenconsume.errors import PoisonMessageError
from greenconsume.links.quarantine import Quarantine

#: What brokers change in a message from delivery to delivery.
_COUNTS = ("x-delivery-count", "x-acquired-count")


def sentence_on(message: Message, name: str, quarantine: Quarantine) -> PoisonMessageError | None:
    """Return the error that a message has failed with already, when it closed its link. Never switches."""
    if not quarantine.has_poison:
        return None
    found = quarantine.sentence(_key_of(message))
    if found is None:
        return None
    error, count = found
    failure = PoisonMessageError(name, error, count)
    failure.__cause__ = error
    return failure


def handle_alone(message: Message, quarantine: Quarantine, handle: Callable[[], None]) -> None:
    """Handle a message while nothing else runs, and note if the broker closed the connection for it.

    Switches: yes, until the broker has answered on each channel of the consumer.
    """
    session, key = getattr(message.channel, "connection", None), _key_of(message)
    handle()
    error = _accusation_in(session)
    if error is not None:
        quarantine.convict(key, error)


def _accusation_in(session: Any) -> BaseException | None:
    """Return what the broker closed the connection with; None if it answers, or went otherwise."""
    try:
        for channel in list(session.channels.values()):
            channel.basic_qos(
                0, channel.prefetch_count, False
            )  # as it is: an answer is all that is wanted
    except (amqp.AMQPError, OSError) as exc:  # the consumer meets it where it waits for messages
        error = exc.__cause__ if isinstance(exc, LinkLostError) else exc
        is_for_all = isinstance(error, amqp.ConnectionError)
        return error if error is not None and is_for_all and is_accusation(error) else None
    return None


def _key_of(message: Message) -> str:
    """Return a key for a message, of all that its publisher said: equal messages have equal keys."""
    properties = dict(message.properties)
    headers = properties.pop("application_headers", None) or {}
    info = message.delivery_info
    made = (
        info.get("exchange"),
        info.get("routing_key"),
        sorted(properties.items(), key=str),
        sorted(((key, headers[key]) for key in headers if key not in _COUNTS), key=str),
        message.body,
    )
    return sha256(repr(made).encode("utf-8", "surrogatepass")).hexdigest()
