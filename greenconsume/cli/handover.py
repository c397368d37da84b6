"""Owns handing the command over to gunicorn's arbiter, where it is to run several processes.

The arbiter must not be patched, and this process is: so it is replaced by a fresh one, under the same process
id, that runs `greenconsume.processes`. Called by `main`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any, NoReturn

import click

#: Where the new process finds what it is to do.
VARIABLE = "GREENCONSUME_HANDOVER"


def require_extra(option: str, module: str, extra: str) -> None:
    """Check that what an option needs is installed.

    Raises:
        click.UsageError: It is not; the message has the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise click.UsageError(
            f"{option} needs {module}, which is not installed: pip install 'greenconsume[{extra}]'"
        )


def hand_over(target: str, orders: dict[str, Any]) -> NoReturn:
    """Become the arbiter of processes that run a target.

    Args:
        target: What they run; for `ps` to show.
        orders: What `greenconsume.processes` is told; must be JSON.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, VARIABLE: json.dumps({"target": target, **orders})}
    os.execve(sys.executable, [sys.executable, "-m", "greenconsume.processes", target], environment)
