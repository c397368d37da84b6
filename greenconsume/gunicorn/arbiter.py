"""Owns that nothing consumes in gunicorn's arbiter, where a preloaded application may have started it.

It must import neither gevent nor kombu: the arbiter imports it. Called by `consumers`, when the arbiter reads
its configuration.
"""

from __future__ import annotations

import logging
import os
import sys

#: Seconds that the drain of what was started may hold up the first worker.
_WITHIN = 5.0

_arbiter: int | None = None


def watch() -> None:
    """Have what consumes in this process ended before it forks its first worker. Idempotent."""
    global _arbiter
    if _arbiter is None:
        os.register_at_fork(before=_end_consuming)
    _arbiter = os.getpid()


def _end_consuming() -> None:
    """End it, and say how to have it run in the workers. Nothing, where nothing was imported that could."""
    forker = sys.modules.get("greenconsume.runtime.forker")
    # Also called before a worker forks, and where a configuration is read by another program.
    if forker is None or os.getpid() != _arbiter or "gunicorn.arbiter" not in sys.modules:
        return
    count = forker.forbid(_WITHIN)
    if count:
        from greenconsume.errors import ArbiterError

        text = "greenconsume: %d runtimes or consumers were started before the fork, and are stopped: %s"
        logging.getLogger("gunicorn.error").error(text, count, ArbiterError())
