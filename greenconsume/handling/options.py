"""Owns `ConsumerOptions`: every option of a consumer, declared once, and checked where it is said.

The command line's flags and the table in docs/reference.md are made from `OPTIONS`. What the options of
a class, of its `spawn` and of its runtime mean together, `settings` works out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from greenconsume.amqp.channel_ids import SHORT_MAX
from greenconsume.around import Around
from greenconsume.errors import InvalidOptionsError
from greenconsume.failures.policies import OnError, Requeue
from greenconsume.handling.declaring import (
    UNSET,
    Count,
    Declaration,
    Frequency,
    Key,
    Policy,
    Seconds,
    Switching,
    Unset,
    Wrapping,
    YesOrNo,
    declarations_of,
    explained,
    option,
)
from greenconsume.handling.kill_switch import KillSwitch

#: The largest prefetch that can be said; no more than that can be gathered.
MAX_PREFETCH = SHORT_MAX

#: Why two options are refused together.
APART = (
    "batch_size and partition_by do not go together: without partition_by and with concurrency=1 batches "
    "are handled one after the other, in order"
)

#: The name of a header, "routing_key", or what is called with the message.
PartitionBy: TypeAlias = str | Callable[..., Hashable]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ConsumerOptions:
    """The options of a consumer, by which its messages are handled: its class attribute `options`.

    Every option that is not said here is left to `Runtime.spawn(…, options=…)`, then to
    `Runtime(options=…)`, then to its default. docs/reference.md has them in a table.

    Raises:
        InvalidOptionsError: A value makes no sense. The message has the option, the value and what is
            allowed.
    """

    concurrency: int | Unset | None = option(
        Count(none="callbacks that run inline"),
        None,
        "How many callbacks run at once, each in a greenlet. Without, they run inline, one after the other. "
        "The prefetch follows, where the consumer sets none itself.",
        "inline",
    )
    partition_by: PartitionBy | Unset | None = option(
        Key(),
        None,
        "What messages have in common that run one after the other, in order: the name of a header, "
        "'routing_key', or a callable that is given the message (as a method of the class: the consumer and "
        "the message). Needs `concurrency`.",
        "no order",
    )
    batch_size: int | Unset | None = option(
        Count(most=MAX_PREFETCH, none="callbacks that are given one message"),
        None,
        "How many messages a callback is given at once, at most. It is given one argument, a `Batch`, and "
        "failures concern all of it that is not settled. `concurrency` counts batches, and is 1 where it is "
        "not said. Not with `partition_by` or `on_message`.",
        "no batches",
    )
    batch_timeout: float | Unset = option(
        Seconds(),
        1.0,
        "How long after its first message a batch is handed over though it is not full.",
    )
    handler_timeout: float | Unset | None = option(
        Seconds(above_zero=True, optional=True),
        None,
        "How long a callback may take before `HandlerTimeout` is raised in it.",
        "no limit",
    )
    auto_settle: bool | Unset = option(
        YesOrNo(),
        False,
        "Acknowledge a message whose callback returned without settling it.",
        "no",
    )
    on_error: OnError | Unset = option(
        Policy(),
        Requeue(),
        "What becomes of a message whose callback raised. In a mapping the most specific class of exceptions "
        "counts, and what the mapping lacks meets what the next level says.",
        "`Requeue(delay=1.0)`",
    )
    rate: str | Unset | None = option(
        Frequency(),
        None,
        "How many messages its callbacks begin with in a time, at most. After a quiet time as many begin at "
        "once as `burst` says, or as a second has; no more than a second's are taken from the broker ahead.",
        "no limit",
    )
    around: Sequence[Around] | Unset = option(
        Wrapping(),
        (),
        "What is entered around each callback: callables that take the message (or the `Batch`) and return a "
        "context manager. What its exit raises or swallows is the callback's outcome. All levels count: the "
        "runtime's are outermost, the class's innermost.",
        "nothing",
    )
    kill_switch: KillSwitch | Unset | None = option(
        Switching(),
        None,
        "When to stop consuming for a while, because too many messages fail.",
        "none",
    )
    drain_timeout: float | Unset = option(
        Seconds(), 30.0, "How long a stop leaves callbacks that run to end by themselves."
    )
    cancel_timeout: float | Unset = option(
        Seconds(),
        5.0,
        "How long callbacks have, after `Shutdown` was raised in them, before they are killed.",
    )
    settle_deadline: float | Unset = option(
        Seconds(),
        1800.0,
        "After how long the broker closes the channel of a message that is not settled. It is RabbitMQ's "
        "`consumer_timeout`; a warning comes at four fifths of it. 0: no warning.",
    )

    def __post_init__(self) -> None:
        for name, value in self.said().items():
            OPTIONS[name].kind.check(name, value)
        if isinstance(self.batch_size, int) and self.partition_by not in (None, UNSET):
            raise InvalidOptionsError("batch_size", self.batch_size, "without partition_by", APART)

    def said(self) -> dict[str, Any]:
        """Return the options that were said, by name. Never switches."""
        values = ((name, getattr(self, name)) for name in OPTIONS)
        return {name: value for name, value in values if value is not UNSET}

    def value_of(self, name: str) -> Any:
        """Return what was said of one option, or else its default. Never switches."""
        value = getattr(self, name)
        return OPTIONS[name].default if value is UNSET else value

    def __repr__(self) -> str:
        return f"ConsumerOptions({', '.join(f'{n}={v!r}' for n, v in self.said().items())})"


#: Every option, by name.
OPTIONS: dict[str, Declaration] = declarations_of(ConsumerOptions)
ConsumerOptions.__doc__ = explained(ConsumerOptions.__doc__ or "", OPTIONS.values())


def options_of(consumer: object) -> ConsumerOptions | None:
    """Return the options of a consumer, or None: what else it calls `options` is its own.

    Nothing of the consumer's is run: a property of that name is no options.
    """
    try:
        places = (object.__getattribute__(consumer, "__dict__"), *_dicts_of(type(consumer)))
    except AttributeError:  # it has slots alone
        places = _dicts_of(type(consumer))
    found = next((each["options"] for each in places if "options" in each), None)
    return found if isinstance(found, ConsumerOptions) else None


def _dicts_of(kind: type) -> tuple[Mapping[str, Any], ...]:
    """Return where a class and its bases keep their attributes, in the order in which these are looked up."""
    return tuple(each.__dict__ for each in kind.__mro__)
