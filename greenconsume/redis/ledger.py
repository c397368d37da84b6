"""Owns what this process holds of a server's messages, and what it has yet to tell the server about them.

A message is held from the script that took it to the reply that says it is settled. A link may be lost
meanwhile: what was not confirmed is said again over the next one, and a handler that runs keeps its
message, for the server knows nothing of links. Each delivery has a name of its own, so that a settle which
is sent twice never settles another message. One ledger serves all links
of this process to one database as one user. Called by `feed`, `channel` and `keeper`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import NamedTuple, Protocol
from uuid import uuid4

from gevent.event import Event
from redis import exceptions

from greenconsume.redis.keyspace import Keyspace
from greenconsume.redis.link import Link
from greenconsume.redis.protocol import encode_for_each
from greenconsume.redis.scripts import GIVE_BACK
from greenconsume.stopping import Deadline, StopSignal, wait

#: So many acks, or the oldest of them so many seconds old, are sent at once, and not at the hub's next turn
#: only.
ACK_COUNT, ACK_AGE = 13, 0.005
#: Who handles messages without end waits while so many acks are not confirmed. What was sent may be lost with
#: its process: the server drops what it has not read once it finds nobody there to answer to.
MAX_UNCONFIRMED = 15
#: One script or command names so many messages at the most.
CHUNK = 200


class Lease(NamedTuple):
    """The place that a message was taken from: its list, and the length of what ends its entry."""

    key: str
    tail_length: int


class Consuming(Protocol):
    """A channel, as far as what it consumes may expire."""

    @property
    def expiring_bindings(self) -> Mapping[tuple[str, str], int]:
        """The bindings, by exchange and member, of expiring queues that it consumes; with milliseconds."""

    @property
    def expiring_queues(self) -> Mapping[str, int]:
        """The names of those queues, with the milliseconds that they live."""


class Ledger:
    """The account of one database: the messages that are held, and the settles that are to be said.

    Args:
        keyspace: The names of the keys.

    Attributes:
        owner: What the names of its fields begin with.
        held: What is held, by field, in the order in which it was taken.
        failed: What is to go back with a count, and whom to tell once it has.
        doubtful: Fields that a lost link may have taken, or not.
        changed: Set when something is in `failed` or `doubtful`, or a link came or went.
        on_returned: Called with the keys that messages went back to.
        consuming: The channels of this process, which say what expires unless it is looked after.
        stale_count: How many acks came for messages that were not ours any more.
        unconfirmed_count: How many acks the server has yet to answer.
    """

    def __init__(self, keyspace: Keyspace) -> None:
        self.keyspace = keyspace
        self.owner = f"greenconsume.{uuid4().hex[:16]}."
        self.held: dict[str, Lease] = {}
        self.failed: dict[str, Callable[[], object]] = {}
        self.doubtful: list[str] = []
        self.changed, self._returned, self._confirmed = Event(), Event(), Event()
        self.links: list[Link] = []
        self.on_returned: list[Callable[[Iterable[str]], object]] = []
        self.stale_count = self.unconfirmed_count = 0
        self.consuming: weakref.WeakSet[Consuming] = weakref.WeakSet()
        self._number = 1
        self._acks: list[str] = []
        self._oldest_ack = 0.0
        self._returns: dict[str, Lease] = {}
        self._pid = os.getpid()

    # -- links ------------------------------------------------------------------------------------

    @property
    def link(self) -> Link | None:
        """A link that lives, if there is one."""
        return next((link for link in self.links if link.connected), None)

    def attach(self, link: Link) -> None:
        """Say what is to be said over this link from now on, too. Never switches."""
        if link not in self.links:
            self.links.append(link)
            link.before_write.append(self.flush)
            link.on_end.append(lambda: self._detach(link))
            self._wake()
            self.changed.set()

    def _detach(self, link: Link) -> None:
        if link in self.links:
            self.links.remove(link)
        self._wake()
        self.changed.set()
        self._returned.set()

    def _wake(self) -> None:
        link = self.link
        if link is not None and (self._acks or self._returns):
            link.flush_soon()

    # -- holding ----------------------------------------------------------------------------------

    def allot(self, count: int) -> int:
        """Reserve numbers for as many deliveries, and return the first. Never switches."""
        first, self._number = self._number, self._number + count
        return first

    def hold(self, first: int, count: int, key: str, tail_length: int) -> list[str]:
        """Note that messages were taken, under so many numbers from the first on; return their fields."""
        owner, lease = self.owner, Lease(key, tail_length)
        fields = [f"{owner}{number}" for number in range(first, first + count)]
        self.held.update(dict.fromkeys(fields, lease))
        return fields

    @property
    def expiring_bindings(self) -> dict[tuple[str, str], int]:
        """The bindings of expiring queues that are consumed here, with the milliseconds that they live."""
        found: dict[tuple[str, str], int] = {}
        for channel in list(self.consuming):
            found |= channel.expiring_bindings
        return found

    @property
    def expiring_queues(self) -> dict[str, int]:
        """The expiring queues that are consumed here, with the milliseconds that they live."""
        found: dict[str, int] = {}
        for channel in list(self.consuming):
            found |= channel.expiring_queues
        return found

    def forget(self, fields: Iterable[str]) -> None:
        """Note that others have these messages: they were not refreshed in time."""
        for field in fields:
            self.held.pop(field, None)

    # -- settling ---------------------------------------------------------------------------------

    def ack(self, field: str) -> bool:
        """Settle a message; return False if it is not held. Said at the hub's next turn. Never switches."""
        if self.held.pop(field, None) is None:
            return False
        self.unconfirmed_count += 1
        acks = self._acks
        acks.append(field)
        if len(acks) == 1:
            self._oldest_ack = monotonic()
            self._wake()
        elif len(acks) >= ACK_COUNT or monotonic() - self._oldest_ack >= ACK_AGE:
            link = self.link
            if link is not None:
                self.flush()
                link.flush_now()
        return True

    def wait_for_confirmation(self, deadline: Deadline, stop: StopSignal | None) -> None:
        """Wait until the server has answered to acks, or a link was lost. Switches: yes."""
        self._confirmed.clear()
        wait(self._confirmed, deadline, stop)

    def give_back(self, fields: Iterable[str]) -> None:
        """Put messages back as if they had never been taken. Said at the hub's next turn. Never switches."""
        for field in fields:
            lease = self.held.pop(field, None)
            if lease is not None:
                self._returns[field] = lease
        self._wake()

    def fail(self, field: str, returned: Callable[[], object] = int) -> bool:
        """Put a message back, counted; return False if it is not held. Never switches.

        Args:
            field: What it is held as.
            returned: Called once it is back; it must not switch.
        """
        if self.held.pop(field, None) is None:
            return False
        self.failed[field] = returned
        self.changed.set()
        return True

    def doubt(self, first: int, count: int) -> None:
        """Note that the fate of a take is not known: its link was lost. Never switches."""
        self.doubtful += [f"{self.owner}{number}" for number in range(first, first + count)]
        self.changed.set()

    def note_returned(self, fields: Iterable[str], doubtful: Iterable[str]) -> None:
        """Note that these are back, of what failed and of what was doubtful. Never switches."""
        for field in fields:
            self.failed.pop(field)()
        done = set(doubtful)
        self.doubtful = [field for field in self.doubtful if field not in done]
        if not (self.failed or self.doubtful):
            self._returned.set()

    def wait_for_returns(self, deadline: Deadline) -> None:
        """Wait until what failed is back in its queue. Switches: yes, if there is such a message."""
        while (self.failed or self.doubtful) and self.link is not None and not deadline.expired:
            self._returned.clear()
            wait(self._returned, deadline)

    # -- saying so --------------------------------------------------------------------------------

    def flush(self) -> None:
        """Have everything said that was noted since the last time. Never switches."""
        link = self.link
        if link is None or not (self._acks or self._returns) or self._pid != os.getpid():
            return
        acks, self._acks = self._acks, []
        for start in range(0, len(acks), CHUNK):
            self._send_acks(link, acks[start : start + CHUNK])
        returns, self._returns = self._returns, {}
        # Each goes to the end that is next, so the last one first.
        fields = sorted(returns, key=number_of, reverse=True)
        for start in range(0, len(fields), CHUNK):
            self._send_returns(
                link, {field: returns[field] for field in fields[start : start + CHUNK]}
            )

    def _send_acks(self, link: Link, fields: list[str]) -> None:
        def said(reply: object) -> None:
            if self._is_to_be_said_again(reply):
                self._acks[:0] = fields
                self._wake()
            else:
                self.unconfirmed_count -= len(fields)
                if isinstance(reply, int):
                    self.stale_count += len(fields) - reply
            self._confirmed.set()

        # In this order: an index without its message does no harm, and a message without its index
        # would never be restored.
        space = self.keyspace
        commands = (("HDEL", space.unacked), ("ZREM", space.index))
        drop, drop_index = encode_for_each(commands, fields)
        link.send_encoded(drop, said)
        link.send_encoded(drop_index)

    def _send_returns(self, link: Link, leases: dict[str, Lease]) -> None:
        def said(reply: object) -> None:
            if isinstance(reply, int):
                for tell in self.on_returned:
                    tell({lease.key for lease in leases.values()})
            elif self._is_to_be_said_again(reply):
                self._returns = {**leases, **self._returns}
                self._wake()

        keys = (self.keyspace.unacked, self.keyspace.index, *(each.key for each in leases.values()))
        arguments = (part for field, lease in leases.items() for part in (field, lease.tail_length))
        link.run(GIVE_BACK, keys, arguments, said)

    @staticmethod
    def _is_to_be_said_again(reply: object) -> bool:
        # What the server refuses stays among the unacknowledged, to be restored when its time is over.
        return not isinstance(reply, (int, exceptions.RedisError))


def number_of(field: str) -> int:
    """Return the number of a delivery of this process: they were taken in this order."""
    return int(field.rpartition(".")[2])


_ledgers: weakref.WeakValueDictionary[str, Ledger] = weakref.WeakValueDictionary()


def ensure_ledger(server: str, keyspace: Keyspace) -> Ledger:
    """Return the ledger of a server's database: the same one for all of this process. Never switches."""
    key = f"{os.getpid()} {server} {keyspace}"
    found = _ledgers.get(key)
    if found is None:
        found = _ledgers[key] = Ledger(keyspace)
    return found
