"""Owns the kombu transports for AMQP: `amqp://`, `pyamqp://` and `amqps://` over green links.

kombu resolves to these once `transports.register` was called. A connection made by itself has a link of
its own; a `LinkPool` sets `acquire`, and then connections share its links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import amqp
import gevent
from gevent.lock import BoundedSemaphore
from kombu.transport import pyamqp
from kombu.utils.imports import symbol_by_name

from greenconsume.amqp import tls, turns
from greenconsume.amqp.link import DEFAULT_HEARTBEAT, Link, LinkLostError
from greenconsume.amqp.secret import SecretSource, keep_current
from greenconsume.amqp.session import Session
from greenconsume.errors import EventLoopError
from greenconsume.patching import require_patched
from greenconsume.stopping import StopSignal

DEFAULT_HOST = "localhost"


class Credentials(Protocol):
    """A `credential_provider`, as kombu's Redis transport takes one."""

    def get_credentials(self) -> Sequence[str]:
        """Return user and password, or the password alone."""


#: What says that the broker was reached and refused; trying again does not help by itself.
REFUSALS = (amqp.AccessRefused, amqp.NotAllowed)


class Transport(pyamqp.Transport):  # type: ignore[misc]  # kombu is untyped
    """kombu's transport for RabbitMQ over a green link.

    `transport_options` are those of `amqp.Connection`, `close_timeout` and `call_timeout` of `Link`, and
    `secret_interval`.
    Heartbeats are on, every 30 s, unless `heartbeat` says otherwise; `{"heartbeat": 0}` turns them off.
    A callable password, or a `credential_provider`, is asked anew for each link that is dialled; and while
    a link lives, before its token ends where it is a JWT, else every `secret_interval` seconds, if it is set.
    Over TLS the broker's certificate has to have its name: see `tls.verified`.
    """

    wakes = True
    #: Its connections may share links.
    shares_links = True
    refusals = REFUSALS
    driver_name = "greenconsume"
    implements = pyamqp.Transport.implements.extend(asynchronous=False)
    #: Gives a link that is shared; set by a `LinkPool`.
    acquire: Callable[[], Link] | None = None

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._dialling = BoundedSemaphore(1)
        self._host = DEFAULT_HOST
        self._secrets: SecretSource | None = None
        self._session: Session | None = None

    def establish_connection(self) -> Session:
        """Return a session: over a shared link where a pool gives one, else over a new one.

        Greenlets that use an unconnected `kombu.Connection` at once get one session, not one each.

        Switches: yes, to dial.
        """
        with self._dialling:
            if self._session is None or not self._session.connected:
                link = self.acquire() if self.acquire is not None else self.dial()
                self._session = Session(link, self.client)
            return self._session

    def dial(self) -> Link:
        """Return a new, connected link; one attempt.

        Raises:
            NotPatchedError: The process is not patched by gevent, so that the link would wait for ever.
        """
        require_patched()
        client = self.client
        self._host = hostname = client.hostname or DEFAULT_HOST
        try:
            link: Link = super().establish_connection()
        finally:
            # kombu makes an address of localhost, whose name is then unknown the next time.
            client.hostname = hostname
        link.client = None
        if self._secrets is not None:
            gevent.spawn(keep_current, link, self._secrets).name = f"secrets of {link.uri}"
        return link

    def Connection(self, **options: Any) -> Link:
        """Make the link that `dial` connects; the plug point of kombu's `establish_connection`."""
        client = self.client
        if not client.heartbeat and "heartbeat" not in (client.transport_options or {}):
            options["heartbeat"] = DEFAULT_HEARTBEAT
        interval = options.pop("secret_interval", None)
        provider = getattr(client, "credential_provider", None)  # older kombus have none
        ask = client.password
        if provider:
            options.update(_credentials_from(provider))
            ask = partial(_secret_from, provider)
        self._secrets = SecretSource(options["password"], ask, interval) if callable(ask) else None
        options["ssl"] = tls.verified(client.ssl, self._host)
        link = Link(**options)
        link.uri = client.as_uri()
        return link

    def verify_connection(self, connection: Session) -> bool:
        """Return whether kombu is to go on with it: see `Session.is_current`. Never switches."""
        return connection.is_current

    def drain_events(
        self, connection: Session, timeout: float | None = None, stop: StopSignal | None = None
    ) -> None:
        """Do as `Session.drain_events`; see `turns` for who drains several connections in turn."""
        if stop is None:
            turns.drain(connection, timeout)
        else:
            connection.drain_events(timeout=timeout, stop=stop)

    def close_connection(self, connection: Session) -> None:
        """See `Session.close`."""
        connection.close()

    def register_with_event_loop(self, connection: object, loop: object) -> None:
        """Refuse kombu's asynchronous hub, which reads sockets by itself.

        Raises:
            EventLoopError: Always; it says what to do instead.
        """
        raise EventLoopError


class SSLTransport(Transport):
    """The same over TLS."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if not self.client.ssl:
            self.client.ssl = True


def _credentials_from(provider: Credentials | str) -> dict[str, str]:
    """Ask an object, or one of the class that a path names, as kombu's Redis transport has it."""
    if isinstance(provider, str):
        return _credentials_from(symbol_by_name(provider)())
    names = ("password", "userid")  # the user's name, which comes first, may be left out
    return dict(zip(names, reversed(provider.get_credentials()), strict=False))


def _secret_from(provider: Credentials | str) -> str:
    return _credentials_from(provider)["password"]


__all__ = ["REFUSALS", "Link", "LinkLostError", "SSLTransport", "Session", "Transport"]
