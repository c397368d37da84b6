"""Owns the commands that look at and steer running processes: `status`, `pause`, `scale`, `dump` and so on.

They ask the admin of each process that the run folder names, or of the one at `--admin`; several are shown
together. What a command does, the process knows. Called by `main`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from greenconsume.admin.run_folder import Announced
from greenconsume.cli import table
from greenconsume.cli.asking import NoAnswerError, Reply, ask, processes
from greenconsume.cli.check import main as run_check
from greenconsume.cli.flags import flag

_Function = TypeVar("_Function", bound=Callable[..., Any])

_FLAGS = (
    flag(
        "--admin", metavar="ADDRESS", show_default="the run folder", help="Where its admin listens."
    ),
    flag(
        "--admin-token",
        metavar="TOKEN",
        help="What its admin was started with.",
        show_default=False,
    ),
    click.option("--pid", type=int, help="Only this process of those in the run folder."),
)


class Where:
    """The processes that a command is about.

    Args:
        admin: The address of one; None: those that the run folder names.
        token: What is shown to them.
        pid: Of those in the run folder, this one alone.
    """

    def __init__(self, admin: str | None, token: str | None, pid: int | None) -> None:
        self._found = processes(admin, pid)
        self._token = token
        if not self._found:
            raise click.ClickException(
                "no process is found: say where with --admin, or start one with `greenconsume run`"
            )

    def ask(
        self, path: str, command: dict[str, object] | None = None
    ) -> list[tuple[Announced, Reply]]:
        """Ask each of them.

        Raises:
            click.ClickException: None of them answers.
        """
        answered, silent = [], []
        for process in self._found:
            try:
                answered.append((process, ask(process.address, path, command, self._token)))
            except NoAnswerError as exc:
                silent.append(str(exc))
        if not answered:
            raise click.ClickException("; ".join(silent))
        for each in silent:
            click.echo(each, err=True)
        return answered

    def statuses(self) -> list[dict[str, Any]]:
        """Return the status of each of them. Raises as `ask`."""
        return [json.loads(_good(reply).body) for _, reply in self.ask("/status.json")]


def _where(function: _Function) -> _Function:
    for option in reversed(_FLAGS):
        function = option(function)
    return function


def _good(reply: Reply) -> Reply:
    if reply.code >= 400:
        raise click.ClickException(reply.text)
    return reply


@click.command()
@_where
@click.option("--json", "as_json", is_flag=True, help="One JSON array, an object for each process.")
def status(admin: str | None, admin_token: str | None, pid: int | None, as_json: bool) -> None:
    """Show what running processes do: their consumers, links and health."""
    found = Where(admin, admin_token, pid).statuses()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo("\n\n".join(table.of_process(each) for each in found))


@click.command()
@_where
@click.option(
    "--every", type=click.FloatRange(min=0.1), default=1.0, show_default=True, metavar="SECONDS"
)
def top(admin: str | None, admin_token: str | None, pid: int | None, every: float) -> None:
    """Show it as `status` does, again and again; end with Ctrl-C. Needs greenconsume[top]."""
    try:
        from greenconsume.cli.top import watch
    except ImportError as exc:
        raise click.ClickException("top needs rich: pip install 'greenconsume[top]'") from exc
    where = Where(admin, admin_token, pid)
    watch(where.statuses, every)


@click.command()
@_where
def dump(admin: str | None, admin_token: str | None, pid: int | None) -> None:
    """Show the tree of all greenlets, each with where it waits."""
    for process, reply in Where(admin, admin_token, pid).ask("/greenlets"):
        click.echo(f"{process.name}\n{_good(reply).text}")


@click.command()
@_where
def drain(admin: str | None, admin_token: str | None, pid: int | None) -> None:
    """Have the whole process drain and end, as SIGTERM does."""
    _tell(Where(admin, admin_token, pid).ask("/drain", {}))


@click.command("log-level")
@click.argument("level", type=click.Choice(["debug", "info", "warning", "error"]))
@_where
def log_level(level: str, admin: str | None, admin_token: str | None, pid: int | None) -> None:
    """Have greenconsume log more or less, until the process ends."""
    _tell(Where(admin, admin_token, pid).ask("/log-level", {"level": level}))


@click.command()
@click.argument("name", metavar="GROUP")
@click.argument("replicas", type=click.IntRange(min=0))
@_where
def scale(
    name: str, replicas: int, admin: str | None, admin_token: str | None, pid: int | None
) -> None:
    """Have so many consumers of what was spawned as GROUP, in each process."""
    _tell(Where(admin, admin_token, pid).ask("/scale", {"consumer": name, "replicas": replicas}))


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def check(arguments: tuple[str, ...]) -> None:
    """Ask whether running processes are well; an exit code for a probe."""
    sys.exit(run_check(arguments))


def _of_one(name: str, words: str) -> click.Command:
    @click.command(name, help=words)
    @click.argument("consumer", metavar="NAME")
    @_where
    def command(consumer: str, admin: str | None, admin_token: str | None, pid: int | None) -> None:
        _tell(Where(admin, admin_token, pid).ask(f"/{name}", {"consumer": consumer}))

    return command


def _tell(answers: Iterable[tuple[Announced, Reply]]) -> None:
    """Say what each process answered; it failed if none did what was asked."""
    done = 0
    refused = []
    for process, reply in answers:
        if reply.code < 400:
            done += 1
            click.echo(f"{process.name}: {json.loads(reply.body)['done']}")
        else:
            refused.append(f"{process.name}: {reply.text}")
    if not done:
        raise click.ClickException("; ".join(refused))


COMMANDS = (
    status,
    top,
    _of_one(
        "pause", "Have a consumer take no more messages; its running handlers end by themselves."
    ),
    _of_one("resume", "Have a consumer that was paused consume again."),
    scale,
    _of_one("restart", "Drain one consumer and start it again."),
    _of_one("stop", "Drain one consumer, for good."),
    drain,
    dump,
    log_level,
    check,
)
