"""Owns what an option is: what values it takes, what it is when nobody says it, and how it is explained.

`options` declares each option of a consumer once, in these words; the checks, the command line's flags and
the reference are all made from that. It must know no option by name.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol

from greenconsume.checks import is_count, is_list, is_seconds
from greenconsume.errors import InvalidOptionsError
from greenconsume.handling.kill_switch import KillSwitch
from greenconsume.handling.pace import rate_of

_METADATA = "greenconsume"


class Unset(Enum):
    """The type of `UNSET`."""

    UNSET = "not said"

    def __repr__(self) -> str:
        return self.name


#: What a field holds that was not said.
UNSET: Final = Unset.UNSET


class Kind(Protocol):
    """The kind of values that an option takes.

    Attributes:
        allowed: Says it in words, to follow "must be".
    """

    @property
    def allowed(self) -> str: ...

    def check(self, name: str, value: object) -> None:
        """Refuse what the option does not take.

        Raises:
            InvalidOptionsError: With the option's name, the value, and what is allowed.
        """


@dataclass(frozen=True, slots=True)
class Count:
    """A whole number.

    Args:
        least: The smallest.
        most: The largest, if there is one.
        none: What None stands for, if it is allowed.
    """

    least: int = 1
    most: int | None = None
    none: str = ""

    @property
    def allowed(self) -> str:
        """The range, in words."""
        text = f"{self.least} or more" if self.most is None else f"from {self.least} to {self.most}"
        return f"{text}, or None for {self.none}" if self.none else text

    def check(self, name: str, value: object) -> None:
        """See `Kind.check`."""
        if value is None and self.none:
            return
        # A bool is an int, and means something else.
        if not (is_count(value, self.least) and value <= (self.most or value)):
            raise InvalidOptionsError(name, value, self.allowed)


@dataclass(frozen=True, slots=True)
class Seconds:
    """A duration, in float seconds.

    Args:
        above_zero: 0 is not allowed.
        optional: None is allowed.
    """

    above_zero: bool = False
    optional: bool = False

    @property
    def allowed(self) -> str:
        """The range, in words."""
        text = "more than 0 seconds" if self.above_zero else "0 seconds or more"
        return f"{text}, or None" if self.optional else text

    def check(self, name: str, value: object) -> None:
        """See `Kind.check`."""
        if value is None and self.optional:
            return
        if not is_seconds(value, self.above_zero):
            raise InvalidOptionsError(name, value, self.allowed)


@dataclass(frozen=True, slots=True)
class YesOrNo:
    """A bool."""

    allowed: str = "True or False"

    def check(self, name: str, value: object) -> None:
        """See `Kind.check`."""
        if not isinstance(value, bool):
            raise InvalidOptionsError(name, value, self.allowed)


@dataclass(frozen=True, slots=True)
class Key:
    """A callable that makes the key of a message."""

    allowed: str = (
        "the name of a header, 'routing_key', a callable that is given the message, or None"
    )

    def check(self, name: str, value: object) -> None:
        """See `Kind.check`."""
        # A static method, named in the body of its class, can be called from Python 3.10 on.
        if not (value is None or isinstance(value, str) or callable(value)):
            raise InvalidOptionsError(name, value, self.allowed)


@dataclass(frozen=True, slots=True)
class Switching:
    """A kill switch."""

    allowed: str = "KillSwitch(…), or None"

    def check(self, name: str, value: object) -> None:
        """See `Kind.check`."""
        if not (value is None or isinstance(value, KillSwitch)):
            raise InvalidOptionsError(name, value, self.allowed)


@dataclass(frozen=True, slots=True)
class Frequency:
    """So many messages in a time, in words."""

    allowed: str = "a rate such as '100/s', '90/m' or '100/s burst 20', or None"

    def check(self, name: str, value: object) -> None:
        """See `Kind.check`."""
        if value is not None and not (isinstance(value, str) and rate_of(value)):
            raise InvalidOptionsError(name, value, self.allowed)


@dataclass(frozen=True, slots=True)
class Wrapping:
    """Some callables that return context managers."""

    allowed: str = (
        "a list of callables, each of which takes a message and returns a context manager"
    )

    def check(self, name: str, value: object) -> None:
        """See `Kind.check`."""
        if not is_list(value):
            raise InvalidOptionsError(name, value, self.allowed)
        for each in value:
            if not callable(each):
                raise InvalidOptionsError(name, each, self.allowed)


@dataclass(frozen=True, slots=True)
class Policy:
    """A failure policy, or a mapping from exception classes to policies."""

    allowed: str = "Requeue(…), Reject(), Retry(…), or a mapping from exception classes to these"

    def check(self, name: str, value: object) -> None:
        """See `Kind.check`."""
        problem = _problem_of(name, value)
        if problem:
            raise InvalidOptionsError(name, value, self.allowed, problem)


def _problem_of(name: str, on_error: object) -> str:
    if not isinstance(on_error, Mapping):
        return _problem_of_one(name, on_error)
    for kind, policy in on_error.items():
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            return (
                f"{name} maps {kind!r}, which is no class of exceptions: "
                "write it as {ValueError: Reject()}"
            )
        problem = _problem_of_one(f"{name} for {kind.__name__}", policy)
        if problem:
            return problem
    return ""


def _problem_of_one(name: str, policy: object) -> str:
    if isinstance(policy, type):
        kind = policy.__name__
        return f"{name} is the class {kind}, not a policy: write {kind}()"
    if callable(getattr(policy, "apply", None)):
        return ""
    return (
        f"{name} is {policy!r}, which is no policy: write Requeue(delay=1.0), Reject() or another"
    )


@dataclass(frozen=True, slots=True)
class Declaration:
    """One option, as its field declares it.

    Attributes:
        name: The field's.
        kind: What values it takes.
        default: What it is when nobody says it.
        doc: What it does; the first sentence says it in short.
        said: The default in words, where its value does not say enough.
    """

    name: str
    kind: Kind
    default: Any
    doc: str
    said: str = ""

    @property
    def summary(self) -> str:
        """The first sentence, as a command line explains it."""
        return self.doc.partition(". ")[0].rstrip(".").replace("`", "") + "."

    @property
    def default_text(self) -> str:
        """The default, in words."""
        return self.said or f"{self.default:g}"


def option(kind: Kind, default: object, doc: str, said: str = "") -> Any:
    """Return the dataclass field of an option; it holds `UNSET` until it is said."""
    declared = Declaration("", kind, default, doc, said)
    return dataclasses.field(default=UNSET, metadata={_METADATA: declared})


def declarations_of(options: type) -> dict[str, Declaration]:
    """Return the options that a dataclass declares, by name, in their order."""
    declared = {field.name: field.metadata[_METADATA] for field in dataclasses.fields(options)}
    return {name: dataclasses.replace(each, name=name) for name, each in declared.items()}


def explained(doc: str, options: Iterable[Declaration]) -> str:
    """Return a class's docstring, with a section about each of its options."""
    texts = (
        f"{each.name}: {each.doc} Must be {each.kind.allowed}. By default: {each.default_text}."
        for each in options
    )
    lines = [
        textwrap.fill(
            text,
            width=100,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
        )
        for text in texts
    ]
    return "\n".join([f"{doc.rstrip()}\n\n    Attributes:", *lines, "    "])
