"""Owns the time of what is held: it refreshes leases, restores what others left, brings back what waits.

It also keeps the expiring queues that are consumed, and their bindings. One greenlet for a ledger, whatever
its consumers do. Every few seconds one script says that this process lives and asks what is overdue. It
gives up no message of a process that lives: one is dead if it was not heard of for long *and* the server
has no connection of it, so a hub that is blocked loses nothing. It ends with the last link. Started by
`feed` and `channel`.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable
from time import monotonic

import gevent
from amqp.exceptions import RecoverableConnectionError
from redis import exceptions

from greenconsume.redis.feed import ensure_feeds
from greenconsume.redis.ledger import Ledger, number_of
from greenconsume.redis.link import Link
from greenconsume.redis.restore import Outcome, restore
from greenconsume.redis.scripts import BEAT, DUE, REFRESH, REFRESH_BINDING, SWEEP_BINDINGS
from greenconsume.stopping import Deadline, wait

logger = logging.getLogger("greenconsume.redis")

#: Seconds between two beats, and without one after which a process is taken for dead if it is not
#: connected.
BEAT_INTERVAL, DEAD_AFTER = 10.0, 25.0
#: A lease is refreshed so many times before it would be over.
REFRESHES = 4
#: And an expiring queue that is consumed so many times, but each so many seconds at most.
KEEPS, MIN_INTERVAL = 3, 0.1
#: How many messages are restored, or come back from their delay, by one look.
LOOK = 100
#: Seconds between two refreshes of the bindings of expiring queues, which live for an hour at least, and
#: between two looks for those that are over.
BINDING_INTERVAL, SWEEP_INTERVAL = 20 * 60.0, 60.0
#: How many fields one refresh names.
_CHUNK = 500
#: Seconds for which what the server refuses to restore for us is left to others, who may be let.
_REFUSED_FOR = 300.0


class Keeper:
    """Looks after one ledger while it has a link.

    Args:
        ledger: The ledger.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._greenlet: gevent.Greenlet[..., None] | None = None
        self._beat_at = self._refresh_at = self._due_at = self._bindings_at = self._sweep_at = 0.0
        self._kept_at = 0.0
        self._lease = ledger.keyspace.visibility_timeout / REFRESHES
        self._passed_count = 0  # of what is overdue, behind which the next look begins
        self._refused: set[bytes] = set()  # fields, and owners of such
        self._refused_until = 0.0
        # What this process could not put back, and whether it is counted.
        self._owed: dict[str, bool] = {}
        self._owed_at = 0.0
        self._known: Link | None = None  # the link that was last spoken over

    def start(self) -> None:
        """Begin, if it has not. Never switches."""
        if self._greenlet is None or self._greenlet.ready():
            self._greenlet = gevent.Greenlet(self._run)
            self._greenlet.name = "greenconsume redis keeper"
            self._refresh_at = monotonic() + self._lease
            self._beat_at, self._due_at = monotonic(), float("inf")
            self._greenlet.start()

    def expect(self, seconds: float) -> None:
        """Learn that something is due in so many seconds. Never switches."""
        due_at = monotonic() + max(0.0, seconds)
        if due_at < self._due_at:
            self._due_at = due_at
            self._ledger.changed.set()

    def _run(self) -> None:
        ledger = self._ledger
        while ledger.links:
            link = ledger.link
            ledger.changed.clear()
            try:
                if link is not None and not link.is_closing:
                    self._look(link)
            except RecoverableConnectionError:
                continue  # the link was lost; the next one will do
            wait(ledger.changed, Deadline(self._seconds_left(link)))

    def _seconds_left(self, link: Link | None) -> float | None:
        if link is None or link.is_closing:
            return None  # until it is gone, or another comes
        refresh_at = self._refresh_at if self._ledger.held else float("inf")
        # What is swept, and the bindings, can wait for the next beat.
        owed_at = self._owed_at if self._owed else float("inf")
        least = min(self._beat_at, refresh_at, self._due_at, self._keep_at, owed_at)
        return max(0.0, least - monotonic())

    @property
    def _keep_at(self) -> float:
        """The time at which expiring queues are to be kept again."""
        least = min(self._ledger.expiring_queues.values(), default=None)
        if least is None:
            return float("inf")
        return self._kept_at + max(least / 1000 / KEEPS, MIN_INTERVAL)

    def _look(self, link: Link) -> None:
        if link is not self._known:
            # Others know this process by its connection, and may have taken it for dead meanwhile.
            self._try(self._beat, link)
            if self._known is not None:
                self._refresh_at = 0.0
            self._bindings_at = self._kept_at = 0.0
            self._known = link
        now = monotonic()
        if now >= self._refresh_at:
            self._try(self._refresh, link)
        self._try(self._settle, link)
        if now >= self._bindings_at:
            self._try(self._refresh_bindings, link)
        if now >= self._due_at:
            self._try(self._bring_back, link)
        if now >= self._beat_at:
            self._try(self._beat, link)
        if now >= self._keep_at:
            self._try(self._keep_queues, link)
        if now >= self._sweep_at:  # behind the refresh of our own
            self._try(self._sweep, link)

    def _try(self, step: Callable[[Link], None], link: Link) -> None:
        """Do one thing; the others do not wait for one that the server refuses."""
        try:
            step(link)
        except RecoverableConnectionError:
            raise
        except (exceptions.ResponseError, OSError) as exc:
            logger.error("what is held in Redis cannot be looked after: %s", exc)

    # -- what this process has to say ---------------------------------------------------------------

    def _settle(self, link: Link) -> None:
        """Put back what failed, and what a lost link may have taken; later again what was refused."""
        ledger = self._ledger
        while ledger.failed or ledger.doubtful:
            fields, doubtful = sorted(ledger.failed, key=number_of), list(ledger.doubtful)
            self._put_back(link, fields, counted=True)
            self._put_back(link, doubtful, counted=False)
            ledger.note_returned(fields, doubtful)
        if self._owed and monotonic() >= self._owed_at:
            for counted in (True, False):
                owed = [field for field, how in self._owed.items() if how is counted]
                self._put_back(link, sorted(owed, key=number_of), counted)

    def _put_back(self, link: Link, fields: list[str], counted: bool) -> None:
        if fields:
            back = restore(link, self._ledger.keyspace, fields, counted)
            self._note_refused(back)
            self._touch(link, back.touched)
            for field in fields:
                self._owed.pop(field, None)
            self._owed |= dict.fromkeys(map(_text, dict(back.refused)), counted)
            self._owed_at = monotonic() + BEAT_INTERVAL

    def _note_refused(self, back: Outcome) -> None:
        """Tell what was refused, once for a while."""
        if monotonic() >= self._refused_until:
            self._refused.clear()
            self._refused_until = monotonic() + _REFUSED_FOR
        for field, why in back.refused:
            if (known := _text(field).encode()) not in self._refused:
                logger.error("a message cannot be restored (field %r): %s", field, why)
                self._refused.add(known)

    def _refresh(self, link: Link) -> None:
        ledger = self._ledger
        self._refresh_at = monotonic() + self._lease
        fields = list(ledger.held)
        for start in range(0, len(fields), _CHUNK):
            chunk = fields[start : start + _CHUNK]
            lost = link.call_script(REFRESH, (ledger.keyspace.index,), chunk)
            gone = [field.decode() for field in lost if field.decode() in ledger.held]
            ledger.forget(gone)
            if gone:
                logger.error(
                    "%d messages were not refreshed for %g s and went to others: they are handled twice",
                    *(len(gone), ledger.keyspace.visibility_timeout),
                )

    def _refresh_bindings(self, link: Link) -> None:
        """Keep the bindings of expiring queues that are consumed, which are swept away in time."""
        self._bindings_at = monotonic() + BINDING_INTERVAL
        space = self._ledger.keyspace
        for (exchange, member), ttl in self._ledger.expiring_bindings.items():
            keys = (space.bindings(exchange), space.binding_deadlines)
            link.call_script(REFRESH_BINDING, keys, (member, exchange, ttl))

    def _keep_queues(self, link: Link) -> None:
        """Keep what waits in expiring queues that are consumed, also while nobody has room for it."""
        self._kept_at = monotonic()
        for queue, expires in self._ledger.expiring_queues.items():
            for key in self._ledger.keyspace.keys(queue):
                link.send(("PEXPIRE", key, expires), matters=False)

    def _sweep(self, link: Link) -> None:
        """Delete bindings of expiring queues that nobody has refreshed: messages would pile up there."""
        self._sweep_at = monotonic() + SWEEP_INTERVAL
        space = self._ledger.keyspace
        arguments = (*space.binding_prefixes, LOOK)
        # A user who may not do it has others who may.
        link.run(SWEEP_BINDINGS, (space.binding_deadlines,), arguments, matters=False)

    # -- what others have left ------------------------------------------------------------------------

    def _beat(self, link: Link) -> None:
        space = self._ledger.keyspace
        keys = (space.index, space.owners, space.delayed_index)
        arguments = (
            self._ledger.owner,
            link.greeting.client_id or "0",
            space.visibility_timeout,
            LOOK,
            self._passed_count,
        )
        self._beat_at = monotonic() + min(
            BEAT_INTERVAL, max(1.0, space.visibility_timeout / REFRESHES)
        )
        overdue, owners, due = link.call_script(BEAT, keys, arguments, matters=False)
        if due:
            self.expect(float(due))
        self._restore_overdue(link, overdue)
        silent = [
            (name, client.decode())
            for name, age, client in owners
            if float(age) > DEAD_AFTER and _text(name) != self._ledger.owner
        ]
        if silent:
            self._inherit(link, silent)

    def _restore_overdue(self, link: Link, overdue: list[bytes]) -> None:
        ledger, timeout = self._ledger, self._ledger.keyspace.visibility_timeout
        fields = [
            field
            for field in overdue
            if _text(field) not in ledger.held and field not in self._refused
        ]
        refused_count = 0
        if fields:
            fields.sort(key=_number_in)
            back = restore(link, ledger.keyspace, fields, untouched_for=timeout)
            refused_count = len(back.refused)
            self._note_refused(back)
            self._touch(link, back.touched)
            if back.touched:
                count = len(fields) - refused_count
                logger.warning(
                    "%d messages that nobody had settled in %g s are back", count, timeout
                )
        if len(overdue) == LOOK:  # there is more, behind those that stay
            self._passed_count += len(overdue) - len(fields) + refused_count
            self._beat_at = 0.0
        else:
            self._passed_count = 0

    def _inherit(self, link: Link, silent: list[tuple[bytes, str]]) -> None:
        """Restore what was held by those of the silent whose connection is gone.

        Where this is refused their note stays: they are another user's, and he finds them by it.
        """
        silent = [each for each in silent if each[0] not in self._refused]
        try:
            listed = link.call("CLIENT", "LIST", "ID", *(client for _, client in silent))
        except exceptions.ResponseError:
            return  # not for us to ask: their messages come back when their time is over
        text = listed.decode() if isinstance(listed, bytes) else str(listed)
        connected = {part[3:] for part in text.split() if part.startswith("id=")}
        for owner, client in silent:
            if client in connected:
                continue
            fields = sorted(self._fields_of(link, owner), key=_number_in)
            back = restore(link, self._ledger.keyspace, fields)
            self._note_refused(back)
            self._touch(link, back.touched)
            if back.touched:
                count = len(fields) - len(back.refused)
                logger.warning("%d messages of a process that is gone are back", count)
            if back.refused:
                self._refused.add(owner)
            else:
                link.call("HDEL", self._ledger.keyspace.owners, owner)

    def _fields_of(self, link: Link, owner: bytes) -> list[bytes]:
        cursor: bytes = b"0"
        found: list[bytes] = []
        while True:
            index = self._ledger.keyspace.index
            cursor, pairs = link.call("ZSCAN", index, cursor, "MATCH", owner + b"*", "COUNT", 1000)
            found += pairs[::2]
            if cursor == b"0":
                return list(dict.fromkeys(found))

    # -- what waits -------------------------------------------------------------------------------------

    def _bring_back(self, link: Link) -> None:
        space = self._ledger.keyspace
        keys = (space.delayed, space.delayed_index)
        self._due_at = monotonic() + BEAT_INTERVAL
        touched, due, refusal = link.call_script(DUE, keys, (LOOK,))
        self._due_at = float("inf")
        self._touch(link, [key.decode() for key in touched])
        if refusal:
            logger.error("a message whose time has come cannot be put back: %s", refusal.decode())
            self.expect(BEAT_INTERVAL)
        elif due:
            self.expect(float(due))

    def _touch(self, link: Link, keys: Iterable[str]) -> None:
        ensure_feeds(link, self._ledger).touch(keys)


_keepers: weakref.WeakKeyDictionary[Ledger, Keeper] = weakref.WeakKeyDictionary()


def ensure_keeper(ledger: Ledger) -> Keeper:
    """Return the keeper of a ledger, which runs. Never switches."""
    found = _keepers.get(ledger)
    if found is None:
        found = _keepers[ledger] = Keeper(ledger)
    found.start()
    return found


def _text(field: bytes | str) -> str:
    # What is not ours may be any bytes.
    return field if isinstance(field, str) else field.decode(errors="replace")


def _number_in(field: bytes) -> tuple[int, int]:
    """Return a key to sort by: kombu's fields first, then those of a process in the order of their taking."""
    tail = field.rpartition(b".")[2]
    return (1, int(tail)) if tail.isdigit() else (0, 0)


os.register_at_fork(after_in_child=_keepers.clear)
