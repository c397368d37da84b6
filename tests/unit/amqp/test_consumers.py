"""The consumers of a channel, held against what the broker was told, and told."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from greenconsume.amqp.consumers import ChannelConsumer, Consumers

TAG = st.sampled_from("abc")


class ConsumersMachine(RuleBasedStateMachine):
    """Consumers that are started, stopped, announced to end, and channels that end, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.consumers = Consumers()
        self.running: dict[str, ChannelConsumer] = {}
        self.settled: dict[str, bool] = {}  # whether the last consumer of a tag needed no settle
        self.announced: set[str] = set()

    @rule(tag=TAG, no_ack=st.booleans())
    def start(self, tag: str, no_ack: bool) -> None:
        consumer = ChannelConsumer(print, no_ack, None, None)
        self.consumers.start(tag, consumer)
        self.running[tag], self.settled[tag] = consumer, no_ack
        self.announced.discard(tag)

    @rule(tag=TAG)
    def stop(self, tag: str) -> None:
        assert self.consumers.stop(tag) is self.running.pop(tag, None)

    @rule()
    def announce(self) -> None:
        assert self.consumers.announce() == list(self.consumers.running)
        self.announced |= set(self.running)

    @rule()
    def end(self) -> None:
        self.consumers.clear()
        self.running.clear()
        self.announced.clear()

    @invariant()
    def it_knows_what_the_broker_knows(self) -> None:
        consumers = self.consumers
        assert consumers.running == self.running
        assert consumers.has_running is bool(self.running)
        for tag in "abc":
            assert consumers.was_announced(tag) is (tag in self.announced)
            assert consumers.needs_settle(tag) is not self.settled.get(tag, False)


def test_consumers_are_what_the_broker_was_told() -> None:
    given = settings(max_examples=60, stateful_step_count=30)
    run_state_machine_as_test(ConsumersMachine, settings=given)  # its rules assert
    assert not ConsumersMachine().consumers.has_running


def test_what_a_stopped_consumer_has_in_hand_still_needs_no_settle() -> None:
    consumers = Consumers()
    consumers.start("t", ChannelConsumer(print, True, None, None))
    consumers.stop("t")
    consumers.clear()
    assert not consumers.needs_settle("t")
