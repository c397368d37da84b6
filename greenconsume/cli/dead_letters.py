"""Owns `greenconsume dead-letters list|show|replay|purge QUEUE`: its options, its words and its exit codes.

What a dead letter is, `dead_letters` knows. Bodies are shown by `show` alone. Ctrl-C ends a command after
the message at hand; whatever it had not finished with is in the queue again. Called by `cli`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import amqp
import click
from kombu.exceptions import KombuError

from greenconsume import logs
from greenconsume.cli.flags import flag
from greenconsume.errors import GreenconsumeError
from greenconsume.failures import message_copy
from greenconsume.failures.dead_letters import DeadLetter, DeadLetters, filter_of
from greenconsume.stopping import StopSignal

_COLUMNS = ("#", "time", "error", "message", "retries", "from")
_MAX_WIDTH = 60


@click.group("dead-letters")
def dead_letters() -> None:
    """Look into a dead-letter queue, and send what is in it back.

    \b
    Examples:
      greenconsume dead-letters list orders.dead --broker amqp://
      greenconsume dead-letters show orders.dead --number 3
      greenconsume dead-letters replay orders.dead --filter ConnectionError --dry-run
      greenconsume dead-letters purge orders.dead --filter tenant=acme

    What a command does not remove goes back to its place in the queue when it ends.

    Exit codes: 0 done; 1 it could not be done, or was interrupted, or the broker refused; 2 a mistake in
    the call.
    """  # noqa: D301  # \b is click's: leave the paragraph as it is


def _options(limit: int | None, dry_run: bool) -> Callable[[Any], Any]:
    """Return a decorator that adds the argument and the options that all four have."""

    def decorate(command: Callable[..., Any]) -> Any:
        if dry_run:
            command = click.option("--dry-run", is_flag=True, help="Only say what would be done.")(
                command
            )
        command = click.option(
            "--filter",
            "conditions",
            multiple=True,
            metavar="NAME=VALUE|ERROR",
            help="Only messages with this header or property, or this type of error; may be repeated.",
        )(command)
        command = click.option(
            "--limit",
            type=click.IntRange(min=1),
            default=limit,
            show_default=limit is not None,
            help="At most so many messages, oldest first.",
        )(command)
        command = flag("--broker", metavar="URL", required=True, help="A kombu URL.")(command)
        return click.argument("queue")(command)

    return decorate


@dead_letters.command("list")
@_options(limit=20, dry_run=False)
def list_(queue: str, broker: str, limit: int, conditions: tuple[str, ...]) -> None:
    """List the messages of QUEUE: when, why and where they failed."""
    with _looking_into(broker, queue) as letters:
        shown = list(islice(filter(filter_of(conditions), letters), limit))
        for line in _table([_row(letter) for letter in shown]):
            click.echo(line)
        click.echo(f"{len(shown)} of {letters.count} messages in {queue}")


@dead_letters.command()
@_options(limit=1, dry_run=False)
@click.option("--number", type=click.IntRange(min=1), help="The one that `list` gives this number.")
def show(
    queue: str, broker: str, limit: int, conditions: tuple[str, ...], number: int | None
) -> None:
    """Show messages of QUEUE in full: headers, stack and body."""
    with _looking_into(broker, queue) as letters:
        wanted = filter_of(conditions)
        matching = (each for each in letters if wanted(each) and number in (None, each.number))
        found = False
        for letter in islice(matching, limit):
            found = True
            for line in _in_full(letter):
                click.echo(line)
    if not found:
        raise click.ClickException(f"there is no such message in {queue}")


@dead_letters.command()
@_options(limit=None, dry_run=True)
def replay(
    queue: str, broker: str, limit: int | None, conditions: tuple[str, ...], dry_run: bool
) -> None:
    """Send messages of QUEUE back to the queues that they came from.

    Each is removed once the broker has confirmed it there. One that cannot be sent back stays.
    """
    replayed = failed = 0
    with _looking_into(broker, queue) as letters:
        for letter in islice(filter(filter_of(conditions), letters), limit):
            try:
                if not dry_run:
                    letters.replay(letter)
            except GreenconsumeError as exc:
                failed += 1
                click.echo(f"message {letter.number} stays: {_plain(str(exc))}", err=True)
            else:
                replayed += 1
        done = "would be replayed" if dry_run else "replayed"
        click.echo(f"{replayed} of {letters.count} messages {done}")
    if failed:
        raise click.ClickException(f"{failed} messages could not be replayed")


@dead_letters.command()
@_options(limit=None, dry_run=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(
    queue: str,
    broker: str,
    limit: int | None,
    conditions: tuple[str, ...],
    dry_run: bool,
    yes: bool,
) -> None:
    """Remove messages of QUEUE for good."""
    if not (dry_run or yes) and not click.confirm(f"Remove messages of {queue} for good?"):
        raise click.ClickException("nothing was removed")
    removed = 0
    with _looking_into(broker, queue) as letters:
        for letter in islice(filter(filter_of(conditions), letters), limit):
            if not dry_run:
                letters.remove(letter)
            removed += 1
        done = "would be removed" if dry_run else "removed"
        click.echo(f"{removed} of {letters.count} messages {done}")


@contextmanager
def _looking_into(broker: str, queue: str) -> Iterator[DeadLetters]:
    """Open the queue, and say in one line what goes wrong with its broker, or that it was interrupted."""
    logs.configure("error")
    stop = StopSignal()
    try:
        look = DeadLetters(broker, queue, stop)
    except ValueError as exc:  # a broker URL that cannot be parsed
        raise click.UsageError(str(exc)) from exc
    try:
        with _interrupting(stop), look as letters:
            yield letters
    except (KombuError, amqp.AMQPError, OSError) as exc:
        raise click.ClickException(f"{type(exc).__name__}: {exc}") from exc
    if stop.is_set():
        raise click.ClickException("interrupted; what was not done yet is in the queue again")


@contextmanager
def _interrupting(stop: StopSignal) -> Iterator[None]:
    """Have the first Ctrl-C set `stop`; a second one interrupts whatever is going on."""
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_args: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop.set("SIGINT")

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _row(letter: DeadLetter) -> tuple[str, ...]:
    address = f" ({letter.exchange}/{letter.routing_key})" if letter.exchange else ""
    cells = (
        str(letter.number),
        letter.time[:19],
        letter.error_type,
        letter.error,
        str(letter.retry_count),
        f"{letter.queue}{address}",
    )
    return tuple(_shortened(_plain(cell)) for cell in cells)


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    rows = [_COLUMNS, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()


def _in_full(letter: DeadLetter) -> Iterator[str]:
    yield f"message {letter.number}"
    yield f"  time         {letter.time}"
    yield f"  error        {_plain(letter.error_type)}: {_plain(letter.error)}"
    yield f"  retries      {letter.retry_count}"
    yield f"  queue        {_plain(letter.queue)}"
    yield f"  exchange     {_plain(letter.exchange) or '(default)'}"
    yield f"  routing key  {_plain(letter.routing_key)}"
    yield f"  host         {_plain(letter.host)}"
    for title, table in (("properties", letter.properties), ("headers", letter.headers)):
        yield f"{title}:"
        for name, value in table.items():
            if not str(name).startswith(message_copy.PREFIX):
                yield f"  {_plain(str(name))}: {_plain(repr(value))}"
    yield "stack:"
    yield from (f"  {_plain(line)}" for line in letter.stack.splitlines())
    yield f"body ({len(letter.body or '')} {'bytes' if isinstance(letter.body, bytes) else 'characters'}):"
    yield _body(letter.body)


def _body(body: object) -> str:
    """Return a body to read: as text if it is any, and in no case what a terminal would act on."""
    if isinstance(body, bytes):
        try:
            body = body.decode()
        except UnicodeDecodeError:
            return repr(body)
    return "\n".join(_plain(line) for line in str(body).split("\n"))


def _plain(text: str) -> str:
    """Return a text in which a terminal finds nothing to act on."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_WIDTH else text[: _MAX_WIDTH - 1] + "…"
