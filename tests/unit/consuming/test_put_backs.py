"""Tests what the broker is told of each message that goes back: that it has failed, or has not (law 11).

From RabbitMQ 4.3 on a quorum queue counts a `basic.reject` towards its delivery limit, a `basic.nack` not.
"""

from __future__ import annotations

from typing import Any

import gevent
import pytest
from gevent.event import Event
from kombu import Connection, Queue

from greenconsume import ConsumerMixin, ConsumerOptions, KillSwitch, Reject, Requeue, spawn
from tests.waiting import wait_until

ACK, FAILED, DROPPED, GIVEN_BACK = "ack", "reject, requeued", "reject", "nack, requeued"
LONG = 60.0


class Worker(ConsumerMixin):
    """Does with each message what a test says."""

    on_decode_error = None

    def __init__(self, peer: Any, act: Any, **options: Any) -> None:
        self.connection = Connection(peer.url, transport_options={"close_timeout": 2.0})
        self.options = ConsumerOptions(**options)
        self.act = act
        self.begun: list[Any] = []
        self.gate = Event()

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        self.channel = channel
        return [Consumer([Queue("q")], callbacks=[self.on_task], prefetch_count=20)]

    def on_task(self, body: Any, message: Any = None) -> None:
        self.begun.append(body)
        self.act(self, body, message)


def wait_at_gate(worker: Worker, _body: Any, message: Any) -> None:
    worker.gate.wait()
    message.ack()


def hang(worker: Worker, _body: Any, _message: Any) -> None:
    Event().wait()


def fail(worker: Worker, _body: Any, _message: Any) -> None:
    raise LookupError("no such hat")


def fail_at_gate(worker: Worker, _body: Any, _message: Any) -> None:
    worker.gate.wait()
    raise LookupError("no such hat")


def requeue(worker: Worker, _body: Any, message: Any) -> None:
    message.requeue()


def reject(worker: Worker, _body: Any, message: Any) -> None:
    message.reject()


def do_nothing(worker: Worker, _body: Any, _message: Any) -> None:
    """Leave it unsettled."""


def settles(peer: Any) -> dict[int, str]:
    """Return what the peer was told of each delivery, by its tag; a frame for several counts for each."""
    said: dict[int, str] = {}
    for frame in peer.received:
        if frame.name not in ("basic.ack", "basic.nack", "basic.reject"):
            continue
        tag, *flags = frame.args
        requeued = ", requeued" if frame.name != "basic.ack" and flags[-1] else ""
        several = frame.name != "basic.reject" and flags[0]
        for each in range(1 if several else tag, tag + 1):
            said.setdefault(each, frame.name.removeprefix("basic.") + requeued)
    return said


@pytest.fixture
def run(peer):
    """Deliver four messages to a worker, and stop it once so many of them were begun."""
    workers = []

    def start(act, begun, **options):
        worker = Worker(peer, act, **options)
        greenlet = spawn(worker)
        workers.append((worker, greenlet))
        assert greenlet.ready.wait(LONG)
        tag = peer.wait_for("basic.consume", within=LONG).args[2]
        for number in (1, 2, 3, 4):
            peer.deliver(1, tag, number, b"%d" % number)
        wait_until(lambda: worker.channel.unsettled_count + len(settles(peer)) >= 4, LONG)
        wait_until(lambda: len(worker.begun) >= begun, LONG)
        return worker, greenlet

    yield start
    for worker, greenlet in workers:
        greenlet.stop()
        worker.gate.set()
    gevent.joinall([greenlet for _, greenlet in workers], timeout=LONG)


def told(peer, **expected):
    wait_until(lambda: len(settles(peer)) >= len(expected), LONG)
    assert settles(peer) == {int(tag[1:]): how for tag, how in expected.items()}


UNSTARTED = {
    "pool": {"concurrency": 1},
    "partition": {"concurrency": 4, "partition_by": lambda message: "one"},
    "rate": {"concurrency": 4, "rate": "1/h"},
}


@pytest.mark.parametrize("options", UNSTARTED.values(), ids=UNSTARTED)
def test_what_a_stop_finds_unstarted_is_given_back(peer, run, options):
    worker, greenlet = run(wait_at_gate, 1, **options)
    greenlet.stop()
    worker.gate.set()
    told(peer, _1=ACK, _2=GIVEN_BACK, _3=GIVEN_BACK, _4=GIVEN_BACK)


def test_what_a_stop_finds_unstarted_inline_is_given_back(peer, run):
    worker, greenlet = run(wait_at_gate, 1)
    greenlet.stop()
    worker.gate.set()
    told(peer, _1=ACK, _2=GIVEN_BACK, _3=GIVEN_BACK, _4=GIVEN_BACK)


def test_what_a_stop_interrupts_is_given_back(peer, run):
    _worker, greenlet = run(hang, 4, concurrency=4, drain_timeout=0.0)
    greenlet.stop()
    told(peer, _1=GIVEN_BACK, _2=GIVEN_BACK, _3=GIVEN_BACK, _4=GIVEN_BACK)


def test_a_batch_that_a_stop_interrupts_is_given_back(peer, run):
    _worker, greenlet = run(
        hang, 1, concurrency=1, batch_size=4, batch_timeout=LONG, drain_timeout=0.0
    )
    greenlet.stop()
    told(peer, _1=GIVEN_BACK, _2=GIVEN_BACK, _3=GIVEN_BACK, _4=GIVEN_BACK)


def test_a_batch_that_a_stop_finds_unfilled_is_given_back(peer, run):
    _worker, greenlet = run(hang, 0, concurrency=1, batch_size=20, batch_timeout=LONG)
    greenlet.stop()
    told(peer, _1=GIVEN_BACK, _2=GIVEN_BACK, _3=GIVEN_BACK, _4=GIVEN_BACK)


FAILING = {
    "inline": {},
    "pool": {"concurrency": 4},
    "batch": {"concurrency": 1, "batch_size": 4, "batch_timeout": LONG},
}


@pytest.mark.parametrize("options", FAILING.values(), ids=FAILING)
def test_what_fails_is_rejected_though_it_is_told_with_others(peer, run, options):
    run(fail, 1, **{"on_error": Requeue(delay=0.0), **options})
    told(peer, _1=FAILED, _2=FAILED, _3=FAILED, _4=FAILED)


def test_what_fails_after_a_delay_is_rejected(peer, run):
    run(fail, 4, on_error=Requeue(delay=0.01))
    told(peer, _1=FAILED, _2=FAILED, _3=FAILED, _4=FAILED)


def test_what_fails_for_good_is_rejected(peer, run):
    run(fail, 4, on_error=Reject())
    told(peer, _1=DROPPED, _2=DROPPED, _3=DROPPED, _4=DROPPED)


def test_what_takes_too_long_is_rejected(peer, run):
    run(hang, 4, concurrency=4, handler_timeout=0.01, on_error=Requeue(delay=0.0))
    told(peer, _1=FAILED, _2=FAILED, _3=FAILED, _4=FAILED)


def test_what_fails_beside_what_a_stop_finds_unstarted_is_told_by_its_own(peer, run):
    """The settles of one turn are merged where they say the same."""
    worker, greenlet = run(fail_at_gate, 2, concurrency=2, on_error=Requeue(delay=0.0))
    greenlet.stop()
    worker.gate.set()
    told(peer, _1=FAILED, _2=FAILED, _3=GIVEN_BACK, _4=GIVEN_BACK)


def test_what_a_kill_switch_finds_unstarted_is_given_back(peer, run):
    switch = KillSwitch(threshold=0.5, window=1, pause=LONG)
    run(fail, 1, kill_switch=switch, on_error=Requeue(delay=0.0))
    told(peer, _1=FAILED, _2=GIVEN_BACK, _3=GIVEN_BACK, _4=GIVEN_BACK)


@pytest.mark.parametrize(("act", "how"), [(requeue, FAILED), (reject, DROPPED)])
@pytest.mark.parametrize("options", [{}, {"concurrency": 4}], ids=["inline", "pool"])
def test_what_the_user_puts_back_himself_is_rejected_as_with_kombu(peer, run, act, how, options):
    run(act, 4, **options)
    told(peer, _1=how, _2=how, _3=how, _4=how)


def test_what_a_handler_leaves_alone_is_told_nothing(peer, run):
    """The channel's close gives it back."""
    _worker, greenlet = run(do_nothing, 4)
    greenlet.stop()
    assert greenlet.join(LONG)
    assert settles(peer) == {}
    assert "channel.close" in peer.names
