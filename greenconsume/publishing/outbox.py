"""Owns what a publisher has outstanding: each message from its `put` until the broker has answered for it.

While the channel lives, who publishes writes to it at once. When it is lost, a sender greenlet connects,
writes what is outstanding again, in its order, and ends; it also waits for what has to be declared first.
It must never publish on a link that consumes (law 6), nor raise one message's error for another. Called by
`publisher`.
"""

from __future__ import annotations

from collections import deque
from math import inf
from time import monotonic
from typing import Any

import gevent
import kombu
from amqp.exceptions import ChannelError, MessageNacked, RecoverableConnectionError
from gevent.event import Event
from gevent.lock import Semaphore

from greenconsume.amqp.confirms import PublishingChannel
from greenconsume.amqp.transport import LinkLostError
from greenconsume.errors import (
    BlockedError,
    NackedError,
    PublishError,
    PublishTimeoutError,
    RefusedError,
    ReturnedError,
    StoppedError,
    UnconfirmedError,
)
from greenconsume.events import PublishFailed, emit
from greenconsume.links.backoff import delays
from greenconsume.links.pool import LinkPool
from greenconsume.publishing.publication import Publication
from greenconsume.publishing.publish_channel import Lane, PlainChannel
from greenconsume.stopping import Deadline, StopSignal, wait

#: Of the failed messages that nobody waited for, this many are kept to be raised.
_MAX_UNSEEN = 1000
#: Seconds that the sender may take to end.
_CLOSE_TIMEOUT = 5.0


class Outbox:
    """The outstanding messages of one publisher, and the channel that they go out on.

    Attributes:
        stop: Ends every wait, and fails what is outstanding.
        unseen: The messages that failed while nobody waited for them, the oldest first.
    """

    def __init__(self, broker: kombu.Connection, links: LinkPool, max_unconfirmed: int) -> None:
        self.stop = StopSignal()
        self.unseen: dict[Publication, None] = {}
        self._lane = Lane(broker, links, self.stop)
        self._room = Semaphore(max_unconfirmed)
        self._outstanding: dict[Publication, None] = {}  # in the order in which they were put
        self._unsent: deque[Publication] = deque()  # those of them that the sender is to write
        self._lost: list[tuple[Publication, BaseException]] = []  # what they were answered with
        self._rewind = False  # the channel was lost: all that is outstanding is unsent
        self._live: PublishingChannel | None = None  # while who publishes may write to it
        self._sender: gevent.Greenlet[..., None] | None = None
        self._answered = Event()
        self._setbacks = 0  # how often the channel was lost since a message was last answered for
        self._delays = delays()
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
        if not self._room.acquire(blocking=False):
            self._wait_for_room(publication)
        try:
            self._wait_publishable(publication)
            self.stop.check()
            self._write(publication)
        except BaseException:  # a kill too: the message is not outstanding
            self._room.release()
            raise

    def _wait_for_room(self, publication: Publication) -> None:
        if not self._room.acquire(timeout=publication.deadline.remaining):
            what = f"was not written in time: {len(self._outstanding)} others are unconfirmed"
            raise publication.failed(self._overdue, what, self._lane.trouble)

    def _wait_publishable(self, publication: Publication) -> None:
        while self._live is not None and not self._live.publishable:
            try:
                self._live.wait_publishable(publication.deadline, self.stop)
            except LinkLostError:
                return
            except RecoverableConnectionError as exc:
                raise publication.failed(self._overdue, "was not written in time", exc) from exc

    def _write(self, publication: Publication) -> None:
        """Write a message, or have the sender write it. Never switches."""
        declare = publication.declare
        if self._live is not None and (not declare or self._lane.has_declared(declare)):
            try:
                _write(self._live, publication)
            except (ChannelError, RecoverableConnectionError) as exc:
                self._lose(exc)
        else:
            self._live = None  # later ones go behind it
            self._unsent.append(publication)
            self._start_sender()
        self._outstanding[publication] = None
        if publication.due < self._next_due:
            self._watch(publication.due)

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
            self._lost.append((publication, error))
            self._lose(error)

    def wait_for(self, publication: Publication, timeout: float | None) -> None:
        """Wait until a message is ready; see `Publication.wait`."""
        if not publication.event.wait(timeout):
            raise publication.failed(PublishTimeoutError, f"is not confirmed after {timeout} s")

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
            self._give_up(publication)
        self._watch(min((each.due for each in self._outstanding), default=inf))

    def _give_up(self, publication: Publication) -> None:
        what = f"was not confirmed in time: {publication.fate}"
        self._finish(publication, publication.failed(self._overdue, what, self._lane.trouble))

    @property
    def _overdue(self) -> type[PublishTimeoutError]:
        return BlockedError if self._lane.blocked else PublishTimeoutError

    def _finish(self, publication: Publication, error: PublishError | None) -> None:
        if publication not in self._outstanding:
            return  # it was given up, and this comes too late
        del self._outstanding[publication]
        publication.finish(error)
        self._room.release()
        self._setbacks = 0
        if publication.alone:
            self._answered.set()
        if error is not None and not publication.waiting_count:
            self._note_unseen(publication, error)

    def _note_unseen(self, publication: Publication, error: PublishError) -> None:
        self.unseen[publication] = None
        if len(self.unseen) > _MAX_UNSEEN:
            del self.unseen[next(iter(self.unseen))]
        self._untold_count += 1
        if self._untold_count == 1:  # thousands may fail at once: that is one line in the log
            gevent.get_hub().loop.run_callback(self._tell, error)

    def _tell(self, error: PublishError) -> None:
        count, self._untold_count = self._untold_count, 0
        emit(PublishFailed(self._lane.uri, count, error))

    # -- the sender -----------------------------------------------------------------------------------

    def _lose(self, error: BaseException) -> None:
        """The channel is lost, alone or with its link. Never switches."""
        self._live = None
        self._rewind = True
        self._lane.trouble = error
        self._answered.set()
        self._start_sender()

    def _start_sender(self) -> None:
        if self._sender is None:
            self.stop.link(self._on_stop)
            self._sender = gevent.spawn(self._send)
            self._sender.name = f"sender to {self._lane.uri}"

    def _send(self) -> None:
        try:
            while self._outstanding:
                if self._rewind:
                    self._rewind = False
                    self._judge()
                    self._pace()
                    self._unsent = deque(self._outstanding)
                if self._write_unsent():
                    break
        except StoppedError:
            pass  # everybody is told by `_on_stop`
        except Exception as exc:  # no broker's error, so trying again is no remedy: theirs to raise
            for publication in list(self._outstanding):
                what = f"cannot be published: {exc}"
                self._finish(publication, publication.failed(PublishError, what, exc))
        finally:
            self._sender = None

    def _judge(self) -> None:
        """Fail what the lost channel was closed for, and what is not to be written again."""
        lost, self._lost = self._lost, []
        refused = {each: error for each, error in lost if isinstance(error, ChannelError)}
        culprits = _culprits(refused)
        for publication, error in lost:
            if publication in culprits:
                what = f"was refused by the broker: {error}"
                self._finish(publication, publication.failed(RefusedError, what, error))
            elif publication.written_count > publication.max_retries:
                what = f"was lost with its link: {publication.fate}"
                self._finish(publication, publication.failed(UnconfirmedError, what, error))
            else:
                publication.alone = bool(refused) and not culprits

    def _pace(self) -> None:
        self._setbacks += 1
        if self._setbacks == 1:
            self._delays = delays()
        else:  # a link that is lost whenever it is used must not be dialled in a loop
            self.stop.wait(next(self._delays))
        self.stop.check()

    def _write_unsent(self) -> bool:
        """Write what is unsent; return whether there is nothing left, and its channel lives."""
        try:
            channel = self._lane.connect()
            while self._unsent and not self._rewind:
                publication = self._unsent.popleft()
                if not publication.ready:  # else it was given up
                    self._write_next(channel, publication)
        except self._lane.errors as exc:
            self._lose(exc)
            return False
        if isinstance(channel, PublishingChannel) and not self._rewind:
            self._live, self._lane.trouble = channel, None
        return not self._rewind

    def _write_next(
        self, channel: PublishingChannel | PlainChannel, publication: Publication
    ) -> None:
        try:
            self._declare(publication)
            channel.wait_publishable(publication.deadline, self.stop)
            if not (publication.ready or self._rewind):
                _write(channel, publication)
        except PublishError as exc:
            self._finish(publication, exc)
        except RecoverableConnectionError:
            if channel.lost or monotonic() < publication.due:
                raise
            self._give_up(publication)
        if publication.alone:
            self._await_answer(publication)

    def _declare(self, publication: Publication) -> None:
        try:
            self._lane.declare(publication.declare)
        except (
            TimeoutError
        ) as exc:  # the channel lives, and what is on its way there is not written again
            what = f"was not published, as what it declares is not answered in time: {exc}"
            raise publication.failed(PublishTimeoutError, what, exc) from exc
        except ChannelError as exc:
            what = f"was not published, as the broker refuses what it declares: {exc}"
            raise publication.failed(RefusedError, what, exc) from exc

    def _await_answer(self, publication: Publication) -> None:
        while not (publication.ready or self._rewind):
            self._answered.clear()
            wait(self._answered, Deadline(None), self.stop)
            self.stop.check()

    # -- the end --------------------------------------------------------------------------------------

    def flush(self, deadline: Deadline) -> None:
        """Wait for everything that is outstanding now; see `Publisher.flush`."""
        for publication in list(self._outstanding):
            if not publication.ready and not publication.event.wait(deadline.remaining):
                text = f"{len(self._outstanding)} messages are not confirmed in time"
                raise PublishTimeoutError(text) from self._lane.trouble
        self._raise_unseen()

    def _raise_unseen(self) -> None:
        unseen, self.unseen = list(self.unseen), {}
        if unseen:
            text = f"{len(unseen)} messages that nobody waited for were not published; the first: "
            raise PublishError(text + str(unseen[0].error)) from unseen[0].error

    def close(self) -> None:
        """Fail what is outstanding, and let go of the link. Switches: yes, within its `close_timeout`."""
        self.stop.set("close")
        self._on_stop()
        if self._sender is not None:
            self._sender.join(_CLOSE_TIMEOUT)
        if self._sender is not None:  # a transport that is deaf to a stop
            self._sender.kill(block=False)
        self._watch(inf)
        self._lane.close()

    def _on_stop(self) -> None:
        self._live = None
        self._unsent.clear()
        why = StoppedError(self.stop.reason or "stop")
        for publication in list(self._outstanding):
            what = f"was not confirmed when its publisher was stopped: {publication.fate}"
            self._finish(publication, publication.failed(UnconfirmedError, what, why))


def _write(channel: PublishingChannel | PlainChannel, publication: Publication) -> None:
    try:
        channel.publish_confirm(publication)
    except (ChannelError, RecoverableConnectionError):
        raise
    except Exception as exc:  # whatever py-amqp raises for a value that AMQP has no type for
        raise publication.failed(PublishError, f"cannot be published: {exc}", exc) from exc
    publication.written_count += 1


def _culprits(refused: dict[Publication, ChannelError]) -> set[Publication]:
    """Return which of the messages on a channel the broker closed it for: none, if that cannot be told."""
    if len(refused) < 2:
        return set(refused)
    # RabbitMQ names the exchange that it misses, or that is forbidden; of other errors it names nothing.
    return {
        publication
        for publication, error in refused.items()
        if f"exchange '{publication.exchange}' in vhost" in str(error.reply_text)
    }
