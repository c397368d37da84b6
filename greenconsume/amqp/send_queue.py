"""Owns the order in which queued frames leave a link: a channel's own in their order, channels by turns.

Does no I/O. A large body is sent in slices, cut between frames, and other channels' frames go in between: the
protocol asks only that nothing else of its own channel does. Used by `link`.
"""

from __future__ import annotations

from collections import deque

#: A body larger than this is sent by turns with other channels, this many bytes at once.
SLICE = 1 << 18

#: The two octets of a frame that name its channel.
_CHANNEL = slice(1, 3)


class Outgoing:
    """The bytes that wait to be sent.

    Attributes:
        size: How many bytes wait, those of large bodies apart.
    """

    __slots__ = ("_frames", "_large", "_relieved", "size")

    def __init__(self) -> None:
        self.size = 0
        self._relieved = False
        self._frames: list[bytes] = []
        self._large: dict[bytes, deque[bytes]] = {}  # by channel, in the order of their turns

    def put(self, frames: list[bytes]) -> None:
        """Add whole frames, all of one channel."""
        size = sum(map(len, frames))
        line = self._large.get(frames[0][_CHANNEL]) if self._large else None
        if line is not None:
            line += frames
        elif size > SLICE:
            self._large[frames[0][_CHANNEL]] = deque(frames)
        else:
            self._frames += frames
            self.size += size

    def take(self) -> bytes:
        """Return what is to be sent next: all of the small, and a slice of one large body."""
        frames, self._frames = self._frames, []
        self.size = 0
        if self._large:
            channel = next(iter(self._large))
            line = self._large.pop(channel)
            size = 0
            while line and size < SLICE:
                frames.append(line.popleft())
                size += len(frames[-1])
            if line:
                self._large[channel] = line  # behind the others
            else:
                self._relieved = True
        return b"".join(frames)

    def holds_large(self, channel: int | None) -> bool:
        """Return whether a large body of this channel waits, or of any: what it sends next waits behind."""
        if not self._large or channel is None:
            return bool(self._large)
        return channel.to_bytes(2, "big") in self._large

    def take_relief(self) -> bool:
        """Return whether the last of a large body was taken since this was last asked.

        Its channel is as any other again.
        """
        relieved, self._relieved = self._relieved, False
        return relieved

    def clear(self) -> None:
        """Forget everything: the link is gone."""
        self.size = 0
        self._frames.clear()
        self._large.clear()

    def __bool__(self) -> bool:
        return bool(self._frames or self._large)
