"""Owns getting messages onto the wire, in their order, over one channel after another.

While the channel lives, who publishes writes to it at once. When it is lost, a greenlet connects, writes
what is outstanding again, and ends; it also waits for what has to be declared first. It must never answer for
one message with another's error. Called by `outbox`.

How a publisher recovers
------------------------

A message is *outstanding* from the moment it was put until the broker has answered for it, and outstanding
messages keep the order in which they were put. A lost channel leaves all of them in doubt: any may have
arrived. So all are written again, in that order, over the next channel; one that had arrived is there twice,
with the same `message_id`, and none is lost.

1. *Lost.* The channel answers each message that was written to it with the error. The first answer ends
   `live`: from here on everything that is put goes behind, to the greenlet. `_rewind` says that the list of
   what is unsent is to be made anew; it may be set again at any time, by the loss of the next channel.

2. *Judge.* Written again, the message for which the broker closed the channel would close the next one, too,
   and nothing behind it would ever get through. Who it was can be told in three cases: the broker names its
   exchange; or it was the only one on its way; or, of a link, the only one on a link that nobody shares.
   Those fail with the broker's own error. Where it cannot be told, everything that was on its way is
   *suspect* (`alone`): from then on each suspect is written when no other is on its way, and the next after
   its answer; a link is then taken that nobody else uses. So the one that did it is found after one more
   loss, and each of the others is written twice at the most. A link that merely broke, or that the broker's
   operator closed (320), accuses nobody.

3. *Pace.* The first loss after an answer is mended at once, each further one after a longer delay: a link
   that is lost whenever it is used must not be dialled in a loop.

4. *Write*, until nothing is unsent. Then the channel is `live` again, in the same turn of the hub, so that
   nobody can get in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic

import amqp
import gevent
from amqp.exceptions import AMQPError, ChannelError, ConnectionForced, RecoverableConnectionError
from gevent.event import Event

from greenconsume.amqp.channel_publisher import ChannelPublisher
from greenconsume.amqp.properties import refused_part
from greenconsume.amqp.transport import LinkLostError
from greenconsume.errors import (
    PublishError,
    PublishTimeoutError,
    RefusedError,
    StoppedError,
    UnconfirmedError,
)
from greenconsume.links import backoff
from greenconsume.publishing.publication import Publication
from greenconsume.publishing.publish_channel import PlainChannel, PublishChannel
from greenconsume.stopping import Deadline, StopSignal, wait


class Sender:
    """Writes messages, at once while the channel lives, else from a greenlet that brings it back.

    Args:
        channel: What is written to.
        outstanding: What has no answer yet, in its order; kept by the outbox.
        finish: Takes what became of a message.
        give_up: Called with a message whose time is over.
        stop: Ends every wait.

    Attributes:
        live: The channel, while who publishes may write to it.
    """

    def __init__(
        self,
        channel: PublishChannel,
        outstanding: Mapping[Publication, None],
        finish: Callable[[Publication, PublishError | None], object],
        give_up: Callable[[Publication], object],
        stop: StopSignal,
    ) -> None:
        self.live: ChannelPublisher | None = None
        self._channel = channel
        self._outstanding = outstanding
        self._finish = finish
        self._give_up = give_up
        self._stop = stop
        self._unsent: deque[Publication] = (
            deque()
        )  # of what is outstanding, what the greenlet is to write
        self._lost: list[tuple[Publication, BaseException]] = []  # what a lost channel answered
        self._rewind = False  # the channel was lost: all that is outstanding is unsent
        self._greenlet: gevent.Greenlet[..., None] | None = None
        self._answered = Event()  # set by the answer for a suspect, and by a loss
        self._setbacks = 0  # how often the channel was lost since a message was last answered for
        self._delays = backoff.delays()

    # -- what the outbox calls ------------------------------------------------------------------------

    def write(self, publication: Publication) -> None:
        """Write a message, or have the greenlet write it. Never switches.

        Raises:
            PublishError: It cannot be encoded.
        """
        declare = publication.declare
        if self.live is not None and (not declare or self._channel.has_declared(declare)):
            try:
                _write(self.live, publication)
            except (ChannelError, RecoverableConnectionError) as exc:
                self._lose(exc)
        else:
            self.write_later(publication)

    def write_later(self, publication: Publication) -> None:
        """Have the greenlet write a message, and whatever is put after it. Never switches."""
        self.live = None
        self._unsent.append(publication)
        self._start()

    def note_answered(self, publication: Publication) -> None:
        """Take note that a message has its answer. Never switches."""
        self._setbacks = 0
        if publication.alone:
            self._answered.set()

    def note_lost(self, publication: Publication, error: BaseException) -> None:
        """Take note that the channel was lost with this message on its way. Never switches."""
        self._lost.append((publication, error))
        self._lose(error)

    def forget(self) -> None:
        """Write nothing more: everything that is outstanding fails. Never switches."""
        self.live = None
        self._unsent.clear()

    def join(self, timeout: float) -> None:
        """Wait until the greenlet has ended; it is killed at the timeout. Switches: yes, if it runs."""
        if self._greenlet is not None:
            self._greenlet.join(timeout)
        if self._greenlet is not None:  # a transport that is deaf to a stop
            self._greenlet.kill(block=False)

    def _lose(self, error: BaseException) -> None:
        self.live = None
        self._rewind = True
        self._channel.trouble = error
        self._answered.set()
        self._start()

    # -- the greenlet ---------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._greenlet is None:
            self._greenlet = gevent.spawn(self._run)
            self._greenlet.name = f"sender to {self._channel.uri}"

    def _run(self) -> None:
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
            pass  # the outbox tells everybody
        except Exception as exc:  # no broker's error, so trying again is no remedy: theirs to raise
            for publication in list(self._outstanding):
                what = f"cannot be published: {exc}"
                self._finish(publication, publication.failed(PublishError, what, exc))
        finally:
            self._greenlet = None

    def _judge(self) -> None:
        """Fail what the channel was lost for, and what is not to be written again."""
        lost, self._lost = self._lost, []
        of_link = self._channel.channel is None or self._channel.channel.lost
        found = ((each, _refusal_in(error, of_link)) for each, error in lost)
        refused = {each: error for each, error in found if error is not None}
        culprits = self._culprits(refused, of_link)
        for each, error in lost:
            if refused.get(each) is error and not isinstance(error, ChannelError):
                culprits.add(each)  # its link tells it alone with the broker's own error
        for publication, error in lost:
            if publication in culprits:
                what = f"was refused by the broker: {refused[publication]}"
                failure = publication.failed(RefusedError, what, refused[publication])
                self._finish(publication, failure)
            elif publication.written_count > publication.max_retries:
                what = f"was lost with its link: {publication.fate}"
                self._finish(publication, publication.failed(UnconfirmedError, what, error))
            else:
                publication.alone = bool(refused) and not culprits

    def _culprits(
        self, refused: Mapping[Publication, AMQPError], of_link: bool
    ) -> set[Publication]:
        """Return which of the messages on their way the broker refused: none, if that cannot be told."""
        if of_link and not self._channel.isolated:
            self._channel.isolate()  # whatever shares the link may have done it
            return set()
        if len(refused) < 2:
            return set(refused)
        # RabbitMQ names the exchange that it misses, or that is forbidden; of other errors it names nothing.
        return {
            publication
            for publication, error in refused.items()
            if f"exchange '{publication.exchange}' in vhost" in str(error.reply_text)
        }

    def _pace(self) -> None:
        self._setbacks += 1
        if self._setbacks == 1:
            self._delays = backoff.delays()
        else:
            self._stop.wait(next(self._delays))
        self._stop.check()

    def _write_unsent(self) -> bool:
        """Write what is unsent; return whether there is nothing left, and its channel lives."""
        try:
            channel = self._channel.connect()
            while self._unsent and not self._rewind:
                publication = self._unsent.popleft()
                if not publication.ready:  # else it was given up
                    self._write_next(channel, publication)
        except self._channel.errors as exc:
            self._lose(exc)
            return False
        if isinstance(channel, ChannelPublisher) and not self._rewind:
            self.live, self._channel.trouble = channel, None
        return not self._rewind

    def _write_next(
        self, channel: ChannelPublisher | PlainChannel, publication: Publication
    ) -> None:
        try:
            self._declare(publication)
            channel.wait_publishable(publication.deadline, self._stop)
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
            self._channel.declare(publication.declare)
        except (
            TimeoutError
        ) as exc:  # the channel lives: what is on its way there is not written again
            what = f"was not published, as what it declares is not answered in time: {exc}"
            raise publication.failed(PublishTimeoutError, what, exc) from exc
        except ChannelError as exc:
            what = f"was not published, as the broker refuses what it declares: {exc}"
            raise publication.failed(RefusedError, what, exc) from exc

    def _await_answer(self, publication: Publication) -> None:
        while not (publication.ready or self._rewind):
            self._answered.clear()
            wait(self._answered, Deadline(None), self._stop)
            self._stop.check()


def _write(channel: ChannelPublisher | PlainChannel, publication: Publication) -> None:
    if publication.is_wanted is not None and not publication.is_wanted():
        raise publication.failed(UnconfirmedError, f"was taken back: {publication.fate}")
    try:
        channel.publish_confirm(publication)
    except (ChannelError, RecoverableConnectionError):
        raise
    except Exception as exc:  # whatever py-amqp raises for a value that AMQP has no type for
        what = f"cannot be published: {_refused_part_of(publication) or exc}"
        raise publication.failed(PublishError, what, exc) from exc
    publication.written_count += 1


def _refused_part_of(publication: Publication) -> str:
    message = publication.message
    if not isinstance(message, amqp.Message):  # a polled transport's
        return ""
    return refused_part(publication.exchange, publication.routing_key, message)


def _refusal_in(error: BaseException, of_link: bool) -> AMQPError | None:
    """Return the error with which the broker closed the channel or the link; None if it was not refused."""
    if isinstance(error, ChannelError):
        return error
    if isinstance(error, LinkLostError):
        error = error.__cause__ or error
    said = isinstance(error, AMQPError) and getattr(error, "method_sig", None) is not None
    return error if of_link and said and not isinstance(error, ConnectionForced) else None
