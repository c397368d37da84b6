"""Tests what waits for confirms, held against a broker that answers for every message once."""

from __future__ import annotations

from typing import Any

import amqp
from amqp.exceptions import MessageNacked
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from greenconsume.amqp.confirms import Confirm, Confirms


class ConfirmsMachine(RuleBasedStateMachine):
    """Publishes, confirms one by one or many at once, returns, waits given up, channels that end."""

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        self.confirms = Confirms()
        self.open: dict[int, Confirm | None] = {}  # what the broker has yet to answer for
        self.abandoned: set[int] = set()
        self.returned: dict[int, BaseException] = {}
        self.last = 0

    @rule(mandatory=st.booleans(), body=st.sampled_from(["x", "y"]))
    def publish(self, mandatory: bool, body: str) -> None:
        self.last += 1
        confirm = Confirm(amqp.Message(body), "e", "k", mandatory)
        assert self.confirms.put(confirm) == self.last
        self.open[self.last] = confirm

    @rule()
    def publish_unconfirmed(self) -> None:
        self.last += 1
        self.confirms.count()
        self.open[self.last] = None

    @rule(data=st.data(), multiple=st.booleans(), nack=st.booleans())
    def answer(self, data: Any, multiple: bool, nack: bool) -> None:
        if not self.open:
            return
        tag = data.draw(st.sampled_from(sorted(self.open)))
        tags = [each for each in self.open if each <= tag] if multiple else [tag]
        self.confirms.answer(tag, multiple, MessageNacked if nack else None)
        for each in tags:
            confirm = self.open.pop(each)
            if confirm is None or each in self.abandoned:
                continue
            assert confirm.ready
            if each in self.returned:
                assert confirm.error is self.returned[each]
            else:
                assert (type(confirm.error) is MessageNacked) is nack

    @rule(data=st.data())
    def come_back(self, data: Any) -> None:
        """A mandatory message that is still open comes back: it, or one with the same body."""
        mandatory = [
            t for t, c in self.open.items() if c and c.mandatory and t not in self.returned
        ]
        if mandatory:
            tag = data.draw(st.sampled_from(mandatory))
            sent = self.open[tag]
            assert sent is not None
            found = self.confirms.find_returned("e", "k", sent.message)
            assert found is not None
            assert found.message.body == sent.message.body
            error = found.returned = ConnectionError()
            self.returned[next(t for t in mandatory if self.open[t] is found)] = error

    @rule(data=st.data())
    def abandon(self, data: Any) -> None:
        tags = [tag for tag, confirm in self.open.items() if confirm is not None]
        if tags:
            tag = data.draw(st.sampled_from(tags))
            confirm = self.open[tag]
            assert confirm is not None
            self.confirms.abandon(tag, confirm)
            if not confirm.mandatory:
                self.abandoned.add(tag)

    @rule()
    def end(self) -> None:
        waiting = {t: c for t, c in self.open.items() if c is not None and t not in self.abandoned}
        assert self.confirms.fail(ConnectionError) is bool(waiting)
        assert all(type(confirm.error) is ConnectionError for confirm in waiting.values())
        self.begin()

    @invariant()
    def only_what_the_broker_has_not_answered_waits(self) -> None:
        waiting = {t: c for t, c in self.open.items() if c is not None and t not in self.abandoned}
        assert len(self.confirms) == len(waiting)
        assert not any(confirm.ready for confirm in waiting.values())


def test_each_message_meets_its_own_answer() -> None:
    given = settings(max_examples=60, stateful_step_count=30)
    run_state_machine_as_test(ConfirmsMachine, settings=given)  # its rules assert
    assert len(ConfirmsMachine().confirms) == 0
