"""Owns the taking of a single message for one who asks for it: `basic_get`.

Whoever asked may leave before there is an answer; what comes then goes back. Called by `channel`.
"""

from __future__ import annotations

import socket
from typing import Any

from gevent.event import Event

from greenconsume.redis.calls import CALL_TIMEOUT
from greenconsume.redis.feed import ensure_feeds
from greenconsume.redis.ledger import Ledger
from greenconsume.redis.link import Link
from greenconsume.redis.take import Delivery, Take
from greenconsume.stopping import Deadline, StopSignal, wait


class Errand:
    """One take of one message, under way from the beginning.

    Args:
        link: Over which link.
        ledger: Where is noted what was taken.
        queue: The name of the queue.
        expires: The milliseconds after which it is gone if nobody uses it, or 0.
    """

    def __init__(self, link: Link, ledger: Ledger, queue: str, expires: int) -> None:
        self._link, self._ledger = link, ledger
        self._keys = ledger.keyspace.keys(queue)
        self._found: Delivery | None = None
        self._error: BaseException | None = None
        self._done = Event()
        self._answered = self._left = False
        ensure_feeds(link, ledger).take([queue], {queue: expires}, 1, self._took)

    def _took(self, take: Take, reply: Any) -> None:
        if isinstance(reply, BaseException):
            self._error = reply
            take.doubt()  # what it moved before it failed goes back
        else:
            for _, _, deliveries in take.held(reply):
                self._found = deliveries[0]
            # The server tells us of no change of ours, so who waits for these queues looks again.
            ensure_feeds(self._link, self._ledger).touch(self._keys)
            if self._left and self._found is not None:
                self._ledger.give_back([self._found[0]])
        self._answered = True
        self._done.set()

    def wait(self, stop: StopSignal | None, deadline: Deadline | None) -> Delivery | None:
        """Return the field and the bytes of the message, or None if there was none.

        Raises:
            StoppedError: `stop` was set.
            TimeoutError: The deadline came.
            LinkLostError: The link is gone; what it may have taken goes back.
            redis.exceptions.ResponseError: The server refused.

        Switches: yes.
        """
        try:
            wait(self._done, deadline or Deadline(CALL_TIMEOUT), stop)
        except BaseException:  # a kill
            self._leave()
            raise
        if not self._answered:
            self._leave()
            if stop is not None:
                stop.check()
            raise socket.timeout("the server did not answer in time")
        if self._error is not None:
            raise self._error
        return self._found

    def _leave(self) -> None:
        self._left = True
        if self._found is not None:
            self._ledger.give_back([self._found[0]])
