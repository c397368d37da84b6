"""Owns the servers of Debian 13 (RabbitMQ 4.0, Redis 8, Valkey 8): fetches them, and says where they are.

Run by `tests/run`, it downloads them with apt into a folder that git ignores, and installs nothing:
it needs no root and changes nothing else on the machine. Their programs want a newer C library than an
older Debian has, so each is started by the loader, and with the libraries, that came along. It imports
nothing but the standard library, since it runs before there is an environment.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# What is fetched is thrown away and fetched anew where this text does not stand in its stamp.
RECIPE = "trixie 1"

FOLDER = Path(__file__).resolve().parent.parent / ".tox" / ".brokers"
ROOT = FOLDER / "root"
# Written last. What it says holds for one place only, whose path stands in the programs.
STAMP = FOLDER / "complete"

SERVERS = ("rabbitmq-server", "redis-server", "valkey-server")
# Of all that these depend on: what runs, and what that links to.
WANTED = re.compile(r"(erlang-|lib|zlib1g$|rabbitmq-|redis-|valkey-)")
UNWANTED = re.compile(r"lib(python|perl|pam|debconf|debian|newt|slang|semanage)|.*-common$")
DEPENDS_ONLY = (
    "--no-recommends",
    "--no-suggests",
    "--no-conflicts",
    "--no-breaks",
    "--no-replaces",
    "--no-enhances",
)
# The folders whose programs are started by tests, or by a program that is.
PROGRAM_FOLDERS = (
    "usr/bin",
    "usr/lib/erlang/bin",
    "usr/lib/erlang/erts-*/bin",
    "usr/lib/erlang/lib/*/priv/bin",
)
SUITES = re.compile(r"(bullseye|bookworm|trixie|forky|(old)*stable|testing|unstable|sid)$")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ATTEMPTS = 4


class UnavailableError(Exception):
    """This machine cannot have the servers; says why."""


def available() -> bool:
    """Return whether the servers are here, complete."""
    return STAMP.is_file() and STAMP.read_text() == _stamp()


def program(name: str) -> Path | None:
    """Return the path of a fetched program; ``None`` if it is not here."""
    folders = (ROOT / "usr/lib/rabbitmq/bin", ROOT / "usr/lib/erlang/bin", ROOT / "usr/bin")
    found = (folder / name for folder in folders if (folder / name).is_file())
    return next(found, None) if available() else None


def fetch() -> None:
    """Fetch the servers, unless they are here already. Two that fetch at once wait for each other.

    Raises:
        UnavailableError: It cannot be done here.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if available():
            return
        _require_tools()
        for folder in (ROOT, FOLDER / "apt", FOLDER / "packages"):
            shutil.rmtree(folder, ignore_errors=True)
        _download(_mirrors())
        _unpack()
        _make_runnable()
        _prove()
        STAMP.write_text(_stamp())


def _stamp() -> str:
    return f"{RECIPE} in {ROOT}"


def _require_tools() -> None:
    absent = [name for name in ("apt-get", "apt-cache", "dpkg") if shutil.which(name) is None]
    if absent:
        raise UnavailableError(f"there is no {' and no '.join(absent)}: not a Debian")


def _mirrors() -> list[str]:
    """Return the addresses from which this machine takes Debian itself."""
    fields = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    listed = _run("apt-get", "indextargets", "--format", fields, "Created-By: Packages")
    rows = [row.split() for row in listed.splitlines() if len(row.split()) == 3]
    found = [uri for uri, suite, component in rows if SUITES.match(suite) and component == "main"]
    if not found:
        raise UnavailableError("apt's sources name no mirror of Debian")
    return list(dict.fromkeys(found))


def _download(mirrors: Iterable[str]) -> None:
    apt = FOLDER / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    for mirror in mirrors:
        (apt / "sources.list").write_text(f"deb {signed}{mirror} trixie main\n")
        try:
            # Without --error-on=any, apt calls an update done that could fetch nothing.
            _patiently(lambda: _apt("apt-get", "update", "--error-on=any"))
            break
        except UnavailableError as exc:
            failed = exc
    else:
        raise UnavailableError(f"no mirror has Debian 13: {failed}")
    packages = FOLDER / "packages"
    packages.mkdir()
    names = _package_names()
    _patiently(lambda: _apt("apt-get", "download", *names, cwd=packages))


def _package_names() -> list[str]:
    tree = _apt("apt-cache", "depends", "--recurse", *DEPENDS_ONLY, *SERVERS)
    names = sorted({line for line in tree.splitlines() if line[:1].isalnum()})
    return [name for name in names if WANTED.match(name) and not UNWANTED.match(name)]


def _unpack() -> None:
    for package in sorted((FOLDER / "packages").glob("*.deb")):
        _run("dpkg", "-x", package, ROOT)
    for folder in ("doc", "man", "locale", "info", "lintian"):
        shutil.rmtree(ROOT / "usr/share" / folder, ignore_errors=True)
    shutil.rmtree(FOLDER / "packages")
    shutil.rmtree(FOLDER / "apt")


def _make_runnable() -> None:
    """Put a script before each program that starts it by the loader that came along."""
    libraries = next(ROOT.glob("usr/lib/*/libc.so.6")).parent
    loader = next(libraries.glob("ld-linux*.so.*"))
    for path in list(_programs()):
        binary = path.rename(path.with_name(f"{path.name}.bin"))
        # Redis's programs are one, which does as it is called.
        path.write_text(
            f'#!/bin/sh\nexec "{loader}" --library-path "{libraries}" --argv0 "$0" "{binary}" "$@"\n'
        )
        path.chmod(0o755)
    for script in ROOT.glob("usr/lib/erlang/**/bin/*"):
        if script.is_file() and (text := _script(script)) and "ROOTDIR=/usr" in text:
            script.write_text(text.replace("/usr/lib/erlang", f"{ROOT}/usr/lib/erlang"))


def _programs() -> Iterator[Path]:
    for pattern in PROGRAM_FOLDERS:
        for path in (path for folder in ROOT.glob(pattern) for path in folder.iterdir()):
            if path.is_file() and not path.is_symlink() and _begins(path, b"\x7fELF"):
                yield path


def _script(path: Path) -> str:
    return path.read_text() if _begins(path, b"#!") else ""


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _prove() -> None:
    """Run each server once, as far as it tells its version."""
    for name in ("redis-server", "valkey-server"):
        _run(ROOT / "usr/bin" / name, "--version")
    erlang = ("-noshell", "-eval", "{ok, _} = application:ensure_all_started(crypto), halt(0).")
    _run(ROOT / "usr/lib/erlang/bin/erl", *erlang)


def _apt(command: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run an apt of its own lists, which believes that nothing is installed."""
    apt = FOLDER / "apt"
    options = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Install-Recommends": 0,
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": 3,
        "Acquire::http::Timeout": 30,
    }
    settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return _run(command, *settings, *arguments, cwd=cwd)


def _patiently(action: Callable[[], str]) -> None:
    """Do it again after a while where it fails: mirrors have their moments."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            action()
            return
        except UnavailableError:
            if attempt == ATTEMPTS:
                raise
            time.sleep(2**attempt)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-400:]
        raise UnavailableError(f"{Path(command[0]).name}: {said or done.returncode}")
    return done.stdout


if __name__ == "__main__":
    try:
        fetch()
    except (UnavailableError, OSError) as failure:
        sys.exit(f"{failure}")
