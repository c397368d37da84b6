"""The inbox of a session, held against a list of what was put and a set of who is paused."""

from __future__ import annotations

import gevent
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from greenconsume.amqp import inbox as inboxes
from greenconsume.amqp.inbox import Inbox, Item
from greenconsume.stopping import Deadline

OWNER = st.sampled_from(["one channel", "another"])
TAG = st.sampled_from("ab")
#: Small bounds, for short runs; MANY deliveries at once soon crowd the inbox.
PAUSE_AT, RESUME_AT, MANY = 12, 4, 6


class InboxMachine(RuleBasedStateMachine):
    """Deliveries, errors, consumers that are paused or stop, and channels that close, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.inbox = Inbox()
        self.waiting: list[tuple[str, Item]] = []
        self.paused: set[tuple[str, str]] = set()
        self.resumed: list[tuple[str, str]] = []
        self.taken: list[Item] = []
        self.count = 0

    def put(self, owner: str, item: Item) -> None:
        self.inbox.put(owner, item, self.taken.append)
        self.waiting.append((owner, item))

    @rule(owner=OWNER, tag=TAG, count=st.sampled_from([1, 2, MANY]))
    def deliver(self, owner: str, tag: str, count: int) -> None:
        for _ in range(count):
            self.count += 1
            self.put(owner, (tag, self.count, False, "", "", b"", b""))

    @rule(owner=OWNER)
    def tell_of_an_error(self, owner: str) -> None:
        self.put(owner, ConnectionError())

    @rule(owner=OWNER, tag=TAG)
    def tell_of_a_cancel(self, owner: str, tag: str) -> None:
        self.put(owner, tag)

    @rule(count=st.sampled_from([1, 3, MANY]))
    def receive(self, count: int) -> None:
        """As `Session.drain_events`: in the order in which they came, each to its own callback."""
        for _ in range(min(count, len(self.waiting))):
            assert self.inbox.hand_out()
            assert self.taken.pop() is self.waiting.pop(0)[1]
            if len(self.waiting) <= RESUME_AT:
                assert sorted(self.resumed) == sorted(self.paused)
                self.paused.clear()
            else:
                assert self.resumed == []
            self.resumed.clear()

    @rule(owner=OWNER, tag=TAG)
    def take_back(self, owner: str, tag: str) -> None:
        """Check that one channel gives back its own, in its order; the errors and all others stay."""
        taken = self.inbox.take_back(owner, lambda delivery: delivery[0] == tag)
        wanted = [
            each
            for each in self.waiting
            if each[0] == owner and isinstance(each[1], tuple) and each[1][0] == tag
        ]
        assert taken == [item for _, item in wanted]
        self.waiting = [each for each in self.waiting if each not in wanted]

    @rule(owner=OWNER, tag=TAG)
    def pause(self, owner: str, tag: str) -> None:
        self.inbox.pause(owner, tag, lambda: self.resumed.append((owner, tag)))
        self.paused.add((owner, tag))

    @rule()
    def resume(self) -> None:
        """All or none go on, each once."""
        self.inbox.resume()
        if len(self.inbox.entries) <= RESUME_AT:
            assert sorted(self.resumed) == sorted(self.paused)
            self.paused.clear()
        else:
            assert self.resumed == []
        self.resumed.clear()

    @rule(owner=OWNER, tag=st.none() | TAG)
    def forget_paused(self, owner: str, tag: str | None) -> None:
        self.inbox.forget_paused(owner, tag)
        self.paused = {
            each for each in self.paused if each[0] != owner or tag not in (None, each[1])
        }

    @rule()
    def clear(self) -> None:
        self.inbox.clear()
        self.waiting.clear()
        self.paused.clear()

    @invariant()
    def it_holds_what_was_put_in_its_order(self) -> None:
        assert [(owner, item) for owner, item, _ in self.inbox.entries] == self.waiting
        assert set(self.inbox.paused) == self.paused
        assert self.inbox.is_crowded is (len(self.waiting) > PAUSE_AT)


def test_what_is_put_comes_out_once_and_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inboxes, "PAUSE_AT", PAUSE_AT)
    monkeypatch.setattr(inboxes, "RESUME_AT", RESUME_AT)
    given = settings(max_examples=40, stateful_step_count=30)
    run_state_machine_as_test(InboxMachine, settings=given)  # its rules assert
    assert not InboxMachine().inbox.entries


def test_a_put_and_the_end_of_the_session_wake_whoever_waits() -> None:
    inbox = Inbox()
    for wake in (lambda: inbox.put("a channel", "t", print), inbox.wake, inbox.clear):
        waiter = gevent.spawn(inbox.wait, Deadline(60), None)
        gevent.idle()
        assert not waiter.dead
        wake()
        waiter.join(timeout=10)
        assert waiter.dead
