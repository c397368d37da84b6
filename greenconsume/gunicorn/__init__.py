"""Owns consumers in gunicorn's gevent workers, beside HTTP: one runtime in each worker process.

In a `gunicorn.conf.py`::

    from greenconsume.gunicorn import consumers

    worker_class = "gevent"
    post_worker_init = consumers("myapp.consumers:runtime")

They start when the worker has loaded its application, and never hold it up: while the broker is away HTTP is
served, and they come when it does. They are drained, within `graceful_timeout`, from the moment that
gunicorn tells the worker to end, whatever tells it; at `max_requests` they are drained first, while HTTP
is served.

Every worker has its own: with `workers = 4` there are four times the consumers. A reload (HUP) starts new
workers before the old ones have drained, so for a while there are twice as many again; where that must not
be, use `exclusive` or single active consumers.

This module is imported by the arbiter, which stays unpatched: it must import neither gevent nor kombu.
Everything else here runs in a worker. Signals, respawning, hang detection and graceful restarts stay
gunicorn's. Read `host`, then `ending`::

    host      one runtime in one worker
    ending    how a worker ends
    worker    what a worker is told to run
    turns     which of the workers run it
    arbiter   that nothing consumes in the arbiter
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from greenconsume.checks import is_count
from greenconsume.gunicorn.turns import ensure_turns

if TYPE_CHECKING:
    from gunicorn.workers.base import Worker

from greenconsume.gunicorn.arbiter import watch

__all__ = ["consumers"]


def consumers(
    target: str,
    *,
    only_in: int | None = None,
    freeze_gc: bool = False,
    on_failure: Literal["report", "exit"] = "report",
    **options: object,
) -> Callable[[Any], None]:
    """Return a `post_worker_init` hook that runs consumers in each worker.

    To have a hook of your own as well, or several targets, call this one in it, or several of them.

    Args:
        target: "MODULE:TARGET", which names a Runtime, a consumer class, a consumer, or a function that
            returns one of these, as `greenconsume run` takes it.
        only_in: In how many of the workers they run; another takes over when one of these ends. None: in all.
        freeze_gc: Exempt what exists once all consume from garbage collection: see `Runtime`.
        on_failure: What follows when the target cannot be loaded, the broker refuses, or consumers are
            given up. "report": one line in gunicorn's log, and HTTP is served on without them. "exit": the
            worker also ends, in order and not within its first 10 seconds, and gunicorn starts another.
        **options: What `Runtime` and `ConsumerOptions` take, `broker` and `concurrency` for two (`rate` is
            that of each consumer), and `replicas`, for a target that is no Runtime. Such a target needs
            `broker`, unless it is a consumer that has a connection.

    Raises:
        TypeError: `target` is no string.
        ValueError: It is no MODULE:TARGET, or another argument is out of its range.

    Switches: never. In `gunicorn.conf.py`; what it returns is called by gunicorn in each worker, where it
    switches as the target's import does, and raises only for a worker that is no gevent worker.
    """
    _check(target, only_in, on_failure)
    watch()
    options |= {"freeze_gc": True} if freeze_gc else {}
    turns = None if only_in is None else ensure_turns(target, only_in)

    def post_worker_init(worker: Worker) -> None:
        # Not above: gevent and kombu are the worker's to import, once it has patched itself.
        from greenconsume.gunicorn.worker import start

        start(worker, target, options, turns, on_failure == "exit")

    return post_worker_init


def _check(target: object, only_in: object, on_failure: str) -> None:
    problem = (
        f'consumers takes a string such as "myapp:runtime", not {target!r}: '
        'post_worker_init = consumers("myapp:runtime")'
    )
    if not isinstance(target, str):
        raise TypeError(problem)
    module, _, name = target.partition(":")
    if not (module and name):
        raise ValueError(problem)
    if only_in is not None and not is_count(only_in):
        raise ValueError(f"only_in must be 1 or more, or None, not {only_in!r}")
    if on_failure not in ("report", "exit"):
        raise ValueError(f'on_failure must be "report" or "exit", not {on_failure!r}')
