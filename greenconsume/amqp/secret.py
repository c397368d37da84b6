"""Owns a link's secret that expires (an OAuth2 token): asks for the next, and hands it to the broker in time.

RabbitMQ refuses all that a link does after its token's end, and a link carries a thousand consumers. One
greenlet for each link whose secret can expire runs `keep_current`; it is the one that calls the user's
credential provider, never the reader. A token may be too large for a frame, which is said in words. Called by
`transport`, and by `link` where a handshake has failed.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from amqp.exceptions import AccessRefused, ConnectionForced, RecoverableConnectionError
from amqp.serialization import dumps
from gevent.event import Event

from greenconsume.events import SecretUpdated, emit
from greenconsume.stopping import Deadline, wait

UPDATE, UPDATED = (10, 70), (10, 71)

#: The next token is asked for when so much of the life of one has passed.
_SHARE = 0.75
#: Seconds to the next attempt where none, or the same token again, was to be had.
_RETRY = 5.0
#: The largest frame that RabbitMQ takes before one is agreed, up to 4.0, and what of it is no argument. It
#: ends the connection without a word where it is more.
_FIRST_FRAME, _OVERHEAD = 4096, 12


@dataclass(frozen=True, slots=True)
class SecretSource:
    """The source of a link's secrets.

    Args:
        first: The secret that the link is opened with.
        ask: Returns the next one; may switch, and may raise.
        interval: Seconds between two secrets, for those that do not say when they end; None: they do not.
    """

    first: str
    ask: Callable[[], str]
    interval: float | None = None

    def __post_init__(self) -> None:
        """Check the interval, which is the user's.

        Raises:
            ValueError: It is not above 0.
        """
        if self.interval is not None and not self.interval > 0:
            raise ValueError(f"secret_interval must be above 0 seconds, not {self.interval!r}")

    def delay_after(self, secret: str) -> float | None:
        """Return the seconds after which the next secret is to be asked for; None: never."""
        end = end_of(secret)
        if end is None:
            return self.interval
        return max((end - time.time()) * _SHARE, 0.0)


class Secretive(Protocol):
    """A link, as the update of its secret sees it."""

    uri: str
    call_timeout: float
    over: Event

    def listen(self, sig: tuple[int, int], callback: Callable[[], object]) -> None:
        """Have `callback` called for each such method of the broker's."""
        ...

    def write_method(self, channel: int, sig: tuple[int, int], args: bytes = b"") -> None:
        """Queue one method."""
        ...

    def fail(self, error: BaseException) -> None:
        """End the link."""
        ...


def end_of(secret: str) -> float | None:
    """Return when a token ends, in seconds since the epoch; None where it is no JWT, or never ends."""
    parts = secret.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        end: Any = claims["exp"]
        return float(end)
    except (ValueError, TypeError, KeyError):
        return None


def keep_current(link: Secretive, source: SecretSource) -> None:
    """Hand the broker one secret after the other until the link is over. Switches: yes."""
    taken = Event()
    link.listen(UPDATED, taken.set)
    link.over.rawlink(lambda _: taken.set())  # nobody answers any more
    secret, delay, fits = source.first, source.delay_after(source.first), True
    while delay is not None and not link.over.wait(delay):
        try:
            following = source.ask()
        except Exception as exc:  # the user's provider: whatever it raises, the link has time left
            emit(SecretUpdated(link.uri, exc, _RETRY))
            delay = _RETRY
            continue
        delay = source.delay_after(following)
        if following == secret and end_of(secret) is not None:
            delay = _RETRY  # a provider that keeps its token until the end
            continue
        try:
            if not _hand_over(link, following, taken):
                return
            secret, fits = following, True
        except ValueError as exc:
            # It is larger than a frame; the one that the broker has is good until its end.
            if fits:
                emit(SecretUpdated(link.uri, exc, _RETRY))
            delay, fits = _RETRY, False


def _hand_over(link: Secretive, secret: str, taken: Event) -> bool:
    taken.clear()
    try:
        link.write_method(0, UPDATE, dumps("Ss", (secret, "the one before expires")))
    except RecoverableConnectionError:  # the link was lost while its provider was asked
        return False
    if not wait(taken, Deadline(link.call_timeout)):
        link.fail(ConnectionForced("the broker does not answer to a new secret"))
    if link.over.is_set():
        return False
    emit(SecretUpdated(link.uri, None, 0.0))
    return True


def explain(error: BaseException, size: int) -> BaseException:
    """Return why a handshake failed: in words, where its credentials may be too large for the broker.

    Args:
        error: What ended it.
        size: The bytes of the arguments that had the credentials; 0: they were not sent.
    """
    if size + _OVERHEAD <= _FIRST_FRAME:
        return error
    what = f"the credentials take {size:,} bytes with what goes with them"
    remedy = "have a token issued with less in it, or raise the broker's initial_frame_max"
    explained = error
    if isinstance(error.__cause__, ValueError):
        explained = AccessRefused(f"{what}, more than fit into a frame: {remedy}")
        explained.__cause__ = error.__cause__
    elif isinstance(error, OSError):  # perhaps not for that: it is tried again, as ever
        limit = f"RabbitMQ takes {_FIRST_FRAME:,} at first, and {2 * _FIRST_FRAME:,} from 4.1 on"
        explained = type(error)(f"{error}; {what}, and {limit}: {remedy}")
        explained.__cause__ = error
    return explained
