"""Owns how a test says an option of a consumer that has others already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from greenconsume import ConsumerOptions
from greenconsume.handling.options import options_of


def say(consumer: Any, **options: Any) -> None:
    """Give a consumer some options in the place of those that its class says, or it says itself."""
    consumer.options = replace(options_of(consumer) or ConsumerOptions(), **options)
