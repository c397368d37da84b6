"""Owns what a worker is told to run: the target of `consumers`, or that of `greenconsume run --processes`.

Called in each worker, once it has patched itself.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click
import gevent
from gevent import monkey

from greenconsume import logs
from greenconsume.cli.loading import runtime_of
from greenconsume.cli.main import load
from greenconsume.events import DrainFinished, Event, subscribe
from greenconsume.gunicorn.host import Host, Manner
from greenconsume.gunicorn.turns import Turns
from greenconsume.handling.options import OPTIONS, ConsumerOptions
from greenconsume.runtime.arguments import check_options
from greenconsume.runtime.runtime import Runtime

if TYPE_CHECKING:
    from gunicorn.workers.base import Worker

#: A process that has nothing else to do.
ALONE = Manner(exits=True, min_life=0.0, lives_for_them=True, otherwise="the process ends")
#: One that waits for the next change of the code.
RELOADED = Manner(otherwise="it waits for a change")


def start(
    worker: Worker, target: str, options: dict[str, Any], turns: Turns | None, exits: bool
) -> None:
    """Have a worker run consumers beside HTTP; see `consumers`. Switches: as the target's import does."""

    def make() -> Runtime:
        return _make(target, options)

    manner = Manner(exits, otherwise="the worker ends" if exits else "HTTP is served on")
    Host(worker, target, make, turns, manner).start()


def start_alone(worker: Worker, orders: dict[str, Any], send: Callable[[str], None]) -> None:
    """Have a worker run consumers and nothing else.

    Args:
        worker: gunicorn's worker.
        orders: As `greenconsume.cli.handover` takes them.
        send: Called at the end, with "clean" where all was done, "abandoned" where work was, or "failed"
            where the consumers did.
    """
    logs.configure(orders["log_level"], orders["log_format"])
    target, abandoned = orders["target"], []

    def observe(event: Event, /) -> None:
        if isinstance(event, DrainFinished) and (
            event.killed or event.cancelled_handlers or event.killed_handlers
        ):
            abandoned.append(event)

    def make() -> Runtime:
        return load(target, orders["options"], orders["given"], orders["jitter"])

    manner = RELOADED if orders["reload"] else ALONE
    host = Host(worker, target, make, None, manner)
    subscribe(observe)
    if orders["reload"]:
        _watch_files(host)
    host.start()
    host.on_end(lambda: send("failed" if host.failed else "abandoned" if abandoned else "clean"))


def _make(target: str, options: dict[str, Any]) -> Runtime:
    _check_names(options)
    given = {name: value for name, value in options.items() if (name, value) != ("broker", None)}
    said = {name: given.pop(name) for name in OPTIONS if name in given}
    handled = given.pop("options", None)
    check_options(handled)
    handled = replace(handled or ConsumerOptions(), **said)
    return runtime_of(target, {"replicas": 1} | given, given, handled)


def _check_names(options: Iterable[str]) -> None:
    known = {*OPTIONS, *inspect.signature(Runtime).parameters, "replicas"}
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise click.UsageError(
                f"there is no option {name}" + (f": did you mean {near[0]}?" if near else "")
            )


def _watch_files(host: Host) -> None:
    """End the worker when a Python file changes, in this folder or one below."""
    from watchfiles import PythonFilter, watch

    loop = gevent.get_hub().loop
    changes: Iterable[Any] = watch(
        os.getcwd(), watch_filter=PythonFilter(), stop_event=_Never(), raise_interrupt=False
    )

    def wait() -> None:
        for found in changes:
            names = ", ".join(sorted({os.path.basename(path) for _, path in found}))
            loop.run_callback_threadsafe(host.reload, f"changed: {names}")
            return

    start_new_thread: Any = monkey.get_original("_thread", "start_new_thread")
    start_new_thread(wait, ())


class _Never:
    """An event of threads that is never set: the patched one belongs to greenlets."""

    @staticmethod
    def is_set() -> bool:
        """Return that it is not set."""
        return False
