"""Owns how a message is decoded, as kombu does it, sooner for plain JSON, and handed to the user's callbacks.

Called by `boundary` and `batches`.
"""

from __future__ import annotations

import json
from json.scanner import make_scanner
from typing import Any

from kombu import Consumer, Message, serialization
from kombu.utils import json as kombu_json

#: What `json.loads` calls in the end; without white space around, nothing else is left of it.
_scan: Any = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]  # typeshed is mistaken


def receive(consumer: Consumer, message: Message) -> None:
    """Have a `kombu.Consumer` handle a message, as its own `_receive_callback` does. Switches: as that."""
    if type(consumer) is not Consumer and _is_received_otherwise(consumer, message):
        return
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
    callbacks = consumer.callbacks
    if callbacks and type(consumer) is Consumer and "receive" not in vars(consumer):
        for callback in callbacks:  # what `receive` does, without a call of it for each message
            callback(body, message)
    else:
        consumer.receive(body, message)


def _is_received_otherwise(consumer: Consumer, message: Message) -> bool:
    """Have a subclass handle a message by a `_receive_callback` of its own; return False if it has none."""
    own = getattr(type(consumer), "_receive_callback", None)
    if own is None or own is Consumer._receive_callback:
        return False
    own(consumer, message)
    return True


def decode(message: Message) -> Any:
    """Return the decoded body, as `message.decode()` does, sooner for plain JSON.

    kombu builds a decoder for each message, and calls a Python function for each object in it, to bring
    back types that it marks with "__type__". A text without that mark, nor an escape that could
    hide it, needs neither. Bytes are taken as UTF-8, as kombu takes them.
    """
    body = message.body
    if type(body) is bytes:
        try:
            body = body.decode()
        except UnicodeDecodeError:
            return message.decode()
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
        decoded, end = _scan(body, 0)
    except (ValueError, StopIteration, RecursionError):
        return message.decode()  # which says what is wrong with it in kombu's words
    if end != len(body):
        return message.decode()
    message._decoded_cache = decoded
    return decoded
