"""Tests who is told to have lost a link for all, by what was pending when the broker closed it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import amqp
import pytest

from greenconsume.amqp.blame import MAX_SUSPECTS, Part, Verdict, verdicts

DECLARE = (40, 10)
CLOSED = amqp.AMQPNotImplementedError("no", method_sig=DECLARE)
OF_NO_METHOD = amqp.InternalError("no", method_sig=(0, 0))


@dataclass(frozen=True)
class Session:
    name: int
    calls: bool = False
    has_published: bool = False

    def awaits(self, method: tuple[int, int]) -> bool:
        return self.calls and method == DECLARE


def test_the_one_whose_call_was_pending_is_guilty():
    sessions = [Session(1), Session(2, calls=True), Session(3)]
    assert verdicts(CLOSED, sessions) == {sessions[1]: Part(Verdict.GUILTY)}


def test_a_few_that_may_have_done_it_are_suspects_each_apart_from_all():
    sessions = [Session(each) for each in range(MAX_SUSPECTS)]
    assert verdicts(OF_NO_METHOD, sessions) == dict.fromkeys(sessions, Part(Verdict.SUSPECT))


def test_many_suspects_are_divided_so_that_three_losses_find_one_of_thousands():
    sessions = [Session(each) for each in range(5000)]
    losses = 0
    while True:
        parts = verdicts(OF_NO_METHOD, sessions)
        losses += 1
        part = parts[sessions[-1]]
        if part.verdict is Verdict.GUILTY or not part.group:
            break
        assert len(Counter(each.group for each in parts.values())) == MAX_SUSPECTS
        sessions = [each for each in sessions if parts[each].group == part.group]
    assert losses == 3


@pytest.mark.parametrize("kind", [amqp.UnexpectedFrame, amqp.FrameSyntaxError, amqp.NotAllowed])
def test_whatever_the_broker_names_a_method_for_is_an_accusation(kind):
    session = Session(1, calls=True)
    error = kind("no", method_sig=DECLARE)
    assert verdicts(error, [session, Session(2)]) == {session: Part(Verdict.GUILTY)}


@pytest.mark.parametrize(
    "error", [amqp.ConnectionForced("stop", method_sig=(0, 0)), OSError(), amqp.InternalError("x")]
)
def test_nobody_is_accused_of_a_link_that_merely_broke(error):
    assert verdicts(error, [Session(1, calls=True)]) == {}
