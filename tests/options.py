"""Owns how a test says an option of a consumer that has others already, and sees what they come to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from greenconsume import ConsumerOptions
from greenconsume.consuming.engine import ensure_engine
from greenconsume.handling.options import options_of
from greenconsume.handling.settings import Settings


def say(consumer: Any, **options: Any) -> None:
    """Give a consumer some options in the place of those that its class says, or it says itself."""
    consumer.options = replace(options_of(consumer) or ConsumerOptions(), **options)


def settings_of(consumer: object) -> Settings:
    """Return what a consumer's options come to."""
    return ensure_engine(consumer).settings()
