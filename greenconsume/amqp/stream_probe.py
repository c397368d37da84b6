"""Owns finding out from the broker whether a queue that was declared elsewhere is a stream.

A message that tells of an offset is no proof: so does a copy of a stream's message in any other queue, where
an ack in the place of a requeue would lose it. It is asked over a channel of its own, which the broker may
close; nothing is changed or taken. Called by `deliveries`, in a greenlet.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any, Protocol

import amqp

#: What stands in the headers of whatever a stream delivers.
OFFSET = b"x-stream-offset"


class OpensChannels(Protocol):
    """A session, as far as channels are opened on it."""

    def channel(self) -> Any: ...


def is_stream(session: OpensChannels, queue: str) -> bool:
    """Return whether a queue that somebody consumes from is a stream.

    Raises:
        Exception: There is no answer, as to any call: the link is lost, or it takes too long.

    Switches: yes, for `call_timeout` at the most.
    """
    try:
        with closing(session.channel()) as channel:
            # Of an existing queue it changes nothing: the broker compares, and says what the queue is.
            channel.queue_declare(
                queue, durable=True, auto_delete=False, arguments={"x-queue-type": "classic"}
            )
    except amqp.PreconditionFailed as exc:
        return "current is 'stream'" in str(exc)
    except amqp.AccessRefused:  # who may not declare has the message's word alone
        return True
    return False
