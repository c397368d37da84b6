"""Owns how often a test is repeated whose outcome depends on the moment at which something happens."""

from __future__ import annotations

import os

VARIABLE = "GREENCONSUME_TEST_ROUNDS"


def rounds(default: int) -> int:
    """Return how often to repeat: what the environment asks for, or the default, which takes seconds."""
    return int(os.environ.get(VARIABLE) or default)
