"""Owns the layout of a Redis database: which key holds what, as kombu 5.7 has it, and a few of our own.

A queue is a list for each step of priority: what is published goes to its left end, what is next leaves by
its right one. What was taken and not settled is in a hash (`unacked`: field → `[message, exchange, routing
key]`), with the time it was taken at in a sorted set. Ours are the processes that hold messages, and what
waits for its time. Does no I/O. Called by everything else in here.
"""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Separates a queue's name from its priority, and the parts of a binding.
SEP = "\x06\x16"
PRIORITY_STEPS = (0, 3, 6, 9)
VISIBILITY_TIMEOUT = 3600.0
#: How often a message comes back unsettled before it is set aside.
DELIVERY_LIMIT = 20
#: Tables of bindings outlive their queues for twice as long as these, and for an hour.
_BINDING_FACTOR, _MIN_BINDING_TTL = 2, 60 * 60 * 1000


@dataclass(frozen=True)
class Keyspace:
    """The names of keys, made of kombu's transport options; the defaults are kombu's.

    Attributes:
        prefix: `global_keyprefix`, which comes before everything.
        visibility_timeout: Seconds after which what nobody has settled or refreshed is for others.
        delivery_limit: How often a message comes back before it goes to `{queue}.dead`; None: always.
        fanout: What the topics of fanout exchanges begin with.
    """

    prefix: str = ""
    sep: str = SEP
    steps: tuple[int, ...] = PRIORITY_STEPS
    unacked: str = "unacked"
    index: str = "unacked_index"
    visibility_timeout: float = VISIBILITY_TIMEOUT
    delivery_limit: int | None = DELIVERY_LIMIT
    fanout: str = "/0."
    fanout_patterns: bool = True

    @classmethod
    def of(cls, options: dict[str, Any], database: int) -> Keyspace:
        """Return the one that transport options describe.

        Raises:
            ValueError: An option makes no sense.
        """
        prefix = str(options.get("global_keyprefix") or "")
        limit = options.get("delivery_limit", DELIVERY_LIMIT)
        timeout = options.get("visibility_timeout", VISIBILITY_TIMEOUT)
        if not (limit is None or (type(limit) is int and limit >= 1)):
            raise ValueError(f"delivery_limit must be 1 or more, or None, not {limit!r}")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"visibility_timeout must be more than 0 seconds, not {timeout!r}")
        return cls(
            prefix=prefix,
            sep=options.get("sep", SEP),
            steps=tuple(options.get("priority_steps", PRIORITY_STEPS)),
            unacked=prefix + options.get("unacked_key", "unacked"),
            index=prefix + options.get("unacked_index_key", "unacked_index"),
            visibility_timeout=float(timeout),
            delivery_limit=limit,
            fanout=_fanout_prefix(options.get("fanout_prefix", True), database),
            fanout_patterns=bool(options.get("fanout_patterns", True)),
        )

    # -- queues -----------------------------------------------------------------------------------

    def key(self, queue: str, priority: int = 0) -> str:
        """Return the list that messages of a priority wait in."""
        step = self.steps[bisect(self.steps, priority) - 1]
        return f"{self.prefix}{queue}{self.sep}{step}" if step else self.prefix + queue

    def keys(self, queue: str) -> list[str]:
        """Return all lists of a queue, in the order in which they are taken from."""
        return [self.key(queue, step) for step in self.steps]

    def keys_in_order(self, queues: Sequence[str]) -> list[tuple[str, str]]:
        """Return the lists of several queues, each with its queue: the step comes first, then the queue."""
        return [(self.key(queue, step), queue) for step in self.steps for queue in queues]

    def priority_of(self, payload: dict[str, Any]) -> int:
        """Return the priority of a message; 0 for what is none."""
        try:
            return max(0, min(int(payload["properties"]["priority"]), 9))
        except (KeyError, TypeError, ValueError):
            return 0

    # -- what is held -----------------------------------------------------------------------------

    @property
    def owners(self) -> str:
        """The hash of the processes that hold messages."""
        return f"{self.prefix}_greenconsume.owners"

    @property
    def delayed(self) -> str:
        """The hash of what waits for its time."""
        return f"{self.prefix}_greenconsume.delayed"

    @property
    def delayed_index(self) -> str:
        """The sorted set of the times that it waits for."""
        return f"{self.prefix}_greenconsume.delayed_index"

    @staticmethod
    def tail_of(queue: str) -> bytes:
        """Return what ends the entries of a queue's messages, so that any restore goes back to it.

        kombu notes the exchange and the routing key, and a restore may so go to another queue.
        """
        return b',"",' + json.dumps(queue).encode() + b"]"

    # -- exchanges --------------------------------------------------------------------------------

    def bindings(self, exchange: str) -> str:
        """Return the set of an exchange's bindings."""
        return f"{self.prefix}_kombu.binding.{exchange}"

    def lasting_bindings(self, exchange: str) -> str:
        """Return the set of those whose queues do not expire."""
        return f"{self.prefix}_kombu.binding_permanent.{exchange}"

    @property
    def binding_prefixes(self) -> tuple[str, str]:
        """The beginnings of the keys of all sets of bindings, and of those of the lasting ones."""
        return self.bindings(""), self.lasting_bindings("")

    @property
    def binding_deadlines(self) -> str:
        """The sorted set of when the bindings of expiring queues end."""
        return f"{self.prefix}_kombu.binding_deadlines"

    def binding(self, routing_key: str, pattern: str, queue: str) -> str:
        """Return a binding as it is kept."""
        return self.sep.join((routing_key or "", pattern or "", queue or ""))

    @staticmethod
    def binding_ttl(expires: int) -> int:
        """Return the milliseconds that the bindings of a queue live which expires after so many."""
        return max(expires * _BINDING_FACTOR, _MIN_BINDING_TTL)

    def topic(self, exchange: str, routing_key: str) -> str:
        """Return what the messages of a fanout exchange are published to."""
        ending = f"/{routing_key}" if routing_key and self.fanout_patterns else ""
        return f"{self.prefix}{self.fanout}{exchange}{ending}"


def _fanout_prefix(option: object, database: int) -> str:
    if not option:
        return ""
    return (option if isinstance(option, str) else "/{db}.").format(db=database)
