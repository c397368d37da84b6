"""Owns how one gunicorn worker ends: what counts as being told to, and what is waited for then.

gunicorn tells a worker by setting `alive`, from a signal handler, a request or its reloader; the worker
looks at it once a second. Here `alive` becomes a property of a class made for the worker, whose setter
begins the drain at once, and only signals; and `run` is wrapped for what raises, as QUIT, ABRT and a lost
parent do. Called by `host`; it must never touch a signal: these are gunicorn's.
"""

from __future__ import annotations

import enum
import sys
import traceback
from collections.abc import Callable
from time import monotonic
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from gevent.event import Event
from gunicorn.workers.base import Worker
from gunicorn.workers.ggevent import GeventWorker

from greenconsume.errors import GreenconsumeError

if TYPE_CHECKING:
    from gunicorn.config import Config

#: Seconds within which a repeated signal is the same one: Ctrl-C reaches the worker and the arbiter, which
#: sends it another.
_SAME = 1.0
#: The longest time between two signs of life to the arbiter, in seconds.
_BEAT = 1.0
#: Seconds that a drain has at least, as many as the arbiter leaves after QUIT. With `graceful_timeout = 0` it
#: kills its workers at once, but only when it ends itself: a worker that ends alone has its time.
_LEAST_GRACE = 2.0


class WorkerClassError(GreenconsumeError):
    """The worker is none of gunicorn's gevent workers; the message names the remedy."""


class Stage(enum.Enum):
    """The stages of a worker's life."""

    SERVING = "serving"
    RETIRING = "retiring"  # at max_requests: its consumers drain while it serves HTTP
    ENDING = "ending"


class Drained(Protocol):
    """Everything that a worker's end drains."""

    ended: Event

    def stop(self, reason: str, within: float) -> None:
        """Begin the drain, to be over in so many seconds; only signals."""

    def cancel(self, reason: str) -> None:
        """Do not wait for running handlers any more; only signals."""

    def kill(self, reason: str) -> None:
        """Do not wait for cancelled handlers either; only signals."""

    def note_abort(self, frame: FrameType | None) -> None:
        """Note what the stack that ABRT interrupts was about: an exception is about to end it."""


class Ending:
    """The end of one worker, whatever tells it to.

    Args:
        worker: A gevent worker of gunicorn's, before it runs.
        drained: What is drained.
    """

    def __init__(self, worker: Worker, drained: Drained) -> None:
        self.stage = Stage.SERVING
        self._worker = worker
        self._max_requests = worker.max_requests  # which the first of several endings sets
        self._drained = drained
        self._is_news = False  # the last time that `alive` was set changed the stage
        self._quit_at: float | None = None
        self._escalations = iter((drained.cancel, drained.kill))
        self._due = 0.0
        _also(worker.cfg, "worker_int", self._on_quit)
        _also(worker.cfg, "worker_abort", self._on_abort)
        worker.__class__ = _with_ending(type(worker), self)
        if not vars(worker).get("alive", True):  # it was told while it loaded its application
            self.alive = False

    @property
    def alive(self) -> bool:
        """The worker's `alive`, as the worker sees it."""
        if self.stage is Stage.RETIRING:
            return not self._drained.ended.is_set()
        return self.stage is Stage.SERVING

    @alive.setter
    def alive(self, value: bool) -> None:
        # In a signal handler, or anywhere else: it only signals.
        if value:
            return
        before = self.stage
        if before is Stage.SERVING and self._worker.nr >= self._max_requests:
            self._worker.max_requests = (
                sys.maxsize
            )  # it would be told, and logged, with each further request
            self.stage = Stage.RETIRING
        else:
            self.stage = Stage.ENDING
        self._is_news = self.stage is not before
        if before is Stage.SERVING:
            self._begin()

    def _begin(self) -> None:
        grace = max(_LEAST_GRACE, self._worker.cfg.graceful_timeout)
        within = max(0.0, grace - min(1.0, grace / 10))
        self._due = monotonic() + grace
        why = "max_requests" if self.stage is Stage.RETIRING else "gunicorn ends this worker"
        self._drained.stop(why, within)

    def _on_quit(self, _worker: Worker) -> None:
        """Begin the drain for a QUIT, an INT or the reloader: called when `alive` has just been set."""
        now = monotonic()
        is_same = self._quit_at is not None and now - self._quit_at < _SAME
        self._quit_at = now
        if self._is_news or is_same:
            return
        # The arbiter leaves 2 s after a TERM; and whoever presses Ctrl-C again does not want to wait.
        escalate = next(self._escalations, None)
        if escalate is not None:
            escalate("a further signal")

    def _on_abort(self, _worker: Worker) -> None:
        """Begin the drain for an ABRT, which is sent to a worker that gave no sign of life in time."""
        self._drained.note_abort(sys._getframe())
        self._worker.tmp.notify()  # else the arbiter's next look is followed by SIGKILL

    def run(self, run: Callable[[], None]) -> None:
        """Run the worker's own `run`, then wait until all is drained, however that ended."""
        try:
            run()
        except BaseException as error:  # QUIT, ABRT, a lost parent, a defect: each ends the process
            self.alive = False
            _stop_accepting(error.__traceback__)
            self._wait()
            raise
        self.alive = False
        self._wait()

    def _wait(self) -> None:
        """Wait for the drain's end, and beat, for `notify` would exit where the parent is lost."""
        beat = min(_BEAT, self._worker.timeout / 2 or _BEAT)
        while not self._drained.ended.is_set() and monotonic() < self._due:
            self._worker.tmp.notify()
            try:
                self._drained.ended.wait(min(beat, max(0.0, self._due - monotonic())))
            except SystemExit:  # of a further signal, which has said so already
                pass


def check(worker: object) -> None:
    """Check that this is one of gunicorn's gevent workers.

    Raises:
        WorkerClassError: It is not; the message names the remedy.
    """
    name = type(worker).__name__
    if not isinstance(worker, Worker):
        raise WorkerClassError(
            f"consumers start in workers, and this is {name}: have them started by post_worker_init, "
            'post_worker_init = consumers("myapp:runtime")'
        )
    if not isinstance(worker, GeventWorker):
        raise WorkerClassError(
            f"consumers run in gevent workers, and this is {name}: set "
            'worker_class = "gevent" or "gevent_pywsgi" in gunicorn.conf.py'
        )


def _with_ending(base: type[Any], ending: Ending) -> type[Any]:
    """Return a class of workers that end so, and as `base` does, which may have another ending."""
    other = getattr(base, "alive", None)

    def alive(worker: Worker) -> bool:
        return ending.alive or (isinstance(other, property) and other.__get__(worker))

    def set_alive(worker: Worker, value: bool) -> None:
        ending.alive = value
        if isinstance(other, property):
            other.__set__(worker, value)

    def run(worker: Worker) -> None:
        ending.run(lambda: base.run(worker))

    names = {"alive": property(alive, set_alive), "run": run, "__module__": base.__module__}
    return type(base.__name__, (base,), names)


def _also(cfg: Config, name: str, hook: Callable[[Any], None]) -> None:
    """Call `hook` before the server hook that is set."""
    before = getattr(cfg, name)

    def both(worker: Worker) -> None:
        hook(worker)
        before(worker)

    cfg.set(name, both)


def _stop_accepting(error: TracebackType | None) -> None:
    """Close the servers of a worker whose `run` was left by an exception: they are its local variables."""
    for frame, _line in traceback.walk_tb(error):
        if frame.f_code is GeventWorker.run.__code__:
            for server in frame.f_locals.get("servers", ()):
                server.close()
