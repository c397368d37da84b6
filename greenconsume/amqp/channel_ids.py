"""Owns which channel ids of a link are free, and how many sessions find room on it. Does no I/O."""

from __future__ import annotations

from collections.abc import Container, Sized
from typing import Protocol

import amqp
from amqp import spec
from amqp.exceptions import ResourceError

#: The largest number that AMQP 0-9-1 says in two octets: so many channels, and so long a prefetch, at most.
SHORT_MAX = 65535
CHANNEL_MAX = SHORT_MAX


class _Taken(Container[int], Sized, Protocol):
    """The ids that are in use."""


class ChannelIds:
    """Gives the channel ids of one link, and takes them back.

    Attributes:
        session_size: How many channels another session is taken to need.
    """

    __slots__ = ("_free", "_last", "session_size")

    def __init__(self) -> None:
        self.session_size = 1
        self._free: list[int] = []
        self._last = 0

    def has_room(self, session_count: int, channel_count: int, channel_max: int) -> bool:
        """Return whether another session would find its ids."""
        taken = max(session_count * self.session_size, channel_count)
        return taken + self.session_size <= channel_max

    def make_room(self, size: int, channel_max: int) -> None:
        """Reckon with sessions of `size` channels from now on."""
        self.session_size = min(max(self.session_size, size), channel_max)

    def allocate(self, wanted: int | None, taken: _Taken, channel_max: int) -> int:
        """Return an id that is not `taken`: the one that is `wanted`, if any is.

        Raises:
            amqp.exceptions.ConnectionError: The wanted one is in use.
            ResourceError: All ids up to `channel_max` are.
        """
        if wanted:
            if wanted in taken:
                raise amqp.ConnectionError(f"Channel {wanted!r} already open")
            return wanted
        while self._free:
            if (free := self._free.pop()) not in taken:
                return free
        while self._last < channel_max:
            self._last += 1
            if self._last not in taken:
                return self._last
        raise ResourceError(f"all {channel_max} channels are in use", spec.Channel.Open)

    def release(self, channel_id: int) -> None:
        """Take an id back: both sides have closed its channel."""
        self._free.append(channel_id)
