"""Tests that what was made is given again, and that no garbage is collected while it is made."""

from __future__ import annotations

import gc

import pytest

from greenconsume.admin.snapshots import Snapshots


def test_no_garbage_is_collected_while_an_answer_is_made():
    snapshots = Snapshots()
    assert snapshots.get("outer", lambda: snapshots.get("inner", gc.isenabled)) is False
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        snapshots.get("fails", lambda: 1 / 0)
    assert gc.isenabled()


def test_a_collector_that_the_program_has_disabled_stays_so():
    gc.disable()
    try:
        Snapshots().get("status", lambda: 1)
        assert not gc.isenabled()
    finally:
        gc.enable()
