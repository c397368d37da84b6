"""Tests the measure of the hub, and the tree of its greenlets."""

from __future__ import annotations

from contextlib import closing
from time import monotonic

import gevent

from greenconsume.admin import lag
from greenconsume.admin.greenlets import GreenletCount, tree
from tests.waiting import wait_until


def test_a_hub_that_was_blocked_is_late(monkeypatch):
    monkeypatch.setattr(lag, "INTERVAL", 0.01)
    with closing(lag.LagWatch()) as watch:
        wait_until(lambda: watch.timings.count >= 20)  # of which a few may be late, too
        until = monotonic() + 0.1
        while monotonic() < until:
            pass
        wait_until(lambda: watch.status().longest >= 0.08)
        assert (watch.status().p50 or 0) < 0.08


def test_the_tree_names_greenlets_and_shows_where_they_wait_and_no_variable():
    def child(secret):
        gevent.get_hub().switch()

    def parent():
        gevent.spawn(child, "S3CRET").name = "the child"
        gevent.get_hub().switch()

    greenlet = gevent.spawn(parent)
    greenlet.name = "the parent"
    try:
        # Not before it runs; greenlets of other tests may be about to.
        text = wait_until(lambda: "in child: " in (found := tree()) and found)
        lines = text.splitlines()
        above = next(line for line in lines if "the parent" in line)
        below = next(line for line in lines if "the child" in line)
        indent = len(above) - len(above.lstrip())
        assert len(below) - len(below.lstrip()) == indent + 2
        assert "in child: gevent.get_hub().switch()" in text
        assert "S3CRET" not in text
    finally:
        children = [g for g in _greenlets() if g.name == "the child"]
        gevent.killall([greenlet, *children])


def test_greenlets_are_counted_also_those_from_before():
    before = gevent.spawn(gevent.sleep, 60)
    gevent.sleep(0)
    with closing(GreenletCount()) as count:
        had = count.alive
        after = gevent.spawn(gevent.sleep, 60)
        assert count.alive == had + 1
        gevent.killall([before, after])
        assert count.alive == had - 1


def _greenlets():
    import gc

    return [each for each in gc.get_objects() if isinstance(each, gevent.Greenlet)]
