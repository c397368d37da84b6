"""Owns the channel that is published over with confirms: connected when first used, again when it was lost.

What is declared goes over a channel of its own, so that an error closes nobody else's. It must never take a
link that consumes (law 6). Called by `sender`, from one greenlet at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import kombu
from amqp.exceptions import ChannelError, RecoverableConnectionError
from kombu import Exchange, Queue
from kombu.common import maybe_declare
from kombu.exceptions import OperationalError

from greenconsume.amqp.channel_publisher import ChannelPublisher
from greenconsume.amqp.confirms import Confirm
from greenconsume.amqp.transport import LinkLostError, Session
from greenconsume.links.pool import LinkPool
from greenconsume.stopping import Deadline, StopSignal
from greenconsume.virtual import publish_as_is


class PlainChannel:
    """Stands for a channel where a transport has no confirms: what it took counts as confirmed.

    Attributes:
        blocked: Always false: such a transport does not tell.
        lost: True once its connection was lost.
    """

    blocked = False

    def __init__(self, connection: kombu.Connection) -> None:
        self.lost = False
        self._channel = connection.channel()
        self._connection_errors = connection.connection_errors

    def wait_publishable(self, deadline: Deadline, stop: StopSignal) -> None:
        """Do nothing: it waits while it publishes."""

    def publish_confirm(self, confirm: Confirm) -> None:
        """Publish, and confirm. Switches: as the transport does."""
        try:
            publish_as_is(
                self._channel,
                self._channel.prepare_message(*confirm.message),
                exchange=confirm.exchange,
                routing_key=confirm.routing_key,
                mandatory=confirm.mandatory,
                immediate=confirm.immediate,
            )
        except self._connection_errors as exc:
            self.lost = True
            confirm.answer(LinkLostError(f"the connection was lost: {exc}"))
        except ChannelError as exc:
            confirm.answer(exc)
        else:
            confirm.answer(None)


class PublishChannel:
    """One channel to a broker to publish over, whichever link it is on at the time.

    Attributes:
        channel: The channel to write to; None before it is first used, and after `close`.
        errors: What says that the channel or its link is lost, or cannot be had.
        trouble: The last error of connecting, or of what was connected.
        isolated: It shares its link with nobody: what closes the link came over this channel.
    """

    def __init__(self, broker: kombu.Connection, links: LinkPool, stop: StopSignal) -> None:
        self.channel: ChannelPublisher | PlainChannel | None = None
        theirs = (*broker.connection_errors, *broker.channel_errors, OperationalError)
        self.errors = (*theirs, RecoverableConnectionError, ChannelError)
        self.trouble: BaseException | None = None
        self.isolated = False
        self._broker = broker
        self._links = links
        self._stop = stop
        self._connection: kombu.Connection | None = None
        self._declarer: kombu.transport.base.StdChannel | None = None

    @property
    def uri(self) -> str:
        """The broker's address, without its password."""
        return str(self._broker.as_uri())

    @property
    def blocked(self) -> bool:
        """True if the broker blocks publishers."""
        return self.channel is not None and self.channel.blocked

    def connect(self) -> ChannelPublisher | PlainChannel:
        """Return the channel, a new one on a new connection if there is none or its link was lost.

        Raises:
            StoppedError: The stop signal is set.
            Exception: One of `errors`: it was lost again at once.

        Switches: yes, if it has to connect.
        """
        if self.channel is None or self.channel.lost:
            self.close()
            connection = self._connection = self._broker.clone()
            self._links.connect(connection, self._stop, self._note, publishing=True)
            session = connection.connection
            if isinstance(session, Session):
                session.begin_setup(self._stop)  # it ends every call
                self.channel = session.channel().publisher
            else:
                self.channel = PlainChannel(connection)
        return self.channel

    def _note(self, error: BaseException, _delay: float) -> None:
        self.trouble = error

    def isolate(self) -> None:
        """Take a link of its own from the next `connect` on. Never switches."""
        if not self.isolated:
            self.isolated, self._links = True, LinkPool()

    def has_declared(self, entities: Sequence[Exchange | Queue]) -> bool:
        """Return whether these exchanges and queues were all declared on this connection. Never switches."""
        declared = self._connection.declared_entities if self._connection is not None else ()
        return all(each.can_cache_declaration and hash(each) in declared for each in entities)

    def declare(self, entities: Sequence[Exchange | Queue]) -> None:
        """Declare these exchanges and queues, those that have not been.

        Raises:
            ChannelError: The broker refused.
            Exception: One of `errors`.

        Switches: yes, if it declares.
        """
        if self.has_declared(entities):
            return
        if self._declarer is None:
            assert self._connection is not None
            self._declarer = self._connection.channel()
        for entity in entities:
            maybe_declare(entity, self._declarer)

    def close(self) -> None:
        """Let go of the link, in order if it lives. Switches: yes, for its `close_timeout` at the most."""
        connection, self._connection = self._connection, None
        self.channel = self._declarer = None
        if connection is not None:
            connection.release()
