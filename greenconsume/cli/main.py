"""Owns the command line: `greenconsume run MODULE:TARGET`, its options, its exit codes and its words.

An option comes from its flag, else the environment, else `[tool.greenconsume]` in ./pyproject.toml, else
the default. What consuming and stopping is, `runtime` knows. Called by `__main__`, which has patched.
"""

from __future__ import annotations

import logging
import random
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from greenconsume import __version__, logs
from greenconsume.admin import run_folder
from greenconsume.cli.control import COMMANDS
from greenconsume.cli.dead_letters import dead_letters
from greenconsume.cli.flags import run_flags
from greenconsume.cli.handover import hand_over, require_extra
from greenconsume.cli.loading import runtime_of, users_part
from greenconsume.errors import (
    BrokerRefusedError,
    GreenconsumeError,
    InvalidConsumerError,
    UnsupportedTransportError,
)
from greenconsume.handling.declaring import Unset
from greenconsume.handling.options import OPTIONS, ConsumerOptions
from greenconsume.runtime.runtime import Runtime

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]  # mypy may run on 3.11

#: What a value in the table must be, by the type of the option's default, where it is no number.
_KINDS: dict[type, tuple[str, Any]] = {str: ("a string", str), bool: ("true or false", bool)}
_TABLE = "[tool.greenconsume] in pyproject.toml"


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line.

    Args:
        args: The arguments; `None` takes them from the process.

    Raises:
        SystemExit: Always. 0: drained clean; 1: work was abandoned, a consumer was given up, the broker
            refused, or the user's own code failed; 2: a mistake in the call.
    """
    try:
        code = cli.main(args, prog_name="greenconsume", standalone_mode=False)
    except click.Abort:
        code = _fail("interrupted before anything was started", 1)
    except click.ClickException as exc:
        context = getattr(exc, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        code = _fail(exc.format_message().rstrip(".") + hint, exc.exit_code)
    except (InvalidConsumerError, UnsupportedTransportError) as exc:
        code = _fail(str(exc), 2)
    except GreenconsumeError as exc:
        code = _fail(str(exc), 1)
    except Exception as exc:  # the user's module, class or factory may raise whatever it likes
        click.echo(logs.redact(_traceback(exc)), nl=False, err=True)
        code = 1
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(__version__, prog_name="greenconsume")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run many kombu consumers as greenlets of one process.

    \b
    Examples:
      greenconsume run shop:Orders --broker amqp:// --replicas 20
      greenconsume run --help
      greenconsume status
      greenconsume scale Orders 5
    """  # noqa: D301  # \b is click's: leave the paragraph as it is
    table = _table()
    broker = {name: value for name, value in table.items() if name == "broker"}
    admin = {name: value for name, value in table.items() if name.startswith("admin")}
    looks = dict.fromkeys(dead_letters.commands, broker)
    asks = {str(command.name): admin for command in COMMANDS}
    ctx.default_map = {**asks, "run": table, "dead-letters": looks}


_RUN_HELP = """\
Run the consumers of MODULE:TARGET until they have ended, or a signal drains them.

TARGET is a Runtime, a consumer class, a consumer, or a function that returns one of these. A function
that takes the connection is called for each consumer, one without arguments once. MODULE is looked
for in the current folder first.

\b
Examples:
  greenconsume run shop:Orders
  greenconsume run shop:Orders --broker amqp://guest:guest@localhost// --replicas 20 --links 2
  greenconsume run shop:runtime --drain-timeout 5 --log-format json
  greenconsume run shop:runtime --processes 4 --max-messages 100000 --max-messages-jitter 10000
  GREENCONSUME_BROKER='amqp://a;amqp://b' greenconsume run shop:Orders

An option is taken from its flag, else from the environment, else from [tool.greenconsume] in
./pyproject.toml (drain-timeout = 5), else it has its default. A Runtime, or a consumer that has a
connection, keeps its own values in place of the defaults; --replicas is not for these.

With --processes signals are gunicorn's: HUP starts all processes anew, TTIN and TTOU run one more
and one fewer. Each process has all the consumers, and all of --replicas.

SIGTERM and Ctrl-C drain: what has begun is finished. A second signal cancels what still runs, a third
one kills it, a fourth one exits at once.

Exit codes: 0 drained clean; 1 work was abandoned, a consumer was given up, the broker refused or
your own code failed; 2 a mistake in the call.
"""


@cli.command(help=_RUN_HELP)
@click.argument("target", metavar="MODULE:TARGET")
@run_flags
@click.pass_context
def run(
    ctx: click.Context,
    /,
    target: str,
    log_level: str,
    log_format: logs.LogFormat,
    processes: int | None,
    hang_timeout: int,
    pid_file: str,
    reload: bool,
    max_messages_jitter: int,
    **options: object,
) -> None:
    """Run the consumers of a target; `greenconsume run --help` shows `_RUN_HELP`."""
    logs.configure(log_level, log_format)
    given = {
        name: value
        for name, value in options.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    given.pop("max_messages_jitter", None)
    if processes is None and not reload:
        _refuse_alone(ctx, "hang_timeout", "pid_file")
        _serve(load(target, options, given, max_messages_jitter))
        return
    runtime = _load_for_processes(target, options, given, processes, reload)
    orders = {"log_level": log_level, "log_format": log_format, "hang_timeout": hang_timeout}
    orders |= {"processes": processes or 1, "pid_file": pid_file, "reload": reload}
    orders |= {"options": options, "given": given, "jitter": max_messages_jitter}
    hand_over(target, {**orders, "grace": _grace_of(runtime)})


cli.add_command(dead_letters)
for _command in COMMANDS:
    cli.add_command(_command)


def load(target: str, options: dict[str, Any], given: dict[str, Any], jitter: int) -> Runtime:
    """Return the runtime that a MODULE:TARGET names, as the command line wants it.

    Args:
        target: MODULE:TARGET.
        options: All options that concern a runtime or its consumers, with their defaults.
        given: Those that the user gave.
        jitter: A random part of so many messages is added to `max_messages`.

    Raises:
        Exception: As `runtime_of`.
    """
    given = dict(given)
    handled = ConsumerOptions(**{name: given.pop(name) for name in OPTIONS if name in given})
    others = {name: value for name, value in options.items() if name not in OPTIONS}
    for each in (given, others):  # of all consumers together: `rate` among the options is of each
        if "runtime_rate" in each:
            each["rate"] = each.pop("runtime_rate")
    runtime = runtime_of(target, others, given, handled)
    if runtime.max_messages is not None:
        runtime.max_messages += random.randint(0, jitter)
    if "admin" not in given:
        _admit(runtime)
    runtime.title = runtime.title or target
    return runtime


def _refuse_alone(ctx: click.Context, *names: str) -> None:
    """Refuse flags that only the arbiter of processes knows, and that would do nothing."""
    for name in names:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} does nothing without --processes (1 is enough)")


def _load_for_processes(
    target: str, options: dict[str, Any], given: dict[str, Any], processes: int | None, reload: bool
) -> Runtime:
    """Return the runtime of a target that several processes are to run, to say now what is wrong with it."""
    require_extra("--reload" if reload else "--processes", "gunicorn", "gunicorn")
    if reload:
        require_extra("--reload", "watchfiles", "reload")
    runtime = load(target, options, given, 0)
    if (processes or 1) > 1 and runtime.admin not in (None, "none", "run"):
        raise click.UsageError(
            f"{runtime.admin} cannot be the admin of {processes} processes: leave --admin away, and each has "
            "a Unix socket of its own, where `greenconsume status` finds it"
        )
    return runtime


def _grace_of(runtime: Runtime) -> float:
    """Return the seconds that a drain of a runtime may take, its goodbyes included."""
    drain, cancel = runtime.options.drain_timeout, runtime.options.cancel_timeout
    defaults = OPTIONS["drain_timeout"].default, OPTIONS["cancel_timeout"].default
    drain = defaults[0] if isinstance(drain, Unset) else drain
    return float(drain + (defaults[1] if isinstance(cancel, Unset) else cancel) + 1.0)


def _admit(runtime: Runtime) -> None:
    """Have a runtime found by the other commands, if nothing is said of it and there can be a run folder."""
    try:
        run_folder.make_folder()
    except OSError as exc:
        logging.getLogger("greenconsume.cli").debug(
            "no admin: the run folder cannot be used: %s", exc
        )
        runtime.admin = None if runtime.admin == "run" else runtime.admin
    else:
        runtime.admin = runtime.admin or "run"


def _serve(runtime: Runtime) -> None:
    """Run it to its end; any end but a clean one is an error, told in one line."""
    try:
        clean = runtime.run()
    except BrokerRefusedError as exc:
        raise click.ClickException(
            f"{exc}; check the user name, the password and the virtual host in the broker's URL, and "
            "that the broker lets this user in there"
        ) from exc
    except Exception as exc:
        if not any(child.error is exc for child in runtime.children):
            raise
        clean = True  # it was given up while it started, and the log has its traceback
    given_up = [child for child in runtime.children if child.given_up]
    if given_up:
        more = f", and {len(given_up) - 1} more" if len(given_up) > 1 else ""
        raise click.ClickException(f"{given_up[0].name} was given up: {given_up[0].error!r}{more}")
    if not clean:
        raise click.ClickException(
            "work was abandoned: what still ran was cancelled or killed, and its messages are the broker's"
        )


def _fail(message: str, code: int) -> int:
    click.echo(f"greenconsume: {logs.redact(' '.join(message.split()))}", err=True)
    return code


def _traceback(error: Exception) -> str:
    """Return the traceback of an error of the user's, without what is ours; of ours, all of it."""
    users = users_part(error)
    if users is not None or isinstance(error, SyntaxError):
        error = error.with_traceback(users)
    return "".join(traceback.format_exception(error))


def _table() -> dict[str, Any]:
    """Return the options that ./pyproject.toml sets, checked here so that an error names their source."""
    try:
        document = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:  # what is no TOML, or no UTF-8, is a ValueError
        raise click.UsageError(f"pyproject.toml cannot be read: {exc}") from exc
    table = document.get("tool", {}).get("greenconsume", {})
    if not isinstance(table, dict):
        raise click.UsageError(f"{_TABLE} must be a table, not {table!r}")
    known = {param.opts[0].removeprefix("--"): param for param in run.params if param.envvar}
    settings = {}
    for key, value in table.items():
        if key not in known:
            raise click.UsageError(f"{_TABLE}: there is no {key!r}, only {', '.join(known)}")
        settings[str(known[key].name)] = _setting(key, value, known[key])
    return settings


def _setting(key: str, value: object, param: click.Parameter) -> Any:
    kind, wanted = _KINDS.get(type(param.default), ("a number", (int, float)))
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise click.UsageError(f"{_TABLE}: {key} must be {kind}, not {value!r}")
    try:
        return param.type.convert(str(value), param, None)
    except click.BadParameter as exc:
        raise click.UsageError(f"{_TABLE}: {key}: {exc.message}") from exc
