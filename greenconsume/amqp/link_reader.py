"""Owns the reading of a link: bytes to frames, and each frame to the channel that it is for (law 1).

It runs in a greenlet of its own, runs no user code and never waits for a reply. Called by `link`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import amqp
import gevent
from amqp.exceptions import FrameSyntaxError

from greenconsume.amqp.frames import DELIVERY, HEADER, FrameParser, Sig
from greenconsume.amqp.link_users import LinkChannel

#: After so many answers of a read those who wait have their turn: confirmed publishing is a tenth faster.
_ANSWERS = 2
#: One `recv` asks for this many bytes, the largest frame RabbitMQ sends by default.
READ_SIZE = 131072


class ReadLink(Protocol):
    """A link, as its reader sees it."""

    channels: dict[int, LinkChannel]
    failure: BaseException | None
    on_inbound_frame: Callable[[Any], object]
    frame_max: int
    transport: Any

    def note_read(self) -> None:
        """Note that something was read just now."""
        ...

    def fail(self, error: BaseException) -> None:
        """End the link."""
        ...


class LinkReader:
    """Reads one link until it fails."""

    def __init__(self, link: ReadLink) -> None:
        self._link = link
        self._properties: dict[int, bytes] = {}  # by channel, of the content that is coming in

    def run(self) -> None:
        """Read until the link fails, by what is read here or by another. Never raises."""
        try:
            self._read()
        except (OSError, amqp.AMQPError) as exc:
            self._link.fail(exc)
        except Exception as exc:  # what py-amqp's decoder raises on bytes that make no sense
            error = FrameSyntaxError(f"the broker sent what cannot be decoded: {exc!r}")
            error.__cause__ = exc
            self._link.fail(error)

    def _read(self) -> None:
        link, channels = self._link, self._link.channels
        parser, recv = FrameParser(link.frame_max), link.transport.sock.recv
        while link.failure is None:
            data = recv(READ_SIZE)
            if not data:
                raise ConnectionResetError("the broker closed the connection")
            link.note_read()
            parser.max_size, answers = link.frame_max, 0
            for frame in parser.feed(data):
                if frame[0] == DELIVERY:
                    channel = channels.get(frame[1])
                    if channel is not None:
                        channel.deliveries.take(frame[2])
                elif frame[0] == HEADER:
                    self._take_header(*frame)
                else:
                    link.on_inbound_frame(frame)
                    answers += 1
                    if answers % _ANSWERS == 0:
                        gevent.sleep(0)
            gevent.sleep(0)  # recv does not switch while data keeps coming

    def _take_header(self, kind: int, channel_id: int, payload: bytes) -> None:
        # Without the properties: those that cannot be decoded are their message's fault, not the link's.
        self._properties[channel_id] = payload[12:]
        self._link.on_inbound_frame((kind, channel_id, payload[:12] + b"\0\0"))

    def on_method(
        self, channel_id: int, method_sig: Sig, payload: bytes, content: amqp.Message | None
    ) -> None:
        """Hand one complete method to its channel; a channel that is gone gets nothing."""
        if content is not None:
            content.encoded = self._properties.pop(channel_id)
        channel = self._link.channels.get(channel_id)
        if channel is not None:
            channel.dispatch_method(method_sig, payload, content)
