"""Owns finding out from the broker whether a queue that was declared elsewhere is a stream.

A message that tells of an offset is no proof: so does a copy of a stream's message in any other queue, where
an ack in the place of a requeue would lose it. The broker is asked by a call that it refuses for either kind,
in words that differ, over a channel of its own, which that closes. Nothing is taken, and it needs the
permission to read alone, as who consumes has. Called by `deliveries`, in a greenlet.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any, Protocol

import amqp
from amqp import spec

#: What stands in the headers of whatever a stream delivers.
OFFSET = b"x-stream-offset"
_ARGUMENTS = {"x-stream-offset": "next"}


class OpensChannels(Protocol):
    """A session, as far as channels are opened on it."""

    def channel(self) -> Any: ...


def is_stream(session: OpensChannels, queue: str) -> bool:
    """Return whether a queue that somebody consumes from is a stream.

    A stream lets nobody consume without a prefetch, and every other queue refuses to begin at an offset.

    Raises:
        Exception: There is no answer, as to any call: the link is lost, it takes too long, it is forbidden.

    Switches: yes, for `call_timeout` at the most for each of two calls.
    """
    with closing(session.channel()) as channel:
        channel.basic_qos(0, 0, False)  # a broker may be configured to set another
        try:
            _consume(channel, queue)
        except amqp.PreconditionFailed as exc:
            if "invalid arg" in str(exc):
                return False
            if "prefetch" in str(exc):
                return True
            raise
    return False  # a broker that knows no streams; what it sent goes back as the channel closes


def _consume(channel: Any, queue: str) -> None:
    """Ask to consume, without being a consumer: whatever is sent all the same goes back."""
    args = (0, queue, "", False, False, False, False, _ARGUMENTS)
    channel.send_method(spec.Basic.Consume, "BssbbbbF", args, wait=spec.Basic.ConsumeOk)
