"""Owns what the handlers of all consumers of a runtime share. Made by `runtime`, called by `boundary`."""

from __future__ import annotations

from dataclasses import dataclass

from greenconsume.handling.intake import Intake
from greenconsume.handling.pace import Pace
from greenconsume.handling.slots import Slots


@dataclass(frozen=True, slots=True)
class Shared:
    """The limits of a runtime as a whole; None: there is none.

    Attributes:
        slots: The places that handlers run in.
        pace: When the next handler may begin.
        intake: How much of its prefetch each consumer takes.
    """

    slots: Slots | None = None
    pace: Pace | None = None
    intake: Intake | None = None


#: The limits of a consumer without a runtime.
NOTHING_SHARED = Shared()
