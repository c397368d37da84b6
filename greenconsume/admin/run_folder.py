"""Owns the run folder: where each process of this user that has an admin says where it is found.

Standard library only: `greenconsume check` imports it, and has 50 ms. It must never trust what others could
have written: the folder is its user's alone, or is not used. Called by `server`, and by the commands.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from typing import NamedTuple

#: Names the folder, where another one is wanted.
VARIABLE = "GREENCONSUME_RUN_FOLDER"

_SUFFIX = ".json"


class Announced(NamedTuple):
    """A process that announced itself."""

    pid: int
    name: str
    address: str


def folder() -> str:
    """Return the folder's path; it need not exist."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return os.path.abspath(chosen)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):
        return os.path.join(runtime, "greenconsume")
    if os.geteuid() == 0 and os.path.isdir("/run"):
        return "/run/greenconsume"
    return os.path.join(tempfile.gettempdir(), f"greenconsume-{os.geteuid()}")


def make_folder() -> str:
    """Return the folder's path, making it.

    Raises:
        OSError: It cannot be made, or is not this user's alone.
    """
    path = folder()
    os.makedirs(path, mode=0o700, exist_ok=True)
    _require_private(path)
    return path


def socket_path() -> str:
    """Return where this process has its Unix socket, if it is not told another place. Raises as above."""
    return os.path.join(make_folder(), f"{os.getpid()}.sock")


def announce(name: str, address: str) -> None:
    """Say that this process is found at `address`. Raises as above."""
    path = _file_of(make_folder(), os.getpid())
    partial = f"{path}.new"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"name": name, "address": address}, file)
    os.replace(partial, path)


def withdraw(pid: int) -> None:
    """Take back what a process said of itself. Never raises for what is gone."""
    try:
        os.unlink(_file_of(folder(), pid))
    except OSError:
        pass


def announced() -> list[Announced]:
    """Return the processes that announced themselves and live, by their number.

    What a dead one left is removed.
    """
    path = folder()
    try:
        _require_private(path)
        names = os.listdir(path)
    except OSError:
        return []
    found = [_read(path, int(n.removesuffix(_SUFFIX))) for n in names if _is_announcement(n)]
    return sorted(each for each in found if each is not None)


def _read(path: str, pid: int) -> Announced | None:
    if not _lives(pid):
        withdraw(pid)
        try:
            os.unlink(os.path.join(path, f"{pid}.sock"))
        except OSError:
            pass  # it had none
        return None
    try:
        with open(_file_of(path, pid), encoding="utf-8") as file:
            said = json.load(file)
        return Announced(pid, str(said["name"]), str(said["address"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is just ending


def _is_announcement(name: str) -> bool:
    return name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX).isdigit()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _file_of(path: str, pid: int) -> str:
    return os.path.join(path, f"{pid}{_SUFFIX}")


def _require_private(path: str) -> None:
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is no folder")
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise PermissionError(f"{path} belongs to another user, or others may write to it")


def title() -> str:
    """Return what this process is best known by: the target of `greenconsume run`, else its script."""
    names = [each for each in sys.argv[1:] if not each.startswith("-")]
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    if program in ("greenconsume", "__main__.py") and names[:1] == ["run"] and len(names) > 1:
        return names[1]
    return program or "python"
