"""Owns the calls over a link: commands whose replies are waited for, up to a stop or a deadline (law 3).

The part of `link` that waits; it knows no socket.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gevent.event import Event

from greenconsume.redis.protocol import Argument
from greenconsume.redis.scripts import Script
from greenconsume.stopping import Deadline, StopSignal, wait

#: Called with a reply in the reader, where it must not switch; an error is a reply as well.
OnReply = Callable[[Any], object]

#: Seconds that a call waits for its reply; a server that says nothing at all is left earlier.
CALL_TIMEOUT = 60.0


class Calls:
    """Commands and scripts that are waited for, by what sends them."""

    def send(
        self, arguments: Sequence[Argument], on_reply: OnReply | None = None, matters: bool = True
    ) -> None:
        """Have a command sent at the hub's next turn. Never switches."""
        raise NotImplementedError

    def run(
        self,
        script: Script,
        keys: Sequence[Argument],
        arguments: Iterable[Argument],
        on_reply: OnReply | None = None,
        matters: bool = True,
    ) -> None:
        """Have a script run, as `send` does a command. Never switches."""
        raise NotImplementedError

    def call(
        self,
        *arguments: Argument,
        stop: StopSignal | None = None,
        deadline: Deadline | None = None,
    ) -> Any:
        """Send a command and return its reply.

        Raises:
            StoppedError: `stop` was set.
            TimeoutError: The deadline came.
            LinkLostError: The link is gone; whether the command was executed is not known.
            redis.exceptions.ResponseError: The server refused it.

        Switches: yes.
        """
        return self.call_all([arguments], stop, deadline)[0]

    def call_all(
        self,
        commands: Sequence[Sequence[Argument]],
        stop: StopSignal | None = None,
        deadline: Deadline | None = None,
    ) -> list[Any]:
        """Send commands and return their replies; the first that is an error is raised, as `call` does."""
        answer = _Answer(len(commands))
        for command in commands:
            self.send(command, answer.take)
        return answer.wait(stop, deadline or Deadline(CALL_TIMEOUT))

    def call_script(
        self,
        script: Script,
        keys: Sequence[Argument],
        arguments: Iterable[Argument],
        stop: StopSignal | None = None,
        deadline: Deadline | None = None,
        matters: bool = True,
    ) -> Any:
        """Run a script and return its reply; see `call`."""
        answer = _Answer(1)
        self.run(script, keys, arguments, answer.take, matters)
        return answer.wait(stop, deadline or Deadline(CALL_TIMEOUT))[0]


class _Answer:
    """The replies to some commands, for one who waits for them."""

    __slots__ = ("_count", "_event", "_replies")

    def __init__(self, count: int) -> None:
        self._replies: list[Any] = []
        self._count = count
        self._event = Event()

    def take(self, reply: object) -> None:
        """Take the next reply. Never switches."""
        self._replies.append(reply)
        if len(self._replies) == self._count:
            self._event.set()

    def wait(self, stop: StopSignal | None, deadline: Deadline) -> list[Any]:
        """Return the replies; see `Link.call`. Switches: yes."""
        if self._count:
            wait(self._event, deadline, stop)
        if len(self._replies) < self._count:
            if stop is not None:
                stop.check()
            raise socket.timeout("the server did not answer in time")
        for reply in self._replies:
            if isinstance(reply, BaseException):
                raise reply
        return self._replies
