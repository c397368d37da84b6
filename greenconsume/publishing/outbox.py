"""Owns what a publisher has outstanding: each message from its `put` until the broker has answered for it.

How many there may be, when each is given up, and which failed unseen is decided here; how they get onto the
wire, and again after a loss, is `sender`'s. It must never raise one message's error for another. Called by
`publisher`, and by what publishes the copies of failed messages.
"""

from __future__ import annotations

from math import inf
from time import monotonic
from typing import Any

import gevent
import kombu
from amqp.exceptions import MessageNacked, RecoverableConnectionError
from gevent.lock import Semaphore

from greenconsume.amqp.transport import LinkLostError
from greenconsume.errors import (
    BlockedError,
    NackedError,
    PublishError,
    PublishTimeoutError,
    ReturnedError,
    StoppedError,
    UnconfirmedError,
)
from greenconsume.events import PublishFailed, emit
from greenconsume.links.pool import LinkPool
from greenconsume.publishing.publication import Publication
from greenconsume.publishing.publish_channel import PublishChannel
from greenconsume.publishing.sender import Sender
from greenconsume.stopping import Deadline, StopSignal
from greenconsume.tally import published_to

#: Of the failed messages that nobody waited for, this many are kept to be raised.
_MAX_UNSEEN = 1000
#: Seconds that the sender may take to end.
_CLOSE_TIMEOUT = 5.0


class Outbox:
    """The outstanding messages of one publisher.

    Args:
        broker: Where they go.
        links: Where the link comes from.
        max_unconfirmed: While so many are outstanding, `put` waits; None: never.

    Attributes:
        stop: Ends every wait, and fails what is outstanding.
    """

    def __init__(
        self, broker: kombu.Connection, links: LinkPool, max_unconfirmed: int | None = None
    ) -> None:
        self.stop = StopSignal()
        self._channel = PublishChannel(broker, links, self.stop)
        self._tally = published_to(self._channel.uri)
        self._room = None if max_unconfirmed is None else Semaphore(max_unconfirmed)
        self._hears_stop = False
        self._outstanding: dict[Publication, None] = {}  # in the order in which they were put
        self._sender = Sender(
            self._channel, self._outstanding, self._finish, self._give_up_due, self.stop
        )
        self._unseen: dict[Publication, None] = {}  # failed while nobody waited, the oldest first
        self._untold_count = 0
        self._timer: Any = None
        self._next_due = inf  # when the timer fires

    # -- putting --------------------------------------------------------------------------------------

    def put(self, publication: Publication) -> None:
        """Take a message, and write it as soon as its channel lives.

        Raises:
            PublishTimeoutError: There was no room for it in time.
            BlockedError: The broker blocked its publishers for too long.
            PublishError: One of its properties cannot be encoded.
            StoppedError: `stop` is set.

        Switches: while as many are outstanding as may be, or the channel takes no more.
        """
        room = self._room
        if room is not None and not room.acquire(blocking=False):
            self._wait_for_room(room, publication)
        try:
            self._wait_publishable(publication)
            self.stop.check()
            self._sender.write(publication)
        except BaseException:  # a kill too: the message is not outstanding
            if room is not None:
                room.release()
            raise
        self._note(publication)

    def put_nowait(self, publication: Publication) -> None:
        """Take a message, and have it written as soon as it can be. Never switches.

        Only where there is no `max_unconfirmed`.

        Raises:
            PublishError: One of its properties cannot be encoded.
            StoppedError: `stop` is set.
        """
        self.stop.check()
        live = self._sender.live
        if live is not None and not live.publishable:
            self._sender.write_later(publication)
        else:
            self._sender.write(publication)
        self._note(publication)

    def _note(self, publication: Publication) -> None:
        if not self._hears_stop:  # only now: it may be made before there is a hub
            self._hears_stop = True
            self.stop.link(self._on_stop)
        if self._tally.timings is not None:
            publication.put_at = monotonic()
        self._outstanding[publication] = None
        if publication.due < self._next_due:
            self._watch(publication.due)

    def _wait_for_room(self, room: Semaphore, publication: Publication) -> None:
        if not room.acquire(timeout=publication.deadline.remaining):
            what = f"was not written in time: {len(self._outstanding)} others are unconfirmed"
            raise publication.failed(self._overdue, what, self._channel.trouble)

    def _wait_publishable(self, publication: Publication) -> None:
        while (live := self._sender.live) is not None and not live.publishable:
            try:
                live.wait_publishable(publication.deadline, self.stop)
            except LinkLostError:
                return
            except RecoverableConnectionError as exc:
                raise publication.failed(self._overdue, "was not written in time", exc) from exc

    # -- answers --------------------------------------------------------------------------------------

    def on_answer(self, publication: Publication, error: BaseException | None) -> None:
        """Take the channel's answer for a message. Never switches."""
        if error is None:  # first: it is what happens
            self._finish(publication, None)
        elif error is publication.returned:
            what = f"was returned by the broker: {error}"
            self._finish(publication, publication.failed(ReturnedError, what, error))
        elif isinstance(error, MessageNacked):
            what = "was not taken by the broker (nacked): publish it again later"
            self._finish(publication, publication.failed(NackedError, what, error))
        else:
            self._sender.note_lost(publication, error)

    def give_up(self, publication: Publication, why: str) -> None:
        """Forget a message: it is not written again, and fails with `UnconfirmedError`. Never switches."""
        what = f"was given up, as {why}: {publication.fate}"
        error = publication.failed(UnconfirmedError, what, self._channel.trouble)
        self._finish(publication, error)

    def _watch(self, due: float) -> None:
        """Have what is overdue given up then: one timer for all, for each would cost as much as its wait."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self._next_due = due
        if due < inf:
            self._timer = gevent.get_hub().loop.timer(max(0.0, due - monotonic()), ref=False)
            self._timer.start(self._give_up_overdue)

    def _give_up_overdue(self) -> None:
        now = monotonic()
        for publication in [each for each in self._outstanding if each.due <= now]:
            self._give_up_due(publication)
        self._watch(min((each.due for each in self._outstanding), default=inf))

    def _give_up_due(self, publication: Publication) -> None:
        what = f"was not confirmed in time: {publication.fate}"
        self._finish(publication, publication.failed(self._overdue, what, self._channel.trouble))

    @property
    def _overdue(self) -> type[PublishTimeoutError]:
        return BlockedError if self._channel.blocked else PublishTimeoutError

    def _finish(self, publication: Publication, error: PublishError | None) -> None:
        if publication not in self._outstanding:
            return  # it was given up, and this comes too late
        del self._outstanding[publication]
        self._tally.note(publication.put_at, None if error is None else type(error).__name__)
        publication.finish(error)
        if self._room is not None:
            self._room.release()
        self._sender.note_answered(publication)
        if error is not None and not publication.waiting_count:
            self._note_unseen(publication, error)

    def _note_unseen(self, publication: Publication, error: PublishError) -> None:
        self._unseen[publication] = None
        if len(self._unseen) > _MAX_UNSEEN:
            del self._unseen[next(iter(self._unseen))]
        self._untold_count += 1
        if self._untold_count == 1:  # thousands may fail at once: that is one line in the log
            gevent.get_hub().loop.run_callback(self._tell, error)

    def _tell(self, error: PublishError) -> None:
        count, self._untold_count = self._untold_count, 0
        emit(PublishFailed(self._channel.uri, count, error))

    # -- the end --------------------------------------------------------------------------------------

    def flush(self, deadline: Deadline) -> None:
        """Wait for everything that is outstanding now; see `Publisher.flush`."""
        for publication in list(self._outstanding):
            if not publication.ready and not publication.event.wait(deadline.remaining):
                text = f"{len(self._outstanding)} messages are not confirmed in time"
                raise PublishTimeoutError(text) from self._channel.trouble
        self._raise_unseen()

    def _raise_unseen(self) -> None:
        unseen = [publication for publication in self._unseen if not publication.seen]
        self._unseen.clear()
        if unseen:
            text = f"{len(unseen)} messages that nobody waited for were not published; the first: "
            raise PublishError(text + str(unseen[0].error)) from unseen[0].error

    def close(self) -> None:
        """Fail what is outstanding, and let go of the link. Switches: yes, within its `close_timeout`."""
        self.stop.set("close")
        self._on_stop()
        self._sender.join(_CLOSE_TIMEOUT)
        self._watch(inf)
        self._channel.close()

    def _on_stop(self) -> None:
        self._sender.forget()
        why = StoppedError(self.stop.reason or "stop")
        for publication in list(self._outstanding):
            what = f"was not confirmed when its publisher was stopped: {publication.fate}"
            self._finish(publication, publication.failed(UnconfirmedError, what, why))
