"""Owns the patching of the process by gevent, and the check that it went far and came early enough.

Importing this module patches nothing and imports nothing of kombu (law 8). Entry points call
`patch_all` first of all, which then has kombu use the green transports; whatever would wait calls
`require_patched` before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

from gevent import monkey

from greenconsume.errors import NotPatchedError

# What gevent replaces in each module that it patches, as far as a library binds it by name. A name
# that a platform or a Python does not have is passed over.
_REPLACED = {
    "os": ("fork", "forkpty", "posix_spawn", "posix_spawnp", "waitpid"),
    "queue": ("LifoQueue", "PriorityQueue", "Queue", "SimpleQueue"),
    "select": ("epoll", "kqueue", "poll", "select"),
    "selectors": ("DefaultSelector", "EpollSelector", "KqueueSelector"),
    "signal": ("getsignal", "signal"),
    "socket": (
        "create_connection",
        "fromfd",
        "getaddrinfo",
        "getfqdn",
        "gethostbyaddr",
        "gethostbyname",
        "getnameinfo",
        "socket",
        "socketpair",
    ),
    "ssl": ("SSLContext", "SSLSocket", "get_server_certificate", "wrap_socket"),
    "subprocess": ("Popen", "call", "check_call", "check_output", "run"),
    "threading": ("Event", "Lock", "Thread", "Timer", "local"),
    "time": ("sleep",),
}
_NEEDS_FORK = {"os", "signal"}  # gevent leaves these alone where processes cannot fork
_PACKAGES = ("amqp", "greenconsume", "kombu", "redis", "vine")  # whose modules must not block

_HOW = (
    "start with `greenconsume run` or `python -m gevent.monkey --module YOURS`, or call "
    "greenconsume.patch_all() in the first lines of the program, before other imports"
)

_verified = False


def patch_all() -> None:
    """Patch the standard library with gevent, and kombu's early copies of what is patched.

    Belongs in the first lines of a program, in its main thread, before anything else is imported.
    If kombu was imported already, the blocking functions that it bound at import are replaced; other
    libraries that were imported early are not looked at. It also has kombu use the green transports, so
    that a connection which a module opens while it is imported is green. Calling it again does no harm.

    Switches: no.
    """
    monkey.patch_all()
    for captured in list(_captured()):
        setattr(captured.module, captured.name, captured.replacement)
    # Not above: it imports kombu, which must not come before the patching.
    from greenconsume.transports import registry

    registry.register()


def require_patched() -> None:
    """Check that nothing in this process can block gevent's hub for want of patching.

    Looks at every module that gevent patches, at the names that kombu and its libraries have bound
    if they are imported already, and at the interpreter. Cheap once it has passed: what gevent
    patched stays patched.

    Raises:
        NotPatchedError: Something is missing; the message names every cause with its remedy.

    Switches: no. From anywhere.
    """
    global _verified
    if _verified:
        return
    problems = [*_module_problems(), *_captured_problems(), *_interpreter_problems()]
    if problems:
        raise NotPatchedError(_message(problems))
    _verified = True


class _Captured(NamedTuple):
    """A name that a module bound before patching, and what it has to be instead."""

    module: ModuleType
    name: str
    replacement: Any

    def __str__(self) -> str:
        return f"{self.module.__name__}.{self.name}"


def _module_problems() -> Iterator[str]:
    missing = [name for name in _patchable() if not monkey.is_module_patched(name)]
    if len(missing) == len(_patchable()):
        yield f"gevent has not patched this process, so the first wait stops every consumer: {_HOW}"
        return
    if "threading" in missing:
        missing.remove("threading")
        yield (
            "threads are not patched (gevent's patch_all was called with thread=False), so a lock "
            "held across a send stops the hub for good: leave out thread=False"
        )
    if missing:
        yield (
            f"gevent has not patched {', '.join(missing)}, so one consumer that waits there stops "
            "all: leave out the arguments that keep gevent's patch_all from them"
        )
    elif not monkey.is_object_patched("socket", "getaddrinfo"):
        yield (
            "name resolution is not patched (gevent's patch_all was called with dns=False), so a "
            "slow DNS server stops every consumer: leave out dns=False"
        )


def _captured_problems() -> Iterator[str]:
    names = sorted(map(str, _captured()))
    if names:
        yield (
            f"imported before gevent patched, and therefore blocking: {', '.join(names)}: patch "
            "before the first import of kombu, or call greenconsume.patch_all(), which replaces them"
        )


def _interpreter_problems() -> Iterator[str]:
    # Python below 3.13 has no such function, and always a GIL.
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        yield (
            "this Python runs without its global interpreter lock, for which neither gevent nor "
            "greenconsume is made: set PYTHON_GIL=1, or take a build that is not free-threaded"
        )


def _message(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return "\n- ".join((f"{len(problems)} things keep this process from running:", *problems))


def _patchable() -> list[str]:
    return [name for name in _REPLACED if hasattr(os, "fork") or name not in _NEEDS_FORK]


def _captured() -> Iterator[_Captured]:
    """Yield what the packages bound at import, before gevent replaced it."""
    replacements = _replacements()
    for module in _loaded():
        for name, value in list(vars(module).items()):
            if id(value) in replacements:
                yield _Captured(module, name, replacements[id(value)])
    # kombu remembers whether it found gevent, and with the wrong answer polls with a real epoll.
    compat = sys.modules.get("kombu.utils.compat")
    known = getattr(compat, "_environment", None)
    if compat is not None and known == "default" and monkey.is_module_patched("socket"):
        yield _Captured(compat, "_environment", None)


def _replacements() -> dict[int, Any]:
    """Map the identity of each original (gevent keeps it alive) to what stands in its place now.

    What gevent took away is `None`, as kombu has it where a platform lacks `epoll`.
    """
    return {
        id(monkey.get_original(module, name)): getattr(sys.modules[module], name, None)
        for module, names in _REPLACED.items()
        for name in names
        if monkey.is_object_patched(module, name)
    }


def _loaded() -> list[ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in _PACKAGES and isinstance(module, ModuleType)
    ]
