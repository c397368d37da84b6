from __future__ import annotations

import gevent
import pytest

from tests.waiting import wait_until


def test_wait_until_returns_what_the_predicate_returned():
    assert wait_until(lambda: "there") == "there"


def test_wait_until_lets_other_greenlets_run():
    done: list[int] = []
    greenlet = gevent.spawn(done.append, 1)
    assert wait_until(lambda: done) == [1]
    greenlet.join()


def test_wait_until_names_the_condition_and_its_last_value():
    with pytest.raises(AssertionError, match=r"not within 0.01 s: .*len\(\[\]\).*last value: 0"):
        wait_until(lambda: len([]), within=0.01)
