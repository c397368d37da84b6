from __future__ import annotations

import socket
import threading

import gevent
import pytest
from gevent.event import Event
from gevent.threadpool import ThreadPool

from tests.leaks import LeakWatch


def test_a_greenlet_that_is_left_over_is_told_and_killed():
    watch = LeakWatch()
    greenlet = gevent.spawn(Event().wait)
    with pytest.raises(AssertionError, match="outlived the test: greenlet"):
        watch.verify(within=0.02)
    assert greenlet.dead


def test_a_greenlet_that_ends_while_things_settle_is_no_leak():
    watch = LeakWatch()
    go = Event()
    greenlet = gevent.spawn(go.wait)
    gevent.get_hub().loop.run_callback(go.set)
    watch.verify(within=0.02)
    assert greenlet.dead


def test_a_greenlet_from_before_the_test_is_no_leak():
    go = Event()
    greenlet = gevent.spawn(go.wait)
    LeakWatch().verify(within=0.02)
    assert not greenlet.dead
    go.set()
    greenlet.join()


def test_a_socket_that_is_left_open_is_told_with_its_ends():
    watch = LeakWatch()
    left, right = socket.socketpair()
    try:
        with pytest.raises(AssertionError, match=r"socket:\[\d+\].*->.*socket:\[\d+\]"):
            watch.verify(within=0.02)
    finally:
        left.close()
        right.close()


def test_a_native_thread_that_is_left_running_is_told():
    watch = LeakWatch()
    pool = ThreadPool(1)
    pool.spawn(int).get()
    try:
        with pytest.raises(AssertionError, match="1 native threads"):
            watch.verify(within=0.02)
    finally:
        pool.kill()


def test_the_hubs_own_thread_pool_is_no_leak():
    watch = LeakWatch()
    assert gevent.get_hub().threadpool.spawn(int).get() == 0
    watch.verify(within=0.02)
    assert threading.active_count() >= 1
