"""Owns how unacknowledged messages come back to their queue: whose they were, where to, how often.

A message goes to the end that it came from, so it is next; past the delivery limit it goes to
`{queue}.dead` instead. What plain kombu holds is restored as kombu would. Each move happens as a whole, and
only if nobody has settled, refreshed or restored it meanwhile: no lock is needed. Called by `keeper`;
switches.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis import exceptions

from greenconsume.redis.keyspace import Keyspace
from greenconsume.redis.link import Link
from greenconsume.redis.message import buried, recounted
from greenconsume.redis.scripts import MOVE, REFRESH

logger = logging.getLogger("greenconsume.redis")

#: So many messages are moved by one script.
CHUNK = 50


#: What stands in entries of ours between the message and its queue; see `Keyspace.tail_of`.
_TAIL = b',"",'


class Outcome(NamedTuple):
    """The lists that got something, and the fields of what the server refused to move, which stay."""

    touched: set[str]
    refused: list[tuple[bytes | str, exceptions.ResponseError]]


class _Move(NamedTuple):
    field: bytes | str
    keys: list[str]
    side: str
    payload: bytes


def restore(
    link: Link,
    keyspace: Keyspace,
    fields: Sequence[bytes | str],
    counted: bool = True,
    untouched_for: float | None = None,
) -> Outcome:
    """Put messages back, the first of `fields` being the next to be taken.

    Args:
        link: Where to.
        keyspace: The names of the keys.
        fields: What they are held as.
        counted: They were not settled, and that is counted; else they go back unaltered.
        untouched_for: Seconds since they were refreshed, or they stay; None: in any case.

    Raises:
        LinkLostError: The link was lost; to say it again does no harm.
        redis.exceptions.ResponseError: The server tells nothing of what is held.

    Switches: yes.
    """
    outcome = Outcome(set(), [])
    backwards = list(reversed(fields))
    for start in range(0, len(backwards), CHUNK):
        chunk = backwards[start : start + CHUNK]
        entries = link.call("HMGET", keyspace.unacked, *chunk)
        moves = []
        for field, entry in zip(chunk, entries, strict=True):
            if entry is None:
                link.send(("ZREM", keyspace.index, field))  # left of one that was acknowledged
            else:
                moves += _moves(link, keyspace, field, entry, counted)
        if moves:
            _run_what_may_be(link, keyspace, moves, untouched_for, outcome)
    return outcome


def _run_what_may_be(
    link: Link,
    keyspace: Keyspace,
    moves: list[_Move],
    untouched_for: float | None,
    outcome: Outcome,
) -> None:
    """Move what the server lets this user move: one that is refused is in nobody's way."""
    try:
        outcome.touched.update(_run(link, keyspace, moves, untouched_for))
        return
    except exceptions.ResponseError as exc:
        if len(moves) == 1:
            outcome.refused.append((moves[0].field, exc))
            return
    for move in moves:
        outcome.touched.update(move.keys)  # some were moved before the refusal
        _run_what_may_be(link, keyspace, [move], untouched_for, outcome)


def _run(
    link: Link, keyspace: Keyspace, moves: list[_Move], untouched_for: float | None
) -> set[str]:
    keys = (keyspace.unacked, keyspace.index, *(key for move in moves for key in move.keys))
    arguments: list[Any] = ["" if untouched_for is None else untouched_for]
    for move in moves:
        arguments += (move.field, move.side, move.payload, len(move.keys))
    moved = link.call_script(MOVE, keys, arguments)
    return {key for move, done in zip(moves, moved, strict=True) if done for key in move.keys}


def _moves(
    link: Link, keyspace: Keyspace, field: bytes | str, entry: bytes, counted: bool
) -> list[_Move]:
    try:
        payload, exchange, routing_key = json.loads(entry)
        # kombu notes no queue, only how it was routed, which may be to several.
        queues = [routing_key] if not exchange else _lookup(link, keyspace, exchange, routing_key)
        raw = _raw_of(keyspace, entry, payload, queues[0])
        priority = keyspace.priority_of(payload)
        if counted:
            raw, count = recounted(raw)
            limit = keyspace.delivery_limit
            if limit is not None and count > limit:
                return [_bury(keyspace, field, raw, queues[0], count)]
    except OSError:
        raise  # the link was lost, or does not answer
    except Exception as exc:  # what is no message of kombu's
        return _move_as_it_is(link, keyspace, field, entry, exc)
    return [_Move(field, [keyspace.key(queue, priority) for queue in queues], "R", raw)]


def _move_as_it_is(
    link: Link, keyspace: Keyspace, field: bytes | str, entry: bytes, why: Exception
) -> list[_Move]:
    """Put back what cannot be read, where the entry is ours and so says where it is from."""
    head, separator, queue = entry.rpartition(_TAIL)
    try:
        [name] = json.loads(b"[" + queue) if separator else []
    except ValueError:
        logger.error("a message cannot be restored (field %r): %r", field, why)
        # Else it would be in the way of others at the next look, and the one after that.
        link.run(REFRESH, (keyspace.index,), (field,))
        return []
    return [_Move(field, [keyspace.key(name)], "R", head[1:])]


def _raw_of(keyspace: Keyspace, entry: bytes, payload: object, queue: str) -> bytes:
    tail = keyspace.tail_of(queue)
    if entry.endswith(tail):
        return entry[1 : len(entry) - len(tail)]
    return json.dumps(payload).encode()


def _bury(keyspace: Keyspace, field: bytes | str, raw: bytes, queue: str, count: int) -> _Move:
    logger.error(
        "a message of queue %r came back unsettled %d times and was put into %s.dead",
        queue,
        count,
        queue,
    )
    dead = buried(raw, queue, "delivery_limit")
    return _Move(field, [keyspace.key(f"{queue}.dead")], "L", dead)


def _lookup(link: Link, keyspace: Keyspace, exchange: str, routing_key: str) -> list[str]:
    """Return the queues that a message was routed to; where none is left, the one of its routing key."""
    bindings = link.call("SMEMBERS", keyspace.bindings(exchange))
    found = set()
    for binding in bindings:
        key, pattern, queue = binding.decode().split(keyspace.sep)
        if key == routing_key or (pattern and re.match(pattern, routing_key)):
            found.add(queue)
    return sorted(found) or [routing_key]
