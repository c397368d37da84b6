"""The ledger that merges settles, held against a model of what a broker would do with its frames."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from greenconsume.amqp.ledger import ACK, GIVE_BACK, REJECT, REQUEUE, Ledger, encode
from tests import frames

HOW = st.sampled_from([ACK, REQUEUE, REJECT, GIVE_BACK])


class BrokerChannel:
    """A broker's side of one channel: what it has delivered, and what became of it."""

    def __init__(self) -> None:
        self.unsettled: list[int] = []
        self.outcome: dict[int, int] = {}

    def deliver(self, tag: int) -> None:
        self.unsettled.append(tag)

    def settle(self, how: int, tag: int, multiple: bool) -> None:
        assert tag in self.unsettled, f"406: unknown delivery tag {tag}"
        covered = [t for t in self.unsettled if t <= tag] if multiple else [tag]
        for each in covered:
            self.unsettled.remove(each)
            self.outcome[each] = how


class LedgerMachine(RuleBasedStateMachine):
    """Deliveries, settles, flushes and channel closes in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        self.ledger, self.broker = Ledger(), BrokerChannel()
        self.said: dict[int, int] = {}
        self.last = 0

    @rule(count=st.integers(1, 8), gap=st.integers(0, 2))
    def deliver(self, count: int, gap: int) -> None:
        """Tags grow; some (of no_ack consumers) are not for the ledger."""
        for _ in range(count):
            self.last += 1 + gap
            self.broker.deliver(self.last)
            self.ledger.deliver(self.last)

    @precondition(lambda self: len(self.said) < self.last)
    @rule(data=st.data(), how=HOW)
    def settle(self, data: Any, how: int) -> None:
        tag = data.draw(st.integers(1, self.last))
        known = tag in self.broker.unsettled and tag not in self.said
        assert self.ledger.settle(tag, how) is known
        if known:
            self.said[tag] = how

    @rule()
    def settle_all(self) -> None:
        for tag in self.broker.unsettled:
            if self.ledger.settle(tag, ACK):
                self.said[tag] = ACK

    @rule()
    def flush(self) -> None:
        for how, tag, multiple in self.ledger.flush():
            self.broker.settle(how, tag, multiple)
        assert self.broker.outcome == self.said, "each settled as its owner said, and nobody else"
        assert not self.ledger.pending

    @precondition(lambda self: self.last)
    @rule(data=st.data())
    def ack_multiple(self, data: Any) -> None:
        """The user settles up to a tag by himself: what he said before goes first."""
        self.flush()
        if not self.broker.unsettled:
            return
        tag = data.draw(st.sampled_from(self.broker.unsettled))
        self.broker.settle(ACK, tag, True)
        self.ledger.forget_up_to(tag)
        self.said = dict(self.broker.outcome)

    @rule()
    def close_channel(self) -> None:
        self.ledger.clear()
        assert not self.ledger.flush()
        self.begin()

    @invariant()
    def nothing_is_settled_unsaid(self) -> None:
        assert self.broker.outcome.items() <= self.said.items()

    @invariant()
    def the_ledger_holds_what_the_broker_waits_for(self) -> None:
        assert len(self.ledger) == len(self.broker.unsettled)


def test_merged_settles_mean_what_each_owner_said() -> None:
    given = settings(max_examples=60, stateful_step_count=30)
    run_state_machine_as_test(LedgerMachine, settings=given)  # its rules assert
    assert LedgerMachine().ledger.flush() == []


def test_a_burst_of_acks_leaves_as_one_frame() -> None:
    ledger = Ledger()
    for tag in range(1, 101):
        ledger.deliver(tag)
        assert ledger.settle(tag, ACK)
    assert ledger.flush() == [(ACK, 100, True)]


def test_an_ack_behind_an_open_delivery_is_not_merged_over_it() -> None:
    ledger = Ledger()
    for tag in (1, 2, 3, 4):
        ledger.deliver(tag)
    for tag in (1, 3, 4):
        ledger.settle(tag, ACK)
    assert ledger.flush() == [(ACK, 1, False), (ACK, 3, False), (ACK, 4, False)]
    ledger.settle(2, ACK)
    assert ledger.flush() == [(ACK, 2, False)]


def test_runs_of_different_settles_are_merged_each_for_itself() -> None:
    ledger = Ledger()
    for tag in range(1, 6):
        ledger.deliver(tag)
        ledger.settle(tag, ACK if tag < 3 else GIVE_BACK)
    assert ledger.flush() == [(ACK, 2, True), (GIVE_BACK, 5, True)]


@pytest.mark.parametrize("how", [REQUEUE, REJECT])
def test_what_has_failed_is_said_of_each_message_by_itself(how: int) -> None:
    """HAZARDS row 35: several in one frame are only rejected by a nack, which says that nobody failed."""
    ledger = Ledger()
    for tag in range(1, 6):
        ledger.deliver(tag)
        ledger.settle(tag, ACK if tag == 1 else how)
    assert ledger.flush() == [(ACK, 1, False), *((how, tag, False) for tag in range(2, 6))]


@pytest.mark.parametrize(
    ("settle", "name", "args"),
    [
        ((ACK, 7, False), "basic.ack", [7, False]),
        ((ACK, 7, True), "basic.ack", [7, True]),
        ((REQUEUE, 7, False), "basic.reject", [7, True]),
        ((REJECT, 7, False), "basic.reject", [7, False]),
        ((GIVE_BACK, 7, True), "basic.nack", [7, True, True]),
        ((GIVE_BACK, 7, False), "basic.nack", [7, False, True]),
    ],
)
def test_a_settle_is_encoded_as_amqp_has_it(
    settle: tuple[int, int, bool], name: str, args: list[Any]
) -> None:
    parsed = frames.parse(bytearray(encode(3, settle)))
    assert [(frame.channel, frame.name) for frame in parsed] == [(3, name)]
    assert [bool(a) if i else a for i, a in enumerate(parsed[0].args[: len(args)])] == args
