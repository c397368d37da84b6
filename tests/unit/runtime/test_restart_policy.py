from __future__ import annotations

from typing import Any

import pytest

from greenconsume.runtime.restart_policy import RestartPolicy

AT_ONCE = RestartPolicy(backoff=0)
BROKEN = ValueError("broken")


@pytest.mark.parametrize(
    ("kind", "after_error", "after_return"),
    [("transient", True, False), ("permanent", True, True), ("temporary", False, False)],
)
def test_the_kind_of_a_policy_says_what_is_restarted(
    kind: Any, after_error: bool, after_return: bool
):
    """Each kind differs in what a consumer must have done to be started again."""
    policy = RestartPolicy(kind)
    assert policy.restarts(BROKEN) is after_error
    assert policy.restarts(None) is after_return


def test_a_backoff_doubles_up_to_its_maximum():
    """Without jitter the waits are known, also after very many of them."""
    policy = RestartPolicy(backoff=0.5, max_backoff=3.0, jitter=0)
    assert [policy.delay(n) for n in (1, 2, 3, 4, 5, 100_000)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_jitter_spreads_the_waits_and_lengthens_none():
    """A fleet that failed together does not come back together."""
    delays = [RestartPolicy(backoff=8.0, jitter=0.5).delay(1) for _ in range(200)]
    assert all(4.0 <= delay <= 8.0 for delay in delays)
    assert max(delays) - min(delays) > 2.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "always"}, "kind must be transient, permanent or temporary, not 'always'"),
        ({"max_restarts": -1}, "max_restarts must be 0 or more, not -1"),
        ({"period": 0}, "period must be more than 0 seconds, not 0"),
        ({"period": float("nan")}, "period must be more than 0 seconds, not nan"),
        ({"backoff": -1}, "backoff must be between 0 and max_backoff seconds, not -1"),
        ({"backoff": 31.0}, "not 31.0 with a max_backoff of 30.0"),
        ({"jitter": 1.5}, "jitter must be between 0 and 1, not 1.5"),
        ({"jitter": "half"}, "jitter must be between 0 and 1, not 'half'"),
        ({"max_restarts": "3"}, "max_restarts must be 0 or more, not '3'"),
        ({"period": None}, "period must be more than 0 seconds, not None"),
        ({"backoff": "1s"}, "backoff must be between 0 and max_backoff seconds, not '1s'"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str):
    """The error names the field, its bounds and what was given."""
    with pytest.raises(ValueError, match=message):
        RestartPolicy(**wrong)


def test_a_policy_cannot_be_changed():
    """A policy is a value that many runtimes may share."""
    with pytest.raises(AttributeError):
        AT_ONCE.backoff = 1.0  # type: ignore[misc]  # that it fails is the test
