"""Owns what counts as a number, or a list, where arguments are checked: whole, a share, or seconds.

A bool is an int to Python, and means something else; what is no number at all must be refused in words, and
not by a comparison that fails. It must never raise. Called wherever arguments enter.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeGuard


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Return whether it is a whole number, `least` or more."""
    return type(value) is int and value >= least


def is_number(value: object, least: float = 0.0) -> TypeGuard[float]:
    """Return whether it is a number, `least` or more; nan is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number: Any = value
    return bool(number >= least)


def is_seconds(value: object, above_zero: bool = False) -> TypeGuard[float]:
    """Return whether it is a number of seconds: 0 or more, or above zero."""
    return is_number(value) and (value > 0 or not above_zero)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Return whether it is a list, or another sequence; a text, which is one to Python, is none."""
    return isinstance(value, Sequence) and not isinstance(value, str)
