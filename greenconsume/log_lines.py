"""Owns the words of the log: what is said of each event, on which logger and at which level.

It must never show a message's body or a password, nor log anything itself. Called by `logs`.
"""

from __future__ import annotations

import logging
import re
from functools import singledispatch
from typing import NamedTuple

from greenconsume.errors import LinkClosedError
from greenconsume.events import (
    AdminAsked,
    AdminListening,
    AdminRefused,
    BlockingConnectionShared,
    ConnectFailed,
    ConsumerChanged,
    ConsumerDrained,
    ConsumerGivenUp,
    ConsumerRefused,
    ConsumerRestarting,
    ConsumersScaled,
    ConsumerState,
    DrainEscalated,
    DrainFinished,
    DrainStarted,
    Event,
    GarbageFrozen,
    GreenletsDumped,
    HandlerClosedChannel,
    HandlerFailed,
    HandlerInterrupted,
    HubBlocked,
    IntakeChanged,
    KillSwitchReset,
    KillSwitchTripped,
    LinkBlocked,
    LinkDown,
    LinkUp,
    MessageRenewed,
    PollingTransport,
    PrefetchTooSmall,
    PublishFailed,
    SecretUpdated,
    StaleSettle,
    UnsettledTooLong,
)

_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s]*@")


class Line(NamedTuple):
    """The log record of an event: its logger, level and words, and the traceback or stack that is shown."""

    module: str
    level: int
    text: str
    args: tuple[object, ...] = ()
    error: BaseException | None = None
    stack: str | None = None


@singledispatch
def describe(event: Event) -> Line:
    """Say what the log says of `event`; one that this package does not know is named at DEBUG."""
    return Line("events", logging.DEBUG, "%s", (type(event).__name__,))


@describe.register
def _(event: LinkUp) -> Line:
    return Line("links", logging.INFO, "link to %s is up", (redact(event.uri),))


@describe.register
def _(event: LinkDown) -> Line:
    args = (redact(event.uri), event.consumers, words(event.error))
    return Line("links", logging.WARNING, "link to %s is lost, with %d consumers: %s", args)


@describe.register
def _(event: LinkBlocked) -> Line:
    if event.blocked:
        args = (redact(event.uri), event.reason)
        return Line("links", logging.WARNING, "link to %s: the broker blocks publishing: %s", args)
    text = "link to %s: the broker lets publish again"
    return Line("links", logging.INFO, text, (redact(event.uri),))


@describe.register
def _(event: SecretUpdated) -> Line:
    if event.error is None:
        return Line("links", logging.DEBUG, "link to %s: has a new secret", (redact(event.uri),))
    text = "link to %s: no new secret is to be had: %s (asked again in %.1f s)"
    args = (redact(event.uri), words(event.error), event.delay)
    return Line("links", logging.WARNING, text, args)


@describe.register
def _(event: ConnectFailed) -> Line:
    what = "%s refused the connection" if event.refused else "cannot connect to %s"
    args = (redact(event.uri), words(event.error))
    if event.raised:
        return Line("links", logging.DEBUG, what + ": %s (raised to the caller)", args)
    text = what + ": %s (attempt %d, the next in %.1f s)"
    return Line("links", logging.WARNING, text, (*args, event.attempt, event.delay))


@describe.register
def _(event: PollingTransport) -> Line:
    text = "transport %s has no green one of its own: it is polled, every %.1f s at the most"
    return Line("transports", logging.INFO, text, (event.transport, event.interval))


@describe.register
def _(event: ConsumerChanged) -> Line:
    args = (event.consumer, event.new, event.old)
    if event.new is ConsumerState.IDLE:
        text = "consumer %s is %s: it cancelled itself, and gets nothing until it consumes again"
        return Line("runtime", logging.INFO, text, args[:2])
    return Line("runtime", logging.DEBUG, "consumer %s is %s, was %s", args)


@describe.register
def _(event: ConsumerRefused) -> Line:
    text = "consumer %s: %s%s (attempt %d, the next in %.1f s)"
    remedy = f": {event.remedy}" if event.remedy else ""
    args = (event.consumer, words(event.error), remedy, event.attempt, event.delay)
    level = logging.INFO if event.stands_by else logging.WARNING
    return Line("consuming", logging.DEBUG if event.known else level, text, args)


@describe.register
def _(event: ConsumerRestarting) -> Line:
    text = "consumer %s %s: restart %d in %.1f s"
    how = "returned" if event.error is None else f"failed with {words(event.error)}"
    args = (event.consumer, how, event.attempt, event.delay)
    # A traceback would tell where the broker's answer was read, and no more than the line does.
    trace = None if isinstance(event.error, LinkClosedError) else event.error
    return Line("runtime", logging.WARNING, text, args, trace)


@describe.register
def _(event: ConsumerGivenUp) -> Line:
    text = "consumer %s is given up: %s"
    how = "it returned too often" if event.error is None else words(event.error)
    return Line("runtime", logging.ERROR, text, (event.consumer, how), event.error)


@describe.register
def _(event: HandlerFailed) -> Line:
    text = "consumer %s failed on %s %s (routing key %r) with %s: %s"
    count = event.message_count
    args = (
        event.consumer,
        "message" if count == 1 else f"a batch of {count} messages that begins with",
        event.delivery_tag,
        event.routing_key,
        words(event.error),
        event.outcome,
    )
    return Line("handling", logging.ERROR, text, args, event.error)


@describe.register
def _(event: BlockingConnectionShared) -> Line:
    text = (
        "handlers of consumer %s use a blocking connection at the same time, which only one greenlet may: "
        "open it after greenconsume.patch_all(), or in a program that `greenconsume run` starts, and it is "
        "green"
    )
    return Line("handling", logging.WARNING, text, (event.consumer,))


@describe.register
def _(event: HandlerClosedChannel) -> Line:
    text = (
        "consumer %s: the handler of message %s (routing key %r) had the broker close the channel that it "
        "consumes on (%s): all that is unsettled there goes back; call it on a channel of its own, "
        "message.channel.connection.client.channel()"
    )
    args = (event.consumer, event.delivery_tag, event.routing_key, words(event.error))
    return Line("handling", logging.WARNING, text, args)


@describe.register
def _(event: KillSwitchTripped) -> Line:
    text = "kill switch of %s: %d of %d messages failed; it consumes nothing for %.1f s, then one"
    args = (event.consumer, event.failed_count, event.count, event.pause)
    return Line("handling", logging.WARNING, text, args)


@describe.register
def _(event: KillSwitchReset) -> Line:
    text = "kill switch of %s: a message was handled after %.1f s; it consumes again"
    return Line("handling", logging.INFO, text, (event.consumer, event.seconds))


@describe.register
def _(event: UnsettledTooLong) -> Line:
    text = (
        "consumer %s: message %s has been unsettled for %.0f s; at %.0f s the broker closes the channel, "
        "and delivers everything on it again"
    )
    args = (event.consumer, event.delivery_tag, event.seconds, event.deadline)
    return Line("handling", logging.WARNING, text, args)


@describe.register
def _(event: HubBlocked) -> Line:
    text = (
        "the whole process has been blocked for %.1f s by %s: it computes, or waits, without gevent"
    )
    who = "code outside of handlers"
    if event.consumer:
        who = f"consumer {event.consumer}, message {event.delivery_tag}"
    return Line("runtime", logging.WARNING, text, (event.seconds, who), stack=event.stack)


@describe.register
def _(event: IntakeChanged) -> Line:
    if event.share < 1.0:
        text = (
            "the hub is %.2f s late, as handlers compute: consumers take %.3g %% of their prefetch"
        )
        return Line("runtime", logging.WARNING, text, (event.lag, 100 * event.share))
    return Line(
        "runtime", logging.INFO, "the hub is in time: consumers take all of their prefetch", ()
    )


@describe.register
def _(event: StaleSettle) -> Line:
    text = "message %s was settled after its channel was gone: the broker has it back (%d so far)"
    return Line("handling", logging.DEBUG, text, (event.delivery_tag, event.count))


@describe.register
def _(event: MessageRenewed) -> Line:
    if event.buried_in:
        text = "consumer %s: a message of %s came back again and again, never settled: put into %s"
        args: tuple[object, ...] = (event.consumer, event.queue, event.buried_in)
        return Line("handling", logging.ERROR, text, args)
    text = "consumer %s: a message of %s came back too often: written to its queue again (time %d)"
    return Line("handling", logging.DEBUG, text, (event.consumer, event.queue, event.count))


@describe.register
def _(event: PublishFailed) -> Line:
    text = "%d messages for %s that nobody waited for were not published; the first: %s"
    args = (event.count, redact(event.uri), words(event.error))
    return Line("publishing", logging.ERROR, text, args)


@describe.register
def _(event: GarbageFrozen) -> Line:
    text = "all consume: %d objects are exempt from garbage collection from now on (%.0f ms)"
    return Line("runtime", logging.INFO, text, (event.count, event.seconds * 1000))


@describe.register
def _(event: DrainStarted) -> Line:
    text = "stopping %d consumers within %.1f s (%s)"
    return Line("runtime", logging.INFO, text, (event.consumers, event.timeout, event.reason))


@describe.register
def _(event: DrainEscalated) -> Line:
    text = "drain: %s; consumers still running: %d (%s)"
    return Line("runtime", logging.WARNING, text, (event.rung, event.consumers, event.reason))


@describe.register
def _(event: DrainFinished) -> Line:
    abandoned = event.killed or event.cancelled_handlers or event.killed_handlers
    level = logging.WARNING if abandoned else logging.INFO
    text = (
        "stopped in %.2f s: consumers: %d drained, %d killed; "
        "handlers: %d finished, %d cancelled, %d killed; messages given back: %d"
    )
    handlers = (event.finished_handlers, event.cancelled_handlers, event.killed_handlers)
    args = (event.seconds, event.drained, event.killed, *handlers, event.given_back)
    return Line("runtime", level, text, args)


@describe.register
def _(event: HandlerInterrupted) -> Line:
    text = "consumer %s: %s the handler of message %s: %s"
    what = "killed" if event.killed else "interrupted"
    args = (event.consumer, what, event.delivery_tag, event.reason)
    # A drain sums up those that it interrupts.
    level = logging.WARNING if event.killed else logging.DEBUG
    return Line("handling", level, text, args)


@describe.register
def _(event: ConsumerDrained) -> Line:
    level = logging.WARNING if event.cancelled or event.killed else logging.DEBUG
    text = "consumer %s drained: handlers: %d finished, %d cancelled, %d killed; messages given back: %d"
    numbers = (event.finished, event.cancelled, event.killed, event.given_back)
    return Line("handling", level, text, (event.consumer, *numbers))


@describe.register
def _(event: PrefetchTooSmall) -> Line:
    why = f"leaves handlers idle: concurrency is {event.concurrency}"
    if event.batch_size is not None and event.prefetch < event.batch_size:
        why = f"never fills a batch of {event.batch_size}: each is handed over by its timeout"
    elif event.batch_size is not None:
        why += f", each with a batch of {event.batch_size}"
    text = "consumer %s: a prefetch of %d %s; set none, or a larger one"
    return Line("handling", logging.WARNING, text, (event.consumer, event.prefetch, why))


@describe.register
def _(event: ConsumersScaled) -> Line:
    args = (event.group, event.before, event.replicas)
    return Line("runtime", logging.INFO, "%s is scaled from %d consumers to %d", args)


@describe.register
def _(event: GreenletsDumped) -> Line:
    return Line("runtime", logging.WARNING, "all greenlets, as asked by SIGUSR1:", stack=event.tree)


@describe.register
def _(event: AdminListening) -> Line:
    return Line("admin", logging.INFO, "the admin listens on %s", (event.address,))


@describe.register
def _(event: AdminAsked) -> Line:
    args = (event.command, event.subject)
    return Line("admin", logging.INFO, "the admin was asked to %s %s", args)


@describe.register
def _(event: AdminRefused) -> Line:
    text = "the admin refused %d requests; the last, %s %r: %s"
    args = (event.count, event.method, event.path, event.reason)
    return Line("admin", logging.WARNING, text, args)


def redact(text: str) -> str:
    """Return `text` with the password of every URL in it masked."""
    return _PASSWORD.sub(r"\1**@", text)


def words(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(redact(str(error)).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
