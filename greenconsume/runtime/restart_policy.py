"""Owns the rule by which a consumer that ended is started again: how often, and after how long.

It must never start anything. Made by users; asked by `supervisor`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from greenconsume.checks import is_count, is_number, is_seconds


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The rule by which a consumer that ended is started again, or given up.

    A consumer that was asked to stop is never started again. One that is given up is `failed`; the others
    live on, and `Runtime.join` and `Runtime.run` tell of it.

    Attributes:
        kind: `transient`: after an error. `permanent`: also after its `run()` returned. `temporary`: never.
        max_restarts: One more in `period` is one too many.
        period: Seconds for which a restart is counted.
        backoff: Seconds before the first restart; each further one within the period waits twice as long.
        max_backoff: Seconds that no restart waits longer than.
        jitter: The share of a wait that is left to chance, 0 to 1, so that a fleet does not restart in step.

    Raises:
        ValueError: `kind` is none of these, or a number is out of its range.
    """

    kind: Literal["transient", "permanent", "temporary"] = "transient"
    max_restarts: int = 5
    period: float = 60.0
    backoff: float = 1.0
    max_backoff: float = 30.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("transient", "permanent", "temporary"):
            raise ValueError(f"kind must be transient, permanent or temporary, not {self.kind!r}")
        if not is_count(self.max_restarts, 0):
            raise ValueError(f"max_restarts must be 0 or more, not {self.max_restarts!r}")
        if not is_seconds(self.period, above_zero=True):
            raise ValueError(f"period must be more than 0 seconds, not {self.period!r}")
        waits = (self.backoff, self.max_backoff)
        if not (all(map(is_seconds, waits)) and self.backoff <= self.max_backoff):
            raise ValueError(
                "backoff must be between 0 and max_backoff seconds, "
                f"not {self.backoff!r} with a max_backoff of {self.max_backoff!r}"
            )
        if not (is_number(self.jitter) and self.jitter <= 1):
            raise ValueError(f"jitter must be between 0 and 1, not {self.jitter!r}")

    def restarts(self, error: BaseException | None) -> bool:
        """Return whether a consumer that ended with `error`, or returned, is to be started again.

        Switches: never.
        """
        return self.kind == "permanent" or (self.kind == "transient" and error is not None)

    def delay(self, attempt: int) -> float:
        """Return how many seconds the `attempt`-th restart within a period waits. Never switches."""
        longest = min(self.max_backoff, self.backoff * 2.0 ** min(attempt - 1, 60))
        return longest * (1 - self.jitter * random.random())
