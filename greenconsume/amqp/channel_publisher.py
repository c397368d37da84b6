"""Owns publishing on one channel of a green link: back-pressure, and the confirm of each message.

Any number of greenlets publish at once; each waits for the confirm of its own message. Made when a channel
first publishes. Called by `channel`, and by publishers that need nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable

import amqp
from amqp import spec
from amqp.exceptions import MessageNacked, RecoverableConnectionError
from amqp.serialization import dumps

from greenconsume.amqp.calls import Calls
from greenconsume.amqp.confirms import Confirm, Confirms
from greenconsume.amqp.deliveries import Deliveries
from greenconsume.amqp.frames import Address, encode_publish
from greenconsume.amqp.waits import Waits
from greenconsume.around import PlainPublication, plain_producers
from greenconsume.stopping import Deadline, StopSignal


class ChannelPublisher:
    """Publishes on one channel, for any number of greenlets at once.

    Attributes:
        confirms: What the broker has yet to answer for; None while the channel is not in confirm mode.
    """

    __slots__ = ("_calls", "_deliveries", "_waits", "confirms")

    def __init__(self, calls: Calls, deliveries: Deliveries, waits: Waits) -> None:
        self._calls = calls
        self._deliveries = deliveries
        self._waits = waits
        self.confirms: Confirms | None = None

    @property
    def lost(self) -> bool:
        """True if the channel cannot be used any more; one that the broker closed opens itself again."""
        return self._calls.is_lost

    @property
    def blocked(self) -> bool:
        """True if the broker blocks publishers on this channel's link."""
        return self._calls.link.blocked

    @property
    def publishable(self) -> bool:
        """True if `wait_publishable` would return at once."""
        return self._calls.link.is_publishable(self._calls.channel_id)

    def wait_publishable(self, deadline: Deadline, stop: StopSignal | None = None) -> None:
        """Wait while the broker blocks publishers, or too much is unsent; see `Link.wait_publishable`."""
        self._calls.link.wait_publishable(deadline, stop, self._calls.channel_id)

    def publish_plain(
        self,
        message: amqp.Message,
        address: Address,
        timeout: float | None,
        confirmed: bool,
        confirm_timeout: float | None,
    ) -> None:
        """Publish for a plain `kombu.Producer`, within what was chosen to be entered around these.

        Args:
            message: Gets headers of its own, if something may add to them.
            address: Where it goes.
            timeout: As for `publish_confirmed`.
            confirmed: Wait for its confirm.
            confirm_timeout: As for `publish_confirmed`.
        """
        if not plain_producers.around:
            self._publish_either(message, address, timeout, confirmed, confirm_timeout)
            return
        properties = message.properties
        headers = dict(properties.get("application_headers") or {})
        known = str(properties.get("message_id") or "")
        with plain_producers.entered(PlainPublication(*address[:2], known, headers)):
            properties["application_headers"] = headers
            self._publish_either(message, address, timeout, confirmed, confirm_timeout)

    def _publish_either(
        self,
        message: amqp.Message,
        address: Address,
        timeout: float | None,
        confirmed: bool,
        confirm_timeout: float | None,
    ) -> None:
        if confirmed:
            self.publish_confirmed(Confirm(message, *address), timeout, confirm_timeout)
        else:
            self.publish(message, address, timeout)

    def publish(self, message: amqp.Message, address: Address, timeout: float | None) -> None:
        """Publish without waiting for a confirm; see `Channel.basic_publish`."""
        self._wait_publishable(timeout)
        self._write(message, address)
        if self.confirms is not None:
            self.confirms.count()

    def publish_confirmed(
        self, confirm: Confirm, timeout: float | None, confirm_timeout: float | None
    ) -> None:
        """Publish the message of `confirm`, wait for the answer, and raise it if it is an error.

        Args:
            confirm: The message, and where it goes.
            timeout: Seconds to wait until it may be published; None: for as long as the broker blocks.
            confirm_timeout: Seconds to wait for the answer; None: for the link's `call_timeout`.

        Raises:
            Exception: As `Channel.basic_publish_confirm`.

        Switches: yes.
        """
        self._wait_publishable(timeout)
        tag = self.publish_confirm(confirm)
        try:
            if not self._waits.wait_for_confirm(confirm.event, confirm_timeout):
                raise self._calls.no_reply()
        finally:
            if self.confirms is not None:
                self.confirms.abandon(tag, confirm)
        if confirm.error is not None:
            raise confirm.error

    def publish_confirm(self, confirm: Confirm) -> int:
        """Write the message of `confirm` now, and have it answered. Never switches.

        Returns:
            Its delivery tag.

        Raises:
            LinkLostError: The link is gone.
            amqp.exceptions.ChannelError: The broker had closed the channel.
        """
        if self.confirms is None:
            self.select(nowait=True)  # what is published after it is confirmed
        self._write(confirm.message, confirm.address)
        assert self.confirms is not None
        return self.confirms.put(confirm)

    def select(self, nowait: bool) -> None:
        """Put the channel into confirm mode, by `Confirm.Select`; its publishes are counted from here."""
        self._calls.begin()  # raises what is yet to be told, before the mode counts as asked for
        if self.confirms is None:  # asked again, the broker goes on counting
            self.confirms = Confirms()
        self._calls.write(spec.Confirm.Select, dumps("b", (nowait,)))

    def _wait_publishable(self, timeout: float | None) -> None:
        if self._calls.is_closing:
            raise RecoverableConnectionError("basic_publish: connection closed")
        self.wait_publishable(Deadline(timeout), self._waits.publishing)

    def _write(self, message: amqp.Message, address: Address) -> None:
        calls = self._calls
        calls.begin()
        if self._deliveries.has_settles:
            self._deliveries.flush()
        link = calls.link
        link.write(encode_publish(calls.channel_id, address, message, link.frame_max))

    def end(self, error: Callable[[], BaseException]) -> bool:
        """End this life of the channel: fail what is unconfirmed; return whether there was anything."""
        confirms, self.confirms = self.confirms, None
        return confirms is not None and confirms.fail(error)

    # -- what the broker answers ------------------------------------------------------------------------

    def acked(self, delivery_tag: int, multiple: bool) -> None:
        """Take the broker's confirm of one message, or of all up to one."""
        if self.confirms is not None:
            self.confirms.answer(delivery_tag, multiple)

    def nacked(self, delivery_tag: int, multiple: bool) -> None:
        """Take that the broker could not take one message, or all up to one."""
        if self.confirms is not None:
            self.confirms.answer(delivery_tag, multiple, MessageNacked)

    def find_returned(
        self, exchange: str, routing_key: str, message: amqp.Message
    ) -> Confirm | None:
        """Return which message the broker returned, if it is one that a confirm is awaited for."""
        if self.confirms is None:
            return None
        return self.confirms.find_returned(exchange, routing_key, message)
