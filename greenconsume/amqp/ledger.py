"""Owns what a channel was delivered and has not yet told the broker about; merges what is told.

Does no I/O and knows no channel, so that a model can be held against it. A merged frame (`multiple`)
covers only deliveries that were each settled, in the same way: nobody's message is settled for him.

What goes back says why (law 11): a message that nobody has failed on goes by `basic.nack`, several in one
frame; a failed one by `basic.reject`, each in a frame of its own, as there is none for several. From
RabbitMQ 4.3 on a quorum queue counts only the second towards its delivery limit.
"""

from __future__ import annotations

from struct import Struct
from time import monotonic

#: Handled; failed, to be delivered again; failed for good; not failed, to be delivered again.
ACK, REQUEUE, REJECT, GIVE_BACK = range(4)
_MERGED = (ACK, GIVE_BACK)

#: (how, delivery tag, whether all before it are meant too)
Settle = tuple[int, int, bool]

_frame = Struct(">BHIHHQBB")
_BASIC, _ACK, _REJECT, _NACK = 60, 80, 90, 120
_REQUEUED = 2  # the second bit of a Nack
_END = 0xCE


# How settles are merged.
#
# AMQP has one bit for it: `multiple`, "this delivery and all before it that are not settled". The broker
# reads it against what it holds unsettled. So it may be set only where every delivery up to the tag was
# settled, in the same way, by its own owner: else one handler's ack would settle what another still handles.
#
# `_unsettled` holds the deliveries in the order of their tags, and so in the broker's. `flush` walks it from
# its start while each delivery has a settle. That prefix can be told in runs: a run of acks is one Ack of its
# last tag, a run of what is given back one Nack; rejects have a frame each. Where the way changes a new run
# begins, whose `multiple` then covers itself alone, because the run before it has been told and is unsettled
# no more. So the frames must be sent in this order. The walk ends at the first delivery that is still open.
# What was settled behind it is told one by one: any `multiple` there would cover the open one.
#
# Deliveries of `no_ack` consumers take tags, too, but the broker counts them as settled at once: they are
# in neither set, and a `multiple` that passes over their tags means nothing for them.
#
# The usual case, everything settled in one way, costs a walk, one frame, and no deletion of single tags. A
# slow handler at the front costs a frame for each message behind it, as without any merging, and no more.


class Ledger:
    """The unsettled deliveries of one channel in the order of their tags, and the settles to be sent."""

    __slots__ = ("_settled", "_unsettled")

    def __init__(self) -> None:
        self._unsettled: dict[int, float] = {}  # tag -> when it came
        self._settled: dict[int, int] = {}

    def deliver(self, tag: int) -> None:
        """Note a delivery that wants to be settled; tags only grow."""
        self._unsettled[tag] = monotonic()

    @property
    def oldest(self) -> tuple[int, float] | None:
        """The tag of the delivery that has been unsettled for longest, and when it came."""
        return next(iter(self._unsettled.items()), None)

    def settle(self, tag: int, how: int) -> bool:
        """Note that a delivery is settled; return False if it was not delivered here, or settled before.

        A settle is sent by the next `flush`, together with its neighbours.
        """
        if tag not in self._unsettled or tag in self._settled:
            return False
        self._settled[tag] = how
        return True

    def forget_up_to(self, tag: int) -> None:
        """Note that the user settled everything up to `tag` (0: all there is) by himself."""
        for each in [t for t in self._unsettled if t <= tag or not tag]:
            del self._unsettled[each]
            self._settled.pop(each, None)

    @property
    def pending(self) -> bool:
        """True if `flush` has something to send."""
        return bool(self._settled)

    def flush(self) -> list[Settle]:
        """Return what to send for everything that was settled since the last time, merged."""
        settled, self._settled = self._settled, {}
        prefix: list[int] = []
        sent: list[Settle] = []
        for tag in self._unsettled:
            how = settled.pop(tag, None)
            if how is None:
                break  # from here on nothing can be merged: this one is still open
            prefix.append(tag)
            if sent and sent[-1][0] == how and how in _MERGED:
                sent[-1] = (how, tag, True)
            else:
                sent.append((how, tag, False))
        sent += [(how, tag, False) for tag, how in sorted(settled.items())]
        self._drop(prefix, settled)
        return sent

    def _drop(self, prefix: list[int], singles: dict[int, int]) -> None:
        if len(prefix) == len(self._unsettled):
            self._unsettled.clear()
        else:
            for tag in (*prefix, *singles):
                del self._unsettled[tag]

    def clear(self) -> None:
        """Forget everything: the channel's life is over, and the broker has it all again."""
        self._unsettled.clear()
        self._settled.clear()

    def __len__(self) -> int:
        return len(self._unsettled)


def encode(channel: int, settle: Settle) -> bytes:
    """Return the frame of one settle: Ack, Nack for what is given back, or Reject for what has failed."""
    how, tag, multiple = settle
    if how == ACK:
        method, bits = _ACK, int(multiple)
    elif how == GIVE_BACK:
        method, bits = _NACK, int(multiple) | _REQUEUED
    else:
        method, bits = _REJECT, int(how == REQUEUE)
    return _frame.pack(1, channel, 13, _BASIC, method, tag, bits, _END)
