"""Owns what the engine calls on a consumer: kombu's methods, in the order in which it calls them.

A method that is not listed here is none of the engine's business. Implemented by `mixins`, and by whatever
a user overrides of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import kombu
from kombu import Connection, Message

#: Makes a `kombu.Consumer` on the default channel.
MakeConsumer = Callable[..., kombu.Consumer]
#: Connection, channel and consumers, as kombu's context managers give them.
Context = tuple[Any, Any, Any]


class KombuConsumer(Protocol):
    """A consumer as kombu's mixins define it."""

    connection: Connection
    connect_max_retries: int | None
    should_stop: bool

    def consumer_context(self, **kwargs: object) -> AbstractContextManager[Context]: ...

    def Consumer(self) -> AbstractContextManager[Context]: ...

    def establish_connection(self) -> AbstractContextManager[Connection]: ...

    def create_connection(self) -> Connection: ...

    def on_connection_error(self, exc: BaseException, interval: float) -> None: ...

    def on_connection_revived(self) -> None: ...

    def get_consumers(self, Consumer: MakeConsumer, channel: Any) -> Iterable[Any]: ...

    def on_decode_error(self, message: Message, exc: Exception) -> None: ...

    def _consume_from(self, *consumers: object) -> AbstractContextManager[Any]: ...

    def on_iteration(self) -> None: ...

    def on_consume_end(self, connection: Connection, channel: Any) -> None: ...
