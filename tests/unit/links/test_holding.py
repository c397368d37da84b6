"""Tests what a connection without a green link tells of what it holds."""

from __future__ import annotations

from unittest.mock import Mock

from kombu import Connection
from kombu.transport import memory, virtual

from greenconsume.links.holding import holding_of


class Kombus(memory.Transport):
    """kombu's own, which keeps settled tags until it next looks."""


def test_what_kombus_transports_hold_is_told_without_what_is_settled():
    with Connection(transport=Kombus) as connection:
        channel, other = connection.channel(), connection.channel()
        channel.basic_qos(0, 4, False)
        other.basic_qos(0, 6, False)
        holding = holding_of(connection)
        assert (holding.unsettled_count, holding.prefetch_count, holding.backlog) == (0, 10, 0)
        for tag in (1, 2, 3):
            channel.qos.append(Mock(spec=virtual.Message), tag)
        channel.basic_ack(2)
        assert holding.unsettled_count == 2
        other.basic_qos(0, 0, False)
        assert holding.prefetch_count == 0
        assert holding.oldest_unsettled_at is None


def test_what_is_not_connected_holds_nothing_that_could_be_told():
    assert holding_of(Connection(transport=Kombus)) is None
    assert holding_of(object()) is None
