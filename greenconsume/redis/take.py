"""Owns one run of the script that takes messages: what is asked for, and what is held when it has answered.

A take that nobody can wait for is recalled: a second script behind it, on the same connection, puts back
what it moved. Does no waiting. Called by `feed` and `errand`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from greenconsume.redis.keyspace import Keyspace
from greenconsume.redis.ledger import Ledger
from greenconsume.redis.link import Link
from greenconsume.redis.scripts import RECALL, TAKE

#: One take stops when it has so many bytes.
MAX_BYTES = 4 << 20

#: A message as it was in its queue, after the field that it is held as.
Delivery = tuple[str, bytes]


class Take:
    """A take of up to so many messages, under way from the beginning. Never switches.

    Args:
        link: Over which link.
        ledger: Where is noted what was taken.
        queues: The names, in the order in which they are taken from.
        expires: The milliseconds after which a queue that nobody uses is gone, where it has any.
        count: How many messages.
        on_reply: Called with the reply, or with an error, in the reader.
    """

    def __init__(
        self,
        link: Link,
        ledger: Ledger,
        queues: Sequence[str],
        expires: Mapping[str, int],
        count: int,
        on_reply: Callable[[Take, Any], object],
    ) -> None:
        self._link, self._ledger, self._count = link, ledger, count
        self._lists = ledger.keyspace.keys_in_order(queues)
        self._tails = {queue: Keyspace.tail_of(queue) for queue in queues}
        self._first = ledger.allot(count)
        arguments: list[Any] = [count, ledger.owner, self._first, MAX_BYTES]
        for _, queue in self._lists:
            arguments += (self._tails[queue], expires.get(queue, 0))
        # A close does not wait for it: it is recalled.
        link.run(TAKE, self._keys, arguments, lambda reply: on_reply(self, reply), matters=False)

    @property
    def _keys(self) -> list[str]:
        space = self._ledger.keyspace
        return [space.unacked, space.index, *(key for key, _ in self._lists)]

    def held(self, reply: list[Any]) -> Iterator[tuple[str, str, list[Delivery]]]:
        """Note what a reply says was taken: yield each list with its queue and its messages, if any."""
        number = self._first
        for (key, queue), messages in zip(self._lists, reply[1:], strict=True):
            if messages:
                tail_length = len(self._tails[queue])
                fields = self._ledger.hold(number, len(messages), key, tail_length)
                number += len(messages)
                yield key, queue, list(zip(fields, messages, strict=True))

    def doubt(self) -> None:
        """Note that its fate is not known: the link was lost. Never switches."""
        self._ledger.doubt(self._first, self._count)

    def recall(self) -> None:
        """Have the server put back what this takes, because its link closes. Never switches."""
        steps = self._ledger.keyspace.steps
        arguments: list[Any] = [self._ledger.owner, self._first, self._count]
        queues_count = len(self._lists) // len(steps)
        for at, (_, queue) in enumerate(self._lists):
            arguments += (self._tails[queue], steps[at // queues_count])
        # In full: nobody waits for the answer that the server does not know it.
        command = ("EVAL", RECALL.text, len(self._keys), *self._keys, *arguments)
        self._link.send(command, matters=False)
