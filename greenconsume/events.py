"""Owns the events of the package: what happens, as frozen values.

Users import them from here, with `subscribe` and `emit` of `hooks`, and the values of `states`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from greenconsume.hooks import Event as Event
from greenconsume.hooks import Hook as Hook
from greenconsume.hooks import emit as emit
from greenconsume.hooks import subscribe as subscribe
from greenconsume.states import ConsumerState as ConsumerState
from greenconsume.states import Outcome as Outcome


@dataclass(frozen=True, slots=True)
class LinkUp(Event):
    """A link to a broker was established. `uri` has no password."""

    uri: str


@dataclass(frozen=True, slots=True)
class LinkDown(Event):
    """A link was lost, with everything on it; `consumers` is how many used it."""

    uri: str
    error: BaseException
    consumers: int


@dataclass(frozen=True, slots=True)
class LinkBlocked(Event):
    """The broker blocked the link's publishers (`blocked`), or let them go on."""

    uri: str
    blocked: bool
    reason: str


@dataclass(frozen=True, slots=True)
class SecretUpdated(Event):
    """A link got a new secret; with an `error`, none was to be had: it is asked for in `delay` seconds."""

    uri: str
    error: BaseException | None
    delay: float


@dataclass(frozen=True, slots=True)
class ConnectFailed(Event):
    """An attempt to connect failed; the next one follows in `delay` seconds.

    `refused`: the broker answered and refused (credentials, virtual host), it is not merely away.
    `raised`: somebody who starts consumers raises the error; there is no further attempt.
    """

    uri: str
    error: BaseException
    attempt: int
    delay: float
    refused: bool
    raised: bool = False


@dataclass(frozen=True, slots=True)
class PollingTransport(Event):
    """A transport without a green one of its own is polled, every `interval` seconds at the most."""

    transport: str
    interval: float


@dataclass(frozen=True, slots=True)
class ConsumerChanged(Event):
    """A consumer went from one state to another."""

    consumer: str
    old: ConsumerState
    new: ConsumerState


@dataclass(frozen=True, slots=True)
class ConsumerRefused(Event):
    """The broker refuses what a consumer asks for, or closed its channel; it asks again in `delay` seconds.

    `stands_by`: it takes over when another consumer is gone. `known`: it was told before, or is raised.
    """

    consumer: str
    error: BaseException
    remedy: str
    attempt: int
    delay: float
    stands_by: bool = False
    known: bool = False


@dataclass(frozen=True, slots=True)
class ConsumerRestarting(Event):
    """A consumer ended and is started again in `delay` seconds; `error` is None if it just returned."""

    consumer: str
    error: BaseException | None
    attempt: int
    delay: float


@dataclass(frozen=True, slots=True)
class ConsumerGivenUp(Event):
    """A consumer ended and is not started again, because its policy says so."""

    consumer: str
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class HandlerFailed(Event):
    """A callback raised; `outcome` is what becomes of its message, in words. Never holds the body.

    Of a batch the tag and the key are those of its first message, and `message_count` is its length.
    """

    consumer: str
    delivery_tag: Any
    routing_key: str
    error: BaseException
    outcome: str
    message_count: int = 1


@dataclass(frozen=True, slots=True)
class HandlerClosedChannel(Event):
    """By a call of a handler's the broker closed the channel that its consumer consumes on.

    All that is unsettled on it goes back, its neighbours' messages too. `error` names the call.
    """

    consumer: str
    delivery_tag: Any
    routing_key: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class BlockingConnectionShared(Event):
    """Handlers use a connection that is not green, as py-amqp's, at the same time; told once a process."""

    consumer: str


@dataclass(frozen=True, slots=True)
class HandlerInterrupted(Event):
    """A running handler was told to end (`killed` False), or killed because it did not."""

    consumer: str
    delivery_tag: Any
    reason: str
    killed: bool


@dataclass(frozen=True, slots=True)
class ConsumerDrained(Event):
    """A consumer stopped: what became of the messages that it held, as `Outcome` has it."""

    consumer: str
    finished: int
    given_back: int
    cancelled: int
    killed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PrefetchTooSmall(Event):
    """A consumer's prefetch is below its concurrency: handlers will stand idle, or batches not fill."""

    consumer: str
    prefetch: int
    concurrency: int
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class MessageRenewed(Event):
    """A message that no handler settled was written to its queue again, before that would drop it.

    It is the `count`th time; or it was put into `buried_in`, as it came back too often.
    """

    consumer: str
    queue: str
    count: int
    buried_in: str


@dataclass(frozen=True, slots=True)
class KillSwitchTripped(Event):
    """A consumer stops consuming for `pause` seconds: of its last `count` messages, `failed_count` failed."""

    consumer: str
    failed_count: int
    count: int
    pause: float


@dataclass(frozen=True, slots=True)
class KillSwitchReset(Event):
    """A consumer whose kill switch had tripped `seconds` ago consumes again: a message was handled."""

    consumer: str
    seconds: float


@dataclass(frozen=True, slots=True)
class UnsettledTooLong(Event):
    """A message is unsettled for `seconds`; at `deadline` the broker closes its channel and takes it back."""

    consumer: str
    delivery_tag: Any
    seconds: float
    deadline: float


@dataclass(frozen=True, slots=True)
class HubBlocked(Event):
    """For `seconds` no greenlet has had a turn, because this code runs without ever waiting.

    `consumer` is empty where it is no handler. Emitted in a native thread: a hook must not switch.
    """

    consumer: str
    delivery_tag: Any
    seconds: float
    stack: str


@dataclass(frozen=True, slots=True)
class IntakeChanged(Event):
    """Consumers take another `share` of their prefetch, as the hub is `lag` seconds late."""

    share: float
    lag: float


@dataclass(frozen=True, slots=True)
class StaleSettle(Event):
    """A message was settled after its channel was gone; the broker has it back already."""

    delivery_tag: Any
    count: int


@dataclass(frozen=True, slots=True)
class PublishFailed(Event):
    """Messages that nobody waited for were not published: how many in one hub turn, and the first's error."""

    uri: str
    count: int
    error: BaseException


@dataclass(frozen=True, slots=True)
class GarbageFrozen(Event):
    """A runtime has taken what exists out of the garbage collector's sight, as `freeze_gc` has it.

    Attributes:
        count: How many objects.
        seconds: For how long that held up everything.
    """

    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DrainStarted(Event):
    """A runtime begins to stop its consumers."""

    consumers: int
    reason: str
    timeout: float


@dataclass(frozen=True, slots=True)
class DrainEscalated(Event):
    """A drain went one rung further down the ladder: `rung` says which, `reason` why."""

    rung: str
    consumers: int
    reason: str


@dataclass(frozen=True, slots=True)
class DrainFinished(Event):
    """A runtime has stopped: how many consumers stopped by themselves, and how many were killed.

    Of all their handlers and messages: as `Outcome` has it.
    """

    drained: int
    killed: int
    finished_handlers: int
    given_back: int
    cancelled_handlers: int
    killed_handlers: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ConsumersScaled(Event):
    """A runtime has, or will have, `replicas` consumers of what was spawned as `group`; it had `before`."""

    group: str
    before: int
    replicas: int


@dataclass(frozen=True, slots=True)
class GreenletsDumped(Event):
    """Somebody asked, by SIGUSR1, for the tree of greenlets: it is `tree`."""

    tree: str


@dataclass(frozen=True, slots=True)
class AdminListening(Event):
    """The admin answers at `address`."""

    address: str


@dataclass(frozen=True, slots=True)
class AdminAsked(Event):
    """An operator gave a command: `command` and what it was about."""

    command: str
    subject: str


@dataclass(frozen=True, slots=True)
class AdminRefused(Event):
    """The admin refused requests: the last one's method, path and reason, and how many since it told last."""

    method: str
    path: str
    reason: str
    count: int
