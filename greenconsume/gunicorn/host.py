"""Owns one runtime in one gunicorn worker: how it is loaded, started, told of and brought to its end.

It must never raise into the worker for what its consumers or their broker do, nor hold up its start:
whatever fails is a line in gunicorn's log. Called by `consumers` in each worker.
"""

from __future__ import annotations

import logging
import math
from time import monotonic
from types import FrameType
from typing import Any

import click
import gevent
from gevent.event import Event

from greenconsume import logs
from greenconsume.cli.loading import runtime_of
from greenconsume.errors import GreenconsumeError
from greenconsume.gunicorn.ending import Ending, is_gevent
from greenconsume.gunicorn.turns import Turns
from greenconsume.handling.jobs import note_abort
from greenconsume.handling.options import OPTIONS, ConsumerOptions
from greenconsume.patching import patch_all, require_patched
from greenconsume.runtime.runtime import Runtime
from greenconsume.stopping import Deadline, StopSignal, wait

#: Seconds that a worker lives at least whose consumers fail, so that it is not started again in a loop.
_MIN_LIFE = 10.0


class WorkerClassError(GreenconsumeError):
    """The worker is none of gunicorn's gevent workers; the message names the remedy."""


class Host:
    """A runtime in a worker.

    Args:
        worker: gunicorn's worker, which has loaded its application.
        target: What names the runtime, or what it runs.
        options: What a new runtime is called with.
        turns: The places for workers that run it; None: all do.
        on_failure: "report" or "exit"; see `consumers`.

    Raises:
        WorkerClassError: It is no gevent worker.

    Attributes:
        ended: Set when nothing of it runs any more.
    """

    def __init__(
        self,
        worker: Any,
        target: str,
        options: dict[str, Any],
        turns: Turns | None,
        on_failure: str,
    ) -> None:
        if not is_gevent(worker):
            raise WorkerClassError(
                f"consumers run in gevent workers, and this is {type(worker).__name__}: set "
                'worker_class = "gevent" or "gevent_pywsgi" in gunicorn.conf.py'
            )
        self.ended = Event()
        self._worker = worker
        self._target = target
        self._options = options
        self._turns = turns
        self._exits = on_failure == "exit"
        self._born = monotonic()
        self._stop = StopSignal()
        self._runtime: Runtime | None = None
        self._ending = Ending(worker, self)

    def start(self) -> None:
        """Load the runtime and have it start, beside the worker. Switches: as the target's import does."""
        _log_with(self._worker.log)
        patch_all()  # mends what was imported before the worker patched itself
        try:
            require_patched()
            self._runtime = self._load()
        except Exception as error:  # the user's module may raise whatever it likes
            self._report(error)
        gevent.spawn(self._serve).name = f"consumers of {self._target}"

    def _load(self) -> Runtime:
        given = dict(self._options)
        handled = ConsumerOptions(**{name: given.pop(name) for name in OPTIONS if name in given})
        defaults = {"replicas": 1, "broker": "memory://"}
        return runtime_of(self._target, defaults | given, given, handled)

    # -- its life ---------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            if self._runtime is not None:
                self._run(self._runtime)
            elif self._exits:
                self._take_down()
        finally:
            self.ended.set()

    def _run(self, runtime: Runtime) -> None:
        try:
            if self._turns is None or self._has_turn(self._turns):
                runtime.start()
                self._tell_start(runtime)
                runtime.join()
                if not self._stop.is_set():
                    self._info("all consumers of %s have ended by themselves", self._target)
        except Exception as error:  # whatever a class, a factory or the broker raised
            self._report(error)
            if self._exits:
                self._take_down()
        finally:
            if self._turns is not None:
                self._turns.release()

    def _has_turn(self, turns: Turns) -> bool:
        taken, loop = Event(), gevent.get_hub().loop
        if not turns.take(lambda: loop.run_callback_threadsafe(taken.set)):
            self._info("the consumers of %s run in another worker: this one waits", self._target)
            wait(taken, Deadline(None), self._stop)
        return not self._stop.is_set()

    def _take_down(self) -> None:
        if not self._stop.wait(max(0.0, self._born + _MIN_LIFE - monotonic())):
            self._worker.alive = False

    # -- its end: what `Ending` calls -----------------------------------------------------------------

    def stop(self, reason: str, within: float) -> None:
        self._stop.set(reason)
        if self._runtime is not None:
            self._runtime.stop(reason, within=within)

    def cancel(self, reason: str) -> None:
        if self._runtime is not None:
            self._runtime.cancel(reason)

    def kill(self, reason: str) -> None:
        if self._runtime is not None:
            self._runtime.kill(reason)

    def note_abort(self, frame: FrameType | None) -> None:
        silence = monotonic() - self._worker.tmp.last_update()
        hung = silence > (self._worker.cfg.timeout or math.inf)
        note_abort(frame, silence if hung else None)

    # -- what it says -------------------------------------------------------------------------------

    def _tell_start(self, runtime: Runtime) -> None:
        if self._stop.is_set():
            return
        count = len(runtime.children)
        self._info("%d consumers of %s in this worker", count, self._target)

    def _info(self, text: str, *args: object) -> None:
        self._worker.log.info("greenconsume: %s", text % args)

    def _report(self, error: Exception) -> None:
        said = error.format_message() if isinstance(error, click.ClickException) else str(error)
        if not isinstance(error, (click.ClickException, GreenconsumeError)):
            said = f"{type(error).__name__}: {said}"
        self._worker.log.debug("greenconsume: why:", exc_info=error)
        what = "the worker ends" if self._exits else "HTTP is served on"
        text = f"no consumers of {self._target} in this worker: {' '.join(said.split())}; {what}"
        self._worker.log.error("greenconsume: %s", logs.redact(text))


def _log_with(log: Any) -> None:
    """Have what greenconsume says in gunicorn's log, unless the application has set up logging of its own."""
    ours = logging.getLogger("greenconsume")
    if not ours.hasHandlers():
        ours.handlers = list(log.error_log.handlers)
        ours.setLevel(log.error_log.level)
        ours.propagate = False
