"""Owns one runtime in one gunicorn worker: how it is loaded, started, told of and brought to its end.

It must never raise into the worker for what its consumers or their broker do, nor hold up its start:
whatever fails is a line in gunicorn's log. Called by `consumers` in each worker.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING

import click
import gevent
from gevent.event import Event

from greenconsume import logs
from greenconsume.errors import GreenconsumeError
from greenconsume.gunicorn.ending import Ending, check
from greenconsume.gunicorn.turns import Turns
from greenconsume.handling.jobs import note_abort
from greenconsume.patching import patch_all, require_patched
from greenconsume.runtime.runtime import Runtime
from greenconsume.stopping import Deadline, StopSignal, wait

if TYPE_CHECKING:
    from gunicorn.glogging import Logger
    from gunicorn.workers.base import Worker

#: Seconds that the drain of a worker takes at the longest whose code has changed.
_RELOAD = 2.0
#: How a worker fares that has no time to end.
_NO_GRACE = (
    "graceful_timeout = 0: when gunicorn ends, it kills this worker at once, with every handler that runs, "
    "and the broker hands their messages out again; set it to the seconds that handlers need"
)


@dataclass(frozen=True, slots=True)
class Manner:
    """The fate of a worker whose consumers are not there, or no more.

    Attributes:
        exits: It ends when they cannot start, or are given up.
        min_life: Seconds that it lives at least then, so that it is not started again in a loop.
        lives_for_them: It has nothing else to do, and ends at once with them, however they end.
        otherwise: What becomes of it without them, in words.
    """

    exits: bool = False
    min_life: float = 10.0
    lives_for_them: bool = False
    otherwise: str = ""


class Host:
    """A runtime in a worker.

    Args:
        worker: gunicorn's worker, which has loaded its application.
        target: What the log calls the runtime.
        make: Makes it.
        turns: The places for workers that run it; None: all do.
        manner: What becomes of the worker without it.

    Raises:
        WorkerClassError: It is no gevent worker.

    Attributes:
        ended: Set when nothing of it runs any more.
        failed: It could not start, or was given up.
    """

    def __init__(
        self,
        worker: Worker,
        target: str,
        make: Callable[[], Runtime],
        turns: Turns | None,
        manner: Manner,
    ) -> None:
        check(worker)
        self.ended = Event()
        self.failed = False
        self._worker = worker
        self._target = target
        self._make = make
        self._turns = turns
        self._manner = manner
        self._born = monotonic()
        self._at_end: list[Callable[[], object]] = []
        self._stop = StopSignal()
        self._runtime: Runtime | None = None
        self._ending = Ending(worker, self)

    def start(self) -> None:
        """Load the runtime and have it start, beside the worker. Switches: as the target's import does."""
        _log_with(self._worker.log)
        if not self._worker.cfg.graceful_timeout:
            self._worker.log.warning("greenconsume: %s", _NO_GRACE)
        patch_all()  # mends what was imported before the worker patched itself
        try:
            require_patched()
            if not self._stop.is_set():
                self._runtime = self._make()
        except Exception as error:  # the user's module may raise whatever it likes
            self._report(error)
        gevent.spawn(self._serve).name = f"consumers of {self._target}"

    def on_end(self, callback: Callable[[], object]) -> None:
        """Have `callback` called when all has ended; it must not wait."""
        self._at_end.append(callback)

    def reload(self, reason: str) -> None:
        """End the worker soon, for another to take its place. Switches: never. In its hub."""
        self.stop(reason, within=_RELOAD)
        self._worker.alive = False

    # -- its life ---------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            if self._runtime is not None:
                self._run(self._runtime)
            if self.failed and self._manner.exits:
                self._stop.wait(max(0.0, self._born + self._manner.min_life - monotonic()))
                self._worker.alive = False
        finally:
            self.ended.set()
            for callback in self._at_end:
                callback()
        if self._manner.lives_for_them:
            raise SystemExit(int(self.failed))  # in the main greenlet, by gevent's hub

    def _run(self, runtime: Runtime) -> None:
        try:
            if self._has_turn():
                runtime.start()
                if not self._stop.is_set():
                    count, broker = len(runtime.children), runtime.connection.as_uri()
                    self._info(
                        "%d consumers of %s in this worker, on %s", count, self._target, broker
                    )
                runtime.join()
                if not self._stop.is_set():
                    self._info("all consumers of %s have ended", self._target)
        except Exception as error:  # whatever a class, a factory or the broker raised
            self._report(error)
        finally:
            if self._turns is not None:
                self._turns.release()

    def _has_turn(self) -> bool:
        turns, taken, loop = self._turns, Event(), gevent.get_hub().loop
        if self._stop.is_set():  # while it was made, so that it was not told
            return False
        if turns is not None and not turns.take(lambda: loop.run_callback_threadsafe(taken.set)):
            self._info("the consumers of %s run in another worker: this one waits", self._target)
            wait(taken, Deadline(None), self._stop)
        return not self._stop.is_set()

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

    def _info(self, text: str, *args: object) -> None:
        self._worker.log.info("greenconsume: %s", text % args)

    def _report(self, error: Exception) -> None:
        self.failed = True
        said = error.format_message() if isinstance(error, click.ClickException) else str(error)
        if not isinstance(error, (click.ClickException, GreenconsumeError)):
            said = f"{type(error).__name__}: {said}"
        self._worker.log.debug("greenconsume: why:", exc_info=error)
        said = logs.redact(" ".join(said.split()))
        text = "greenconsume: no consumers of %s in this worker: %s; %s"
        self._worker.log.error(text, self._target, said, self._manner.otherwise)


def _log_with(log: Logger) -> None:
    """Have what greenconsume says in gunicorn's log, unless the application has set up logging of its own."""
    ours = logging.getLogger("greenconsume")
    if not ours.hasHandlers():
        ours.handlers = list(log.error_log.handlers)
        ours.setLevel(log.error_log.level)
        ours.propagate = False
