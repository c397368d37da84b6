"""Owns finding out from the broker whether a queue that was declared elsewhere is a stream.

A message that tells of an offset is no proof: so does a copy of a stream's message in any other queue, where
an ack in the place of a requeue would lose it. It is asked over a channel of its own, which the broker may
close; nothing is changed or taken. Called by `deliveries`, in a greenlet.
"""

from __future__ import annotations

import re
from contextlib import closing
from typing import Any, Protocol

import amqp

#: What stands in the headers of whatever a stream delivers.
OFFSET = b"x-stream-offset"
#: RabbitMQ's words on an argument that a queue has and the declaration has not.
_LACKING = re.compile(
    r"inequivalent arg '(.+?)' .*received none but current is the value '(.*?)' of"
)


class OpensChannels(Protocol):
    """A session, as far as channels are opened on it."""

    def channel(self) -> Any: ...


def is_stream(session: OpensChannels, queue: str) -> bool:
    """Return whether a queue that somebody consumes from is a stream.

    Raises:
        Exception: There is no answer, as to any call: the link is lost, or it takes too long.

    Switches: yes, for `call_timeout` at the most for each argument that the queue has.
    """
    arguments: dict[str, Any] = {"x-queue-type": "classic"}
    while True:
        try:
            _compare(session, queue, arguments)
        except amqp.PreconditionFailed as exc:
            lacking = _LACKING.search(str(exc))
            if lacking is None or lacking[1] in arguments:
                return "current is 'stream'" in str(exc)
            # It names the first difference alone, and a limit of a stream may come before its type.
            arguments[lacking[1]] = int(lacking[2]) if lacking[2].isdigit() else lacking[2]
        except amqp.AccessRefused:  # who may not declare has the message's word alone
            return True
        else:
            return False


def _compare(session: OpensChannels, queue: str, arguments: dict[str, Any]) -> None:
    """Have the broker compare a queue that exists with a declaration, which changes nothing of it."""
    with closing(session.channel()) as channel:
        channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
