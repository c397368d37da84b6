"""Tests what a link sends next: every channel's frames in their order, and no channel for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from greenconsume.amqp.send_queue import SLICE, Outgoing
from tests.frames import parse, raw_frame

LARGE = SLICE // 2 + 1


def frame(channel, size=1, mark=0):
    return raw_frame(3, channel, bytes([mark]) * size)


def frames_in(data):
    buffer = bytearray(data)
    found = [(each.channel, len(each.payload), each.payload[0]) for each in parse(buffer)]
    assert not buffer, "a frame was cut"
    return found


def drained(outgoing):
    while outgoing:
        yield frames_in(outgoing.take())


puts = st.lists(
    st.tuples(
        st.integers(1, 4),  # the channel
        st.lists(st.sampled_from([1, 1, 100, LARGE]), min_size=1, max_size=6),
        st.booleans(),  # whether something is taken after it
    ),
    max_size=12,
)


@given(puts)
def test_each_channel_keeps_its_order_and_no_frame_is_cut_or_lost(given_puts):
    outgoing, taken, put = Outgoing(), [], {}
    mark = 0
    for channel, sizes, take in given_puts:
        batch = []
        for size in sizes:
            mark = (mark + 1) % 256
            batch.append(frame(channel, size, mark))
            put.setdefault(channel, []).append((channel, size, mark))
        outgoing.put(batch)
        if take:
            taken += frames_in(outgoing.take())
    for frames in drained(outgoing):
        taken += frames
    for channel, expected in put.items():
        assert [each for each in taken if each[0] == channel] == expected
    assert len(taken) == sum(map(len, put.values()))
    assert (outgoing.size, bool(outgoing), outgoing.take()) == (0, False, b"")


def test_small_ones_go_at_once_and_together():
    outgoing = Outgoing()
    outgoing.put([frame(1), frame(1)])
    outgoing.put([frame(2)])
    assert outgoing.size == 3 * 9
    assert [channel for channel, _, _ in frames_in(outgoing.take())] == [1, 1, 2]


def test_a_large_body_goes_in_slices_with_others_in_between():
    outgoing = Outgoing()
    outgoing.put([frame(1, LARGE) for _ in range(6)])
    sent = []
    for number in range(3):
        outgoing.put([frame(2, mark=number)])
        sent += [channel for channel, _, _ in frames_in(outgoing.take())]
    assert sent == [2, 1, 1] * 3
    assert not outgoing


def test_large_bodies_take_turns():
    outgoing = Outgoing()
    for channel in (1, 2, 3):
        outgoing.put([frame(channel, LARGE) for _ in range(4)])
    assert [frames[0][0] for frames in drained(outgoing)] == [1, 2, 3] * 2


def test_what_follows_a_large_body_on_its_channel_stays_behind_it():
    outgoing = Outgoing()
    outgoing.put([frame(1, LARGE) for _ in range(3)])
    outgoing.put([frame(1, mark=9)])
    assert [size for frames in drained(outgoing) for _, size, _ in frames] == [LARGE] * 3 + [1]


def test_it_tells_which_channels_have_a_large_body_and_when_it_is_gone():
    outgoing = Outgoing()
    assert not outgoing.holds_large(None)
    outgoing.put([frame(7, LARGE) for _ in range(3)])
    assert (outgoing.holds_large(7), outgoing.holds_large(None), outgoing.holds_large(1)) == (
        True,
        True,
        False,
    )
    outgoing.take()
    assert (outgoing.take_relief(), outgoing.holds_large(7)) == (False, True)
    outgoing.take()
    assert (outgoing.take_relief(), outgoing.holds_large(7)) == (True, False)


def test_cleared_it_holds_nothing():
    outgoing = Outgoing()
    outgoing.put([frame(1, LARGE) for _ in range(3)])
    outgoing.put([frame(2)])
    outgoing.clear()
    assert (outgoing.size, bool(outgoing), outgoing.holds_large(None)) == (0, False, False)
