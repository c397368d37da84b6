"""Owns the run folder: where each process of this user that has an admin says where it is found.

Little of the standard library: `greenconsume check` imports it, and has 50 ms. It must never trust what
others could have written: the folder is its user's alone, or is not used. Called by `server`, the commands.
"""

from __future__ import annotations

import os
import socket
import stat
import sys

#: Names the folder, where another one is wanted.
VARIABLE = "GREENCONSUME_RUN_FOLDER"

_SUFFIX = ".process"


class Announced:  # no dataclass: what that imports takes as long as all that a probe does
    """A process that announced itself: its number, its name and where its admin listens."""

    __slots__ = ("address", "name", "pid")

    def __init__(self, pid: int, name: str, address: str) -> None:
        self.pid, self.name, self.address = pid, name, address


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
    # Not `tempfile`, whose import takes as long as all that a probe does.
    return os.path.join(os.environ.get("TMPDIR", "/tmp"), f"greenconsume-{os.geteuid()}")


def make_folder() -> str:
    """Return the folder's path, making it.

    Raises:
        OSError: It cannot be made, or is not this user's alone.
    """
    path = folder()
    os.makedirs(path, mode=0o700, exist_ok=True)
    _require_private(path)
    return path


class Place:
    """The place of one admin of this process in the folder.

    Raises:
        OSError: The folder cannot be made, or is not this user's alone.
    """

    def __init__(self) -> None:
        self._folder, self._name = make_folder(), ""
        self._pid = os.getpid()
        _places[:] = [each for each in _places if each._pid == self._pid]  # others are a parent's
        taken = {each._name for each in _places}
        numbered = (f"{self._pid}-{number}" for number in range(2, len(taken) + 3))
        self._name = next(n for n in (str(self._pid), *numbered) if n not in taken)
        _places.append(self)

    @property
    def socket(self) -> str:
        """The path of its Unix socket, if it is not told another place."""
        return os.path.join(self._folder, f"{self._name}.sock")

    def announce(self, address: str, name: str) -> None:
        """Say that the process is found at `address`. Raises `OSError`."""
        path = os.path.join(self._folder, f"{self._name}{_SUFFIX}")
        partial = f"{path}.new"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{address}\n{' '.join(name.split())}\n")
        os.replace(partial, path)

    def leave(self) -> None:
        """Take back what it said. Idempotent; in a fork it does nothing. Never raises."""
        if os.getpid() == self._pid and self in _places:
            _places.remove(self)
            _remove(self._folder, self._name)


#: Those of this process. In a container it may have the number of the one that left files here.
_places: list[Place] = []


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
    found = [_read(path, each.removesuffix(_SUFFIX)) for each in names if _is_announcement(each)]
    return sorted((each for each in found if each is not None), key=lambda each: each.pid)


def _read(path: str, name: str) -> Announced | None:
    pid = int(name.partition("-")[0])
    if not _lives(pid):
        _remove(path, name)
        return None
    try:
        with open(os.path.join(path, f"{name}{_SUFFIX}"), encoding="utf-8") as file:
            address, title = file.read().splitlines()
    except (OSError, ValueError):
        return None  # it is just ending
    if _is_deserted(address):
        _remove(path, name)
        return None
    return Announced(pid, title, address)


def _is_deserted(address: str) -> bool:
    """Return whether nobody listens at a Unix socket: another process has the number of a dead one."""
    if not address.startswith("unix:"):
        return False
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)  # one that hangs is there all the same
        try:
            sock.connect(address.removeprefix("unix:"))
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:
            pass
        return False


def _remove(path: str, name: str) -> None:
    for suffix in (_SUFFIX, ".sock"):
        try:
            os.unlink(os.path.join(path, f"{name}{suffix}"))
        except OSError:
            pass  # it had none, or somebody was faster


def _is_announcement(name: str) -> bool:
    number, _, further = name.removesuffix(_SUFFIX).partition("-")
    return name.endswith(_SUFFIX) and number.isdigit() and (not further or further.isdigit())


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _require_private(path: str) -> None:
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is no folder")
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise PermissionError(f"{path} belongs to another user, or others may write to it")


def title() -> str:
    """Return what this process is best known by, where nobody says it: its script."""
    return os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "python"
