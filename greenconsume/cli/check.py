"""Owns `greenconsume check`: a probe's question to running processes, and its exit code.

Standard library only, no import of the user's code, and done in 50 ms: a probe starts it every few seconds.
Called by `__main__` before anything is patched or imported.
"""

from __future__ import annotations

import os
import sys

from greenconsume.cli.asking import NoAnswerError, ask, processes

TYPE_CHECKING = False  # `typing` takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """\
Usage: greenconsume check [live|ready|stalled] [OPTIONS]

  Ask running processes whether they are well; for a probe.

  live     the process can go on; never asks for a broker: restart it if not
  ready    every consumer consumes, no link is blocked, and it does not drain (the default)
  stalled  nothing stands still that should move

Options:
  --admin ADDRESS      where its admin listens  [env var: GREENCONSUME_ADMIN; default: the run folder]
  --admin-token TOKEN  to be told why, from another machine  [env var: GREENCONSUME_ADMIN_TOKEN]
  --pid PID            ask one process of those in the run folder
  --timeout SECONDS    that each has to answer  [default: 2]

Exit codes: 0 all are; 1 one is not, does not answer, or there is none; 2 a mistake in the call.
"""

_PATHS = {"live": "/livez", "ready": "/readyz", "stalled": "/stalledz"}


class UsageError(Exception):
    """The arguments make no sense."""


def main(arguments: Sequence[str]) -> int:
    """Ask, print what is wrong, and return the exit code."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(USAGE)
        return 0
    try:
        path, options = _parse(list(arguments))
        timeout = float(options.get("--timeout", "2"))
        pid = int(options["--pid"]) if "--pid" in options else None
    except (UsageError, ValueError) as exc:
        sys.stderr.write(f"greenconsume: {exc} (see greenconsume check --help)\n")
        return 2
    address = options.get("--admin") or os.environ.get("GREENCONSUME_ADMIN")
    token = options.get("--admin-token") or os.environ.get("GREENCONSUME_ADMIN_TOKEN")
    found = processes(address, pid)
    if not found:
        sys.stdout.write("no process is found: start one with --admin, or say where with --admin\n")
        return 1
    wrong = [each for process in found for each in _wrong(process.address, path, token, timeout)]
    sys.stdout.writelines(f"{each}\n" for each in wrong or ["ok"])
    return 1 if wrong else 0


def _wrong(address: str, path: str, token: str | None, timeout: float) -> list[str]:
    try:
        reply = ask(address, path, token=token, timeout=timeout)
    except NoAnswerError as exc:
        return [str(exc)]
    return [] if reply.code == 200 else [f"{address}: {line}" for line in reply.text.splitlines()]


def _parse(arguments: list[str]) -> tuple[str, dict[str, str]]:
    known = {"--admin", "--admin-token", "--pid", "--timeout"}
    path, options = _PATHS["ready"], {}
    while arguments:
        word = arguments.pop(0)
        name, equals, value = word.partition("=")
        if word in _PATHS:
            path = _PATHS[word]
        elif name in known and (equals or arguments):
            options[name] = value if equals else arguments.pop(0)
        elif name in known:
            raise UsageError(f"{name} needs a value")
        else:
            raise UsageError(f"there is no {word!r}")
    return path, options
