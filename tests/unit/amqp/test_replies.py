"""The replies of a channel, held against a broker that answers calls in their order."""

from __future__ import annotations

from typing import Any

from amqp import spec
from gevent.event import Event
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from greenconsume.amqp.replies import Replies, Reply

CALLS = {
    "declare": (spec.Queue.DeclareOk,),
    "qos": (spec.Basic.QosOk,),
    "get": (spec.Basic.GetOk, spec.Basic.GetEmpty),
}


class RepliesMachine(RuleBasedStateMachine):
    """Calls, replies, callers who give up, and channels that end, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.replies = Replies()
        self.open: list[
            tuple[str, int, Reply, bool]
        ] = []  # kind, number, reply, whether a caller waits
        self.number = 0

    @rule(kind=st.sampled_from(sorted(CALLS)), waits=st.booleans())
    def call(self, kind: str, waits: bool) -> None:
        self.number += 1
        reply = Reply(CALLS[kind], None, Event() if waits else None)
        self.open.append((kind, self.number, self.replies.expect(reply), waits))

    @rule(data=st.data())
    def answer(self, data: Any) -> None:
        """The broker answers the oldest call, and no other."""
        if self.open:
            kind, number, reply, waits = self.open.pop(0)
            sig = data.draw(st.sampled_from(CALLS[kind]))
            self.replies.answer(sig, [number])
            assert (reply.sig, reply.args) == (sig, [number])
            assert reply.event is None or (waits and reply.event.is_set())

    @rule()
    def answer_what_nobody_asked(self) -> None:
        self.replies.answer(spec.Queue.PurgeOk, [0])

    @rule(data=st.data(), with_undo=st.booleans())
    def give_up(self, data: Any, with_undo: bool) -> None:
        """A caller who gave up keeps its place: its reply must meet nobody else."""
        waiting = [at for at, each in enumerate(self.open) if each[3]]
        if waiting:
            at = data.draw(st.sampled_from(waiting))
            kind, number, reply, _ = self.open[at]
            reply.give_up((lambda *_: None) if with_undo else None)
            self.open[at] = (kind, number, reply, False)

    @rule()
    def end(self) -> None:
        ended, self.open = self.open, []
        assert self.replies.fail(ConnectionError) is any(waits for *_, waits in ended)
        errors = [reply.error for _, _, reply, _ in ended]
        assert len({id(error) for error in errors}) == len(ended), "each has an error of its own"

    @invariant()
    def only_what_is_open_waits(self) -> None:
        assert len(self.replies) == len(self.open)
        assert not any(reply.is_over for _, _, reply, _ in self.open)


def test_each_call_meets_its_own_reply() -> None:
    given = settings(max_examples=60, stateful_step_count=30)
    run_state_machine_as_test(RepliesMachine, settings=given)  # its rules assert
    assert len(RepliesMachine().replies) == 0


def test_a_reply_that_comes_after_its_caller_gave_up_is_undone() -> None:
    replies, undone = Replies(), []
    reply = replies.expect(Reply(CALLS["qos"], None, Event()))
    reply.give_up(lambda *args: undone.append(args))
    replies.answer(spec.Basic.QosOk, [1])
    assert undone == [(spec.Basic.QosOk, 1)]


def test_a_reply_that_came_before_its_caller_gave_up_is_undone() -> None:
    replies, undone = Replies(), []
    reply = replies.expect(Reply(CALLS["qos"], None, Event()))
    replies.answer(spec.Basic.QosOk, [1])
    reply.give_up(lambda *args: undone.append(args))
    assert undone == [(spec.Basic.QosOk, 1)]
