"""Owns every exception of the package; imports nothing of it and is imported by all of it.

What comes from kombu, amqp or redis is translated where it crosses into this package, `from exc`.
"""

from __future__ import annotations


class GreenconsumeError(Exception):
    """The root of every exception that greenconsume raises."""


class NotPatchedError(GreenconsumeError):
    """The process is not patched by gevent, or not far enough; the message names what and the remedy."""


class UnsupportedTransportError(GreenconsumeError):
    """The broker URL names a transport that is unknown, or that blocks the whole hub."""


class EventLoopError(UnsupportedTransportError):
    """kombu's asynchronous hub was to read a green transport, which has a reader of its own."""

    def __init__(self) -> None:
        super().__init__(
            "kombu's asynchronous hub cannot read a green transport, whose own greenlet reads it: drain the "
            "connection (`drain_events`, a mixin's `run`), or start Celery with `-P gevent`"
        )


class InvalidConsumerError(GreenconsumeError, TypeError):
    """The object that was to be spawned is no consumer: it has no `get_consumers`, or no connection."""


class InvalidOptionsError(InvalidConsumerError, ValueError):
    """An option of a consumer makes no sense, or two of them together.

    Attributes:
        field: The option.
        value: What it was said to be.
        allowed: What it may be, in words.
    """

    def __init__(self, field: str, value: object, allowed: str, problem: str = "") -> None:
        super().__init__(problem or f"{field} must be {allowed}, not {value!r}")
        self.field = field
        self.value = value
        self.allowed = allowed


class BrokerRefusedError(GreenconsumeError):
    """The broker answered and refused: wrong credentials, no such virtual host, no permission.

    Attributes:
        uri: The broker's address, without its password.
    """

    def __init__(self, message: str, uri: str = "") -> None:
        super().__init__(message)
        self.uri = uri


class ConsumerRefusedError(GreenconsumeError):
    """The broker refuses what a consumer declares, and no waiting mends it.

    Attributes:
        consumer: The consumer's name.
    """

    def __init__(self, message: str, consumer: str) -> None:
        super().__init__(message)
        self.consumer = consumer


class LinkClosedError(GreenconsumeError):
    """The broker closed a connection because of what one consumer did; `__cause__` is the broker's error.

    That consumer connects over a link of its own from then on, until it has consumed well for a while.

    Attributes:
        consumer: The consumer's name.
    """

    def __init__(self, consumer: str, error: BaseException, remedy: str) -> None:
        told = f"{error}: {remedy}" if remedy else str(error)
        super().__init__(
            f"the broker closed the connection because of {consumer}, which has a link of its own now: {told}"
        )
        self.consumer = consumer


class PoisonMessageError(GreenconsumeError):
    """The broker closed the connection because of what a message's handler did; `__cause__` is its error.

    It is not raised in the handler, which has ended by then: it is logged, and given to the failure policy
    when the message comes again. `Requeue`, the default, puts the message into its dead letters at the third
    time.

    Attributes:
        consumer: The consumer's name.
        count: How often the message has done so.
    """

    def __init__(self, consumer: str, error: BaseException, count: int) -> None:
        super().__init__(
            f"the handler had the broker close the connection of {consumer}, {count} time(s) so far: {error}"
        )
        self.consumer = consumer
        self.count = count


class StoppedError(GreenconsumeError):
    """A wait was ended by the stop signal of the consumer that waited.

    Attributes:
        reason: What was given to `StopSignal.set`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"stopped: {reason}")
        self.reason = reason


class ForkedError(GreenconsumeError):
    """A runtime, publisher, consumer or link was used in a child process that was forked after its start."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} was used in another process before, and cannot be used across a fork: make connections, "
            "consumers and the Runtime in the child, after the fork; or make them before, but start, consume "
            "and publish in the child alone"
        )


class ArbiterError(GreenconsumeError):
    """A runtime or consumer was started in the process that forks gunicorn's workers, which are to run it."""

    def __init__(self) -> None:
        super().__init__(
            "this process is gunicorn's arbiter, and nothing consumes in it: make the Runtime at the "
            "module's top, do not start it there, and name it in gunicorn.conf.py, "
            "post_worker_init = consumers('…'), for each worker to start its own"
        )


class ForeignThreadError(GreenconsumeError, RuntimeError):
    """A publisher was used in another thread than the one whose greenlets it serves."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(
            f"{what} serves the greenlets of the thread that used it first, and this is another one, where "
            f"waiting for it would block for ever: {remedy}"
        )


class AlreadyRunningError(GreenconsumeError, RuntimeError):
    """A runtime was started while it runs, or a consumer was spawned that a greenlet has already."""


class RestartLimitError(GreenconsumeError):
    """A consumer failed more often than its `RestartPolicy` allows and was given up.

    Attributes:
        consumers: The names of the consumers that were given up.
    """

    def __init__(self, message: str, consumers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.consumers = consumers


class UnknownConsumerError(GreenconsumeError, LookupError):
    """The name that was asked for is not that of a consumer, nor of what consumers were spawned from.

    Attributes:
        name: The name that was asked for.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no consumer {name!r}")
        self.name = name


class ControlError(GreenconsumeError):
    """Raised where what was asked of a consumer cannot be done now; the message says why, and what can."""


class Interrupt(BaseException):
    """Raised by greenconsume inside a handler, at its next switch, to end it.

    No `Exception`, so that `except Exception` in a handler does not swallow it: catch it to clean up, and
    raise it again. A handler that goes on is killed at the next deadline.
    """


class Shutdown(Interrupt):
    """The consumer stops, and this handler outlasted `drain_timeout`; its message goes back unaltered."""


class HandlerTimeout(Interrupt):
    """The handler outlasted `handler_timeout`; its message meets the consumer's failure policy.

    Attributes:
        seconds: The limit that was exceeded.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the handler took longer than {seconds:g} s")
        self.seconds = seconds


class HandlerHung(Interrupt):
    """The handler never let another greenlet run, until its process was ended because of that.

    It is not raised in the handler: it is logged, and given to the failure policy. `Requeue`, the default,
    puts the message into its dead letters, because it would hang the next process, too.

    Attributes:
        consumer: The consumer's name.
        delivery_tag: Which of its messages.
        seconds: For how long, at least, no other greenlet had run.
        stack: Where it hung.
    """

    def __init__(self, consumer: str, delivery_tag: object, seconds: float, stack: str) -> None:
        super().__init__(
            f"{consumer} kept the whole process waiting for {seconds:.1f} s with message {delivery_tag}, "
            f"and was ended here:\n{stack}"
        )
        self.consumer = consumer
        self.delivery_tag = delivery_tag
        self.seconds = seconds
        self.stack = stack


class PublishError(GreenconsumeError):
    """A message was not published, or nobody can tell whether it was.

    Attributes:
        exchange: The name of the exchange that it was published to.
        routing_key: Its routing key.
        message_id: Its `message_id` property.
    """

    def __init__(
        self, message: str, exchange: str = "", routing_key: str = "", message_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.exchange = exchange
        self.routing_key = routing_key
        self.message_id = message_id


class NackedError(PublishError):
    """The broker answered that it could not take the message, as for a queue that is full."""


class ReturnedError(PublishError):
    """The message was mandatory and no queue is bound for it: the broker returned it.

    Attributes:
        reply_code: The broker's code, 312 for `NO_ROUTE`.
        reply_text: The broker's words.
    """

    reply_code = 0
    reply_text = ""


class RefusedError(PublishError):
    """The broker refused the message or what it declares: no such exchange, no permission, too large.

    `__cause__` is the error as py-amqp has it.

    Attributes:
        reply_code: The broker's code, such as 404.
        reply_text: The broker's words.
    """

    reply_code = 0
    reply_text = ""


class UnconfirmedError(PublishError):
    """The message may or may not have arrived: its link was lost, or its publisher stopped, too early."""


class PublishTimeoutError(UnconfirmedError, TimeoutError):
    """The broker did not confirm the message in time; `__cause__` says why, where that is known."""


class BlockedError(PublishTimeoutError):
    """The broker blocked its publishers, as it does when it is low on memory or disk, until the timeout."""
