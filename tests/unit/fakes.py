"""Owns consumers that need no broker, the recording of events, and greenlets that return what they raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent

from greenconsume.consuming.engine import ensure_lifecycle
from greenconsume.events import ConsumerState, Event, subscribe


class Idle:
    """Consumes nothing until it is stopped; remembers how often it ran."""

    def __init__(self, connection: Any = None) -> None:
        self.connection = connection
        self.runs = 0

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return []

    def run(self) -> None:
        self.runs += 1
        life = ensure_lifecycle(self)
        life.enter(ConsumerState.CONSUMING)
        life.stop.wait()
        life.enter(ConsumerState.DRAINING)


class Connecting(Idle):
    """Never comes to consume: its broker is away."""

    def run(self) -> None:
        self.runs += 1
        life = ensure_lifecycle(self)
        life.enter(ConsumerState.CONNECTING)
        life.stop.wait()


class Stubborn(Idle):
    """Hears no stop: only a kill ends it."""

    def run(self) -> None:
        self.runs += 1
        ensure_lifecycle(self).enter(ConsumerState.CONSUMING)
        never = type(ensure_lifecycle(self).stop)()
        never.wait()


class Scripted(Idle):
    """Runs once for each entry of its script: an error is raised, None returns, `idle` consumes."""

    def __init__(self, *script: BaseException | str | None, after: str | None = "idle") -> None:
        super().__init__()
        self.script = list(script)
        self.after = after

    def run(self) -> None:
        step = self.script.pop(0) if self.script else self.after
        if isinstance(step, BaseException):
            self.runs += 1
            raise step
        if step == "idle":
            super().run()
        else:
            self.runs += 1


def failing(error: Callable[[], BaseException] = lambda: ValueError("no such thing")) -> type[Idle]:
    """Return a class each of whose instances fails whenever it runs."""

    class Failing(Idle):
        def run(self) -> None:
            self.runs += 1
            raise error()

    return Failing


@contextmanager
def recording() -> Iterator[list[Event]]:
    """Collect every event."""
    events: list[Event] = []
    unsubscribe = subscribe(events.append)
    try:
        yield events
    finally:
        unsubscribe()


def of_type(events: list[Event], kind: type[Any]) -> list[Any]:
    """Return the events of one type."""
    return [event for event in events if isinstance(event, kind)]


def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> gevent.Greenlet[..., Any]:
    """Start a greenlet that returns what it raises: gevent prints what is not caught."""

    def outcome() -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as exc:  # looked at by the test
            return exc

    return gevent.spawn(outcome)
