"""Owns who is told why the broker closed a link: the one publish on its way, if it was that.

Everybody else is told of a lost link, which trying again mends; a message that the broker closes its
connection for would close the next one, too. Does no I/O. Called by `link` as it ends, before all others.
"""

from __future__ import annotations

from collections.abc import Mapping

from amqp import spec

from greenconsume.amqp.confirms import Confirms

#: What RabbitMQ says of `immediate`, and of nothing else that is published.
_NOT_IMPLEMENTED = 540


def tell_culprit(error: BaseException, channels: Mapping[int, object]) -> None:
    """Answer the publish that the broker closed the link for with the broker's error. Never switches.

    Only where it is the only one whose confirm is awaited on the link: of several nothing can be told.
    """
    if getattr(error, "method_sig", None) != spec.Basic.Publish:
        return
    found = (getattr(channel, "unconfirmed", None) for channel in channels.values())
    waiting = [confirms for confirms in found if isinstance(confirms, Confirms) and len(confirms)]
    if len(waiting) != 1 or len(waiting[0]) != 1:
        return
    if getattr(error, "reply_code", None) == _NOT_IMPLEMENTED and not waiting[0].holds_immediate:
        return  # somebody else's, who awaits no confirm
    waiting[0].fail(lambda: error)
