from __future__ import annotations

import os
from time import monotonic

import gevent
import pytest
from gevent.event import Event

from greenconsume.errors import StoppedError
from greenconsume.stopping import Deadline, StopSignal, wait
from tests.waiting import AT_ONCE, NEVER


def test_the_first_reason_is_kept():
    """A second stop changes nothing, not even the reason that is told."""
    stop = StopSignal()
    stop.set("SIGTERM")
    stop.set("later")
    assert stop.is_set()
    assert stop.reason == "SIGTERM"


def test_a_signal_wakes_any_number_of_waiters():
    """Everything that waits for one signal is woken by setting it once."""
    stop = StopSignal()
    waiters = [gevent.spawn(stop.wait, 5.0) for _ in range(50)]
    gevent.idle()
    stop.set()
    gevent.joinall(waiters, timeout=30)
    assert [waiter.value for waiter in waiters] == [True] * 50


def test_a_foreign_thread_wakes_a_waiter():
    """A stop from another OS thread reaches a greenlet of this hub at once."""
    stop = StopSignal()
    waiter = gevent.spawn(stop.wait, NEVER)
    gevent.idle()
    began = monotonic()
    gevent.get_hub().threadpool.apply(stop.set, ("thread",))
    waiter.join(timeout=30)
    assert waiter.value is True
    assert stop.reason == "thread"
    assert monotonic() - began < AT_ONCE


def test_waiting_for_a_signal_that_is_set_returns_at_once():
    """No hub turn is needed to learn what is known already."""
    stop = StopSignal()
    stop.set()
    with gevent.Timeout(30):
        assert stop.wait() is True


def test_waiting_for_a_signal_ends_at_its_timeout():
    """Without a stop the wait tells that none came."""
    assert StopSignal().wait(0.001) is False


def test_a_cleared_signal_can_be_set_again():
    """A consumer that is started again has its signal back, with a new reason."""
    stop = StopSignal()
    stop.set("once")
    stop.clear()
    assert not stop.is_set()
    stop.set("again")
    assert stop.reason == "again"


def test_a_callback_linked_to_a_set_signal_is_called():
    """Linking late is no race: the hub calls back all the same."""
    stop, called = StopSignal(), Event()
    stop.set()
    stop.link(called.set)
    assert called.wait(30)


def test_an_unlinked_callback_is_not_called():
    """What waits no longer is not woken; unlinking it again does no harm."""
    stop, called = StopSignal(), Event()
    stop.link(called.set)
    stop.unlink(called.set)
    stop.unlink(called.set)
    stop.set()
    gevent.idle()
    assert not called.is_set()


def test_checking_a_set_signal_raises_its_reason():
    """A loop that checks its signal ends with the reason at hand."""
    stop = StopSignal()
    stop.check()
    stop.set("drain")
    with pytest.raises(StoppedError, match="stopped: drain") as caught:
        stop.check()
    assert caught.value.reason == "drain"


def test_a_wait_ends_by_its_event():
    """What was waited for is told apart from a deadline."""
    event = Event()
    gevent.get_hub().loop.run_callback(event.set)
    assert wait(event, Deadline(5.0), StopSignal()) is True


def test_a_wait_ends_by_its_deadline():
    """The deadline ends a wait that nothing else ends, with a signal and without."""
    assert wait(Event(), Deadline(0.001), StopSignal()) is False
    assert wait(Event(), Deadline(0.001)) is False


def test_a_wait_ends_by_its_stop_signal():
    """A stop ends a wait long before its deadline."""
    stop = StopSignal()
    gevent.get_hub().loop.run_callback(stop.set)
    with gevent.Timeout(30):
        assert wait(Event(), Deadline(None), stop) is True


def test_a_wait_that_has_ended_is_not_woken_any_more():
    """A signal keeps no waiters of the past, or thousands would pile up on it."""
    stop, event = StopSignal(), Event()
    wait(event, Deadline(0.001), stop)
    stop.set()
    gevent.idle()
    assert not event.is_set()


def test_a_killed_wait_leaves_nothing_on_its_signal():
    """However a wait ends, its signal forgets it."""
    stop, event = StopSignal(), Event()
    waiter = gevent.spawn(wait, event, Deadline(None), stop)
    gevent.idle()
    waiter.kill()
    stop.set()
    gevent.idle()
    assert not event.is_set()


def test_a_deadline_counts_down_to_zero():
    """What is left is never negative, and a deadline of zero seconds has come."""
    assert Deadline(0).expired
    assert Deadline(0).remaining == 0.0
    assert Deadline(-1).remaining == 0.0
    left = Deadline(10).remaining
    assert left is not None
    assert 9 < left <= 10


def test_a_deadline_of_none_never_comes():
    """No timeout means for ever."""
    assert not Deadline(None).expired
    assert Deadline(None).remaining is None


@pytest.mark.parametrize("use", [StopSignal.engage, lambda stop: stop.link(int)])
def test_a_fork_stops_the_childs_copies_of_all_signals(use):
    """HAZARDS 23: what a fork copied must not go on with the parent's sockets."""
    stop = StopSignal()
    use(stop)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if stop.reason == "fork" else 1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not stop.is_set()


def test_a_fork_leaves_a_signal_alone_that_was_only_made():
    """HAZARDS 23: what a server made before it forks its workers is each worker's own."""
    stop = StopSignal()
    pid = os.fork()
    if pid == 0:
        os._exit(1 if stop.is_set() else 0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not stop.is_set()
